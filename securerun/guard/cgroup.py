"""The job's cgroup: a child of the launcher's own, held by descriptor, empty before it is removed.

Everything is done relative to a directory descriptor: a path below a cgroup that was delegated to a user
can be removed and made anew by that user between two calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Callable, Protocol

from securerun.errors import Obstacle, PrivilegeError
from securerun.linux import cgroups, proc, processes
from securerun.linux.cgroups import CgroupUnavailable, cgroup_of, refused, relative
from securerun.linux.processes import Process

# rmdir of a cgroup answers EBUSY for a moment after its last process has gone (cgroup_destroy_locked, cgroup.c).
_REMOVAL_SECONDS = 2.0
# src/plugins/cgroup/v2/cgroup_v2.c, Slurm 22.05 and newer.
_SLURM_TASK = re.compile(r"/job_[0-9]+/step_[^/]+/user/task_[^/]+$")
# It stands in records and messages, whose texts are limited; the kernel takes names of any depth.
_LONGEST_PATH = 2048
_REMOVAL_INTERVAL_SECONDS = 0.005
_FREEZING_SECONDS = 0.1
# The second is whoever has no number in this user namespace (user_namespaces(7)).
_ROOT, _UNMAPPED = 0, 65534


class Moved(Protocol):
    """Whom to move: the kernel takes a number, which is another process' as soon as this one has ended."""

    @property
    def pid(self) -> int:
        """Its number."""

    def has_ended(self) -> bool:
        """Return whether it is gone, so that the number may be another's."""

    def is_unchanged(self) -> bool:
        """Return whether it lives, and is of the user that it is known to be of."""


class JobCgroup:
    """A cgroup made for one job, below the cgroup that the launcher was in.

    descriptor: the cgroup's directory. path: the cgroup, as `cgroups.cgroup_of` tells it. ancestors: descriptors of
    the directories above, the nearest last, which are this object's to close once there is one.

    Raises OSError when there is no such cgroup.
    """

    def __init__(self, ancestors: tuple[int, ...], path: PurePosixPath) -> None:
        self._ancestors = ancestors
        self._name = path.name
        self.path = str(path)
        with ExitStack() as undo:
            self.descriptor = os.open(self._name, cgroups.DIRECTORY_FLAGS, dir_fd=self._parent)
            undo.callback(os.close, self.descriptor)
            self._events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.descriptor)
            undo.callback(os.close, self._events)
            self._become_valid()
            undo.pop_all()

    @property
    def ancestors(self) -> tuple[int, ...]:
        """Descriptors of the directories above, the nearest last."""
        return self._ancestors

    @property
    def proving_ground(self) -> int:
        """The cgroup in which a program on it is tried: itself."""
        return self.descriptor

    @property
    def events(self) -> int:
        """A descriptor that polls POLLPRI when the cgroup becomes empty or is no longer so (cgroup-v2.rst)."""
        return self._events

    def enter(self, whom: Moved) -> None:
        """Move a process in and look where it is: a refused move is easy to miss.

        Raises CgroupUnavailable when it is not there afterwards, and PrivilegeError when it ended, or became another
        user's, before it was; whoever has its number is where he was.
        """
        if not _move_only(self.descriptor, self.path, whom, whom.is_unchanged):
            raise PrivilegeError(f"the launcher, process {whom.pid}, ended before its job could be guarded")
        if cgroup_of(whom.pid) != self.path:
            raise CgroupUnavailable(
                f"process {whom.pid} is in {cgroup_of(whom.pid)} and could not be moved to {self.path}"
            )

    def leave(self) -> None:
        """Move this process out: a guard that replaces another is started within the job.

        Raises CgroupUnavailable when it stays.
        """
        if relative(cgroup_of(os.getpid()), self.path) is None:
            return
        leave_shared_cgroups()
        if relative(cgroup_of(os.getpid()), self.path) is not None:
            _move(self._parent, os.getpid())
        if relative(cgroup_of(os.getpid()), self.path) is not None:
            raise CgroupUnavailable(f"the guard cannot leave {self.path}, the cgroup of the job that it is to guard")

    def expel(self, whom: Moved) -> None:
        """Move a process back to where it came from; it may be gone, or be another user's by now."""
        with contextlib.suppress(CgroupUnavailable):
            if cgroup_of(whom.pid) == self.path:
                parent = str(PurePosixPath(self.path).parent)
                _move_only(self._parent, parent, whom, lambda: not whom.has_ended())

    def populated(self) -> bool:
        """Return whether a live process is in the cgroup or below it."""
        return b"populated 1" in self._told()

    def processes(self) -> set[int]:
        """Return the live processes in the cgroup and below it."""
        return cgroups.processes_below(self.descriptor)

    def members(self) -> frozenset[Process]:
        """Return the live processes in the cgroup and below it, each for good: to be acted upon."""
        found = set()
        for pid in self.processes():
            with contextlib.suppress(OSError, CgroupUnavailable):
                process = Process.of(pid)
                # A number that is listed may be another's by now. Who is here now had the number when it was looked at.
                if relative(cgroup_of(pid), self.path) is not None:
                    found.add(process)
        return frozenset(found)

    def kill(self) -> None:
        """SIGKILL everything in it at once, what is being forked included; before kernel 5.14 one by one."""
        try:
            cgroups.write(self.descriptor, "cgroup.kill", "1")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):  # a threaded cgroup cannot be killed as one
                raise
            processes.end(self.members(), signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have everything in it stand still in the block, what is being forked included.

        Before kernel 5.2 nothing does. A process that waits for a device stands still only when it has its answer: that
        is waited for no longer than a moment.
        """
        try:
            cgroups.write(self.descriptor, "cgroup.freeze", "1")
        except OSError:
            yield
            return
        try:
            self._wait_until_frozen()
            yield
        finally:
            with contextlib.suppress(OSError):  # it was removed: then nothing is in it
                cgroups.write(self.descriptor, "cgroup.freeze", "0")

    def remove(self, seconds: float = _REMOVAL_SECONDS) -> None:
        """Remove the cgroup, and the empty ones that the job made below it; what has its name by now stays.

        Raises CgroupUnavailable when it cannot be removed within some seconds.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                # Before each try: who made another in its place in between may have somebody in it, for good.
                if not self._told():
                    return
                _remove_below(self.descriptor)
                os.rmdir(self._name, dir_fd=self._parent)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise refused(f"{self.path} cannot be removed", error) from error
            time.sleep(_REMOVAL_INTERVAL_SECONDS)

    def end(self) -> CgroupUnavailable | None:
        """Remove and close it; return why an empty one stays. Raises CgroupUnavailable for one that somebody is in."""
        try:
            self.remove()
        except CgroupUnavailable as error:
            if self.populated():
                raise
            return error
        finally:
            self.close()
        return None

    def close(self) -> None:
        """Close the descriptors; the cgroup stays."""
        for descriptor in (self._events, self.descriptor, *self._ancestors):
            os.close(descriptor)

    @property
    def _parent(self) -> int:
        return self._ancestors[-1]

    def _told(self) -> bytes:
        """Read what the kernel tells of it; nothing once it was removed, as the owner of the directory above may do."""
        try:
            return os.pread(self._events, 4096, 0)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return b""
            raise

    def _wait_until_frozen(self) -> None:
        deadline = time.monotonic() + _FREEZING_SECONDS
        with contextlib.suppress(OSError):
            while b"frozen 1" not in os.pread(self._events, 4096, 0) and time.monotonic() < deadline:
                time.sleep(_REMOVAL_INTERVAL_SECONDS)

    def _become_valid(self) -> None:
        """Make it threaded below a threaded one: a new one is invalid until it is (cgroup-v2.rst, Threads).

        Below a task of Slurm's ours is threaded as well: slurmstepd signals what the task's own cgroup.procs lists and
        looks no deeper (cgroup_p_step_get_pids, Slurm 22.05 to 25.05), and a threaded cgroup's processes are listed in
        that of its domain.
        """
        if cgroups.read(self.descriptor, "cgroup.type") == "domain invalid":
            cgroups.write(self.descriptor, "cgroup.type", "threaded")
        elif _SLURM_TASK.search(str(PurePosixPath(self.path).parent)):
            with contextlib.suppress(OSError):  # somebody has made domains of their own there
                cgroups.write(self.descriptor, "cgroup.type", "threaded")


def path_of_job_cgroup(launcher: int, run_id: str) -> str:
    """Return where a run's cgroup is to be: below the launcher's. Raises CgroupUnavailable where it cannot be."""
    path = cgroups.cgroup_once_mounted(launcher)
    if ".." in PurePosixPath(path).parts:
        raise CgroupUnavailable(f"the launcher's cgroup {path} lies outside of what this cgroup namespace shows")
    if len(path) > _LONGEST_PATH:
        raise CgroupUnavailable(f"the name of the launcher's cgroup is longer than {_LONGEST_PATH} characters")
    return str(PurePosixPath(path) / f"securerun-{run_id}")


def make_job_cgroup(path: str) -> JobCgroup:
    """Make a run's cgroup, at a path from `path_of_job_cgroup`.

    Raises CgroupUnavailable when there is no cgroup v2 or nothing may be made in it.
    """
    name, parent = PurePosixPath(path).name, PurePosixPath(path).parent
    place = next(cgroups.places_of(path), None)
    if place is None:
        raise _none_mounted()
    try:
        with _ancestors(place) as (ancestors, undo):
            os.mkdir(name, 0o755, dir_fd=ancestors[-1])
            undo.callback(_remove_empty, name, ancestors[-1])
            cgroup = JobCgroup(ancestors, PurePosixPath(path))
            undo.pop_all()
    except OSError as error:
        raise refused(f"no cgroup can be made below {parent}", error) from error
    if not cgroups.is_of_this_user(cgroup.descriptor):
        cgroup.close()
        raise CgroupUnavailable(f"{path} was replaced by another user's cgroup")
    return cgroup


def _none_mounted() -> CgroupUnavailable:
    if cgroups.shows_only_what_is_outside():
        return CgroupUnavailable(
            "the cgroup file system that is mounted here is the host's, and this cgroup namespace begins below it: a "
            "container takes --cgroupns host with it",
            Obstacle.READ_ONLY_CGROUPS,
        )
    return CgroupUnavailable("no cgroup v2 file system is mounted here, and none may be mounted")


def open_job_cgroup(path: str) -> JobCgroup | None:
    """Open the cgroup of a run that exists already; None where it does not."""
    place = next(cgroups.places_of(path), None)
    if place is None:
        return None
    with contextlib.suppress(OSError), _ancestors(place) as (ancestors, undo):
        cgroup = JobCgroup(ancestors, PurePosixPath(path))
        undo.pop_all()
        if cgroups.is_of_this_user(cgroup.descriptor):
            return cgroup
        cgroup.close()
    return None


@contextlib.contextmanager
def _ancestors(place: cgroups.Place) -> Iterator[tuple[tuple[int, ...], ExitStack]]:
    """Open the directories above a cgroup, closed with what is yielded beside them. Raises OSError."""
    with ExitStack() as undo:
        ancestors = place.open(with_last=False)
        for ancestor in ancestors:
            undo.callback(os.close, ancestor)
        yield ancestors, undo


def _remove_empty(name: str, parent: int) -> None:
    """Remove a cgroup that was made a moment ago; its user may have replaced or removed it."""
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=parent)


def leave_shared_cgroups(attendants: Sequence[Process] = ()) -> None:
    """Move this process to the top of every cgroup hierarchy that it sees, as far as that is permitted.

    attendants: processes that live as long as this one and are no part of the job either.

    Batch systems end a job by its cgroup, with whatever the job started; and whom a cgroup is delegated to can freeze
    and kill what is in it, also a process of root's, or keep it from memory, processors and children. The top belongs
    to nobody else and cannot be killed.
    """
    for top in cgroups.tops():
        for process in (Process.of(os.getpid()), *attendants):
            with contextlib.suppress(OSError):
                _move_to_top(top, process)


def require_left() -> None:
    """Raise CgroupUnavailable where this process still is in a cgroup of an ordinary user's."""
    for top in cgroups.tops():
        below = cgroups.below_top(top, proc.SELF)
        for path in () if below is None else (below, *below.parents):
            with contextlib.suppress(OSError):
                owner = Path(top.place, path).lstat().st_uid
                if owner not in (_ROOT, _UNMAPPED, os.geteuid()):
                    raise CgroupUnavailable(
                        f"the guard cannot leave the cgroup {top.name}:/{below}, which belongs to user {owner}, who "
                        "could stop it there; have the job started outside of it"
                    )


def _move_to_top(top: cgroups.Top, process: Process) -> None:
    """Move a process to the top of a hierarchy while its number means it. Raises OSError."""
    # Even to move where one is already is to wait for all processors (cgroup_attach_lock).
    if cgroups.below_top(top, process.pid) is None or not proc.is_running(process.pid, process.start):
        return
    _move_to(top.place, process.pid)
    if proc.is_running(process.pid, process.start):
        return
    # Whoever got its number in that moment was started in the cgroup of his parent.
    home = cgroups.below_top(top, proc.status(process.pid).parent)
    if home is not None:
        _move_to(os.fspath(Path(top.place, home)), process.pid)


def _move_to(place: str, pid: int) -> None:
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        cgroups.write(directory, "cgroup.procs", str(pid))
    finally:
        os.close(directory)


def _move_only(directory: int, path: str, whom: Moved, is_meant: Callable[[], bool]) -> bool:
    """Move a process to a cgroup for as long as its number means it; return False, with nothing moved, if not.

    directory, path: the cgroup. is_meant: whether the process is still the one that is meant. Looked at on both sides
    of the move, with nothing in between that waits: the kernel moves whoever has the number at that moment, and what
    it moved by mistake goes back.

    Raises CgroupUnavailable when the move is refused.
    """
    before = cgroup_of(whom.pid)
    if not is_meant():
        return False
    _move(directory, whom.pid)
    if is_meant():
        return True
    with contextlib.suppress(CgroupUnavailable, OSError, ValueError):
        _return(whom.pid, path, None if whom.has_ended() else before)
    return False


def _return(pid: int, moved_to: str, home: str | None) -> None:
    """Move whoever has a number back to where he was before he was moved by mistake.

    home: his cgroup until then; None for who got the number a moment ago: he was started in the cgroup of his parent.
    Whoever is there because his parent is stays.
    """
    home = home or cgroup_of(proc.status(pid).parent)
    if cgroup_of(pid) != moved_to or relative(home, moved_to) is not None:
        return
    place = next(cgroups.places_of(home), None)
    if place is None:
        return
    descriptors = place.open(with_last=True)
    try:
        _move(descriptors[-1], pid)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _move(directory: int, pid: int) -> None:
    try:
        cgroups.write(directory, "cgroup.procs", str(pid))
    except OSError as error:
        raise refused(f"process {pid} may not be moved between cgroups", error) from error


def _remove_below(directory: int) -> None:
    for way, _ in reversed([*cgroups.directories_below(directory)]):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(way, dir_fd=directory)
