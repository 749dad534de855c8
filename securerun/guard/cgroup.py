"""The job's cgroup: a child of the launcher's own, held by descriptor, empty before it is removed.

Everything is done relative to a directory descriptor: a path below a cgroup that was delegated to a user
can be removed and made anew by that user between two calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from securerun.errors import Obstacle, Unavailable

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CLONE_NEWNS = 0x00020000
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MS_REC_PRIVATE = 16384 | 1 << 18
# rmdir of a cgroup answers EBUSY for a moment after its last process has gone (cgroup_destroy_locked, cgroup.c).
_REMOVAL_SECONDS = 2.0
# src/plugins/cgroup/v2/cgroup_v2.c, Slurm 22.05 and newer.
_SLURM_TASK = re.compile(r"/job_[0-9]+/step_[^/]+/user/task_[^/]+$")
# It stands in records and messages, whose texts are limited; the kernel takes names of any depth.
_LONGEST_PATH = 2048
# This process' view of what is mounted, then init's: `ip netns exec` hides cgroups from what it runs.
_VIEWS = (("/proc/self/mountinfo", ""), ("/proc/1/mountinfo", "/proc/1/root"))
_REMOVAL_INTERVAL_SECONDS = 0.005
_REASONS = {
    errno.EROFS: (
        "the cgroup file system is mounted read-only (a container without --privileged?)",
        Obstacle.READ_ONLY_CGROUPS,
    ),
    errno.EACCES: ("permission denied; run as root", Obstacle.NOT_PERMITTED),
    errno.EPERM: ("not permitted; run as root", Obstacle.NOT_PERMITTED),
    errno.EAGAIN: (
        "a limit on cgroups is reached (cgroup.max.descendants or cgroup.max.depth of a parent)",
        Obstacle.FULL,
    ),
}


class CgroupUnavailable(Unavailable):
    """The job can have no cgroup of its own here. The message is one line and says why."""


@dataclass(frozen=True)
class Hierarchy:
    """A cgroup v2 hierarchy as seen here. place: a directory; root: which cgroup that directory is."""

    place: str
    root: str


class JobCgroup:
    """A cgroup made for one job, below the cgroup that the launcher was in.

    descriptor: the cgroup's directory. path: the cgroup, as /proc/PID/cgroup names it.
    """

    def __init__(self, ancestors: tuple[int, ...], path: PurePosixPath) -> None:
        self._ancestors = ancestors
        self._name = path.name
        self.path = str(path)
        self.descriptor = os.open(self._name, _DIRECTORY_FLAGS, dir_fd=self._parent)
        self._events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.descriptor)
        self._become_valid()

    @property
    def ancestors(self) -> tuple[int, ...]:
        """Descriptors of the directories above, the nearest last."""
        return self._ancestors

    @property
    def events(self) -> int:
        """A descriptor that polls POLLPRI when the cgroup becomes empty or is no longer so (cgroup-v2.rst)."""
        return self._events

    def enter(self, pid: int) -> None:
        """Move a process in and look where it is: a refused move is easy to miss.

        Raises CgroupUnavailable when it is not there afterwards.
        """
        _move(self.descriptor, pid)
        if cgroup_of(pid) != self.path:
            raise CgroupUnavailable(f"process {pid} is in {cgroup_of(pid)} and could not be moved to {self.path}")

    def leave(self) -> None:
        """Move this process out: a guard that replaces another is started within the job.

        Raises CgroupUnavailable when it stays.
        """
        if _relative(cgroup_of(os.getpid()), self.path) is None:
            return
        leave_shared_cgroups()
        if _relative(cgroup_of(os.getpid()), self.path) is not None:
            _move(self._parent, os.getpid())
        if _relative(cgroup_of(os.getpid()), self.path) is not None:
            raise CgroupUnavailable(f"the guard cannot leave {self.path}, the cgroup of the job that it is to guard")

    def expel(self, pid: int) -> None:
        """Move a process back to where it came from; it may be gone."""
        with contextlib.suppress(CgroupUnavailable):
            _move(self._parent, pid)

    def populated(self) -> bool:
        """Whether a live process is in the cgroup or below it."""
        try:
            return b"populated 1" in os.pread(self._events, 4096, 0)
        except OSError as error:
            if error.errno == errno.ENODEV:  # removed, as whoever owns the directory above may do with an empty one
                return False
            raise

    def processes(self) -> set[int]:
        """The live processes in the cgroup and below it."""
        return {pid for directory in self._below() for pid in _members(directory)}

    def ids(self) -> set[int]:
        """The ids of the cgroup and of those below it, as sockets carry them (INET_DIAG_CGROUP_ID, kernel 5.9)."""
        return {os.fstat(directory).st_ino for directory in self._below()}

    def kill(self) -> None:
        """SIGKILL everything in it at once, what is being forked included; before kernel 5.14 one by one."""
        try:
            _write(self.descriptor, "cgroup.kill", "1")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):  # a threaded cgroup cannot be killed as one
                raise
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """Remove the cgroup, and the empty ones that the job made below it.

        Raises CgroupUnavailable when it cannot be removed within 2 s.
        """
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while True:
            try:
                _remove_below(self.descriptor)
                os.rmdir(self._name, dir_fd=self._parent)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise _refused(f"{self.path} cannot be removed", error) from error
            time.sleep(_REMOVAL_INTERVAL_SECONDS)

    def close(self) -> None:
        """Close the descriptors; the cgroup stays."""
        for descriptor in (self._events, self.descriptor, *self._ancestors):
            os.close(descriptor)

    @property
    def _parent(self) -> int:
        return self._ancestors[-1]

    def _below(self) -> Iterator[int]:
        """The descriptors of this directory and of each below it, each open until the next is asked for."""
        yield self.descriptor
        yield from _directories_below(self.descriptor)

    def _become_valid(self) -> None:
        """Below a threaded cgroup a new one is invalid until it is threaded too (cgroup-v2.rst, Threads).

        Below a task of Slurm's ours is threaded as well: slurmstepd signals what the task's own cgroup.procs lists and
        looks no deeper (cgroup_p_step_get_pids, Slurm 22.05 to 25.05), and a threaded cgroup's processes are listed in
        that of its domain.
        """
        if _read(self.descriptor, "cgroup.type") == "domain invalid":
            _write(self.descriptor, "cgroup.type", "threaded")
        elif _SLURM_TASK.search(str(PurePosixPath(self.path).parent)):
            with contextlib.suppress(OSError):  # somebody has made domains of his own there
                _write(self.descriptor, "cgroup.type", "threaded")


def path_of_job_cgroup(launcher: int, run_id: str) -> str:
    """Where a run's cgroup is to be: below the launcher's own. Raises CgroupUnavailable where it cannot be."""
    path = cgroup_of(launcher)
    if ".." in PurePosixPath(path).parts:
        raise CgroupUnavailable(f"the launcher's cgroup {path} lies outside of what this cgroup namespace shows")
    if len(path) > _LONGEST_PATH:
        raise CgroupUnavailable(f"the name of the launcher's cgroup is longer than {_LONGEST_PATH} characters")
    return str(PurePosixPath(path) / f"securerun-{run_id}")


def make_job_cgroup(path: str) -> JobCgroup:
    """Make a run's cgroup, at a path from `path_of_job_cgroup`.

    Raises CgroupUnavailable when there is no cgroup v2 or nothing may be made in it.
    """
    place = PurePosixPath(path)
    for hierarchy in _hierarchies():
        below = _relative(path, hierarchy.root)
        if below is None:
            continue
        try:
            ancestors = _open_down(hierarchy.place, below.parent)
            os.mkdir(place.name, 0o755, dir_fd=ancestors[-1])
            cgroup = JobCgroup(ancestors, place)
        except OSError as error:
            raise _refused(f"no cgroup can be made below {place.parent}", error) from error
        if not _is_ours(cgroup):
            cgroup.close()
            raise CgroupUnavailable(f"{path} was replaced by another user's cgroup")
        return cgroup
    raise CgroupUnavailable("no cgroup v2 file system is mounted here, and none may be mounted")


def open_job_cgroup(path: str) -> JobCgroup | None:
    """The cgroup of a run that exists already; None where it does not."""
    for hierarchy in _hierarchies():
        below = _relative(path, hierarchy.root)
        if below is None:
            continue
        with contextlib.suppress(OSError):
            cgroup = JobCgroup(_open_down(hierarchy.place, below.parent), PurePosixPath(path))
            if _is_ours(cgroup):
                return cgroup
            cgroup.close()
        return None
    return None


def _is_ours(cgroup: JobCgroup) -> bool:
    """Whoever the parent is delegated to could have put a directory of his own in the place of ours."""
    return os.fstat(cgroup.descriptor).st_uid == os.geteuid()


def leave_shared_cgroups(attendants: Sequence[int] = ()) -> None:
    """Move this process to the top of every cgroup hierarchy that it sees, as far as that is permitted.

    attendants: processes that live as long as this one and are no part of the job either.

    Batch systems end a job by its cgroup, with whatever the job started; and whom a cgroup is delegated to can freeze
    and kill what is in it, also a process of root's. The top belongs to nobody else and cannot be killed.
    """
    for place in _tops():
        with contextlib.suppress(OSError):
            directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for pid in (os.getpid(), *attendants):
                    _write(directory, "cgroup.procs", str(pid))
            finally:
                os.close(directory)


def may_leave_shared_cgroups() -> bool:
    """Whether a guard that this process starts could leave the cgroups of the batch system; False if in doubt."""
    tops = list(_tops())
    return bool(tops) and all(os.access(Path(place, "cgroup.procs"), os.W_OK) for place in tops)


def cgroup_of(pid: int) -> str:
    """A process' cgroup in the v2 hierarchy (cgroups(7)). Raises CgroupUnavailable when it has none."""
    try:
        text = os.fsdecode(Path(f"/proc/{pid}/cgroup").read_bytes())
    except OSError as error:
        raise _refused(f"the cgroup of process {pid} cannot be read", error) from error
    # Users name cgroups, and Python's splitlines ends a line at characters that the kernel lets them use.
    for line in text.split("\n"):
        if line.startswith("0::"):
            return line[3:]
    raise CgroupUnavailable("this kernel has no cgroup v2 hierarchy")


def _hierarchies() -> Iterator[Hierarchy]:
    """Where cgroup v2 may be found, the least intrusive place first.

    `ip netns exec` hides /sys/fs/cgroup from what it runs; init's view of it is still there. Where nobody has
    mounted one, a private mount namespace keeps ours unseen.
    """
    for mountinfo, prefix in _VIEWS:
        yield from _mounted(mountinfo, prefix)
    private = _mount_privately()
    if private is not None:
        yield private


def _tops() -> Iterator[str]:
    """The top directory of every hierarchy by which processes are ended, in the first view that has any."""
    for mountinfo, prefix in _VIEWS:
        tops = [hierarchy.place for hierarchy in _mounted(mountinfo, prefix, _ends_processes)]
        if tops:
            yield from tops
            return


def _is_v2(kind: str, options: str) -> bool:
    return kind == "cgroup2"


def _ends_processes(kind: str, options: str) -> bool:
    """Version 2 and, of version 1, where systemd and batch systems track what they end; not where memory is counted."""
    return kind == "cgroup2" or (kind == "cgroup" and ("freezer" in options.split(",") or "name=" in options))


def _mounted(mountinfo: str, prefix: str, wanted: Callable[[str, str], bool] = _is_v2) -> Iterator[Hierarchy]:
    """The cgroup mounts of a mountinfo file (proc(5)); `prefix` leads to the root that its paths start from."""
    try:
        lines = os.fsdecode(Path(mountinfo).read_bytes()).split("\n")
    except OSError:
        return
    for line in lines:
        # Users mount too (FUSE), below names of theirs; the kernel escapes spaces and newlines in them.
        mount, _, source = line.partition(" - ")
        kind, _, options = (*source.split(" "), "", "")[:3]
        if not wanted(kind, options):
            continue
        root, place = mount.split(" ")[3:5]
        place = prefix + _unescaped(place)
        with contextlib.suppress(OSError):
            if Path(place, "cgroup.procs").exists():
                yield Hierarchy(place, _unescaped(root))


def _mount_privately() -> Hierarchy | None:
    """Mount cgroup v2 where only this process sees it; None where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return None
    if libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None) != 0:
        return None
    place = "/sys/fs/cgroup" if Path("/sys/fs/cgroup").is_dir() else "/mnt"
    if libc.mount(b"cgroup2", place.encode(), b"cgroup2", _MS_NOSUID_NODEV_NOEXEC, None) != 0:
        return None
    return Hierarchy(place, "/")


def _relative(path: str, root: str) -> PurePosixPath | None:
    try:
        return PurePosixPath(path).relative_to(root)
    except ValueError:
        return None


def _open_down(place: str, below: PurePosixPath) -> tuple[int, ...]:
    """Descriptors of a hierarchy's directory and of each one on the way down, the deepest last."""
    descriptors = [os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    for part in below.parts:
        descriptors.append(os.open(part, _DIRECTORY_FLAGS, dir_fd=descriptors[-1]))
    return tuple(descriptors)


def _move(directory: int, pid: int) -> None:
    try:
        _write(directory, "cgroup.procs", str(pid))
    except OSError as error:
        raise _refused(f"process {pid} may not be moved between cgroups", error) from error


def _members(directory: int) -> set[int]:
    """The processes of one cgroup; a threaded one lists threads only (cgroup-v2.rst), and a signal to one is to all."""
    with contextlib.suppress(FileNotFoundError, OSError):
        return {int(line) for line in _read(directory, "cgroup.procs").split()}
    with contextlib.suppress(FileNotFoundError, OSError):
        return {int(line) for line in _read(directory, "cgroup.threads").split()}
    return set()


def _directories_below(directory: int) -> Iterator[int]:
    for name in _children(directory):
        with contextlib.suppress(FileNotFoundError):
            child = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
            try:
                yield child
                yield from _directories_below(child)
            finally:
                os.close(child)


def _remove_below(directory: int) -> None:
    for name in _children(directory):
        child = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
        try:
            _remove_below(child)
        finally:
            os.close(child)
        os.rmdir(name, dir_fd=directory)


def _children(directory: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _read(directory: int, name: str) -> str:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        text = b""
        while chunk := os.read(descriptor, 65536):
            text += chunk
        return text.decode("ascii").strip()
    finally:
        os.close(descriptor)


def _write(directory: int, name: str, text: str) -> None:
    # One write(2), whose error cannot be lost in a buffer that fails at close.
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def _refused(what: str, error: OSError) -> CgroupUnavailable:
    reason, obstacle = _REASONS.get(error.errno or 0, (error.strerror or str(error), Obstacle.OTHER))
    return CgroupUnavailable(f"{what}: {reason}", obstacle)


def _unescaped(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal (proc(5))."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
