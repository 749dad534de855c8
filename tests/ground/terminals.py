"""A terminal that a test sits at: it types, and reads what programs have written there."""

from __future__ import annotations

import contextlib
import os
import pty
import threading
from collections.abc import Iterator


class Terminal:
    """end: the descriptor that programs get."""

    def __init__(self) -> None:
        self._ours, self.end = pty.openpty()
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while piece := os.read(self._ours, 65536):
                self._written.extend(piece)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def text(self) -> str:
        """All that was written, once every program that had the terminal has ended. May be called once."""
        os.close(self.end)
        self.end = -1
        self._reader.join(timeout=30)
        return self._written.decode()

    def close(self) -> None:
        if self.end != -1:
            os.close(self.end)
        self._reader.join(timeout=30)
        os.close(self._ours)


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    try:
        yield opened
    finally:
        opened.close()
