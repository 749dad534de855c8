"""The host's lock at the moment at which the time to wait for it is up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from securerun.errors import PrivilegeError
from securerun.guard import run_directory
from securerun.linux import file_lock
from securerun.linux.file_lock import TimeUp


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "securerun"
    monkeypatch.setattr(run_directory, "DIRECTORY", place)
    return place


def may_be_locked(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        return file_lock.lock_at_once(descriptor)
    finally:
        os.close(descriptor)


def test_lock_that_is_had_as_the_time_is_up_is_not_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knew of it: all guards of the host would have waited for the end of the one that has it."""

    @contextmanager
    def up_at_the_end(_seconds: float) -> Iterator[None]:
        yield
        raise TimeUp

    monkeypatch.setattr(file_lock, "time_limit", up_at_the_end)
    with pytest.raises(PrivilegeError, match="another guard has held the lock"), run_directory.host_lock():
        pass
    assert may_be_locked(directory)


def test_lock_that_another_has_is_waited_for_no_longer_than_is_said(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "_LOCK_SECONDS", 0.2)
    before = len(os.listdir("/proc/self/fd"))
    with run_directory.host_lock():
        began = time.monotonic()
        with pytest.raises(PrivilegeError, match="another guard has held the lock"), run_directory.host_lock():
            pass
        assert time.monotonic() - began >= 0.2
    assert len(os.listdir("/proc/self/fd")) == before


def test_alarm_that_has_rung_rings_no_more() -> None:
    """What is told of too late ended a guard where nobody waited for anything any more."""
    with pytest.raises(TimeUp), file_lock.time_limit(0.01):
        ring = signal.getsignal(signal.SIGALRM)
        time.sleep(10)
    assert callable(ring)
    ring(signal.SIGALRM, None)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
