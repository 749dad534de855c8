"""What is read of the runs of others while everybody waits for the host's lock."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from securerun.errors import PolicyError, PrivilegeError
from securerun.firewall import tagging
from securerun.firewall.policy import (
    LAST_PORT,
    MOST_DENIALS,
    SHIELD,
    Denial,
    Layer,
    Policy,
    PortRange,
    Purpose,
)
from securerun.guard import documents, neighbours, reaper, records, run_directory
from securerun.guard.lease import Lease
from securerun.guard.limits import SitePolicy
from securerun.guard.protocol import Run, decode, encode
from securerun.guard.records import Record
from securerun.guard.share import Turn
from securerun.linux import proc, processes

ALICE, BOB, CAROL, DAVE = 61_001, 61_002, 61_003, 61_004
_MOST_PORTS = 4096


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def record(
    number: int, user: int, *peers: str, first: int = 20001, ports: int = 1, backend: str = "iptables"
) -> Record:
    """A run whose launcher and guard are this process."""
    ranges = tuple(PortRange(first + 2 * at, first + 2 * at, Purpose.OPENED_MEANWHILE) for at in range(ports))
    pid, start = os.getpid(), proc.start_time(os.getpid())
    return Record(
        policy=Policy(f"{number:012x}", ranges, tuple(map(ipaddress.ip_network, peers))),
        layers=(Layer(backend, "a layer"),),
        launcher=pid,
        launcher_start=start,
        guard=pid,
        guard_start=start,
        boot_id=proc.boot_id(),
        network=proc.namespace("net"),
        processes=proc.namespace("pid"),
        user=user,
        started=1.0,
        command="train.py",
        times=proc.time_namespace(),
    )


def gone(number: int, user: int) -> Record:
    """A run whose launcher and guard have ended."""
    return replace(record(number, user), guard_start=1, launcher_start=1)


class Clock:
    """The clock of whoever looks for dead runs, on which time passes when a process is asked for its environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds_a_read: float) -> None:
        self.seconds_a_read = seconds_a_read
        self.reads = 0
        self._now = 0.0
        self._read = proc.environment
        monkeypatch.setattr(proc, "environment", self.environment)
        for module in (reaper, processes):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self._now))

    def environment(self, pid: int) -> bytes:
        self.reads += 1
        self._now += self.seconds_a_read
        return self._read(pid)


def test_who_may_connect_to_runs_of_others_is_not_read_where_no_port_is_shared(
    directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 4,096 ports and as many peers takes 60 ms to understand, of which a user may have 32."""
    peers = [f"10.{number >> 8}.{number & 255}.1/32" for number in range(_MOST_PORTS)]
    for number in range(3):
        run_directory.write(directory, record(number, ALICE, *peers, ports=_MOST_PORTS))
    monkeypatch.setattr(documents, "read_network", _not_to_be_read)
    monkeypatch.setattr(records, "read_network", _not_to_be_read)
    monkeypatch.setattr(documents, "_read_port", _not_to_be_read)
    known = records.read_briefs(directory)
    assert [(brief.run_id, brief.owner, brief.guard_lives) for brief in known] == [
        (f"{number:012x}", (ALICE, False, ""), True) for number in range(3)
    ]
    run = record(9, BOB, "10.99.0.1/32", first=50001)
    neighbours.require_room(run, known, SitePolicy())
    neighbours.require_harmless(run, known)
    neighbours.require_harmless_peers(run, known)
    neighbours.require_unweakened(run, known)
    assert neighbours.harmful_ports(run, [50001], known) == {}


def _not_to_be_read(_: object) -> None:
    raise AssertionError("this takes microseconds, thousands of times, under the host's lock")


def test_runs_of_others_that_share_a_port_are_looked_at_for_their_peers(directory: int) -> None:
    run_directory.write(directory, record(1, ALICE, "10.0.0.1/32", first=29500))
    known = records.read_briefs(directory)
    for check in (neighbours.require_harmless_peers, neighbours.require_unweakened):
        check(record(9, BOB, "10.0.0.1/32", first=29500), known)
        with pytest.raises(PolicyError, match="choose other ports"):
            check(
                record(
                    9, BOB, "10.0.0.9/32" if check is neighbours.require_harmless_peers else "10.0.9.0/24", first=29500
                ),
                known,
            )
    found = neighbours.harmful_ports(record(9, BOB, "10.0.0.9/32"), [29500, 29501], known)
    assert list(found) == [29500] and "could reach that run" in found[29500]
    run_directory.write(directory, record(1, ALICE, "10.0.0.1/32", first=29500, backend=SHIELD))
    neighbours.require_harmless_peers(record(9, BOB, "10.0.0.9/32", first=29500), records.read_briefs(directory))


@pytest.mark.parametrize(
    "spoil",
    [
        '{"policy": {"run_id": "000000000001"}}',
        "[]",
        '"text"',
        "{",
        '{"policy": 7, "layers": []}',
        "[" * 100_000,
    ],
)
def test_what_is_no_record_is_passed_over(directory: int, tmp_path: Path, spoil: str) -> None:
    (tmp_path / "000000000001.json").write_text(spoil)
    run_directory.write(directory, record(2, ALICE))
    assert [brief.run_id for brief in records.read_briefs(directory)] == ["000000000002"]
    assert [whole.run_id for whole in records.read_all(directory)] == ["000000000002"]


def test_record_under_the_name_of_another_run_is_passed_over(directory: int, tmp_path: Path) -> None:
    run_directory.write(directory, record(2, ALICE))
    (tmp_path / "000000000002.json").rename(tmp_path / "000000000003.json")
    assert not records.read_briefs(directory) and not records.read_all(directory)


def test_record_whose_policy_cannot_be_understood_is_nobodys_neighbour(directory: int) -> None:
    known = record(1, ALICE, "10.0.0.1/32", first=29500)
    for field, value in (("peers", ["nonsense"]), ("ports", [{"first": 0, "last": 0}]), ("ports", 7), ("peers", [7])):
        document = known.document()
        document["policy"][field] = value
        run_directory.write_document(directory, f"{known.run_id}.json", document)
        (brief,) = records.read_briefs(directory)
        assert brief.whole() is None
        neighbours.require_harmless_peers(record(9, BOB, "10.0.0.9/32", first=29500), [brief])
        neighbours.require_unweakened(record(9, BOB, "10.0.0.9/32", first=29500), [brief])


def test_brief_has_all_of_its_record(directory: int) -> None:
    known = replace(record(1, ALICE, "10.0.0.0/8", "fd00::/8", ports=3), cgroup="/a/securerun-000000000001")
    run_directory.write(directory, known)
    (brief,) = records.read_briefs(directory)
    assert brief.whole() == known
    assert (brief.ports(), brief.peers()) == (known.policy.joined_ports(), known.policy.peers)
    assert (brief.is_bare, brief.stands_here, brief.cgroup) == (True, True, known.cgroup)


# --- what dead runs left is removed under the lock as well ---


def test_many_dead_runs_are_removed_a_few_seconds_at_a_time(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may take a while; who launches meanwhile waits for the lock, and the next launch goes on."""
    dead = [gone(number, ALICE) for number in range(6)]
    for one in dead:
        run_directory.write(directory, one)
    reaped = []

    def slowly(_: int, found: Record) -> None:
        time.sleep(0.2)
        reaped.append(found.run_id)

    monkeypatch.setattr(reaper, "reap", slowly)
    monkeypatch.setattr(reaper, "_REAPING_SECONDS", 0.3)
    assert list(reaper.reap_all(directory, BOB)) == []
    assert len(reaped) == 2


@pytest.fixture
def crowd(root: None) -> Iterator[int]:
    """A user with eight processes."""
    sleepers = [subprocess.Popen(["sleep", "600"], user=CAROL, env={}) for _ in range(8)]
    yield CAROL
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.wait()


def test_processes_are_asked_under_the_lock_for_no_longer_than_half_a_second_in_all(
    directory: int, crowd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users may have 5,000 with 6 MB of environment, of which each takes 30 ms; who was not asked may be the run's."""
    for number in range(3):
        run_directory.write(directory, gone(number, crowd))
    reaped: list[str] = []
    monkeypatch.setattr(reaper, "reap", lambda _, found: reaped.append(found.run_id))
    clock = Clock(monkeypatch, seconds_a_read=0.2)
    lines = list(reaper.reap_all(directory, crowd))
    assert clock.reads == 3
    assert reaped == []
    assert len(lines) == 3 and all("more processes than could be asked" in line for line in lines)
    clock.seconds_a_read = 0.001
    assert list(reaper.reap_all(directory, crowd)) == []
    assert clock.reads == 3 + 3 * 8
    assert len(reaped) == 3


def test_runs_for_which_there_is_no_time_keep_those_of_others_waiting_no_longer_than_a_few_launches(
    directory: int, crowd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users choose the ids of runs. The launching user's own come first, and the others as it happens."""
    users = [*[crowd] * 8, ALICE, BOB]
    for number, user in enumerate(users):
        run_directory.write(directory, gone(number, user))
    reaped: list[str] = []
    monkeypatch.setattr(reaper, "reap", lambda _, found: reaped.append(found.run_id))
    Clock(monkeypatch, seconds_a_read=0.6)
    list(reaper.reap_all(directory, BOB))
    assert reaped[0] == gone(9, BOB).run_id
    for _ in range(500):
        list(reaper.reap_all(directory, DAVE))
    assert set(reaped) == {gone(8, ALICE).run_id, gone(9, BOB).run_id}


def test_what_is_left_of_runs_without_a_guard_counts_as_runs(directory: int) -> None:
    for number, container in enumerate(["", "", "/pods/one", "/pods/two"]):
        run_directory.write(directory, replace(gone(number, ALICE), container=container))
    known, site = records.read_briefs(directory), SitePolicy()
    run = record(9, ALICE)
    inside = replace(run, container="/pods/one")
    for whole, limits in (
        (run, replace(site, runs_per_user=2)),
        (inside, replace(site, runs_per_container=1)),
        (inside, replace(site, runs_in_containers=2)),
    ):
        neighbours.require_room(whole, known, site)
        with pytest.raises(PrivilegeError, match="wait for an end"):
            neighbours.require_room(whole, known, limits)


def test_a_runs_part_of_the_hosts_lock_is_divided_by_its_users_runs_and_waiting_for_it_costs_nothing(
    directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for number, user in enumerate((ALICE, ALICE, ALICE, BOB)):
        run_directory.write(directory, record(number, user))

    @contextlib.contextmanager
    def recording() -> Iterator[int]:
        now[0] += 100.0  # others have it
        yield directory

    def write(*_: object) -> None:
        now[0] += 2.0

    monkeypatch.setattr(run_directory, "recording", recording)
    monkeypatch.setattr(run_directory, "write", write)
    lease = object.__new__(Lease)
    lease.record = record(0, ALICE)
    lease.policy = Policy(f"{0:012x}", (), ())
    lease.order = cast("Any", SimpleNamespace(policy=lease.policy))
    lease.chains, lease.turn = None, Turn()
    for change in (lambda: lease.close_found([20001]), lambda: lease.note_open_ports([80])):
        change()
        # Of 4 s at once, and then a quarter, three runs took 2 s as if each had.
        assert lease.turn.due - now[0] == pytest.approx((3 * 2.0 - 4.0) / 0.25)


def _largest() -> Record:
    """A run with a key, of all that there may be: peers, ports, those found meanwhile, strangers, and its command."""
    start = int(ipaddress.ip_address("2001:db8:1234:5678:9abc:def0:1234:1000"))
    peers = tuple(ipaddress.IPv6Network(start + 2 * number) for number in range(documents.MAXIMUM_PEERS))
    planned = tuple(PortRange(at, at, "p" * 80) for at in range(1, 1 + documents.MAXIMUM_PORT_RANGES))
    found = tuple(PortRange(at, at, Purpose.OPENED_MEANWHILE) for at in range(1, LAST_PORT + 1, 2))
    policy = Policy("0" * 11 + "1", (*planned, *found), peers)
    own = (ipaddress.ip_network("198.51.100.1/32"), ipaddress.ip_network("203.0.113.0/24"))
    policy = tagging.by_key(policy, own, required=False, within=(ipaddress.ip_network("2000::/3"),))
    strangers = tuple(Denial(peer.network_address, LAST_PORT, 2**63) for peer in peers[:MOST_DENIALS])
    single = tuple((port.first, port.first) for port in found)
    return replace(
        record(1, ALICE),
        policy=policy,
        command="\U0001f600" * documents.MAXIMUM_TEXT,
        denied=strangers,
        reserved=single,
        left_open=single[: records.MOST_RANGES_LEFT_OPEN],
    )


def test_largest_record_that_may_be_written_is_read_and_told_to_its_launcher(directory: int, tmp_path: Path) -> None:
    largest = _largest()
    run_directory.write(directory, largest)
    (name,) = tmp_path.iterdir()
    assert documents.MAXIMUM_BYTES < name.stat().st_size <= documents.MAXIMUM_RECORD_BYTES
    (brief,) = records.read_briefs(directory)
    assert brief.whole() == largest
    told = Run({**largest.document(), "guard_lives": True})
    assert decode(encode(told), of_guard=True) == told


def test_record_that_its_reader_would_not_take_is_not_written(directory: int, tmp_path: Path) -> None:
    run_directory.write(directory, record(1, ALICE))
    with pytest.raises(OSError, match="it would have more than"):
        run_directory.write(directory, replace(record(1, ALICE), command="x" * documents.MAXIMUM_RECORD_BYTES))
    assert [one.name for one in tmp_path.iterdir()] == ["000000000001.json"]
    assert [whole.command for whole in records.read_all(directory)] == ["train.py"]
