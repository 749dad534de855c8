"""Ascend rank tables: the hosts of a job, and the ports that HCCL is told to use on them.

Versions 1.0 and 1.2 (server_list, server_group_list, super_pod_list) and 2.0 (rank_list), as the HCCL documentation,
MindCluster and MindIE write them; the older ones without a version (group_list, with an instance for each device or for
each pod), as CANN's guides and ModelArts do; and those of separated prefill and decode (prefill_device_list,
decode_device_list). A table may be 1 GB large, so it is read as a stream and never as a whole.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, TextIO

from securerun.errors import PolicyError
from securerun.firewall.policy import FIRST_PORT, LAST_PORT
from securerun.job import entries
from securerun.job.entries import Entry, Tell
from securerun.linux.networks import is_address

# HCCL's limit for version 2.0; tables of other versions are far smaller.
LARGEST = 1 << 30
# MindCluster writes `initializing` and, when every pod of the job has its devices, `completed`.
COMPLETED = "completed"
STATUS_SECONDS = 120.0
# On shared storage a table is truncated first and written after.
WRITING_SECONDS = 3.0
_PAUSE_SECONDS = 0.25

VARIABLES = ("RANK_TABLE_FILE", "RANK_TABLE_PATH")
_FILE_NAME = "hccl.json"
# Where MindCluster's Ascend Operator and ModelArts mount the table of a job.
MOUNTED = (Path("/user/serverid/devindex/config") / _FILE_NAME, Path("/user/config/jobstart_hccl.json"))

_SERVERS = {"server_list.item", "server_group_list.item.server_list.item"}
# These lists name servers of the lists above once more, by their server_id.
_REFERENCES = {"super_pod_list.item.server_list.item", "server_group_list.item.super_pod_list.item.server_list.item"}
_INSTANCE = "group_list.item.instance_list.item"
_DEVICES = {"prefill_device_list.item", "decode_device_list.item"}
_RANK = "rank_list.item"
_STATUS = "status"
_WHOLE = _SERVERS | _REFERENCES | _DEVICES | {_INSTANCE, _RANK}
_LISTS = "server_list, server_group_list, rank_list, group_list nor prefill_device_list"

# What HCCL, MindCluster and MindIE put the address of the host or the pod into; device_ip is the NPU's own.
_ADDRESSES = ("host_ip", "server_ip", "container_ip")
# An address in the first rank tables; today any text that no other server has, under MindCluster a pod's uid.
_IDENTIFIER = "server_id"
# In version 2.0 the ports of an address are Die/port for an NPU's, and `d2h` for the host's own network card.
_LIKE_ADDRESS = re.compile(r"[0-9A-Fa-f]*[.:]")
_NPU_PORT = re.compile(r"[0-9]+/[0-9]+")


@dataclass(frozen=True)
class Location:
    """Where a rank table is. source: for people; what named it, and its path. is_named: whether a variable did."""

    path: Path
    source: str
    is_named: bool = True


@dataclass(frozen=True)
class Server:
    """One host of a table, as it is written there.

    name: its server_id; empty for the ranks of version 2.0 whose host has no address in the table.
    addresses: those of the host or pod. unusable: the name and text of each field that should hold one and does not.
    ports: every host_port of its devices.
    """

    name: str
    addresses: tuple[str, ...]
    unusable: tuple[tuple[str, str], ...]
    ports: tuple[int, ...]


@dataclass(frozen=True)
class RankTable:
    """A complete rank table. source: where it was found, for people. servers: each host once."""

    source: str
    servers: tuple[Server, ...]

    def entries(self) -> tuple[Entry, ...]:
        """Its hosts with all their addresses; none where the table has no addresses of hosts at all.

        Raises PolicyError for an address that cannot be one, and for a server without any where others have one.
        """
        named = [server for server in self.servers if server.name]
        for server in named:
            self._refuse_placeholders(server)
        lacking = [server for server in named if not server.addresses]
        if lacking and len(lacking) < len(named):
            raise PolicyError(
                f"{self.source}: server {lacking[0].name!r} has no address, and others have one; add its host_ip, or "
                "name the hosts with --peers"
            )
        places = {server: f"{self.source}, server {server.name!r}" for server in named if server.addresses}
        return tuple(Entry(server.addresses, place) for server, place in places.items())

    def ports(self, own: Callable[[], Collection[str]]) -> tuple[int, ...]:
        """Return the ports that HCCL is told to use on this host; those of all, if none has an address of this one.

        own: this host's addresses; asked only if there are ports.
        """
        if not any(server.ports for server in self.servers):
            return ()
        addresses = own()
        mine = [server for server in self.servers if any(address in addresses for address in server.addresses)]
        # Whose host the nameless are is not known, so they count in any case.
        found = [*mine, *(server for server in self.servers if not server.name)] if mine else self.servers
        return tuple(sorted({port for server in found for port in server.ports}))

    def _refuse_placeholders(self, server: Server) -> None:
        for field, text in server.unusable:
            # MindCluster leaves host_ip empty where it knows container_ip alone; a server_id may be any text.
            is_optional = field == _IDENTIFIER or not text
            if (is_optional and server.addresses) or (field == _IDENTIFIER and not is_address(text)):
                continue
            raise PolicyError(
                f"{self.source}: server {server.name!r}: {field} {text!r} is no address of a host; write its own, or "
                "name the hosts with --peers"
            )


class Unknown(PolicyError):
    """The file is no rank table of a kind that can be read here; which may be its vendor's newest."""


class Unfinished(PolicyError):
    """The table is being written. seconds: how long that may take. advice: what to do if it takes longer."""

    def __init__(self, message: str, seconds: float, advice: str = "write it anew") -> None:
        super().__init__(message)
        self.seconds = seconds
        self.advice = advice


def locate(environment: Mapping[str, str], note: Tell) -> Location | None:
    """Return the rank table that the environment names, else the one that MindCluster or ModelArts has mounted.

    note: told of a table that the environment names and this host does not have.
    """
    for variable in VARIABLES:
        text = environment.get(variable, "").strip()
        if not text:
            continue
        path = Path(text) / _FILE_NAME if Path(text).is_dir() else Path(text)
        if entries.is_there(path):
            return Location(path, f"{variable}={path}")
        note(f"{variable} names {text}, which is not on this host")
    for path in MOUNTED:
        if entries.is_there(path):
            return Location(path, f"rank table {path}", is_named=False)
    return None


def read(location: Location) -> RankTable:
    """Read a table.

    Raises Unfinished for one that is being written, Unknown for what is none, PolicyError for one that cannot be read.
    """
    from securerun.job import jsonstream

    source = location.source
    try:
        with _open(location) as file:
            table = _Table(source)
            for piece in jsonstream.pieces(file, _WHOLE):
                table.add(piece.path, piece.value, begins_list=isinstance(piece.value, jsonstream.ListStart))
    except FileNotFoundError as error:
        raise Unfinished(f"{source}: the rank table is gone", WRITING_SECONDS) from error
    except OSError as error:
        raise PolicyError(
            f"{source}: the rank table cannot be read ({error.strerror}); make it readable, or name the hosts with "
            "--peers"
        ) from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{source}: the rank table is no UTF-8 text; write it anew") from error
    except jsonstream.JSONError as error:
        if error.is_cut_off:
            raise Unfinished(
                f"{source}: the rank table ends in the middle, in line {error.line}", WRITING_SECONDS
            ) from error
        raise PolicyError(f"{source}, line {error.line}: the rank table is no JSON ({error}); write it anew") from error
    return table.complete()


def wait_for(location: Location, tell: Tell) -> RankTable:
    """Read a table; wait, within limits, for one that is being written. tell: told once that it waits, and for what.

    Raises PolicyError where it is not finished in time, and as `read` does.
    """
    start = time.monotonic()
    told = False
    while True:
        version = _version(location.path)
        try:
            return read(location)
        except Unfinished as error:
            unfinished = error
        if unfinished.seconds == STATUS_SECONDS and not told:
            tell(f"{unfinished}; waiting up to {STATUS_SECONDS:g} s for it")
            told = True
        deadline = min(start + STATUS_SECONDS, time.monotonic() + unfinished.seconds)
        if not _changes(location.path, version, deadline):
            raise PolicyError(
                f"{unfinished}, and {time.monotonic() - start:.0f} s later still; {unfinished.advice}, or name the "
                "hosts with --peers"
            )


class _Table:
    """A table that is being read."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._status: object = COMPLETED
        self._servers: list[Server] = []
        self._references: list[Server] = []
        # Of the list that is being read, and of all lists.
        self._listed: set[str] = set()
        self._known: set[str] = set()
        self._ranks: dict[tuple[str, ...], set[int]] = {}
        # By server_id and, where there is one, the pod's name: two pods of one host are two nodes of the job.
        self._instances: dict[str, Server] = {}
        self._lists = 0

    def add(self, path: str, value: object, *, begins_list: bool) -> None:
        if begins_list:
            self._listed = set()
            self._lists += f"{path}.item" in _WHOLE
        elif path in _SERVERS:
            self._add_server(_members(value, path, self._source))
        elif path in _REFERENCES:
            self._references.append(self._server(_members(value, path, self._source), len(self._references)))
        elif path == _INSTANCE or path in _DEVICES:
            self._add_instance(_members(value, path, self._source))
        elif path == _RANK:
            self._add_rank(_members(value, path, self._source))
        elif path == _STATUS:
            self._status = value

    def complete(self) -> RankTable:
        """Raise Unfinished where the status says so, Unknown where there was no list of a rank table."""
        if self._status != COMPLETED:
            raise Unfinished(
                f"{self._source}: the rank table's status is {self._status!r}, not {COMPLETED!r}",
                STATUS_SECONDS,
                "see what keeps the other nodes of the job",
            )
        if not self._lists:
            raise Unknown(
                f"{self._source}: this is no rank table that is known here: it has neither {_LISTS}; name the hosts "
                "with --peers"
            )
        others = [server for server in self._references if server.name not in self._known]
        ranks = [_of_ranks(addresses, ports) for addresses, ports in self._ranks.items()]
        return RankTable(self._source, (*self._servers, *others, *self._instances.values(), *ranks))

    def _add_server(self, members: Mapping[str, object]) -> None:
        server = self._server(members, len(self._servers))
        if _IDENTIFIER in members and server.name in self._listed:
            raise PolicyError(
                f"{self._source}: server {server.name!r} stands twice in one list; HCCL takes each server_id once, so "
                "write the table anew"
            )
        self._listed.add(server.name)
        self._known.add(server.name)
        self._servers.append(server)

    def _add_instance(self, members: Mapping[str, object]) -> None:
        """Add a pod, a server or a single device, of which several may be of one server."""
        devices = members.get("devices", [members])
        server = self._server({**members, "device": devices}, len(self._instances))
        pod = _text(members.get("pod_name", ""))
        name = f"{server.name}, pod {pod}" if pod else server.name
        known = self._instances.get(name, replace(server, name=name))
        ports = tuple(dict.fromkeys((*known.ports, *server.ports)))
        addresses = tuple(dict.fromkeys((*known.addresses, *server.addresses)))
        self._instances[name] = replace(known, addresses=addresses, ports=ports)

    def _server(self, members: Mapping[str, object], number: int) -> Server:
        fields = [(field, _text(members[field])) for field in (*_ADDRESSES, _IDENTIFIER) if field in members]
        name = _text(members.get(_IDENTIFIER, "")) or f"number {number}"
        devices = members.get("device", [])
        if not isinstance(devices, list):
            raise PolicyError(f"{self._source}: device of server {name!r} is no list; write the table anew")
        return Server(
            name,
            addresses=tuple(dict.fromkeys(_usable(text) for _, text in fields if _usable(text))),
            unusable=tuple((field, text) for field, text in fields if not _usable(text)),
            ports=self._ports(_members(device, "device", self._source) for device in devices),
        )

    def _add_rank(self, members: Mapping[str, object]) -> None:
        addresses = tuple(dict.fromkeys(_host_addresses(members)))
        self._ranks.setdefault(addresses, set()).update(self._ports([members]))

    def _ports(self, devices: Iterable[Mapping[str, object]]) -> tuple[int, ...]:
        """Return the host_port of each device that has one: text in version 1.2, a number in 2.0."""
        found = {_text(device["host_port"]) for device in devices if device.get("host_port") is not None}
        return tuple(self._port(text) for text in found if text)

    def _port(self, text: str) -> int:
        port = _port_number(text)
        if port is None:
            raise PolicyError(
                f"{self._source}: host_port {text!r} is no port of {FIRST_PORT}-{LAST_PORT}; correct it in the table"
            )
        return port


def _of_ranks(addresses: tuple[str, ...], ports: set[int]) -> Server:
    unusable = tuple(("addr", address) for address in addresses if not _usable(address))
    usable = tuple(_usable(address) for address in addresses if _usable(address))
    return Server(addresses[0] if addresses else "", usable, unusable, tuple(ports))


def _host_addresses(rank: Mapping[str, object]) -> Iterator[str]:
    """Yield the addresses of a rank that are its host's."""
    for level in _objects(rank.get("level_list")):
        for address in _objects(level.get("rank_addr_list")):
            kind, ports = _text(address.get("addr_type", "")).upper(), address.get("ports")
            if kind not in {"IPV4", "IPV6"} or not isinstance(ports, list) or not ports:
                continue
            if not any(_NPU_PORT.fullmatch(_text(port)) for port in ports):
                yield _text(address.get("addr", ""))


def _objects(value: object) -> Iterator[Mapping[str, object]]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def _members(value: object, path: str, source: str) -> Mapping[str, object]:
    if isinstance(value, dict):
        return value
    raise PolicyError(f"{source}: {path} is {type(value).__name__}, not an object; write the rank table anew")


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else str(value)


# The devices of every server mostly have the same few ports, and an address is looked at more than once.
@functools.lru_cache(maxsize=1024)
def _port_number(text: str) -> int | None:
    if not re.fullmatch("[0-9]{1,5}", text) or not FIRST_PORT <= int(text) <= LAST_PORT:
        return None
    return int(text)


@functools.lru_cache(maxsize=64)
def _usable(text: str) -> str:
    """Return the address of a host that can connect, in its usual form; empty for any other text."""
    if not _LIKE_ADDRESS.match(text) or not is_address(text):
        return ""
    network = entries.single(ipaddress.ip_address(text))
    return str(network.network_address) if entries.is_host(network) else ""


def _open(location: Location) -> TextIO:
    """Open a table for reading. Links are followed: a ConfigMap is one link to a link that changes."""
    # Not to wait for a writer if it is a pipe.
    descriptor = os.open(location.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_unreadable(os.fstat(descriptor), location.source)
    except BaseException:
        os.close(descriptor)
        raise
    # utf-8-sig: some editors begin a file with a byte order mark.
    return os.fdopen(descriptor, encoding="utf-8-sig", newline="")


def _refuse_unreadable(status: os.stat_result, source: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PolicyError(f"{source}: this is no file; name the rank table itself")
    if status.st_size > LARGEST:
        raise PolicyError(
            f"{source}: the rank table is larger than 1 GB ({status.st_size >> 20} MB), and HCCL takes none of that "
            "size; name the hosts with --peers"
        )


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _changes(path: Path, version: tuple[int, int, int] | None, deadline: float) -> bool:
    """Wait until a file is another than it was; False where it is not by the deadline."""
    while _version(path) == version:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True
