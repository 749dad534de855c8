"""Have the guard of a whole job of Slurm's replaced where it dies: it has no launcher that would.

The guard is a child of a process that only waits for it, as below sudo, and forks another where it was killed, or ended
by a defect, and the job is there still: that takes over what stands, and looks after it again. Whoever kills both
leaves the shield, which stays with the cgroup, and the rest to the next run on this host.

Loaded where an order is for a job of Slurm's.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import PurePosixPath

from securerun.guard import program, records
from securerun.guard.protocol import Order
from securerun.guard.slurm_job import SlurmJob
from securerun.guard.slurm_served import WholeJob, hold_of
from securerun.linux import cgroups, prctl, proc

_STANDARD = (0, 1, 2)
# As waitpid(2) has it: it ended with 1.
_NOT_STARTED = 1 << 8
# One that dies of a defect would do so again and again.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 60.0


def go_on_in_a_child(order: Order, job: SlurmJob) -> tuple[Order, WholeJob]:
    """Go on in a child, which others replace. Return, in each, what it is to do and for whom."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        began = time.monotonic()
        child = _forked(again=order.adopt)
        if child == 0:
            os.setsid()  # who kills by session or by group means one of the two
            prctl.set_name(program.NAME)
            return (_as_recorded(order) if order.adopt else order), WholeJob(job)
        _stand_aside()
        status = _NOT_STARTED if child is None else os.waitpid(child, 0)[1]
        # One that was refused has taken away what holds the job; one that could not take over has not.
        if status == 0 or not _is_there(order, job):
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        lived = time.monotonic() - began
        pause = _FIRST_PAUSE_SECONDS if lived > _LONGEST_PAUSE_SECONDS else pause
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        order = dataclasses.replace(order, adopt=True)


def _forked(*, again: bool) -> int | None:
    """Fork. Raises OSError where that cannot be; None instead where it was done before, and is to be tried again."""
    try:
        return os.fork()
    except OSError:
        if not again:
            raise
        return None


def _stand_aside() -> None:
    """Hold nothing that tells the Prolog whether its guard lives."""
    prctl.set_name(program.WAITING_NAME)
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    streams = {_file_at(descriptor) for descriptor in _STANDARD}
    # Those of a guard's channels are others of the same pipes.
    for descriptor in proc.own_descriptors():
        if descriptor != nowhere and _file_at(descriptor) in streams:
            os.dup2(nowhere, descriptor, inheritable=descriptor in _STANDARD)
    os.close(nowhere)


def _file_at(descriptor: int) -> tuple[int, int]:
    try:
        found = os.fstat(descriptor)
    except OSError:  # the one by which they were listed
        return 0, 0
    return found.st_dev, found.st_ino


def _is_there(order: Order, job: SlurmJob) -> bool:
    """Return whether the job's cgroup is held: the epilog lets go of it."""
    return cgroups.inode_of(str(PurePosixPath(job.cgroup) / hold_of(order.policy.run_id))) is not None


def _as_recorded(order: Order) -> Order:
    """Return the order with the peers that the job had last: one that was given back is not to come in again."""
    known = (brief for brief in records.read_briefs_of_host() if brief.run_id == order.policy.run_id)
    record = next((brief.whole() for brief in known), None)
    if record is None:
        return order
    return dataclasses.replace(order, policy=dataclasses.replace(order.policy, peers=record.policy.peers))
