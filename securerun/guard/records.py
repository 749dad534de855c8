"""What this host knows of its runs: /run/securerun, one JSON file a run, and the lock over it.

A record is there before the first layer is installed and goes after the last one is removed, so whatever a
killed guard leaves behind has a record that names it. The lock is on the directory itself: it orders the
installs and removals of all guards of the host, and the directory goes with the last record.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securerun.errors import PrivilegeError
from securerun.firewall.policy import Policy
from securerun.guard.protocol import Layer, policy_document

DIRECTORY = Path("/run/securerun")
_LOCK_SECONDS = 30.0
_LOCK_INTERVAL_SECONDS = 0.01


@dataclass(frozen=True)
class Record:
    """One run as the host's administrator sees it.

    launcher, guard: process ids; launcher_start, guard_start: their start times in clock ticks since boot
    (proc(5), stat field 22), since process ids are used again. boot_id: the boot that these belong to.
    user: the launcher's user id. started: seconds since the epoch.
    """

    policy: Policy
    layers: tuple[Layer, ...]
    launcher: int
    launcher_start: int
    guard: int
    guard_start: int
    boot_id: str
    user: int
    started: float
    command: str

    def document(self) -> dict[str, Any]:
        """The record as JSON's own types."""
        return {
            "policy": policy_document(self.policy),
            "layers": [{"backend": layer.backend, "name": layer.name} for layer in self.layers],
            "launcher": self.launcher,
            "launcher_start": self.launcher_start,
            "guard": self.guard,
            "guard_start": self.guard_start,
            "boot_id": self.boot_id,
            "user": self.user,
            "started": self.started,
            "command": self.command,
        }


@contextlib.contextmanager
def host_lock() -> Iterator[int]:
    """Hold the host's lock; yields the descriptor of the record directory, made if it is missing.

    Raises PrivilegeError when the directory cannot be made, is not safely ours, or stays locked for 30 s.
    """
    directory = _lock(_LOCK_SECONDS)
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            DIRECTORY.rmdir()  # only the last run finds it empty
        os.close(directory)


def write(directory: int, record: Record) -> None:
    """Write or replace a run's record, whole or not at all, and on disk before this returns."""
    name = f"{record.policy.run_id}.json"
    partial = f".{name}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(record.document(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=directory)
        raise
    os.fsync(directory)


def remove(directory: int, run_id: str) -> None:
    """Remove a run's record; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{run_id}.json", dir_fd=directory)


def boot_id() -> str:
    """This boot's id; process ids and start times of another boot mean nothing (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5)). Raises OSError when there is none."""
    status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # The command in parentheses may hold anything, parentheses and spaces too.
    return int(status.rpartition(")")[2].split()[19])


def _lock(seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        directory = _open_directory()
        if directory is not None and _locked(directory):
            return directory
        if time.monotonic() > deadline:
            raise PrivilegeError(
                f"another guard has held the lock on {DIRECTORY} for {seconds:.0f} s; "
                f"find it with `fuser -v {DIRECTORY}`, then try again"
            )
        time.sleep(_LOCK_INTERVAL_SECONDS)


def _locked(directory: int) -> bool:
    """Lock the directory without waiting; closes it where that fails."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_current(directory):
            return True
    os.close(directory)
    return False


def _open_directory() -> int | None:
    """The record directory, made if missing; None when its last user removed it in that moment.

    Whoever else could write there could forge records: that is refused.
    """
    try:
        with contextlib.suppress(FileExistsError):
            DIRECTORY.mkdir(mode=0o700)
        if not DIRECTORY.exists():
            return None
        directory = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise PrivilegeError(
            f"cannot use {DIRECTORY}: {error.strerror}; run as root, with /run writable, or use --unprotected"
        ) from error
    status = os.fstat(directory)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(directory)
        raise PrivilegeError(
            f"{DIRECTORY} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, "
            "so its records cannot be trusted; remove it, or `chown 0` and `chmod 700` it"
        )
    return directory


def _is_current(directory: int) -> bool:
    """Whether the directory that we locked is still the one at its path: its last user removes it."""
    try:
        at_path = DIRECTORY.lstat()
    except FileNotFoundError:
        return False
    return (at_path.st_dev, at_path.st_ino) == (os.fstat(directory).st_dev, os.fstat(directory).st_ino)
