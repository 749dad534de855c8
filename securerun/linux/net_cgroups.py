"""The cgroups of net_cls and net_prio (version 1), which may switch off every filter on a cgroup of version 2.

A socket of an older kernel has one place for its cgroup and for what net_cls and net_prio note of it: once either is
used anywhere, no new socket has a cgroup of its own until the next boot, and one that is given a class or a priority
loses the cgroup that it had. The fix, "bpf, cgroups: Fix cgroup v2 fallback on v1/v2 mixed mode" (8520e224f547), is in
Linux 5.15 and in later 5.10.y, so no version tells whether a kernel has it.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Mapping
from pathlib import PurePosixPath

from securerun.linux import cgroups, proc

_CONTROLLERS = frozenset({"net_cls", "net_prio"})
# Each level is a descriptor while it is opened.
_LONGEST_PATH = 2048

Memberships = Mapping[str, str]


def of(pid: proc.Pid) -> Memberships:
    """Return a process' cgroup in each hierarchy of the two, by the hierarchy's name; {} where there is none.

    A hierarchy is there as long as somebody has it mounted, or has made a cgroup in it. Raises OSError.
    """
    return among(proc.cgroups(pid))


def among(lines: list[str]) -> Memberships:
    """Return `of` from the lines of /proc/PID/cgroup."""
    found = (line.split(":", 2)[1:] for line in lines if line)
    return {name: path for name, path in found if not _CONTROLLERS.isdisjoint(name.split(","))}


def differing(one: Memberships, other: Memberships) -> Memberships:
    """Return what of `one` is not as in `other`; a hierarchy that came later has everybody at its top."""
    return {name: path for name, path in one.items() if other.get(name, "/") != path}


@functools.cache
def may_void_filters() -> bool:
    """Return whether net_cls and net_prio may switch filters on cgroups off: also where the kernel does not say.

    Since the fix the two have places of their own beside the cgroup (struct sock_cgroup_data).
    """
    from securerun.linux import kernel_types  # a guard with a shield asks, once

    return "cgroup" not in (kernel_types.members_of("sock_cgroup_data") or ())


def open_place(name: str, path: str) -> int:
    """Return a descriptor of a cgroup's directory in a hierarchy of `of`, mounted for it alone. Raises OSError."""
    below = cgroups.relative(path, "/")
    if below is None or ".." in below.parts or len(path) > _LONGEST_PATH:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    from securerun.linux import mounts  # as above

    top = mounts.open_unseen("cgroup", name)
    try:
        *above, last = cgroups.Place(top, below).open(with_last=True)
    finally:
        os.close(top)
    for descriptor in above:
        os.close(descriptor)
    return last


def move_to_top(pid: int) -> None:
    """Move a process to the top of each hierarchy of the two: there it belongs to nobody. Raises OSError."""
    for name, path in of(pid).items():
        if PurePosixPath(path) == PurePosixPath("/"):
            continue
        top = open_place(name, "/")
        try:
            enter(top, pid)
        finally:
            os.close(top)


def enter(directory: int, pid: int = 0) -> None:
    """Move a process, by default this one, to the cgroup of this descriptor. Raises OSError."""
    cgroups.write(directory, "cgroup.procs", str(pid))
