"""What becomes of a policy where the job has a key, and how many nodes were seen with it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from securerun.firewall import tag, tagging
from securerun.firewall.job_key import JobSecret
from securerun.firewall.policy import Admission, Layer, Opening, Policy, PortRange
from securerun.firewall.tag_maps import Untagged
from securerun.firewall.tags import Seen
from securerun.guard import keyed, neighbours, nodes
from securerun.guard.lease import Lease
from securerun.guard.protocol import KeyOrder
from securerun.guard.records import Brief, Record
from securerun.linux import addresses
from securerun.linux.networks import Network

PEERS = (ipaddress.ip_network("10.77.0.2/32"),)
SITE = (ipaddress.ip_network("10.0.0.0/8"),)
PUBLIC = ipaddress.ip_network("203.0.113.7/32")
OWN = (ipaddress.ip_network("10.77.0.0/24"),)
BY_ADDRESS = Policy("0123456789ab", (PortRange(29500, 29500, "store"),), PEERS)


@pytest.mark.parametrize(
    ("peers", "required", "within", "admission", "counts_from"),
    [
        (PEERS, False, (), Admission.EITHER, ()),
        (PEERS, True, (), Admission.BOTH, ()),
        ((), True, (), Admission.TAG, ()),
        (PEERS, False, SITE, Admission.EITHER, SITE),
        ((), True, SITE, Admission.TAG, SITE),
        (PEERS, True, SITE, Admission.BOTH, ()),  # the peers are of the site's already
    ],
)
def test_who_comes_in_by_a_key(
    peers: tuple[Network, ...],
    required: bool,
    within: tuple[Network, ...],
    admission: Admission,
    counts_from: tuple[Network, ...],
) -> None:
    by_key = tagging.by_key(replace(BY_ADDRESS, peers=peers), OWN, required=required, within=within)
    assert by_key.admission is admission
    assert by_key.peers == peers and by_key.tags_from == counts_from
    assert tagging.by_address(by_key, peers) == replace(BY_ADDRESS, peers=peers)


def test_tags_are_written_where_the_job_meets_and_towards_its_peers() -> None:
    by_key = tagging.by_key(BY_ADDRESS, OWN, required=False, towards=(PUBLIC,))
    assert PUBLIC in by_key.tagged and set(tag.WHERE_NODES_ARE) <= set(by_key.tagged)
    assert not any(network.is_loopback for network in by_key.tagged)


def test_a_tag_counts_through_any_interface_that_nobody_named() -> None:
    bound = replace(BY_ADDRESS, interfaces=("eth0",))
    assert tagging.by_key(bound, OWN, required=False).tag_interfaces == ("eth0",)
    derived = tagging.by_key(bound, OWN, required=False, through_any=True)
    assert derived.tag_interfaces == () and derived.interfaces == ("eth0",)


def test_who_answers_at_a_public_port_is_not_held_to_lack_the_key() -> None:
    """Answers from there have no tag, whoever gives them."""
    without = tuple(Untagged(ipaddress.ip_address(f"10.0.0.{port - 9100 + 2}"), port, 1) for port in (9100, 9101))
    tags = SimpleNamespace(seen=lambda: Seen((), without))
    policy = replace(BY_ADDRESS, public=(Opening(9100, 9100),))
    lease = SimpleNamespace(policy=policy, shield=SimpleNamespace(tags=tags), record=SimpleNamespace(nodes=3), own=None)
    seen = nodes.Nodes(cast(Lease, lease))
    seen.look()
    assert seen.unguarded == ("10.0.0.3",)


def test_this_hosts_own_addresses_are_asked_for_once_for_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, ask = [], addresses._all

    def counted() -> list[bytes]:
        questions.append(1)
        return ask()

    monkeypatch.setattr(addresses, "_all", counted)
    lease: Any = SimpleNamespace(
        policy=BY_ADDRESS,
        record=_record(BY_ADDRESS, owner=0, layers=()),
        caller=SimpleNamespace(is_root=True),
        shield=SimpleNamespace(tags=SimpleNamespace(seen=Seen)),
    )
    secret = JobSecret(bytes(range(32)))
    keyed._give(lease, secret.key(), "", KeyOrder(required=False, secret=secret))
    nodes.Nodes(lease).look()
    assert lease.policy.has_tags and lease.own == addresses.own()
    assert len(questions) == 2, "one of them is this test's own"


@pytest.mark.parametrize(
    ("seen", "number"),
    [
        ((), 0),
        (("10.0.0.2",), 1),
        (("10.0.0.2", "fd00::2", "fd00::77"), 1),  # IPv6 has temporary addresses
        (("10.0.0.2", "192.168.7.2"), 1),  # one by Ethernet, and the same by InfiniBand
        (("10.0.0.2", "10.0.0.3", "192.168.7.2"), 2),
        (("fd00::2", "fd00::3"), 2),
        (("203.0.113.7", "203.0.113.8"), 2),  # elsewhere
    ],
)
def test_nodes_are_counted_network_by_network(seen: Iterable[str], number: int) -> None:
    networks = tuple(map(ipaddress.ip_network, ("10.0.0.0/24", "192.168.7.0/24", "fd00::/64")))
    assert nodes.count(map(ipaddress.ip_address, seen), networks) == number


@pytest.mark.parametrize(("required", "counts"), [(False, True), (True, False)])
def test_a_run_with_a_key_counts_as_one_whose_peers_are_everybody(required: bool, counts: bool) -> None:
    """Its port chains let on whoever has the option, also to another's job on that port that has no shield."""
    mine = _record(
        tagging.by_key(BY_ADDRESS, OWN, required=required), owner=1000, layers=(Layer("shield", "socket and tag"),)
    )
    bare = _record(replace(BY_ADDRESS, run_id="ba9876543210"), owner=1001, layers=(Layer("iptables", "SECURERUN"),))
    assert bool([*neighbours.harmed_by(mine, (_brief(bare),))]) == counts
    assert bool([*neighbours.harming(bare, (_brief(mine),))]) == counts


def _record(policy: Policy, *, owner: int, layers: tuple[Layer, ...]) -> Record:
    return Record(
        policy=policy,
        layers=layers,
        launcher=1,
        launcher_start=1,
        guard=1,
        guard_start=1,
        boot_id="",
        network=1,
        processes=1,
        user=owner,
        started=0.0,
        command="",
    )


def _brief(record: Record) -> Brief:
    document: dict[str, Any] = record.document()
    return Brief(record.run_id, document)
