"""Whom a guard serves in a job of Slurm's: the task that whoever asks is the prolog of, or the whole job on this node.

A TaskProlog is a child of the process that becomes the task, by execve(2), and of the same user. So who asks for their
parent gets a guard for a process that they could have had ask for itself. A Prolog is root's, and no process of the job
is there yet: what is served is the job's cgroup, for as long as it is there.

Loaded where an order is for a job of Slurm's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import ExitStack
from pathlib import PurePosixPath

from securerun.errors import PrivilegeError
from securerun.guard.caller import Caller, require_own_number
from securerun.guard.cgroup import JobCgroup
from securerun.guard.slurm_job import SlurmJob
from securerun.linux import cgroups, proc
from securerun.linux.cgroups import CgroupUnavailable, refused

# Not a batch system's, and nobody's task.
_INIT = 1
_MODE = 0o755


def whom(job: SlurmJob, asking: Caller, *, by_socket: bool) -> Caller:
    """Return whom the guard is to serve. Raises PrivilegeError for a whole job that is not root's to ask for, and for a
    parent that is not the caller's own."""
    if not job.is_whole:
        return _parent_of(asking)
    if by_socket or not asking.is_root:
        raise PrivilegeError(
            f"all of job {job.number} of Slurm's is for root's Prolog to have guarded, by a guard that it starts itself"
        )
    return WholeJob(job)


class WholeJob(Caller):
    """A job of Slurm's with all that runs of it on this node, until its cgroup, or what holds that, has been removed.

    The process is the guard's own: nobody else stands for the job.
    """

    def __init__(self, job: SlurmJob) -> None:
        super().__init__(os.getpid(), directly=True)
        self.user = job.user
        self.cgroup: HeldCgroup | None = None

    def has_ended(self) -> bool:
        """Return whether the job's cgroup was there and has gone."""
        return self.cgroup is not None and self.cgroup.has_been_let_go()

    def is_unchanged(self) -> bool:
        """Return whether the job is there; nobody moves it."""
        return not self.has_ended()

    def identify_again(self) -> None:
        """Do nothing: this process is who it was."""


class HeldCgroup(JobCgroup):
    """The cgroup of a whole job of Slurm's, with an empty one in it that keeps Slurm from removing it between steps.

    Slurm would make it anew, with no shield on it. Nor may a process be put into the job's own cgroup: it may have
    controllers for those below, so the shield is proven in the empty one.
    """

    def __init__(self, ancestors: tuple[int, ...], path: PurePosixPath, run_id: str) -> None:
        super().__init__(ancestors, path)
        self._hold = hold_of(run_id)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._hold, _MODE, dir_fd=self.descriptor)
            self._inner = os.open(self._hold, cgroups.DIRECTORY_FLAGS, dir_fd=self.descriptor)
        except OSError:
            for descriptor in (self._events, self.descriptor):
                os.close(descriptor)
            raise

    @property
    def proving_ground(self) -> int:
        """The cgroup in which the shield is proven."""
        return self._inner

    def has_been_let_go(self) -> bool:
        """Return whether somebody removed the job's cgroup, or what holds it: Slurm's epilog does."""
        try:
            os.pread(self._events, 1, 0)
            os.stat(self._hold, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError as error:
            return error.errno in (errno.ENODEV, errno.ENOENT)
        return False

    def remove(self, seconds: float = 0.0) -> None:
        """Let go of the job's cgroup, and remove it where Slurm has nothing in it any more; else Slurm does."""
        with contextlib.suppress(OSError):
            os.rmdir(self._hold, dir_fd=self.descriptor)
        with contextlib.suppress(OSError):
            os.rmdir(self._name, dir_fd=self._parent)

    def close(self) -> None:
        """Close the descriptors; the cgroup stays."""
        os.close(self._inner)
        super().close()


def hold_of(run_id: str) -> str:
    """Return the name of what holds the cgroup of a job for its guard."""
    return f"securerun-{run_id}"


def make_cgroup(job: Caller, path: str, run_id: str) -> JobCgroup:
    """Make the cgroup of a whole job where Slurm is to make it, or take the one that is there.

    Raises CgroupUnavailable where Slurm keeps no cgroups, or one there is not root's.
    """
    place = next(cgroups.places_of(path), None)
    if place is None:
        raise CgroupUnavailable("no cgroup v2 file system is mounted here, and none may be mounted")
    name, parent = PurePosixPath(path).name, PurePosixPath(path).parent
    try:
        with ExitStack() as undo:
            ancestors = place.open(with_last=False)
            for ancestor in ancestors:
                undo.callback(os.close, ancestor)
            if not all(map(cgroups.is_of_this_user, ancestors)):
                raise CgroupUnavailable(f"{parent} is not root's own")
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, _MODE, dir_fd=ancestors[-1])
            cgroup = HeldCgroup(ancestors, PurePosixPath(path), run_id)
            undo.pop_all()
    except OSError as error:
        raise refused(f"no cgroup of a job of Slurm's can be made below {parent}", error) from error
    if not cgroups.is_of_this_user(cgroup.descriptor):
        cgroup.close()
        raise CgroupUnavailable(f"{path} is another user's cgroup")
    if isinstance(job, WholeJob):
        job.cgroup = cgroup
    return cgroup


def _parent_of(asking: Caller) -> Caller:
    """Return the parent of who asks, held; of the same user alone, and in the same network."""
    try:
        pid = proc.status(asking.pid).parent
        if pid <= _INIT:
            raise PrivilegeError(_no_parent(asking))
        task = Caller(pid)
        # A number was asked for: it is the parent's still if that has not ended, and whoever asks is there as well.
        still = proc.status(asking.pid).parent == pid
    except OSError as error:
        raise PrivilegeError(_no_parent(asking)) from error
    if not still or task.has_ended() or asking.has_ended():
        raise PrivilegeError(_no_parent(asking))
    if task.user != asking.user:
        raise PrivilegeError(
            f"process {asking.pid} of user {asking.user} asks for its parent, which is user {task.user}'s; it is for a "
            "TaskProlog, which Slurm starts as the task's user"
        )
    task.find_container()
    if task.container:
        raise PrivilegeError(f"process {task.pid} is in a container, and a task of Slurm's is the host's own")
    require_own_number(task)
    task.require_same_network()
    return task


def _no_parent(asking: Caller) -> str:
    return f"process {asking.pid} asks for its parent, and has none that waits for it"
