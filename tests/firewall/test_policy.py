"""What ports are for: the words of orders, records and `--json`, which are older than the names that the code has."""

from __future__ import annotations

import ipaddress

import pytest

from securerun.firewall.policy import Policy, PortRange, Purpose, purpose_of
from securerun.guard.documents import policy_document, read_policy

# On the wire and in records: to change one of these is to change the protocol.
WRITTEN = [
    "rendezvous store (c10d)",
    "master port (static rendezvous)",
    "parallel store (torch_npu_run)",
    "rendezvous endpoint",
    "master port",
    "HCCL",
    "HCCL (default range)",
    "HCCL (rank table)",
    "added with --ports",
    "public to some networks (--public)",
    "opened while the job runs",
]


def policy(purpose: Purpose | str) -> Policy:
    return Policy("0123456789ab", (PortRange(7000, 7010, purpose),), (ipaddress.ip_network("10.0.0.0/8"),))


def test_the_words_of_every_purpose_stay_what_they_were() -> None:
    assert [purpose.value for purpose in Purpose] == WRITTEN


@pytest.mark.parametrize("purpose", Purpose)
def test_a_purpose_is_its_words_wherever_it_is_written(purpose: Purpose) -> None:
    assert [str(purpose), f"{purpose}", f"{purpose:<3}"] == [purpose.value] * 3


@pytest.mark.parametrize("purpose", Purpose)
def test_a_purpose_is_read_as_what_was_written(purpose: Purpose) -> None:
    assert purpose_of(purpose.value) is purpose
    (read,) = read_policy(policy_document(policy(purpose))).ports
    assert read.purpose is purpose


def test_a_purpose_of_another_version_stays_the_text_that_it_is() -> None:
    written = policy_document(policy("store of some later torch"))
    assert read_policy(written) == policy("store of some later torch")
    assert policy_document(read_policy(written)) == written


def planned(*ports: tuple[int, int, Purpose]) -> Policy:
    return Policy("0123456789ab", tuple(PortRange(*each) for each in ports), ())


def test_only_what_nobody_asked_for_can_be_left_out() -> None:
    plan = planned((29500, 29500, Purpose.STATIC_STORE), (60000, 60015, Purpose.HCCL_DEFAULT))
    assert plan.unasked_ports() == [(60000, 60015)]
    assert [str(ports) for ports in plan.without({29500, 60003, 60004}).ports] == [
        "29500",
        "60000-60002",
        "60005-60015",
    ]
    assert plan.without({29500, 7000}) is plan
    assert [str(ports) for ports in plan.without(range(1, 65536)).ports] == ["29500"]


def test_what_somebody_asked_for_is_asked_for_wherever_else_it_stands() -> None:
    plan = planned((60000, 60015, Purpose.HCCL_DEFAULT), (60002, 60004, Purpose.ADDED))
    assert plan.unasked_ports() == [(60000, 60001), (60005, 60015)]
    assert [str(ports) for ports in plan.without({60003, 60005}).ports] == ["60000-60001", "60002-60004", "60006-60015"]
