"""Where cgroups are, which one a process is in, and which processes are in one (cgroups(7), cgroup-v2.rst).

A cgroup is read relative to a descriptor of its directory: a path below a cgroup that was delegated to a user can be
removed and made anew by that user between two calls.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Union

from securerun.errors import Obstacle, Unavailable
from securerun.linux import capabilities, proc

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_VERSION_1, _VERSION_2 = "cgroup", "cgroup2"
# What is mounted where this process is, then where init is: `ip netns exec` hides cgroups from what it runs.
_VIEWS: tuple[proc.Pid, ...] = (proc.SELF, proc.INIT)
_REASONS = {
    errno.EROFS: (
        "the cgroup file system is mounted read-only (a container without --privileged?)",
        Obstacle.READ_ONLY_CGROUPS,
    ),
    errno.EACCES: ("permission denied", Obstacle.NOT_PERMITTED),
    errno.EPERM: ("not permitted", Obstacle.NOT_PERMITTED),
    errno.EAGAIN: (
        "a limit on cgroups is reached (cgroup.max.descendants or cgroup.max.depth of a parent)",
        Obstacle.FULL,
    ),
    errno.ENODEV: ("this kernel has none", Obstacle.OLD_KERNEL),
}


# A directory, by its path or a descriptor of it, and which cgroup that directory is.
Hierarchy = tuple[Union[str, int], str]


# Plain classes: making dataclasses of them would take a guard half a millisecond at its start.
class _Mount:
    """A mount of cgroups. root: which cgroup is seen at its place."""

    def __init__(self, kind: str, options: str, place: str, root: str) -> None:
        self._kind = kind
        self._options = frozenset(options.split(","))
        self.place = place
        self.root = root

    def shows(self, name: str) -> bool:
        """Return whether it is of a hierarchy: of these controllers, or of this `name=`; "" is version 2."""
        if not name:
            return self._kind == _VERSION_2
        return self._kind == _VERSION_1 and self._options.issuperset(name.split(","))


class Top:
    """The top of a hierarchy. name: its controllers, "" for version 2; place: a directory; root: which cgroup it is."""

    def __init__(self, name: str, place: str, root: str) -> None:
        self.name = name
        self.place = place
        self.root = root


class CgroupUnavailable(Unavailable):
    """A cgroup cannot be had, or not even be told, here. The message is one line and says why."""


class Place:
    """Where a cgroup is, or would be: the way `below` the directory `top` of a hierarchy."""

    def __init__(self, top: str | int, below: PurePosixPath) -> None:
        self._top = top
        self._below = below

    def open(self, *, with_last: bool) -> tuple[int, ...]:
        """Open the directory and each one on the way down, with or without the last; the deepest comes last.

        Raises OSError.
        """
        with ExitStack() as undo:
            descriptors = [self._open_top()]
            undo.callback(os.close, descriptors[0])
            for part in (self._below if with_last else self._below.parent).parts:
                descriptors.append(os.open(part, DIRECTORY_FLAGS, dir_fd=descriptors[-1]))
                undo.callback(os.close, descriptors[-1])
            undo.pop_all()
        return tuple(descriptors)

    def open_as_far_as_there_is(self) -> tuple[int, ...]:
        """Open the directory and those above the last that are there still; the deepest comes last. Raises OSError."""
        descriptors = [self._open_top()]
        with contextlib.suppress(OSError):
            for part in self._below.parent.parts:
                descriptors.append(os.open(part, DIRECTORY_FLAGS, dir_fd=descriptors[-1]))
        return tuple(descriptors)

    def _open_top(self) -> int:
        path, beside = (".", self._top) if isinstance(self._top, int) else (self._top, None)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=beside)


def cgroup_of(pid: int) -> str:
    """Return a process' cgroup in the v2 hierarchy. Raises CgroupUnavailable when it has none, or none is told."""
    path = _path_of(pid)
    if path is None:
        raise CgroupUnavailable("no cgroup of version 2 was mounted since this host booted, so none is told")
    return path


def cgroup_once_mounted(pid: int) -> str:
    """Return a process' cgroup as `cgroup_of` does, also where none of version 2 was mounted since the host booted.

    The kernel tells of them from their first mount on, whoever made it (cgrp_dfl_visible in cgroup.c): where version 1
    is all that is mounted, this one is. Raises CgroupUnavailable, also for whoever may not mount.
    """
    path = _path_of(pid)
    if path is not None:
        return path
    try:
        _unseen()
    except OSError as error:
        raise refused("no cgroup of version 2 is mounted here, and none can be", error) from error
    return cgroup_of(pid)


def paths_of(pid: proc.Pid) -> dict[str, str]:
    """Return a process' cgroup in each hierarchy, by its controllers and "" for version 2, as this process sees them.

    Raises OSError when the process has ended.
    """
    return dict(_paths(pid))


def places_of(path: str) -> Iterator[Place]:
    """Yield where a v2 cgroup may be found by its path in `cgroup_of`, the least intrusive place first.

    `ip netns exec` hides /sys/fs/cgroup from what it runs; init's view of it is still there. Where nobody has
    mounted one, one is mounted that nobody sees.
    """
    for top, root in _hierarchies():
        below = relative(path, root)
        if below is not None:
            yield Place(top, below)


def processes_of(path: str) -> set[int]:
    """Return the live processes in a cgroup that this user made, and below it. Raises OSError where there is none."""
    place = next(places_of(path), None)
    if place is None:
        return set()
    descriptors = place.open(with_last=True)
    try:
        return processes_below(descriptors[-1]) if is_of_this_user(descriptors[-1]) else set()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def inode_of(path: str) -> int | None:
    """Return the inode of a cgroup, also of one that this user may not enter; None where there is none to be seen."""
    place, name = next(places_of(path), None), PurePosixPath(path).name
    if place is None or not name:
        return None
    with contextlib.suppress(OSError):
        descriptors = place.open(with_last=False)
        try:
            return os.stat(name, dir_fd=descriptors[-1], follow_symlinks=False).st_ino
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
    return None


def deepest_of(user: int, name: str, path: str) -> str:
    """Return how far on the way from the top down to a cgroup all are this user's: the last of them; "/" for none.

    name: its hierarchy, as in `paths_of`. What others make below theirs is not followed. Raises OSError where it is
    gone.
    """
    mounted = _hierarchies() if not name else ((top.place, top.root) for top in tops() if top.name == name)
    for top, root in mounted:
        below = relative(path, root)
        if below is None:
            continue
        descriptors = Place(top, below).open(with_last=True)
        try:
            owners = [os.fstat(descriptor).st_uid for descriptor in descriptors[1:]]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        own = itertools.takewhile(lambda pair: pair[1] == user, zip(below.parts, owners))
        return str(PurePosixPath(root, *(part for part, _ in own)))
    return "/"


def slices() -> list[str]:
    """Return the names of systemd's slices at the top of the v2 hierarchy; none where it cannot be looked at."""
    for top, root in _hierarchies():
        if root == "/":
            with contextlib.suppress(OSError), os.scandir(top) as entries:
                return sorted(entry.name for entry in entries if entry.name.endswith(".slice"))
    return []


def processes_below(directory: int) -> set[int]:
    """Return the live processes in the cgroup of this descriptor, and below it."""
    found = _members(directory)
    for _, below in directories_below(directory):
        found |= _members(below)
    return found


def directories_below(directory: int) -> Iterator[tuple[str, int]]:
    """Yield the cgroups below the one of this descriptor, each before those below it: the way there, and a descriptor.

    That is open until the next is asked for. By the way from the top, so that neither depth nor breadth, both up to
    whoever may make cgroups there, can exhaust descriptors or Python's stack; those too deep for a path are left out.
    Raises OSError.
    """
    pending = children(directory)
    while pending:
        way = pending.pop()
        try:
            child = os.open(way, DIRECTORY_FLAGS, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                continue
            raise
        try:
            yield way, child
            pending += [f"{way}/{name}" for name in children(child)]
        finally:
            os.close(child)


def is_of_this_user(directory: int) -> bool:
    """Return whether it was made from here: whoever has the parent can put another in the place of ours."""
    return os.fstat(directory).st_uid == os.geteuid()


def children(directory: int) -> list[str]:
    """Return the names of the cgroups right below the one of this descriptor."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def read(directory: int, name: str) -> str:
    """Read a file of the cgroup of this descriptor. Raises OSError."""
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return b"".join(iter(lambda: os.read(descriptor, 65536), b"")).decode("ascii").strip()
    finally:
        os.close(descriptor)


def write(directory: int, name: str, text: str) -> None:
    """Write a file of the cgroup of this descriptor. Raises OSError."""
    # One write(2), whose error cannot be lost in a buffer that fails at close.
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def shows_only_what_is_outside() -> bool:
    """Return whether version 2 is mounted, and from above the root of this process' cgroup namespace: `/..` is told."""
    roots = [PurePosixPath(mount.root).parts[1:2] for mount in _mounts(proc.SELF) if mount.shows("")]
    return bool(roots) and all(first == ("..",) for first in roots)


def relative(path: str, root: str) -> PurePosixPath | None:
    """Return the way from one cgroup to one below it, by their paths; None where it is not below."""
    try:
        return PurePosixPath(path).relative_to(root)
    except ValueError:
        return None


def tops() -> list[Top]:
    """Return the top of every hierarchy of cgroups, in this process' view, else in init's."""
    mounts = [list(_mounts(view)) for view in _VIEWS]
    names = [name for name, _ in _paths(proc.SELF)]
    return [top for name in names if (top := next(filter(None, (_top_of(name, seen) for seen in mounts)), None))]


def below_top(top: Top, pid: proc.Pid) -> PurePosixPath | None:
    """Return the way from the top of a hierarchy down to the cgroup of a process; None where it is at the top.

    Raises OSError when the process has ended.
    """
    path = dict(_paths(pid)).get(top.name, top.root)
    below = relative(path, top.root)
    return None if below == PurePosixPath() else below or PurePosixPath(path.lstrip("/"))


def may_leave_shared() -> bool:
    """Return whether what this process starts could leave the cgroups of a batch system; False if in doubt."""
    found = tops()
    return bool(found) and all(os.access(Path(top.place, "cgroup.procs"), os.W_OK) for top in found)


def refused(what: str, error: OSError) -> CgroupUnavailable:
    """Return what to raise for something that the kernel refused, with its reason."""
    reason, obstacle = _REASONS.get(error.errno or 0, (error.strerror or str(error), Obstacle.OTHER))
    advice = f"; {capabilities.run_as_root()}" if obstacle is Obstacle.NOT_PERMITTED else ""
    return CgroupUnavailable(f"{what}: {reason}{advice}", obstacle)


def _hierarchies() -> Iterator[Hierarchy]:
    for view in _VIEWS:
        yield from ((mount.place, mount.root) for mount in _mounts(view) if mount.shows(""))
    with contextlib.suppress(OSError):
        yield _unseen(), "/"


@functools.cache
def _unseen() -> int:
    """Return a descriptor of the v2 hierarchy's top, kept as long as this process. Raises OSError where it may not."""
    from securerun.linux import mounts  # few hosts have none mounted

    return mounts.open_unseen(_VERSION_2)


def _path_of(pid: int) -> str | None:
    try:
        lines = proc.cgroups(pid)
    except OSError as error:
        raise refused(f"the cgroup of process {pid} cannot be read", error) from error
    return next((line[3:] for line in lines if line.startswith("0::")), None)


def _paths(pid: proc.Pid) -> Iterator[tuple[str, str]]:
    """Yield the name of each hierarchy, which is its controllers and "" for version 2, and the process' path in it."""
    for line in proc.cgroups(pid):
        if line:
            _, name, path = line.split(":", 2)
            yield name, path


def _top_of(name: str, mounts: Collection[_Mount]) -> Top | None:
    """Return the top of a hierarchy. Where it is mounted more than once, the mount that shows most of it counts."""
    found = [Top(name, mount.place, mount.root) for mount in mounts if mount.shows(name)]
    return min(found, key=lambda top: _depth(top.root), default=None)


def _depth(root: str) -> int:
    """Return how far down a directory of cgroups is; above the root of a cgroup namespace it begins with `..`."""
    return sum(-1 if part == ".." else 1 for part in PurePosixPath(root).parts)


def _mounts(view: proc.Pid) -> Iterator[_Mount]:
    """Yield the mounts of cgroups where a process is, as they are reached from here."""
    try:
        lines = proc.mountinfo(view)
    except OSError:
        return
    prefix = "" if view == proc.SELF else proc.root(view)
    for line in lines:
        mount, _, source = line.partition(" - ")
        kind, _, options = (*source.split(" "), "", "")[:3]
        if kind not in (_VERSION_1, _VERSION_2):
            continue
        root, place = mount.split(" ")[3:5]
        place = prefix + _unescaped(place)
        with contextlib.suppress(OSError):
            if Path(place, "cgroup.procs").exists():
                yield _Mount(kind, options, place, _unescaped(root))


def _members(directory: int) -> set[int]:
    """Return the processes of one cgroup.

    A threaded one lists threads only (cgroup-v2.rst), and a signal to one is to all.
    """
    for name in ("cgroup.procs", "cgroup.threads"):
        with contextlib.suppress(OSError):
            return {int(line) for line in read(directory, name).split()}
    return set()


def _unescaped(text: str) -> str:
    """Undo what mountinfo does to space, tab, newline and backslash: it writes them as octal (proc(5))."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
