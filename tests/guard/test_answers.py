"""Answers without a tag: the job sees an error at once, and people hear who answered, once a minute."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import select
import socket
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import kernel
import pytest
from cgroups import inside, socket_made_in
from dialing import RETRANSMISSION_SECONDS, listening
from hosts import Network
from shield_field import FAMILIES, port_of
from tag_field import BY_TAG, KEY, TagField, shielded, tag_field, within

from securerun.errors import PolicyError
from securerun.firewall import tag, tagging
from securerun.firewall.policy import Admission, Opening, Policy, PortRange, Purpose
from securerun.firewall.tags import Seen
from securerun.guard import answers
from securerun.guard.answers import Answers, open_answers
from securerun.guard.documents import ProtocolError, policy_document, read_policy
from securerun.guard.lease import Lease
from securerun.linux.addresses import own as own_of_host
from securerun.linux.networks import collapse


@pytest.fixture
def field(network: Network) -> Iterator[TagField]:
    kernel.require(kernel.TAGS)
    with tag_field(network) as made:
        yield made


def lease(shield: object, *, required: bool = False, keyed: bool = True) -> Any:  # noqa: ANN401 - what is asked of it
    return SimpleNamespace(shield=shield, key=KEY if keyed else None, key_required=required)


def connected(address: str, port: int) -> int:
    """The errno of a connection that waits as long as the kernel does."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as endpoint:
        return endpoint.connect_ex((address, port))


@contextlib.contextmanager
def looked_out(field: TagField, port: int) -> Iterator[Answers]:
    policy = replace(BY_TAG, ports=(PortRange(port, port, Purpose.STATIC_STORE),))
    with shielded(field.job, policy) as held, inside(field.host):
        found = open_answers(lease(held))
        assert found is not None
        with contextlib.closing(found):
            yield found


@FAMILIES
def test_a_job_that_meets_no_node_of_its_own_sees_an_error_at_once(field: TagField, family: int) -> None:
    address = field.stranger.addresses[0 if family == 4 else 1]
    with listening(field.stranger) as fake, looked_out(field, port_of(fake)) as found:
        port = port_of(fake)
        said: list[str] = []

        def meet() -> None:
            assert select.select([found], [], [], RETRANSMISSION_SECONDS)[0]
            said.extend(found.take_in())

        for expected in (1, 1):
            with _meanwhile(meet):
                assert within(field.job, field.host, lambda: connected(address, port)) == errno.ECONNABORTED
            assert len(said) == expected  # the same is not said again
        who = f"[{address}]:{port}" if family == 6 else f"{address}:{port}"
        assert said == [
            f"{who} answered without the tag of this job's key (fingerprint 01234567), so it counts as no node of it: "
            "if it is one, start it by securerun with the same key, make what is public there public here too, or name "
            "it with --peers; the connection was ended"
        ]


@FAMILIES
def test_a_port_that_is_public_on_one_node_and_planned_on_another_is_told_where_it_is_planned(
    field: TagField, family: int
) -> None:
    address = field.peer.addresses[0 if family == 4 else 1]
    with contextlib.ExitStack() as stack:
        port = 7171
        stack.enter_context(shielded(field.far, replace(BY_TAG, public=(Opening(port, port),))))
        own = stack.enter_context(socket_made_in(field.far, lambda: listening(field.peer)))
        stack.enter_context(socket_made_in(field.far, lambda: listening(field.peer, port)))
        found = stack.enter_context(looked_out(field, port))
        said: list[str] = []

        def meet() -> None:
            assert select.select([found], [], [], RETRANSMISSION_SECONDS)[0]
            said.extend(found.take_in())

        assert within(field.job, field.host, lambda: connected(address, port_of(own))) == 0
        with _meanwhile(meet):
            assert within(field.job, field.host, lambda: connected(address, port)) == errno.ECONNABORTED
    (line,) = said
    where = f"[{address}]:{port}" if family == 6 else f"{address}:{port}"
    assert line.startswith(f"{where} answered without a tag, though {address} has this job's key: port {port} is ")
    assert "name it in --public on both nodes or on neither" in line and "start it by securerun" not in line


@contextlib.contextmanager
def _meanwhile(work: Any) -> Iterator[None]:  # noqa: ANN401
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as beside:
        done = beside.submit(work)
        yield
        done.result()


def test_of_many_who_answer_a_bounded_number_is_told(field: TagField, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_MOST_TOLD", 3)
    with looked_out(field, 29500) as found:
        ended = []
        fake = SimpleNamespace(answers=lambda: [answer(f"10.0.0.{number % 5}") for number in range(40)], seen=Seen)
        monkeypatch.setattr(found, "_tags", fake)
        monkeypatch.setattr(
            found, "_diagnosis", SimpleNamespace(end=lambda *ends: ended.append(ends), close=lambda: None)
        )
        assert len(found.take_in()) == 3
        assert len(ended) == 40
        assert found.take_in() == ()
        monkeypatch.setattr(answers, "_FORGOTTEN_SECONDS", 0.0)
        assert len(found.take_in()) == 3


def answer(target: str) -> Any:  # noqa: ANN401
    address = ipaddress.ip_address
    return SimpleNamespace(target=address(target), port=1, source=address("10.0.0.9"), source_port=2, cookie=3)


def test_the_fix_is_one_that_helps(field: TagField) -> None:
    with shielded(field.job) as held:
        for required, keyed, fix in ((True, True, "--peers, and --key auto"), (False, False, "--loopback any")):
            found = open_answers(lease(held, required=required, keyed=keyed))
            assert found is not None
            with contextlib.closing(found):
                assert found._whose.endswith(fix)
    assert open_answers(lease(None)) is None
    assert open_answers(lease(SimpleNamespace(tags=None))) is None


# --- what a key makes of a policy -------------------------------------------------------------------


def test_a_key_adds_to_peers_or_narrows_them(field: TagField) -> None:
    peers = collapse([ipaddress.ip_network("203.0.113.7")])
    plain = Policy("0123456789ab", (), ())
    with inside(field.host):
        own = own_of_host().networks
        for named, required, admission in (
            ((), False, Admission.EITHER),
            (peers, False, Admission.EITHER),
            ((), True, Admission.TAG),
            (peers, True, Admission.BOTH),
        ):
            made = tagging.by_key(replace(plain, peers=named), own, required=required)
            assert made.admission is admission and made.peers == named
            assert set(tag.WHERE_NODES_ARE) <= set(made.tagged)
            assert (peers[0] in made.tagged) == bool(named)
            assert not any(each.is_loopback for each in made.tagged)
        closed = tagging.by_key(replace(plain, close_loopback=True), own, required=False)
        assert set(tag.LOOPBACK) <= set(closed.tagged)
    assert {str(each) for each in own} >= {"10.77.0.0/24", "fd77::/64"}


@pytest.mark.parametrize(("is_shielded", "expected"), [(True, [(29500, 29500)]), (False, [])])
def test_port_chains_let_no_tag_on_where_no_shield_judges_it(
    is_shielded: bool, expected: list[tuple[int, int]]
) -> None:
    policy = replace(BY_TAG, ports=(PortRange(29500, 29500, Purpose.STATIC_STORE),))
    for required in (False, True):
        lease: Any = SimpleNamespace(is_shielded=is_shielded, key_required=required)
        assert Lease.of_chains(lease, policy).tag_ports() == expected


def test_own_networks_are_those_of_all_interfaces(field: TagField) -> None:
    for command in (
        "address add 198.51.100.9/28 dev eth0",
        "address add 2001:db8:5::9/56 dev eth0",
        "address add 192.0.2.1 peer 192.0.2.77 dev eth0",
    ):
        field.host.run(["ip", *command.split()], check=True)
    with inside(field.host):
        found = {str(each) for each in own_of_host().networks}
    assert found >= {"198.51.100.0/28", "2001:db8:5::/56", "192.0.2.1/32", "192.0.2.77/32"}


# --- on the way from the launcher, and in records ---------------------------------------------------


def test_what_a_policy_says_of_tags_comes_through_and_nothing_that_cannot_be_right() -> None:
    within = collapse([ipaddress.ip_network("10.0.0.0/8")])
    for policy in (
        BY_TAG,
        replace(BY_TAG, admission=Admission.EITHER),
        replace(BY_TAG, tags_from=within),
        Policy("0123456789ab", (), ()),
    ):
        document = policy_document(policy)
        assert read_policy(json.loads(json.dumps(document))) == policy
        assert ("tagged" in document) == policy.has_tags
    plain = policy_document(Policy("0123456789ab", (), ()))
    with pytest.raises(PolicyError):
        read_policy({**plain, "tags_from": ["10.0.0.0/8"]})
    document = policy_document(BY_TAG)
    wrong: tuple[dict[str, object], ...] = (
        {"admission": "everybody"},
        {"admission": ["tag"]},
        {"admission": "address"},
        {"tagged": []},
        {"tagged": ["fe80::/10", "10.0.0.0/8"]},
        {"tagged": "10.0.0.0/8"},
        {"tagged": [7]},
        {"tags_from": ["fe80::/10", "10.0.0.0/8"]},
        {"tags_from": 7},
        {"tags_from": ["10.0.0.0/8"], "admission": "tag and address", "peers": ["10.0.0.2/32"]},
        {"tagged": ["10.0.0.0/8%eth0"]},
        {"key": "00"},
    )
    for changes in wrong:
        with pytest.raises((ProtocolError, PolicyError, ValueError)):
            read_policy({**document, **changes})
