"""Peers that are too many for a rule each: which of a run's are, and the sets that they stand in instead.

A set of the kernel's (`ipset`) makes a connection from one of 10,000 peers cost what one from ten does. A set has to
be there before a rule names it, and goes only when no rule names it any more: for every backend that writes rules of
iptables that order is kept here. Kernels without such sets get a rule a peer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Callable

from securerun.firewall import ipset
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.policy import Policy
from securerun.linux import ip_set

_MOST_PEERS_IN_RULES = 32
_VERSIONS = (4, 6)


def set_name(run_id: str, version: int) -> str:
    """Return the name of the set with a run's peers of one IP version (IPSET_MAXNAMELEN is 32)."""
    return f"securerun-{run_id}-{version}"


def has_set(policy: Policy, version: int) -> bool:
    """Whether the peers of one IP version are so many that they stand in a set."""
    return len(policy.peers_of(version)) > _MOST_PEERS_IN_RULES


class PeerSets:
    """The sets of one run, with how many networks each was given."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._sizes: dict[str, int] = {}

    def install(self, policy: Policy, install_rules: Callable[[bool], None]) -> None:
        """Make the sets and have `install_rules(True)` install rules that name them, or `install_rules(False)` others.

        Others, with a rule a peer, where the kernel has no sets or its iptables no match for them. Sets that no rule
        names any more are removed. Raises what `install_rules(False)` raises, and PortChainsUnavailable for a set that
        cannot be removed.
        """
        versions = [version for version in _VERSIONS if has_set(policy, version)]
        sets = {set_name(policy.run_id, version): policy.peers_of(version) for version in versions}
        try:
            for name, peers in sets.items():
                ipset.put(name, peers)
            install_rules(True)
        except (OSError, PortChainsUnavailable):
            sets = {}
            install_rules(False)
        self._remove_all_but(sets)
        self._sizes = {name: len(peers) for name, peers in sets.items()}

    def stand(self) -> bool:
        """Whether the sets hold as many networks as they were given. Raises PortChainsUnavailable."""
        try:
            return all(ip_set.size(name) == size for name, size in self._sizes.items())
        except OSError as error:
            raise PortChainsUnavailable(f"the sets of peers cannot be read: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the sets, which no rule may name any more. Raises PortChainsUnavailable."""
        self._remove_all_but(())

    def _remove_all_but(self, kept: Collection[str]) -> None:
        for name in (set_name(self._run_id, version) for version in _VERSIONS):
            try:
                if name not in kept:
                    ipset.destroy(name)
            except OSError as error:
                raise PortChainsUnavailable(f"set {name} cannot be removed: {error.strerror}") from error
