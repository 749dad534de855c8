"""Tests on machines without torch, such as those of the kernel matrix: what launches it is skipped there.

In CI nothing is: what is missing there, scripts/setup.sh has left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator

import pytest

IS_WITHOUT_TORCH = importlib.util.find_spec("torch") is None and "CI" not in os.environ
# Of tests that only wait in vain for what their job says.
NEEDS_TORCH = pytest.mark.skipif(IS_WITHOUT_TORCH, reason="needs torch, which is not installed here")
# What securerun says there (run.py), and what Python says.
_MISSED = re.compile(r"has no module torch\b|No module named '?torch\b")


def skip_if_missed(said: str) -> None:
    """Skip the running test where torch is not here, and this, which a program or an error said, is about that."""
    if IS_WITHOUT_TORCH and _MISSED.search(said):
        pytest.skip("needs torch, which is not installed here")


@contextlib.contextmanager
def skipped_without_torch() -> Iterator[None]:
    """Skip the running test where the block fails since torch is not here."""
    try:
        yield
    except Exception as error:
        skip_if_missed(f"{error}{getattr(error, 'stderr', '')}")
        raise
