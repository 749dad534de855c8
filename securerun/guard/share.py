"""How much those may cause to be done who can ask for work without end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# The host's lock is others' for the longer part of the time; some of it at once, for what a job does when it starts.
MOST_OF_LOCK = 0.25
_LOCK_AT_ONCE_SECONDS = 4.0


class Share:
    """So much at once, and then so much a second: of guards, of seconds of a processor."""

    def __init__(self, at_once: float, a_second: float) -> None:
        self._at_once = at_once
        self._a_second = a_second
        self._left = at_once
        self._since = time.monotonic()

    def take(self) -> bool:
        """Take one, if there is one."""
        self._refill()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def pause_after(self, spent: float) -> float:
        """Return for how many seconds nothing more is to be done, now that this much was spent."""
        self._refill()
        self._left -= spent
        return max(0.0, -self._left / self._a_second)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is taken, so that it need not be remembered."""
        self._refill()
        return self._left >= self._at_once

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._at_once, self._left + (now - self._since) * self._a_second)
        self._since = now


class Turn:
    """When a job may next cause what takes the host's lock: a user's jobs together have a part of it.

    due: when that is, on the monotonic clock. runs: how many the user has now, among which the part is divided.
    """

    def __init__(self) -> None:
        self.due = 0.0
        self.runs = 1
        self._share = Share(_LOCK_AT_ONCE_SECONDS, MOST_OF_LOCK)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count how long this takes, with the lock held: to wait for it is no fault of who waits."""
        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self.due = now + self._share.pause_after((now - began) * self.runs)
