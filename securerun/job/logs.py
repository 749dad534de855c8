"""Log files of a job that is over: finished, so nobody writes them any more (the permission table's 440 and 750)."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from securerun.host import permissions
from securerun.host.permissions import Kind
from securerun.linux import proc

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROW = permissions.row(Kind.ARCHIVED_LOG)


@dataclass
class _Outcome:
    """What could not be sealed: how many files and directories, and the kernel's words on the last of them."""

    left: int = 0
    reasons: set[str] = field(default_factory=set)


@contextlib.contextmanager
def sealed_afterwards(log_dir: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Seal what a launch in this block writes below its log directory, when the block is over.

    That is what is in the directory that torch makes there for each run, tempfile.mkdtemp being how every version does
    (2.1: LocalElasticAgent._make_log_dir; later: DefaultLogsSpecs._make_log_dir) and nothing else telling its name: on
    a shared file system other nodes and other runs have theirs beside it. It is held open from its first moment, so
    that nothing can be put in its place. Whoever still writes, by a descriptor that he has, goes on writing.
    """
    made: list[int] = []
    mkdtemp = tempfile.mkdtemp

    def noting(*arguments: Any, **named: Any) -> str:  # noqa: ANN401 - as mkdtemp takes them
        path: str = mkdtemp(*arguments, **named)
        with contextlib.suppress(OSError):
            if os.path.samefile(Path(path).parent, log_dir):  # noqa: PTH121 - by the files, not by their names
                made.append(os.open(path, _DIRECTORY_FLAGS))
        return path

    setattr(tempfile, "mkdtemp", noting)  # noqa: B010 - mypy knows functions of modules as constants
    try:
        yield
    finally:
        setattr(tempfile, "mkdtemp", mkdtemp)  # noqa: B010
        for directory in made:
            _seal_tree(directory, log_dir, tell)


def _seal_tree(directory: int, log_dir: str, tell: Callable[[str], None]) -> None:
    outcome = _Outcome()
    try:
        _seal(directory, outcome)
    finally:
        os.close(directory)
    if outcome.left:
        tell(f"{outcome.left} log files below {log_dir} could not be sealed ({', '.join(sorted(outcome.reasons))})")


def _seal(directory: int, outcome: _Outcome) -> None:
    """Seal a directory and all below it, links and what belongs to others left alone."""
    with _noted(outcome):
        _take_away(directory, _ROW.directory)
        with os.scandir(directory) as entries:
            names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in names:
            with _noted(outcome):
                if is_directory:
                    _seal_below(directory, name, outcome)
                else:
                    _seal_file(directory, name)


def _seal_below(directory: int, name: str, outcome: _Outcome) -> None:
    below = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
    try:
        _seal(below, outcome)
    finally:
        os.close(below)


def _seal_file(directory: int, name: str) -> None:
    # O_PATH needs no permission to read, waits for no fifo, and with O_NOFOLLOW holds a link itself.
    file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        status = os.fstat(file)
        # A second name may lie anywhere, and what it stands for is not of this run alone.
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            _take_away(file, _ROW.file)
    finally:
        os.close(file)


def _take_away(descriptor: int, maximum: int) -> None:
    """Take the permissions away that go beyond a maximum; none is ever added."""
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~maximum and status.st_uid == os.geteuid():
        # fchmod refuses a descriptor of O_PATH; this name leads to the very file that is held (proc(5)).
        os.chmod(proc.path_of_own_descriptor(descriptor), mode & maximum)  # noqa: PTH101


@contextlib.contextmanager
def _noted(outcome: _Outcome) -> Iterator[None]:
    """Note in the outcome what fails in the block; what has gone meanwhile is no failure."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        outcome.left += 1
        outcome.reasons.add(error.strerror or str(error))
