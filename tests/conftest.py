"""Fixtures for tests that need hosts, and a clean end when the run itself is told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
from hosts import MachineState, Network, eventually, hear_signals, machine_snapshot, require_root_and_tools

# How long a guard may take after the last process of its job.
_GUARD_SECONDS = 5.0


def pytest_configure() -> None:
    hear_signals()
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


@pytest.fixture(scope="session")
def machine_at_start() -> MachineState:
    """What securerun had on this machine before the tests: runs of others, or remains of a session that was killed."""
    return machine_snapshot()


@pytest.fixture(autouse=True)
def _nothing_of_securerun_is_left(machine_at_start: MachineState) -> Iterator[None]:
    """No test leaves a cgroup or a record; the next one begins when the guards of the one before are done."""
    yield
    assert eventually(lambda: _is_clean(machine_at_start), seconds=_GUARD_SECONDS), machine_snapshot()


def _is_clean(before: MachineState) -> bool:
    now = machine_snapshot()
    return (now.cgroups or frozenset()) <= (before.cgroups or frozenset()) and (
        now.records is None or (before.records is not None and now.records <= before.records)
    )
