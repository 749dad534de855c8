"""Whether the interface that somebody names is one by which peers are reached, or on another network altogether.

Peers are known by addresses. Where names stand on eth0 and gloo is told ib0, the peers' connections come from addresses
on ib0 that nobody named, and are turned away: that can be told before the start. It is told only where it is sure: an
interface that is on no network of its own (a dummy with a routed address), and peers that this host has no route to at
all, are left alone.
"""

from __future__ import annotations

import contextlib
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
        both = ",".join(dict.fromkeys((*self.through, *self.names)))
        on = some([shown(network) for network in self.networks], _LISTED)
        return (
            f"name the peers' addresses or names on {on} too, with --peers, or let all of these networks in with "
            f"--peers subnet --interface {both}, or {otherwise}"
        )


class Reach:
    """How this host reaches the peers that are not itself, by its routes at this moment.

    Raises OSError where the kernel does not tell its routes.
    """

    def __init__(self, peers: Iterable[Network]) -> None:
        self._routes = Routes()
        self._peers = tuple(peer for peer in peers if not self._routes.is_own(peer))
        self._names = dict(socket.if_nameindex())

    @cached_property
    def leading(self) -> tuple[str, ...]:
        """The interfaces that lead to a peer by any table, in the kernel's order."""
        return self._named(self._routes.devices_to(self._peers))

    def version(self, name: str) -> int | None:
        """Return the IP version of the first address of an interface, as getifaddrs(3) has them; None without IPv4."""
        indices = [index for index, known in self._names.items() if known == name]
        return 4 if any(self._routes.has_address(index, 4) for index in indices) else None

    def misses(self, names: Sequence[str]) -> Elsewhere | None:
        """Return why no packet of a peer comes in through one of these interfaces; None where some may.

        Raises OSError where the kernel does not tell its rules.
        """
        if set(names) & set(self.leading):
            return None
        # The routes of a VRF name its members.
        if set(names) & {interfaces.seen_as(name)[0] for name in self.leading}:
            return None
        return self._elsewhere(names)

    def elsewhere(self, names: Sequence[str], version: int | None = None) -> Elsewhere | None:
        """Return why no peer has an address where these interfaces are; None where one may have.

        version: the IP version that is to be used there, where that is known.
        Raises OSError where the kernel does not tell its rules.
        """
        wanted = [peer for peer in self._peers if version in {None, peer.version}]
        if set(names) & set(self._named(self._routes.devices_to(wanted, without_source=True))):
            return None
        networks = [interfaces.networks_of([name]) for name in names]
        if not all(networks) and _LOOPBACK not in names:
            return None
        if any(_overlap(network, peer) for group in networks for network in group for peer in wanted):
            return None
        return None if self._sends_from(names, wanted) else self._elsewhere(names)

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
