"""Whose a process' namespaces are, and how this process goes on in one (namespaces(7), ioctl_ns(2), setns(2))."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator

from securerun.linux import libc, proc

# include/uapi/linux/sched.h
_KINDS = {"cgroup": 0x02000000, "net": 0x40000000}
_NS_GET_USERNS = 0xB701
_NS_GET_PARENT = 0xB702
_NS_GET_OWNER_UID = 0xB704


class Namespace:
    """A namespace of a process, held: what is asked of it is asked of the same one, wherever the process goes.

    kind: as /proc/PID/ns names it; `cgroup` and `net` can be entered. Raises OSError for a process that has ended or
    may not be looked into, and where this kernel has no such namespaces.
    """

    def __init__(self, kind: str, pid: proc.Pid) -> None:
        self._kind = kind
        self._descriptor = proc.open_namespace(kind, pid)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @property
    def inode(self) -> int:
        """The number that tells it from all others there are now."""
        return os.fstat(self._descriptor).st_ino

    def is_own(self) -> bool:
        """Return whether this process is in it."""
        return self.inode == proc.namespace(self._kind)

    def owners(self) -> frozenset[int]:
        """Return who made the user namespace that it is of and those around that, up to this process' own, without it.

        They have all capabilities over it; none but root where the set is empty or has root alone. Raises OSError: it
        is of an outer user namespace, or nobody is told (before kernel 4.11).
        """
        around = fcntl.ioctl(self._descriptor, _NS_GET_USERNS)
        return frozenset(owner for owner, _ in _outwards(around))

    def user_namespace(self) -> int:
        """Return the inode of the user namespace that it is of. Raises OSError: that is an outer one."""
        around = fcntl.ioctl(self._descriptor, _NS_GET_USERNS)
        try:
            return os.fstat(around).st_ino
        finally:
            os.close(around)

    def outermost(self) -> Namespace:
        """Return the outermost of those around it, and it, that is not this process' own; that where it is its own.

        Of pid namespaces alone, which lie in each other. Raises OSError: it does not lie in this process' own.
        """
        found = Namespace.__new__(Namespace)
        found._kind, found._descriptor = self._kind, os.dup(self._descriptor)
        try:
            own = proc.namespace(self._kind)
            while found.inode != own:
                outside = fcntl.ioctl(found._descriptor, _NS_GET_PARENT)
                if os.fstat(outside).st_ino == own:
                    os.close(outside)
                    break
                os.close(found._descriptor)
                found._descriptor = outside
        except BaseException:
            os.close(found._descriptor)
            raise
        return found

    def enter(self) -> None:
        """Go on in it. Raises OSError."""
        libc.check(libc.library.setns(self._descriptor, _KINDS[self._kind]))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in it for the block. Raises OSError."""
        with Namespace(self._kind, proc.SELF) as home:
            self.enter()
            try:
                yield
            finally:
                home.enter()


def owners_of_user_namespaces(pid: int) -> frozenset[int]:
    """Return who made the user namespace of a process and those around it, down from this process' own, without that.

    Before kernel 4.11 nobody is told. Raises OSError for a process that has ended or may not be looked into.
    """
    return frozenset(owner for owner, _ in _outwards(proc.open_namespace("user", pid)))


def is_within_user_namespace(pid: int, inode: int) -> bool:
    """Return whether a process is in a user namespace, below this process' own, or in one that was made in it.

    Raises OSError for a process that has ended or may not be looked into.
    """
    return any(found == inode for _, found in _outwards(proc.open_namespace("user", pid)))


def _outwards(inside: int) -> Iterator[tuple[int, int]]:
    """Yield owner and inode of the user namespace of a descriptor and of those around it, as far as this process' own.

    The descriptor is closed.
    """
    try:
        own = proc.namespace("user")
        while (inode := os.fstat(inside).st_ino) != own:
            owner = bytearray(4)
            fcntl.ioctl(inside, _NS_GET_OWNER_UID, owner)
            yield int.from_bytes(owner, sys.byteorder), inode
            outside = fcntl.ioctl(inside, _NS_GET_PARENT)
            os.close(inside)
            inside = outside
    finally:
        os.close(inside)
