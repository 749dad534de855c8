"""Sets of networks or ports in the kernel (ip_set), which one rule of iptables looks a packet's source or port up in.

The `ipset` command is seldom installed, so the kernel is spoken to directly, in the protocol of
include/uapi/linux/netfilter/ipset/ip_set.h: version 6, which all kernels since 2.6.39 speak. The kernel loads what
it needs of ip_set by itself. A set lives in a network namespace, and cannot be destroyed while a rule names it.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Union

from securerun.linux import netlink
from securerun.linux.netlink import ACKNOWLEDGE, DUMP, EXCLUSIVE, NESTED, NETWORK_ORDER, Channel, attribute
from securerun.linux.networks import Network
from securerun.linux.nfnetlink import IP_SET, attributes_of, number, open_channel, request, text, type_of

# A set of networks of one IP version, and one of ports, whatever the IP version.
KIND, KIND_OF_PORTS = "hash:net", "bitmap:port"
Members = Union[Sequence[Network], Sequence[tuple[int, int]]]
# enum ipset_cmd
_CREATE, _DESTROY, _SWAP, _LIST, _ADD = (type_of(IP_SET, command) for command in (2, 3, 6, 7, 9))
# Attributes of a command. Of a swap, the fourth is the second set's name.
_PROTOCOL, _NAME, _TYPE, _REVISION, _FAMILY, _FLAGS, _DATA, _ENTRIES, _LINE = range(1, 10)
# Attributes of an entry, and of a set.
_ADDRESS, _PREFIX, _FIRST_PORT, _LAST_PORT = 1, 3, 4, 5
_HASH_SIZE, _MOST_ELEMENTS, _ELEMENTS = 18, 19, 24
_HIGHEST_PORT = 0xFFFF
_IPV4, _IPV6 = 1, 2
_ONLY_NAMES = 1 << 1  # IPSET_FLAG_LIST_SETNAME
_ONLY_HEADER = 1 << 2  # IPSET_FLAG_LIST_HEADER (Linux 3.9)
_SPOKEN = 6
_SO_IP_SET, _QUESTION_SIZE = 83, 8
# enum ipset_errno begins here; its numbers are ip_set's own, and have no words of libc's.
_OWN_ERRORS = 4096
# IPSET_ERR_BUSY, or in older kernels EBUSY: a rule names the set.
_IN_USE = {errno.EBUSY, 4100}
# Linux 6.x hashes at random and grows; half full to begin with, nothing is hashed twice.
_FEWEST_BUCKETS = 64
# An attribute's length is 16 bits, and so is that of all the entries of one message.
_ENTRIES_A_MESSAGE = 1500
# nf_tables lets go of a deleted rule's set some time after the transaction (nf_tables_trans_destroy_work).
_LET_GO_SECONDS = 2.0
_LOOK_SECONDS = 0.002


def size(name: str) -> int | None:
    """Return how many networks or ports a set has; None where there is no such set, or no ip_set. Raises OSError."""
    if not _is_loaded():
        return None
    header_alone = attribute(_FLAGS | NETWORK_ORDER, struct.pack("!I", _ONLY_HEADER))
    with open_channel() as channel:
        try:
            sets = channel.listed(_message(_LIST, text(_NAME, name) + header_alone, DUMP), _LIST)
        except FileNotFoundError:
            return None
    return number(netlink.attributes(attributes_of(sets[0])[_DATA])[_ELEMENTS]) if sets else None


def names() -> list[str]:
    """Return the names of all sets; none where there is no ip_set. Raises OSError."""
    if not _is_loaded():
        return []
    names_alone = attribute(_FLAGS | NETWORK_ORDER, struct.pack("!I", _ONLY_NAMES))
    with open_channel() as channel:
        sets = channel.listed(_message(_LIST, names_alone, DUMP), _LIST)
    return [attributes_of(one)[_NAME].rstrip(b"\0").decode(errors="replace") for one in sets]


def ports_of(name: str) -> frozenset[int]:
    """Return the ports that a set of ports has; none where there is no such set. Raises OSError."""
    if not _is_loaded():
        return frozenset()
    with open_channel() as channel:
        try:
            answers = channel.listed(_message(_LIST, text(_NAME, name), DUMP), _LIST)
        except FileNotFoundError:
            return frozenset()
    listed = [netlink.each_attribute(attributes_of(answer).get(_ENTRIES, b"")) for answer in answers]
    entries = [netlink.attributes(entry) for each in listed for _, entry in each]
    return frozenset(number(entry[_FIRST_PORT]) for entry in entries if _FIRST_PORT in entry)


def make(name: str, members: Members) -> None:
    """Make a set of these networks, of one IP version, or of these first and last ports; at least one of them.

    Raises OSError, with nothing made.
    """
    first = members[0]
    if isinstance(first, tuple):
        _create(name, KIND_OF_PORTS, socket.AF_UNSPEC, _span(1, _HIGHEST_PORT))
    else:
        _create_of_networks(name, first.version, len(members))
    try:
        with open_channel() as channel:
            for begin in range(0, len(members), _ENTRIES_A_MESSAGE):
                _order(channel, _ADD, _entries(name, members[begin : begin + _ENTRIES_A_MESSAGE]))
    except OSError:
        destroy(name)
        raise


def swap(name: str, other: str) -> None:
    """Have each of two sets be what the other one is, at once for every rule that names one. Raises OSError."""
    with open_channel() as channel:
        _order(channel, _SWAP, text(_NAME, name) + text(_TYPE, other))


def until_let_go() -> float:
    """Return until when to wait for sets to be let go of, of which rules were deleted now: for all of them together."""
    return time.monotonic() + _LET_GO_SECONDS


def destroy(name: str, deadline: float | None = None) -> None:
    """Destroy the set; nothing happens where there is none. Raises OSError while a rule names it.

    deadline: until when to wait for the last rule to let go of it, on the monotonic clock; see `until_let_go`.
    """
    if not _is_loaded():
        return
    deadline = until_let_go() if deadline is None else deadline
    while True:
        try:
            with open_channel() as channel:
                _order(channel, _DESTROY, text(_NAME, name))
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _IN_USE or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_SECONDS)


def _is_loaded() -> bool:
    """Return whether the kernel has ip_set now. Any other question would have it loaded, on hosts that never use it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.getsockopt(socket.SOL_IP, _SO_IP_SET, _QUESTION_SIZE)
        except OSError as error:
            # It does not understand the question, but it is there to say so.
            return error.errno != errno.ENOPROTOOPT
    return True


def _create_of_networks(name: str, version: int, count: int) -> None:
    buckets = _FEWEST_BUCKETS
    while buckets < count:
        buckets *= 2
    sizes = ((_HASH_SIZE, buckets), (_MOST_ELEMENTS, count))
    data = b"".join(attribute(kind | NETWORK_ORDER, struct.pack("!I", size)) for kind, size in sizes)
    _create(name, KIND, socket.AF_INET if version == 4 else socket.AF_INET6, data)


def _create(name: str, kind: str, family: int, data: bytes) -> None:
    body = [
        text(_NAME, name),
        text(_TYPE, kind),
        attribute(_REVISION, b"\0"),
        attribute(_FAMILY, bytes([family])),
        attribute(_DATA | NESTED, data),
    ]
    with open_channel() as channel:
        _order(channel, _CREATE, b"".join(body), EXCLUSIVE)


def _entries(name: str, members: Iterable[Network | tuple[int, int]]) -> bytes:
    entries = attribute(_ENTRIES | NESTED, b"".join(map(_entry, members)))
    # The kernel writes the number of the entry that it refuses into its answer, and wants to be given a place.
    line = attribute(_LINE, bytes(4))
    return text(_NAME, name) + line + entries


def _entry(member: Network | tuple[int, int]) -> bytes:
    if isinstance(member, tuple):
        return attribute(_DATA | NESTED, _span(*member))
    network = member
    head = _HEADS[network.max_prefixlen]
    return b"".join((head, network.network_address.packed, _PREFIXES[network.prefixlen]))


def _span(first: int, last: int) -> bytes:
    ends = ((_FIRST_PORT, first), (_LAST_PORT, last))
    return b"".join(attribute(kind | NETWORK_ORDER, struct.pack("!H", port)) for kind, port in ends)


def _head(size: int, kind: int) -> bytes:
    """Return three attributes within each other: the entry, in it the address, in that the address of a family."""
    sizes = (size + 20, _DATA | NESTED, size + 8, _ADDRESS | NESTED, size + 4, kind | NETWORK_ORDER)
    return struct.pack("=HHHHHH", *sizes)


# What stands before an address, by the bits that it has, and behind it, by the length of its prefix.
_HEADS = {32: _head(4, _IPV4), 128: _head(16, _IPV6)}
_PREFIXES = tuple(attribute(_PREFIX, bytes([length])) for length in range(129))


def _order(channel: Channel, kind: int, body: bytes, flags: int = 0) -> None:
    try:
        channel.order(_message(kind, body, ACKNOWLEDGE | flags))
    except OSError as error:
        if (error.errno or 0) < _OWN_ERRORS:
            raise
        raise OSError(error.errno, f"ipset error {error.errno}") from error


def _message(kind: int, body: bytes, flags: int) -> bytes:
    return request(kind, socket.AF_INET, attribute(_PROTOCOL, bytes([_SPOKEN])) + body, flags)
