"""The keys that the kernel keeps for whoever logged in (keyrings(7), keyctl(2))."""

from __future__ import annotations

import errno

from securerun.linux import libc

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
        libc.keyctl(_JOIN_SESSION_KEYRING, 0)
    except OSError as error:
        if error.errno not in _CLOSED or not _are_closed():
            raise


def _are_closed() -> bool:
    """Return whether not even what everybody may ask is answered."""
    try:
        libc.keyctl(_GET_KEYRING_ID, _SESSION_KEYRING)
    except OSError as error:
        return error.errno in _CLOSED
    return False
