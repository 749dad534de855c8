"""Sets of networks in the kernel (ipset), which one rule of iptables looks a packet's source up in.

A chain with a rule a peer costs a connection as many comparisons as there are peers; a set costs one look-up for each
length of prefix in it. The `ipset` command is seldom installed, so the kernel is spoken to directly, in the protocol
of include/uapi/linux/netfilter/ipset/ip_set.h: version 6, which all kernels since 2.6.39 speak. The kernel loads what
it needs of ip_set by itself. A set lives in a network namespace, and cannot be destroyed while a rule names it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence

from securerun.linux import nf_tables
from securerun.linux.networks import Network

_SUBSYSTEM = 6  # NFNL_SUBSYS_IPSET
# enum ipset_cmd
_CREATE, _DESTROY, _SWAP, _LIST, _ADD = 2, 3, 6, 7, 9
# Attributes of a command. Of a swap, the fourth is the second set's name.
_PROTOCOL, _NAME, _TYPE, _REVISION, _FAMILY, _FLAGS, _DATA, _ENTRIES, _LINE = range(1, 10)
# Attributes of an entry, and of a set.
_ADDRESS, _PREFIX = 1, 3
_HASH_SIZE, _MOST_ELEMENTS, _ELEMENTS = 18, 19, 24
_IPV4, _IPV6 = 1, 2
_NESTED, _NETWORK_ORDER = 0x8000, 0x4000  # NLA_F_NESTED, NLA_F_NET_BYTEORDER
_ONLY_HEADER = 1 << 2  # IPSET_FLAG_LIST_HEADER (Linux 3.9)
_REQUEST, _ACKNOWLEDGE, _EXCLUSIVE, _DUMP = 0x1, 0x4, 0x200, 0x300
_DONE, _ERROR = 3, 2
_SPOKEN = 6
_SO_IP_SET, _QUESTION_SIZE = 83, 8
_KIND = "hash:net"
# IPSET_ERR_BUSY, or in older kernels EBUSY: a rule names the set.
_IN_USE = {errno.EBUSY, 4100}
# Linux 6.x hashes at random and grows; half full to begin with, nothing is hashed twice.
_FEWEST_BUCKETS = 64
# An attribute's length is 16 bits, and so is that of all the entries of one message.
_ENTRIES_A_MESSAGE = 1500
# nf_tables lets go of a deleted rule's set some time after the transaction (nf_tables_trans_destroy_work).
_LET_GO_SECONDS = 2.0
_LOOK_SECONDS = 0.002


def render(name: str, networks: Sequence[Network]) -> str:
    """The set in ipset's own language, as `ipset restore` takes it: for people."""
    family = "inet6" if networks[0].version == 6 else "inet"
    create = f"create {name} {_KIND} family {family} maxelem {len(networks)}"
    return "\n".join([create, *(f"add {name} {network}" for network in networks), ""])


def put(name: str, networks: Sequence[Network]) -> None:
    """Make the set of these networks, of one IP version, at least one of them; or make a standing set be of these.

    A rule that names the set sees either the old networks or the new ones, never less. Raises OSError, with nothing
    made, where the kernel has no such sets (EINVAL, or EPROTONOSUPPORT-like private numbers) or does not permit it.
    """
    if size(name) is None:
        _make(name, networks)
        return
    new = _successor(name)
    _destroy(new)
    _make(new, networks)
    try:
        _command(_SWAP, _text(_NAME, name) + _text(_TYPE, new))
    finally:
        _destroy(new)


def size(name: str) -> int | None:
    """How many networks are in the set; None where there is no such set, or no ipset at all. Raises OSError."""
    if not _is_loaded():
        return None
    body = _text(_NAME, name) + nf_tables.attribute(_FLAGS | _NETWORK_ORDER, struct.pack("!I", _ONLY_HEADER))
    with nf_tables.open_channel() as channel:
        channel.send(_message(_LIST, body, _REQUEST | _DUMP))
        while True:
            for kind, payload in nf_tables.messages(channel.recv(65536)):
                if kind == _DONE:
                    return None
                if kind == _ERROR:
                    _require_absence(payload)
                    return None
                data = nf_tables.attributes(nf_tables.attributes(payload[4:])[_DATA])
                return int.from_bytes(data[_ELEMENTS], "big")


def destroy(name: str) -> None:
    """Destroy the set, and what may have been left of changing it; nothing happens where there is none.

    Raises OSError while a rule names it.
    """
    for each in (name, _successor(name)):
        _destroy(each)


def _successor(name: str) -> str:
    return f"{name}+"


def _destroy(name: str) -> None:
    if not _is_loaded():
        return None
    deadline = time.monotonic() + _LET_GO_SECONDS
    while True:
        try:
            return _command(_DESTROY, _text(_NAME, name))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            if error.errno not in _IN_USE or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_SECONDS)


def _is_loaded() -> bool:
    """Whether the kernel has ip_set now. Any other question would have it loaded, on hosts that never use it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.getsockopt(socket.SOL_IP, _SO_IP_SET, _QUESTION_SIZE)
        except OSError as error:
            # It does not understand the question, but it is there to say so.
            return error.errno != errno.ENOPROTOOPT
    return True


def _make(name: str, networks: Sequence[Network]) -> None:
    version = networks[0].version
    _create(name, version, len(networks))
    try:
        with nf_tables.open_channel() as channel:
            for begin in range(0, len(networks), _ENTRIES_A_MESSAGE):
                _exchange(channel, _ADD, _entries(name, networks[begin : begin + _ENTRIES_A_MESSAGE]))
    except OSError:
        _destroy(name)
        raise


def _create(name: str, version: int, count: int) -> None:
    buckets = _FEWEST_BUCKETS
    while buckets < count:
        buckets *= 2
    sizes = ((_HASH_SIZE, buckets), (_MOST_ELEMENTS, count))
    data = b"".join(nf_tables.attribute(kind | _NETWORK_ORDER, struct.pack("!I", size)) for kind, size in sizes)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    body = [
        _text(_NAME, name),
        _text(_TYPE, _KIND),
        nf_tables.attribute(_REVISION, b"\0"),
        nf_tables.attribute(_FAMILY, bytes([family])),
        nf_tables.attribute(_DATA | _NESTED, data),
    ]
    _command(_CREATE, b"".join(body), _EXCLUSIVE)


def _entries(name: str, networks: Iterable[Network]) -> bytes:
    entries = nf_tables.attribute(_ENTRIES | _NESTED, b"".join(_entry(network) for network in networks))
    # The kernel writes the number of the entry that it refuses into its answer, and wants to be given a place.
    line = nf_tables.attribute(_LINE, bytes(4))
    return _text(_NAME, name) + line + entries


def _entry(network: Network) -> bytes:
    head = _HEADS[network.max_prefixlen]
    return b"".join((head, network.network_address.packed, _PREFIXES[network.prefixlen]))


def _head(size: int, kind: int) -> bytes:
    """Three attributes within each other: the entry, in it the address, in that the address of a family."""
    sizes = (size + 20, _DATA | _NESTED, size + 8, _ADDRESS | _NESTED, size + 4, kind | _NETWORK_ORDER)
    return struct.pack("=HHHHHH", *sizes)


# What stands before an address, by the bits that it has, and behind it, by the length of its prefix.
_HEADS = {32: _head(4, _IPV4), 128: _head(16, _IPV6)}
_PREFIXES = tuple(nf_tables.attribute(_PREFIX, bytes([length])) for length in range(129))


def _command(kind: int, body: bytes, flags: int = 0) -> None:
    with nf_tables.open_channel() as channel:
        _exchange(channel, kind, body, flags)


def _exchange(channel: socket.socket, kind: int, body: bytes, flags: int = 0) -> None:
    channel.send(_message(kind, body, _REQUEST | _ACKNOWLEDGE | flags))
    for answer, payload in _answers(channel):
        if answer == _ERROR:
            (negative,) = struct.unpack_from("=i", payload)
            if negative:
                raise OSError(-negative, _words(-negative))
            return


def _answers(channel: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        # The answer carries a copy of what it answers.
        yield from nf_tables.messages(channel.recv(1 << 17))


def _require_absence(payload: bytes) -> None:
    (negative,) = struct.unpack_from("=i", payload)
    if -negative != errno.ENOENT:
        raise OSError(-negative, _words(-negative))


def _words(number: int) -> str:
    # enum ipset_errno begins at 4096 and has no words of libc's.
    return os.strerror(number) if number < 4096 else f"ipset error {number}"


def _message(kind: int, body: bytes, flags: int) -> bytes:
    header = struct.pack("!BBH", socket.AF_INET, 0, 0)
    return nf_tables.framed(
        _SUBSYSTEM << 8 | kind, header + nf_tables.attribute(_PROTOCOL, bytes([_SPOKEN])) + body, flags
    )


def _text(kind: int, value: str) -> bytes:
    return nf_tables.attribute(kind, value.encode() + b"\0")
