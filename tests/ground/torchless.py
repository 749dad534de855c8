"""Tests on machines without torch, such as those of the kernel matrix: what launches it is skipped there.

In CI nothing is: what is missing there, scripts/setup.sh has left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Callable, TypeVar

if TYPE_CHECKING:
    import pytest

IS_WITHOUT_TORCH = importlib.util.find_spec("torch") is None and "CI" not in os.environ
_REASON = "needs torch, which is not installed here"
_Test = TypeVar("_Test", bound=Callable[..., object])
# What securerun says there (run.py), and what Python says.
_MISSED = re.compile(r"has no module torch\b|No module named '?torch\b")


def skip_if_missed(said: str) -> None:
    """Skip the running test where torch is not here, and this, which a program or an error said, is about that."""
    if IS_WITHOUT_TORCH and _MISSED.search(said):
        import pytest  # scripts/quickstart.py has none

        pytest.skip(_REASON)


def skip_modules_that_import_it(report: pytest.CollectReport) -> None:
    """Turn the error of a module of tests that imports torch, where it is not here, into a skip with a reason."""
    if IS_WITHOUT_TORCH and report.failed and _MISSED.search(str(report.longrepr)):
        report.outcome = "skipped"
        report.longrepr = (report.nodeid, 0, f"Skipped: {_REASON}")


def needs_torch(test: _Test) -> _Test:
    """Mark a test that only waits in vain for what its job says, where there is no torch."""
    import pytest

    marked: _Test = pytest.mark.skipif(IS_WITHOUT_TORCH, reason=_REASON)(test)
    return marked


@contextlib.contextmanager
def skipped_without_torch() -> Iterator[None]:
    """Skip the running test where the block fails since torch is not here."""
    try:
        yield
    except Exception as error:
        skip_if_missed(f"{error}{getattr(error, 'stderr', '')}")
        raise
