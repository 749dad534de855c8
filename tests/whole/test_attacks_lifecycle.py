"""Attacks on what a guard does to processes and to runs over their lives: whom it moves, ends, believes and reaps.

Each is an ordinary user's, on the machine of `attacking`, unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attacking import Ground, pid_taken
from conversation import WAYS, guards, order
from hosts import eventually
from users import RECORDS, delegated_cgroup

# --- whom it moves ---


class HostLock:
    """The lock that guards wait for, held as by other guards that work slowly."""

    def __init__(self, ground: Ground) -> None:
        self._place = ground.machine.place(RECORDS)
        self._place.mkdir(mode=0o700, exist_ok=True)
        self._held = self._locked()

    def pass_by(self, guard: int) -> None:
        """Let a guard that waits have it once, and hold it again before the guard is back."""
        assert eventually(lambda: waits_for_a_lock(guard))
        # The kernel's queue is in order: who stands in it behind the guard has it before the guard's next turn.
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(self._locked_before_others)
            assert eventually(lambda: waits_for_a_lock(os.getpid()))
            os.close(self._held)
            self._held = again.result(timeout=20)
        assert eventually(lambda: waits_for_a_lock(guard))

    def release(self) -> None:
        """Let go of it, and of the directory if no guard has put anything there."""
        with contextlib.suppress(OSError):
            self._place.rmdir()
        os.close(self._held)

    def _locked_before_others(self) -> int:
        with contextlib.suppress(OSError):  # for this thread, which is to be awake sooner than the guard is back
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        return self._locked()

    def _locked(self) -> int:
        descriptor = os.open(self._place, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor


def waits_for_a_lock(pid: int) -> bool:
    """Whether a process waits in the kernel's queue for an flock (proc(5), /proc/locks)."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("-> FLOCK" in line and line.split()[5] == str(pid) for line in lines)


@pytest.mark.parametrize("new", ["alice", "root"])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_pid_that_is_used_again_while_the_guard_waits_for_the_lock_is_not_moved(
    ground: Ground, way: str, turn: int, new: str
) -> None:
    """Neither into the job's cgroup nor out of it: in a cgroup of the user's it could be frozen, and killed."""
    user = {"alice": ground.alice.uid, "root": 0}[new]
    with delegated_cgroup(ground.alice) as own, contextlib.ExitStack() as taken:
        talk = ground.talk(ground.alice, way, apart=True, cgroup=own)
        assert talk.hear()["ready"]
        (guard,) = guards(ground.machine)
        lock = HostLock(ground)
        talk.say(order())
        for _ in range(turn):
            lock.pass_by(guard)
        assert eventually(lambda: waits_for_a_lock(guard))
        talk.process.kill()
        talk.process.wait()
        taken.enter_context(pid_taken(ground, talk.pid, user))
        lock.release()
        verdict = talk.hear_verdict()
        talk.hang_up()
        assert "ended before" in verdict["refused"]["message"], verdict
