"""Interfaces that lie on others, as the kernel tells them (rtnetlink(7)): bridges, bonds, teams, VRFs and VLANs.

A packet that comes in by a bridge's port or a bond's member is the bridge's or the bond's by the time a firewall's
input or a socket sees it (net/core/dev.c: __netif_receive_skb_core; of a VRF, l3mdev_l3_rcv), and one with a tag is its
VLAN's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from securerun.linux import netlink
from securerun.linux.netlink import Attributes, Channel

# include/uapi/linux/rtnetlink.h; struct ifinfomsg: family, type, index, flags, change
_NEW_LINK, _GET_LINK = 16, 18
_LINK = struct.Struct("=BxHiII")
# include/uapi/linux/if_link.h
_LOWER, _MASTER, _INFORMATION, _OTHER_NAMESPACE, _KIND = 5, 10, 18, 37, 1
_NUMBER = struct.Struct("=I")
# What takes the packets of the one that it lies on: of veth and tunnels IFLA_LINK means something else.
_ON_TOP = frozenset({"vlan", "macvlan", "ipvlan", "macsec", "ipoib"})
# netdev_upper_dev_link (net/core/dev.c) forbids rings, and MAX_NEST_DEV is 8; a listing is not made at one moment.
_DEEPEST = 9


class Stacked:
    """The interfaces of this network namespace at one moment, by their numbers.

    Raises OSError where the kernel does not tell them.
    """

    def __init__(self) -> None:
        self._masters: dict[int, int] = {}
        self._on_top: dict[int, set[int]] = {}
        for index, found in _dump():
            if _MASTER in found:
                (self._masters[index],) = netlink.unpacked(_NUMBER, found[_MASTER])
            if _kind(found) in _ON_TOP and _LOWER in found and _OTHER_NAMESPACE not in found:
                (lower,) = netlink.unpacked(_NUMBER, found[_LOWER])
                self._on_top.setdefault(lower, set()).add(index)

    def seen_as(self, index: int) -> int:
        """Return the interface that the packets of this one are seen on: itself, if it is a member of no other."""
        for _ in range(_DEEPEST):
            if index not in self._masters:
                break
            index = self._masters[index]
        return index

    def on_top(self, index: int) -> frozenset[int]:
        """Return the interfaces that lie on this one and take a part of its packets, as they are seen in the end."""
        found: set[int] = set()
        wave = {index}
        for _ in range(_DEEPEST):
            wave = {self.seen_as(upper) for lower in wave for upper in self._on_top.get(lower, ())} - found
            found |= wave
        return frozenset(found - {index})


def _kind(found: Attributes) -> str:
    if _INFORMATION not in found:
        return ""
    return netlink.attributes(found[_INFORMATION]).get(_KIND, b"").rstrip(b"\0").decode(errors="replace")


def _dump() -> Iterator[tuple[int, Attributes]]:
    question = netlink.framed(_GET_LINK, _LINK.pack(0, 0, 0, 0, 0), netlink.REQUEST | netlink.DUMP)
    with Channel(netlink.ROUTE) as channel:
        for payload in channel.listed(question, _NEW_LINK):
            _, _, index, _, _ = netlink.unpacked(_LINK, payload)
            yield index, netlink.attributes(payload[_LINK.size :])
