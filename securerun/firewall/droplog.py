"""Who was turned away by the port chains: copies of dropped opening packets, through netfilter's log group.

The chains' NFLOG rules (nft: `log group`) hand the first bytes of what they drop to whoever holds the
group (linux/nflog.py), here the run's guard. A group is the whole host's, and its own rules may log to any: so the
guard takes one by chance from the upper half, which nobody numbers by hand, and counts what carries its run's prefix.
The rules limit the rate, so under a flood the counts are what was seen, not what was sent.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections import Counter

from securerun.firewall.policy import Denial
from securerun.linux.networks import Address
from securerun.linux.nflog import LogGroup

# How many dropped packets a second the rules of any backend hand out at most.
LOGGED_A_SECOND = 1000
# Enough for an IPv6 header, extension headers of the usual size and the ports behind them.
_COPIED_BYTES = 256
# Pairs of source and port, the first that are seen: whoever invents sources gets no more of our memory and time.
_REMEMBERED = 1024
# Of a flood, so that whoever reads has other duties in between.
_READ_AT_ONCE = 256
# Groups are 16 bits. ulogd's examples and what administrators choose are small numbers.
_FIRST_GROUP, _LAST_GROUP = 32768, 65535
_GROUPS_TRIED = 8
_IPV6_EXTENSIONS = {0, 43, 60, 135, 139, 140}
_IPV6_FRAGMENT, _IPV6_AUTHENTICATION = 44, 51


class DropLog:
    """One netfilter log group, held by this process; counts (source, port) of the packets logged to it.

    prefix: only what rules with this prefix log is counted; all where it is empty.
    more: packets of those beyond the first that are remembered.
    Raises OSError when the group is somebody else's (EPERM) or the kernel has no nfnetlink_log.
    """

    def __init__(self, group: int, prefix: str = "") -> None:
        self.group = group
        self._prefix = prefix
        self.more = 0
        self._seen: Counter[tuple[Address, int]] = Counter()
        self._log = LogGroup(group, _COPIED_BYTES)

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._log.fileno()

    def read(self) -> None:
        """Take in what has been logged since, or a part of it; never blocks."""
        for packet in self._log.packets(_READ_AT_ONCE, self._prefix):
            self._count(packet)

    def denied(self) -> tuple[Denial, ...]:
        """Everyone turned away so far who is remembered, most packets first."""
        return tuple(Denial(source, port, packets) for (source, port), packets in self._seen.most_common())

    def close(self) -> None:
        """Give the group back."""
        self._log.close()

    def _count(self, packet: bytes) -> None:
        opening = source_and_port(packet)
        if opening is None:
            return
        if opening in self._seen or len(self._seen) < _REMEMBERED:
            self._seen[opening] += 1
        else:
            self.more += 1


def log_prefix(run_id: str) -> str:
    """Return the prefix with which the rules of a run log what they drop."""
    return f"securerun {run_id}"


def open_drop_log(run_id: str) -> DropLog | None:
    """Open a free log group for a run, chosen by chance and not by whoever ordered it; None where there is none."""
    for _ in range(_GROUPS_TRIED):
        chance = int.from_bytes(os.urandom(2), "big")
        with contextlib.suppress(OSError):
            return DropLog(_FIRST_GROUP + chance % (_LAST_GROUP - _FIRST_GROUP + 1), log_prefix(run_id))
    return None


def source_and_port(packet: bytes) -> tuple[Address, int] | None:
    """Source address and TCP destination port of an IP packet; None for what cannot be read."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        return ipaddress.IPv4Address(packet[12:16]), _port(packet, (packet[0] & 0xF) * 4)
    if version == 6 and len(packet) >= 40:
        return ipaddress.IPv6Address(packet[8:24]), _port(packet, _transport_offset(packet))
    return None


def _port(packet: bytes, transport: int) -> int:
    return int.from_bytes(packet[transport + 2 : transport + 4], "big")


def _transport_offset(packet: bytes) -> int:
    following, offset = packet[6], 40
    while offset + 2 <= len(packet):
        if following in _IPV6_EXTENSIONS:
            size = (packet[offset + 1] + 1) * 8
        elif following == _IPV6_AUTHENTICATION:
            size = (packet[offset + 1] + 2) * 4
        elif following == _IPV6_FRAGMENT:
            size = 8
        else:
            break
        following, offset = packet[offset], offset + size
    return offset
