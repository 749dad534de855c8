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
