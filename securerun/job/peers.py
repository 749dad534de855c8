"""Who may connect: what the user named, or what the endpoint of the rendezvous leaves no doubt about.

The first source that answers wins. Any doubt is an error here, before anything was started.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from securerun.errors import PolicyError
from securerun.firewall.policy import Address, Network, collapse
from securerun.host import interfaces
from securerun.job.launchers import Job
from securerun.options import SITE_CONFIG, Options

EVERY_HOST: tuple[Network, ...] = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))
# The words of a list that stand for no host of that name.
ANY, SUBNET = "any", "subnet"

# All names together; one dead name server takes resolv.conf's five seconds before the next one is asked.
RESOLVE_SECONDS = 10.0
_RESOLVERS = 64
_HOST_FILE_SIZE = 16 * 1024 * 1024

# The addresses of a host name, as text; OSError where it has none.
Resolver = Callable[[str], Iterable[str]]

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,252}")
# getaddrinfo would read 10.77.1 as 10.77.0.1 and 0x7f000001 as 127.0.0.1 (inet_aton(3)): no host is named like that.
_NUMERIC_LABEL = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?")
_BRACKETED = re.compile(r"\[([^\[\]]+)\](/[0-9]+)?")
_SETTING = re.compile(r"[A-Za-z0-9_-]+=\S*")


@dataclass(frozen=True)
class Peers:
    """The networks that may connect, collapsed; where they come from; and what the user should know about them."""

    networks: tuple[Network, ...]
    source: str
    warnings: tuple[str, ...] = ()


def resolve_name(name: str) -> Iterable[str]:
    """All addresses of a host name, A and AAAA records or the hosts file; OSError where it has none."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return dict.fromkeys(str(address[4][0]) for address in found)


def find_peers(options: Options, job: Job, resolve: Resolver = resolve_name) -> Peers:
    """Who may connect to this job.

    Raises PolicyError for a peer that is no address, network or resolvable name, and where nothing tells who the
    other nodes of the job are.
    """
    for source in SOURCES:
        answer = source(options, job, resolve)
        if answer is not None:
            return answer
    raise PolicyError(
        f"{_nodes(job)} meet at {job.endpoint or 'a rendezvous without an address'}, and nothing says which hosts they "
        "are; name them with --peers node1,node2 or --peers @hostfile.txt (one host a line), with `export "
        f'SECURERUN_PEERS=@hostfile.txt`, or with peers = "node1,node2" in {SITE_CONFIG}'
    )


def _named(options: Options, job: Job, resolve: Resolver) -> Peers | None:
    """--peers, SECURERUN_PEERS or the site file, whichever `securerun.options.resolve` found first."""
    if options.peers is None:
        return None
    entries = tuple({entry.word: entry for entry in _entries(options.peers, options.peers_source)}.values())
    if not entries:
        raise PolicyError(
            f"{options.peers_source}: {options.peers!r} names no host; write node1,node2 or @hostfile.txt"
        )
    files = " ".join(dict.fromkeys(f"@{entry.file}" for entry in entries if entry.file))
    source = f"{options.peers_source} {files}".rstrip()
    answers = _answers(entries, options, job, resolve)
    networks = collapse(network for answer in answers for network in answer.networks)
    if any(network.prefixlen == 0 for network in networks) and not any(entry.word == ANY for entry in entries):
        raise PolicyError(f"{source}: these networks together are every host; write `{ANY}` if you mean that")
    if not networks and job.max_nodes > 1 and not _meets_on_loopback(job):
        raise PolicyError(f"{source} names this host alone, and the job has {_nodes(job)}; add the others")
    return Peers(networks, source, tuple(_too_few(answers, job, source)))


def _loopback(options: Options, job: Job, resolve: Resolver) -> Peers | None:
    """Nodes that meet on the loopback are all on this host."""
    if not _meets_on_loopback(job):
        return None
    source = "loopback rendezvous endpoint"
    if job.max_nodes == 1:
        return Peers((), source)
    warning = (
        f"{_nodes(job)} meet at {job.meeting_point}, which only this host can reach: no other host may connect; "
        "if there are other hosts, give the rendezvous an address that they reach and name them with --peers"
    )
    return Peers((), source, (warning,))


def _one_node(options: Options, job: Job, resolve: Resolver) -> Peers | None:
    return Peers((), "job of one node") if job.max_nodes == 1 else None


SOURCES: tuple[Callable[[Options, Job, Resolver], Peers | None], ...] = (_named, _loopback, _one_node)


@dataclass(frozen=True)
class _Entry:
    """One peer as the user wrote it. place: where that was, for messages; file: the host file it stands in."""

    word: str
    place: str
    file: str = ""


@dataclass(frozen=True)
class _Answer:
    """What an entry stands for. hosts: how many, or None where that cannot be said, as of a network."""

    networks: tuple[Network, ...]
    hosts: int | None


def _entries(text: str, source: str) -> Iterator[_Entry]:
    for word in re.split(r"[,\s]+", text):
        if word.startswith("@"):
            yield from _host_file(word[1:], source)
        elif word:
            yield _Entry(word, source)


def _host_file(name: str, source: str) -> Iterator[_Entry]:
    """The hosts in a file, one a line, `#` for comments; `host slots=8` as Open MPI and DeepSpeed write it."""
    place = f"{source} @{name}"
    hosts = 0
    for number, line in enumerate(_read_host_file(name, place).splitlines(), 1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if not words:
            continue
        here = f"{place}, line {number}"
        for word in words[1:]:
            if not _SETTING.fullmatch(word):
                raise PolicyError(f"{here}: {word!r} after the host is no name=value; write one host a line")
        if words[0] in {ANY, SUBNET} or words[0].startswith("@"):
            raise PolicyError(f"{here}: {words[0]!r} is no host; write it in --peers itself")
        hosts += 1
        yield _Entry(words[0], here, name)
    if not hosts:
        raise PolicyError(f"{place}: the host file names no host; write one host a line")


def _read_host_file(name: str, place: str) -> str:
    if not name:
        raise PolicyError(f"{place}: no file after the @; write @hostfile.txt")
    try:
        with Path(name).expanduser().open("rb") as file:
            content = file.read(_HOST_FILE_SIZE + 1)
    except (OSError, RuntimeError, ValueError) as error:  # no such file; no such home directory; a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise PolicyError(
            f"{place}: the host file cannot be read ({reason}); name a file with one host a line"
        ) from error
    if len(content) > _HOST_FILE_SIZE:
        raise PolicyError(f"{place}: the host file is larger than 16 MB; name a file with one host a line")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise PolicyError(f"{place}: the host file is no text; name a file with one host a line")
    return text


def _answers(entries: Iterable[_Entry], options: Options, job: Job, resolve: Resolver) -> list[_Answer]:
    answers: list[_Answer] = []
    names: list[_Entry] = []
    for entry in entries:
        network = None if entry.word in {ANY, SUBNET} else _literal(entry)
        if entry.word == ANY:
            answers.append(_Answer(EVERY_HOST, None))
        elif entry.word == SUBNET:
            answers.append(_Answer(_subnet(options, job, entry.place, resolve), None))
        elif network is None:
            names.append(entry)
        else:
            answers.append(_Answer((network,), 1 if network.prefixlen == network.max_prefixlen else None))
    return [*answers, *_resolved(names, resolve)]


def _literal(entry: _Entry) -> Network | None:
    """The network that an entry writes out, an address being one of its own; None for a host name.

    Raises PolicyError for what is neither.
    """
    match = _BRACKETED.fullmatch(entry.word)
    word = match.group(1) + (match.group(2) or "") if match else entry.word
    try:
        network = _network(word, entry) if "/" in word else _single(ipaddress.ip_address(word))
    except ValueError as error:
        if _NAME.fullmatch(entry.word) and not _NUMERIC_LABEL.fullmatch(entry.word):
            return None
        raise PolicyError(f"{entry.place}: {_complaint(entry.word)}") from error
    _refuse_unusable(network, entry)
    return network


def _complaint(word: str) -> str:
    host, colon, port = word.rpartition(":")
    if colon and port.isdecimal() and host:
        return f"peer {word!r} is a host with a port, and peers have none; write {host.strip('[]')}"
    return f"peer {word!r} is no address, network or host name; write one like 10.0.0.7, 10.0.0.0/24, fd00::7 or node7"


def _network(word: str, entry: _Entry) -> Network:
    network = ipaddress.ip_network(word, strict=False)
    # Collapsed, ::ffff:0:0/96 is what it means: every IPv4 address.
    (plain,) = collapse([network])
    if plain.prefixlen == 0:
        raise PolicyError(f"{entry.place}: peer {word} is every host; write `any` if you mean that")
    if str(network.network_address) != str(ipaddress.ip_address(word.partition("/")[0])):
        raise PolicyError(
            f"{entry.place}: {word} is an address inside a network; write {network} for the network, "
            f"or {word.partition('/')[0]} for the host"
        )
    return plain


def _single(address: Address) -> Network:
    """The network of one address; the zone of fe80::1%eth0 is not on the wire and goes."""
    if isinstance(address, ipaddress.IPv4Address):
        return ipaddress.IPv4Network(address)
    if address.ipv4_mapped is not None:
        return ipaddress.IPv4Network(address.ipv4_mapped)
    return ipaddress.IPv6Network(int(address))


def _is_host(network: Network) -> bool:
    """Whether another host can connect from there."""
    start = network.network_address
    nowhere = network.prefixlen == network.max_prefixlen and start.is_unspecified
    return not (nowhere or start.is_loopback or network.is_multicast)


def _refuse_unusable(network: Network, entry: _Entry) -> None:
    if _is_host(network):
        return
    if network.network_address.is_loopback:
        raise PolicyError(
            f"{entry.place}: peer {entry.word} is the loopback, which is open to this host and to no other; "
            "write the address that the other node has on the network"
        )
    kind = "multicast" if network.is_multicast else "no address of a host"
    raise PolicyError(f"{entry.place}: peer {entry.word} is {kind}; write the address of the other node")


def _resolved(entries: Sequence[_Entry], resolve: Resolver) -> list[_Answer]:
    """What host names stand for. Every name is asked for at once, and each but once."""
    places = {entry.word: entry.place for entry in entries}
    results = _ask(tuple(places), resolve)
    answered = {name: result for name, result in results.items() if isinstance(result, tuple)}
    failed = [name for name in places if name not in answered]
    if failed:
        name = failed[0]
        reason = results.get(name) or f"no answer within {RESOLVE_SECONDS:g} s"
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise PolicyError(
            f"{places[name]}: peer {name!r}{others} cannot be resolved ({_reason(reason)}); "
            "correct the name, or write its address"
        )
    return [_answer_of_name(name, place, answered[name]) for name, place in places.items()]


def _reason(failure: object) -> str:
    return getattr(failure, "strerror", None) or str(failure)


def _answer_of_name(name: str, place: str, addresses: Sequence[str]) -> _Answer:
    found = [_single(ipaddress.ip_address(address)) for address in addresses]
    usable = tuple(network for network in found if _is_host(network))
    # Debian's /etc/hosts has `127.0.1.1 thishost`: in a list of all nodes that is this node, and none of the others.
    if not usable and any(network.network_address.is_loopback for network in found):
        return _Answer((), 0)
    if not usable:
        listed = ", ".join(addresses) or "nothing"
        raise PolicyError(f"{place}: peer {name!r} resolves to {listed}, no address of a host; write its address")
    # A name with an A and an AAAA record is one host; a Kubernetes headless Service has one of each for each pod.
    versions = [network.version for network in usable]
    return _Answer(usable, max(versions.count(4), versions.count(6)))


def _ask(names: Sequence[str], resolve: Resolver) -> Mapping[str, tuple[str, ...] | Exception]:
    """Resolve names side by side; what has not answered in time is missing from the result."""
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[str, tuple[str, ...] | Exception]] = queue.SimpleQueue()
    for name in names:
        questions.put(name)

    def work() -> None:
        while True:
            try:
                name = questions.get_nowait()
            except queue.Empty:
                return
            try:
                answers.put((name, tuple(resolve(name))))
            except (OSError, UnicodeError) as error:
                answers.put((name, error))

    # Not concurrent.futures: its threads are joined at exit, and a name server that is silent would hold the exit up.
    for _ in range(min(_RESOLVERS, len(names))):
        threading.Thread(target=work, daemon=True, name="securerun-resolver").start()
    results: dict[str, tuple[str, ...] | Exception] = {}
    deadline = time.monotonic() + RESOLVE_SECONDS
    while len(results) < len(names):
        try:
            name, result = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        results[name] = result
    return results


def _subnet(options: Options, job: Job, place: str, resolve: Resolver) -> tuple[Network, ...]:
    """The networks of the chosen interfaces, else of the one that leads to the endpoint, else of the only one."""
    wanted = interfaces.require(interfaces.parse(options.interface), options.interface_source)
    wanted = wanted or _interface_to(job, resolve) or interfaces.with_networks()
    if not options.interface and len(wanted) > 1:
        raise PolicyError(
            f"{place}: subnet of which interface? This host has {', '.join(wanted)}; write --interface {wanted[0]} too"
        )
    networks = interfaces.networks_of(wanted)
    if not networks:
        raise PolicyError(
            f"{place}: {', '.join(wanted) or 'this host'} is on no network with other hosts, so subnet is nobody; "
            "write the nodes themselves, as in --peers node1,node2"
        )
    if any(network.prefixlen == 0 for network in networks):
        raise PolicyError(f"{place}: the network of {', '.join(wanted)} is every host; write `any` if you mean that")
    return networks


def _interface_to(job: Job, resolve: Resolver) -> tuple[str, ...]:
    if job.meeting_point is None or _meets_on_loopback(job):
        return ()
    host = job.meeting_point.host
    found = (host,) if _is_address(host) else _ask((host,), resolve).get(host)
    name = interfaces.towards(found) if isinstance(found, tuple) else None
    return (name,) if name else ()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _too_few(answers: Iterable[_Answer], job: Job, source: str) -> Iterator[str]:
    counts = [answer.hosts for answer in answers]
    if None in counts:
        return
    hosts = sum(count for count in counts if count is not None)
    if hosts < job.max_nodes - 1:
        yield (
            f"{source} names {hosts} other {'host' if hosts == 1 else 'hosts'}, and the job may have {_nodes(job)}: "
            "a node that is not named cannot join; add it there"
        )


def _meets_on_loopback(job: Job) -> bool:
    return job.meeting_point is not None and job.meeting_point.is_loopback


def _nodes(job: Job) -> str:
    count = str(job.max_nodes) if job.min_nodes == job.max_nodes else f"{job.min_nodes} to {job.max_nodes}"
    return f"{count} nodes"
