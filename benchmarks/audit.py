"""How long `securerunctl audit` takes for a million files, compared to `find -perm` on the same tree.

Makes the tree in a directory of its own and removes it. Both commands are started the same way, in pairs whose order
alternates (AB BA), so that what changes on the machine meanwhile meets both; once with a tree in order, and once with
one in which every file is more open than its row. TMPDIR says where.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import findings
from findings import Finding, finding, progress

GOAL, GOAL_FILES = 2.0, 1_000_000
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
        progress(f"pair {number + 1} of {pairs}: {measured[-1]}")
    return measured


def found_in(tree: str, pairs: list[Pair], files: int) -> Iterator[Finding]:
    what = f"a tree of {files} files, {tree}"
    seconds = {name: [pair[at].seconds for pair in pairs] for at, name in enumerate(Pair._fields)}
    cpu = {name: [pair[at].cpu for pair in pairs] for at, name in enumerate(Pair._fields)}
    place = tree.replace(" ", "_")
    find = finding(f"audit.{place}.find", f"find -perm of {what}", "s", seconds["find"])
    find_cpu = finding(f"audit.{place}.find.cpu", f"{find.what}: processors' time", "s", cpu["find"])
    audit = f"securerunctl audit of {what}"
    yield find
    yield finding(
        f"audit.{place}", audit, "s", seconds["audit"], against=find, goal=GOAL if files >= GOAL_FILES else None
    )
    yield find_cpu
    yield finding(f"audit.{place}.cpu", f"{audit}: processors' time", "s", cpu["audit"], against=find_cpu)


def measure_all(options: argparse.Namespace) -> Iterator[Finding]:
    files, pairs = (20_000, 2) if options.quick else (GOAL_FILES, options.pairs or 6)
    with tempfile.TemporaryDirectory(prefix="securerun-audit-") as name:
        top = Path(name)
        progress(f"making {files} files in {top}")
        top.chmod(0o750)
        make_tree(top, files)
        yield from found_in("in order", measure(top, pairs, 0), files)
        change_modes(top, files, TOO_OPEN)
        yield from found_in("too open", measure(top, pairs, 1), files)


if __name__ == "__main__":
    findings.run("audit", __doc__, measure_all, pairs=True)
