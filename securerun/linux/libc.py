"""The C library, for the system calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os

library = ctypes.CDLL(None, use_errno=True)


# arch/x86/entry/syscalls/syscall_64.tbl and its like; the others have asm-generic/unistd.h's.
_KEYCTL = {"x86_64": 250, "ppc64le": 271, "s390x": 280}
_GENERIC_KEYCTL = 219


def keyctl(operation: int, argument: int) -> int:
    """Make a call of keyctl(2), for which libc has no function. Raises OSError."""
    number = _KEYCTL.get(os.uname().machine, _GENERIC_KEYCTL)
    result: int = library.syscall(*map(ctypes.c_long, (number, operation, argument, 0, 0, 0)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def check(result: int) -> None:
    """Raise the OSError that a call left in errno, unless its result is 0."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
