"""The file with the secret of a job's frameworks, for as long as the job runs: /run/securerun-jobs/RUN_ID/secret.

It is the job's user's, 0400. The directory it lies in is the guard's and nobody else's to write to: /run is small, and
whoever filled it up would keep systemd and guards from their work, which no user can without this. So for a user whose
guard is root's it has the user's group, to pass through; others do not get that far, and the group no further.

All of it is done under the host's lock.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

DIRECTORY = Path("/run/securerun-jobs")
NAME = "secret"
_PARTIAL = ".secret.partial"
_TOP_MODE, _OWN_MODE, _PASSED_MODE, _FILE_MODE = 0o711, 0o700, 0o710, 0o400
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP = -1


def make(run_id: str, secret: bytes, user: int, group: int) -> str:
    """Make the file for a run, or make it anew, for a user whose group this is; return its path.

    Raises OSError, with nothing made, where it cannot be.
    """
    with contextlib.suppress(FileExistsError):
        DIRECTORY.mkdir()
    top = _opened(DIRECTORY, _TOP_MODE)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(run_id, _OWN_MODE, dir_fd=top)
        place = _opened(run_id, _OWN_MODE, top)
        try:
            _write(place, secret, user)
            if user != os.geteuid():
                os.fchown(place, _KEEP, group)
                os.fchmod(place, _PASSED_MODE)
        finally:
            os.close(place)
    except OSError:
        remove(run_id)
        raise
    finally:
        os.close(top)
    return str(DIRECTORY / run_id / NAME)


def path_of(run_id: str) -> str:
    """Return the file of a run; "" where there is none."""
    place = DIRECTORY / run_id / NAME
    return str(place) if os.path.lexists(place) else ""


def remove(run_id: str) -> None:
    """Remove the file of a run, and what was made for it; there may be nothing."""
    with contextlib.suppress(OSError):
        top = os.open(DIRECTORY, _FLAGS)
        try:
            place = os.open(run_id, _FLAGS, dir_fd=top)
            try:
                for name in (NAME, _PARTIAL):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=place)
            finally:
                os.close(place)
            os.rmdir(run_id, dir_fd=top)
        finally:
            os.close(top)
            DIRECTORY.rmdir()  # only the last run finds it empty


def _opened(name: str | Path, mode: int, beside: int | None = None) -> int:
    """Open a directory of this guard's own, and give it its mode, whatever the umask is. Raises OSError."""
    descriptor = os.open(name, _FLAGS, dir_fd=beside)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
            raise PermissionError(None, f"{name} is somebody else's to write to")
        os.fchmod(descriptor, mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write(place: int, secret: bytes, user: int) -> None:
    """Write the file, whole or not at all: as digits, which every program takes, and without an end of line."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_PARTIAL, dir_fd=place)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(_PARTIAL, flags, _FILE_MODE, dir_fd=place), "wb") as file:
        file.write(secret.hex().encode("ascii"))
        file.flush()
        if user != os.geteuid():
            os.fchown(file.fileno(), user, _KEEP)
    os.replace(_PARTIAL, NAME, src_dir_fd=place, dst_dir_fd=place)
