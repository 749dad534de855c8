"""Lines out of what comes in pieces, at a cost of what comes: whoever sends a byte at a time is no dearer for it."""

from __future__ import annotations


class LineBuffer:
    """What has come and was not taken yet. Each byte of it is searched once, however it was cut."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._searched = 0

    def __len__(self) -> int:
        """Return how many bytes there are."""
        return len(self._pending)

    def add(self, piece: bytes) -> None:
        """Put what has come to what is there."""
        self._pending += piece

    def has_line(self) -> bool:
        """Return whether there is a whole line."""
        return self._end() >= 0

    def take(self) -> bytes | None:
        """Take the first line, without its newline; None where none is whole yet."""
        end = self._end()
        if end < 0:
            return None
        with memoryview(self._pending) as pending:
            line = bytes(pending[:end])
        del self._pending[: end + 1]
        self._searched = 0
        return line

    def _end(self) -> int:
        end = self._pending.find(b"\n", self._searched)
        self._searched = len(self._pending) if end < 0 else end
        return end
