"""What is done while a launcher waits to hear whether a guard is available: nothing is lost by the question."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

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
