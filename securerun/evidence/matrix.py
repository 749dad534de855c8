"""The communication matrix of a job: every TCP connection that its nodes make, as data, one a row.

The columns are those of the security notes of torch_npu and MindSpeed; their words are in `matrix_words`. Each row is
seen from this node: a peer connects to it, it connects to a peer, or nothing leaves it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from securerun.firewall.policy import Opening, PortRange, Purpose, by_networks, covers, joined
from securerun.job.job import Endpoint, Job
from securerun.linux.networks import Address, shown
from securerun.text import span

# Which end of a connection is this node.
IN, OUT, WITHIN = "in", "out", "within"
# Who may connect to a port that is open to all.
EVERY_HOST = ("0.0.0.0/0", "::/0")


class Service(str, enum.Enum):
    """What connects, for what."""

    # Where the agents meet: a store of torch's, by its rendezvous, a plug-in's endpoint, or an etcd server.
    C10D = "c10d"
    STATIC = "static"
    PARALLEL = "parallel"
    ENDPOINT = "endpoint"
    ETCD = "etcd"
    # What nobody can plan: torch's second store, and what the collectives open.
    WORKER_STORE = "worker_store"
    GLOO = "gloo"
    NCCL = "nccl"
    HCCL = "hccl"
    ADDED = "added"
    PUBLIC = "public"
    # Found listening, and taken for gloo or NCCL, or for none of these.
    COLLECTIVE = "collective"
    OTHER = "other"


# What connects to a planned port, by its purpose; ADDED for one that another version has given it.
_PLANNED: Mapping[Purpose | str, Service] = {
    Purpose.C10D_STORE: Service.C10D,
    Purpose.STATIC_STORE: Service.STATIC,
    Purpose.PARALLEL_STORE: Service.PARALLEL,
    Purpose.ENDPOINT: Service.ENDPOINT,
    Purpose.MASTER_PORT: Service.STATIC,
    Purpose.HCCL: Service.HCCL,
    Purpose.HCCL_DEFAULT: Service.HCCL,
    Purpose.RANK_TABLE: Service.HCCL,
    Purpose.ADDED: Service.ADDED,
    Purpose.PUBLIC: Service.PUBLIC,
}
_STORES = frozenset({Service.C10D, Service.STATIC, Service.PARALLEL, Service.ENDPOINT})
_COLLECTIVES = (Service.GLOO, Service.NCCL)


@dataclass(frozen=True)
class Connection:
    """One row.

    direction: IN, OUT or WITHIN.
    sources, destinations: addresses, networks and, where no name service knows it, a host name.
    ports: those listened on, as text; empty for those chosen at random. listening: what listens there now, as
        ADDRESS:PORT; None where nobody has looked.
    by_key: whether whoever shows the tag of the job's key is a peer, wherever they are.
    """

    service: Service
    direction: str
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    ports: tuple[str, ...] = ()
    listening: tuple[str, ...] | None = None
    by_key: bool = False


@dataclass(frozen=True)
class Ends:
    """The two sides of a job. node: this node's addresses. peers: the networks of the others.

    by_key: whether a tag of the job's key is enough to be one of these; where nobody is named they may be anywhere.
    """

    node: tuple[str, ...]
    peers: tuple[str, ...]
    by_key: bool = False


@dataclass(frozen=True)
class Found:
    """A listener of a running job. of_launcher: whether torch's agent holds it, or a process that it started."""

    address: Address
    port: int
    of_launcher: bool

    @property
    def service(self) -> Service:
        """What it is taken for: torch's stores are bound to all addresses, what the collectives open is to one."""
        if not self.address.is_unspecified:
            return Service.COLLECTIVE
        return Service.WORKER_STORE if self.of_launcher else Service.OTHER

    def __str__(self) -> str:
        return str(Endpoint("*" if self.address.is_unspecified else str(self.address), self.port))


def planned(
    job: Job,
    ports: Sequence[PortRange],
    ends: Ends,
    store: tuple[str, ...],
    *,
    here: bool,
    public: Sequence[Opening] = (),
) -> list[Connection]:
    """Return the matrix of a launch. store: the addresses where the agents meet; here: whether they are this node's.

    public: the ports that others may connect to.
    """
    rows = []
    for service, found in _by_service(ports):
        texts = tuple(map(str, found))
        if service in _STORES:
            rows += [_to_store(service, texts, ends, store, here=here)]
        else:
            rows += _both_ways(service, texts, ends)
    if job.meeting_point is None and job.endpoint is not None:
        rows.append(Connection(Service.ETCD, OUT, ends.node, store, (str(job.endpoint.port),)))
    if not job.has_one_store:  # the workers meet at another, on a random port (TCPStore, port 0)
        rows += _both_ways(Service.WORKER_STORE, (), ends)
    if not any(row.service is Service.HCCL for row in rows):  # HCCL_HOST_SOCKET_PORT_RANGE=auto
        rows += _both_ways(Service.HCCL, (), ends)
    rows += _public(public, ends)
    return [*rows, *(row for service in _COLLECTIVES for row in _both_ways(service, (), ends))]


def running(
    ports: Sequence[PortRange],
    ends: Ends,
    found: Sequence[Found],
    public: Sequence[Opening] = (),
    left_open: Sequence[tuple[int, int]] = (),
) -> list[Connection]:
    """Return the matrix of a job that runs here: its plan, and what listens now. found: all that its processes hold.

    left_open: first and last of ports that no layer closes to anybody.
    """
    rows = []
    open_to_all = joined(left_open)
    plan = [ports for ports in ports if ports.purpose != Purpose.OPENED_MEANWHILE]
    for service, ranges in _by_service(plan):
        texts = tuple(map(str, ranges))
        listening = [one for one in found if any(one.port in ports for ports in ranges)]
        now = tuple(map(str, listening))
        sources, direction = (ends.peers, IN) if ends.peers else (ends.node, WITHIN)
        inbound = Connection(service, direction, sources, ends.node, texts, now, ends.by_key)
        if any(covers(open_to_all, one.port) for one in listening):
            inbound = Connection(service, IN, EVERY_HOST, ends.node, texts, now)
        outbound = Connection(service, OUT, ends.node, ends.peers, texts, by_key=ends.by_key)
        if service not in _STORES:
            rows += [inbound, outbound] if ends.peers else [inbound]
        else:
            rows.append(inbound if now or not ends.peers else outbound)
    rows += _public(public, ends, found)
    named = joined((*((one.first, one.last) for one in plan), *((one.first, one.last) for one in public)))
    rows += [_listening(one, ends, open_to_all) for one in found if not covers(named, one.port)]
    if ends.peers:
        rows.append(Connection(Service.COLLECTIVE, OUT, ends.node, ends.peers))
    return rows


def _public(public: Sequence[Opening], ends: Ends, found: Sequence[Found] | None = None) -> Iterator[Connection]:
    """Yield a row for each list of networks that public ports are for. found: what listens, if anybody looked."""
    for networks, ranges in by_networks(public).items():
        ports = tuple(span(first, last) for first, last in ranges)
        now = None if found is None else tuple(str(one) for one in found if covers(ranges, one.port))
        peers = () if ends.by_key and ends.peers == EVERY_HOST else ends.peers
        sources = (*map(shown, networks), *peers) if networks else EVERY_HOST
        yield Connection(Service.PUBLIC, IN, sources, ends.node, ports, now)


def _by_service(ports: Iterable[PortRange]) -> Iterator[tuple[Service, tuple[PortRange, ...]]]:
    """Yield the planned ports of each service."""
    services: dict[Service, list[PortRange]] = {}
    for port in ports:
        services.setdefault(_PLANNED.get(port.purpose, Service.ADDED), []).append(port)
    services.pop(Service.PUBLIC, None)  # it has rows that say who may connect
    for service, found in services.items():
        yield service, tuple(found)


def _to_store(
    service: Service, ports: tuple[str, ...], ends: Ends, store: tuple[str, ...], *, here: bool
) -> Connection:
    if not ends.peers:
        return Connection(service, WITHIN, ends.node, store, ports)
    if here:
        return Connection(service, IN, ends.peers, store, ports, by_key=ends.by_key)
    return Connection(service, OUT, ends.node, store, ports)


def _both_ways(service: Service, ports: tuple[str, ...], ends: Ends) -> list[Connection]:
    if not ends.peers:
        return [Connection(service, WITHIN, ends.node, ends.node, ports)]
    return [
        Connection(service, IN, ends.peers, ends.node, ports, by_key=ends.by_key),
        Connection(service, OUT, ends.node, ends.peers, ports, by_key=ends.by_key),
    ]


def _listening(found: Found, ends: Ends, open_to_all: list[tuple[int, int]]) -> Connection:
    destinations = ends.node if found.address.is_unspecified else (str(found.address),)
    if covers(open_to_all, found.port):
        return Connection(found.service, IN, EVERY_HOST, destinations, (str(found.port),), (str(found),))
    from_outside = ends.peers and not found.address.is_loopback
    sources, direction = (ends.peers, IN) if from_outside else (destinations, WITHIN)
    ports, now = (str(found.port),), (str(found),)
    return Connection(found.service, direction, sources, destinations, ports, now, ends.by_key)
