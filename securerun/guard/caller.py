"""Whoever started this guard: found by ancestry, held by pidfd, never named by the orders."""

from __future__ import annotations

import os
from pathlib import Path

from securerun.errors import PrivilegeError
from securerun.guard import records


class Caller:
    """The process that the guard serves.

    pid, start: which process (proc(5): start time in clock ticks since boot). user: its real user id.
    pidfd: readable once it has ended; None before kernel 5.3, where its start time tells.

    Raises PrivilegeError when the process ended before it could be held.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = _pidfd(pid)
        try:
            self.start = records.start_time(pid)
            self.user = Path(f"/proc/{pid}").stat().st_uid
        except OSError as error:
            raise PrivilegeError(f"process {pid}, which started the guard, has ended") from error

    def has_ended(self) -> bool:
        """Whether the process is gone, or is no longer the one that this guard began to serve."""
        return not records.is_running(self.pid, self.start)


def find_caller() -> Caller:
    """The parent of this process. Raises PrivilegeError when it ended meanwhile."""
    caller = Caller(os.getppid())
    if os.getppid() != caller.pid:
        raise PrivilegeError(f"process {caller.pid}, which started the guard, has ended")
    return caller


def _pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
