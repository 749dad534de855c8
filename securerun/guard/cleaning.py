"""The reaper for people: `securerunctl clean` runs this, as root, and tells what is found. No guard loads it."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Callable, TypeVar

from securerun.firewall import backends
from securerun.guard import noted, reaper, records, reserved, run_directory, unrecorded
from securerun.guard.cgroup import open_job_cgroup
from securerun.guard.records import Record

_SECOND_LOOK_SECONDS = 1.0
# Then whoever waits for the host's lock is next.
_LOCKED_SECONDS = 1.0
# For asking processes whether they are of one dead run.
_ASKING_SECONDS = 0.5

Waiting = TypeVar("Waiting")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Abandoned:
    """A run whose launcher and guard are gone.

    runs: what of it still runs, in words, "" where nothing does. has_cgroup: whether its cgroup is there. is_dead:
    whether what it left may be removed from here. failure: why that did not succeed, None where it did, or was not
    tried.
    """

    record: Record
    runs: str
    has_cgroup: bool
    is_dead: bool
    failure: str | None


@dataclass(frozen=True)
class Rules:
    """Rules of a run in this network that no record here names: those of a container have theirs in its own /run.

    backend: "" where it is reserved ports that are noted as the run's, and no rules.
    stands: whether its guard stands, or may, so that they stay. failure: why they could not be removed, None where they
    were, or that was not tried.
    """

    run_id: str
    backend: str
    stands: bool
    failure: str | None


@dataclass(frozen=True)
class Remains:
    """What was found in the record directory beside the runs that live, and in this network's rules.

    partial: names of what killed guards were writing. foreign: names of what is not ours, or no longer readable.
    """

    partial: tuple[str, ...] = ()
    abandoned: tuple[Abandoned, ...] = ()
    foreign: tuple[str, ...] = ()
    rules: tuple[Rules, ...] = ()


def clean(*, dry_run: bool) -> Remains:
    """Remove what dead runs left, or only look; return what was found, with what could not be removed and why.

    Raises PrivilegeError for whoever may not do that.
    """
    if any(not rules.stands for rules in unrecorded_rules()):
        # A guard that was killed alone is replaced in a moment. Nobody waits for that: the lock is not held.
        time.sleep(_SECOND_LOOK_SECONDS)
    with run_directory.host_lock() as directory:
        remains, without_guard = _looked_at(directory, dry_run=dry_run)
    reaped = _in_turns(without_guard, lambda directory, run_id: _reaped(directory, run_id, dry_run=dry_run))
    abandoned = tuple(run for run in reaped if run is not None)
    found = unrecorded_rules()
    return replace(remains, abandoned=abandoned, rules=found if dry_run else tuple(_in_turns(found, _removed)))


def unrecorded_rules() -> tuple[Rules, ...]:
    """Look for rules of runs without a record, in every backend that is in use here. Changes nothing."""
    with contextlib.suppress(OSError):
        directory = records.open_to_read()
        try:
            return tuple(_unrecorded(directory))
        finally:
            if directory is not None:
                os.close(directory)
    return ()


def _unrecorded(directory: int | None) -> Iterator[Rules]:
    for backend in backends.NAMES:
        for run_id in sorted(backends.standing_runs(backend)):
            if directory is None or not records.exists(directory, run_id):
                yield Rules(run_id, backend, unrecorded.is_stood_for(run_id), None)
    for run_id in sorted(noted.runs()):
        if directory is None or not records.exists(directory, run_id):
            yield Rules(run_id, "", unrecorded.is_stood_for(run_id), None)


def _looked_at(directory: int, *, dry_run: bool) -> tuple[Remains, list[str]]:
    """Return what lies there beside the runs, with what was being written removed, and which runs are without a guard.

    The caller holds the host's lock.
    """
    partial = _partial_files(directory)
    if not dry_run:
        run_directory.remove_partial(directory)
    readable = records.read_all(directory)
    ours = {*(f"{record.run_id}.json" for record in readable), *partial, *reserved.ledgers(directory)}
    foreign = tuple(sorted(set(os.listdir(directory)) - ours))
    return Remains(partial, foreign=foreign), [record.run_id for record in readable if record.is_abandoned]


def _in_turns(found: Iterable[Waiting], remove: Callable[[int, Waiting], Done]) -> Iterator[Done]:
    """Remove these under the host's lock; yield what became of each.

    Of them there may be thousands, and others launch meanwhile: what was found may be another by its turn.
    """
    waiting = deque(found)
    while waiting:
        done: list[Done] = []
        with run_directory.host_lock() as directory:
            until = time.monotonic() + _LOCKED_SECONDS
            while waiting and (not done or time.monotonic() < until):
                done.append(remove(directory, waiting.popleft()))
        yield from done


def _removed(directory: int, found: Rules) -> Rules:
    """Remove the rules of a run for which no guard stands still. The caller holds the host's lock."""
    if found.stands or records.exists(directory, found.run_id) or unrecorded.is_stood_for(found.run_id):
        return replace(found, stands=True)
    try:
        if found.backend:
            backends.open_chains(found.backend, found.run_id).remove()
        else:
            unrecorded.give_ports_back(directory, found.run_id)
    except unrecorded.OBSTACLES as error:
        return replace(found, failure=str(error))
    return found


def _reaped(directory: int, run_id: str, *, dry_run: bool) -> Abandoned | None:
    """Remove what is left of a run without a guard; None where it has one by now, or another was faster.

    The caller holds the host's lock.
    """
    record = records.read(directory, run_id)
    if record is None or not record.is_abandoned:
        return None
    runs, has_cgroup = reaper.what_runs(record, time.monotonic() + _ASKING_SECONDS), _has_cgroup(record)
    is_dead = not runs and reaper.is_within_reach(record)
    failure = None
    if is_dead and not dry_run:
        try:
            reaper.reap(directory, record)
        except (*reaper.OBSTACLES, OSError) as error:
            failure = str(error)
    return Abandoned(record, runs, has_cgroup, is_dead, failure)


def _partial_files(directory: int) -> tuple[str, ...]:
    """Return what killed guards were writing. A directory of such a name is not their work, and stays."""
    names = run_directory.partial(directory)
    return tuple(name for name in names if not stat.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode))


def _has_cgroup(record: Record) -> bool:
    cgroup = open_job_cgroup(record.cgroup) if record.cgroup else None
    if cgroup is not None:
        cgroup.close()
    return cgroup is not None
