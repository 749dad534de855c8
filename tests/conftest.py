"""Fixtures for tests that need hosts, and a clean end when the run itself is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType

import kernel
import pytest
from attacking import Ground
from checkout import COMMANDS
from conversation import nothing_left, permit, socket_unit
from engines import Node
from guards_log import GuardsLog
from hosts import (
    NAMESPACES,
    Host,
    MachineState,
    Network,
    eventually,
    hear_signals,
    machine_snapshot,
    require_root_and_tools,
)
from lacking import Lacking, skipped_where_lacking
from patience import wait_for_programs_as_patiently
from torchless import skip_modules_that_import_it, skipped_without_torch
from users import PrivateMachine

from securerun.guard.protocol import RUN_ID_VARIABLE

# How long a guard may take after the last process of its job.
_GUARD_SECONDS = 5.0


def pytest_configure() -> None:
    hear_signals()
    wait_for_programs_as_patiently()
    signal.signal(signal.SIGTERM, _stop)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """A test run that is told to end unwinds, so that its hosts are removed."""
    raise KeyboardInterrupt


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--apart", action="store_true", help="compare all launches in networks of their own, not only a few"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what asks for root, itself or by way of its fixtures: `scripts/test.sh --fast` leaves it out.

    Machines come first: a file of few tests that take minutes each must not be what all others wait for at the end.
    """
    left_out = {item for item in items if _is_left_out(item, every=config.getoption("--apart"))}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: item.get_closest_marker("machine") is None)
    for item in items:
        if isinstance(item, pytest.Function) and "root" in item.fixturenames:
            item.add_marker("ground")


def _is_left_out(item: pytest.Item, *, every: bool) -> bool:
    """Return whether this is a launch in a network of its own that is not to be compared."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    if item.callspec.params.get("pair") != "apart":
        return False
    return item.get_closest_marker("in_this_network") is not None or not (every or item.get_closest_marker("apart"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Skip what needs of the kernel what it has not got."""
    for mark in item.iter_markers("kernel"):
        for need in mark.args:
            kernel.require(need)
    with skipped_where_lacking(), skipped_without_torch():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    skip_modules_that_import_it(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with skipped_where_lacking(), skipped_without_torch():
        return (yield)


@pytest.fixture(scope="session")
def root() -> None:
    """Whatever only root can do: a test that does it asks for this."""
    if os.geteuid() != 0:
        raise Lacking("this needs root; run it as root")


@pytest.fixture(scope="session")
def root_and_tools(root: None) -> None:
    """What hosts are made with."""
    require_root_and_tools()


@pytest.fixture
def network(root_and_tools: None) -> Iterator[Network]:
    """node0, node1 and stranger, for one test."""
    with Network("node0", "node1", "stranger") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def node(root_and_tools: None) -> Iterator[Host]:
    """One host, for the tests of a file that leave it as they found it."""
    with Network("node0") as network:
        yield network["node0"]


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A script that says that it ran, and with which arguments."""
    path = tmp_path / "script.py"
    path.write_text("import sys; print('ran with', *sys.argv[1:])")
    return str(path)


@pytest.fixture(scope="session")
def machine_at_start() -> MachineState | None:
    """What securerun had on this machine before the tests: runs of others, or remains of a session that was killed.

    None for who is not root: cgroups and records are made by root alone, and while such a one tests, runs of others
    come and go.
    """
    return machine_snapshot() if os.geteuid() == 0 else None


@pytest.fixture(scope="session")
def guards_log() -> GuardsLog:
    return GuardsLog()


@pytest.fixture(autouse=True)
def _no_guard_has_died_of_a_defect(guards_log: GuardsLog) -> Iterator[None]:
    """In this test or in one beside it: another guard takes over, so only the log tells."""
    yield
    assert guards_log.defects() == []


@pytest.fixture(autouse=True)
def _nothing_of_securerun_is_left(machine_at_start: MachineState | None) -> Iterator[None]:
    """No test leaves a cgroup or a record; the next one begins when the guards of the one before are done.

    Nor the id of a run in this process' environment: all that is started later would be taken for that run's.
    """
    before = os.environ.get(RUN_ID_VARIABLE)
    yield
    assert os.environ.get(RUN_ID_VARIABLE) == before, os.environ.pop(RUN_ID_VARIABLE)
    if machine_at_start is not None and not eventually(lambda: _is_clean(machine_at_start), seconds=_GUARD_SECONDS):
        left = machine_snapshot()
        _clean()  # for the tests after this one, which would all fail of it
        pytest.fail(f"left: {left}")


def _clean() -> None:
    """Have securerunctl remove what dead runs left, in each network of the tests that there is still, and here."""
    places = sorted(NAMESPACES.iterdir()) if NAMESPACES.is_dir() else []
    for words in (*(["nsenter", f"--net={place}", "--"] for place in places), []):
        subprocess.run([*words, COMMANDS / "securerunctl", "clean"], check=False, timeout=60)


def _is_clean(before: MachineState) -> bool:
    now = machine_snapshot()
    return (now.cgroups or frozenset()) <= (before.cgroups or frozenset()) and (
        now.records is None or (before.records is not None and now.records <= before.records)
    )


@pytest.fixture(scope="module")
def container_node(root_and_tools: None) -> Iterator[Node]:
    """A node that has podman and docker, on a network with a stranger."""
    with Network("node0", "stranger") as network, Node(network["node0"]) as node:
        node.stranger = network["stranger"]
        yield node


@pytest.fixture(scope="module")
def machine(root_and_tools: None) -> Iterator[Ground]:
    """One for all tests: to make it takes longer than most of them do."""
    with Network("node0", "node1", "stranger") as network, PrivateMachine() as private:
        alice, bob = private.add_user("alice"), private.add_user("bob")
        node, peer, stranger = network
        with socket_unit(private, node):
            yield Ground(private, node, peer, stranger, alice, bob)


@pytest.fixture
def ground(machine: Ground) -> Iterator[Ground]:
    """The machine as it was at first; and whatever a test does, no guard, run or rule is left of it afterwards."""
    private = machine.machine
    forget = 'rm -rf /run/securerun /run/securerun.callers /etc/securerun /var/log/securerun.log "$0"/* "$1"/*'
    private.run(machine.node, ["sh", "-c", forget, machine.alice.home, machine.bob.home])
    permit(private, machine.alice, machine.bob)
    with nothing_left(private, machine.node):
        yield machine
        private.end_users()
