"""Port chains through iptables-restore and ip6tables-restore, whichever tables those commands write.

One dispatcher chain a family, `SECURERUN`, serves all runs of a host. INPUT hands it opening packets that
did not come over loopback; everything else costs one rule. In the dispatcher stand first the pass rules of
every run, then the drops of every run, so two runs with the same port range and different peers agree.
A pass is RETURN, in the dispatcher itself: back to the host's own rules. It closes and never opens.
Up to a few peers stand in a rule each; of more, a family's stand in one set (ipset), which one rule names, so that a
connection from one of 10,000 peers costs what one from ten does. Kernels without such sets get a rule a peer.

What has been installed is read from the rules, not remembered: each rule's comment names its run, and the
jump's comment tells whether the table or the base chain exists because of us and goes when the last run goes.
The functions here that change the host expect the caller to hold the host's lock (guard/records.py).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Callable

from securerun.firewall import ipset
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.droplog import LOGGED_A_SECOND
from securerun.firewall.policy import RUN_ID, Policy
from securerun.linux import nf_tables

CHAIN = "SECURERUN"
_DIRECTORIES = "/usr/sbin:/sbin:/usr/bin:/bin"
_ENVIRONMENT = {"PATH": _DIRECTORIES, "LC_ALL": "C"}
# Opening packets by SYN and ACK alone: `--syn` also asks for no FIN and no RST, which a sender may set.
JUMP = "! -i lo -p tcp -m tcp --tcp-flags SYN,ACK SYN -m comment --comment"
MADE_TABLE = "securerun made this table"
MADE_CHAIN = "securerun made this chain"
MADE_NOTHING = "securerun"
# xt_multiport holds 15 ports (XT_MULTI_PORTS); a range counts twice.
_MULTIPORT_SLOTS = 15
_FEW_RULES = 16
_MOST_PEERS_IN_RULES = 32
_COMMENT = re.compile(rf'--comment "securerun ({RUN_ID.pattern})"')
_LOCK_SECONDS = 10
_COMMAND_SECONDS = 60


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


@dataclass(frozen=True)
class Dispatcher:
    """What a saved filter table says of our chain: its rules, and how INPUT jumps to it.

    in_nftables: whether it says that it is kept in nf_tables; older commands' texts do not say it.
    """

    exists: bool
    rules: tuple[str, ...]
    jumps: tuple[str, ...]
    jumped_to_first: bool
    in_nftables: bool = False

    @property
    def made(self) -> str:
        """The jump's comment: what exists because of us."""
        return next((made for made in (MADE_TABLE, MADE_CHAIN) for jump in self.jumps if made in jump), MADE_NOTHING)

    def rules_of(self, run_id: str) -> tuple[str, ...]:
        """The rules whose comment names this run."""
        return tuple(rule for rule in self.rules if run_of(rule) == run_id)


def run_of(rule: str) -> str | None:
    """The run id in a saved rule's comment, or None when it is not a run's."""
    found = _COMMENT.search(rule)
    return found.group(1) if found else None


def read_dispatcher(saved: str) -> Dispatcher:
    """Read iptables-save's text of the filter table."""
    lines = saved.split("\n")
    entries = [line for line in lines if line.startswith("-A INPUT ")]
    jumps = tuple(line for line in entries if line.endswith(f"-j {CHAIN}"))
    return Dispatcher(
        exists=any(line.startswith(f":{CHAIN} ") for line in lines),
        rules=tuple(line for line in lines if line.startswith(f"-A {CHAIN} ")),
        jumps=jumps,
        jumped_to_first=len(jumps) == 1 and entries[0] == jumps[0],
        in_nftables="(nf_tables)" in lines[0],
    )


def render_install(
    policy: Policy,
    version: int,
    found: Dispatcher,
    made: str = MADE_NOTHING,
    log_group: int | None = None,
    *,
    with_sets: bool = True,
) -> str:
    """The iptables-restore text that puts this run into the dispatcher, in place of the rules that it has there.

    Makes the dispatcher, and INPUT's jump to it, where they are missing. with_sets: many peers stand in the set of
    `set_name`, which has to be there, and not in a rule each.
    """
    # Declaring a chain that exists empties it, also under --noflush.
    declaration = [] if found.exists else [f":{CHAIN} - [0:0]"]
    jump = [] if found.jumped_to_first else [_deletion(jump) for jump in found.jumps]
    if not found.jumped_to_first:
        jump.append(f'-I INPUT 1 {JUMP} "{made}" -j {CHAIN}')
    replaced = _without(found.rules_of(policy.run_id), found)
    opening = passes(policy, version, with_sets=with_sets)
    return _transaction([*declaration, *jump, *replaced, *opening, *drops(policy, log_group)])


def passes(policy: Policy, version: int, *, with_sets: bool = False) -> Iterator[str]:
    """The lines that put the pass rules of one family before everything else in the dispatcher, in their order.

    with_sets: as for `render_install`.
    """
    target = "ACCEPT" if policy.accept else "RETURN"
    # In reverse, since each is inserted at position 1.
    if with_sets and has_set(policy, version):
        sources = [f"-m set --match-set {set_name(policy.run_id, version)} src "]
    else:
        sources = [f"-s {network} " for network in reversed(policy.peers_of(version))]
    entries = [f"-i {interface} " for interface in reversed(policy.interfaces)] or [""]
    for source in sources:
        for entry in entries:
            for ports in _port_matches(policy):
                yield f"-I {CHAIN} 1 {source}{entry}{ports} {_comment(policy.run_id)} -j {target}"


def drops(policy: Policy, log_group: int | None) -> Iterator[str]:
    """The lines that put the drops, which are the same for both families, after everything else."""
    comment = _comment(policy.run_id)
    for ports in _port_matches(policy):
        if log_group is not None:
            limit = f"-m limit --limit {LOGGED_A_SECOND}/sec --limit-burst {LOGGED_A_SECOND}"
            yield f"-A {CHAIN} {ports} {limit} {comment} -j NFLOG --nflog-group {log_group}"
        yield f"-A {CHAIN} {ports} {comment} -j DROP"


def render_removal(run_id: str, found: Dispatcher) -> str:
    """The iptables-restore text that takes this run out of the dispatcher; empty when there is nothing to take out.

    With the last run's rules the dispatcher goes too.
    """
    ours = found.rules_of(run_id)
    if len(ours) == len(found.rules) and found.exists:
        return _transaction([*(_deletion(jump) for jump in found.jumps), f"-F {CHAIN}", f"-X {CHAIN}"])
    if not ours:
        return ""
    return _transaction(_without(ours, found))


def _without(rules: Collection[str], found: Dispatcher) -> list[str]:
    """The lines that take rules out of the dispatcher and leave the others as they are.

    A deletion looks for its rule among all (iptables-nft 1.8.9: 40 s for 4,096 of 8,192), so many rules are taken out
    by writing the others anew. Within one transaction no packet sees the difference.
    """
    if len(rules) <= _FEW_RULES:
        return [_deletion(rule) for rule in rules]
    gone = set(rules)
    return [f"-F {CHAIN}", *(rule for rule in found.rules if rule not in gone)]


def set_name(run_id: str, version: int) -> str:
    """The set with a run's peers of one IP version (IPSET_MAXNAMELEN is 32)."""
    return f"securerun-{run_id}-{version}"


def has_set(policy: Policy, version: int) -> bool:
    """Whether the peers of one IP version are so many that they stand in a set."""
    return len(policy.peers_of(version)) > _MOST_PEERS_IN_RULES


def install_with_sets(policy: Policy, install: Callable[[bool], None]) -> dict[str, int]:
    """Have `install(True)` install rules after the sets that they name are made, or `install(False)` rules alone.

    Rules alone where the kernel has no sets, or its iptables no match for them. Returns how many networks are in each
    set. Raises what `install(False)` raises, and PortChainsUnavailable for a set that can not be removed.
    """
    versions = [version for version in (4, 6) if has_set(policy, version)]
    names = {set_name(policy.run_id, version): policy.peers_of(version) for version in versions}
    try:
        for name, peers in names.items():
            ipset.put(name, peers)
        install(True)
    except (OSError, PortChainsUnavailable):
        names = {}
        install(False)
    remove_sets(policy.run_id, names)
    return {name: len(peers) for name, peers in names.items()}


def remove_sets(run_id: str, keep: Collection[str] = ()) -> None:
    """Remove a run's sets, which no rule may name any more. Raises PortChainsUnavailable."""
    for name in (set_name(run_id, version) for version in (4, 6)):
        try:
            if name not in keep:
                ipset.destroy(name)
        except OSError as error:
            raise PortChainsUnavailable(f"set {name} cannot be removed: {error.strerror}") from error


def sets_stand(sizes: dict[str, int]) -> bool:
    """Whether the sets hold as many networks as were put there. Raises PortChainsUnavailable."""
    try:
        return all(ipset.size(name) == size for name, size in sizes.items())
    except OSError as error:
        raise PortChainsUnavailable(f"the sets of peers cannot be read: {error.strerror}") from error


def families() -> tuple[Family, ...]:
    """The commands of every address family that this kernel speaks.

    Raises PortChainsUnavailable when one of them is missing: a whitelist for one family alone is none.
    """
    found = [_family(4, "iptables")]
    if socket.has_ipv6 and kernel_speaks_ipv6():
        found.append(_family(6, "ip6tables"))
    return tuple(found)


class IptablesChains:
    """The port chains of one run in the tables that iptables-restore writes (see `chains.PortChains`).

    Raises PortChainsUnavailable where the host has no iptables for every address family that the kernel speaks.
    """

    backend = "iptables"
    name = CHAIN

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._families = families()
        self._sets: dict[str, int] = {}

    def install(self, policy: Policy, log_group: int | None) -> None:
        """Install in one transaction a family, and read back that the rules stand where they must.

        Raises PortChainsUnavailable, with nothing of this run left in either family.
        """
        try:
            self._sets = install_with_sets(policy, lambda with_sets: self._install(policy, log_group, with_sets))
        except PortChainsUnavailable:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove this run's rules, and with the last run's everything that is there because of us.

        Raises PortChainsUnavailable when the tables cannot be read or written.
        """
        found = _dispatchers(self._families)
        texts = {family: render_removal(self._run_id, dispatcher) for family, dispatcher in found.items()}
        _restore({family: text for family, text in texts.items() if text})
        remove_sets(self._run_id)
        for family, dispatcher in found.items():
            if texts[family]:
                _remove_what_we_made(family, dispatcher)

    def stand(self) -> bool:
        """Whether INPUT jumps to the dispatcher, and this run has rules there and all peers in its sets."""
        found = _dispatchers(self._families).values()
        rules = all(dispatcher.jumps and dispatcher.rules_of(self._run_id) for dispatcher in found)
        return rules and sets_stand(self._sets)

    def _install(self, policy: Policy, log_group: int | None, with_sets: bool) -> None:
        found = _dispatchers(self._families)
        _refuse_foreign_rules(found.values())
        made = _made(found)
        _restore(
            {
                family: render_install(policy, family.version, dispatcher, made[family], log_group, with_sets=with_sets)
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


def _port_matches(policy: Policy) -> Iterator[str]:
    """multiport matches for the union of the ranges, each within the slots that xt_multiport has."""
    match: list[str] = []
    slots = 0
    for first, last in policy.joined_ports():
        needed = 1 if first == last else 2
        if slots + needed > _MULTIPORT_SLOTS:
            yield f"-p tcp -m multiport --dports {','.join(match)}"
            match, slots = [], 0
        match.append(str(first) if first == last else f"{first}:{last}")
        slots += needed
    if match:
        yield f"-p tcp -m multiport --dports {','.join(match)}"


def _comment(run_id: str) -> str:
    return f'-m comment --comment "securerun {run_id}"'


def _deletion(rule: str) -> str:
    return rule.replace("-A ", "-D ", 1)


def _transaction(lines: Iterable[str]) -> str:
    return "\n".join(["*filter", *lines, "COMMIT", ""])


def _family(version: int, command: str) -> Family:
    return Family(version, _find(f"{command}-restore"), _find(f"{command}-save"))


def _find(command: str) -> str:
    path = shutil.which(command, path=_DIRECTORIES)
    if path is None:
        raise PortChainsUnavailable(f"no {command} in {_DIRECTORIES}")
    return path


def kernel_speaks_ipv6() -> bool:
    """Whether IPv6 sockets can be made here; `ipv6.disable=1` on the kernel's command line forbids it."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def _made(found: Mapping[Family, Dispatcher]) -> dict[Family, str]:
    """For each family, what is there, or is about to be, because of us: the jump's comment says so from then on."""
    new = {family: dispatcher for family, dispatcher in found.items() if not dispatcher.jumps}
    silent = [family for family, dispatcher in new.items() if not dispatcher.in_nftables]
    versions = dict(zip(silent, _run([[family.restore, "--version"] for family in silent])))
    making = {family: _will_make(family) for family in new if "nf_tables" in versions.get(family, "nf_tables")}
    return {family: making.get(family, dispatcher.made) for family, dispatcher in found.items()}


def _will_make(family: Family) -> str:
    """What our transaction is about to bring into being beside the dispatcher: legacy tables come with their chains."""
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


def _run(commands: Sequence[list[str]], texts: Sequence[str] = ()) -> list[str]:
    """Run some of iptables' commands at once, each with a clean environment and its text; their standard outputs.

    One a family: both together take little longer than one. Raises PortChainsUnavailable with the first failing
    command's own words, when all have ended.
    """
    started: list[subprocess.Popen[str]] = []
    try:
        for command, text in zip(commands, texts or [""] * len(commands)):
            started.append(_start(command, text))
        outputs = [process.communicate(timeout=_COMMAND_SECONDS) for process in started]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PortChainsUnavailable(f"{commands[0][0]}: {error}") from error
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    for command, process, (_, errors) in zip(commands, started, outputs):
        if process.returncode != 0:
            words = " ".join(errors.split()) or f"ended with status {process.returncode}"
            raise PortChainsUnavailable(f"{command[0]}: {words}")
    return [output for output, _ in outputs]


def _start(command: list[str], text: str) -> subprocess.Popen[str]:
    """Its input is a file in memory, so that it waits for nobody while another is being read."""
    with open(os.memfd_create("rules"), "w+", encoding="ascii") as rules:  # noqa: PTH123 - a descriptor
        rules.write(text)
        rules.seek(0)
        return subprocess.Popen(  # noqa: S603 - an absolute path from _find, arguments of ours
            command, stdin=rules, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_ENVIRONMENT
        )
