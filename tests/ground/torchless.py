"""Tests on machines without torch, such as those of the kernel matrix: what launches it is skipped there.

In CI nothing is: what is missing there, scripts/setup.sh has left out.
"""

from __future__ import annotations

import importlib.util
import os
import re

import pytest

IS_WITHOUT_TORCH = importlib.util.find_spec("torch") is None and "CI" not in os.environ
# What securerun says there (run.py), and what Python says.
_MISSED = re.compile(r"has no module torch\b|No module named '?torch\b")


def skip_if_missed(said: str) -> None:
    """Skip the running test where torch is not here, and this, which a program or an error said, is about that."""
    if IS_WITHOUT_TORCH and _MISSED.search(said):
        pytest.skip("needs torch, which is not installed here")
