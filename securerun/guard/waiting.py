"""How many guards of one user may be without a run at once: each is a process of root's, and costs its user nothing.

Each holds a slot, which is a byte of a file that is locked (fcntl(2)), and so given back by the kernel as it ends,
however it ends. The file is removed by whoever finds that nobody has a slot, so ordinary runs leave none. It is not in
the directory of records, which goes with the last record. Beside the slots it has `securerun.guard.refusals` in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

from securerun.errors import PrivilegeError

FILE = Path("/run/securerun.callers")
SLOTS = 8
# Of securerun.guard.refusals.
REFUSALS_SECONDS = 60.0
_MODE = 0o600
_ATTEMPTS = 50
_ATTEMPT_SECONDS = 0.005


class TooManyWaiting(PrivilegeError):
    """A user has all of their slots. What is refused now may be granted in a moment."""


class Slot:
    """One slot of a user's, until `give_back`. Raises TooManyWaiting, or PrivilegeError where no file can be used."""

    def __init__(self, user: int) -> None:
        for _ in range(_ATTEMPTS):
            self._descriptor: int | None = open_file()
            if self._take(self._descriptor, user):
                return
            os.close(self._descriptor)
            # Whoever gives the last slot back holds all of them for a moment, and then the file is another.
            time.sleep(_ATTEMPT_SECONDS)
        raise TooManyWaiting(
            f"{SLOTS} guards of user {user} are waiting for their orders or are about to guard, and no more may; wait "
            "until they have, or end what started them"
        )

    def give_back(self) -> None:
        """Let another guard of the user's have it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            remove_if_unused(descriptor)
            os.close(descriptor)

    @staticmethod
    def _take(descriptor: int, user: int) -> bool:
        return any(_lock(descriptor, user * SLOTS + number) for number in range(SLOTS)) and _is_current(descriptor)


def open_file() -> int:
    """Open the file, made if missing. Raises PrivilegeError, also where another than root could change it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(FILE, flags, _MODE)
    except OSError as error:
        raise PrivilegeError(f"cannot use {FILE}: {error.strerror}; make /run writable, or remove it") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        raise PrivilegeError(f"{FILE} is not a file of root's alone; remove it")
    return descriptor


def remove_if_unused(descriptor: int) -> None:
    """Remove the file if what it holds is over, and nobody else has a slot."""
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        is_over = status.st_size == 0 or not 0 <= time.time() - status.st_mtime < REFUSALS_SECONDS
        if is_over and _is_current(descriptor):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all of it, of any length
            FILE.unlink()


def _lock(descriptor: int, byte: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError:
        return False
    return True


def _is_current(descriptor: int) -> bool:
    """Return whether the file is still the one at its path."""
    try:
        at_path = FILE.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(at_path, os.fstat(descriptor))
