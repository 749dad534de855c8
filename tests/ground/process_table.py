"""What the kernel says of a process (proc(5)), read without anything of securerun's: tests hold securerun to it."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Callable


def name_of(pid: int) -> str:
    """A process' name as pkill sees it; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").removesuffix("\n")
    except OSError:
        return ""


def status_of(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status. Raises OSError when the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text(errors="replace").split("\n")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def users_of(pid: int) -> list[int]:
    """The real, effective, saved and file system user id of a process; [] when it is gone."""
    try:
        return [int(user) for user in status_of(pid)["Uid"].split()]
    except (OSError, KeyError):
        return []


def fields_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state, its third, on. Raises OSError when the process is gone."""
    # The name before them, in parentheses, may hold anything.
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def signal_if(pid: int, number: signal.Signals, is_it: Callable[[], bool]) -> None:
    """Signal a process if it is the one that is meant after it was pinned down: numbers are used again.

    Raises ProcessLookupError when it is gone.
    """
    try:
        held = os.pidfd_open(pid)
    except OSError as error:
        # Older kernels (6.1, not 6.18) say so of a number that is none of a process any more, but of its group still.
        if error.errno == errno.EINVAL:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        if error.errno != errno.ENOSYS:
            raise
        if is_it():  # a kernel without pidfd_open(2), where nothing pins it down
            os.kill(pid, number)
        return
    try:
        if is_it():
            signal.pidfd_send_signal(held, number)
    finally:
        os.close(held)
