"""How often a guard looks for what its job listens on, and changes the chains for it, whatever the job does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from cgroups import inside
from hosts import Network

from securerun.firewall.policy import Policy, PortRange
from securerun.guard import exposure
from securerun.guard.exposure import Exposure
from securerun.guard.lease import Lease
from securerun.guard.limits import SitePolicy
from securerun.guard.share import MOST_OF_LOCK, Turn
from securerun.linux import proc
from securerun.linux.processes import Process
from securerun.linux.sock_diag import Listener

RUN_ID = "0123456789ab"
TURN_SECONDS = 0.05
HELD_SECONDS = 0.1
AT_ONCE_SECONDS = 4.0
STRANGER = 4_000_001


class Clock:
    """The time, and this process' own, as the test has them."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.of_process = 10.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.monotonic", lambda: made.now)
    monkeypatch.setattr("time.process_time", lambda: made.of_process)
    return made


class FakeLease:
    """A lease in scope `ports` of an ordinary user's job, whose chains take a while to change."""

    def __init__(self, clock: Clock | None, *pids: int, runs: int = 1) -> None:
        self.policy = Policy(RUN_ID, (PortRange(29500, 29500, "x"),), ())
        self.order = SimpleNamespace(policy=self.policy, slurm=None)
        self.caller = SimpleNamespace(user=os.geteuid(), is_root=False, container="")
        self.site = SitePolicy()
        self.cgroup = None
        self.is_shielded = self.closes_all = False
        self.chains = object()
        self.turn = Turn()
        self.turn.runs = runs
        self.closed: list[set[int]] = []
        self.noted: list[set[int]] = []
        self._clock = clock
        self._pids = pids

    def found_ports(self) -> Iterator[int]:
        return iter(())

    def processes(self) -> list[Process]:
        return [Process(pid, proc.start_time(pid)) for pid in self._pids]

    def close_found(self, ports: Collection[int]) -> dict[int, str]:
        with self.turn.counted():
            self._hold()
        self.closed.append(set(ports))
        return {}

    def note_open_ports(self, ports: Iterable[int]) -> None:
        with self.turn.counted():
            self._hold()
        self.noted.append(set(ports))

    def _hold(self) -> None:
        if self._clock is not None:
            self._clock.now += HELD_SECONDS

    @property
    def changes(self) -> int:
        """How often the host's lock was taken."""
        return len(self.closed) + len(self.noted)


class Host:
    """What listens on the host, as the test says, all of it held by the job; counts the looks at who holds what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock, lease: FakeLease) -> None:
        self.listeners: tuple[Listener, ...] = ()
        self.looks = 0
        self.look_seconds = 0.001
        self._clock = clock
        self._next_port = 20000
        self.exposure = Exposure(cast("Lease", lease))
        monkeypatch.setattr(self.exposure._diagnosis, "listeners", lambda: self.listeners)
        monkeypatch.setattr(proc, "descriptors_of", lambda _: self._looked())

    def _looked(self) -> Iterator[tuple[int, int]]:
        self.looks += 1
        self._clock.of_process += self.look_seconds
        self._clock.now += self.look_seconds
        yield from ((1, one.inode) for one in self.listeners)

    def listen(self, user: int | None = None, port: int | None = None) -> int:
        self._next_port += 1
        number = port or self._next_port
        any_address = Listener(
            exposure._ANY_ADDRESS, number, os.geteuid() if user is None else user, self._next_port * 10, None
        )
        self.listeners = (*self.listeners, any_address)
        return number

    def turn(self) -> tuple[str, ...]:
        self._clock.now += TURN_SECONDS
        return self.exposure.close()


def test_ports_that_a_job_opens_at_its_start_are_closed_at_the_next_turn_each(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = FakeLease(clock)
    host = Host(monkeypatch, clock, lease)
    for _ in range(30):
        port = host.listen()
        assert host.turn() == ()
        assert port in lease.closed[-1]
    assert not lease.noted


@pytest.mark.parametrize("runs", [1, 32])
def test_user_who_opens_ports_without_end_has_the_hosts_lock_for_a_part_of_the_time(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    """All runs of one user together: each of 32 has a 32nd of it."""
    lease = FakeLease(clock, runs=runs)
    host = Host(monkeypatch, clock, lease)
    said: list[str] = []
    began = clock.now
    while clock.now < began + 400:
        host.listen()
        host.listeners = host.listeners[-60:]
        said += host.turn()
    held_seconds = (lease.changes - 1) * HELD_SECONDS * runs
    assert held_seconds <= AT_ONCE_SECONDS + MOST_OF_LOCK * (clock.now - began)
    assert lease.changes > 2, "its ports are closed in the end"
    assert len([line for line in said if "its guard closes new ports later" in line]) == 1


def test_ports_that_waited_for_their_turn_are_closed_when_it_comes(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = FakeLease(clock)
    host = Host(monkeypatch, clock, lease)
    host.turn()
    lease.turn.due = clock.now + 10
    ports = {host.listen() for _ in range(3)}
    while clock.now < lease.turn.due - 2 * TURN_SECONDS:
        host.turn()
    assert not lease.closed and host.exposure.left_open.keys() == ports
    for _ in range(4):
        host.turn()
    assert lease.closed == [ports] and not host.exposure.left_open and not lease.noted


@pytest.mark.parametrize("runs", [1, 32])
def test_ports_that_may_not_be_closed_take_the_hosts_lock_no_more_often_however_they_change(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    """Each time the record says which are open."""
    lease = FakeLease(clock, runs=runs)
    host = Host(monkeypatch, clock, lease)
    began = clock.now
    for number in range(4000):
        host.listeners = ()
        host.listen(port=80 + number % 2)
        host.turn()
    assert lease.noted and not lease.closed
    assert (lease.changes - 1) * HELD_SECONDS * runs <= AT_ONCE_SECONDS + MOST_OF_LOCK * (clock.now - began)


def test_look_at_very_many_descriptors_rests_nine_times_as_long_as_it_took(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(monkeypatch, clock, FakeLease(clock))
    host.look_seconds = 2.0
    began = clock.now
    while clock.now < began + 400:
        host.turn()
    assert 10 < host.looks <= 400 / (10 * host.look_seconds) + 1


def test_job_that_opens_ports_without_end_is_looked_at_for_a_part_of_the_time_and_told_so_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = FakeLease(None)
    host = Host(monkeypatch, clock, lease)
    host.look_seconds = 0.2
    said: list[str] = []
    began, before = clock.now, clock.of_process
    while clock.now < began + 400:
        host.listen()
        host.listeners = host.listeners[-60:]
        said += host.turn()
    assert clock.of_process - before <= AT_ONCE_SECONDS + 0.2 * (clock.now - began) + host.look_seconds
    assert len([line for line in said if "its guard closes new ports later" in line]) == 1


def test_listeners_of_others_that_come_and_go_have_nobody_looked_at_more_often(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(monkeypatch, clock, FakeLease(clock))
    began = clock.now
    while clock.now < began + 20:
        host.listeners = ()
        host.listen(STRANGER)
        host.turn()
    assert host.looks <= 21


def test_port_that_one_look_misses_stays_closed_however_long_ago_the_last_one_was(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = FakeLease(clock)
    host = Host(monkeypatch, clock, lease)
    port = host.listen()
    host.turn()
    assert lease.closed == [{port}]
    for _ in range(2):
        clock.now += 30
        kept, host.listeners = host.listeners, ()
        host.turn()
        clock.now += 30
        host.listeners = kept
        host.turn()
    assert lease.closed == [{port}]
    host.listeners = ()
    for _ in range(2):
        clock.now += 30
        host.turn()
    assert lease.closed == [{port}, set()]


# Holds many descriptors, and a listener that comes after them.
_MANY = """
import os, socket, sys
ends = [os.open("/dev/null", os.O_RDONLY) for _ in range(900)]
made = socket.create_server(("10.77.0.1", 20777))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(network: Network) -> Iterator[int]:
    process = network["node0"].popen([sys.executable, "-ISc", _MANY], stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    yield process.pid
    process.stdin.close()
    process.wait()


def test_guard_looks_at_some_descriptors_a_turn_and_finds_the_listener_among_them_all(
    network: Network, holder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposure, "_DESCRIPTORS_AT_ONCE", 100, raising=False)
    read: list[str] = []
    socket_at = proc._socket_at

    def counted(directory: int, name: str) -> object:
        read.append(name)
        return socket_at(directory, name)

    monkeypatch.setattr(proc, "_socket_at", counted)
    lease = FakeLease(None, holder)
    with inside(network["node0"]):
        looking = Exposure(cast("Lease", lease))
    said: list[str] = []
    turns = 0
    while not lease.closed and turns < 20:
        before = len(read)
        looking._next_look = 0.0
        said += looking.close()
        assert len(read) - before <= 100
        turns += 1
    assert lease.closed == [{20777}]
    assert turns == 1 + len(read) // 100
    assert len(said) == 1 and "so many open files" in said[0]


def test_number_that_is_another_process_by_the_next_turn_is_not_the_jobs(
    network: Network, holder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposure, "_DESCRIPTORS_AT_ONCE", 1, raising=False)
    lease = FakeLease(None, os.getpid())
    gone = Process(holder, 1)
    monkeypatch.setattr(lease, "processes", lambda: [Process(os.getpid(), proc.start_time(os.getpid())), gone])
    with inside(network["node0"]):
        looking = Exposure(cast("Lease", lease))
    held = len(proc.own_descriptors())
    for _ in range(held + 1000):
        looking._next_look = 0.0
        looking.close()
    assert not lease.closed and not looking.left_open


def test_guard_gives_up_on_descriptors_without_end_and_says_once_what_it_did_not_see(
    network: Network, holder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the job has left would else be closed to others for as long as it likes."""
    monkeypatch.setattr(exposure, "_DESCRIPTORS_AT_ONCE", 20, raising=False)
    lease = FakeLease(None, holder)
    with inside(network["node0"]):
        looking = Exposure(cast("Lease", lease))
    left = 20778
    looking._closed = {left: 0.0}
    said: list[str] = []
    for _ in range(100):
        looking._next_look = looking._next_leave = 0.0
        said += looking.close()
    assert lease.closed == [set()], "what it left is opened, and what is not found stays open"
    assert [line for line in said if "its guard looks at no more" in line] == said[1:]
    assert len(said) == 2
