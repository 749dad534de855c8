"""Locks on open files: of a whole one (flock(2)), waited for in the kernel's queue, but not for ever; marks on bytes.

A mark says to whoever asks, in whichever namespaces, that the process that made it lives: it goes with that, however it
ends. It is a lock of an open file description (fcntl(2), F_OFD_SETLK), and one to read: a lock to write takes a
descriptor that can be written to, which a directory's cannot.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A ring before its time is somebody else's, as of sudo, which passes on what its user sends it.
_RING_AGAIN_SECONDS = 0.5
# struct flock of fcntl(2), the same on both architectures of securerun: kind, whence, start, length, process.
_FLOCK = struct.Struct("=hh4xqqi4x")


class TimeUp(Exception):
    """The lock was not to be had in time."""


def lock(descriptor: int) -> None:
    """Lock a file for this process alone, in a block of `time_limit`. Raises TimeUp at its end."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def lock_at_once(descriptor: int) -> bool:
    """Lock a file for this process alone, if nobody else has it; return whether it did."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block after some time. Only the main thread can: guards and securerunctl have no other.

    Once: it may be raised as the block ends, in the middle of putting the alarm away, and must not be again after that.
    """
    deadline = time.monotonic() + seconds
    has_rung = False

    def ring(_number: int, _frame: FrameType | None) -> None:
        nonlocal has_rung
        if has_rung or time.monotonic() < deadline:
            return
        has_rung = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _RING_AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mark(descriptor: int, position: int) -> None:
    """Mark one byte of a file, which need not be that long, until the descriptor is closed. Raises OSError."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, position, 1, 0))


def is_marked(descriptor: int, position: int) -> bool:
    """Return whether another descriptor of the file marks a byte of it. Raises OSError."""
    found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, position, 1, 0))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
