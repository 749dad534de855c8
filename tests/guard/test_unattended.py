"""A guard that no launcher hears: what it tells a job of Slurm's, how often, and what it believes of Slurm."""

from __future__ import annotations

import errno
import ipaddress
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from securerun.firewall.policy import Denial
from securerun.guard import program, unattended
from securerun.guard.protocol import Notice, Peers, encode
from securerun.guard.slurm_job import SlurmJob
from securerun.guard.unattended import Unattended
from securerun.linux import slurm
from securerun.linux.networks import Network

NODE, GIVEN_BACK = "10.77.0.1/32", "10.77.0.2/32"
USER = 1000
JOB = SlurmJob(7)
WHOLE = SlurmJob(7, user=USER, cgroup="/system.slice/slurmstepd.scope/job_7")
ANSWER = "JobId=7 JobName=x UserId=alice({user}) GroupId=alice(1000) JobState={state} NodeList=sl[0-1] BatchHost=sl0"


class FakeCgroup:
    """A whole job's, where nothing runs."""

    removed = False

    def populated(self) -> bool:
        return False

    def remove(self) -> None:
        self.removed = True


class Ground:
    """A guard's unattended part, with a scontrol of the tests' own that writes down what it was asked."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = place / "asked"
        self.answer = place / "answer"
        self.answer.write_text(ANSWER.format(user=USER, state="RUNNING"))
        self.command = place / "scontrol"
        self.command.write_text(f'#!/bin/sh\necho "$@" >> {self.asked}\n[ "$1" = notify ] || cat {self.answer}\n')
        self.command.chmod(0o755)
        monkeypatch.setattr(slurm, "find_scontrol", lambda: str(self.command))
        self.logged: list[str] = []
        self.cgroup = FakeCgroup()

    def unattended(self, job: SlurmJob = JOB, *, adopt: bool = False) -> Unattended:
        policy = SimpleNamespace(run_id="0" * 12, peers=(network(NODE), network(GIVEN_BACK)))
        order = SimpleNamespace(adopt=adopt)
        lease: Any = SimpleNamespace(policy=policy, caller=SimpleNamespace(user=USER), cgroup=self.cgroup, order=order)
        return Unattended(lease, job, self.logged.append)

    def told(self) -> list[str]:
        asked = self.asked.read_text().splitlines() if self.asked.exists() else []
        return [line.partition("securerun on ")[2].partition(": ")[2] for line in asked if line.startswith("notify 7 ")]


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    monkeypatch.setattr(unattended, "_give_up_privilege", lambda: None)
    yield Ground(tmp_path, monkeypatch)


def network(text: str) -> Network:
    return ipaddress.ip_network(text)


def denial(source: str = "10.77.0.4", packets: int = 3) -> Notice:
    return Notice((Denial(ipaddress.ip_address(source), 29500, packets),))


def look(at: Unattended, times: int = 6) -> None:
    for _ in range(times):
        at.look()
        deadline = time.monotonic() + 10
        while at._running is not None and not at._running.has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)


def test_who_is_turned_away_is_told_to_the_job_a_line_a_minute_and_logged(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = ground.unattended()
    guard.send(denial())
    look(guard)
    assert ground.told() == ["run 000000000000: turned away: 10.77.0.4 at port 29500 (3 attempts)"]
    for source in ("10.77.0.5", "10.77.0.6", "10.77.0.7"):
        guard.send(denial(source, 1))
    look(guard)
    assert len(ground.told()) == 1, "the minute is not over"
    assert [line.split()[4] for line in ground.logged] == ["10.77.0.4", "10.77.0.5", "10.77.0.6", "10.77.0.7"]
    monkeypatch.setattr(guard, "_notice_due", 0.0)
    look(guard)
    assert ground.told()[1].endswith("10.77.0.5 at port 29500 (1 attempt) (and 2 lines more in the log of this node)")


def test_a_flood_of_news_takes_no_memory_and_is_one_line(ground: Ground) -> None:
    guard = ground.unattended()
    for number in range(1000):
        guard.send(Notice(words=(f"{number} {'x' * 10_000}\x1b[2J",)))
    look(guard)
    (line,) = ground.told()
    assert len(line) < 500 and line.endswith("(and 999 lines more in the log of this node)") and "\x1b" not in line


@pytest.mark.parametrize(
    "answer", [ANSWER.format(user=1001, state="RUNNING"), "slurm_load_jobs error: Invalid job id specified"]
)
def test_nothing_is_said_to_a_job_that_is_not_the_users(ground: Ground, answer: str) -> None:
    ground.answer.write_text(answer)
    guard = ground.unattended()
    guard.send(denial())
    look(guard)
    guard.send(denial("10.77.0.5"))
    look(guard)
    assert ground.told() == []
    assert sum("nothing is said to job 7 of Slurm's" in line for line in ground.logged) == 1
    assert len(ground.asked.read_text().splitlines()) == 1, "it is asked once"


def test_slurm_that_does_not_answer_is_asked_again(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.answer.write_text("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    guard = ground.unattended()
    guard.send(denial())
    look(guard)
    assert ground.told() == []
    ground.answer.write_text(ANSWER.format(user=USER, state="RUNNING"))
    monkeypatch.setattr(guard, "_notice_due", 0.0)
    look(guard)
    assert len(ground.told()) == 1


def test_program_that_cannot_give_up_its_privilege_is_not_run_and_ends_nothing(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the child of a guard that has many descriptors gets no more to read what it has."""

    def cannot() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(unattended, "_give_up_privilege", cannot)
    at = ground.unattended()
    at.send(denial())
    look(at)
    assert not ground.asked.exists()


def test_of_several_tasks_of_a_node_one_speaks_and_all_are_logged(ground: Ground) -> None:
    guard = ground.unattended(SlurmJob(7, speaks=False))
    guard.send(denial())
    look(guard)
    assert ground.told() == [] and len(ground.logged) == 1 and not ground.asked.exists()


def test_program_that_hangs_is_killed_and_nobody_waits_for_it(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.command.write_text("#!/bin/sh\nsleep 60 & wait\n")
    guard = ground.unattended()
    guard.send(denial())
    began = time.monotonic()
    guard.look()
    guard.look()
    assert time.monotonic() - began < 2
    running = guard._running
    assert running is not None
    monkeypatch.setattr(running, "_until", 0.0)
    deadline = time.monotonic() + 10
    while not running.has_ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.has_ended()
    guard.look()


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "PENDING", "unknown"])
def test_whole_job_that_slurm_says_has_left_is_let_go(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Where there is no epilog."""
    answer = ANSWER.format(user=USER, state=state)
    ground.answer.write_text("slurm_load_jobs error: Invalid job id specified" if state == "unknown" else answer)
    guard = ground.unattended(WHOLE)
    look(guard)
    assert not ground.asked.exists(), "not before five minutes"
    monkeypatch.setattr(guard, "_over_due", 0.0)
    look(guard)
    assert ground.cgroup.removed


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED", "COMPLETING", "no answer"])
def test_whole_job_that_is_here_still_is_kept(ground: Ground, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    answer = ANSWER.format(user=USER, state=state)
    ground.answer.write_text("" if state == "no answer" else answer)
    guard = ground.unattended(WHOLE)
    monkeypatch.setattr(guard, "_over_due", 0.0)
    look(guard)
    assert ground.asked.exists() and not ground.cgroup.removed


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        (encode(Peers((network(NODE),))), True),
        (encode(Peers((network(NODE), network(GIVEN_BACK)))), False),
        (encode(Peers(())), False),
        (b"Traceback (most recent call last)\n", False),
        (b'{"release": {"failed": true}}\n', False),
        (b"", False),
    ],
)
def test_peers_that_slurm_names_are_taken_where_they_are_others(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes, taken: bool
) -> None:
    """What was turned away has Slurm asked sooner; what is not understood changes nothing."""
    output = tmp_path / "said"
    output.write_bytes(said)
    monkeypatch.setattr(program, "of_slurm", lambda *words: ["/bin/cat", os.fspath(output)])
    guard = ground.unattended(SlurmJob(7, speaks=False, renews=True))
    guard.send(denial())
    look(guard)
    assert guard.read() is None, "two minutes are not over"
    monkeypatch.setattr(guard, "_asked", time.monotonic() - unattended._HURRIED_SECONDS)
    look(guard)
    assert guard.read() == (Peers((network(NODE),)) if taken else None)
    assert guard.read() is None
