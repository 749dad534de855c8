"""The tag: a TCP option that proves, in the packet that opens a connection and in its answer, who belongs to the job.

    SYN        kind 254, length 12, experiment "SR" (RFC 6994), SipHash of source address, source port, sequence number
    once more  the same without the source port, experiment "Sr"
    SYN-ACK    as a SYN, under another key, over both sequence numbers

Not over the destination: a Service's address, or one that is translated on the way, is another one where it arrives.
And the source port may be another one with it, so a SYN that nobody answers is sent again without.
Here it is said once for the programs in the kernel, and for whoever has to tell in Python whether a tag is right.
"""

from __future__ import annotations

import ipaddress
import struct

from securerun.firewall import siphash
from securerun.firewall.policy import TAG_OPTION
from securerun.linux.networks import Address

# RFC 4727 sets kind 254 apart for experiments, which RFC 6994 has tell themselves apart by two bytes.
SIZE = 12
HEAD, HEAD_ONCE_MORE = (bytes((TAG_OPTION, SIZE)) + experiment for experiment in (b"SR", b"Sr"))
# As a program on a little-endian processor loads them.
HEAD_WORD, HEAD_WORD_ONCE_MORE = (int.from_bytes(head, "little") for head in (HEAD, HEAD_ONCE_MORE))

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

# What is hashed, in all: 16 bytes, the opener's port or 0, the packet's own sequence number. The 16 bytes are the
# source address (of IPv4 as ::ffff:a.b.c.d), or the number that is acknowledged and zeros.
NO_PORT = 0
_END = struct.Struct("!HI")
_ACKNOWLEDGED = struct.Struct("!I12x")
MESSAGE_SIZE = 16 + _END.size
_MAPPED = bytes(10) + b"\xff\xff"


def syn_option(key: bytes, source: Address, port: int, sequence: int) -> bytes:
    """Return the option of a SYN from this address and port with this sequence number."""
    return HEAD + _hash(key, _packed(source), port, sequence)


def syn_option_once_more(key: bytes, source: Address, sequence: int) -> bytes:
    """Return the option of the same SYN when it is sent again."""
    return HEAD_ONCE_MORE + _hash(key, _packed(source), NO_PORT, sequence)


def syn_ack_option(key: bytes, sequence: int, acknowledged: int) -> bytes:
    """Return the option of a SYN-ACK with these numbers."""
    return HEAD + _hash(key, _ACKNOWLEDGED.pack(acknowledged), NO_PORT, sequence)


def _packed(source: Address) -> bytes:
    return source.packed if isinstance(source, ipaddress.IPv6Address) else _MAPPED + source.packed


def _hash(key: bytes, beginning: bytes, port: int, sequence: int) -> bytes:
    return siphash.siphash(key, beginning + _END.pack(port, sequence)).to_bytes(siphash.WORD_SIZE, "little")
