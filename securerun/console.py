"""securerun's own words on standard error: a line each, behind its name."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

from securerun.errors import SecurerunError

_CLOSED = "standard output is closed, so nothing can be printed; leave it open, as with > FILE, and try again"


def say(words: str) -> None:
    """Say something to whoever started the job.

    Standard error may be closed, or a pipe that nobody reads any more: a job does not end because nobody listens.
    """
    if sys.stderr is None:
        return
    text = "".join(f"securerun: {line}\n" for line in words.splitlines())
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is a file that the caller has closed
        if sys.stderr is not sys.__stderr__:  # a caller's own
            _print(text, sys.stderr)
            return
        # Past the buffer: what is stuck in it at the exit makes Python's status 120.
        os.write(2, text.encode(errors="backslashreplace"))


def _print(text: str, file: TextIO) -> None:
    """Print to a file in whichever encoding it has; what that cannot hold is written in digits."""
    try:
        print(text, end="", file=file, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), end="", file=file, flush=True)


def write_out(text: str) -> None:
    """Write on standard output; end quietly, with status 1, where nobody reads it any more, as behind `| head`.

    Raises SecurerunError where it cannot be written.
    """
    if sys.stdout is None:
        raise SecurerunError(_CLOSED)
    try:
        print(text, end="", flush=True)
    except OSError as error:
        give_up(error)


def finish_output() -> None:
    """Write what was printed and is not written yet, as `write_out` does. Raises SecurerunError."""
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up(error)


def give_up(error: OSError) -> NoReturn:
    """End because standard output cannot be written; without a word, by SystemExit, where its reader is gone.

    Raises SecurerunError otherwise.
    """
    # What is left in the buffer would be complained of at the exit.
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - not a path
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        sys.exit(1)
    reason = error.strerror or error
    raise SecurerunError(f"standard output cannot be written ({reason}); send it elsewhere, and try again") from error


class _Closed(io.RawIOBase):
    """What takes nothing, and says why: Python prints into a standard output that is closed without a word."""

    def writable(self) -> bool:
        return True

    def write(self, _: object) -> int:
        raise SecurerunError(_CLOSED)


def closed_output() -> io.TextIOWrapper:
    """Return what stands for a standard output that is closed: who prints gets SecurerunError."""
    return io.TextIOWrapper(_Closed(), write_through=True)  # type: ignore[arg-type] # takes what is unbuffered too


@contextlib.contextmanager
def spoken_errors() -> Iterator[None]:
    """One line and a status for what a person can mend; anything else is a defect and keeps its traceback."""
    try:
        yield
    except SecurerunError as error:
        say(str(error))
        sys.exit(error.status)
