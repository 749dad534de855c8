"""Programs that are run to their end, and never for longer than they are given.

Whoever runs them may hold a lock that others wait for. So their input and their outputs are files in memory, and what
is waited for is one event with a time: that the last copy of a pipe is closed, which the kernel does as a process ends.
`Popen.communicate` with a time-out looks and sleeps instead, for as long as the timers of its process let it.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# SIGKILL takes effect at once, unless the kernel is at work for the process on a device that does not answer.
_DYING_SECONDS = 1.0
# The rules of a host with 100,000 of them.
_MOST_OUTPUT = 64 * 1024 * 1024


@dataclass(frozen=True)
class Ended:
    """A program that came to its end: its exit status, and what it wrote."""

    status: int
    output: str
    errors: str


def run(
    commands: Sequence[Sequence[str]], texts: Sequence[str], environment: Mapping[str, str], seconds: float
) -> list[Ended]:
    """Run programs at once, each with its text as standard input, and wait for all of them, `seconds` at most.

    commands: absolute paths and their arguments. Raises OSError for one that cannot be started, and TimeoutError for
    one that took too long. Then all of them are killed.
    """
    started: list[_Running] = []
    deadline = time.monotonic() + seconds
    try:
        for command, text in zip(commands, texts):
            started.append(_Running(command, text, environment))
        for one in started:
            if not one.ends_before(deadline):
                raise TimeoutError(f"killed, since it did not end within {seconds:g} s")
        return [one.ended() for one in started]
    finally:
        for one in started:
            one.close()


class _Running:
    """A program that was started, and is killed by `close` if it still runs then."""

    def __init__(self, command: Sequence[str], text: str, environment: Mapping[str, str]) -> None:
        self._output, self._errors = os.memfd_create("output"), os.memfd_create("errors")
        self._life, theirs = os.pipe()
        try:
            with open(os.memfd_create("text"), "w+", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
                file.write(text)
                file.seek(0)
                self._process = subprocess.Popen(  # noqa: S603 - an absolute path, arguments of ours
                    command,
                    stdin=file,
                    stdout=self._output,
                    stderr=self._errors,
                    env=dict(environment),
                    pass_fds=(theirs,),
                )
        except BaseException:
            self._close_files()
            raise
        finally:
            os.close(theirs)

    def ends_before(self, deadline: float) -> bool:
        """Wait for the end; return whether it came in time."""
        poller = select.poll()
        poller.register(self._life, select.POLLIN)  # told of its end, which is all that ever comes
        return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def ended(self) -> Ended:
        """Return how it ended."""
        return Ended(self._process.wait(), _content(self._output), _content(self._errors))

    def close(self) -> None:
        """Kill it if it still runs, and go on without it where even that does not end it."""
        if self._process.returncode is None:
            with contextlib.suppress(OSError):
                self._process.kill()  # not reaped yet, so the number is still its own
            if self.ends_before(time.monotonic() + _DYING_SECONDS):
                self._process.wait()
        self._close_files()

    def _close_files(self) -> None:
        for descriptor in (self._life, self._output, self._errors):
            os.close(descriptor)


def _content(descriptor: int) -> str:
    return os.pread(descriptor, _MOST_OUTPUT, 0).decode("utf-8", "replace")
