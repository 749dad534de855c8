"""This host's own addresses, each with the network it is in, as the kernel tells them (rtnetlink(7))."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator

from securerun.linux import netlink
from securerun.linux.netlink import Channel
from securerun.linux.networks import Network, collapse

# include/uapi/linux/rtnetlink.h, if_addr.h: struct ifaddrmsg: family, length of the prefix, flags, scope, interface
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_ADDRESS = struct.Struct("=BBBBI")
_REMOTE, _LOCAL = 1, 2


def own_networks() -> tuple[Network, ...]:
    """Return the networks of all interfaces of this network namespace but the loopback's, collapsed. Raises OSError.

    Of a tunnel between two hosts both ends are in, each by itself.
    """
    with contextlib.closing(Channel(netlink.ROUTE)) as channel:
        question = netlink.framed(
            _GET_ADDRESS, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0), netlink.REQUEST | netlink.DUMP
        )
        answers = channel.listed(question, _NEW_ADDRESS)
    found = (network for answer in answers for network in _networks_in(answer))
    return collapse(network for network in found if not network.is_loopback)


def _networks_in(answer: bytes) -> Iterator[Network]:
    family, length, _, _, _ = netlink.unpacked(_ADDRESS, answer)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    found = netlink.attributes(answer[_ADDRESS.size :])
    for kind in (_LOCAL, _REMOTE):
        if kind in found:
            yield ipaddress.ip_network((found[kind], length), strict=False)
