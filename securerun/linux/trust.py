"""Whether a file can be believed: nobody else could have written it, or put another in its place."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from securerun.linux import proc

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0
_OVERFLOW_USER = Path("/proc/sys/kernel/overflowuid")
_MOST_LINKS = 40  # include/linux/namei.h: MAXSYMLINKS


@dataclass(frozen=True)
class WeakPoint:
    """A file or directory by which somebody else has a say. mode: its permissions; None where its owner has it."""

    place: Path
    owner: int
    mode: int | None

    def __str__(self) -> str:
        if self.mode is None:
            return f"{self.place} belongs to user {self.owner}"
        return f"{self.place} can be written by others (mode {self.mode:o})"


def roots() -> frozenset[int]:
    """Return which numbers the host's root may have here.

    In a user namespace whoever has no number there has the overflow user's (user_namespaces(7)), the host's root too.
    """
    if proc.own_user_map().split() == proc.EVERYBODY.split():
        return frozenset((_ROOT,))
    return frozenset((_ROOT, int(_OVERFLOW_USER.read_text(encoding="ascii"))))


def weak_point(path: Path, owners: Collection[int] = (0,), writable: int = OTHERS_WRITE) -> WeakPoint | None:
    """Return why a file or directory cannot be believed; None when only its owners, by default root, can change it.

    owners: user ids. writable: the bits of a mode that nothing on the way may have. Looks at every directory above it,
    and at those above each link on the way. Raises OSError where there is none.
    """
    return next(filter(None, (_weakness(place, owners, writable) for place in way_to(path))), None)


def weak_point_below(directory: Path, owners: Collection[int] = (0,), writable: int = OTHERS_WRITE) -> WeakPoint | None:
    """Return why something in a directory cannot be believed, as `weak_point` does of the directory itself.

    What Python compiled before is there too: it is run in place of the source that it names (PEP 552). Raises OSError.
    """
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(place, name)
            weakness = weak_point(path, owners, writable) if path.is_symlink() else _weakness(path, owners, writable)
            if weakness is not None:
                return weakness
    return None


def _weakness(place: Path, owners: Collection[int], writable: int) -> WeakPoint | None:
    status = os.lstat(place)
    if status.st_uid not in owners:
        return WeakPoint(place, status.st_uid, None)
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & writable:
        return None
    # In a sticky directory only the owner of a file can put another in its place.
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return None
    return WeakPoint(place, status.st_uid, stat.S_IMODE(status.st_mode))


def way_to(path: Path) -> Iterator[Path]:
    """Yield every name that decides what is found at a path, links followed one part at a time as the kernel does."""
    current = Path("/")
    yield current
    pending = [*reversed(path.absolute().parts[1:])]
    links = 0
    while pending:
        part = pending.pop()
        current = current.parent if part == ".." else current / part
        yield current
        if not current.is_symlink():
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = current.readlink()
        pending += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        current = Path("/") if target.is_absolute() else current.parent
