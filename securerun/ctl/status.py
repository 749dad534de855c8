"""securerunctl status: the runs of this host, as the records in /run/securerun tell. Reads, and changes nothing.

The guard writes the counters into its run's record every few seconds; asking the shield itself instead would take off
a self-test under way (`shield.adopt`), so the record is what is shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Callable

from securerun.errors import PrivilegeError, SecurerunError
from securerun.firewall.policy import Admission, Denial, Policy, opened
from securerun.guard import records
from securerun.guard.documents import denial_document, layer_document, opening_document, policy_document
from securerun.guard.records import Record
from securerun.host.account import name_of
from securerun.linux import capabilities, proc
from securerun.protection import apart_runs
from securerun.text import nodes_guarded, printable, span

if TYPE_CHECKING:
    from securerun.protection.client import Guard

STATES = ("guarding", "draining", "stale")
_NO_RUNS = "no runs on this host"
_HEADINGS = ("RUN", "STATE", "USER", "PID", "STARTED", "COMMAND")
_INDENT = " " * 14  # below STATE
_NAMED = 8
_WATCH_SECONDS = 1.0
# Reading takes long where runs have 100,000 peers; a watch then looks less often than once a second.
_MOST_CPU = 0.2


def show(*, as_json: bool, watch: bool) -> None:
    """Print the runs of this host, once or every second until Ctrl-C.

    Raises PrivilegeError for whoever may not read the records.
    """
    if not watch:
        _print(_json_lines(indent=2) if as_json else _table_lines())
    elif sys.stdout.isatty() and not as_json:
        _watch_on_terminal()
    else:
        _repeat(lambda: _print(_json_lines() if as_json else [*_table_lines(), ""]))


def read_runs() -> tuple[Record, ...]:
    """Return the records of this host's runs, for an ordinary user their own; none where no run has made a record.

    Raises PrivilegeError for whoever may not read them and has no guard who does.
    """
    apart = apart_runs.read()
    try:
        if _are_elsewhere():
            return (*_read_own_runs(known=True), *apart)
        return (*records.read_host(), *apart)
    except PermissionError:
        return (*_read_own_runs(known=bool(apart)), *apart)
    except OSError as error:
        raise SecurerunError(_no_directory(error)) from error


def _are_elsewhere() -> bool:
    """Return whether runs may be recorded where a container does not see it: by a guard of its node's."""
    if records.DIRECTORY.is_dir() or _may_guard():
        return False
    from securerun.protection import ways  # where there are no records

    return not ways.by_socket_alone()[0].obstacle


def _may_guard() -> bool:
    return os.geteuid() == 0 and capabilities.NET_ADMIN in capabilities.effective() and proc.governs_network()


@cache
def _guard() -> Guard:
    """One guard for all the looks of a watch; root needs none, nor what it takes to speak to one."""
    from securerun.protection import ways
    from securerun.protection.client import Guard

    return Guard(by=ways.by_socket_alone) if _are_elsewhere() else Guard()


def _read_own_runs(*, known: bool) -> tuple[Record, ...]:
    """Ask a guard for them. known: whether the user has runs that take none, and so may have no guard to ask."""
    from securerun.protection.client import Refusal

    try:
        return tuple(map(_told, _guard().report()))
    except Refusal:
        raise
    except PrivilegeError as error:
        if known:
            return ()
        raise PrivilegeError(_not_readable()) from error


def _told(document: Mapping[str, Any]) -> Record:
    """Return a record that a guard has told, with what it says of whether the run's guard lives."""
    lives = document.get("guard_lives")  # of a guard of the release before it is not said
    return replace(records.understood(document), guard_told=lives if isinstance(lives, bool) else None)


def open_records() -> int | None:
    """Open the record directory; None where there is none. Raises PrivilegeError or SecurerunError."""
    try:
        return records.open_to_read()
    except PermissionError as error:
        raise PrivilegeError(_not_readable()) from error
    except OSError as error:
        raise SecurerunError(_no_directory(error)) from error


def _not_readable() -> str:
    return f"the records in {records.DIRECTORY} may not be read; {capabilities.run_as_root()}"


def _no_directory(error: OSError) -> str:
    return f"{records.DIRECTORY} is no directory of records: {error.strerror}; remove it"


def document(record: Record) -> dict[str, Any]:
    """One run as `status --json` prints it."""
    policy = policy_document(record.policy)
    return {
        "run_id": record.run_id,
        "pid": record.launcher,
        "guard_pid": record.guard,
        "user": user_of(record),
        "started": _started(record).isoformat(timespec="seconds"),
        "command": record.command,
        "state": state(record),
        "layers": [layer_document(layer) for layer in record.layers],
        "void": record.void or None,
        "ports": policy["ports"],
        "peers": policy["peers"],
        "public": [opening_document(opening) for opening in record.policy.public],
        "key": {"fingerprint": record.key, "source": record.key_source or None} if record.key else None,
        "nodes_guarded": record.nodes_guarded or None,
        "nodes": record.nodes or None,
        "slurm_job": record.slurm_job or None,
        "interface": ",".join(record.policy.interfaces) or None,
        "denied": [denial_document(denial) for denial in record.denied],
    }


def state(record: Record) -> str:
    """Return the state of a run, from its record and from whether its guard still runs.

    guarding: the launcher holds the lease, from before the first layer is installed. The job runs.
    draining: the launcher has let go, or is gone; the layers stand until the job's last process has ended. What a job
    that ended well left running is waited for, what a failed one left is ended (`securerun.guard.watch`, which writes
    it into the record).
    stale: the guard is gone, whatever the job does. A launcher that still runs starts another guard, which adopts the
    lease; without one, the next run on the host or `securerunctl clean` reaps it once no process of it is left.
    """
    if not record.guard_lives:
        return "stale"
    return "draining" if record.draining else "guarding"


def _json_lines(indent: int | None = None) -> Iterator[str]:
    yield json.dumps({"runs": [document(record) for record in read_runs()]}, indent=indent)


def _table_lines() -> Iterator[str]:
    """Draw a table with one row a run; its details are in the lines below the row."""
    runs = read_runs()
    if not runs:
        yield _NO_RUNS
        return
    rows = [_row(record) for record in runs]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows)]
    yield _aligned(_HEADINGS, widths)
    for record, row in zip(runs, rows):
        yield _aligned(row, widths)
        for label, text in _details(record):
            yield f"{_INDENT}{label:<10}{printable(text)}"


def _row(record: Record) -> tuple[str, ...]:
    started = _started(record).strftime("%Y-%m-%d %H:%M:%S")
    pid = str(record.launcher)
    return (record.run_id, state(record), user_of(record), pid, started, printable(record.command))


def user_of(record: Record) -> str:
    """Return a user by the name, or the number, that they have here: the host may have another number for them.

    A user id of a container's is nobody's of the host's, whoever has that number here.
    """
    inner = proc.inner_user(record.user)
    number = record.user if inner is None else inner
    return str(number) if record.container else name_of(number)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def _details(record: Record) -> Iterator[tuple[str, str]]:
    if state(record) == "stale":
        yield "guard", _without_guard(record)
    if record.container:
        yield "in", f"container {record.container}"
    for layer in record.layers:
        yield "closed by", str(layer)
    if record.void:
        yield "shield", f"holds no more: {record.void}"
    if record.policy.ports:
        yield "ports", _some([f"{port} {port.purpose}" for port in record.policy.ports], "; ")
    yield "open to", _open_to(record)
    if record.key:
        source = f" of {record.key_source}" if record.key_source else ""
        yield "key", f"{record.key}{source}; {nodes_guarded(record.nodes_guarded, record.nodes)}"
    if record.policy.public:
        yield "public", f"port {opened(record.policy.public)}"
    if record.left_open:
        ranges = [span(first, last) for first, last in record.left_open]
        yield "open", f"to every host: ports {_some(ranges, ', ')}"
    for denial in record.denied[:_NAMED]:
        port = denial.port or "a port that could not be read"
        yield "blocked", f"{denial.source} → {port}, packets: {denial.packets}{_why(record, denial)}"
    if len(record.denied) > _NAMED:
        yield "blocked", f"and {len(record.denied) - _NAMED} more pairs of source and port"


def _why(record: Record, denial: Denial) -> str:
    """Which rule turned somebody away, where it is not that no peer has this address."""
    from securerun.protection import denials  # few runs turn anybody away

    policy = record.policy
    required = policy.admission is not Admission.EITHER
    key = denials.KeyInForce(record.key, required) if record.key else None
    why = denials.reason(policy, denial.source, port=denial.port, key=key)
    return "" if why is denials.Reason.STRANGER else f"; {why.value}"


def _without_guard(record: Record) -> str:
    gone = f"process {record.guard} is gone"
    running = sorted(records.processes_of(record)) if record.is_abandoned else []
    if not running:
        return f"{gone}; try `securerunctl clean`"
    return f"{gone}, and processes of the job still run ({_some(list(map(str, running)), ' ')}); end them, then clean"


def _open_to(record: Record) -> str:
    policy = record.policy
    has_key = f"whoever has the job's key{_counting(policy)}"
    if record.key and not policy.peers:
        return has_key
    if not policy.peers:
        return "no other host"
    through = f" through {', '.join(policy.interfaces)}" if policy.interfaces else ""
    keys = {Admission.EITHER: f", and {has_key}", Admission.BOTH: ", of these to who has the job's key"}
    return _some([str(peer) for peer in policy.peers], ", ") + through + keys.get(policy.admission, "")


def _counting(policy: Policy) -> str:
    return f" and comes from {_some([*map(str, policy.tags_from)], ', ')}" if policy.tags_from else ""


def _some(parts: Sequence[str], separator: str) -> str:
    """Return the first few, and how many more there are."""
    more = [f"and {len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
    return separator.join([*parts[:_NAMED], *more])


def _started(record: Record) -> datetime:
    """Return when the run started, in local time. A record may hold a number that is no time."""
    try:
        return datetime.fromtimestamp(record.started).astimezone()
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0).astimezone()


def _print(lines: Iterable[str]) -> None:
    """Print lines: cut to its width on a terminal, whole into anything else."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False)
        for line in lines:
            console.print(Text(line), no_wrap=True, overflow="ellipsis")
        return
    for line in lines:
        print(line)
    sys.stdout.flush()


def _watch_on_terminal() -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, screen=True) as live:
        _repeat(
            lambda: live.update(Text("\n".join(_table_lines()), no_wrap=True, overflow="ellipsis"), refresh=True),
        )


def _repeat(look: Callable[[], None]) -> None:
    """Look every second until Ctrl-C, or less often where that would take too much of a processor."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            before = time.process_time()
            look()
            time.sleep(max(_WATCH_SECONDS, (time.process_time() - before) / _MOST_CPU))
