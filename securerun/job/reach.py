"""Whether the interface that somebody names is one by which peers are reached, or on another network altogether.

Peers are known by addresses. Where names stand on eth0 and gloo is told ib0, the peers' connections come from addresses
on ib0 that nobody named, and are turned away: that can be told before the start. It is told only where it is sure: an
interface that is on no network of its own (a dummy with a routed address), and peers that this host has no route to at
all, are left alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from securerun.host import interfaces
from securerun.linux.networks import Network, shown
from securerun.linux.routes import Routes
from securerun.text import some

# Of more peers than these it is not asked by which of its own addresses this host reaches them.
_MOST_ASKED = 256
_LOOPBACK = "lo"
_LISTED = 12


@dataclass(frozen=True)
class Elsewhere:
    """Interfaces that lead to no peer.

    names: which. networks: those that they are on. peer: one that is reached. through: the interfaces that lead to one.
    """

    names: tuple[str, ...]
    networks: tuple[Network, ...]
    peer: Network
    through: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"no peer is reached through {some(self.names, _LISTED)} by this host's routes ({shown(self.peer)} is, "
            f"through {some(self.through, _LISTED)}), and whoever connects there has an address that nobody named"
        )

    def mended(self, otherwise: str) -> str:
        """Return what mends it, in words; the last of the ways is `otherwise`."""
        if not self.networks:
            return otherwise
        both = ",".join(dict.fromkeys((*self.through, *(name for name in self.names if name != _LOOPBACK))))
        on = some([shown(network) for network in self.networks], _LISTED)
        return (
            f"name the peers' addresses or names on {on} too, with --peers, or let all of these networks in with "
            f"--peers subnet --interface {both}, or {otherwise}"
        )


class Reach:
    """How this host reaches the peers that are not itself, by its routes at this moment. own: those that are.

    Raises OSError where the kernel does not tell its routes.
    """

    def __init__(self, peers: Iterable[Network]) -> None:
        self._routes = Routes()
        self._listed = tuple(peers)
        self._peers = tuple(peer for peer in self._listed if not self._routes.is_own(peer))
        self.own = tuple(peer for peer in self._listed if self._routes.is_own(peer))
        self._names = dict(socket.if_nameindex())

    @cached_property
    def leading(self) -> tuple[str, ...]:
        """The interfaces that lead to a peer, or to this host's own network, by any table, in the kernel's order.

        This host's own address among the peers says where the others are, as in a host file that they still have to
        add themselves to.
        """
        return self._named(self._routes.devices_to(self._listed))

    def holder(self, address: str) -> str | None:
        """Return the interface that has an address of this host."""
        indices = self._routes.holders_of(ipaddress.ip_network(address))
        return next((name for index, name in self._names.items() if index in indices), None)

    @property
    def with_ipv4(self) -> tuple[str, ...]:
        """The interfaces that have an IPv4 address, the loopback included, in the kernel's order."""
        return tuple(name for index, name in self._names.items() if self._routes.has_address(index, 4))

    def lacks_ipv4(self, name: str) -> bool:
        """Return whether an interface has an IPv4 address and leads to peers by their IPv6 addresses alone.

        Of both, getifaddrs(3) has the IPv4 address first. Raises OSError.
        """
        indices = {index for index, known in self._names.items() if known == name}
        if not any(self._routes.has_address(index, 4) for index in indices):
            return False
        by_version = [[peer for peer in self._peers if peer.version == version] for version in (4, 6)]
        leads = [bool(indices & self._routes.devices_to(peers, without_source=True)) for peers in by_version]
        return leads == [False, True]

    def misses(self, names: Sequence[str]) -> Elsewhere | None:
        """Return why no packet of a peer comes in through one of these interfaces; None where some may.

        Raises OSError where the kernel does not tell its rules.
        """
        leading = self._named(self._routes.devices_to(self._peers))
        # The routes of a VRF name its members.
        if set(names) & {*leading, *(interfaces.seen_as(name)[0] for name in leading)}:
            return None
        return self._elsewhere(names)

    def elsewhere(self, names: Sequence[str]) -> Elsewhere | None:
        """Return why no peer has an address where these interfaces are; None where one may have.

        Raises OSError where the kernel does not tell its rules.
        """
        leading = self._named(self._routes.devices_to(self._peers, without_source=True))
        if not names or set(names) & set(leading):
            return None
        networks = [interfaces.networks_of([name]) for name in names]
        if not all(networks) and _LOOPBACK not in names:
            return None
        if any(_overlap(network, peer) for group in networks for network in group for peer in self._peers):
            return None
        return None if self._sends_from(names, self._peers) else self._elsewhere(names)

    def _elsewhere(self, names: Sequence[str]) -> Elsewhere | None:
        for peer in self._peers:
            if self._routes.devices_to([peer], without_source=True):
                through = self._named(self._routes.devices_to(self._peers, without_source=True))
                return Elsewhere(tuple(names), interfaces.networks_of(names), peer, through)
        return None

    def _named(self, indices: Iterable[int]) -> tuple[str, ...]:
        wanted = set(indices)
        return tuple(name for index, name in self._names.items() if index in wanted)

    def _sends_from(self, names: Sequence[str], peers: Sequence[Network]) -> bool:
        """Return whether an address of these interfaces is the one by which a peer is reached: a route may name it."""
        own = set(interfaces.addresses_of(names))
        return any(interfaces.source_towards(str(peer.network_address)) in own for peer in peers[:_MOST_ASKED])


def _overlap(one: Network, other: Network) -> bool:
    with contextlib.suppress(TypeError):  # of two versions
        return one.subnet_of(other) or other.subnet_of(one)  # type: ignore[arg-type]
    return False
