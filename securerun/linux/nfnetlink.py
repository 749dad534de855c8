"""nfnetlink: what netfilter's subsystems have in common on the one kind of netlink socket that they share.

The type of a message names the subsystem, and four bytes stand before its attributes
(include/uapi/linux/netfilter/nfnetlink.h). Numbers in attributes are in network order.
"""

from __future__ import annotations

import socket
import struct

from securerun.linux import netlink
from securerun.linux.netlink import Attributes, Channel, attribute

# NFNL_SUBSYS_ULOG, _IPSET, _NFTABLES
LOG, IP_SET, NF_TABLES = 4, 6, 10
_BATCH_BEGIN, _BATCH_END = 16, 17
# struct nfgenmsg: family, version, resource
_HEADER = struct.Struct("!BBH")


def open_channel(group: int | None = None) -> Channel:
    """Open a socket to netfilter. Raises OSError where the kernel has none or permits none."""
    return Channel(netlink.NETFILTER, group)


def type_of(subsystem: int, message: int) -> int:
    """Return the type of a subsystem's message, as netlink has it."""
    return subsystem << 8 | message


def request(kind: int, family: int, body: bytes, flags: int = 0, resource: int = 0) -> bytes:
    """Return one message to the kernel, with both its headers."""
    return netlink.framed(kind, _HEADER.pack(family, 0, resource) + body, netlink.REQUEST | flags)


def transaction(subsystem: int, orders: bytes) -> bytes:
    """Return the messages as one change, of which either all is done or nothing."""
    begin, end = (request(kind, socket.AF_UNSPEC, b"", resource=subsystem) for kind in (_BATCH_BEGIN, _BATCH_END))
    return begin + orders + end


def family_of(payload: bytes) -> int:
    """Return the family that an answer is about. Raises OSError."""
    family, _, _ = netlink.unpacked(_HEADER, payload)
    return int(family)


def attributes_of(payload: bytes) -> Attributes:
    """Return the attributes of an answer. Raises OSError for one that is not whole."""
    netlink.unpacked(_HEADER, payload)
    return netlink.attributes(payload[_HEADER.size :])


def text(kind: int, value: str) -> bytes:
    """Return an attribute that holds a text, such as a name."""
    return attribute(kind, value.encode() + b"\0")


def number(value: bytes | None) -> int:
    """Return the number that an attribute holds; 0 where there is no such attribute."""
    return int.from_bytes(value or b"", "big")
