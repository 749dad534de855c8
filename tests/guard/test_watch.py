"""What a guard that looks after a job goes on from: what cannot be told, or done, for a moment."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cgroups import in_child
from test_slurm_orders import WHOLE

from securerun.firewall.policy import Denials, Policy
from securerun.guard import server, unattended  # noqa: F401 - before there are no descriptors
from securerun.guard.lease import Lease
from securerun.guard.protocol import Guarding, Message
from securerun.guard.watch import Watch

RUN_ID = "0" * 12


class Gone:
    """A launcher that has closed its end without a word."""

    ended = True

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self) -> Message | None:
        return None


class Once:
    """Fails once, for want of something, and then answers."""

    def __init__(self, answer: object, number: int = errno.EMFILE) -> None:
        self._answer = answer
        self._number = number
        self.asked = 0

    def __call__(self) -> object:
        self.asked += 1
        if self.asked == 1:
            raise OSError(self._number, os.strerror(self._number))
        return self._answer


class FakeCgroup:
    """One whose events are always news."""

    def __init__(self, events: int, populated: Once) -> None:
        self.events = events
        self.populated = populated


@pytest.fixture
def hung_up() -> Iterator[int]:
    """A descriptor that poll(2) always has something to tell of."""
    end, other = os.pipe()
    os.close(other)
    yield end
    os.close(end)


def lease_of(**facts: object) -> Lease:
    policy = Policy(RUN_ID, (), ())
    caller = SimpleNamespace(
        pidfd=None, has_ended=lambda: False, can_be_looked_into=lambda: False, user=0, pid=1, container="", is_root=True
    )
    known = {
        "policy": policy,
        "order": SimpleNamespace(policy=policy, slurm=SimpleNamespace(), scope="auto", grace=0.0),
        "caller": caller,
        "denied": Denials,
        "keep_ports_reserved": lambda: None,
        "keep_recorded": lambda: None,
        "follow_interfaces": lambda: None,
        "write": lambda **_: None,
        "is_over": lambda: True,
        "is_shielded": True,
        "closes_all": False,
        "may_void": False,
        "unrecorded": frozenset(),
    }
    nothing = dict.fromkeys(("cgroup", "drops", "chains", "shield", "key", "presence"))
    return cast("Lease", SimpleNamespace(**{**nothing, **known, **facts}))


def test_guard_without_descriptors_for_a_moment_asks_again_whether_the_job_is_over(hung_up: int) -> None:
    logged: list[str] = []
    is_over = Once(True)
    Watch(lease_of(is_over=is_over), Gone(hung_up), lambda _: None, logged.append).until_over()
    assert is_over.asked == 2
    assert logged == [f"run {RUN_ID}: a part of the guard's work fails: [Errno 24] Too many open files"]


def test_cgroup_that_cannot_be_read_for_want_of_memory_is_read_again(hung_up: int) -> None:
    populated = Once(answer=False, number=errno.ENOMEM)
    events = os.dup(hung_up)
    lease = lease_of(cgroup=FakeCgroup(events, populated), is_over=lambda: populated.asked > 1)
    Watch(lease, Gone(hung_up), lambda _: None, lambda _: None).until_over()
    os.close(events)
    assert populated.asked > 1


def holding(monkeypatch: pytest.MonkeyPatch, logged: list[str], fault: Exception | None = None) -> None:
    """Have a guard's watch end at once, by itself or by a fault."""

    def until_over() -> None:
        if fault is not None:
            raise fault

    monkeypatch.setattr(server, "Watch", lambda *_: SimpleNamespace(until_over=until_over))
    monkeypatch.setattr(server, "_log", lambda words, _=None: logged.append(words))


def hold(**facts: object) -> int:
    order = SimpleNamespace(policy=Policy(RUN_ID, (), ()), slurm=None)
    lease = lease_of(**{"guarding": Guarding(()), "order": order, "notes": (), **facts})
    answers: Any = SimpleNamespace(send=lambda _: None)
    return server._hold(lease, answers, answers)


def test_what_cannot_be_removed_in_the_end_is_said_whatever_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    holding(monkeypatch, logged)
    assert hold(release=Once(None, errno.EROFS)) == 1
    assert "not all of it could be removed, the next run tries again: [Errno 30]" in logged[-1]


def test_lease_of_a_defect_is_released_where_not_all_of_a_job_without_a_launcher_can_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[str] = []
    holding(monkeypatch, logged, KeyError(1))
    caller = SimpleNamespace(has_ended=lambda: True, user=0, pid=1, container="")
    assert hold(caller=caller, kill=Once(None, errno.EBUSY), release=lambda: None) == 0
    assert logged[-1] == f"run {RUN_ID}: released"


def test_guard_of_a_job_of_slurms_without_descriptors_ends_by_a_defect_that_is_told() -> None:
    """A second process of root's waits for that of a whole job, and has another take over what stands."""

    def ends() -> tuple[int, list[str]]:
        logged: list[str] = []
        server._log = lambda words, _=None: logged.append(words)  # type: ignore[assignment]
        order = SimpleNamespace(policy=Policy(RUN_ID, (), ()), slurm=WHOLE, adopt=False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return hold(order=order, release=lambda: logged.append("released")), logged

    status, logged = in_child(ends)
    assert status == 1
    assert len(logged) == 1 and logged[0].startswith(f"run {RUN_ID}: a defect of securerun's: OSError: [Errno 24]")
