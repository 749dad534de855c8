"""Port chains through iptables-restore and ip6tables-restore, whichever tables those commands write.

What they are given, and what their rules mean, is text of `dispatcher.py`; here the commands are run.
The functions here that change the host expect the caller to hold the host's lock (guard/run_directory.py).
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from securerun.firewall.chains import PortChainsUnavailable, Resets, TooManyRules, of_another, spoken_versions
from securerun.firewall.dispatcher import (
    CHAIN,
    MADE_CHAIN,
    MADE_NOTHING,
    MADE_TABLE,
    Dispatcher,
    read_dispatcher,
    render_install,
    render_removal,
    run_of,
)
from securerun.firewall.policy import Policy
from securerun.firewall.run_sets import RunSets
from securerun.linux import commands, nf_tables

_DIRECTORIES = "/usr/sbin:/sbin:/usr/bin:/bin"
_ENVIRONMENT = {"PATH": _DIRECTORIES, "LC_ALL": "C"}
_COMMANDS = {4: "iptables", 6: "ip6tables"}
# Those who wait for the host's lock meanwhile give up after 30 s (guard/run_directory.py).
_LOCK_SECONDS = 10
_COMMAND_SECONDS = 20.0


@dataclass(frozen=True)
class Family:
    """One address family's commands."""

    version: int
    restore: str
    save: str

    @property
    def netfilter(self) -> int:
        """The family's number in netfilter (NFPROTO_IPV4, NFPROTO_IPV6), the same as the socket family's."""
        return socket.AF_INET if self.version == 4 else socket.AF_INET6


def families() -> tuple[Family, ...]:
    """Return the commands of every address family that this kernel speaks.

    Raises PortChainsUnavailable when one of them is missing: a whitelist for one family alone is none.
    """
    return tuple(_family(version, _COMMANDS[version]) for version in spoken_versions())


class IptablesChains:
    """The port chains of one run in the tables that iptables-restore writes (see `chains.PortChains`).

    Raises PortChainsUnavailable where the host has no iptables for every address family that the kernel speaks.
    """

    backend = "iptables"
    name = CHAIN

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._families = families()
        self._sets = RunSets(run_id)
        self.resets = Resets()
        self.others: frozenset[str] = frozenset()
        # What `begin` has just read, for the first transaction.
        self._found: dict[Family, Dispatcher] | None = None

    def begin(self, *, adopt: bool, outlive: bool) -> None:
        """Refuse rules of another run of this id. Such rules belong to no process, and stay in any case."""
        found = _dispatchers(self._families)
        if not adopt and any(dispatcher.rules_of(self._run_id) for dispatcher in found.values()):
            raise of_another(self._run_id)
        self._found = found
        self.others = frozenset().union(*(dispatcher.runs() for dispatcher in found.values())) - {self._run_id}

    def install(self, policy: Policy, log_group: int | None) -> None:
        """Install in one transaction a family, and read back that the rules stand where they must.

        Raises PortChainsUnavailable, with nothing of this run left in either family, and TooManyRules with what stood.
        """
        try:
            self._sets.install(policy, lambda with_sets: self._install_best(policy, log_group, with_sets))
        except PortChainsUnavailable as error:
            if not (isinstance(error, TooManyRules) and self._sets.installed):
                self.remove()
            raise

    def remove(self) -> None:
        """Remove this run's rules, and with the last run's everything that is there because of us.

        Raises PortChainsUnavailable when the tables cannot be read or written.
        """
        self._found = None
        found = _dispatchers(self._families)
        texts = {family: render_removal(self._run_id, dispatcher) for family, dispatcher in found.items()}
        _restore({family: text for family, text in texts.items() if text})
        self._sets.remove()
        for family, dispatcher in found.items():
            if texts[family]:
                _remove_what_we_made(family, dispatcher)

    def stand(self) -> bool:
        """Whether INPUT jumps to the dispatcher, and this run has rules there and all in its sets."""
        found = _dispatchers(self._families).values()
        rules = all(dispatcher.jumps and dispatcher.rules_of(self._run_id) for dispatcher in found)
        return rules and self._sets.stand()

    def _install_best(self, policy: Policy, log_group: int | None, with_sets: bool) -> None:
        self.resets.install(policy, lambda resets: self._install(policy, log_group, with_sets, resets))

    def _install(self, policy: Policy, log_group: int | None, with_sets: bool, resets: bool) -> None:
        found, self._found = self._found or _dispatchers(self._families), None
        _refuse_foreign_rules(found.values())
        made = _made(found)
        how = {"with_sets": with_sets, "resets": resets}
        _restore(
            {
                family: render_install(policy, family.version, dispatcher, made[family], log_group, **how)
                for family, dispatcher in found.items()
            }
        )
        for family, now in _dispatchers(self._families).items():
            if not now.jumped_to_first or not now.rules_of(self._run_id):
                raise PortChainsUnavailable(f"{family.restore} reported success, but the rules are not there")


def _refuse_foreign_rules(found: Iterable[Dispatcher]) -> None:
    foreign = [rule for dispatcher in found for rule in dispatcher.rules if run_of(rule) is None]
    if foreign:
        raise PortChainsUnavailable(
            f"chain {CHAIN} holds a rule that is not securerun's ({foreign[0]}); remove it or use --firewall off"
        )


def _family(version: int, command: str) -> Family:
    return Family(version, _find(f"{command}-restore"), _find(f"{command}-save"))


def _find(command: str) -> str:
    path = shutil.which(command, path=_DIRECTORIES)
    if path is None:
        raise PortChainsUnavailable(f"no {command} in {_DIRECTORIES}")
    return path


def _made(found: Mapping[Family, Dispatcher]) -> dict[Family, str]:
    """For each family, what is there, or is about to be, because of us: the jump's comment says so from then on."""
    new = {
        each: found_there for each, found_there in found.items() if not (found_there.jumps or found_there.lasting_jumps)
    }
    silent = [family for family, dispatcher in new.items() if not dispatcher.in_nftables]
    versions = dict(zip(silent, _run([[family.restore, "--version"] for family in silent])))
    making = {family: _will_make(family) for family in new if "nf_tables" in versions.get(family, "nf_tables")}
    return {family: making.get(family, dispatcher.made) for family, dispatcher in found.items()}


def _will_make(family: Family) -> str:
    """Return what our transaction is about to bring into being beside the dispatcher.

    Legacy tables come with their chains.
    """
    try:
        if not nf_tables.table_exists(family.netfilter, "filter"):
            return MADE_TABLE
        if not nf_tables.chain_exists(family.netfilter, "filter", "INPUT"):
            return MADE_CHAIN
    except OSError as error:
        raise PortChainsUnavailable(f"nf_tables cannot be asked: {error.strerror}") from error
    return MADE_NOTHING


def _remove_what_we_made(family: Family, found: Dispatcher) -> None:
    """Take the base chain and the table away that were there because of the dispatcher, if it is gone now."""
    if found.made == MADE_NOTHING or _dispatchers([family])[family].exists:
        return
    try:
        nf_tables.delete_unused_chain(family.netfilter, "filter", "INPUT")
        if found.made == MADE_TABLE:
            nf_tables.delete_empty_table(family.netfilter, "filter")
    except OSError as error:
        raise PortChainsUnavailable(f"an empty filter table was left behind: {error.strerror}") from error


def _dispatchers(asked: Sequence[Family]) -> dict[Family, Dispatcher]:
    saved = _run([[family.save, "-t", "filter"] for family in asked])
    return {family: read_dispatcher(text) for family, text in zip(asked, saved)}


def _restore(texts: Mapping[Family, str]) -> None:
    wait = ["--noflush", "--wait", str(_LOCK_SECONDS)]
    _run([[family.restore, *wait] for family in texts], list(texts.values()))


def _run(asked: Sequence[list[str]], texts: Sequence[str] = ()) -> list[str]:
    """Run some of iptables' commands at once, each with a clean environment and its text; their standard outputs.

    One a family: both together take little longer than one. Raises PortChainsUnavailable with the first failing
    command's own words, when all have ended.
    """
    try:
        ended = commands.run(asked, texts or [""] * len(asked), _ENVIRONMENT, _COMMAND_SECONDS)
    except OSError as error:
        raise PortChainsUnavailable(f"{asked[0][0]}: {error}") from error
    for command, one in zip(asked, ended):
        if one.status != 0:
            words = " ".join(one.errors.split()) or f"ended with status {one.status}"
            raise PortChainsUnavailable(f"{command[0]}: {words}")
    return [one.output for one in ended]
