"""Port chains through iptables-restore and ip6tables-restore, whichever tables those commands write.

One dispatcher chain a family, `SECURERUN`, serves all runs of a host. INPUT hands it opening packets that
did not come over loopback; everything else costs one rule. In the dispatcher stand first the pass rules of
every run, then the drops of every run, so two runs with the same port range and different peers agree.
A pass is RETURN, in the dispatcher itself: back to the host's own rules. It closes and never opens.

What has been installed is read from the rules, not remembered: each rule's comment names its run, and the
jump's comment tells whether the table or the base chain exists because of us and goes when the last run goes.
The functions here that change the host expect the caller to hold the host's lock (guard/records.py).
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from securerun.firewall import nfnetlink
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.policy import Policy

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
_LOGGED_A_SECOND = 1000
_LOCK_SECONDS = 10
_COMMAND_SECONDS = 60


@dataclass(frozen=True)
class Family:
    """One address family's commands."""

    version: int
    restore: str
    save: str
    writes_nftables: bool

    @property
    def netfilter(self) -> int:
        """The family's number in netfilter (NFPROTO_IPV4, NFPROTO_IPV6), the same as the socket family's."""
        return socket.AF_INET if self.version == 4 else socket.AF_INET6


@dataclass(frozen=True)
class Dispatcher:
    """What a saved filter table says of our chain: its rules, and how INPUT jumps to it."""

    exists: bool
    rules: tuple[str, ...]
    jumps: tuple[str, ...]
    jumped_to_first: bool

    @property
    def made(self) -> str:
        """The jump's comment: what exists because of us."""
        return next((made for made in (MADE_TABLE, MADE_CHAIN) for jump in self.jumps if made in jump), MADE_NOTHING)

    def rules_of(self, run_id: str) -> tuple[str, ...]:
        """The rules whose comment names this run."""
        return tuple(rule for rule in self.rules if run_of(rule) == run_id)


def run_of(rule: str) -> str | None:
    """The run id in a saved rule's comment, or None when it is not a run's."""
    found = re.search(r'--comment "securerun ([0-9a-f]{12})"', rule)
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
    )


def render_install(
    policy: Policy, version: int, found: Dispatcher, made: str = MADE_NOTHING, log_group: int | None = None
) -> str:
    """The iptables-restore text that puts this run into the dispatcher, in place of the rules that it has there.

    Makes the dispatcher, and INPUT's jump to it, where they are missing.
    """
    # Declaring a chain that exists empties it, also under --noflush.
    declaration = [] if found.exists else [f":{CHAIN} - [0:0]"]
    jump = [] if found.jumped_to_first else [_deletion(jump) for jump in found.jumps]
    if not found.jumped_to_first:
        jump.append(f'-I INPUT 1 {JUMP} "{made}" -j {CHAIN}')
    replaced = _without(found.rules_of(policy.run_id), found)
    return _transaction([*declaration, *jump, *replaced, *passes(policy, version), *drops(policy, log_group)])


def passes(policy: Policy, version: int) -> Iterator[str]:
    """The lines that put the pass rules of one family before everything else in the dispatcher, in their order."""
    target = "ACCEPT" if policy.accept else "RETURN"
    # In reverse, since each is inserted at position 1.
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
            limit = f"-m limit --limit {_LOGGED_A_SECOND}/sec --limit-burst {_LOGGED_A_SECOND}"
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

    def install(self, policy: Policy, log_group: int | None) -> None:
        """Install in one transaction a family, and read back that the rules stand where they must.

        Raises PortChainsUnavailable, with nothing of this run left in either family.
        """
        try:
            for family in self._families:
                self._install_in(family, policy, log_group)
        except PortChainsUnavailable:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove this run's rules, and with the last run's everything that is there because of us.

        Raises PortChainsUnavailable when the tables cannot be read or written.
        """
        for family in self._families:
            _remove_from(family, self._run_id)

    def stand(self) -> bool:
        """Whether INPUT jumps to the dispatcher and this run has rules there, in each family."""
        found = [_dispatcher(family) for family in self._families]
        return all(dispatcher.jumps and dispatcher.rules_of(self._run_id) for dispatcher in found)

    def _install_in(self, family: Family, policy: Policy, log_group: int | None) -> None:
        found = _dispatcher(family)
        foreign = [rule for rule in found.rules if run_of(rule) is None]
        if foreign:
            raise PortChainsUnavailable(
                f"chain {CHAIN} holds a rule that is not securerun's ({foreign[0]}); remove it or use --firewall off"
            )
        made = found.made if found.jumps else _will_make(family)
        _restore(family, render_install(policy, family.version, found, made, log_group))
        now = _dispatcher(family)
        if not now.jumped_to_first or not now.rules_of(self._run_id):
            raise PortChainsUnavailable(f"{family.restore} reported success, but the rules are not there")


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
    restore = _find(f"{command}-restore")
    answer = _run([restore, "--version"], "")
    return Family(version, restore, _find(f"{command}-save"), "nf_tables" in answer)


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


def _will_make(family: Family) -> str:
    """What our transaction is about to bring into being beside the dispatcher: legacy tables come with their chains."""
    if not family.writes_nftables:
        return MADE_NOTHING
    try:
        if not nfnetlink.table_exists(family.netfilter, "filter"):
            return MADE_TABLE
        if not nfnetlink.chain_exists(family.netfilter, "filter", "INPUT"):
            return MADE_CHAIN
    except OSError as error:
        raise PortChainsUnavailable(f"nf_tables cannot be asked: {error.strerror}") from error
    return MADE_NOTHING


def _remove_from(family: Family, run_id: str) -> None:
    found = _dispatcher(family)
    text = render_removal(run_id, found)
    if not text:
        return
    _restore(family, text)
    if found.made == MADE_NOTHING or _dispatcher(family).exists:
        return
    try:
        nfnetlink.delete_unused_chain(family.netfilter, "filter", "INPUT")
        if found.made == MADE_TABLE:
            nfnetlink.delete_empty_table(family.netfilter, "filter")
    except OSError as error:
        raise PortChainsUnavailable(f"an empty filter table was left behind: {error.strerror}") from error


def _dispatcher(family: Family) -> Dispatcher:
    return read_dispatcher(_run([family.save, "-t", "filter"], ""))


def _restore(family: Family, text: str) -> None:
    _run([family.restore, "--noflush", "--wait", str(_LOCK_SECONDS)], text)


def _run(command: list[str], text: str) -> str:
    """Run one of iptables' commands with a clean environment; its standard output.

    Raises PortChainsUnavailable with the command's own words when it fails.
    """
    try:
        done = subprocess.run(  # noqa: S603 - an absolute path from _find, arguments of ours
            command, input=text, capture_output=True, text=True, env=_ENVIRONMENT, timeout=_COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PortChainsUnavailable(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        words = " ".join(done.stderr.split()) or f"ended with status {done.returncode}"
        raise PortChainsUnavailable(f"{command[0]}: {words}")
    return done.stdout
