"""The tag: a TCP option that proves, in the packet that opens a connection and in its answer, who belongs to the job.

    SYN       kind 254, length 12, experiment "SR" (RFC 6994), SipHash of source address, source port, sequence number
    SYN-ACK   the same, under another key, over both sequence numbers and the opener's port

Not over the destination: a Service's address, or one that is translated on the way, is another one where it arrives.
Here it is said once for the programs in the kernel, and for whoever has to tell in Python whether a tag is right.
"""

from __future__ import annotations

import ipaddress
import struct

from securerun.firewall import siphash
from securerun.firewall.policy import TAG_OPTION
from securerun.linux.networks import Address

# RFC 4727 sets kind 254 apart for experiments, which RFC 6994 has tell themselves apart by two bytes.
SIZE, EXPERIMENT = 12, b"SR"
HEAD = bytes((TAG_OPTION, SIZE)) + EXPERIMENT
# As a program on a little-endian processor loads them.
HEAD_WORD = int.from_bytes(HEAD, "little")

SYN_KEY, SYN_ACK_KEY = "syn", "syn-ack"

# Where nodes of a job can be, so that nothing on the internet sees a tag: private networks (RFC 1918, 4193), those of
# carriers (RFC 6598, many clusters'), and link-local ones. A host's own networks and those of named peers are added.
WHERE_NODES_ARE = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fe80::/10"),
    )
)
# Where a job's own processes are told from others of their host, to which the host's own addresses belong as well.
LOOPBACK = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))

# What is hashed, in both: 16 bytes, the opener's port, the packet's own sequence number. The 16 bytes are the source
# address (of IPv4 as ::ffff:a.b.c.d), or the number that is acknowledged and zeros.
_END = struct.Struct("!HI")
_ACKNOWLEDGED = struct.Struct("!I12x")
MESSAGE_SIZE = 16 + _END.size
_MAPPED = bytes(10) + b"\xff\xff"


def syn_option(key: bytes, source: Address, port: int, sequence: int) -> bytes:
    """Return the option of a SYN from this address and port with this sequence number."""
    packed = source.packed if isinstance(source, ipaddress.IPv6Address) else _MAPPED + source.packed
    return _option(key, packed + _END.pack(port, sequence))


def syn_ack_option(key: bytes, port: int, sequence: int, acknowledged: int) -> bytes:
    """Return the option of a SYN-ACK to this port with these numbers."""
    return _option(key, _ACKNOWLEDGED.pack(acknowledged) + _END.pack(port, sequence))


def _option(key: bytes, message: bytes) -> bytes:
    return HEAD + siphash.siphash(key, message).to_bytes(siphash.WORD_SIZE, "little")
