"""What is said of who was turned away: the rule that did it, and what mends that, for the node that one thinks of."""

from __future__ import annotations

import ipaddress
import time
from dataclasses import replace

import plans
import pytest

from securerun.firewall.policy import Denial, Layer, Opening, Policy, PortRange, Purpose
from securerun.guard.protocol import Guarding, Notice
from securerun.job.job import Endpoint, Job
from securerun.linux.networks import Address, collapse
from securerun.protection import denials, words
from securerun.protection.denials import KeyInForce, Reason

PORT = 29500
RUN = "0123456789ab"
PEER, STRANGER, OWN = map(ipaddress.ip_address, ("10.77.0.2", "10.99.0.9", "10.77.0.1"))
PORTS = (PortRange(PORT, PORT, "master port"),)
ANY_WAY = Policy(RUN, PORTS, collapse([ipaddress.ip_network("10.77.0.0/24")]))
BY_ETH0 = replace(ANY_WAY, interfaces=("eth0",))
CLOSED = replace(ANY_WAY, close_loopback=True)
BOTH = replace(ANY_WAY, peers=collapse(map(ipaddress.ip_network, ("10.77.0.0/24", "fd77::/64"))))


def is_own(address: Address) -> bool:
    return address == OWN


@pytest.mark.parametrize(
    ("policy", "source", "expected"),
    [
        (ANY_WAY, "10.99.0.9", Reason.STRANGER),
        (BY_ETH0, "10.99.0.9", Reason.STRANGER),
        (CLOSED, "10.99.0.9", Reason.STRANGER),
        (BOTH, "fd99::9", Reason.STRANGER),
        (ANY_WAY, "fd99::9", Reason.VERSION),
        (BY_ETH0, "10.77.0.2", Reason.INTERFACE),
        (CLOSED, "10.77.0.1", Reason.LOOPBACK),
        (CLOSED, "127.0.0.1", Reason.LOOPBACK),
        (CLOSED, "127.9.9.9", Reason.LOOPBACK),
        (CLOSED, "::1", Reason.LOOPBACK),
        (ANY_WAY, "10.77.0.1", Reason.SINCE),
        (ANY_WAY, "127.0.0.1", Reason.STRANGER),
    ],
)
def test_the_rule_that_turned_somebody_away_is_told_from_policy_and_source(
    policy: Policy, source: str, expected: Reason
) -> None:
    assert denials.reason(policy, ipaddress.ip_address(source), is_own) is expected


ADDS, INSISTS = KeyInForce("1a2b3c4d", required=False), KeyInForce("1a2b3c4d", required=True)


@pytest.mark.parametrize(
    ("policy", "key", "source", "expected"),
    [
        (ANY_WAY, ADDS, "10.99.0.9", Reason.KEY),
        (ANY_WAY, INSISTS, "10.77.0.2", Reason.KEY),
        (BY_ETH0, INSISTS, "10.77.0.2", Reason.KEY),
        (BY_ETH0, ADDS, "10.77.0.2", Reason.INTERFACE),
        (CLOSED, INSISTS, "10.77.0.1", Reason.LOOPBACK),
    ],
)
def test_who_has_no_tag_where_one_is_insisted_on_is_told_of_that_whatever_its_address(
    policy: Policy, key: KeyInForce, source: str, expected: Reason
) -> None:
    assert denials.reason(policy, ipaddress.ip_address(source), is_own, key=key) is expected


def test_a_peer_without_a_tag_is_not_to_be_named_once_more() -> None:
    said = {policy: denials.explained(policy, Denial(PEER, PORT, 1), INSISTS) for policy in (ANY_WAY, BY_ETH0)}
    for line in said.values():
        assert "did not show the tag of this job's key (fingerprint 1a2b3c4d)" in line
        assert "--key auto" in line and "--peers" not in line
    assert "eth0" not in said[ANY_WAY] and "through another interface than eth0" in said[BY_ETH0]
    assert "add it with --peers, and --key auto" in denials.explained(ANY_WAY, Denial(STRANGER, PORT, 1), INSISTS)


def test_this_hosts_own_addresses_are_known_as_such() -> None:
    assert denials.is_of_this_host(ipaddress.ip_address("127.0.0.1"))
    assert not denials.is_of_this_host(STRANGER)


def line(policy: Policy, source: Address) -> str:
    (said,) = words.news(policy, Notice((Denial(source, PORT, 3),)))
    return said


def test_a_strangers_notice_is_the_one_that_names_peers() -> None:
    assert line(ANY_WAY, STRANGER) == (
        "blocked 10.99.0.9 → 29500 (3 attempts); if it is a node of this job, add it with --peers"
    )


def test_a_peer_by_another_interface_is_told_of_interfaces_and_not_to_be_added() -> None:
    said = line(BY_ETH0, PEER)
    assert "did not come in through eth0" in said
    assert "--interface eth0,..." in said
    assert "ip route get 10.77.0.2" in said
    assert "if it is that peer and not somebody with its address" in said
    assert "--peers" not in said


def test_a_process_of_this_host_is_told_of_the_loopback_and_not_to_be_added() -> None:
    said = line(CLOSED, ipaddress.ip_address("127.0.0.1"))
    assert "--loopback any" in said
    assert "securerunctl exec" in said
    assert "--peers" not in said


def test_what_a_stranger_can_forge_is_never_advised_to_be_let_in_without_a_condition() -> None:
    for policy, source in ((ANY_WAY, STRANGER), (BY_ETH0, PEER), (CLOSED, ipaddress.ip_address("::1"))):
        advice = line(policy, source).partition("; ")[2]
        assert " if it " in f" {advice}", advice


def test_the_summary_says_of_each_rule_once_what_mends_it() -> None:
    denied = [Denial(source, port, 1) for source in (PEER, STRANGER) for port in (PORT, 40000, 40001)]
    said = list(words.end(BY_ETH0, BY_ETH0, denied))
    assert [each.partition(": ")[0] for each in said] == [f"run {RUN}"] * 7
    assert sum("--interface" in each for each in said) == 1
    assert said[-1].endswith("if one of the others is a node of this job, add it with --peers")
    assert list(words.end(BY_ETH0, BY_ETH0, denied[3:]))[-1].endswith(
        "if one of these is a node of this job, add it with --peers"
    )
    assert not any("--peers" in each for each in words.end(BY_ETH0, BY_ETH0, denied[:3]))


def test_who_was_turned_away_before_its_name_had_this_address_is_called_a_peer() -> None:
    before = replace(BY_ETH0, peers=collapse([ipaddress.ip_network("10.77.0.7")]))
    (said,) = words.end(before, BY_ETH0, [Denial(PEER, PORT, 1)])
    assert said.endswith("it is a peer by now")


def test_many_peers_and_many_denials_are_told_at_once() -> None:
    peers = collapse(ipaddress.ip_network(f"10.{one >> 8}.{one & 255}.{2 * (one % 100)}") for one in range(20_000))
    policy = replace(BY_ETH0, peers=peers)
    began = time.monotonic()
    assert all(policy.has_peer(peer.network_address) for peer in peers)
    assert not any(policy.has_peer(ipaddress.ip_address(0x0B000000 + number)) for number in range(10_000))
    assert time.monotonic() - began < 2
    assert not policy.has_peer(ipaddress.ip_address("fd77::1"))


def test_who_was_turned_away_from_a_public_port_is_told_of_it_and_not_of_the_peers() -> None:
    public = (Opening(8080, 8090, (ipaddress.IPv4Network("10.9.0.0/16"),)), Opening(9090, 9090, ANY_WAY.peers))
    ports = (*PORTS, PortRange(8080, 8090, Purpose.PUBLIC), PortRange(9090, 9090, Purpose.PUBLIC))
    policy = replace(ANY_WAY, ports=ports, public=public)
    for port in (8080, 8085, 9090):
        # On a closed loopback too: a probe of this host's.
        for closed in (policy, replace(policy, close_loopback=True)):
            for source in (STRANGER, ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("fd99::9")):
                assert denials.reason(closed, source, is_own, port=port) is Reason.PUBLIC
    assert denials.reason(policy, STRANGER, is_own, port=PORT) is Reason.STRANGER
    assert denials.reason(replace(policy, interfaces=("eth0",)), PEER, is_own, port=8080) is Reason.INTERFACE
    said = denials.explained(policy, Denial(STRANGER, 8085, 1))
    assert "with --public '8080-8090=...'" in said and "--peers" not in said
    denied = [Denial(STRANGER, port, 1) for port in (8080, 8085, 9090, PORT)]
    lines = list(denials.summary(policy, policy, denied))
    assert ["--public" in line for line in lines] == [True, False, True, False, False]
    assert lines[-1] == "if one of the others is a node of this job, add it with --peers"


@pytest.mark.parametrize(
    ("host", "peers", "layers", "is_said"),
    [
        ("node0", ("10.77.0.2",), (), True),
        ("node0", ("10.77.0.2",), (Layer("iptables", "SECURERUN"),), False),
        ("node0", ("10.77.0.2", "fd77::2"), (), False),
        ("10.77.0.1", ("10.77.0.2",), (), False),
        ("fd77::1", ("fd77::2",), (), False),
        ("localhost", ("10.77.0.2",), (), False),
    ],
)
def test_that_nobody_answers_is_said_before_the_start_where_the_endpoint_may_have_such_an_address(
    host: str, peers: tuple[str, ...], layers: tuple[Layer, ...], is_said: bool
) -> None:
    plan = plans.plan(peers, job=Job("static", Endpoint(host, PORT), 2, 2, 0, plans.COMMAND))
    said = list(words.start(plan, Guarding((Layer("shield", "socket filter on /job"), *layers)), "directly"))
    assert any(f"if {host} has one, a node that tries it first waits" in each for each in said) == is_said
