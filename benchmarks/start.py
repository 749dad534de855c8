"""How long the commands take to start that need no torch, beside a Python that does nothing.

In rounds, each command once a round, in an order that turns from round to round, so that what changes on the machine
meanwhile meets all of them. Prints one JSON text; progress goes to standard error. Reads, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

GOAL = 0.2
PYTHON = "python -c pass"
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
    program = str(Path(sys.executable).parent / "securerunctl")
    found = {name: [program, *words] for name, words in _COMMANDS.items()}
    return {PYTHON: [sys.executable, "-c", "pass"], **{name: argv for name, argv in found.items() if _runs(argv)}}


def _runs(argv: list[str]) -> bool:
    """Once unmeasured, so that files are cached for all."""
    return subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def start(argv: list[str]) -> Start:
    before, begin = _processor(), time.perf_counter()
    subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, check=True)
    return Start(time.perf_counter() - begin, _processor() - before)


def _processor() -> float:
    """The processor's seconds that went to children which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(wanted: dict[str, list[str]], rounds: int) -> dict[str, list[Start]]:
    measured: dict[str, list[Start]] = {name: [] for name in wanted}
    names = list(wanted)
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            measured[name].append(start(wanted[name]))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return measured


def row(name: str, starts: list[Start], nothing: list[Start]) -> dict[str, object]:
    seconds = [one.wall for one in starts]
    median = statistics.median(seconds)
    return {
        "command": name,
        "median": round(median, 4),
        "least": round(min(seconds), 4),
        "most": round(max(seconds), 4),
        "above_python": round(median - statistics.median(one.wall for one in nothing), 4),
        "median_processor": round(statistics.median(one.processor for one in starts), 4),
        "goal": GOAL,
        "goal_met": median < GOAL,
        "seconds": [round(one, 4) for one in seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="starts of each command (default: 20)")
    rounds = parser.parse_args().rounds
    if not 1 <= rounds <= 1000:
        parser.error("--rounds must be between 1 and 1000")
    measured = measure(commands(), rounds)
    rows = [row(name, starts, measured[PYTHON]) for name, starts in measured.items()]
    machine = {"cpus": os.cpu_count(), "kernel": os.uname().release, "python": sys.version.split()[0]}
    print(json.dumps({"start": rows, **machine}, indent=2))


if __name__ == "__main__":
    main()
