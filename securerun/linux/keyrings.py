"""The keys that the kernel keeps for whoever logged in (keyrings(7), keyctl(2))."""

from __future__ import annotations

import ctypes
import errno
import os

from securerun.linux import libc

# arch/x86/entry/syscalls/syscall_64.tbl and its like; the others have asm-generic/unistd.h's.
_KEYCTL = {"x86_64": 250, "ppc64le": 271, "s390x": 280}
_GENERIC_KEYCTL = 219
# include/uapi/linux/keyctl.h
_GET_KEYRING_ID, _JOIN_SESSION_KEYRING = 0, 1
_SESSION_KEYRING = -3
_CLOSED = (errno.ENOSYS, errno.EPERM)


def begin_new_session() -> None:
    """Have this process a session keyring of its own, and with it what it starts: none of whoever started it.

    A kernel without keys is passed over, and a container whose filter of system calls forbids them: the filter holds
    for whatever is started from here as well. Raises OSError, for a user with too many keys for one (EDQUOT).
    """
    try:
        _keyctl(_JOIN_SESSION_KEYRING, 0)
    except OSError as error:
        if error.errno not in _CLOSED or not _are_closed():
            raise


def _are_closed() -> bool:
    """Return whether not even what everybody may ask is answered."""
    try:
        _keyctl(_GET_KEYRING_ID, _SESSION_KEYRING)
    except OSError as error:
        return error.errno in _CLOSED
    return False


def _keyctl(operation: int, argument: int) -> int:
    number = _KEYCTL.get(os.uname().machine, _GENERIC_KEYCTL)
    words = (number, operation, argument, 0, 0, 0)
    result: int = libc.library.syscall(*map(ctypes.c_long, words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
