"""securerunctl metrics: this host's runs as numbers, for the textfile collector of Prometheus' node_exporter.

Whoever can reach node_exporter reads them, so there is no command, no peer and no address of anybody's among them.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Callable

from securerun.ctl import doctor, status
from securerun.errors import PrivilegeError, SecurerunError, UsageError
from securerun.finding import Finding
from securerun.firewall import backends
from securerun.firewall.policy import NAMESPACE, SHIELD
from securerun.guard.records import Record
from securerun.linux import capabilities
from securerun.preflight import abilities
from securerun.text import printable

# What node_exporter reads: other files of the directory it passes over, half-written ones among them.
_ENDING = ".prom"
# node_exporter is a user of its own.
_MODE = 0o644
# A user may have many runs, and each series stays with Prometheus for as long as it keeps anything.
_MOST_RUNS = 1024
# What every reader of 64-bit floats takes for the same whole number.
_LARGEST = 2**53
_LAYERS = (SHIELD, *backends.NAMES, NAMESPACE)

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True)
class _Family:
    """One metric: what it is called, of which kind, what it means, and its samples."""

    name: str
    kind: str
    meaning: str
    samples: Sequence[Sample]


def write(output: str | None) -> None:
    """Print the metrics of this host, or write them to a file, all at once.

    Raises PrivilegeError for whoever may not read the records, UsageError for a file that node_exporter would not read
    and SecurerunError for one that cannot be written; then what was there stays.
    """
    if output is None:
        print(_text(), end="")
        return
    path = Path(output)
    if path.suffix != _ENDING:
        raise UsageError(f"--output {output}: node_exporter reads files named *{_ENDING} alone; name it such")
    content = _text().encode()
    try:
        _replace(path, content)
    except OSError as error:  # its own words name the file that was to take the place of this one
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> SecurerunError:
    if isinstance(error, PermissionError):
        return PrivilegeError(f"--output {path}: {error.strerror}; {capabilities.run_as_root()}")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return UsageError(f"--output {path}: there is no directory {path.parent}; make it, or name a file in another")
    if isinstance(error, IsADirectoryError):
        return UsageError(f"--output {path} is a directory; name a file in it, as in {path / 'securerun.prom'}")
    return SecurerunError(f"--output {path} cannot be written ({error.strerror}); mend that, or name a file elsewhere")


def _text() -> str:
    families = (*_of_host(), *_of_runs(status.read_runs()))
    return "".join(f"{line}\n" for family in families for line in _lines(family))


def _of_host() -> Iterator[_Family]:
    yield _Family("securerun_info", "gauge", "The version of securerun.", [({"version": _version()}, 1)])
    found = Counter(finding.name for finding in _findings())
    meaning = "What `securerunctl doctor` finds on this host, by check, the shell's umask and what finds nothing aside."
    yield _Family("securerun_findings", "gauge", meaning, [({"check": name}, number) for name, number in found.items()])


def _findings() -> tuple[Finding, ...]:
    """What doctor finds, less what is about the shell that it is called from: here that is a timer."""
    return tuple(finding for finding in doctor.findings(abilities.find()) if finding.name != "umask")


def _of_runs(runs: Sequence[Record]) -> Iterator[_Family]:
    states = Counter(map(status.state, runs))
    known = [({"state": state}, states[state]) for state in status.STATES]
    yield _Family("securerun_runs", "gauge", "Runs on this host, by state.", known)
    layers = Counter(name for run in runs for name in {layer.backend for layer in run.layers})
    counted = [({"layer": name}, layers[name]) for name in dict.fromkeys((*_LAYERS, *layers))]
    yield _Family("securerun_layers", "gauge", "Runs that are guarded by a layer.", counted)
    lost = sum(bool(run.void) for run in runs)
    yield _Family("securerun_shields_lost", "gauge", "Runs whose shield holds no more.", [({}, lost)])
    untold = max(0, len(runs) - _MOST_RUNS)
    meaning = "Runs beyond those that have numbers of their own below."
    yield _Family("securerun_runs_untold", "gauge", meaning, [({}, untold)])
    told = runs[:_MOST_RUNS]
    info = [({**_of(run), "user": status.user_of(run), "state": status.state(run)}, 1) for run in told]
    yield _Family("securerun_run_info", "gauge", "A run, whose it is, and its state.", info)
    for name, kind, meaning, value in _PER_RUN:
        numbers = ((run, value(run)) for run in told)
        samples = [(_of(run), number) for run, number in numbers if number is not None]
        yield _Family(f"securerun_run_{name}", kind, meaning, samples)


def _of(run: Record) -> dict[str, str]:
    return {"run": run.run_id}


_PER_RUN: tuple[tuple[str, str, str, Callable[[Record], float | None]], ...] = (
    ("start_time_seconds", "gauge", "When a run started, in seconds since the epoch.", lambda run: run.started),
    (
        *("denied_packets_total", "counter", "Packets of strangers that a run's layers turned away."),
        lambda run: sum(denial.packets for denial in run.denied) + run.denied_more,
    ),
    (
        *("guard_restarts_total", "counter", "Guards of a run that died and were replaced."),
        lambda run: run.guard_restarts,
    ),
    (
        *("ports_left_open", "gauge", "Ports of a run that are open to every host."),
        lambda run: sum(last - first + 1 for first, last in run.left_open),
    ),
    (
        *("nodes_guarded", "gauge", "Nodes of a run that were seen to have its key; absent where a run has none."),
        lambda run: run.nodes_guarded if run.key else None,
    ),
    (
        *("nodes", "gauge", "Nodes of a run that has a key; absent where that is not known."),
        lambda run: run.nodes if run.key and run.nodes else None,
    ),
)


def _version() -> str:
    try:
        return metadata.version("securerun")
    except metadata.PackageNotFoundError:
        return "unknown"


def _lines(family: _Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.meaning}"
    yield f"# TYPE {family.name} {family.kind}"
    for labels, value in family.samples:
        yield f"{family.name}{_written_labels(labels)} {_written(value)}"


def _written_labels(labels: Mapping[str, str]) -> str:
    pairs = [f'{name}="{_escaped(text)}"' for name, text in labels.items()]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(text: str) -> str:
    """Write a label's value as Prometheus' text format, version 0.0.4, has it."""
    return printable(text).replace("\\", r"\\").replace('"', r"\"")


def _written(value: float) -> str:
    """Write a number that may be an ordinary user's own, of any size or none."""
    if isinstance(value, int):
        return str(max(0, min(value, _LARGEST)))
    return repr(value) if math.isfinite(value) else "0"


def _replace(path: Path, content: bytes) -> None:
    """Have a file be either what it was or all of this. What is in its place, a link too, is no part of the way."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, _MODE)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
