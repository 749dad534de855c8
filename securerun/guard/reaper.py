"""Remove what dead runs left, and only that.

A run is dead when its launcher and its guard are both gone, by pid and start time, or belong to another boot, and no
process is left in its cgroup. A guard that died alone is replaced by its launcher; a launcher that died alone is
cleaned up after by its guard.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from securerun.firewall.backends import NAMES, open_chains
from securerun.firewall.chains import PortChainsUnavailable
from securerun.guard import records, reserved, run_directory
from securerun.guard.cgroup import open_job_cgroup
from securerun.guard.records import Record
from securerun.linux import proc
from securerun.linux.cgroups import CgroupUnavailable
from securerun.linux.port_ranges import ReservationUnavailable

_OBSTACLES = (PortChainsUnavailable, ReservationUnavailable, CgroupUnavailable)


@dataclass(frozen=True)
class Abandoned:
    """A run whose launcher and guard are gone.

    processes: what runs in its cgroup; None where it has none any more. is_dead: whether what it left may be removed
    from here. failure: why that did not succeed, None where it did, or was not tried.
    """

    record: Record
    processes: frozenset[int] | None
    is_dead: bool
    failure: str | None


@dataclass(frozen=True)
class Remains:
    """What was found in the record directory beside the runs that live.

    partial: names of what killed guards were writing. foreign: names of what is not ours, or no longer readable.
    """

    partial: tuple[str, ...]
    abandoned: tuple[Abandoned, ...]
    foreign: tuple[str, ...]


def clean(*, dry_run: bool) -> Remains:
    """Remove what dead runs left, or only look; return what was found, with what could not be removed and why.

    Raises PrivilegeError for whoever may not do that.
    """
    with run_directory.host_lock() as directory:
        return _cleaned(directory, dry_run=dry_run)


def reap_all(directory: int) -> Iterator[str]:
    """Reap every dead run and yield a line for each that could not be reaped. The caller holds the host's lock."""
    run_directory.remove_partial(directory)
    for record in records.read_all(directory):
        if not (_is_dead(record) and _is_within_reach(record)):
            continue
        try:
            _reap(directory, record)
        except _OBSTACLES as error:
            yield f"what run {record.run_id} left cannot be removed: {error}"


def _cleaned(directory: int, *, dry_run: bool) -> Remains:
    partial = _partial_files(directory)
    if not dry_run:
        run_directory.remove_partial(directory)
    readable = records.read_all(directory)
    abandoned = tuple(_reaped(directory, record, dry_run=dry_run) for record in readable if record.is_abandoned)
    ours = {*(f"{record.run_id}.json" for record in readable), *partial, *reserved.ledgers(directory)}
    return Remains(partial, abandoned, tuple(sorted(set(os.listdir(directory)) - ours)))


def _reaped(directory: int, record: Record, *, dry_run: bool) -> Abandoned:
    processes = _processes(record)
    is_dead = _is_dead(record) and _is_within_reach(record)
    failure = None
    if is_dead and not dry_run:
        try:
            _reap(directory, record)
        except (*_OBSTACLES, OSError) as error:
            failure = str(error)
    return Abandoned(record, processes, is_dead, failure)


def _reap(directory: int, record: Record) -> None:
    """Remove a dead run's chains, reserved ports, cgroup and record.

    Raises PortChainsUnavailable, ReservationUnavailable or CgroupUnavailable for what cannot be removed; then the
    record stays.
    """
    if record.stands_here:
        for layer in record.layers:
            if layer.backend in NAMES:
                open_chains(layer.backend, record.run_id).remove()
        reserved.give_back(directory, record.run_id)
    else:
        reserved.forget(directory, record)
    cgroup = open_job_cgroup(record.cgroup) if record.cgroup else None
    if cgroup is not None:
        cgroup.remove()
        cgroup.close()
    run_directory.remove(directory, record.run_id)


def _partial_files(directory: int) -> tuple[str, ...]:
    """Return what killed guards were writing. A directory of such a name is not their work, and stays."""
    names = run_directory.partial(directory)
    return tuple(name for name in names if not stat.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode))


def _is_dead(record: Record) -> bool:
    if not record.is_abandoned:
        return False
    if record.boot_id != proc.boot_id() or not record.cgroup:
        return True
    cgroup = open_job_cgroup(record.cgroup)
    if cgroup is None:
        return True
    populated = cgroup.populated()
    cgroup.close()
    return not populated


def _processes(record: Record) -> frozenset[int] | None:
    cgroup = open_job_cgroup(record.cgroup) if record.cgroup else None
    if cgroup is None:
        return None
    try:
        return frozenset(cgroup.processes())
    finally:
        cgroup.close()


def _is_within_reach(record: Record) -> bool:
    """Chains live in a network namespace: reachable from within, or gone with it, or of a boot that is over."""
    if record.boot_id != proc.boot_id() or record.network == proc.namespace("net"):
        return True
    return not proc.namespace_exists("net", record.network)
