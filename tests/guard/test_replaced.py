"""A guard without a launcher that would replace it: who waits for it does, however it died, while the job is there."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from cgroups import in_child
from test_protocol import ORDER
from test_slurm_orders import WHOLE

from securerun.guard import replaced

DEFECT, TAKEN_OVER = "ends by a defect", "takes over and ends well"


def lives(place: Path, *deaths: str, monkeypatch: pytest.MonkeyPatch, is_there: bool = True) -> list[str]:
    """What each guard of a job did, and how who waited for them ended; after these deaths one ends well."""
    monkeypatch.setattr(replaced, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(replaced, "_is_there", lambda *_: is_there)
    monkeypatch.setattr(replaced, "_as_recorded", lambda order: order)

    def guard() -> None:
        order, _ = replaced.go_on_in_a_child(replace(ORDER, slurm=WHOLE), WHOLE)
        number = len(list(place.iterdir()))
        death = deaths[number] if number < len(deaths) else TAKEN_OVER
        (place / f"{number} {death}").touch()
        assert order.adopt == (number > 0)
        if death == DEFECT:
            os._exit(1)
        if death == TAKEN_OVER:
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    waits = os.fork()
    if waits == 0:
        try:
            guard()
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(waits, 0)[1])
    return [*(entry.name[2:] for entry in sorted(place.iterdir())), str(status)]


def test_guard_that_ends_by_a_defect_is_replaced_as_one_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = in_child(lambda: lives(tmp_path, DEFECT, "is killed", DEFECT, monkeypatch=monkeypatch))
    assert found == [DEFECT, "is killed", DEFECT, TAKEN_OVER, "0"]


def test_guard_of_a_job_that_is_not_there_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_child(lambda: lives(tmp_path, DEFECT, monkeypatch=monkeypatch, is_there=False)) == [DEFECT, "1"]


def test_guard_for_which_there_is_no_process_for_a_moment_is_replaced_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, forks = os.fork, 0

    def none_at_third() -> int:
        nonlocal forks
        forks += 1
        if forks == 3:  # the first is the test's, the second the first guard's
            raise BlockingIOError
        return fork()

    def tried() -> list[str]:
        monkeypatch.setattr(os, "fork", none_at_third)
        return lives(tmp_path, DEFECT, monkeypatch=monkeypatch)

    assert in_child(tried) == [DEFECT, TAKEN_OVER, "0"]
