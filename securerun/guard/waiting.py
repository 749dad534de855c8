"""How many guards of one user may be without a run at once: each is a process of root's, and costs its user nothing.

A container counts as one user, whoever is in it, and all containers of a node together have a number of their own: so
they take nothing from the node's own users.

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

from securerun.errors import Powerless, PrivilegeError
from securerun.guard import run_directory

FILE = Path("/run/securerun.callers")
SLOTS = 8
# A guard that waits takes some 15 MB.
SLOTS_OF_CONTAINERS = 64
# Beyond those of any account.
_FIRST_OF_CONTAINERS = 1 << 62
# Of securerun.guard.refusals.
REFUSALS_SECONDS = 60.0
_MODE = 0o600
_ATTEMPTS = 50
_ATTEMPT_SECONDS = 0.005


class TooManyWaiting(PrivilegeError):
    """A user has all of their slots. What is refused now may be granted in a moment."""


class Slot:
    """One slot of an account's, until `give_back`. Raises TooManyWaiting, or PrivilegeError where no file can be used.

    account: whose share it is of (securerun.guard.caller). in_container: whether that is a container's.
    """

    def __init__(self, account: int, *, in_container: bool = False) -> None:
        for _ in range(_ATTEMPTS):
            self._descriptor: int | None = open_file()
            if self._take(self._descriptor, account, in_container=in_container):
                return
            os.close(self._descriptor)
            # Whoever gives the last slot back holds all of them for a moment, and then the file is another.
            time.sleep(_ATTEMPT_SECONDS)
        whose = "this container, or too many of all containers of this node," if in_container else f"user {account}"
        raise TooManyWaiting(
            f"{SLOTS} guards of {whose} are waiting for their orders or are about to guard, and no more may; wait "
            "until they have, or end what started them"
        )

    def give_back(self) -> None:
        """Let another guard of the user's have it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            remove_if_unused(descriptor)
            os.close(descriptor)

    @staticmethod
    def _take(descriptor: int, account: int, *, in_container: bool) -> bool:
        if not _lock_one(descriptor, account * SLOTS, SLOTS):
            return False
        if in_container and not _lock_one(descriptor, _FIRST_OF_CONTAINERS, SLOTS_OF_CONTAINERS):
            return False
        return _is_current(descriptor)


def open_file() -> int:
    """Open the file, made if missing. Raises PrivilegeError, also where another than root could change it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(FILE, flags, _MODE)
    except OSError as error:
        words = f"cannot use {FILE}: {error.strerror}; {run_directory.how_to_write(error)}, or use --unprotected"
        raise Powerless(words) from error
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


def _lock_one(descriptor: int, first: int, number: int) -> bool:
    return any(_lock(descriptor, byte) for byte in range(first, first + number))


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
