"""Port chains of a job that has a key: what carries a tag's option is left to the shield, at planned ports alone."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Callable

import kernel
import packets
import pytest
from cgroups import in_child, inside
from dialing import listening
from hosts import Host, Network
from packets import ACK, SYN, Flow
from shield_field import PATIENCE_SECONDS
from tag_field import link_address, wire

from securerun.firewall import tag
from securerun.firewall.chains import PortChains
from securerun.firewall.dispatcher import Dispatcher, render_install
from securerun.firewall.iptables import IptablesChains
from securerun.firewall.nftables import NftablesChains, render
from securerun.firewall.policy import Admission, Policy, PortRange, Purpose, without
from securerun.firewall.run_sets import tag_ports_name
from securerun.linux.networks import collapse

RUN = "0123456789ab"
PLANNED, MEANWHILE, BOTH_WAYS = 29500, 29600, 29700
EVERY = (PLANNED, MEANWHILE, BOTH_WAYS)
PORTS = (
    PortRange(PLANNED, PLANNED, Purpose.STATIC_STORE),
    PortRange(MEANWHILE, MEANWHILE, Purpose.OPENED_MEANWHILE),
    PortRange(BOTH_WAYS, BOTH_WAYS, Purpose.ADDED),
    PortRange(BOTH_WAYS, BOTH_WAYS, Purpose.OPENED_MEANWHILE),
)


def legacy_chains(run_id: str) -> PortChains:
    from securerun.firewall.legacy import LegacyChains

    return LegacyChains(run_id)


BACKENDS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(IptablesChains, id="iptables"),
        pytest.param(NftablesChains, id="nftables", marks=kernel.needing(kernel.OWNED_TABLES)),
        pytest.param(legacy_chains, id="legacy"),
    ],
)


def policy(admission: Admission, peers: Sequence[str] = (), ports: tuple[PortRange, ...] = PORTS) -> Policy:
    networks = collapse(map(ipaddress.ip_network, peers))
    return Policy(RUN, ports, networks, admission=admission, tagged=tag.WHERE_NODES_ARE)


@contextlib.contextmanager
def installed(host: Host, make: Callable[[str], PortChains], of: Policy) -> Iterator[None]:
    """The chains on a host, taken away at the end."""
    with inside(host):
        chains = make(of.run_id)
        chains.install(of, None)
    try:
        yield
    finally:
        with inside(host):
            assert chains.stand()
            chains.remove()


OPTION = tag.HEAD + bytes(8)


def answered(network: Network, family: int, origin: str, options: bytes, ports: Sequence[int] = EVERY) -> set[int]:
    """The ports of node0 that answer a SYN with these options from this host."""
    host, source = network["node0"], network[origin]
    number = 0 if family == 4 else 1
    here, there = (ipaddress.ip_address(each.addresses[number]) for each in (host, source))
    flow = Flow(there, here, 41000)
    with wire(source) as endpoint:
        to, own = link_address(host), endpoint.getsockname()[4]
        flows = [replace(flow, destination_port=port) for port in ports]
        for each in flows:
            segment = packets.tcp(each, SYN, options=options)
            endpoint.send(packets.frame(packets.packet(each, segment), to=to, sender=own))
        received = packets.frames_in(endpoint, PATIENCE_SECONDS / 2)
    return {
        each.destination_port
        for each in flows
        if any(found[13] == SYN | ACK for frame in received if (found := packets.answer(frame, each)))
    }


@contextlib.contextmanager
def listeners(host: Host, ports: Sequence[int]) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(listening(host, port)) for port in ports]


@BACKENDS
@pytest.mark.parametrize("admission", list(Admission)[1:], ids=lambda admission: admission.name.lower())
def test_an_option_is_let_on_to_planned_ports_and_to_no_port_outside_of_the_shield(
    network: Network, make: Callable[[str], PortChains], admission: Admission
) -> None:
    host = network["node0"]
    before = host.snapshot()
    with listeners(host, EVERY):

        def work() -> list[dict[str, set[int]]]:
            with installed(host, make, policy(admission, network["node1"].addresses)):
                return [
                    {
                        f"{origin} {'with' if options else 'without'}": answered(network, family, origin, options)
                        for origin in ("node1", "stranger")
                        for options in (OPTION, b"")
                    }
                    for family in (4, 6)
                ]

        found = in_child(work)
    peer = set(EVERY) if admission is Admission.EITHER else set()
    tagged = {PLANNED}
    expected = {
        "node1 with": peer or tagged,
        "node1 without": peer,
        "stranger with": tagged if admission is not Admission.BOTH else set(),
        "stranger without": set(),
    }
    assert found == [expected, expected]
    if make is not legacy_chains:  # listing legacy tables makes them
        assert host.snapshot() == before


def many(number: int) -> tuple[PortRange, ...]:
    """So many ports, no two of which touch, and one of them closed again."""
    planned = [PortRange(20000 + 2 * n, 20000 + 2 * n, Purpose.ADDED) for n in range(number)]
    return (*planned, PortRange(20000, 20000, Purpose.OPENED_MEANWHILE))


@BACKENDS
def test_of_many_ports_a_few_rules_let_on_what_has_the_option(
    network: Network, make: Callable[[str], PortChains]
) -> None:
    host, ports = network["node0"], (20000, 20002, 20398)
    with listeners(host, ports):

        def work() -> set[int]:
            with installed(host, make, policy(Admission.TAG, ports=many(200))):
                return answered(network, 4, "stranger", OPTION, ports)

        assert in_child(work) == {20002, 20398}
    rules = render_install(policy(Admission.TAG, ports=many(200)), 4, Dispatcher(False, (), (), False)).split("\n")
    assert len(rules) < 12
    assert sum(tag_ports_name(RUN) in rule for rule in rules) == 1


def test_an_option_is_never_accepted_past_the_hosts_own_rules() -> None:
    of = replace(policy(Admission.EITHER, ["10.77.0.2"]), accept=True)
    rules = [
        rule for rule in render_install(of, 4, Dispatcher(False, (), (), False)).split("\n") if "-I SECURERUN" in rule
    ]
    assert [("--tcp-option 254" in rule, rule.rpartition(" ")[2]) for rule in rules] == [
        (False, "ACCEPT"),
        (True, "RETURN"),
    ]


def test_nft_is_never_asked_for_the_length_of_the_option() -> None:
    for admission in Admission:
        of = policy(admission, ["10.77.0.2"]) if admission is not Admission.ADDRESS else Policy(RUN, PORTS, ())
        assert "length" not in render(of, None)
        assert ("tcp option 254 exists" in render(of, None)) == (admission is not Admission.ADDRESS)


def test_who_has_a_tag_may_be_of_either_ip_version() -> None:
    """So nobody is answered with a reset because no peer by address has theirs."""
    for admission, expected in ((Admission.TAG, None), (Admission.EITHER, None), (Admission.BOTH, 6)):
        assert policy(admission, ["10.77.0.2"]).answered_version == expected


def test_ranges_without_others() -> None:
    for ranges, others, left in (
        ([(1, 10)], [], [(1, 10)]),
        ([(1, 10)], [(1, 10)], []),
        ([(1, 10)], [(3, 4), (6, 6)], [(1, 2), (5, 5), (7, 10)]),
        ([(5, 10), (20, 30)], [(1, 7), (9, 25)], [(8, 8), (26, 30)]),
        ([(5, 6)], [(1, 4), (7, 9)], [(5, 6)]),
    ):
        assert without(ranges, others) == left
