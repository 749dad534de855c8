"""How many nodes of a job were seen to have its key, and which addresses answered, or came, without.

Of an address nobody knows whose it is. A node has several: one on each network, of both IP versions, and temporary ones
of IPv6. So they are counted network by network, IPv4 before IPv6, and the network where most were seen tells how many
nodes there are at least.

Loaded where a job has a key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from securerun.linux.addresses import Own

if TYPE_CHECKING:
    from securerun.firewall.tags import Seen
    from securerun.guard.lease import Lease
    from securerun.linux.networks import Address, Network

_MOST_UNGUARDED = 16
_MOST_TOLD = 256


class Nodes:
    """Counts the nodes of a job that its shield met.

    guarded: how many were seen with the key, this one among them. unguarded: the first few addresses that answered at
    ports of the job's, or came by address, and showed no tag.
    """

    def __init__(self, lease: Lease) -> None:
        self.guarded = 1
        self.unguarded: tuple[str, ...] = ()
        self._lease = lease
        self._told: set[Address] = set()
        self._all_were_there = False

    def look(self) -> tuple[str, ...]:
        """Count again; return what is new to people. Raises ShieldUnavailable."""
        lease = self._lease
        if lease.shield is None or lease.shield.tags is None:
            return ()
        seen = lease.shield.tags.seen()
        others = [address for address in seen.guarded if not self._is_own(address)]
        of = lease.record.nodes
        self.guarded = max(self.guarded, 1 + count(others, self._of_host.networks))
        if of:
            self.guarded = min(self.guarded, of)
        known = {*seen.guarded}
        unknown = (one for one in seen.without if one.address not in known)
        # Answers from public ports have no tag.
        public = lease.policy.opening_at
        without = dict.fromkeys(one.address for one in unknown if not one.port or public(one.port) is None)
        self.unguarded = tuple(str(address) for address in without if not self._is_own(address))[:_MOST_UNGUARDED]
        return (*self._completed(of), *self._opening_without(seen))

    def _completed(self, of: int) -> Iterator[str]:
        if of > 1 and self.guarded == of and not self._all_were_there:
            self._all_were_there = True
            yield f"{of} of {of} nodes guarded"

    def _opening_without(self, seen: Seen) -> Iterator[str]:
        """Yield a line for each peer that comes by its address, and shows no tag."""
        known = {*seen.guarded, *self._told}
        for one in seen.without:
            if one.port or one.address in known or self._is_own(one.address) or len(self._told) >= _MOST_TOLD:
                continue
            self._told.add(one.address)
            known.add(one.address)
            yield (
                f"peer {one.address} is let in by its address alone: it shows no tag of this job's key; start it by "
                "securerun with the same key, and see that nothing on the way translates addresses or takes TCP option "
                "254 away"
            )

    def _is_own(self, address: Address) -> bool:
        return address.is_loopback or address in self._of_host.addresses

    @property
    def _of_host(self) -> Own:
        return self._lease.own or Own()


def count(addresses: Iterable[Address], networks: Iterable[Network]) -> int:
    """Return how many hosts these addresses are of, at least. networks: those of this host."""
    by_version: dict[int, Counter[Network | None]] = {4: Counter(), 6: Counter()}
    known = tuple(networks)
    for address in addresses:
        home = next((network for network in known if address in network), None)
        by_version[address.version][home] += 1
    counts = by_version[4] or by_version[6]
    return max(counts.values(), default=0)
