"""What the maps of tags hold, as bytes: where tags are written to, which were right, who came or answered without."""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from securerun.linux.assembler import Symbol
from securerun.linux.bpf import MapShape, MapType
from securerun.linux.networks import Address, Network
from securerun.linux.ring_buffer import ring_shape

TAG_NETWORKS, NOTES = Symbol("tag_networks"), Symbol("notes")
# Where tags are written to, and the networks that one counts from, where that is not any.
TAGS_FROM = Symbol("tags_from")
TAGGED, UNTAGGED = Symbol("tagged"), Symbol("untagged")
PLANNED, ANSWERS = Symbol("planned"), Symbol("answers")

# Of a network its length, its version, which no length leaves out, and its bytes, of IPv4 as ::ffff:a.b.c.d. So ::/0
# is not everywhere.
_NETWORK_KEY = struct.Struct("=II16s")
_VERSION_BITS, _MAPPED_BITS = 32, 96
NETWORK_KEY_BITS = _VERSION_BITS + 128
_MAPPED = bytes(10) + b"\xff\xff"
# What was hashed, to the end of a word: source address, source port or 0, sequence number, and their length.
_NOTE_KEY_SIZE = 24
NUMBER_SIZE = 8
# An address, and a TCP port of it or 0.
_COUNT_KEY = struct.Struct("=16sQ")
_NUMBER = struct.Struct("=Q")
# A bit for each port, in words of 64.
_PORT_WORDS, _PORTS_A_WORD = 1024, 64
_ANSWER = struct.Struct("=16s16sHH4xQ")
ANSWER_SIZE = _ANSWER.size

# Peers may be replaced by others while the job runs; a trie takes memory only for what is in it.
_ROOM_FOR_NETWORKS = 1024
# Connections that come within the time that a note is good for, and more for what processors keep for themselves:
# kernel/bpf/bpf_lru_list.h, LOCAL_FREE_TARGET. Some 100 bytes each.
_FEWEST_NOTES = 65536
_NOTES_PER_PROCESSOR = 512
_MOST_COUNTED = 4096


@dataclass(frozen=True)
class Untagged:
    """Somebody who showed no right tag: who answered from `port`, or opened a connection by address alone (0)."""

    address: Address
    port: int
    packets: int


@dataclass(frozen=True)
class Answer:
    """A connection of the job's own that was answered without a right tag; the answer was dropped, the socket waits.

    cookie: the socket's own number in the kernel.
    """

    target: Address
    port: int
    source: Address
    source_port: int
    cookie: int


def tag_map_shapes(networks: int, counting: int = 0, *, for_trial: bool = False) -> tuple[MapShape, ...]:
    """Return the shapes of the maps of tags, for so many networks that tags are written to.

    counting: the number of those that a tag counts from; 0: there is no such map. for_trial: for a few connections,
    since the kernel makes all entries of most of these maps at once, which takes it milliseconds.
    """
    notes = _NOTES_PER_PROCESSOR * os.sysconf("SC_NPROCESSORS_CONF")
    counted = notes
    if not for_trial:
        notes, counted = max(_FEWEST_NOTES, notes), _MOST_COUNTED
    bound = [MapShape(MapType.LPM_TRIE, _NETWORK_KEY.size, 4, counting, TAGS_FROM.name)] if counting else []
    return (
        MapShape(MapType.LPM_TRIE, _NETWORK_KEY.size, 4, 2 * networks + _ROOM_FOR_NETWORKS, TAG_NETWORKS.name),
        MapShape(MapType.LRU_HASH, _NOTE_KEY_SIZE, NUMBER_SIZE, notes, NOTES.name),
        MapShape(MapType.LRU_HASH, _COUNT_KEY.size, _NUMBER.size, counted, TAGGED.name),
        MapShape(MapType.LRU_HASH, _COUNT_KEY.size, _NUMBER.size, counted, UNTAGGED.name),
        MapShape(MapType.ARRAY, 4, _NUMBER.size, _PORT_WORDS, PLANNED.name),
        ring_shape(ANSWERS.name),
        *bound,
    )


def network_keys(networks: Iterable[Network]) -> set[bytes]:
    """Return networks that tags are written to, or count from, as keys of their trie."""
    return {_network_key(network) for network in networks}


def planned_words(ranges: Iterable[tuple[int, int]]) -> dict[bytes, bytes]:
    """Return the entries of the map of planned ports, given as first and last ones."""
    words: dict[int, int] = {}
    for first, last in ranges:
        for port in range(first, last + 1):
            words[port // _PORTS_A_WORD] = words.get(port // _PORTS_A_WORD, 0) | 1 << port % _PORTS_A_WORD
    return {struct.pack("=I", number): _NUMBER.pack(word) for number, word in words.items()}


def untagged_in(key: bytes, value: bytes) -> Untagged:
    """Return what an entry of the map of who showed no right tag says; of that of who did, likewise."""
    packed, port = _COUNT_KEY.unpack(key)
    return Untagged(_address(packed), port, _NUMBER.unpack(value)[0])


def answer_in(record: bytes) -> Answer:
    """Return what a record of the ring buffer says."""
    target, source, port, source_port, cookie = _ANSWER.unpack(record)
    return Answer(_address(target), port, _address(source), source_port, cookie)


def _network_key(network: Network) -> bytes:
    if network.version == 4:
        packed, length = _MAPPED + network.network_address.packed, _MAPPED_BITS + network.prefixlen
    else:
        packed, length = network.network_address.packed, network.prefixlen
    return _NETWORK_KEY.pack(_VERSION_BITS + length, network.version, packed)


def _address(packed: bytes) -> Address:
    address = ipaddress.IPv6Address(packed)
    return address.ipv4_mapped or address
