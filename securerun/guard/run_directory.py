"""/run/securerun as guards make, lock and fill it; what stands there, `securerun.guard.records` reads.

The lock is on the directory itself: it orders the installs and removals of all guards of the host, and the directory
goes with the last record.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from securerun.errors import Powerless, PrivilegeError
from securerun.firewall.policy import RUN_ID
from securerun.guard import job_secret, records
from securerun.guard.documents import MAXIMUM_RECORD_BYTES
from securerun.guard.records import DIRECTORY, Record
from securerun.linux import capabilities, file_lock

# Of a record, or of a ledger of securerun.guard.reserved.
_PARTIAL_NAME = re.compile(rf"\.({RUN_ID.pattern}\.json|reserved-[0-9]+\.ledger)\.partial")
_LOCK_SECONDS = 30.0


@contextlib.contextmanager
def host_lock() -> Iterator[int]:
    """Hold the host's lock; yield the descriptor of the record directory, made if it is missing.

    Raises PrivilegeError when the directory cannot be made, is not safely ours, or stays locked for 30 s.
    """
    directory = _lock(_LOCK_SECONDS)
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            DIRECTORY.rmdir()  # only the last run finds it empty
        os.close(directory)


@contextlib.contextmanager
def recording() -> Iterator[int]:
    """Hold the host's lock as `host_lock` does, with what goes wrong on the disk put into words.

    Raises PrivilegeError.
    """
    try:
        with host_lock() as directory:
            yield directory
    except OSError as error:
        raise _cannot_record(error) from error


@contextlib.contextmanager
def recording_unless_locked() -> Iterator[int | None]:
    """Do what `recording` does, without waiting: yield None where another holds the lock, or the directory is gone.

    Raises PrivilegeError.
    """
    directory = _open_directory()
    if directory is None:
        yield None
        return
    try:
        yield directory if _locked_at_once(directory) else None
    except OSError as error:
        raise _cannot_record(error) from error
    finally:
        os.close(directory)


def hold(run_id: str) -> int | None:
    """Show, for as long as the descriptor that is returned stays open, that a guard holds this run.

    For whoever does not see this process, in another pid namespace with the same /run. None where there are no locks.
    """
    directory = records.open_to_read()
    if directory is None:
        return None
    try:
        file_lock.mark(directory, records.place_of(run_id))
    except OSError:
        os.close(directory)
        return None
    return directory


def write(directory: int, record: Record) -> None:
    """Write or replace a run's record, whole or not at all, and on disk before this returns."""
    write_document(directory, f"{record.policy.run_id}.json", record.document())


def write_document(directory: int, name: str, document: Mapping[str, Any]) -> None:
    """Write or replace a file, whole or not at all, and on disk before this returns.

    Raises OSError, also for more than who reads it would take.
    """
    text = json.dumps(document)  # json.dump() goes without the encoder in C
    if len(text) > MAXIMUM_RECORD_BYTES:
        raise OSError(errno.EFBIG, f"it would have more than {MAXIMUM_RECORD_BYTES} bytes")
    partial = f".{name}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=directory)
        raise
    os.fsync(directory)


def remove(directory: int, run_id: str) -> None:
    """Remove a run's record, and first what the record stands for beside layers; it may be gone already."""
    job_secret.remove(run_id)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{run_id}.json", dir_fd=directory)


def partial(directory: int) -> tuple[str, ...]:
    """Return the names of records that were being written when their guard was killed."""
    return tuple(name for name in sorted(os.listdir(directory)) if _PARTIAL_NAME.fullmatch(name))


def remove_partial(directory: int) -> None:
    """Remove what a killed guard was writing. Writers hold the lock, so under the lock nobody is writing now."""
    for name in partial(directory):
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)


def _cannot_record(error: OSError) -> PrivilegeError:
    return PrivilegeError(
        f"the run cannot be recorded in {DIRECTORY}: {error.strerror}; make room there, then try again"
    )


def _lock(seconds: float) -> int:
    """Open the record directory, locked. Waits in the kernel's queue, so that none of many guards starves."""
    directory = None
    try:
        with file_lock.time_limit(seconds):
            while True:
                directory = _open_directory()
                if directory is not None and _locked(directory):
                    return directory
    except file_lock.TimeUp as error:
        if directory is not None:  # also one that was locked as the time was up, and would be for good
            with contextlib.suppress(OSError):
                os.close(directory)
        raise PrivilegeError(
            f"another guard has held the lock on {DIRECTORY} for {seconds:.0f} s; "
            f"find it with `fuser -v {DIRECTORY}`, then try again"
        ) from error


def _locked(directory: int) -> bool:
    """Lock the directory; False, and closed, where its last user has removed it meanwhile."""
    file_lock.lock(directory)
    if _is_current(directory):
        return True
    os.close(directory)
    return False


def _locked_at_once(directory: int) -> bool:
    """Lock the directory if nobody else has it; False also where its last user has removed it."""
    return file_lock.lock_at_once(directory) and _is_current(directory)


def _open_directory() -> int | None:
    """Open the record directory, made if missing; None when its last user removed it in that moment.

    Whoever else could write there could forge records: that is refused.
    """
    try:
        with contextlib.suppress(FileExistsError):
            DIRECTORY.mkdir(mode=0o700)
        if not DIRECTORY.exists():
            return None
        directory = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Powerless(
            f"cannot use {DIRECTORY}: {error.strerror}; {how_to_write(error)}, or use --unprotected"
        ) from error
    status = os.fstat(directory)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(directory)
        raise PrivilegeError(
            f"{DIRECTORY} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, "
            "so its records cannot be trusted; remove it, or `chown 0` and `chmod 700` it"
        )
    return directory


def how_to_write(error: OSError) -> str:
    """Return what to do where something cannot be made or written in /run, in words."""
    if error.errno == errno.EROFS:
        return "mount something writable at /run (a container with --read-only takes --tmpfs /run as well)"
    return f"{capabilities.run_as_root()}, with /run writable"


def _is_current(directory: int) -> bool:
    """Return whether the directory that we locked is still the one at its path: its last user removes it."""
    try:
        at_path = DIRECTORY.lstat()
    except FileNotFoundError:
        return False
    return (at_path.st_dev, at_path.st_ino) == (os.fstat(directory).st_dev, os.fstat(directory).st_ino)
