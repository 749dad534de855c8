"""What this host knows of its runs: /run/securerun, one JSON file a run, read here and written by guards alone.

A record is there before the first layer is installed and goes after the last one is removed, so whatever a
killed guard leaves behind has a record that names it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Callable, TypeVar

from securerun.errors import PolicyError
from securerun.firewall.policy import (
    NAMESPACE,
    RUN_ID,
    Admission,
    Denial,
    Layer,
    Opening,
    Policy,
    joined,
    require_ports,
)
from securerun.guard import slurm_job
from securerun.guard.documents import (
    MAXIMUM_RECORD_BYTES,
    ProtocolError,
    denial_document,
    layer_document,
    policy_document,
    read_denial,
    read_layer,
    read_network,
    read_openings,
    read_policy,
)
from securerun.guard.protocol import mark_of
from securerun.linux import cgroups, file_lock, proc, processes
from securerun.linux.networks import EVERY_HOST, Network

DIRECTORY = Path("/run/securerun")
MOST_RANGES_LEFT_OPEN = 1024
_RECORD_NAME = re.compile(rf"{RUN_ID.pattern}\.json")
_CGROUP_NAME = re.compile(rf"securerun-({RUN_ID.pattern})")


Found = TypeVar("Found", bound="Known")


class Known:
    """What is known of a run without its policy: of each run a launch has to know this, and of few their peers."""

    run_id: str
    layers: tuple[Layer, ...]
    launcher: int
    launcher_start: int
    guard: int
    guard_start: int
    boot_id: str
    network: int
    processes: int
    times: int
    user: int
    root: bool
    cgroup: str
    void: str
    slurm_job: int
    container: str

    @property
    def owner(self) -> tuple[int, bool, str]:
        """Whose run it is: user id 0 is of root and, without its privilege, of others; so is any in containers."""
        return self.user, self.root, self.container

    @property
    def is_bare(self) -> bool:
        """Whether the run stands, and without a shield."""
        return bool(self.layers) and not any(layer.is_shield for layer in self.layers)

    @property
    def is_apart(self) -> bool:
        """Whether the run is in a network of its own, which no guard closes; such runs have no record in DIRECTORY."""
        return any(layer.backend == NAMESPACE for layer in self.layers)

    @property
    def is_of_whole_slurm_job(self) -> bool:
        """Whether it is of a job of Slurm's with all that runs of it here, and Slurm makes and removes its cgroup."""
        return bool(self.slurm_job) and PurePosixPath(self.cgroup).name == f"job_{self.slurm_job}"

    @property
    def guard_lives(self) -> bool:
        """Whether the guard that wrote this still runs. Raises OSError where that cannot be seen for a moment."""
        return self._lives(self.guard, self.guard_start)

    @property
    def launcher_lives(self) -> bool:
        """Whether the launcher still runs. Raises OSError likewise."""
        return self._lives(self.launcher, self.launcher_start)

    @property
    def is_abandoned(self) -> bool:
        """Whether launcher and guard are both gone, so that nobody looks after the run. Raises OSError likewise."""
        return not self.guard_lives and not self.launcher_lives

    @property
    def stands_here(self) -> bool:
        """Whether its rules are in this network namespace, and were not gone with another boot."""
        return self.network == proc.namespace("net") and self.boot_id == proc.boot_id()

    def _lives(self, pid: int, start: int) -> bool:
        if self.boot_id != proc.boot_id():
            return False
        if self.processes != proc.namespace("pid"):
            # The pids of a container mean nothing out here; while anything runs there, all of it may. What runs in a
            # namespace above or beside this one is not seen from here, and its guard tells.
            return proc.namespace_exists("pid", self.processes) or is_held(self.run_id)
        if self.times and self.times != proc.time_namespace():
            # Start times are those of the reader's clock (time_namespaces(7)): the number alone tells nothing of them.
            return proc.exists(pid)
        return proc.is_running(pid, start)


@dataclass(frozen=True)
class Record(Known):
    """One run as the host's administrator sees it.

    launcher, guard: process ids; launcher_start, guard_start: their start times in clock ticks since boot
    (proc(5), stat field 22), since process ids are used again. boot_id: the boot that these belong to.
    network, processes: the network namespace that the layers are in and the pid namespace in which the pids count
    (inodes, namespaces(7)). times: the time namespace whose start times these are, 0 where none is known.
    cgroup: the job's, "" where it has none. void: why its shield holds no more, which then is none of its layers.
    container: the root cgroup of the launcher's container (securerun.guard.containers), "" for one of the host's own.
    user: the launcher's user id. root: whether it might ask for anything, which user id 0 alone may not.
    started: seconds since the epoch. draining: the job is over, not all of it gone.
    reserved: first and last of the TCP ports that nobody else is to be given (securerun.guard.reserved).
    denied_more: packets of those who were turned away and are not among `denied`, which is bounded.
    guard_restarts: how many guards of this run have died and been replaced.
    left_open: first and last of ports of the job that are open to every host; the first MOST_RANGES_LEFT_OPEN.
    key: the fingerprint of the job's key, "" where it has none; key_source: the guard's own source of it, in words.
    slurm_job: the number of the job of Slurm's that it is for, where no launcher goes on with it; 0 for any other.
    nodes_guarded: how many of the job's nodes were seen with that key, this one among them; 0 without a key; nodes: how
    many the job has, 0 where that is not known.
    guard_told: whether its guard lives, by the word of the guard that told of this record; None for one read here.
    """

    policy: Policy
    layers: tuple[Layer, ...]
    launcher: int
    launcher_start: int
    guard: int
    guard_start: int
    boot_id: str
    network: int
    processes: int
    user: int
    started: float
    command: str
    root: bool = False
    container: str = ""
    times: int = 0
    cgroup: str = ""
    void: str = ""
    key: str = ""
    key_source: str = ""
    nodes_guarded: int = 0
    nodes: int = 0
    slurm_job: int = 0
    draining: bool = False
    denied: tuple[Denial, ...] = ()
    denied_more: int = 0
    guard_restarts: int = 0
    reserved: tuple[tuple[int, int], ...] = ()
    left_open: tuple[tuple[int, int], ...] = ()
    guard_told: bool | None = None

    @property
    def run_id(self) -> str:  # type: ignore[override]
        """The run's id."""
        return self.policy.run_id

    @property
    def guard_lives(self) -> bool:
        """Whether the guard that wrote this still runs."""
        return super().guard_lives if self.guard_told is None else self.guard_told

    def document(self) -> dict[str, Any]:
        """Return the record as JSON's own types."""
        return {
            "policy": policy_document(self.policy),
            "layers": [layer_document(layer) for layer in self.layers],
            "denied": [denial_document(denial) for denial in self.denied],
            "reserved": [list(ports) for ports in self.reserved],
            "left_open": [list(ports) for ports in self.left_open],
            **{name: getattr(self, name) for name in _PLAIN},
        }


class Brief(Known):
    """A record that is read in the time that it takes to parse it, whoever may connect and whatever ports it has.

    Users may have runs with thousands of peers and ports, each of which takes microseconds to understand, and whoever
    looks for their own neighbours holds the host's lock meanwhile.
    """

    def __init__(self, run_id: str, document: Mapping[str, Any]) -> None:
        """Raise ValueError, LookupError, TypeError or ProtocolError for a document that is no record."""
        self.run_id = run_id
        self.__dict__.update(_plain_fields(document, run_id))
        self.layers = tuple(read_layer(layer) for layer in document["layers"])
        self._document = document
        self._policy = document["policy"]
        if self._policy["run_id"] != run_id:
            raise ValueError(f"{run_id}.json is the record of another run")

    def ports(self) -> list[tuple[int, int]]:
        """Return its plan as first and last ports, joined; none where it cannot be understood."""
        with contextlib.suppress(*NO_RECORD):
            return joined(_ranges((port["first"], port["last"]) for port in self._policy["ports"]))
        return []

    def peers(self) -> tuple[Network, ...] | None:
        """Return who may connect; None where that cannot be understood.

        Whoever has TCP option 254 comes past the port chains of a run that goes by tags, to be judged by its shield.
        """
        with contextlib.suppress(*NO_RECORD):
            if not self.is_bare and Admission(self._policy.get("admission", Admission.ADDRESS)).is_by_tag_alone:
                return EVERY_HOST
            return tuple(read_network(peer) for peer in self._policy["peers"])
        return None

    def public(self) -> tuple[Opening, ...]:
        """Return its public ports; none where they cannot be understood."""
        with contextlib.suppress(*NO_RECORD):
            return read_openings(self._policy)
        return ()

    def whole(self) -> Record | None:
        """Return all of it; None where it cannot be understood."""
        with contextlib.suppress(*NO_RECORD):
            return understood(self._document)
        return None


# What reading something else than a record raises.
NO_RECORD = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ProtocolError, PolicyError),
)
# The fields that are JSON's own types, with the type that each must have when it is read back.
_PLAIN: dict[str, type] = {
    "launcher": int,
    "launcher_start": int,
    "guard": int,
    "guard_start": int,
    "boot_id": str,
    "network": int,
    "processes": int,
    "times": int,
    "user": int,
    "root": bool,
    "container": str,
    "started": float,
    "command": str,
    "cgroup": str,
    "void": str,
    "key": str,
    "key_source": str,
    "nodes_guarded": int,
    "nodes": int,
    "slurm_job": int,
    "draining": bool,
    "denied_more": int,
    "guard_restarts": int,
}


def processes_of(record: Known, until: float = math.inf) -> frozenset[int]:
    """Return what runs of a run that nobody looks after: in its cgroup, and with its id in the environment.

    A launcher that could not be moved there, or a process that was moved out, is in no cgroup of the run's.

    until: on the monotonic clock. Raises TimeoutError when not all of its user's processes could be asked until then.
    """
    found: set[int] = set()
    if record.boot_id != proc.boot_id():
        return frozenset()
    if record.cgroup:
        with contextlib.suppress(OSError):
            found |= cgroups.processes_of(record.cgroup)
    return processes.claimants(mark_of(record.run_id), record.user, until) | found


def run_of(cgroup: str) -> str | None:
    """Return the run in whose cgroup, or below it, one lies; None where no run of that name is recorded.

    Users name cgroups, so a name alone is none. The deepest counts: a run may be inside of another.
    """
    for part in reversed(PurePosixPath(cgroup).parts):
        found = _CGROUP_NAME.fullmatch(part)
        if found is not None and Path(DIRECTORY, f"{found[1]}.json").is_file():
            return found[1]
    return None


def read_all(directory: int) -> tuple[Record, ...]:
    """Read the records of all runs. What is none of ours (half-written, foreign, of another version) is passed over."""
    found = []
    for name in sorted(os.listdir(directory)):
        if _RECORD_NAME.fullmatch(name):
            with contextlib.suppress(*NO_RECORD):
                found.append(_read(directory, name))
    return tuple(found)


def read(directory: int, run_id: str) -> Record | None:
    """Read the record of one run; None where there is none that can be understood."""
    with contextlib.suppress(*NO_RECORD):
        return _read(directory, f"{run_id}.json")
    return None


def read_briefs(directory: int) -> tuple[Brief, ...]:
    """Read what `read_all` reads, without understanding who may connect to what."""
    found = []
    for run_id, document in documents(directory):
        with contextlib.suppress(*NO_RECORD):
            found.append(Brief(run_id, document))
    return tuple(found)


def documents(directory: int) -> Iterator[tuple[str, Any]]:
    """Yield run id and content of every record, the policy not yet understood: that takes 100,000 peers a second."""
    for name in sorted(os.listdir(directory)):
        if _RECORD_NAME.fullmatch(name):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                document = read_document(directory, name)
                run_id = name.partition(".")[0]
                _plain_fields(document, run_id)
                yield run_id, document


def layers_in(directory: int, network: int) -> set[str]:
    """Return the backends of all runs' layers in one network namespace; who may connect is not looked at."""
    found: set[str] = set()
    for _, document in documents(directory):
        with contextlib.suppress(LookupError, TypeError, ProtocolError):
            if document["network"] == network:
                found.update(read_layer(layer).backend for layer in document["layers"])
    return found


def open_to_read() -> int | None:
    """Open the record directory; None where there is none. Raises OSError."""
    try:
        return os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def read_host() -> tuple[Record, ...]:
    """Read the records of this host's runs as they are now, without the lock; none where no run made the directory.

    Raises OSError for whoever may not read them, and for something else in the directory's place.
    """
    return _of_host(read_all)


def read_briefs_of_host() -> tuple[Brief, ...]:
    """Read what `read_host` reads, without understanding who may connect to what. Raises OSError as it does."""
    return _of_host(read_briefs)


def _of_host(read: Callable[[int], tuple[Found, ...]]) -> tuple[Found, ...]:
    directory = open_to_read()
    if directory is None:
        return ()
    try:
        return read(directory)
    finally:
        os.close(directory)


def exists(directory: int, run_id: str) -> bool:
    """Return whether anything at all, a record or not, has the name of a run's record."""
    try:
        os.lstat(f"{run_id}.json", dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def is_held(run_id: str) -> bool:
    """Return whether a guard holds a run, whichever pid namespace it is in. Where that cannot be told none does."""
    with contextlib.suppress(OSError):
        directory = open_to_read()
        if directory is not None:
            try:
                return file_lock.is_marked(directory, place_of(run_id))
            finally:
                os.close(directory)
    return False


def place_of(run_id: str) -> int:
    """Return which byte of the record directory a run's guard marks, to be known to live."""
    return int(run_id, 16)


def read_document(directory: int, name: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Read a file. Raises OSError, or ValueError for what is no JSON, or no regular file of reasonable size."""
    try:
        return json.loads(_content(directory, name))
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error


def _read(directory: int, name: str) -> Record:
    record = understood(read_document(directory, name))
    if name != f"{record.run_id}.json":
        raise ValueError(f"{name} is the record of run {record.run_id}")
    return record


def understood(document: Mapping[str, Any]) -> Record:
    """Return the record in a document; the opposite of `Record.document`.

    Raises ValueError, LookupError, TypeError, AttributeError, ProtocolError or PolicyError for what is none.
    """
    policy = read_policy(document["policy"], recorded=True)
    plain = _plain_fields(document, policy.run_id)
    layers = tuple(read_layer(layer) for layer in document["layers"])
    denied = tuple(read_denial(denial) for denial in document["denied"])
    reserved, left_open = reserved_ports(document), _ranges(document.get("left_open", ()))
    return Record(policy, layers, denied=denied, reserved=reserved, left_open=left_open, **plain)


def _plain_fields(document: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    """Return what a record has beside its policy and lists. Raises ValueError, LookupError or TypeError."""
    # Guards from before there were these fields took user id 0 for root, and the host's time namespace for granted, did
    # not look at a shield again, knew no keys, containers or jobs of Slurm's, and did not count what metrics tell.
    without_key = {"key": "", "key_source": "", "nodes_guarded": 0, "nodes": 0}
    uncounted = {"slurm_job": 0, "denied_more": 0, "guard_restarts": 0}
    known = {"root": document["user"] == 0, "container": "", "times": 0, "void": ""}
    whole = {**known, **without_key, **uncounted, **document}
    plain = {field: whole[field] for field in _PLAIN}
    if any(type(value) is not _PLAIN[field] for field, value in plain.items()):
        raise ValueError("a record has a field of another type")
    os.fsencode(plain["cgroup"])  # or it is the name of nothing: UnicodeEncodeError is a ValueError
    cgroup = PurePosixPath(plain["cgroup"])
    # Reaping removes this cgroup and what is below it, so it has to be one that a guard made for this run.
    of_run = cgroup.name == f"securerun-{run_id}" and not {"..", "\0"} & {*cgroup.parts, *str(cgroup)}
    if plain["cgroup"] and not (of_run or slurm_job.is_cgroup_of(plain["cgroup"], plain["slurm_job"])):
        raise ValueError(f"the record of run {run_id} names a cgroup that is not of its run")
    return plain


def reserved_ports(document: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return the ports that a record reserves. Raises ValueError, TypeError, AttributeError or PolicyError."""
    # Guards from before there was this field reserved nothing.
    return _ranges(document.get("reserved", ()))


def _ranges(document: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    ranges = tuple((first, last) for first, last in document)
    for first, last in ranges:
        require_ports(first, last)
    return ranges


def _content(directory: int, name: str) -> bytes:
    """Read a regular file of reasonable size, without waiting for whatever else has its name."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAXIMUM_RECORD_BYTES:
            raise ValueError(f"{name} is no record")
        return os.read(descriptor, status.st_size)
    finally:
        os.close(descriptor)
