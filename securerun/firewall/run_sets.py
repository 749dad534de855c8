"""What of a run stands in sets, so that its rules are few whatever it asks for: peers, and ports.

A rule for each peer, interface and group of ports is thousands of rules for a small order, and each costs every
connection of the host; a set of the kernel's (`ipset`) makes one from 10,000 peers cost what one from ten does. A set
has to be there before a rule names it, and goes only when no rule names it any more: for every backend that writes
rules of iptables that order is kept here. Kernels without such sets get rules alone, and no more than MOST_RULES.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Callable

from securerun.firewall import ipset
from securerun.firewall.chains import PortChainsUnavailable, TooManyRules
from securerun.firewall.policy import Policy
from securerun.linux import ip_set

MOST_RULES = 512
_MOST_PEERS_IN_RULES = 32
_MOST_RULES_OF_FEW = 64
_MOST_GROUPS_IN_RULES = 4
# xt_multiport holds 15 ports (XT_MULTI_PORTS); a range counts twice.
_MULTIPORT_SLOTS = 15
_VERSIONS = (4, 6)


def set_name(run_id: str, version: int) -> str:
    """Return the name of the set with a run's peers of one IP version (IPSET_MAXNAMELEN is 32)."""
    return f"securerun-{run_id}-{version}"


def ports_name(run_id: str) -> str:
    """Return the name of the set with a run's ports."""
    return f"securerun-{run_id}-p"


def tag_ports_name(run_id: str) -> str:
    """Return the name of the set with the ports of a run where the shield judges who has a tag."""
    return f"securerun-{run_id}-t"


def port_groups(ranges: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Yield joined ranges of ports as xt_multiport takes them, each within the slots that it has."""
    match: list[str] = []
    slots = 0
    for first, last in ranges:
        needed = 1 if first == last else 2
        if slots + needed > _MULTIPORT_SLOTS:
            yield ",".join(match)
            match, slots = [], 0
        match.append(str(first) if first == last else f"{first}:{last}")
        slots += needed
    if match:
        yield ",".join(match)


def has_set(policy: Policy, version: int) -> bool:
    """Whether the peers of one IP version are so many that they stand in a set."""
    peers = len(policy.peers_of(version))
    groups = 1 if has_set_of_ports(policy) else _groups(policy)
    return peers > _MOST_PEERS_IN_RULES or (peers > 1 and peers * _entries(policy) * groups > _MOST_RULES_OF_FEW)


def has_set_of_ports(policy: Policy) -> bool:
    """Whether the ports are so many that they stand in a set, the same for both IP versions."""
    groups = _groups(policy)
    return groups > _MOST_GROUPS_IN_RULES or (groups > 1 and groups * _entries(policy) > _MOST_RULES_OF_FEW)


def require_few_rules(policy: Policy, why: str) -> None:
    """Raise TooManyRules for a policy that would take more than MOST_RULES rules a family if nothing stood in sets.

    why: there are no sets.
    """
    entries, groups = _entries(policy), _groups(policy)
    peers = max(len(policy.peers_of(version)) for version in _VERSIONS)
    rules = max(peers * entries, 1) * groups
    if policy.admits_by_tag:
        rules += entries * sum(1 for _ in port_groups(policy.tag_ports()))
    if rules > MOST_RULES:
        raise TooManyRules(
            f"{peers} peers, {entries} interfaces and {groups} groups of ports would be {rules} rules, and "
            f"{MOST_RULES} are the most without sets of the kernel's ({why}); use --firewall nftables, or name "
            "networks rather than hosts, fewer interfaces or fewer ranges of ports"
        )


class RunSets:
    """The sets of one run, with how many networks or ports each was given.

    installed: whether rules were installed, with or without sets, and not removed since.
    """

    def __init__(self, run_id: str) -> None:
        self.installed = False
        self._run_id = run_id
        self._sizes: dict[str, int] = {}

    def install(self, policy: Policy, install_rules: Callable[[bool], None]) -> None:
        """Make the sets and have `install_rules(True)` install rules that name them, or `install_rules(False)` others.

        Others, without sets, where the kernel has none or its iptables no match for them. Sets that no rule names any
        more are removed. Raises what `install_rules(False)` raises, TooManyRules where that would be too many rules,
        and PortChainsUnavailable for a set that cannot be removed.
        """
        sets = _members(policy)
        try:
            for name, members in sets.items():
                ipset.put(name, members)
            install_rules(True)
        except (OSError, PortChainsUnavailable) as error:
            require_few_rules(policy, f"there are none here: {error}")
            sets = {}
            install_rules(False)
        self.installed = True
        self._remove_all_but(sets)
        self._sizes = {name: _size(members) for name, members in sets.items()}

    def stand(self) -> bool:
        """Whether the sets hold as much as they were given. Raises PortChainsUnavailable."""
        try:
            return all(ip_set.size(name) == size for name, size in self._sizes.items())
        except OSError as error:
            raise PortChainsUnavailable(f"the sets of peers and ports cannot be read: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the sets, which no rule may name any more. Raises PortChainsUnavailable."""
        self.installed = False
        self._remove_all_but(())

    def _remove_all_but(self, kept: Collection[str]) -> None:
        # One for all: the host's lock is held meanwhile.
        deadline = ip_set.until_let_go()
        of_peers = (set_name(self._run_id, version) for version in _VERSIONS)
        for name in (*of_peers, ports_name(self._run_id), tag_ports_name(self._run_id)):
            try:
                if name not in kept:
                    ipset.destroy(name, deadline)
            except OSError as error:
                raise PortChainsUnavailable(f"set {name} cannot be removed: {error.strerror}") from error


def _members(policy: Policy) -> dict[str, ip_set.Members]:
    """Return the sets that the policy's rules name, by their names."""
    found: dict[str, ip_set.Members] = {
        set_name(policy.run_id, version): policy.peers_of(version) for version in _VERSIONS if has_set(policy, version)
    }
    if has_set_of_ports(policy):
        found[ports_name(policy.run_id)] = policy.joined_ports()
        tag_ports = policy.tag_ports()
        if tag_ports:
            found[tag_ports_name(policy.run_id)] = tag_ports
    return found


def _size(members: ip_set.Members) -> int:
    return sum(member[1] - member[0] + 1 if isinstance(member, tuple) else 1 for member in members)


def _entries(policy: Policy) -> int:
    return max(len(policy.interfaces), 1)


def _groups(policy: Policy) -> int:
    return sum(1 for _ in port_groups(policy.joined_ports()))
