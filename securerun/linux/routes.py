"""This host's routes, as the kernel tells them (rtnetlink(7)): which interfaces lead to a network."""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator

from securerun.linux import netlink
from securerun.linux.netlink import Attributes, Channel
from securerun.linux.networks import Network

# include/uapi/linux/rtnetlink.h
_NEW_ROUTE, _GET_ROUTE = 24, 26
# struct rtmsg: family, length of the destination, of the source, type of service, table, protocol, scope, type, flags
_ROUTE = struct.Struct("=BBBBBBBBI")
_UNICAST = 1
_DESTINATION, _DEVICE, _MULTIPATH, _TABLE = 1, 4, 9, 15
# struct rtnexthop: length, flags, weight, device; attributes follow
_NEXT_HOP = struct.Struct("=HBBi")
_TABLE_NUMBER = struct.Struct("=I")
_DEVICE_NUMBER = struct.Struct("=i")
# A router with the whole Internet's routes is no training host, and its million would take seconds.
_MOST_ROUTES = 50_000


class Routes:
    """The routes of this network namespace at one moment, of all tables and both IP versions.

    Raises OSError where the kernel does not tell them, or has too many.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int], dict[int, dict[int, set[int]]]] = {}
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            for table, length, number, devices in _dump(family):
                lengths = self._tables.setdefault((version, table), {})
                lengths.setdefault(length, defaultdict(set))[number] |= devices

    def devices_to(self, networks: Iterable[Network]) -> frozenset[int]:
        """Return the interfaces, by index, that lead to any host of these networks by any table.

        All that equally good routes and next hops name: packets go, and come, through each of them.
        """
        wanted = tuple(networks)
        found: set[int] = set()
        for (version, _), lengths in self._tables.items():
            descending = sorted(lengths, reverse=True)
            for network in wanted:
                if network.version == version:
                    found |= _most_specific(network, lengths, descending)
                    found.update(*_within(network, lengths))
        return frozenset(found)


def _most_specific(network: Network, lengths: dict[int, dict[int, set[int]]], descending: list[int]) -> set[int]:
    """Return the devices of the longest prefix that holds the whole network."""
    for length in descending:
        if length <= network.prefixlen:
            devices = lengths[length].get(int(network.network_address) >> (network.max_prefixlen - length))
            if devices:
                return devices
    return set()


def _within(network: Network, lengths: dict[int, dict[int, set[int]]]) -> Iterator[set[int]]:
    """Yield the devices of the routes to parts of the network."""
    if network.prefixlen == network.max_prefixlen:
        return
    prefix = int(network.network_address) >> (network.max_prefixlen - network.prefixlen)
    for length, numbers in lengths.items():
        if length > network.prefixlen:
            yield from (numbers[number] for number in numbers if number >> (length - network.prefixlen) == prefix)


def _dump(family: int) -> Iterator[tuple[int, int, int, set[int]]]:
    """Yield table, prefix length, prefix and devices of each route on which packets leave this host."""
    bits = 32 if family == socket.AF_INET else 128
    for count, payload in enumerate(_payloads(family)):
        if count >= _MOST_ROUTES:
            raise OSError(f"this host has more than {_MOST_ROUTES} routes")
        _, length, _, _, table, _, _, kind, _ = netlink.unpacked(_ROUTE, payload)
        if kind != _UNICAST:
            continue
        found = netlink.attributes(payload[_ROUTE.size :])
        prefix = int.from_bytes(found.get(_DESTINATION, b""), "big") >> (bits - length)
        if _TABLE in found:  # the header's field holds 255 tables
            (table,) = netlink.unpacked(_TABLE_NUMBER, found[_TABLE])
        yield table, length, prefix, set(_devices(found))


def _devices(route: Attributes) -> Iterator[int]:
    if _DEVICE in route:
        yield from netlink.unpacked(_DEVICE_NUMBER, route[_DEVICE])
    hops = route.get(_MULTIPATH, b"")
    while len(hops) >= _NEXT_HOP.size:
        length, _, _, device = _NEXT_HOP.unpack_from(hops)
        yield device
        hops = hops[max(_NEXT_HOP.size, (length + 3) & ~3) :]


def _payloads(family: int) -> Iterator[bytes]:
    """Yield the routes of one family, each as the kernel's message holds it. Raises OSError."""
    question = netlink.framed(_GET_ROUTE, _ROUTE.pack(family, *([0] * 8)), netlink.REQUEST | netlink.DUMP)
    with Channel(netlink.ROUTE) as channel:
        yield from (payload for kind, payload in channel.dump(question) if kind == _NEW_ROUTE)
