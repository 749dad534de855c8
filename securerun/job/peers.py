"""Who may connect: what the user named, what the batch system or the rank table says, or what the endpoint of the
rendezvous leaves no doubt about.

The first source that answers wins. Any doubt is an error here, before anything was started. The address that the job
meets at makes nobody a peer: in Kubernetes it is often a Service's, which no host has.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Callable

from securerun.errors import PolicyError
from securerun.firewall.policy import PortRange, Purpose
from securerun.guard.documents import MAXIMUM_PEERS
from securerun.host import interfaces
from securerun.job import batch, entries, growing, ports, ranktable, resolver, subnet
from securerun.job.entries import ANY, Entry, Tell
from securerun.job.growing import HostFile
from securerun.job.job import UNKNOWN_NODES, Job
from securerun.job.resolver import Outcome, Resolver
from securerun.linux.networks import Network, collapse, is_address
from securerun.options import SITE_CONFIG, Options
from securerun.text import count, some

EVERY_HOST: tuple[Network, ...] = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))

# So long are names asked for again that have no address: those of a batch system, whose nodes may be just starting,
# and those of pods, which have none before the pod has one.
NODE_SECONDS, POD_SECONDS = 15.0, 60.0
# torch asks for the name of the meeting point as well, and waits for as long as it takes.
_MEETING_SECONDS = 2.0
# Where the peers of this one launch were named, not those of every launch of a shell or on this host.
_FLAG, _VARIABLE = "--peers", "SECURERUN_PEERS"
# As a list by itself: all nodes of the job are on this host.
_THIS_HOST = "localhost"
_NAMES_SHOWN = 3


class Unnamed(PolicyError):
    """Nothing says which hosts the other nodes of a job are."""


@dataclass(frozen=True)
class Peers:
    """Who may connect, and what else the sources said.

    networks: those that may, collapsed. source: where they come from. warnings: what the user should know about them.
    ports: the TCP ports that a rank table has HCCL listen on, here.
    fixed, files, named: what `networks` is made of: networks written out, host files that may be read again, and the
        networks of each host name, in a file or not; see `again`. lasting: the names that stand in no such file.
    """

    networks: tuple[Network, ...]
    source: str
    warnings: tuple[str, ...] = ()
    ports: tuple[PortRange, ...] = ()
    fixed: tuple[Network, ...] = ()
    named: Mapping[str, tuple[Network, ...]] = field(default_factory=dict)
    files: tuple[HostFile, ...] = ()
    lasting: frozenset[str] = frozenset()

    @property
    def listed(self) -> tuple[Network, ...]:
        """The networks one by one, before `networks` joined neighbours."""
        groups = (self.fixed, *(file.fixed for file in self.files), *self.named.values())
        return tuple(network for group in groups for network in group)


def find_peers(
    options: Options,
    job: Job,
    resolve: Resolver = resolver.addresses_of,
    environment: Mapping[str, str] | None = None,
    tell: Tell = lambda words: None,
) -> Peers:
    """Return who may connect to this job.

    environment: where batch systems leave what they know; this process' own by default.
    tell: takes one line for the user, when something has to be waited for.

    Raises PolicyError for a peer that is no address, network or resolvable name, for a list or rank table that cannot
    be right; and Unnamed where nothing tells who the other nodes of the job are.
    """
    question = _Question(options, job, resolve, os.environ if environment is None else environment, tell)
    for source in SOURCES:
        answer = source(question)
        if answer is not None:
            answer = replace(answer, warnings=(*answer.warnings, *_apart(answer, job)))
            return answer if source is _rank_table else _with_ports_of_table(answer, question)
    alone = "; for a job of this host alone, with --peers localhost" if job.max_nodes == UNKNOWN_NODES else ""
    raise Unnamed(
        f"{job.nodes} meet at {job.endpoint or 'a rendezvous without an address'}, and nothing says which hosts they "
        f"are{_in_brackets(question.notes)}; name them with --peers node1,node2 or --peers @hostfile.txt (one host a "
        f'line), with `export SECURERUN_PEERS=@hostfile.txt`, or with peers = "node1,node2" in {SITE_CONFIG}{alone}; '
        "or have them know each other by a key: `securerunctl setup key`"
    )


def with_files(peers: Peers, files: tuple[HostFile, ...]) -> Peers:
    """Return the same peers with host files as they are now; new names in them are still to be asked for."""
    if files == peers.files:
        return peers
    lasting = {name: found for name, found in peers.named.items() if name in peers.lasting}
    in_files = {name: peers.named.get(name, ()) for name in growing.names_of(files)}
    return replace(peers, files=files, named={**in_files, **lasting})


def again(peers: Peers, resolve: Resolver = resolver.addresses_of) -> Peers:
    """Return the same peers with the addresses that their names have now: pods come back with other ones.

    A name that has no address any more has none; one that the name service could not be asked for keeps what it had.
    Takes `resolver.SECONDS` at most; it has nothing to ask where `peers.named` is empty.
    Raises PolicyError where they have become every host, or more than a guard takes.
    """
    outcomes = resolver.ask(peers.named, resolve)
    now = replace(peers, named={name: _now(outcomes[name], before) for name, before in peers.named.items()})
    networks = collapse(now.listed)
    if any(network.prefixlen == 0 for network in networks) and not set(EVERY_HOST) & set(peers.networks):
        raise PolicyError(f"{peers.source}: these networks together are every host")
    if len(networks) > MAXIMUM_PEERS:
        raise PolicyError(f"{peers.source}: {len(networks):,} networks are more than the {MAXIMUM_PEERS:,} of a job")
    return replace(now, networks=networks)


@dataclass(frozen=True)
class _Question:
    """What the sources are asked about. notes: what they could not read, for a launch that no source answers for."""

    options: Options
    job: Job
    resolve: Resolver
    environment: Mapping[str, str]
    tell: Tell
    notes: list[str] = field(default_factory=list)


def _flag(question: _Question) -> Peers | None:
    return _of_option(question) if question.options.peers_source == _FLAG else None


def _one_node(question: _Question) -> Peers | None:
    """One agent has no other to talk to, whatever nodes the batch system gave: each may run a job of its own.

    Nor is a variable meant for it that a shell exports for all that it starts, or a file for all of this host's jobs.
    """
    if question.job.max_nodes != 1:
        return None
    options = question.options
    unused = f", which {options.peers_source} does not open; {_FLAG} does" if options.peers is not None else ""
    return Peers((), f"job of one node{unused}")


def _variable(question: _Question) -> Peers | None:
    return _of_option(question) if question.options.peers_source == _VARIABLE else None


def _batch_system(question: _Question) -> Peers | None:
    found = batch.allocation(question.environment, question.notes.append)
    if found is None:
        return None
    patience = POD_SECONDS if found.are_pods or batch.IN_KUBERNETES in question.environment else NODE_SECONDS
    if found.member:
        return _headless(_List(found.source, found.nodes, patience, is_service=True), found.member, question)
    return _peers_of(_List(found.source, found.nodes, patience, counted=True), question)


def _headless(service: _List, member: str, question: _Question) -> Peers | None:
    """Return the pods of a headless Service. They get addresses one by one, so all of them are waited for a while.

    None where it may be a Service's own address that its name has, which is no pod's: of a headless one's addresses
    one is that of the pod `member`, or this pod's. Pods that come later still get in: the name is asked for again.
    """
    job, name = question.job, service.entries[0].word
    found = _peers_of(service, question)
    deadline, has_told = time.monotonic() + service.patience, False
    while (pods := _pods(found)) < job.min_nodes or not _has_pod(found, member, question):
        if time.monotonic() >= deadline:
            break
        if not has_told:
            question.tell(f"{_so_far(service, pods, job)}; asking again for up to {service.patience:g} s")
            has_told = True
        time.sleep(resolver.PAUSE_SECONDS)
        found = again(found, question.resolve)
    if not _has_pod(found, member, question):
        question.notes.append(f"{service.source}: no address of {name} is known to be a pod's of this job")
        return None
    if pods >= job.min_nodes:
        return found
    late = f"{_so_far(service, pods, job)}; the others may connect as soon as it has theirs"
    return replace(found, warnings=(*found.warnings, late))


def _pods(found: Peers) -> int:
    return max(sum(network.version == version for network in found.listed) for version in (4, 6))


def _so_far(service: _List, pods: int, job: Job) -> str:
    name = service.entries[0].word
    return f"{service.source}: {name} has the addresses of {count(pods, 'pod')} so far, and the job has {job.nodes}"


def _has_pod(found: Peers, member: str, question: _Question) -> bool:
    addresses = {str(network.network_address) for network in found.listed}
    of_member = _now(resolver.ask((member,), question.resolve)[member], ())
    if any(str(network.network_address) in addresses for network in of_member):
        return True
    return any(map(interfaces.may_bind, addresses)) and not _own_addresses().isdisjoint(addresses)


def _rank_table(question: _Question) -> Peers | None:
    location = ranktable.locate(question.environment, question.notes.append)
    if location is None:
        return None
    try:
        table = ranktable.wait_for(location, question.tell)
    except PolicyError as error:
        # Its ports are asked for again by whoever answers (`_with_ports_of_table`), which says the same.
        _pass_over(location, error, question.notes.append)
        return None
    try:
        hosts = table.entries()
    except PolicyError as error:
        _pass_over(location, error, question.notes.append, question.tell)
        return None
    if not hosts:
        question.notes.append(f"{location.source} has no addresses of hosts")
        return None
    return replace(_peers_of(_List(location.source, hosts, counted=True), question), ports=_ports_of(table))


def _pass_over(location: ranktable.Location, error: PolicyError, *told: Tell) -> None:
    """Leave a table to the next source that nobody named, or that is of a kind which nobody here has heard of."""
    if location.is_named and not isinstance(error, ranktable.Unknown):
        raise error
    for tell in told:
        tell(f"passed over: {error}")


def _site(question: _Question) -> Peers | None:
    return _of_option(question) if question.options.peers_source not in {_FLAG, _VARIABLE} else None


def _loopback(question: _Question) -> Peers | None:
    """Nodes that meet on the loopback may all be on this host. torch's stores listen on its other addresses too."""
    job = question.job
    if not job.meets_on_loopback:
        return None
    warning = (
        f"{job.nodes} meet at {job.meeting_point}, which is itself to each host, and nobody is named: no other host "
        f"may connect, whatever address the store listens on; if all nodes are on this host, write {_FLAG} "
        f"{_THIS_HOST}; if not, name the others with {_FLAG}, and give the rendezvous an address that they reach"
    )
    return _this_host(question, "loopback rendezvous endpoint", warning)


def _this_host(question: _Question, source: str, *warnings: str) -> Peers:
    """Return the peers of a job whose nodes are all on this host: none. Each node is a run of its own."""
    job = question.job
    if job.min_nodes > 1 and job.meeting_point is not None and _is_elsewhere(job.meeting_point.host, question):
        raise PolicyError(
            f"{source} names this host alone, and {job.nodes} meet at {job.meeting_point}, which is no address of "
            f"this host; name the others with {_FLAG}"
        )
    if job.min_nodes > 1 and question.options.loopback == "job":
        raise PolicyError(
            f"{source}: {job.nodes} on this host meet over its loopback, and --loopback job closes that to "
            "all but the processes of one node; leave --loopback job out, or start all nodes in one `securerunctl exec`"
        )
    return Peers((), source, warnings)


SOURCES: tuple[Callable[[_Question], Peers | None], ...] = (
    _flag,
    _one_node,
    _variable,
    _batch_system,
    _rank_table,
    _site,
    _loopback,
)


def _of_option(question: _Question) -> Peers | None:
    """--peers, SECURERUN_PEERS or the site file, whichever `securerun.options.resolve` found first."""
    options = question.options
    if options.peers is None:
        return None
    # What stands in the list itself stays, whatever becomes of a file that has it too.
    by_file = sorted(entries.of_list(options.peers, options.peers_source), key=lambda entry: not entry.file)
    listed = tuple({entry.word: entry for entry in by_file}.values())
    if not listed:
        raise PolicyError(
            f"{options.peers_source}: {options.peers!r} names no host; write node1,node2 or @hostfile.txt"
        )
    if all(entry.word == _THIS_HOST and not entry.file for entry in listed):
        return _this_host(question, f"{options.peers_source} {_THIS_HOST}")
    files = " ".join(dict.fromkeys(f"@{entry.file}" for entry in listed if entry.file))
    patience = POD_SECONDS if batch.IN_KUBERNETES in question.environment else 0.0
    found = _List(
        f"{options.peers_source} {files}".rstrip(), listed, patience, "correct the name, or write its address"
    )
    return _peers_of(found, question)


@dataclass(frozen=True)
class _List:
    """A source's entries. patience: seconds that names without an address are asked for again. advice: if they stay so.

    counted: whether each entry is one host of the job, and not perhaps a Service with an address for each pod.
    is_service: whether it is known to be one.
    """

    source: str
    entries: tuple[Entry, ...]
    patience: float = 0.0
    advice: str = "name the hosts by address with --peers"
    counted: bool = False
    is_service: bool = False


@dataclass(frozen=True)
class _Host:
    """What an entry stands for. hosts: how many, or None where that cannot be said, as of a network."""

    networks: tuple[Network, ...]
    hosts: int | None


def _peers_of(listed: _List, question: _Question) -> Peers:
    job = question.job
    fixed = {entry: _written_out(entry, listed, question) for entry in listed.entries}
    names = {entry: tuple(word for word in entry.words if _is_name(word, entry)) for entry in listed.entries}
    outcomes = _ask_all(listed, fixed, names, question)
    named = {name: _now(outcome, ()) for name, outcome in outcomes.items()}
    hosts = []
    for entry, group in names.items():
        networks = (*fixed[entry], *(network for name in group for network in named[name]))
        hosts.append(_Host(networks, _count(entry, fixed[entry], networks, listed)))
        if not networks:
            _refuse_nowhere(entry, [outcomes[name] for name in group])
    networks = collapse(network for host in hosts for network in host.networks)
    if any(network.prefixlen == 0 for network in networks) and not _is_any(listed):
        raise PolicyError(f"{listed.source}: these networks together are every host; write `{ANY}` if you mean that")
    files = growing.files_of(listed.entries, listed.counted)
    # A batch system has said all before the job starts; pods come up, and nodes add their lines, meanwhile.
    may_grow = not listed.counted and (listed.is_service or listed.patience > 0 or files)
    if job.min_nodes > 1 and not job.meets_on_loopback and not may_grow and _is_alone(hosts):
        raise PolicyError(
            f"{listed.source} names this host alone, and the job has {job.nodes}; add the others, or name them with "
            f"{_FLAG}; if all of them are on this host, write {_FLAG} {_THIS_HOST}"
        )
    growing_names = {file.place for file in files}
    lasting = [entry for entry in listed.entries if entry.place.rpartition(", line ")[0] not in growing_names]
    return Peers(
        networks,
        listed.source,
        tuple(_too_few(hosts, job, listed)),
        fixed=tuple(network for entry in lasting for network in fixed[entry]),
        named=named,
        files=files,
        lasting=frozenset(name for entry in lasting for name in names[entry]),
    )


def _is_any(listed: _List) -> bool:
    return any(entry.is_keyword and entry.word == ANY for entry in listed.entries)


def _written_out(entry: Entry, listed: _List, question: _Question) -> tuple[Network, ...]:
    """Return the networks of an entry that need no name service."""
    if entry.is_keyword:
        if entry.word == ANY:
            return EVERY_HOST
        return subnet.networks_of(question.options, question.job, entry.place, question.resolve)
    found = [entries.literal(word, entry.place) for word in entry.words]
    networks = tuple(network for network in found if network is not None)
    if listed.counted and any(network.prefixlen != network.max_prefixlen for network in networks):
        raise PolicyError(f"{entry.place}: {entry.word} is a network, not a node; name the nodes with --peers")
    return networks


def _is_name(word: str, entry: Entry) -> bool:
    return not entry.is_keyword and entries.literal(word, entry.place) is None


def _ask_all(
    listed: _List,
    fixed: Mapping[Entry, tuple[Network, ...]],
    names: Mapping[Entry, tuple[str, ...]],
    question: _Question,
) -> dict[str, Outcome]:
    """Ask for every name, and again for those of hosts that have no address by another."""
    needed = [group for entry, group in names.items() if group and not fixed[entry] and not _is_this_host(group)]
    others = [name for group in names.values() for name in group]

    def tell(late: Sequence[str]) -> None:
        names_shown = some(late, _NAMES_SHOWN)
        seconds = max(listed.patience, resolver.SECONDS)
        question.tell(f"{listed.source}: no address yet for {names_shown}; asking again for up to {seconds:g} s")

    outcomes = resolver.ask_patiently(needed, others, question.resolve, listed.patience, tell)
    failed = [group for group in needed if not resolver.has_answered(group, outcomes)]
    if failed:
        name = failed[0][0]
        place = next(entry.place for entry, group in names.items() if group == failed[0])
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        reason = getattr(outcomes[name], "strerror", None) or str(outcomes[name])
        raise PolicyError(f"{place}: peer {name!r}{more} cannot be resolved ({reason}); {listed.advice}")
    return outcomes


def _count(entry: Entry, fixed: tuple[Network, ...], networks: tuple[Network, ...], listed: _List) -> int | None:
    """Return how many hosts an entry is."""
    if any(network.prefixlen != network.max_prefixlen for network in fixed):
        return None
    if listed.counted:
        return min(1, len(networks))
    # A name with an A and an AAAA record is one host; a Kubernetes headless Service has one of each for each pod.
    versions = [network.version for network in networks]
    return max(versions.count(4), versions.count(6))


def _refuse_nowhere(entry: Entry, outcomes: Iterable[Outcome]) -> None:
    """Refuse a name whose addresses no host has.

    Debian's /etc/hosts has `127.0.1.1 thishost`: in a list of all nodes that is this one, and none of the others.
    """
    found = [address for outcome in outcomes if isinstance(outcome, tuple) for address in outcome]
    if found and not any(_single(address).network_address.is_loopback for address in found):
        raise PolicyError(
            f"{entry.place}: peer {entry.word!r} resolves to {', '.join(found)}, no address of a host; "
            "write its address"
        )


def _now(outcome: Outcome, before: tuple[Network, ...]) -> tuple[Network, ...]:
    """Return the networks of a name after it was asked for."""
    if isinstance(outcome, tuple):
        return tuple(network for network in map(_single, outcome) if entries.is_host(network))
    return () if resolver.is_gone(outcome) else before


def _single(address: str) -> Network:
    return entries.single(ipaddress.ip_address(address))


def _is_this_host(names: Iterable[str]) -> bool:
    """Return whether one of a node's names is this host's own, in full or without its domain."""
    own = socket.gethostname()
    short = own.partition(".")[0]
    return any(name in {own, short} or (own == short and name.partition(".")[0] == own) for name in names)


def _ports_of(table: ranktable.RankTable) -> tuple[PortRange, ...]:
    numbers = table.ports(_own_addresses)
    return ports.ranges(numbers, Purpose.RANK_TABLE)


def _with_ports_of_table(peers: Peers, question: _Question) -> Peers:
    """Add the ports that a rank table has for HCCL where it does not name the peers; then nothing waits for it."""
    location = ranktable.locate(question.environment, lambda note: None)
    if location is None:
        return peers
    try:
        return replace(peers, ports=_ports_of(ranktable.read(location)))
    except PolicyError as error:
        return replace(peers, warnings=(*peers.warnings, f"the ports of the rank table are not planned: {error}"))


def _is_elsewhere(host: str, question: _Question) -> bool:
    """Return whether this is an address or a name of another host; one in Kubernetes may be a Service of this pod."""
    if is_address(host):
        return not interfaces.may_bind(host)
    if batch.IN_KUBERNETES in question.environment or _is_this_host((host,)):
        return False
    outcome = resolver.ask((host,), question.resolve, _MEETING_SECONDS)[host]
    return isinstance(outcome, tuple) and not any(map(interfaces.may_bind, outcome))


def _is_alone(hosts: Iterable[_Host]) -> bool:
    """Return whether hosts are all this one, by whatever address."""
    found = [network for host in hosts for network in host.networks]
    addresses = [str(network.network_address) for network in found if network.prefixlen == network.max_prefixlen]
    # The kernel is quick to say that an address is another host's; net.ipv4.ip_nonlocal_bind has it say yes to all.
    if len(addresses) < len(found) or not all(map(interfaces.may_bind, addresses)):
        return False
    return not addresses or _own_addresses().issuperset(addresses)


def _apart(found: Peers, job: Job) -> Iterator[str]:
    """Warn of nodes on several hosts that meet at the loopback, each at its own."""
    if job.max_nodes == 1 or not job.meets_on_loopback or _is_alone([_Host(found.networks, None)]):
        return
    where = "the others have to be given this host's address" if job.node_rank == 0 else "it looks for node 0 here"
    yield (
        f"{job.nodes} meet at {job.meeting_point}, which is itself to each host, and {found.source} names other "
        f"hosts: {where}; give the rendezvous the first node's address on all of them, as in --master-addr node0"
    )


def _own_addresses() -> frozenset[str]:
    import psutil  # 30 ms, and few launches ask

    families = (socket.AF_INET, socket.AF_INET6)
    found = (entry for interface in psutil.net_if_addrs().values() for entry in interface if entry.family in families)
    return frozenset(entry.address.partition("%")[0] for entry in found)


def _too_few(hosts: Sequence[_Host], job: Job, listed: _List) -> Iterator[str]:
    """Warn of a job that waits for a node which may not connect. A list may hold this host, or leave it out."""
    counts = [host.hosts for host in hosts]
    others = sum(count for count in counts if count is not None)
    if listed.is_service or None in counts or others >= job.max_nodes:
        return
    own = _own_addresses()
    others -= any(str(network.network_address) in own for host in hosts for network in host.networks)
    if others < job.max_nodes - 1:
        yield (
            f"{listed.source} names {count(others, 'other host')}, and the job may have {job.nodes}: a node that is "
            "not named cannot join; add it there, or name all of them with --peers"
        )


def _in_brackets(notes: Sequence[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""
