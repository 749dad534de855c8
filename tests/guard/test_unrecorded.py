"""Who stands for a run whose record is elsewhere: a guard, and nobody who merely has its name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cgroups import in_child

from securerun.guard import unrecorded
from securerun.guard.presence import Presence
from securerun.guard.protocol import presence_of
from securerun.linux import prctl

pytestmark = pytest.mark.usefixtures("root")
RUN = "0123456789ab"
LISTEN = """
import socket, sys
ends = []
for name in sys.argv[1:]:
    ends.append(socket.socket(socket.AF_UNIX))
    ends[-1].bind("\\0" + name)
    ends[-1].listen()
print("stands", flush=True)
input()
"""


def test_nobody_stands_for_a_run_without_a_guard() -> None:
    assert not unrecorded.is_stood_for(RUN)


def test_guard_stands_for_its_run() -> None:
    presence = Presence(RUN)
    assert unrecorded.is_stood_for(RUN)
    presence.close()
    assert not unrecorded.is_stood_for(RUN)


def test_guard_whose_name_is_taken_stands_at_another() -> None:
    """There it is known by the process that holds the socket: of such names anybody may have any number."""
    with taken():
        assert not unrecorded.is_stood_for(RUN)
        presence = Presence(RUN)
        name = Path("/proc/self/comm").read_text().strip()
        prctl.set_name("securerun-guard")
        assert unrecorded.is_stood_for(RUN)
        prctl.set_name(name)
        presence.close()


def test_many_names_neither_hide_a_guard_nor_stand_for_one() -> None:
    with taken(*(f"{presence_of(RUN)}-{number:016x}" for number in range(200))):
        assert not unrecorded.is_stood_for(RUN)


def test_name_that_is_written_like_more_lines_is_one() -> None:
    """What a name has in it is its user's to choose, newlines too, and the kernel lists it as it is."""
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(f"{presence_of(RUN)}\n0: 2 0 00010000 1 1 {os.fstat(end.fileno()).st_ino} @{presence_of(RUN)[1:]}")
        end.listen()
        assert not unrecorded.is_stood_for(RUN)


def test_name_that_is_held_and_not_listened_at_is_no_guards() -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(presence_of(RUN))
        assert not unrecorded.is_stood_for(RUN)


def test_guard_that_ended_stands_no_more_whoever_was_handed_its_socket() -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(presence_of(RUN))
        in_child(lambda: end.listen())
        assert not unrecorded.is_stood_for(RUN)


@contextmanager
def taken(*names: str) -> Iterator[None]:
    """The name, or these, in the hands of a root without capabilities."""
    words = [name[1:] for name in names or [presence_of(RUN)]]
    limited = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", LISTEN, *words]
    holder = subprocess.Popen(limited, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert holder.stdout is not None and holder.stdout.readline() == "stands\n"
    yield
    holder.communicate(timeout=20)
