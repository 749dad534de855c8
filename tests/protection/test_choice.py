"""What is done while a launcher waits to hear whether a guard is available: nothing is lost by the question."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from securerun.job import key
from securerun.options import Options
from securerun.protection import choice
from securerun.protection.client import Guard
from securerun.run import _OF_TORCH


class _Answering:
    """A connection by which something comes after so many looks."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def has_answer(self) -> bool:
        self._looks -= 1
        return self._looks < 0


def test_what_is_to_be_done_anyway_is_done_until_a_guard_has_answered() -> None:
    taken = []

    def steps() -> Iterator[None]:
        for number in range(10):
            taken.append(number)
            yield

    guard = Guard.__new__(Guard)
    guard._connection = _Answering(3)  # type: ignore[assignment]
    guard._is_ready = True
    assert guard.can_be_had(steps())
    assert taken == [0, 1, 2, 3]


def test_what_is_loaded_ahead_is_what_torch_loads_and_starts_no_thread() -> None:
    ahead = f"import importlib, os; [importlib.import_module(name) for name in {_OF_TORCH!r}]"
    look = f"{ahead}; print(len(os.listdir('/proc/self/task')))"
    assert _printed(look) == "1\n"
    missing = f"import sys, torch.distributed.run; print({{*{_OF_TORCH!r}}} - {{*sys.modules}})"
    assert _printed(missing) == "set()\n"


def _printed(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


class _Recorded:
    """In the place of a guard: what it is told of the order to come."""

    is_roots = True

    def __init__(self, *, goes_on: bool, brings_key: bool) -> None:
        self.brings_key = brings_key


@pytest.mark.parametrize(
    ("asked", "several", "source", "likely"),
    [
        ({}, "--nnodes 2", "the user's", True),
        ({}, "--nnodes 2", "the site's", True),
        ({}, "--nnodes 2", "Slurm's", True),
        ({}, "--nnodes 2", "", False),
        ({}, "", "the user's", False),
        ({"key": "off"}, "--nnodes 2", "the user's", False),
        ({"key": "require"}, "", "", True),
        ({"key": "job.key"}, "", "", True),
        ({"unprotected": True}, "--nnodes 2", "the user's", False),
    ],
)
def test_a_guard_is_told_of_a_key_where_the_order_is_likely_to_have_one(
    asked: dict[str, Any],
    several: str,
    source: str,
    likely: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users, site = tmp_path / ".config/securerun/key", tmp_path / "site.key"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(key, "SITE_KEY", site)
    monkeypatch.setattr(choice, "Guard", _Recorded)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if source == "Slurm's":
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
    elif source:
        place = users if source == "the user's" else site
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()  # not to be read yet, whatever is in it
    guard = choice.begin(Options(**asked), several, goes_on=False)
    assert guard.brings_key is likely  # type: ignore[union-attr]
