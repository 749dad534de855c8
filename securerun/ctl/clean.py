"""securerunctl clean: remove what dead runs left, and only that."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from securerun.ctl.status import open_records, user_of
from securerun.guard import cleaning, records
from securerun.guard.cleaning import Abandoned, Remains, Rules
from securerun.guard.records import Record
from securerun.linux import proc
from securerun.text import printable

# Tables of nftables go with the guard that owns them.
_OUTLIVING = ("iptables", "legacy")


def clean_host(*, dry_run: bool) -> int:
    """Remove what dead runs left, with a line for each. Return the exit status: 1 when something of them stays.

    Raises PrivilegeError for whoever may not do that.
    """
    # Nothing is printed before the host's lock is free: a reader of this output that takes its time must not keep it.
    remains = cleaning.clean(dry_run=dry_run) if _may_hold_something(dry_run) else Remains()
    done, failures = list(_done(remains, dry_run)), list(_failures(remains))
    if not done and not failures:
        print("nothing to remove")
    for line in done:
        print(printable(line))
    for line in (*failures, *_notes(remains)):
        print(f"securerunctl: {printable(line)}", file=sys.stderr)
    return 1 if failures else 0


def _may_hold_something(dry_run: bool) -> bool:
    """Return whether to look at all: the host's lock makes the directory of records, and removes an empty one."""
    directory = open_records()
    if directory is not None:
        os.close(directory)
        if not dry_run or any(records.DIRECTORY.iterdir()):
            return True
    # Without the right to it nobody is told, nor has made any.
    return os.geteuid() == 0 and proc.governs_network() and bool(cleaning.unrecorded_rules())


def _done(remains: Remains, dry_run: bool) -> Iterator[str]:
    verb = "would remove" if dry_run else "removed"
    for name in remains.partial:
        yield f"{verb} {records.DIRECTORY / name}, which a killed guard was writing"
    verb = "would remove what is left of" if dry_run else "removed what was left of"
    for run in remains.abandoned:
        if run.is_dead and run.failure is None:
            yield f"{verb} {_named(run.record)}: {', '.join(_left_of(run))}"
    for rules in remains.rules:
        if not rules.stands and rules.failure is None:
            yield f"{verb} run {rules.run_id}, which has no record here (a container's, then): {_what(rules)}"


def _failures(remains: Remains) -> Iterator[str]:
    for run in remains.abandoned:
        if run.failure is not None:
            yield f"what is left of {_named(run.record)} cannot be removed: {run.failure}"
    for rules in remains.rules:
        if rules.failure is not None:
            yield f"{_what(rules)} that run {rules.run_id} left cannot be removed: {rules.failure}"
    for run in remains.abandoned:
        if not run.is_dead:
            yield _obstacle(run)


def _what(rules: Rules) -> str:
    return f"rules in {rules.backend}" if rules.backend else "reserved ports"


def _notes(remains: Remains) -> Iterator[str]:
    for name in remains.foreign:
        yield f"left alone: {records.DIRECTORY / name} is no record that this securerun can read"


def _named(record: Record) -> str:
    command = f" ({record.command})" if record.command else ""
    container = f" in container {record.container}" if record.container else ""
    return f"run {record.run_id} of {user_of(record)}{container}{command}"


def _left_of(run: Abandoned) -> Iterator[str]:
    record = run.record
    if record.stands_here:
        yield from (f"rules in {layer.backend}" for layer in record.layers if layer.backend in _OUTLIVING)
        if record.reserved:
            yield "reserved ports"
    if run.has_cgroup:
        yield f"cgroup {record.cgroup}"
    yield "its record"


def _obstacle(run: Abandoned) -> str:
    """Return why a run whose launcher and guard are gone cannot be cleaned up after from here."""
    record = run.record
    if run.runs:
        return f"{_named(record)} has no guard, but {run.runs}; end that, then clean again"
    return (
        f"{_named(record)} has rules in another network namespace, {record.network} (`lsns -t net` lists them); "
        "run securerunctl clean in there"
    )
