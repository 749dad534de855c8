"""securerun's own words on standard error: a line each, behind its name."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from securerun.errors import SecurerunError


def say(words: str) -> None:
    """Say something to whoever started the job.

    Standard error may be closed, or a pipe that nobody reads any more: a job does not end because nobody listens.
    """
    if sys.stderr is None:
        return
    text = "".join(f"securerun: {line}\n" for line in words.splitlines())
    with contextlib.suppress(OSError):
        if sys.stderr is not sys.__stderr__:  # a caller's own
            print(text, end="", file=sys.stderr, flush=True)
            return
        # Past the buffer: what is stuck in it at the exit makes Python's status 120.
        os.write(2, text.encode(errors="backslashreplace"))


def write_out(text: str) -> None:
    """Write on standard output; end quietly, with status 1, where nobody reads it any more, as behind `| head`."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # What is left in the buffer would be complained of at the exit.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - not a path
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(1)


@contextlib.contextmanager
def spoken_errors() -> Iterator[None]:
    """One line and a status for what a person can mend; anything else is a defect and keeps its traceback."""
    try:
        yield
    except SecurerunError as error:
        say(str(error))
        sys.exit(error.status)
