"""The network of this network namespace: which addresses it has, and how one that is new gets them (rtnetlink(7))."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from securerun.linux import netlink
from securerun.linux.netlink import Channel
from securerun.linux.networks import Address, Network

# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h, if.h
_NEW_LINK, _NEW_ADDRESS, _GET_ADDRESS = 16, 20, 22
# struct ifinfomsg: family, type, index, flags, which of them change; struct ifaddrmsg: family, length of the prefix,
# flags, scope, index
_LINK = struct.Struct("=BxHiII")
_ADDRESS_OF = struct.Struct("=BBBBI")
# Of documentation, and so none that a host has (RFC 5737); the port is discard's.
_FAR_AWAY = ("192.0.2.1", 9)
# struct rtmsg, as in linux/routes.py; RT_TABLE_MAIN; RT_SCOPE_NOWHERE, which stands for any
_DELETE_ROUTE = 25
_ROUTE = struct.Struct("=BBBBBBBBI")
_MAIN_TABLE, _NOWHERE = 254, 255
_NAME, _INFO, _KIND = 3, 18, 1
_ADDRESS, _LOCAL = 1, 2
_UP = 1
# No duplicate address detection: it takes a second, in which an address of IPv6 cannot be had.
_AT_ONCE = 0x02
# RT_SCOPE_*: an address of IPv6 that is only for its link needs the link beside it; one of IPv4 is as any other.
_GLOBAL, _OF_A_LINK = 0, 253
_CREATE = 0x400
_LOOPBACK = 1
# What leads nowhere by itself; a kernel may lack the first.
_KINDS = (b"dummy", b"bridge")


@dataclass(frozen=True)
class Own:
    """An address of this host, and the network that it is part of."""

    address: Address
    network: Network


def addresses() -> dict[str, list[Own]]:
    """Return the addresses by which other hosts may know this one, by the name of the interface. Raises OSError."""
    found: dict[str, list[Own]] = {}
    names = dict(socket.if_nameindex())
    question = netlink.framed(
        _GET_ADDRESS, _ADDRESS_OF.pack(socket.AF_UNSPEC, 0, 0, 0, 0), netlink.REQUEST | netlink.DUMP
    )
    with Channel(netlink.ROUTE) as channel:
        for payload in channel.listed(question, _NEW_ADDRESS):
            family, length, _, scope, index = netlink.unpacked(_ADDRESS_OF, payload)
            known = scope == _GLOBAL or (family == socket.AF_INET and scope <= _OF_A_LINK)
            if known and index in names:
                attributes = netlink.attributes(payload[_ADDRESS_OF.size :])
                # Of a point-to-point link the other one is the far end's.
                packed = attributes.get(_LOCAL) or attributes[_ADDRESS]
                found.setdefault(names[index], []).append(_own(packed, length))
    return found


def source() -> Address | None:
    """Return the address of IPv4 that what leaves by the default route comes from; None where there is none.

    Nothing is sent.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.connect(_FAR_AWAY)
            return ipaddress.ip_address(end.getsockname()[0])
    except OSError:
        return None


def bring_up(stand_ins: Mapping[str, Sequence[Address]], more: Iterable[Address]) -> tuple[str, ...]:
    """Bring the loopback of a new network up, with more addresses, and interfaces that lead nowhere beside it.

    stand_ins: their names and addresses, each of which is this network's own alone, whatever network it was part of.
    Returns the names that could not be had: the kernel may lack all of their kinds. Raises OSError where there is no
    loopback.
    """
    lacking = []
    with Channel(netlink.ROUTE) as channel:
        _set_up(channel, _LOOPBACK)
        _add(channel, _LOOPBACK, more)
        for name, own in stand_ins.items():
            try:
                index = _make_one(channel, name)
                _set_up(channel, index)
            except OSError:
                lacking.append(name)
                continue
            _add(channel, index, own)
    return tuple(lacking)


def remove_default_route(version: int) -> bool:
    """Take away the route of one IP version to whatever has no other; return whether there was one. Raises OSError."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    route = _ROUTE.pack(family, 0, 0, 0, _MAIN_TABLE, 0, _NOWHERE, 0, 0)
    try:
        with Channel(netlink.ROUTE) as channel:
            channel.order(netlink.framed(_DELETE_ROUTE, route, _ordered(0)))
    except ProcessLookupError:  # ESRCH: there is none
        return False
    return True


def _own(packed: bytes, length: int) -> Own:
    address = ipaddress.ip_address(packed)
    return Own(address, ipaddress.ip_network((address, length), strict=False))


def _make_one(channel: Channel, name: str) -> int:
    for kind in _KINDS[:-1]:
        with contextlib.suppress(OSError):
            return _make(channel, name, kind)
    return _make(channel, name, _KINDS[-1])


def _make(channel: Channel, name: str, kind: bytes) -> int:
    information = netlink.attribute(_INFO, netlink.attribute(_KIND, kind))
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + netlink.attribute(_NAME, name.encode() + b"\0") + information
    channel.order(netlink.framed(_NEW_LINK, body, _ordered(_CREATE | netlink.EXCLUSIVE)))
    return socket.if_nametoindex(name)


def _set_up(channel: Channel, index: int) -> None:
    channel.order(netlink.framed(_NEW_LINK, _LINK.pack(socket.AF_UNSPEC, 0, index, _UP, _UP), _ordered(0)))


def _add(channel: Channel, index: int, own: Iterable[Address]) -> None:
    for address in own:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        head = _ADDRESS_OF.pack(family, address.max_prefixlen, _AT_ONCE, _GLOBAL, index)
        body = head + netlink.attribute(_LOCAL, address.packed) + netlink.attribute(_ADDRESS, address.packed)
        with contextlib.suppress(OSError):  # without IPv6, say
            channel.order(netlink.framed(_NEW_ADDRESS, body, _ordered(_CREATE)))


def _ordered(more: int) -> int:
    return netlink.REQUEST | netlink.ACKNOWLEDGE | more
