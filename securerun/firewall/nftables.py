"""Port chains as an nftables table a run, which beside a shield its guard owns: the kernel deletes it with the guard.

Without a shield it is all that closes the job's ports, so nobody owns it: it stays when the guard is killed, until
another guard takes it over, or removes it by the run's record.

`accept` ends only its own base chain, so what one run's table lets pass would still be dropped by another's that
has the same port range and other peers. Each table therefore has two base chains on the way in: `pass`, in which
peers' opening packets to the run's ports get a token, before `close`, in which opening packets to the run's ports
that carry no table's token are dropped. All runs' `pass` come before any run's `close`, also before the filter
chains of others (priority 0): to those a peer is handed on, so this closes and never opens.

The token stands in the packet's priority (skb->priority, as a traffic class: `meta priority`), not in its mark:
- no bit of the mark is free: Cilium, Calico, Kubernetes and portmap together use all 32 (github.com/fwmark/registry),
  a bit that they set would pass strangers, and one that we set or clear would change what their rules decide. The
  mark also lives on, in the accepted socket (net.ipv4.tcp_fwmark_accept) and in replies (fwmark_reflect);
- the priority is for queueing on the way out. On the way in it is 0 except where root maps VLAN priorities or has
  tc or nft set it, and nothing of TCP reads it after the input hook (sockets reply with SO_PRIORITY, forwarding
  sets it anew). A sender cannot set it: a veth pair clears it (____dev_forward_skb), and no wire carries it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Callable

from securerun.firewall.chains import ANSWERED_A_SECOND, PortChainsUnavailable, Resets, of_another
from securerun.firewall.droplog import LOGGED_A_SECOND, log_prefix
from securerun.firewall.libnftables import Nftables, NftablesError
from securerun.firewall.policy import RUN_ID, TAG_OPTION, Admission, Policy, by_networks
from securerun.linux import nf_tables
from securerun.linux.networks import written_address
from securerun.text import span

# "SRN!" as the two halves of a traffic class: no one sets it by chance.
TOKEN = "5352:4e21"
PASS_PRIORITY = -20
CLOSE_PRIORITY = -10
_NOT_PERMITTED = os.strerror(errno.EPERM)
_OWNER = "flags owner"
RESET = "reject with tcp reset"
NO_ACCEPT = (
    "nftables cannot accept past the host's own rules: accept ends only its own base chain; leave --accept out or use "
    "--firewall iptables"
)
_NAMED = re.compile(f"securerun-({RUN_ID.pattern})")
_RUN_IN_COMMENT = "securerun "
_COMMENTED = f'comment "{_RUN_IN_COMMENT}'
_CONTENT = re.compile(r"^\t(chain|set) (\w+) \{$", re.MULTILINE)
# Data packets cost this rule in each chain. SYN and ACK alone decide: a sender may set FIN and RST too. What is too
# short to hold flags matches no rule that asks for them and so counts as an opening packet below.
_DATA = "tcp flags & (syn | ack) != syn"
# What becomes of opening packets to the run's ports that nothing has let pass.
_REFUSE = "refuse"
# Ports of a range that is compared with, not taken apart.
_LONG_RANGE = 64


@dataclass(frozen=True)
class _Place:
    """Where tables of one kind decide, and by which token they know what one of them lets pass."""

    prefix: str
    token: str
    priorities: Mapping[str, int]


_RUNS = _Place("securerun-", TOKEN, {"pass": PASS_PRIORITY, "close": CLOSE_PRIORITY})
# What no run made, but an administrator's script ("SRN."): after all runs, whose token opens nothing here.
_LASTING = _Place("securerun-lasting-", "5352:4e2e", {"pass": -8, "close": -6})


def table_name(run_id: str) -> str:
    """Return the table of one run, in family inet."""
    return f"{_RUNS.prefix}{run_id}"


def render(policy: Policy, log_group: int | None, *, owned: bool = True, resets: bool = True) -> str:
    """Return the text in nft's language that installs the policy. owned: whether the table goes with who makes it.

    resets: nft_reject_inet is to be had, which drops whatever it does not answer.
    `nft -f` would take it, but own it only while it runs.

    `create` refuses a table that exists, which `table` alone would add to. libnftables 1.0.6 ignores sets and
    chains in the block of `create`, so they follow in a block of their own, and its comment would be ignored.
    """
    name = table_name(policy.run_id)
    peers = tuple(_peer_sets(policy))
    chains = _chains(_RUNS, policy, peers, log_group, resets=resets)
    blocks = [*([[f"\t{_OWNER}"]] if owned else []), *_sets(peers), *chains]
    owner = f"{_OWNER}; " if owned else ""
    return f"create table inet {name} {{ {owner}{_comment(policy.run_id)}; }}\n{_table(name, blocks)}"


def render_lasting(policy: Policy) -> str:
    """Return the text for `nft -f` that makes a table the policy's which nobody owns, be it there already or not.

    It decides after all runs, by itself: what their tables let pass is closed here all the same.
    It is emptied and refilled in place, for the reason that `render_change` has. What is emptied must exist, so all
    that a table of ours may hold is declared first.
    """
    name = f"{_LASTING.prefix}{policy.run_id}"
    chains = (_chain(_LASTING, what, ()) for what in (*_LASTING.priorities, _REFUSE))
    peers = tuple(_peer_sets(policy))
    empty = _table(name, [*_every_set(), *chains])
    flushes = [f"flush {kind} inet {name} {what}" for kind, what in _CONTENT.findall(empty)]
    return "\n".join([empty, *flushes, "", _table(name, [*_sets(peers), *_chains(_LASTING, policy, peers, None)])])


def render_lasting_removal(run_id: str) -> str:
    """Return the text for `nft -f` that removes such a table, whether it is there or not."""
    name = f"{_LASTING.prefix}{run_id}"
    return f"table inet {name}\ndelete table inet {name}\n"


def render_change(rendered: str, run_id: str, standing: str) -> str:
    """Return the text that makes a table, rendered as `standing`, one of this rendering, emptied and refilled in place.

    Not by deleting and making it: although that is one transaction, a packet that is between two base chains while
    it happens meets a chain of the new table before and one of the old table after (6.18: a stranger's SYNs at
    200,000 a second got through half of 11,000 such replacements, and through none of 8,600 made in place).
    """
    name = table_name(run_id)
    stood = _CONTENT.findall(standing)
    _, _, content = rendered.partition("\n")
    return "\n".join([*(f"flush {kind} inet {name} {what}" for kind, what in stood), content])


def render_in_place(policy: Policy, log_group: int | None, *, resets: bool = True) -> str:
    """Return the text that makes a run's table that nobody owns the policy's, whatever of it is there.

    It is emptied and refilled in place, for the reason that `render_change` has. What is emptied must exist, so all
    that such a table may hold is declared first.
    """
    name = table_name(policy.run_id)
    chains = (_chain(_RUNS, what, ()) for what in (*_RUNS.priorities, _REFUSE))
    empty = _table(name, [*_every_set(), *chains])
    flushes = (f"flush {kind} inet {name} {what}" for kind, what in _CONTENT.findall(empty))
    _, _, content = render(policy, log_group, owned=False, resets=resets).partition("\n")
    return "\n".join([empty, *flushes, content])


class NftablesChains:
    """The port chains of one run in a table of their own (see `chains.PortChains`).

    They live as long as this object in this process: after its death there is nothing to remove. Unless they are to
    outlive it: then nobody owns the table, and whoever is permitted to can change it, or remove it.
    """

    backend = "nftables"

    def __init__(self, run_id: str) -> None:
        self.name = table_name(run_id)
        self._run_id = run_id
        self._owner: Nftables | None = None
        self._standing = ""
        self._outlives = False
        self._adopts = False
        self.resets = Resets()
        self.others: frozenset[str] = frozenset()

    def begin(self, *, adopt: bool, outlive: bool) -> None:
        """Refuse a table of another run of this id, and have no owner for one that is to stay."""
        standing = _standing()
        if not adopt and self.name in standing:
            raise of_another(self._run_id)
        # A table with an owner goes with that.
        ours = ((_NAMED.fullmatch(name), is_owned) for name, is_owned in standing.items())
        self.others = frozenset(named[1] for named, is_owned in ours if named and not is_owned) - {self._run_id}
        self._outlives, self._adopts = outlive, adopt and outlive

    def install(self, policy: Policy, log_group: int | None) -> None:
        """Install the table in one transaction, and read back that all of it stands.

        Called again, it changes the table to the new policy, without a moment in which a port of both is open.
        Raises PortChainsUnavailable, with nothing left, or with what stood before if the change is refused.
        """
        if policy.accept:
            raise PortChainsUnavailable(NO_ACCEPT)
        self.resets.install(policy, lambda resets: self._install(policy, log_group, resets))

    def stand(self) -> bool:
        """Whether the table is there, and whole: nobody but its owner, if it has one, can change it (kernel 5.12)."""
        if self._owner is None:
            return False
        try:
            return not _missing(self.name, self._standing)
        except NftablesError as error:
            raise PortChainsUnavailable(str(error)) from error

    def remove(self) -> None:
        """Remove the table, also one that a dead guard left. Without effect where it is not there.

        Raises PortChainsUnavailable when the tables cannot be read, or when another process holds the table.
        """
        owner, self._owner = self._owner, None
        if owner is not None:
            _delete(owner, self.name)
        if _asked(nf_tables.table_has_owner, self.name):
            raise PortChainsUnavailable(f"table inet {self.name} belongs to another process, which has to end first")
        _asked(nf_tables.delete_table, self.name)

    def _install(self, policy: Policy, log_group: int | None, resets: bool) -> None:
        rendered = render(policy, log_group, owned=not self._outlives, resets=resets)
        try:
            if self._owner is None:
                first = render_in_place(policy, log_group, resets=resets) if self._adopts else rendered
                self._owner = self._first(first, rendered)
            elif self._outlives:
                self._owner.run(render_in_place(policy, log_group, resets=resets))
                _read_back(self.name, rendered)
            else:
                self._owner.run(render_change(rendered, policy.run_id, self._standing))
                _read_back(self.name, rendered)
        except NftablesError as error:
            raise PortChainsUnavailable(str(error)) from error
        self._standing = rendered

    def _first(self, text: str, rendered: str) -> Nftables:
        owner = Nftables()
        try:
            _create(owner, self.name, text)
            _read_back(self.name, rendered)
        except NftablesError:
            owner.close()
            raise
        return owner


def _standing() -> dict[str, bool]:
    """Return the tables of family inet, and whether each has an owner. Raises PortChainsUnavailable."""
    try:
        return nf_tables.tables(nf_tables.INET)
    except OSError as error:
        raise PortChainsUnavailable(f"nf_tables cannot be asked: {error.strerror}") from error


def _asked(question: Callable[[int, str], bool], name: str) -> bool:
    """Ask something of the table, or for it. Raises PortChainsUnavailable where the kernel cannot be asked."""
    try:
        return question(nf_tables.INET, name)
    except OSError as error:
        raise PortChainsUnavailable(f"nf_tables cannot be asked: {error.strerror}") from error


def _table(name: str, blocks: Iterable[Iterable[str]]) -> str:
    content = "\n\n".join("\n".join(block) for block in blocks)
    return f"table inet {name} {{\n{content}\n}}\n"


@dataclass(frozen=True)
class _PeerSet:
    """Some of the peers of one IP version: single hosts, or networks, which are intervals."""

    version: int
    of_networks: bool
    elements: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{'networks' if self.of_networks else 'hosts'}{self.version}"


def _sets(peers: Iterable[_PeerSet]) -> Iterator[list[str]]:
    return (_set(each.name, f"ipv{each.version}_addr", each.elements, interval=each.of_networks) for each in peers)


def _every_set() -> Iterator[list[str]]:
    return _sets(_PeerSet(version, of_networks, ()) for version in (4, 6) for of_networks in (False, True))


def _peer_sets(policy: Policy) -> Iterator[_PeerSet]:
    """Yield the sets that are not empty. Hosts stand apart: without intervals 10,000 of them take half the time."""
    for version, bits in ((4, 32), (6, 128)):
        hosts, networks = [], []
        for peer in policy.peers_of(version):
            if peer.prefixlen == bits:
                hosts.append(written_address(peer.network_address))
            else:
                networks.append(str(peer))
        for of_networks, elements in ((False, hosts), (True, networks)):
            if elements:
                yield _PeerSet(version, of_networks, tuple(elements))


def _set(name: str, kind: str, elements: Iterable[str], *, interval: bool) -> list[str]:
    listed = ", ".join(elements)
    # The language has no empty list of elements.
    content = [f"\t\telements = {{ {listed} }}"] if listed else []
    flags = ["\t\tflags interval"] * interval
    return [f"\tset {name} {{", f"\t\ttype {kind}", *flags, *content, "\t}"]


def _chains(
    place: _Place, policy: Policy, peers: Sequence[_PeerSet], log_group: int | None, *, resets: bool = True
) -> Iterator[list[str]]:
    if policy.peers or policy.tag_ports() or any(not opening.is_for_all for opening in policy.public):
        yield _chain(place, "pass", _rules(policy.run_id, _passes(place, policy, peers)))
    answered = policy.answered_version if resets else None
    yield _chain(place, _REFUSE, _rules(policy.run_id, _refusals(policy, log_group, answered), after_data=False))
    yield _chain(place, "close", _rules(policy.run_id, _closes(place, policy)))


def _chain(place: _Place, name: str, rules: Iterable[str]) -> list[str]:
    hook = [f"\t\t{_hook(place.priorities[name])}"] if name in place.priorities else []
    return [f"\tchain {name} {{", *hook, *rules, "\t}"]


def _rules(run_id: str, rules: Iterable[str], *, after_data: bool = True) -> Iterator[str]:
    before = [f"{_DATA} accept"] if after_data else []
    return (f"\t\t{rule} {_comment(run_id)}" for rule in (*before, *rules))


def _hook(priority: int) -> str:
    return f"type filter hook input priority {priority}; policy accept;"


def _passes(place: _Place, policy: Policy, peers: Iterable[_PeerSet]) -> Iterator[str]:
    names = ", ".join(f'"{interface}"' for interface in policy.interfaces)
    entry = f"iifname {{ {names} }} " if names else ""
    # nft 1.0.6 crashes, in the guard too, when it is asked for the option's length as well.
    tagged = [f"{to_ports} tcp option {TAG_OPTION} exists" for to_ports in _to(policy.tag_ports())]
    by_address = tagged if policy.admission is Admission.BOTH else [*_to(policy.joined_ports())]
    for each in peers if policy.admission is not Admission.TAG else ():
        family = "ip" if each.version == 4 else "ip6"
        for match in by_address:
            yield f"{entry}{match} {family} saddr @{each.name} meta priority set {place.token} accept"
    for match in tagged if policy.admits_by_tag else ():
        through = entry if policy.tag_interfaces else ""
        yield f"{through}{match} meta priority set {place.token} accept"
    for networks, ranges in by_networks(policy.public).items():
        ports = ", ".join(span(first, last) for first, last in ranges)
        for version, family in ((4, "ip"), (6, "ip6")):
            sources = ", ".join(str(network) for network in networks if network.version == version)
            if sources:
                match = f"tcp dport {{ {ports} }} {family} saddr {{ {sources} }}"
                yield f"{match} meta priority set {place.token} accept"


def _closes(place: _Place, policy: Policy) -> Iterator[str]:
    yield f"meta priority {place.token} accept"
    yield 'iifname "lo" accept'
    for to_ports in _to(policy.joined_ports()):
        yield f"{to_ports} goto {_REFUSE}"


def _refusals(policy: Policy, log_group: int | None, answered: int | None) -> Iterator[str]:
    if log_group is not None:
        yield f'{_limit(LOGGED_A_SECOND)} log prefix "{log_prefix(policy.run_id)}" group {log_group}'
    if answered is not None:
        # A client with addresses of both IP versions, which tried the one that no peer has, takes the other at once.
        yield f"meta nfproto ipv{answered} {_limit(ANSWERED_A_SECOND)} counter {RESET}"
    yield "counter drop"


def _to(ports: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Yield what matches packets to these ports: by a set that its rule brings along, and long ranges by themselves.

    Not by a set with intervals: while ports are added, such a set misses for a moment ports that are in it before and
    after. Emptied and refilled it does before Linux 6.17 (a60f7bf4a152), brought along by a rule it did on 6.18.44.
    Sets of single ports have not been seen to, and comparisons miss nothing.
    """
    single: list[int] = []
    ranges: list[str] = []
    for first, last in ports:
        if last - first < _LONG_RANGE:
            single += range(first, last + 1)
        else:
            ranges.append(span(first, last))
    if single:
        yield f"tcp dport {{ {', '.join(map(str, single))} }}"
    yield from (f"tcp dport {each}" for each in ranges)


def _limit(packets: int) -> str:
    return f"limit rate {packets}/second burst {packets} packets"


def _comment(run_id: str) -> str:
    return f'{_COMMENTED}{run_id}"'


def _read_back(name: str, rendered: str) -> None:
    """Raise NftablesError unless owner flag, base chains and every rule stand in the kernel.

    libnftables did report success for a table that it had made without its chains (see `render`).
    """
    missing = _missing(name, rendered)
    if missing:
        raise NftablesError(f"libnftables reported success, but table inet {name} lacks {', '.join(missing)}")


def _missing(name: str, rendered: str) -> list[str]:
    """Return what of a table, rendered like this, does not stand in the kernel. Raises NftablesError.

    The kernel is asked directly: libnftables would read all elements of all sets, whatever it is to list.
    """
    wanted = {chain: priority for chain, priority in _RUNS.priorities.items() if _hook(priority) in rendered}
    try:
        owned = nf_tables.table_has_owner(nf_tables.INET, name)
        missing = [_OWNER] if _OWNER in rendered and not owned else []
        missing += [chain for chain, at in wanted.items() if nf_tables.priority_of(nf_tables.INET, name, chain) != at]
        # Each rule carries the comment that names the run, and so does the table.
        if nf_tables.count_rules(nf_tables.INET, name, _RUN_IN_COMMENT) != rendered.count(_COMMENTED) - 1:
            missing.append("rules")
    except OSError as error:
        raise NftablesError(f"nf_tables cannot be asked: {error.strerror}") from error
    return missing


def _create(owner: Nftables, name: str, text: str) -> None:
    try:
        if _OWNER in text:
            owner.read(_bare(name))
        owner.run(text)
    except NftablesError as error:
        if _OWNER not in text:
            raise
        raise NftablesError(_reason(owner, name, error)) from error


def _reason(owner: Nftables, name: str, error: NftablesError) -> str:
    """Why the table could not be made, the common causes told apart by trying and not by the words of an error."""
    with contextlib.suppress(OSError):
        if nf_tables.table_exists(nf_tables.INET, name):
            return f"a table inet {name} exists already, and this process did not make it"
    try:
        owner.run(_bare(name))
    except NftablesError as bare:
        if _NOT_PERMITTED in str(bare):
            return f"nf_tables needs CAP_NET_ADMIN: {bare}"
        return f"no table with an owner can be made here (kernel 5.12 and nftables 0.9.9 are the first): {bare}"
    return str(error)


def _bare(name: str) -> str:
    return f"create table inet {name} {{ {_OWNER}; }}"


def _delete(owner: Nftables, name: str) -> None:
    """Delete the table, which also a forgotten copy of the socket cannot keep, and close the socket."""
    with contextlib.suppress(NftablesError):  # gone already; what is not is seen by the caller
        owner.run(f"delete table inet {name}")
    owner.close()
