"""The dispatcher: policy → the text that iptables-restore takes, and what iptables-save says of it. Asks nobody.

One dispatcher chain a family, `SECURERUN`, serves all runs of a host. INPUT hands it opening packets that
did not come over loopback; everything else costs one rule. In the dispatcher stand first the pass rules of
every run, then the drops of every run, so two runs with the same port range and different peers agree.
A pass is RETURN, in the dispatcher itself: back to the host's own rules. It closes and never opens.
Before the drops of an IP version that none of a run's peers has stands a REJECT with a reset, so many a second, so that
a client with addresses of both, which tried that one first, takes the other at once. xt REJECT drops what it does not
answer.
Up to a few peers stand in a rule each; of more, a family's stand in one set (`run_sets`), which one rule names, and
so do ports that are too many for a few rules.

What has been installed is read from the rules, not remembered: each rule's comment names its run, and the
jump's comment tells whether the table or the base chain exists because of us and goes when the last run goes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from securerun.firewall.chains import ANSWERED_A_SECOND
from securerun.firewall.droplog import LOGGED_A_SECOND, log_prefix
from securerun.firewall.policy import RUN_ID, TAG_OPTION, Admission, Policy, by_networks
from securerun.firewall.run_sets import (
    has_set,
    has_set_of_ports,
    port_groups,
    ports_name,
    set_name,
    tag_ports_name,
)

CHAIN = "SECURERUN"
# What no run made, but a script that an administrator ran (`script.py`), decides for itself after all runs.
LASTING_CHAIN = "SECURERUN-LASTING"
# Opening packets by SYN and ACK alone: `--syn` also asks for no FIN and no RST, which a sender may set.
JUMP = "! -i lo -p tcp -m tcp --tcp-flags SYN,ACK SYN -m comment --comment"
RESET = "REJECT --reject-with tcp-reset"
MADE_TABLE = "securerun made this table"
MADE_CHAIN = "securerun made this chain"
MADE_NOTHING = "securerun"
_OUR_COMMENT = re.compile(rf"securerun ({RUN_ID.pattern})")
_COMMENTED = re.compile(rf'--comment "{_OUR_COMMENT.pattern}"')
_FEW_RULES = 16
_TAG = f"-m tcp --tcp-option {TAG_OPTION}"


@dataclass(frozen=True)
class Dispatcher:
    """What a saved filter table says of our chain: its rules, and how INPUT jumps to it.

    lasting_jumps: INPUT's jumps to the chain of scripts.
    in_nftables: whether it says that it is kept in nf_tables; older commands' texts do not say it.
    """

    exists: bool
    rules: tuple[str, ...]
    jumps: tuple[str, ...]
    jumped_to_first: bool
    lasting_jumps: tuple[str, ...] = ()
    in_nftables: bool = False

    @property
    def made(self) -> str:
        """What exists because of us, by the jumps' comments: of runs and scripts, the last one to go removes it."""
        ours = (*self.jumps, *self.lasting_jumps)
        return next((made for made in (MADE_TABLE, MADE_CHAIN) for jump in ours if made in jump), MADE_NOTHING)

    def runs(self) -> frozenset[str]:
        """Return the runs that have rules in it."""
        return frozenset(run for rule in self.rules if (run := run_of(rule)) is not None)

    def rules_of(self, run_id: str) -> tuple[str, ...]:
        """Return the rules whose comment names this run."""
        return tuple(rule for rule in self.rules if run_of(rule) == run_id)


def run_of(rule: str) -> str | None:
    """Return the run id in a saved rule's comment, or None when it is not a run's."""
    found = _COMMENTED.search(rule)
    return found.group(1) if found else None


def run_named_by(comment: str) -> str | None:
    """Return the run id in the text of a rule's comment, or None when it is not a run's."""
    found = _OUR_COMMENT.fullmatch(comment)
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
        lasting_jumps=tuple(line for line in entries if line.endswith(f"-j {LASTING_CHAIN}")),
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
    resets: bool = True,
) -> str:
    """Return the iptables-restore text that puts this run into the dispatcher, in place of the rules that it has there.

    Makes the dispatcher, and INPUT's jump to it, where they are missing. with_sets: many peers and many ports stand in
    the sets of `run_sets`, which have to be there, and not in rules. resets: REJECT is to be had.
    """
    # Declaring a chain that exists empties it, also under --noflush.
    declaration = [] if found.exists else [f":{CHAIN} - [0:0]"]
    jump = [] if found.jumped_to_first else [_deletion(jump) for jump in found.jumps]
    if not found.jumped_to_first:
        jump.append(f'-I INPUT 1 {JUMP} "{made}" -j {CHAIN}')
    replaced = _without(found.rules_of(policy.run_id), found)
    opening = passes(policy, version, with_sets=with_sets)
    closing = drops(policy, version, log_group, with_sets=with_sets, resets=resets)
    return _transaction([*declaration, *jump, *replaced, *opening, *closing])


def passes(policy: Policy, version: int, *, chain: str = CHAIN, with_sets: bool = False) -> Iterator[str]:
    """Yield the lines that put the pass rules of one family before everything else in the chain, in their order.

    with_sets: as for `render_install`.
    """
    target = "ACCEPT" if policy.accept else "RETURN"
    # In reverse, since each is inserted at position 1.
    entries = [f"-i {interface} " for interface in reversed(policy.interfaces)] or [""]
    for source in _sources(policy, version, with_sets=with_sets):
        for entry in entries:
            for ports in _pass_matches(policy, with_sets=with_sets):
                yield f"-I {chain} 1 {source}{entry}{ports} {_comment(policy.run_id)} -j {target}"
    if policy.admits_by_tag:
        # Never accepted: the shield judges what comes to the job's sockets, and to no others.
        for entry in [f"-i {interface} " for interface in reversed(policy.tag_interfaces)] or [""]:
            for ports in _tag_matches(policy, with_sets=with_sets):
                yield f"-I {chain} 1 {entry}{ports} {_comment(policy.run_id)} -j RETURN"
    yield from _public_passes(policy, version, chain)


def _sources(policy: Policy, version: int, *, with_sets: bool) -> list[str]:
    """Return the matches of peers by address; none where only a tag counts."""
    if policy.admission is Admission.TAG:
        return []
    if with_sets and has_set(policy, version):
        return [f"-m set --match-set {set_name(policy.run_id, version)} src "]
    return [f"-s {network} " for network in reversed(policy.peers_of(version))]


def _pass_matches(policy: Policy, *, with_sets: bool) -> Iterator[str]:
    """Yield the matches of what peers by address may send."""
    if policy.admission is Admission.BOTH:
        return _tag_matches(policy, with_sets=with_sets)
    return _port_matches(policy, with_sets=with_sets)


def _tag_matches(policy: Policy, *, with_sets: bool) -> Iterator[str]:
    """Yield the matches of packets with the option that a tag is; the shield looks whether it is right."""
    if with_sets and has_set_of_ports(policy):
        if policy.tag_ports():
            yield f"-p tcp -m set --match-set {tag_ports_name(policy.run_id)} dst {_TAG}"
        return
    for ports in map(_match_of, port_groups(policy.tag_ports())):
        yield f"{ports} {_TAG}"


def _public_passes(policy: Policy, version: int, chain: str) -> Iterator[str]:
    """Yield the pass rules for public ports that some networks may connect to, through whatever interface.

    Always handed back to the host's own rules: an ACCEPT is for the job's nodes. Ports that are for every host are in
    no rule at all.
    """
    for networks, ranges in by_networks(policy.public).items():
        for network in networks:
            if network.version == version:
                for ports in map(_match_of, port_groups(ranges)):
                    yield f"-I {chain} 1 -s {network} {ports} {_comment(policy.run_id)} -j RETURN"


def drops(
    policy: Policy,
    version: int,
    log_group: int | None,
    *,
    chain: str = CHAIN,
    with_sets: bool = False,
    resets: bool = True,
) -> Iterator[str]:
    """Yield the lines that put the drops of one family after everything else.

    with_sets, resets: as for `render_install`.
    """
    is_answered = resets and policy.answered_version == version
    comment = _comment(policy.run_id)
    log = f'-j NFLOG --nflog-prefix "{log_prefix(policy.run_id)}"'
    for ports in _port_matches(policy, with_sets=with_sets):
        if log_group is not None:
            yield f"-A {chain} {ports} {_limit(LOGGED_A_SECOND)} {comment} {log} --nflog-group {log_group}"
        if is_answered:
            yield f"-A {chain} {ports} {_limit(ANSWERED_A_SECOND)} {comment} -j {RESET}"
        yield f"-A {chain} {ports} {comment} -j DROP"


def _limit(packets: int) -> str:
    return f"-m limit --limit {packets}/sec --limit-burst {packets}"


def render_removal(run_id: str, found: Dispatcher) -> str:
    """Return the iptables-restore text that takes this run out of the dispatcher; empty where it is not in there.

    With the last run's rules the dispatcher goes too.
    """
    ours = found.rules_of(run_id)
    if len(ours) == len(found.rules) and found.exists:
        return _transaction([*(_deletion(jump) for jump in found.jumps), f"-F {CHAIN}", f"-X {CHAIN}"])
    if not ours:
        return ""
    return _transaction(_without(ours, found))


def _without(rules: Collection[str], found: Dispatcher) -> list[str]:
    """Return the lines that take rules out of the dispatcher and leave the others as they are.

    A deletion looks for its rule among all (iptables-nft 1.8.9: 40 s for 4,096 of 8,192), so many rules are taken out
    by writing the others anew. Within one transaction no packet sees the difference.
    """
    if len(rules) <= _FEW_RULES:
        return [_deletion(rule) for rule in rules]
    gone = set(rules)
    return [f"-F {CHAIN}", *(rule for rule in found.rules if rule not in gone)]


def _port_matches(policy: Policy, *, with_sets: bool) -> Iterator[str]:
    """Yield the matches for the planned ports: of their set, or of xt_multiport for as many as it holds."""
    if with_sets and has_set_of_ports(policy):
        yield f"-p tcp -m set --match-set {ports_name(policy.run_id)} dst"
        return
    yield from map(_match_of, port_groups(policy.joined_ports()))


def _match_of(ports: str) -> str:
    return f"-p tcp -m multiport --dports {ports}"


def _comment(run_id: str) -> str:
    return f'-m comment --comment "securerun {run_id}"'


def _deletion(rule: str) -> str:
    return rule.replace("-A ", "-D ", 1)


def _transaction(lines: Iterable[str]) -> str:
    return "\n".join(["*filter", *lines, "COMMIT", ""])
