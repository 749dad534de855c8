"""securerunctl clean: remove what dead runs left, and only that."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from securerun.ctl.status import open_records
from securerun.firewall.chains import PortChainsUnavailable
from securerun.guard import reaper, records, reserved
from securerun.guard.cgroup import open_job_cgroup
from securerun.guard.records import Record
from securerun.host.account import name_of
from securerun.linux.cgroups import CgroupUnavailable
from securerun.linux.port_ranges import ReservationUnavailable
from securerun.text import printable

# Tables of nftables go with the guard that owns them.
_OUTLIVING = ("iptables", "legacy")
_PIDS_NAMED = 8


@dataclass
class Outcome:
    """What there is to tell. done: what was or would be removed; failures: what of dead runs stays; notes: the rest."""

    done: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def clean_host(*, dry_run: bool) -> int:
    """Remove what dead runs left, with a line for each. Returns the exit status: 1 when something of them stays.

    Raises PrivilegeError for whoever may not do that.
    """
    outcome = Outcome()
    if _may_hold_something(dry_run):
        with records.host_lock() as directory:
            _clean(directory, outcome, dry_run)
    # Only now: a reader of this output that takes its time must not keep the host's lock.
    if not outcome.done and not outcome.failures:
        print("nothing to remove")
    for line in outcome.done:
        print(printable(line))
    for line in (*outcome.failures, *outcome.notes):
        print(f"securerunctl: {printable(line)}", file=sys.stderr)
    return 1 if outcome.failures else 0


def _may_hold_something(dry_run: bool) -> bool:
    """Return whether to look at all: `host_lock` makes the directory of records, and removes an empty one."""
    directory = open_records()
    if directory is None:
        return False
    os.close(directory)
    return not dry_run or any(records.DIRECTORY.iterdir())


def _clean(directory: int, outcome: Outcome, dry_run: bool) -> None:
    _clean_partial(directory, outcome, dry_run)
    readable = records.read_all(directory)
    dead = reaper.dead_runs(directory)
    for record in dead:
        _clean_run(directory, record, outcome, dry_run)
    gone = {record.run_id for record in dead}
    outcome.failures += [_obstacle(record) for record in readable if record.is_abandoned and record.run_id not in gone]
    ours = {*(f"{record.run_id}.json" for record in readable), *_partial(directory), *reserved.ledgers(directory)}
    for name in sorted(set(os.listdir(directory)) - ours):
        outcome.notes.append(f"left alone: {records.DIRECTORY / name} is no record that this securerun can read")


def _clean_partial(directory: int, outcome: Outcome, dry_run: bool) -> None:
    partial = _partial(directory)
    if not dry_run:
        records.remove_partial(directory)
    verb = "would remove" if dry_run else "removed"
    outcome.done += [f"{verb} {records.DIRECTORY / name}, which a killed guard was writing" for name in partial]


def _partial(directory: int) -> list[str]:
    """Return what a killed guard was writing. A directory of such a name is not its work, and stays."""
    names = records.partial(directory)
    return [name for name in names if not stat.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode)]


def _clean_run(directory: int, record: Record, outcome: Outcome, dry_run: bool) -> None:
    remains = ", ".join(_remains(record))
    if dry_run:
        outcome.done.append(f"would remove what is left of {_named(record)}: {remains}")
        return
    try:
        reaper.reap(directory, record)
    except (PortChainsUnavailable, ReservationUnavailable, CgroupUnavailable, OSError) as error:
        outcome.failures.append(f"what is left of {_named(record)} cannot be removed: {error}")
        return
    outcome.done.append(f"removed what was left of {_named(record)}: {remains}")


def _named(record: Record) -> str:
    command = f" ({record.command})" if record.command else ""
    return f"run {record.run_id} of {name_of(record.user)}{command}"


def _remains(record: Record) -> Iterator[str]:
    if record.stands_here:
        yield from (f"rules in {layer.backend}" for layer in record.layers if layer.backend in _OUTLIVING)
        if record.reserved:
            yield "reserved ports"
    if record.cgroup and _processes(record) is not None:
        yield f"cgroup {record.cgroup}"
    yield "its record"


def _obstacle(record: Record) -> str:
    """Return why a run whose launcher and guard are gone cannot be cleaned up after from here."""
    processes = sorted(_processes(record) or ())
    if processes:
        pids = " ".join(map(str, processes[:_PIDS_NAMED])) + (" ..." if len(processes) > _PIDS_NAMED else "")
        return f"{_named(record)} has no guard, but processes of it still run ({pids}); end them, then clean again"
    return (
        f"{_named(record)} has rules in another network namespace, {record.network} (`lsns -t net` lists them); "
        "run securerunctl clean in there"
    )


def _processes(record: Record) -> set[int] | None:
    """Return what runs in the run's cgroup; None where it has none any more."""
    cgroup = open_job_cgroup(record.cgroup) if record.cgroup else None
    if cgroup is None:
        return None
    try:
        return cgroup.processes()
    finally:
        cgroup.close()
