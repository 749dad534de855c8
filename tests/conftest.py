"""Fixtures for tests that need hosts, and a clean end when the run itself is told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
from hosts import Network, eventually, machine_snapshot, require_root_and_tools

# How long a guard may take after the last process of its job.
_GUARD_SECONDS = 5.0


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, _stop)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """A test run that is told to end unwinds, so that its hosts are removed."""
    raise KeyboardInterrupt


@pytest.fixture
def network() -> Iterator[Network]:
    """node0, node1 and stranger, for one test; skipped without root, but never in CI."""
    try:
        require_root_and_tools()
    except RuntimeError as missing:
        if "CI" in os.environ:
            raise
        pytest.skip(str(missing))
    with Network("node0", "node1", "stranger") as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def _nothing_of_securerun_is_left() -> Iterator[None]:
    """No test begins before the guards of the one before are done, and none leaves a cgroup or a record."""
    eventually(_is_clean, seconds=_GUARD_SECONDS)
    yield
    assert eventually(_is_clean, seconds=_GUARD_SECONDS), machine_snapshot()


def _is_clean() -> bool:
    state = machine_snapshot()
    return state.records is None and not state.cgroups
