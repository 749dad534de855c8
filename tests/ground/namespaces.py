"""Namespaces of a test's own (namespaces(7)); Python has these calls since 3.12."""

from __future__ import annotations

from securerun.linux import libc

# include/uapi/linux/sched.h: CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWNET
MOUNTS, CGROUPS, NETWORK = 0x00020000, 0x02000000, 0x40000000


def leave(kind: int) -> None:
    """Be in a new namespace of this kind from now on."""
    libc.check(libc.library.unshare(kind))


def enter(descriptor: int, kind: int) -> None:
    """Be in the namespace of this kind that the descriptor stands for."""
    libc.check(libc.library.setns(descriptor, kind))
