"""Addresses and networks as Python's ipaddress has them: the fewest that hold the same, and how they are written."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Union

from securerun.errors import PolicyError
from securerun.text import some

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

EVERY_HOST: tuple[Network, ...] = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))
_LISTED = 4


def is_address(text: str) -> bool:
    """Return whether a text is an address of IPv4 or IPv6."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def shown(network: Network) -> str:
    """Return a network for people: that of one host as its address."""
    return str(network) if network.num_addresses > 1 else str(network.network_address)


def listed(networks: Sequence[Network]) -> str:
    """Return the first few networks for people, and how many more there are; "" for none."""
    return some([*map(shown, networks)], _LISTED)


def within(word: str, address: str, network: Network) -> str:
    """Return, for people, what is wrong with a network that was written by an address inside it, and what to write."""
    return f"{word} is an address inside a network; write {network} for the network, or {address} for the host"


def collapse(networks: Iterable[Network]) -> tuple[Network, ...]:
    """Return the fewest networks that hold the same addresses, IPv4 before IPv6, each in ascending order.

    IPv4 addresses written as IPv6 (::ffff:a.b.c.d, RFC 4291 2.5.5.2) become IPv4: that is what is on the wire.
    Raises PolicyError for a network with a scope id: Python takes any text for one, and no firewall knows them.
    """
    v4: list[Network] = []
    v6: list[Network] = []
    for network in networks:
        if isinstance(network, ipaddress.IPv4Network):
            v4.append(network)
            continue
        if network.network_address.scope_id is not None:
            raise PolicyError(f"{str(network)!r} has a scope id, which no firewall knows; write it without")
        mapped = network.network_address.ipv4_mapped
        if mapped is not None and network.prefixlen >= 96:
            v4.append(ipaddress.IPv4Network((mapped, network.prefixlen - 96)))
        else:
            v6.append(network)
    return (*_fewest(v4), *_fewest(v6))


def common(networks: Iterable[Network], others: Iterable[Network]) -> tuple[Network, ...]:
    """Return the fewest networks that hold the addresses which are in some of both. others: a few."""
    few = collapse(others)
    return collapse(
        one if _lies_within(one, other) else other
        for one in collapse(networks)
        for other in few
        if _lies_within(one, other) or _lies_within(other, one)
    )


def _lies_within(one: Network, other: Network) -> bool:
    return one.version == other.version and one.subnet_of(other)  # type: ignore[arg-type]


def _fewest(networks: Iterable[Network]) -> Iterator[Network]:
    """Of one IP version. What ipaddress.collapse_addresses does, in a tenth of its time: launcher and guard both wait.

    Two networks are either disjoint or one within the other. So in ascending order, the wider one of two that begin
    together first, each is within the last one kept, or disjoint from all, or with the last one a whole.
    """
    kept: list[tuple[int, int, Network]] = []
    for begin, _, network in sorted(map(_span, networks)):
        if kept and begin < kept[-1][1]:
            continue
        end = begin + _size(network)
        kept.append((begin, end, network))
        while len(kept) > 1:
            first, middle, wider = kept[-2]
            # Of the same size, touching, and the first one begins where the network around both does.
            if middle != begin or middle - first != end - begin or first & (end - first - 1):
                break
            begin = first
            kept[-2:] = [(first, end, wider.supernet())]
    return (network for _, _, network in kept)


def _span(network: Network) -> tuple[int, int, Network]:
    return int(network.network_address), network.prefixlen, network


def _size(network: Network) -> int:
    return 1 << network.max_prefixlen - network.prefixlen


def written_address(address: Address) -> str:
    """Return the address as str() has it, for IPv4 in half the time: 10,000 peers are written more than once."""
    return socket.inet_ntoa(address.packed) if isinstance(address, ipaddress.IPv4Address) else str(address)
