"""What the kernel says of a process (proc(5)), read without anything of securerun's: tests hold securerun to it."""

from __future__ import annotations

from pathlib import Path


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
