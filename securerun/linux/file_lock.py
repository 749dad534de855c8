"""A lock on an open file (flock(2)) that is waited for in the kernel's queue, and not for ever."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A ring before its time is somebody else's, as of sudo, which passes on what its user sends it.
_RING_AGAIN_SECONDS = 0.5


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
    """Raise TimeUp in the block after some time. Only the main thread can: guards and securerunctl have no other."""
    deadline = time.monotonic() + seconds

    def ring(_number: int, _frame: FrameType | None) -> None:
        if time.monotonic() >= deadline:
            raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _RING_AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
