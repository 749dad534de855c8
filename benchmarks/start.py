"""How long the commands take to start that need no torch, beside a Python that does nothing; and what Slurm starts for
each task, and an engine for each container, beside one that does not even load `site`.

In rounds, each command once a round, in an order that turns from round to round, so that what changes on the machine
meanwhile meets all of them. Reads, and changes nothing.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from findings import Finding, finding, progress, run
from task_prolog import COMMAND, environment

from securerun.guard import program

GOAL = 0.2
ROUNDS = 20
PYTHON = "python -c pass"
# What these load besides is the standard library's for the most part; of processor time, against a bare interpreter.
BARE, TASK_PROLOG, HOOK = "python -I -S -c pass", "TaskProlog of Slurm's", "hook of containers"
GOALS = {TASK_PROLOG: 14.0, HOOK: 7.0}
# A hook has no container here, and says so once it has loaded all.
_STATUS = {HOOK: 78}
_COMMANDS = {
    "securerunctl --help": ["--help"],
    "securerunctl status": ["status"],
    "securerunctl exec --help": ["exec", "--help"],
    "securerunctl matrix --help": ["matrix", "--help"],
    "securerunctl audit --help": ["audit", "--help"],
}


class Start(NamedTuple):
    """Seconds until a command has ended and its output is closed, and the processor's seconds among them."""

    wall: float
    processor: float


def commands() -> dict[str, list[str]]:
    """What is measured, by name; commands that this securerunctl does not have are left out."""
    securerunctl = str(Path(sys.executable).parent / "securerunctl")
    found = {name: [securerunctl, *words] for name, words in _COMMANDS.items()}
    return {
        PYTHON: [sys.executable, "-c", "pass"],
        **{name: argv for name, argv in found.items() if _runs(argv)},
        BARE: [sys.executable, "-I", "-S", "-c", "pass"],
        TASK_PROLOG: COMMAND,
        HOOK: [sys.executable, *program.hook()[1:]],
    }


def _runs(argv: list[str]) -> bool:
    """Once unmeasured, so that files are cached for all."""
    return subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def start(argv: list[str], status: int = 0, variables: Mapping[str, str] | None = None) -> Start:
    before, begin = _processor(), time.perf_counter()
    done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, env=variables)
    if done.returncode != status:
        raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stderr.decode()}")
    return Start(time.perf_counter() - begin, _processor() - before)


def _processor() -> float:
    """The processor's seconds that went to children which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(wanted: dict[str, list[str]], rounds: int) -> dict[str, list[Start]]:
    measured: dict[str, list[Start]] = {name: [] for name in wanted}
    names = list(wanted)
    with tempfile.TemporaryDirectory() as place, environment(Path(place)) as of_task:
        for number in range(rounds):
            turned = names[number % len(names) :] + names[: number % len(names)]
            for name in turned:
                variables = of_task if name == TASK_PROLOG else None
                measured[name].append(start(wanted[name], _STATUS.get(name, 0), variables))
            progress(f"round {number + 1} of {rounds}")
    return measured


def found_in(measured: dict[str, list[Start]]) -> Iterator[Finding]:
    nothing = finding(f"start.{PYTHON}", f"{PYTHON}, from start to end", "s", [one.wall for one in measured[PYTHON]])
    yield nothing
    bare = finding(f"start.processor.{BARE}", f"{BARE}: processor time", "s", [one.processor for one in measured[BARE]])
    yield bare
    for name, goal in GOALS.items():
        samples = [one.processor for one in measured[name]]
        yield finding(f"start.processor.{name}", f"{name}: processor time", "s", samples, against=bare, goal=goal)
    for name, starts in measured.items():
        if name in (BARE, *GOALS):
            continue
        if name != PYTHON:
            yield finding(f"start.{name}", f"{name}, from start to end", "s", [one.wall for one in starts], goal=GOAL)
        processor = [one.processor for one in starts]
        yield finding(f"start.processor.{name}", f"{name}: processor time", "s", processor)


def main() -> None:
    run("start", __doc__, lambda options: found_in(measure(commands(), 2 if options.quick else ROUNDS)))


if __name__ == "__main__":
    main()
