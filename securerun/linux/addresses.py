"""This host's own addresses, each with the network it is in, as the kernel tells them (rtnetlink(7))."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from securerun.linux import netlink
from securerun.linux.netlink import Channel
from securerun.linux.networks import Address, Network, collapse

# include/uapi/linux/rtnetlink.h, if_addr.h: struct ifaddrmsg: family, length of the prefix, flags, scope, interface
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_ADDRESS = struct.Struct("=BBBBI")
_REMOTE, _LOCAL = 1, 2


@dataclass(frozen=True)
class Own:
    """What is this host's own, as of one look at its interfaces.

    addresses: all. networks: those that they are in, but the loopback's, collapsed; of a tunnel between two hosts both
    ends are in, each by itself.
    """

    addresses: frozenset[Address] = frozenset()
    networks: tuple[Network, ...] = ()


def own() -> Own:
    """Return what the interfaces of this network namespace have. Raises OSError."""
    answers = _all()
    networks = (network for answer in answers for network in _networks_in(answer))
    return Own(
        frozenset(ipaddress.ip_address(packed) for answer in answers for packed in _own_in(answer)),
        collapse(network for network in networks if not network.is_loopback),
    )


def _all() -> list[bytes]:
    with contextlib.closing(Channel(netlink.ROUTE)) as channel:
        question = netlink.framed(
            _GET_ADDRESS, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0), netlink.REQUEST | netlink.DUMP
        )
        return list(channel.listed(question, _NEW_ADDRESS))


def _own_in(answer: bytes) -> Iterator[bytes]:
    """Yield this host's own end: of a tunnel the other one is told as well."""
    family, *_ = netlink.unpacked(_ADDRESS, answer)
    if family in (socket.AF_INET, socket.AF_INET6):
        found = netlink.attributes(answer[_ADDRESS.size :])
        kind = _LOCAL if _LOCAL in found else _REMOTE  # IPv6 has the address there, where nobody is at the other end
        if kind in found:
            yield found[kind]


def _networks_in(answer: bytes) -> Iterator[Network]:
    family, length, _, _, _ = netlink.unpacked(_ADDRESS, answer)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    found = netlink.attributes(answer[_ADDRESS.size :])
    for kind in (_LOCAL, _REMOTE):
        if kind in found:
            yield ipaddress.ip_network((found[kind], length), strict=False)
