"""How long `securerunctl audit` takes for a million files, compared to `find -perm` on the same tree.

Makes the tree in a directory of its own and removes it. Both commands are started the same way, in pairs whose order
alternates (AB BA), so that what changes on the machine meanwhile meets both; once with a tree in order, and once with
one in which every file is more open than its row. Prints one JSON text; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GOAL = 2.0
FIND = shutil.which("find") or "/usr/bin/find"
SECURERUNCTL = str(Path(sys.executable).parent / "securerunctl")
IN_ORDER, TOO_OPEN = 0o640, 0o644
# What a job leaves: shards of weights and samples, logs, metadata, a few programs.
ENDINGS = (".bin", ".jpg", ".pt", ".json", ".idx", ".txt", "", ".log")
FILES_A_DIRECTORY = 1000
DIRECTORIES_A_DIRECTORY = 50


class Cost(NamedTuple):
    """Seconds from start to end, and of processors."""

    seconds: float
    cpu: float


class Pair(NamedTuple):
    find: Cost
    audit: Cost


def file_names(count: int) -> Iterator[tuple[str, list[str]]]:
    """Directories, and the names of the files in each."""
    for number, first in enumerate(range(0, count, FILES_A_DIRECTORY)):
        names = [f"part-{at:05}{ENDINGS[at % len(ENDINGS)]}" for at in range(min(FILES_A_DIRECTORY, count - first))]
        yield f"{number // DIRECTORIES_A_DIRECTORY:03}/{number % DIRECTORIES_A_DIRECTORY:03}", names


def make_tree(top: Path, count: int) -> None:
    os.umask(0o027)
    for path, names in file_names(count):
        (top / path).mkdir(parents=True)
        directory = os.open(top / path, os.O_RDONLY | os.O_DIRECTORY)
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, IN_ORDER, dir_fd=directory))
        os.close(directory)


def change_modes(top: Path, count: int, mode: int) -> None:
    for path, names in file_names(count):
        directory = os.open(top / path, os.O_RDONLY | os.O_DIRECTORY)
        for name in names:
            os.chmod(name, mode, dir_fd=directory)
        os.close(directory)


def run(command: list[str], statuses: tuple[int, ...]) -> Cost:
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in statuses:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    return Cost(round(seconds, 3), round(usage.ru_utime + usage.ru_stime, 3))


def measure(top: Path, pairs: int, expected: int) -> list[Pair]:
    # The bits that no row of files allows others: what somebody would look for without securerun.
    commands = {
        "find": ([FIND, str(top), "-perm", "/007"], (0,)),
        "audit": ([SECURERUNCTL, "audit", str(top)], (expected,)),
    }
    for command in commands.values():  # once unmeasured, so that inodes are cached for both
        run(*command)
    measured = []
    for number in range(pairs):
        order = Pair._fields if number % 2 == 0 else Pair._fields[::-1]
        measured.append(Pair(**{name: run(*commands[name]) for name in order}))
        print(f"pair {number + 1} of {pairs}: {measured[-1]}", file=sys.stderr)
    return measured


def summary(pairs: list[Pair]) -> dict[str, object]:
    costs = {name: [pair[at] for pair in pairs] for at, name in enumerate(Pair._fields)}
    seconds = {name: statistics.median(cost.seconds for cost in of_one) for name, of_one in costs.items()}
    cpu = {name: statistics.median(cost.cpu for cost in of_one) for name, of_one in costs.items()}
    ratio = seconds["audit"] / seconds["find"]
    return {
        "median_seconds": seconds,
        "median_cpu_seconds": cpu,
        "pairs": [{name: pair[at]._asdict() for at, name in enumerate(Pair._fields)} for pair in pairs],
        "ratio": round(ratio, 3),
        "ratios_of_pairs": [round(pair.audit.seconds / pair.find.seconds, 3) for pair in pairs],
        "cpu_ratio": round(cpu["audit"] / cpu["find"], 3),
        "goal_met": ratio <= GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000, help="files of the tree (default: 1000000)")
    parser.add_argument("--pairs", type=int, default=6, help="measured pairs for each tree (default: 6)")
    parser.add_argument("--directory", type=Path, help="where the tree is made (default: where temporary files are)")
    options = parser.parse_args()
    if not 1 <= options.files <= 10_000_000 or not 1 <= options.pairs <= 100:
        parser.error("--files must be between 1 and 10000000, --pairs between 1 and 100")
    with tempfile.TemporaryDirectory(prefix="securerun-audit-", dir=options.directory) as name:
        top = Path(name)
        print(f"making {options.files} files in {top}", file=sys.stderr)
        top.chmod(0o750)
        make_tree(top, options.files)
        trees = {"in_order": summary(measure(top, options.pairs, 0))}
        change_modes(top, options.files, TOO_OPEN)
        trees["too_open"] = summary(measure(top, options.pairs, 1))
    report = {
        "files": options.files,
        "trees": trees,
        "goal": GOAL,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
