"""A user namespace of this process' own, a network namespace in it, and of which its network is (user_namespaces(7)).

Whoever begins one has all capabilities over both, and none over anything else: linux/capabilities.py gives them up.
"""

from __future__ import annotations

import fcntl
import os

from securerun.linux import libc, proc

_NS_GET_USERNS = 0xB701  # ioctl_ns(2)
# include/uapi/linux/sched.h
_NEW_MOUNTS, _NEW_USERS, _NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000


def begin(*, mounts: bool) -> None:
    """Go on in a new user namespace, with a network in it, and mounts of its own where they are asked for.

    This process' effective user and group keep their numbers, and nobody else has one; of its other groups it keeps
    what they open (kernel/user_namespace.c: setgroups stays forbidden). What it has open stays as it was.
    Raises OSError, also for a process of several threads.
    """
    user, group = os.geteuid(), os.getegid()
    libc.check(libc.library.unshare(_NEW_USERS | _NEW_NETWORK | (_NEW_MOUNTS if mounts else 0)))
    proc.map_own_ids(user, group)


def enter(pid: int) -> None:
    """Go on in the user and network namespaces of a process of this user's. Raises OSError."""
    for kind, number in (("user", _NEW_USERS), ("net", _NEW_NETWORK)):
        descriptor = proc.open_namespace(kind, pid)
        try:
            libc.check(libc.library.setns(descriptor, number))
        finally:
            os.close(descriptor)


def of_network() -> int | None:
    """Return the user namespace in which capabilities count for this network, its inode; None where nobody may tell.

    Before kernel 4.9 nobody is told.
    """
    network = proc.open_namespace("net")
    try:
        owner = fcntl.ioctl(network, _NS_GET_USERNS)
    except OSError:
        return None
    finally:
        os.close(network)
    try:
        return os.fstat(owner).st_ino
    finally:
        os.close(owner)
