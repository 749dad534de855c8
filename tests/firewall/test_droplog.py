"""Who was dropped, read from packets as strangers make them, and from the kernel's log group."""

from __future__ import annotations

import ipaddress
import struct
from typing import cast

import pytest
from cgroups import inside
from hosts import Network

from securerun.firewall import droplog
from securerun.firewall.chains import Logging, PortChains, PortChainsUnavailable
from securerun.firewall.droplog import DropLog, source_and_port
from securerun.firewall.policy import Denial, Policy

SOURCE4, SOURCE6 = ipaddress.IPv4Address("10.77.0.3"), ipaddress.IPv6Address("fd77::3")
PORT = 29500
TCP = struct.pack("!HH", 40000, PORT) + bytes(16)
HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION, MOBILITY, NO_MORE = 0, 43, 44, 51, 60, 135, 59
IS_TCP = 6


def ipv4(options: bytes = b"") -> bytes:
    words = (20 + len(options)) // 4
    return bytes([0x40 | words]) + bytes(11) + SOURCE4.packed + bytes(4) + options + TCP


def ipv6(*extensions: tuple[int, bytes], last: int = IS_TCP) -> bytes:
    """A packet with extension headers: the kind of each, and what stands in it behind the kind of the next."""
    kinds = [*(kind for kind, _ in extensions), last]
    header = b"\x60" + bytes(5) + bytes([kinds[0], 64]) + SOURCE6.packed + bytes(16)
    return header + b"".join(bytes([kinds[i + 1]]) + rest for i, (_, rest) in enumerate(extensions)) + TCP


def extension(eights: int) -> bytes:
    return bytes([eights - 1]) + bytes(8 * eights - 2)


@pytest.mark.parametrize("options", [b"", bytes(4), bytes(40)], ids=len)
def test_the_port_stands_behind_the_options_of_ipv4(options: bytes) -> None:
    assert source_and_port(ipv4(options)) == (SOURCE4, PORT)


@pytest.mark.parametrize(
    "extensions",
    [
        [],
        [(HOP_BY_HOP, extension(1))],
        [(HOP_BY_HOP, extension(2)), (ROUTING, extension(3)), (DESTINATION, extension(1))],
        [(FRAGMENT, bytes(7))],
        [(AUTHENTICATION, bytes([4]) + bytes(22))],
        [(MOBILITY, extension(1)), (FRAGMENT, bytes(7)), (AUTHENTICATION, bytes([1]) + bytes(10))],
    ],
    ids=lambda extensions: "-".join(str(kind) for kind, _ in extensions) or "none",
)
def test_the_port_stands_behind_the_extension_headers_of_ipv6(extensions: list[tuple[int, bytes]]) -> None:
    assert source_and_port(ipv6(*extensions)) == (SOURCE6, PORT)


def test_what_a_stranger_cuts_short_is_counted_without_a_port_or_not_at_all() -> None:
    """Nothing of it is read from behind the copy, and nothing raises."""
    whole = ipv6((HOP_BY_HOP, extension(4)), (ROUTING, extension(255)))
    for length in range(len(whole)):
        found = source_and_port(whole[:length])
        assert found is None or found[0] == SOURCE6
    assert source_and_port(ipv6((HOP_BY_HOP, extension(255)))[:256]) == (SOURCE6, 0)
    assert source_and_port(b"") is None
    assert source_and_port(b"\x50" + bytes(60)) is None
    assert source_and_port(b"\x40" + bytes(11) + SOURCE4.packed) is None


def test_a_group_is_held_by_one(network: Network) -> None:
    with inside(network["node0"]):
        first = DropLog(4711)
        with pytest.raises(OSError, match="not permitted"):
            DropLog(4711)
        first.close()
        DropLog(4711).close()


def test_what_is_no_packet_is_passed_over(network: Network) -> None:
    with inside(network["node0"]):
        log = DropLog(4711)
        log._count(b"")
        log._count(b"\x00")
        assert log.denied() == ()
        log._count(ipv4())
        assert [(denial.source, denial.port, denial.packets) for denial in log.denied()] == [(SOURCE4, PORT, 1)]
        log.close()


def test_a_flood_of_sources_is_remembered_up_to_a_bound_and_counted_beyond(network: Network) -> None:
    """Nor does a read last as long as somebody sends."""
    with inside(network["node0"]):
        log = DropLog(4711)
        for number in range(3 * droplog._REMEMBERED):
            log._count(ipv4()[:12] + ipaddress.IPv4Address(number).packed + ipv4()[16:])
        log._count(ipv4()[:12] + ipaddress.IPv4Address(0).packed + ipv4()[16:])
        found = log.denied()
        log.close()
    assert len(found) == droplog._REMEMBERED
    assert found[0] == Denial(ipaddress.IPv4Address(0), PORT, 2)
    assert log.more == 2 * droplog._REMEMBERED


class Chains:
    """Port chains of a kernel that has no NFLOG target, or of one that is busy."""

    def __init__(self, *, can_log: bool) -> None:
        self.can_log = can_log
        self.refuses = False
        self.asked: list[int | None] = []

    def install(self, _policy: Policy, log_group: int | None) -> None:
        self.asked.append(log_group)
        if self.refuses or (log_group is not None and not self.can_log):
            raise PortChainsUnavailable("no such target")


def test_without_the_target_nothing_is_logged_and_what_changes_while_the_job_runs_is_installed_all_the_same() -> None:
    chains, policy, logging = Chains(can_log=False), Policy("0123456789ab", (), ()), Logging()
    for _ in range(3):
        logging.install(cast("PortChains", chains), policy, 77)
    assert chains.asked == [77, None, None, None]


def test_a_refusal_in_between_does_not_end_the_logging() -> None:
    chains, policy, logging = Chains(can_log=True), Policy("0123456789ab", (), ()), Logging()
    logging.install(cast("PortChains", chains), policy, 77)
    chains.refuses = True
    with pytest.raises(PortChainsUnavailable):
        logging.install(cast("PortChains", chains), policy, 77)
    chains.refuses = False
    logging.install(cast("PortChains", chains), policy, 77)
    assert chains.asked == [77, 77, 77]
