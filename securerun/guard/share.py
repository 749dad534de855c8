"""How much of a processor those may cause to be spent who can ask for work without end."""

from __future__ import annotations

import time


class ProcessorShare:
    """So many seconds of a processor at once, and then this part of one."""

    def __init__(self, at_once: float, part: float) -> None:
        self._at_once = at_once
        self._part = part
        self._left = at_once
        self._since = time.monotonic()

    def pause_after(self, spent: float) -> float:
        """Return for how many seconds nothing more is to be done, now that so many were spent."""
        now = time.monotonic()
        self._left = min(self._at_once, self._left + (now - self._since) * self._part) - spent
        self._since = now
        return max(0.0, -self._left / self._part)
