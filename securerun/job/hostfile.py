"""Reading a host file: no longer than is borne, and no more than is sane.

A file server may be away, a FIFO may have nobody who writes to it, and either holds up whoever opens the file.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path

MOST_BYTES = 16 * 1024 * 1024
SECONDS = 10.0


def read(name: str) -> bytes:
    """Return what a file or a pipe holds, or a byte more than MOST_BYTES.

    Raises OSError, TimeoutError after SECONDS; RuntimeError or ValueError for a name that can be none.
    """
    return Reading(name).wait(SECONDS)


class Reading:
    """One reading of a file, under way in a thread of its own.

    again: only a regular file is read, and nothing is waited for at a pipe: it has given what it had.
    Raises RuntimeError or ValueError for a name that can be none.
    """

    def __init__(self, name: str, *, again: bool = False) -> None:
        self._path = str(Path(name).expanduser())
        self._flags = os.O_NONBLOCK if again else 0
        self._content: bytes | Exception | None = None
        self._is_over = threading.Event()
        # A daemon: one that a file server holds up is no reason for the process to stay.
        threading.Thread(target=self._read, name="securerun-hosts", daemon=True).start()

    def wait(self, seconds: float) -> bytes:
        """Return the content. Raises what the reading came to: OSError or ValueError; TimeoutError after `seconds`."""
        if not self._is_over.wait(seconds):
            raise TimeoutError(f"no end of it within {SECONDS:g} s")
        if isinstance(self._content, bytes):
            return self._content
        raise self._content or OSError("nothing was read")

    def _read(self) -> None:
        try:
            self._content = self._whole()
        except (OSError, ValueError) as error:
            self._content = error
        self._is_over.set()

    def _whole(self) -> bytes:
        with contextlib.ExitStack() as undo:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | self._flags)
            undo.callback(os.close, descriptor)
            if self._flags and not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("it is no regular file any more")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(MOST_BYTES + 1)


def may_grow(name: str) -> str | None:
    """Return the absolute name of a host file that may be read again; None for a pipe, which has given what it had."""
    try:
        path = Path(name).expanduser().absolute()
        return str(path) if stat.S_ISREG(path.stat().st_mode) else None
    except (OSError, RuntimeError, ValueError):
        return None
