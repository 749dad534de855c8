"""This host's routes and the rules that choose among them, as the kernel tells them (rtnetlink(7)).

Which interfaces lead to a network, by any table, or by those that a connection without an address of its own is looked
up in: hosts with several networks often have a table for each of their addresses (`ip rule add from 10.81.0.1`).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from securerun.linux import netlink
from securerun.linux.netlink import Attributes, Channel
from securerun.linux.networks import Network

# include/uapi/linux/rtnetlink.h
_NEW_ROUTE, _GET_ROUTE, _NEW_RULE, _GET_RULE = 24, 26, 32, 34
# struct rtmsg: family, length of the destination, of the source, type of service, table, protocol, scope, type, flags
_ROUTE = struct.Struct("=BBBBBBBBI")
_UNICAST, _LOCAL = 1, 2
# include/uapi/linux/fib_rules.h: struct fib_rule_hdr: family, lengths of destination and source, type of service,
# table, two reserved, action, flags. FRA_TABLE has route's number, FR_ACT_TO_TBL route's value for unicast.
_RULE = struct.Struct("=BBBBBBBBI")
_DESTINATION, _DEVICE, _GATEWAY, _MULTIPATH, _TABLE, _VIA = 1, 4, 5, 9, 15, 18
_MAIN_TABLE = 254
# struct rtnexthop: length, flags, weight, device; attributes follow
_NEXT_HOP = struct.Struct("=HBBi")
_BY_GATEWAY = frozenset({_GATEWAY, _MULTIPATH, _VIA})
_TABLE_NUMBER = struct.Struct("=I")
_DEVICE_NUMBER = struct.Struct("=i")
# A router with the whole Internet's routes is no training host, and its million would take seconds.
_MOST_ROUTES = 50_000
_FAMILIES = ((4, socket.AF_INET), (6, socket.AF_INET6))
_BITS = {4: 32, 6: 128}
_OF_A_LINK: dict[int, tuple[Network, ...]] = {4: (), 6: (ipaddress.ip_network("fe80::/10"),)}


class Routes:
    """The routes of this network namespace at one moment, of all tables and both IP versions.

    Raises OSError where the kernel does not tell them, or has too many.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int], dict[int, dict[int, set[int]]]] = {}
        self._own: dict[tuple[int, int], set[int]] = {}
        self._gateways: dict[int, set[int]] = {4: set(), 6: set()}
        for version, family in _FAMILIES:
            for kind, table, length, number, devices, has_gateway in _dump(family):
                if kind == _LOCAL:
                    if length == _BITS[version]:
                        self._own.setdefault((version, number), set()).update(devices)
                    continue
                if length == 0 and table == _MAIN_TABLE and has_gateway:
                    self._gateways[version] |= devices
                lengths = self._tables.setdefault((version, table), {})
                lengths.setdefault(length, defaultdict(set))[number] |= devices

    def is_own(self, network: Network) -> bool:
        """Return whether this is an address of this host."""
        return bool(self.holders_of(network))

    def holders_of(self, network: Network) -> frozenset[int]:
        """Return the interfaces, by index, that have this address."""
        if network.num_addresses > 1:
            return frozenset()
        return frozenset(self._own.get((network.version, int(network.network_address)), ()))

    def has_address(self, device: int, version: int) -> bool:
        """Return whether an interface has an address of this IP version."""
        return any(version == own and device in devices for (own, _), devices in self._own.items())

    @property
    def devices(self) -> frozenset[int]:
        """The interfaces, by index, that any route leads through."""
        return frozenset(
            one for lengths in self._tables.values() for routes in lengths.values() for one in _all(routes)
        )

    def devices_of_default(self, version: int) -> frozenset[int]:
        """Return the interfaces, by index, that lead to whatever has no route of its own."""
        return frozenset(_all(self._tables.get((version, _MAIN_TABLE), {}).get(0, {})))

    def devices_to_gateways(self, version: int) -> frozenset[int]:
        """Return those of them by which a gateway leads there."""
        return frozenset(self._gateways[version])

    def lead_beyond(self, networks: Iterable[Network], version: int) -> bool:
        """Return whether any route leads to hosts of this IP version that are in none of these networks.

        By any table; a default route does. What is only for one link (IPv6's fe80::/10) does not count.
        """
        known = tuple(one for one in networks if one.version == version)
        bits = _BITS[version]
        return any(
            not any(
                length >= one.prefixlen
                and number >> (length - one.prefixlen) == int(one.network_address) >> (bits - one.prefixlen)
                for one in (*known, *_OF_A_LINK[version])
            )
            for (own, _), lengths in self._tables.items()
            if own == version
            for length, routes in lengths.items()
            for number in routes
        )

    def devices_to(self, networks: Iterable[Network], *, without_source: bool = False) -> frozenset[int]:
        """Return the interfaces, by index, that lead to any host of these networks by any table.

        All that equally good routes and next hops name: packets go, and come, through each of them.
        without_source: leave out the tables that are only for packets of a certain source; a connection that is about
        to be opened has none yet. Raises OSError where the kernel does not tell its rules.
        """
        wanted = tuple(networks)
        left_out = self._only_for_a_source if without_source else frozenset()
        found: set[int] = set()
        for (version, table), lengths in self._tables.items():
            if (version, table) in left_out:
                continue
            descending = sorted(lengths, reverse=True)
            for network in wanted:
                if network.version == version:
                    found |= _most_specific(network, lengths, descending)
                    found.update(*_within(network, lengths))
        return frozenset(found)

    @cached_property
    def _only_for_a_source(self) -> frozenset[tuple[int, int]]:
        """The tables, by IP version and number, that rules name for packets of certain sources and for no others."""
        for_a_source: set[tuple[int, int]] = set()
        for_any: set[tuple[int, int]] = set()
        for version, family in _FAMILIES:
            for payload in _rules(family):
                _, _, length_of_source, _, table, _, _, action, _ = netlink.unpacked(_RULE, payload)
                if action != _UNICAST:
                    continue
                found = netlink.attributes(payload[_RULE.size :])
                if _TABLE in found:
                    (table,) = netlink.unpacked(_TABLE_NUMBER, found[_TABLE])
                (for_a_source if length_of_source else for_any).add((version, table))
        return frozenset(for_a_source - for_any)


def _all(routes: Mapping[int, set[int]]) -> Iterator[int]:
    return (one for devices in routes.values() for one in devices)


def _rules(family: int) -> list[bytes]:
    try:
        return list(_payloads(family, _GET_RULE, _NEW_RULE))
    except OSError as error:
        # A kernel without rules, or without IPv6 (net/core/fib_rules.c, net/core/rtnetlink.c).
        if error.errno in {errno.EOPNOTSUPP, errno.EAFNOSUPPORT}:
            return []
        raise


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


def _dump(family: int) -> Iterator[tuple[int, int, int, int, set[int], bool]]:
    """Yield each route out of this host, or to the host itself.

    Its kind, table, prefix length, prefix, devices, and whether it goes by a gateway.
    """
    bits = 32 if family == socket.AF_INET else 128
    for count, payload in enumerate(_payloads(family, _GET_ROUTE, _NEW_ROUTE)):
        if count >= _MOST_ROUTES:
            raise OSError(f"this host has more than {_MOST_ROUTES} routes")
        _, length, _, _, table, _, _, kind, _ = netlink.unpacked(_ROUTE, payload)
        if kind not in {_UNICAST, _LOCAL}:
            continue
        found = netlink.attributes(payload[_ROUTE.size :])
        prefix = int.from_bytes(found.get(_DESTINATION, b""), "big") >> (bits - length)
        if _TABLE in found:  # the header's field holds 255 tables
            (table,) = netlink.unpacked(_TABLE_NUMBER, found[_TABLE])
        yield kind, table, length, prefix, set(_devices(found)), not found.keys().isdisjoint(_BY_GATEWAY)


def _devices(route: Attributes) -> Iterator[int]:
    if _DEVICE in route:
        yield from netlink.unpacked(_DEVICE_NUMBER, route[_DEVICE])
    hops = route.get(_MULTIPATH, b"")
    while len(hops) >= _NEXT_HOP.size:
        length, _, _, device = _NEXT_HOP.unpack_from(hops)
        yield device
        hops = hops[max(_NEXT_HOP.size, (length + 3) & ~3) :]


def _payloads(family: int, ask: int, answer: int) -> Iterator[bytes]:
    """Yield the routes or rules of one family, each as the kernel's message holds it. Raises OSError."""
    question = netlink.framed(ask, _ROUTE.pack(family, *([0] * 8)), netlink.REQUEST | netlink.DUMP)
    with Channel(netlink.ROUTE) as channel:
        yield from (payload for kind, payload in channel.dump(question) if kind == answer)
