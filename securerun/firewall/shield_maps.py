"""What the shield's maps hold, as bytes: the peers, who else may connect to public ports, and who was turned away.
Asks nobody."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable

from securerun.firewall.policy import Denial, Opening, Policy, by_networks
from securerun.linux.assembler import Symbol
from securerun.linux.bpf import MapShape, MapType
from securerun.linux.networks import Network

PEERS4, PEERS6, DENIED = Symbol("peers4"), Symbol("peers6"), Symbol("denied")
INTERFACES, PUBLIC = Symbol("interfaces"), Symbol("public")

_DENIAL_KEY = struct.Struct("=16sI")
_PACKETS = struct.Struct("=Q")
_INDEX = struct.Struct("=I")
NO_VALUE = bytes(4)
# The networks of public ports: the number of a group, the packet's protocol as it has it, which keeps IPv4 and IPv6
# apart, and the source as in the key of a denial. A longest prefix holds the first two whole.
_PUBLIC_HEAD = struct.Struct("=III")
_PUBLIC_HEAD_BITS, _MAPPED_BITS = 64, 96
PUBLIC_KEY_BITS = _PUBLIC_HEAD_BITS + 128
_PROTOCOLS = {4: socket.htons(0x0800), 6: socket.htons(0x86DD)}
_MAPPED = bytes(10) + b"\xff\xff"

# Before Linux 5.11 a map is charged for all the entries that it may hold, so this is what an attacker who
# invents source addresses can make us spend, and no more: about 0.5 MiB.
_MOST_DENIALS = 4096
# Peers are added before others are removed, and names may come to mean other addresses. A trie takes memory
# only for what is in it.
_ROOM_FOR_PEERS = 1024

_LENGTHS = tuple(struct.pack("=I", length) for length in range(129))


def map_shapes(policy: Policy) -> tuple[MapShape, ...]:
    """Return the shapes of the maps of IPv4 peers, of IPv6 peers, of who was turned away, and of interfaces if any."""
    room = {version: 2 * len(policy.peers_of(version)) + _ROOM_FOR_PEERS for version in (4, 6)}
    ways_in = len(policy.interfaces)
    named = [MapShape(MapType.HASH, _INDEX.size, len(NO_VALUE), ways_in, INTERFACES.name)] if ways_in else []
    return (
        MapShape(MapType.LPM_TRIE, 4 + 4, len(NO_VALUE), room[4], PEERS4.name),
        MapShape(MapType.LPM_TRIE, 4 + 16, len(NO_VALUE), room[6], PEERS6.name),
        MapShape(MapType.LRU_HASH, _DENIAL_KEY.size, _PACKETS.size, _MOST_DENIALS, DENIED.name),
        *named,
    )


def public_groups(public: Iterable[Opening]) -> dict[tuple[Network, ...], int]:
    """Return a number for each list of networks that public ports are for."""
    lists = (networks for networks in by_networks(public) if networks)
    return {networks: number for number, networks in enumerate(lists)}


def public_shape(public: Iterable[Opening]) -> MapShape | None:
    """Return the shape of the map of public ports' networks; None where there are none."""
    entries = len(public_keys(public))
    size = _PUBLIC_HEAD.size + 16
    return MapShape(MapType.LPM_TRIE, size, len(NO_VALUE), entries, PUBLIC.name) if entries else None


def public_keys(public: Iterable[Opening]) -> list[bytes]:
    """Return the networks of public ports as keys of their trie."""
    return [
        _PUBLIC_HEAD.pack(_PUBLIC_HEAD_BITS + length, group, _PROTOCOLS[network.version]) + packed
        for networks, group in public_groups(public).items()
        for network, (length, packed) in zip(networks, map(_as_source, networks))
    ]


def _as_source(network: Network) -> tuple[int, bytes]:
    """Return the length and the bytes of a network among sources of both IP versions."""
    if network.version == 4:
        return _MAPPED_BITS + network.prefixlen, _MAPPED + network.network_address.packed
    return network.prefixlen, network.network_address.packed


def peer_keys(networks: Iterable[Network], version: int) -> list[bytes]:
    """Return the networks of one IP version as keys of a trie.

    In their order: neighbours in a trie, put there one after the other, are found in the processor's cache.
    """
    return [
        _LENGTHS[network.prefixlen] + network.network_address.packed
        for network in networks
        if network.version == version
    ]


def interface_key(index: int) -> bytes:
    """Return the number of an interface as a key of the map of those that peers come in through."""
    return _INDEX.pack(index)


def denial_in(key: bytes, value: bytes) -> Denial:
    """Return what an entry of the map of who was turned away says."""
    packed, port = _DENIAL_KEY.unpack(key)
    address = ipaddress.IPv6Address(packed)
    return Denial(address.ipv4_mapped or address, port, _PACKETS.unpack(value)[0])
