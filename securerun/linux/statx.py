"""When a file was made: an inode's number goes to the next file soon after the one before is removed."""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from typing import Any

from securerun.linux import libc

_BIRTH = 0x800  # STATX_BTIME, since Linux 4.11
_ITSELF = 0x1000 | 0x100  # AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW
_SIZE = 256  # struct statx of <linux/stat.h>
_BIRTH_AT = 80
_TIME = struct.Struct("=qI")


def birth_of(descriptor: int, name: str = "") -> int:
    """Return when the file of a descriptor, or one of this name in a directory's, was made: nanoseconds since 1970.

    0 where the file system, the kernel or the C library (before glibc 2.28) does not tell.
    """
    statx = _statx()
    if statx is None:
        return 0
    answer = ctypes.create_string_buffer(_SIZE)
    if statx(descriptor, os.fsencode(name), _ITSELF, _BIRTH, answer) != 0:
        return 0
    (told,) = struct.unpack_from("=I", answer)
    seconds, nanoseconds = _TIME.unpack_from(answer, _BIRTH_AT)
    return seconds * 10**9 + nanoseconds if told & _BIRTH else 0


@cache
def _statx() -> Any:  # noqa: ANN401 - a function of the C library
    statx = getattr(libc.library, "statx", None)
    if statx is not None:
        statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    return statx
