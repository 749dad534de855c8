"""Programs are run to their end, whatever they do, and never for longer than they are given."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import psutil
import pytest
from cgroups import in_child

from securerun.linux import commands, libc

_SET_TIMERSLACK = 29
_HUNDRED_SECONDS = 10**11


def run(*script: str, text: str = "", seconds: float = 10.0) -> list[commands.Ended]:
    argv = [[sys.executable, "-I", "-S", "-c", one] for one in script]
    return commands.run(argv, [text] * len(argv), {}, seconds)


def test_what_programs_write_is_told_with_how_they_ended() -> None:
    first, second = run(
        "import sys; print(sys.stdin.read().upper()); sys.exit(3)",
        "import sys; print('no', file=sys.stderr)",
        text="word",
    )
    assert (first.status, first.output, first.errors) == (3, "WORD\n", "")
    assert (second.status, second.output, second.errors) == (0, "", "no\n")


def test_program_that_writes_more_than_a_pipe_holds_is_not_kept_waiting() -> None:
    (ended,) = run("print('x' * 5_000_000)")
    assert len(ended.output) == 5_000_001


def test_program_that_does_not_end_is_killed_in_time() -> None:
    before, others = time.monotonic(), psutil.Process().children()
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        run("import time; time.sleep(60)", "pass", seconds=0.5)
    assert time.monotonic() - before < 5
    assert psutil.Process().children() == others, "none is left, to be waited for"


def test_program_that_cannot_be_started_leaves_no_other_and_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        commands.run([["/bin/sleep", "60"], ["/nonexistent"]], ["", ""], {}, 10.0)
    assert os.listdir("/proc/self/fd") == before


def test_end_of_a_program_is_seen_at_once_whatever_the_slack_of_timers() -> None:
    def work() -> float:
        libc.library.prctl(_SET_TIMERSLACK, ctypes.c_ulong(_HUNDRED_SECONDS), 0, 0, 0)
        before = time.monotonic()
        # Closes its outputs first, as one that hands on what it was asked: there is nothing to read any more.
        run("import os, time; os.close(1); os.close(2); sum(range(3_000_000))")
        return time.monotonic() - before

    assert in_child(work) < 10
