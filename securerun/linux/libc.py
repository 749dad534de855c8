"""The C library, for the system calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os

library = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raise the OSError that a call left in errno, unless its result is 0."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
