"""Packets made by hand, as a stranger would."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
TCP, UDP = 6, 17

HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, OPTIONS, MOBILITY, HIP, SHIM6 = 0, 43, 44, 51, 60, 135, 139, 140
EXTENSION_HEADERS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, OPTIONS, MOBILITY, HIP, SHIM6)

ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_ARP = 0x0800, 0x86DD, 0x0806
_NOWHERE = bytes(6)


@dataclass(frozen=True)
class Flow:
    """Where packets come from and go to."""

    source: Address
    destination: Address
    source_port: int = 40000
    destination_port: int = 29500


def checksum(content: bytes) -> int:
    total: int = sum(struct.unpack(f"!{(len(content) + 1) // 2}H", content + bytes(len(content) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp(
    flow: Flow, flags: int, *, sequence: int = 1000, acknowledged: int = 0, options: bytes = b"", payload: bytes = b""
) -> bytes:
    """A TCP segment; `options` in whole words of 4 bytes."""
    offset = (20 + len(options)) // 4 << 4
    fields = (flow.source_port, flow.destination_port, sequence, acknowledged, offset, flags, 64240)
    segment = struct.pack("!HHIIBBHHH", *fields, 0, 0) + options + payload
    pseudo = flow.source.packed + flow.destination.packed + struct.pack("!II", len(segment), TCP)
    return struct.pack("!HHIIBBHHH", *fields, checksum(pseudo + segment), 0) + options + payload


def ipv4(flow: Flow, payload: bytes, *, protocol: int = TCP, options: bytes = b"", fragment: int = 0) -> bytes:
    """`fragment`: the 16 bits of flags and offset; `options` in whole words of 4 bytes."""
    words = (20 + len(options)) // 4
    length = 4 * words + len(payload)
    addresses = flow.source.packed + flow.destination.packed
    before = struct.pack("!BBHHHBB", 0x40 | words, 0, length, 1, fragment, 64, protocol)
    header = before + b"\0\0" + addresses + options
    return before + struct.pack("!H", checksum(header)) + addresses + options + payload


def ipv6(
    flow: Flow, payload: bytes, *, protocol: int = TCP, extensions: Sequence[int] = (), fragment: int = 0
) -> bytes:
    """`extensions`: kinds of the headers between, in their order; `fragment`: 16 bits of offset and flag."""
    chain = b""
    following = protocol
    for kind in reversed(extensions):
        chain = extension(kind, following, fragment) + chain
        following = kind
    content = chain + payload
    header = struct.pack("!IHBB", 6 << 28, len(content), following, 64)
    return header + flow.source.packed + flow.destination.packed + content


def extension(kind: int, following: int, fragment: int) -> bytes:
    if kind == FRAGMENT:
        return struct.pack("!BBHI", following, 0, fragment, 7)
    if kind == AUTHENTICATION:
        return struct.pack("!BBH", following, 4, 0) + bytes(20)
    if kind == ROUTING:
        return struct.pack("!BBBBI", following, 0, 0, 0, 0)
    # One option fills the header, of a kind that is to be skipped where it is unknown (RFC 4727, RFC 8200 4.2).
    return struct.pack("!BBBB", following, 1, 0x1E, 12) + bytes(12)


def packet(flow: Flow, segment: bytes) -> bytes:
    """The plain packet of the flow's family."""
    return ipv4(flow, segment) if flow.source.version == 4 else ipv6(flow, segment)


def frame(content: bytes, *, to: bytes = _NOWHERE, sender: bytes = _NOWHERE) -> bytes:
    """An Ethernet frame around an IP packet."""
    ethertype = ETHERTYPE_IPV4 if content[0] >> 4 == 4 else ETHERTYPE_IPV6
    return to + sender + struct.pack("!H", ethertype) + content


def answer(received: bytes, flow: Flow) -> bytes:
    """The TCP segment in a received frame if it answers the flow, else nothing."""
    ethertype = int.from_bytes(received[12:14], "big")
    if ethertype == ETHERTYPE_IPV4:
        source, destination, protocol = received[26:30], received[30:34], received[23]
        segment = received[14 + 4 * (received[14] & 15) :]
    elif ethertype == ETHERTYPE_IPV6:
        source, destination, protocol = received[22:38], received[38:54], received[20]
        segment = received[54:]
    else:
        return b""
    ports = struct.pack("!HH", flow.destination_port, flow.source_port)
    if (source, destination, protocol) != (flow.destination.packed, flow.source.packed, TCP):
        return b""
    return segment if segment[:4] == ports else b""


def frames_in(endpoint: socket.socket, seconds: float) -> list[bytes]:
    """What arrives at a packet socket until nothing did for so long."""
    endpoint.settimeout(seconds)
    found = []
    try:
        while True:
            found.append(endpoint.recv(65535))
    except socket.timeout:
        return found
