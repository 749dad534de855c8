"""A terminal that a test sits at: it types, and reads what programs have written there."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence

from hosts import Host, environment


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


class Seat:
    """A terminal with a command as its session's first process, in a host."""

    def __init__(self, host: Host, argv: Sequence[str]) -> None:
        words = host.command(argv)
        self.pid, self._descriptor = pty.fork()
        if not self.pid:
            os.execvpe(words[0], words, environment())  # noqa: S606
        self.shown = self.before = ""

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        os.close(self._descriptor)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def show(self, words: str) -> None:
        """Wait until the terminal has shown these words; what it showed up to them is `before`."""
        deadline = time.monotonic() + 30
        while words not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._descriptor], [], [], 1)[0]:
                try:
                    self._read()
                except OSError as ended:  # EIO, as below
                    raise AssertionError(f"ended without {words!r}: {self.shown}") from ended
        self.before, _, self.shown = self.shown.partition(words)

    def end(self) -> int:
        """Its status as `subprocess` has it, after all was shown."""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while True:
                self._read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> None:
        self.shown += os.read(self._descriptor, 65536).decode(errors="replace")
