"""The policy: plain, validated, immutable data, and all that a firewall needs to know of a job.

Nothing here reads a file, opens a socket or asks the kernel. A `Policy` that exists is valid: the
launcher builds it from what the user said, the guard builds it again from what it was sent, and both
get a `PolicyError` instead of an object when a field cannot be right.
"""

from __future__ import annotations

import bisect
import enum
import ipaddress
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from securerun.errors import PolicyError
from securerun.linux.networks import Address, Network, collapse, listed, written_address
from securerun.text import some, span

FIRST_PORT = 1
LAST_PORT = 65535
SHIELD = "shield"
# Of a job in a network of its own, which no guard closes.
NAMESPACE = "namespace"
# Pairs of source and port that are told of, and written down: strangers may invent as many as they like.
MOST_DENIALS = 1024
# Of what others may connect to. A pair is a network and a port or range that it may reach: each may be a rule of the
# host's firewall, which every connection to the host goes past.
MOST_OPENINGS = 64
MOST_PUBLIC_NETWORKS = 64
MOST_PUBLIC_PAIRS = 256

_NAMED = 4

# The kind of the TCP option that a tag is (`tag`).
TAG_OPTION = 254

# The run id stands in rule comments, file names and cgroup names, so it is hexadecimal and nothing else.
RUN_ID = re.compile(r"[0-9a-f]{12}")
# include/uapi/linux/if.h: IFNAMSIZ is 16 with the closing NUL. The kernel allows more characters than these, a leading
# dash too, but the name becomes a word of iptables' and nft's language.
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}")
_PURPOSE = re.compile(r"[\x20-\x7e]{1,80}")


class Purpose(str, enum.Enum):
    """What a job needs a port for. The value is what people read, and what stands in orders and records."""

    C10D_STORE = "rendezvous store (c10d)"
    STATIC_STORE = "master port (static rendezvous)"
    PARALLEL_STORE = "parallel store (torch_npu_run)"
    ENDPOINT = "rendezvous endpoint"
    MASTER_PORT = "master port"
    HCCL = "HCCL"
    HCCL_DEFAULT = "HCCL (default range)"
    RANK_TABLE = "HCCL (rank table)"
    ADDED = "added with --ports"
    PUBLIC = "public to some networks (--public)"
    OPENED_MEANWHILE = "opened while the job runs"

    # In every Python it is written as its value; by itself, in some, as `Purpose.HCCL`.
    __str__ = str.__str__


def purpose_of(text: str) -> Purpose | str:
    """Return the purpose that is written like this, or the text itself where it is none of these.

    Orders and records are written by a securerun that may be older or newer than who reads them, and any printable text
    has always been a purpose there. The ports are closed all the same, and people read what was written; nothing else
    goes by it. To refuse it would leave the rules of a killed run on the host, and its ports out of `status`.
    """
    try:
        return Purpose(text)
    except ValueError:
        return text


# What only the job's own nodes may reach: whoever gets at a store has the job, and HCCL asks nobody who they are.
_NEVER_PUBLIC = frozenset(Purpose) - {Purpose.ADDED, Purpose.PUBLIC, Purpose.OPENED_MEANWHILE}


def require_ports(first: int, last: int) -> None:
    """Raise PolicyError for a port outside 1-65535, and for crossed ends."""
    for port in (first, last):
        if not FIRST_PORT <= port <= LAST_PORT:
            raise PolicyError(f"port {port} is outside {FIRST_PORT}-{LAST_PORT}; name a TCP port in that range")
    if first > last:
        raise PolicyError(f"port range {first}-{last} is crossed; write {last}-{first}")


@dataclass(frozen=True, order=True)
class PortRange:
    """TCP ports `first` to `last`, both included, and what the job needs them for.

    purpose: text that is no Purpose comes from another version alone (`purpose_of`).
    Raises PolicyError for a port outside 1-65535, crossed ends or an unprintable purpose.
    """

    first: int
    last: int
    purpose: Purpose | str

    def __post_init__(self) -> None:
        require_ports(self.first, self.last)
        if not _PURPOSE.fullmatch(self.purpose):
            raise PolicyError(f"purpose {self.purpose!r} of port {self.first} is not printable text")

    @property
    def is_asked_for(self) -> bool:
        """Whether the user, a variable or the launch itself names it: HCCL's default range nobody may ever use."""
        return self.purpose != Purpose.HCCL_DEFAULT

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return span(self.first, self.last)


@dataclass(frozen=True, order=True)
class Opening:
    """TCP ports `first` to `last` that are for others than the job's nodes: metrics, HTTP, probes.

    networks: who may connect beside the peers, collapsed; empty means every host. Nothing is opened by it that the
    host's own rules close.
    Raises PolicyError for ports outside 1-65535, crossed ends, and networks that overlap or are not in order.
    """

    first: int
    last: int
    networks: tuple[Network, ...] = ()

    def __post_init__(self) -> None:
        require_ports(self.first, self.last)
        if self.networks != collapse(self.networks):
            raise PolicyError(f"the networks of public port {self} overlap or are not in order; collapse them first")

    @property
    def is_for_all(self) -> bool:
        """Whether every host may connect."""
        return not self.networks

    def __str__(self) -> str:
        return span(self.first, self.last)


class Admission(str, enum.Enum):
    """What somebody shows who opens a connection to a job. The value is what stands in orders and records."""

    ADDRESS = "address"
    EITHER = "tag or address"
    TAG = "tag"
    BOTH = "tag and address"

    __str__ = str.__str__

    @property
    def is_by_tag_alone(self) -> bool:
        """Whether a tag alone is enough, from wherever."""
        return self in (Admission.EITHER, Admission.TAG)


@dataclass(frozen=True)
class Policy:
    """Who may open TCP connections to one job, and through what.

    run_id: 12 hexadecimal digits, new for each run; names the run in rules, records and cgroups.
    ports: the port plan, closed by the port chains even before anything listens.
    peers: the networks that may connect, collapsed, IPv4 before IPv6; empty means no other host.
    interfaces: the network interfaces that peers come in through, each once; empty means any.
    accept: port chains ACCEPT peers past the host's own rules instead of handing them back (RETURN).
    close_loopback: over the loopback, too, only the job's own processes may connect.
    public: the ports that others may connect to as well, in ascending order, none in two of them. Those for some
    networks are in `ports` too, to be closed to the rest; those for every host are not.
    admission: whether peers are told by their address, by the tag of the job's key, or by both.
    tagged: the networks towards which the job's own connections carry a tag, collapsed: where its nodes can be. None
    where nobody is told by a tag.
    tags_through_any: the interfaces are for those who are known by address; a tag counts through any.
    tags_from: the networks that a tag counts from, collapsed; empty means any.

    Raises PolicyError for a field that cannot be right.
    """

    run_id: str
    ports: tuple[PortRange, ...]
    peers: tuple[Network, ...]
    interfaces: tuple[str, ...] = ()
    accept: bool = False
    close_loopback: bool = False
    public: tuple[Opening, ...] = ()
    admission: Admission = Admission.ADDRESS
    tagged: tuple[Network, ...] = ()
    tags_through_any: bool = False
    tags_from: tuple[Network, ...] = ()

    def __post_init__(self) -> None:
        if not RUN_ID.fullmatch(self.run_id):
            raise PolicyError(f"run id {self.run_id!r} is not 12 hexadecimal digits")
        for interface in self.interfaces:
            if not _INTERFACE.fullmatch(interface):
                raise PolicyError(f"{interface!r} is not the name of a network interface; see `ip link`")
        # Each is a rule for each of the peers' and ports': one that is named again would have all of them again.
        object.__setattr__(self, "interfaces", tuple(dict.fromkeys(self.interfaces)))
        if self.peers != collapse(self.peers):
            raise PolicyError("the peers overlap or are not in order; collapse them first")
        if self.public:
            require_openings(self.public)
            _require_apart(self.public, self.ports)
        if self.has_tags or self.tags_from or self.admission is not Admission.ADDRESS:
            self._require_tags()

    def _require_tags(self) -> None:
        if self.tagged != collapse(self.tagged):
            raise PolicyError("the networks where tags are written overlap or are not in order; collapse them first")
        if not self.tagged:
            raise PolicyError("nodes are to show tags, and no network is named where they are written; name some")
        if self.admission is Admission.ADDRESS and not self.close_loopback:
            raise PolicyError("tags are to be written, and nobody is told by them; leave their networks out")
        if self.tags_from != collapse(self.tags_from):
            raise PolicyError("the networks that a tag counts from overlap or are not in order; collapse them first")
        if self.tags_from and not self.admits_by_tag:
            raise PolicyError("a tag is to count from some networks, and by itself it lets nobody in; leave them out")
        if self.admission is Admission.BOTH and not self.peers:
            raise PolicyError("nodes are to show a tag and a peer's address, and there are no peers; name them")

    @property
    def has_tags(self) -> bool:
        """Whether the job's own connections carry tags."""
        return bool(self.tagged)

    @property
    def tag_interfaces(self) -> tuple[str, ...]:
        """The interfaces through which a tag alone counts; empty means any."""
        return () if self.tags_through_any else self.interfaces

    @property
    def admits_by_tag(self) -> bool:
        """Whether a tag alone is enough to connect, from wherever."""
        return self.admission.is_by_tag_alone

    def tag_ports(self) -> list[tuple[int, int]]:
        """Return the planned ports where port chains leave it to the shield who has a tag, as `joined_ports` does.

        Not those that were closed since a socket was found there that no shield judges.
        """
        if self.admission is Admission.ADDRESS:
            return []
        meanwhile = joined((port.first, port.last) for port in self.ports if port.purpose == Purpose.OPENED_MEANWHILE)
        planned = joined((port.first, port.last) for port in self.ports if port.purpose != Purpose.OPENED_MEANWHILE)
        return without(planned, meanwhile)

    @cached_property
    def written_peers(self) -> tuple[str, ...]:
        """The peers as text, made once: records are written again and again."""
        return tuple(f"{written_address(peer.network_address)}/{peer.prefixlen}" for peer in self.peers)

    def peers_of(self, version: int) -> tuple[Network, ...]:
        """Return the peers of one IP version, 4 or 6."""
        return self._peers_by_version[version]

    @cached_property
    def _peers_by_version(self) -> dict[int, tuple[Network, ...]]:
        first6 = sum(isinstance(network, ipaddress.IPv4Network) for network in self.peers)
        return {4: self.peers[:first6], 6: self.peers[first6:]}

    def has_peer(self, address: Address) -> bool:
        """Return whether an address is one of a peer's; they may be many, and so may those who are asked for."""
        peers, starts = self.peers_of(address.version), self._starts_by_version[address.version]
        place = bisect.bisect_right(starts, int(address))
        return place > 0 and address in peers[place - 1]

    @cached_property
    def _starts_by_version(self) -> dict[int, list[int]]:
        return {version: [int(peer.network_address) for peer in self.peers_of(version)] for version in (4, 6)}

    @property
    def answered_version(self) -> int | None:
        """The IP version whose opening packets the port chains answer with a reset: all peers are of the other one.

        None where both versions have peers, or neither: then all who are turned away hear nothing. Of nodes that are
        told by a tag nobody knows the version.
        """
        if self.admits_by_tag or not self.peers or (self.peers_of(4) and self.peers_of(6)):
            return None
        return 6 if self.peers_of(4) else 4

    def joined_ports(self) -> list[tuple[int, int]]:
        """Return the port plan as first and last ports, ascending, joined where ranges overlap or touch."""
        return joined((port.first, port.last) for port in self.ports)

    def ports_of_nodes(self) -> list[tuple[int, int]]:
        """Return those where nobody but the job's nodes answers each other, as `joined_ports` does: none is public."""
        return joined((port.first, port.last) for port in self.ports if port.purpose != Purpose.PUBLIC)

    def opening_at(self, port: int) -> Opening | None:
        """Return the opening that this port is public by; None where it is not."""
        return next((opening for opening in self.public if opening.first <= port <= opening.last), None)

    def ports_for_all(self) -> list[tuple[int, int]]:
        """Return the public ports that every host may connect to, as `joined_ports` does."""
        return joined((opening.first, opening.last) for opening in self.public if opening.is_for_all)

    def unasked_ports(self) -> list[tuple[int, int]]:
        """Return the ports of the plan that nobody asked for, joined."""
        asked = joined((port.first, port.last) for port in self.ports if port.is_asked_for)
        unasked = joined((port.first, port.last) for port in self.ports if not port.is_asked_for)
        return joined((p, p) for first, last in unasked for p in range(first, last + 1) if not covers(asked, p))

    def without(self, ports: Collection[int]) -> Policy:
        """Return the policy without those of these ports that nobody asked for."""
        unasked = self.unasked_ports()
        if not any(covers(unasked, port) for port in ports):
            return self
        kept = joined((p, p) for first, last in unasked for p in range(first, last + 1) if p not in ports)
        default = (PortRange(first, last, Purpose.HCCL_DEFAULT) for first, last in kept)
        return replace(self, ports=tuple(sorted((*(port for port in self.ports if port.is_asked_for), *default))))


def by_networks(public: Iterable[Opening]) -> dict[tuple[Network, ...], list[tuple[int, int]]]:
    """Return the joined ports that each list of networks may connect to; every host is the empty list."""
    found: dict[tuple[Network, ...], list[tuple[int, int]]] = {}
    for opening in public:
        found.setdefault(opening.networks, []).append((opening.first, opening.last))
    return {networks: joined(ports) for networks, ports in found.items()}


def opened(public: Iterable[Opening]) -> str:
    """Return in words who may connect to public ports: `8080, 9090 to 10.0.0.0/8; 9100 to every host`."""
    parts = []
    for networks, ranges in by_networks(public).items():
        ports = some([span(first, last) for first, last in ranges], _NAMED)
        parts.append(f"{ports} to {listed(networks) or 'every host'}")
    return "; ".join(parts)


def require_openings(public: tuple[Opening, ...]) -> None:
    """Raise PolicyError for public ports that are out of order, named twice, or more than a run may have."""
    if len(public) > MOST_OPENINGS:
        raise PolicyError(
            f"{len(public)} ports and ranges are more than the {MOST_OPENINGS} that may be public; join them to ranges"
        )
    for before, after in zip(public, public[1:]):
        if after.first <= before.last:
            raise PolicyError(
                f"port {after.first} is named twice among the public ports; name it once, with all of its networks"
            )
    groups = by_networks(public)
    networks = sum(map(len, groups))
    if networks > MOST_PUBLIC_NETWORKS:
        raise PolicyError(
            f"{networks} networks are more than the {MOST_PUBLIC_NETWORKS} that public ports may be for; name larger "
            "ones, or every host by naming none"
        )
    pairs = sum(len(found) * len(ports) for found, ports in groups.items())
    if pairs > MOST_PUBLIC_PAIRS:
        raise PolicyError(
            f"these public ports and networks are {pairs} pairs, and {MOST_PUBLIC_PAIRS} are the most; name larger "
            "networks, or ranges of ports"
        )


def _require_apart(public: Iterable[Opening], ports: Iterable[PortRange]) -> None:
    """Raise PolicyError where a port of the job's own nodes is public, and where the plan disagrees with an opening."""
    own = [port for port in ports if port.purpose in _NEVER_PUBLIC]
    planned = joined((port.first, port.last) for port in ports)
    for opening in public:
        for port in own:
            if opening.first <= port.last and port.first <= opening.last:
                raise PolicyError(f"port {port} is for the job's own nodes ({port.purpose}); make another one public")
        if opening.is_for_all and _met_by(planned, opening.last) >= opening.first:
            raise PolicyError(f"public port {opening} is for every host, and planned to be closed")
        if not opening.is_for_all and _met_by(planned, opening.first) < opening.last:
            raise PolicyError(f"public port {opening} is for some networks, and not planned to be closed to all others")


def _met_by(ranges: list[tuple[int, int]], port: int) -> int:
    """Return the last port of the last of these joined ranges that begins at this port or before; 0 if none does."""
    place = bisect.bisect_right(ranges, (port, LAST_PORT))
    return ranges[place - 1][1] if place else 0


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return first and last ports, ascending, joined where ranges overlap or touch."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def without(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return joined ranges without the ports of others."""
    left = []
    for first, last in ranges:
        for other_first, other_last in others:
            if first <= other_last and other_first <= last:
                if first < other_first:
                    left.append((first, other_first - 1))
                first = other_last + 1
        if first <= last:
            left.append((first, last))
    return left


def covers(ranges: list[tuple[int, int]], port: int) -> bool:
    """Return whether a port is in one of these ranges, which are joined."""
    place = bisect.bisect_right(ranges, (port, LAST_PORT))
    return place > 0 and port <= ranges[place - 1][1]


def overlap(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    """Return whether two lists of joined ranges have a port in common."""
    return any(covers(other, first) for first, _ in one) or any(covers(one, first) for first, _ in other)


@dataclass(frozen=True)
class Layer:
    """One thing that stands in the kernel: backend `shield` or that of port chains, and the name to look for there."""

    backend: str
    name: str

    @property
    def is_shield(self) -> bool:
        """Whether it closes every port of the job's cgroup; port chains close the planned ones."""
        return self.backend == SHIELD

    def __str__(self) -> str:
        return f"{self.backend} ({self.name})"


@dataclass(frozen=True)
class Denial:
    """Somebody who was turned away: `packets` opening packets from `source` to TCP port `port` (0: unknown)."""

    source: Address
    port: int
    packets: int


@dataclass(frozen=True)
class Denials:
    """Who was turned away by now. listed: a line a source and port; more: packets of those that are not listed."""

    listed: tuple[Denial, ...] = ()
    more: int = 0


def merged(counts: Iterable[Iterable[Denial]], more: int = 0) -> Denials:
    """Return one line a source and port from several layers' counts, most packets first, and no more than can be kept.

    more: packets that are in none of the counts.
    """
    total: Counter[tuple[Address, int]] = Counter()
    for denials in counts:
        for denial in denials:
            total[denial.source, denial.port] += denial.packets
    lines = tuple(Denial(source, port, packets) for (source, port), packets in total.most_common(MOST_DENIALS))
    return Denials(lines, more + sum(total.values()) - sum(line.packets for line in lines))
