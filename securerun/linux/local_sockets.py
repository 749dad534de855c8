"""Who is at the other end of a local socket, as the kernel noted when it was connected, and who listens (unix(7))."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SOCKETS = Path("/proc/net/unix")
# Number, references, protocol, flags, type, state, inode and name; the flag of a socket that takes connections is
# __SO_ACCEPTCON (net/unix/af_unix.c, unix_seq_show). "@name" is an abstract one, which begins with a zero byte.
_LISTENING = re.compile(rb"\S+ \S+ \S+ 00010000 \S+ \S+ +([0-9]+) @(.*)\n")
_SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h, kernel 6.5


def peer_of(end: socket.socket) -> tuple[int, int]:
    """Return the process and the user of the other end: no process where it is in a pid namespace that is not ours.

    The process may have ended, and another may have its id. Raises OSError for a socket without a peer.
    """
    pid, user, _ = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, user


def pidfd_of_peer(end: socket.socket) -> int | None:
    """Return the kernel's own hold on the process of the other end; None where it has none to give."""
    try:
        return end.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return None


def is_of_a_process_that_is_gone(end: socket.socket) -> bool:
    """Return whether the process of the other end has ended and was reaped; False before kernel 6.5, which tells not.

    The socket may live on, in whoever was handed it, and the process' number may be another's.
    """
    try:
        os.close(end.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
    except OSError as error:
        return error.errno != errno.ENOPROTOOPT
    return False


def listening(names: re.Pattern[bytes], seconds: float) -> Iterator[tuple[bytes, int]]:
    """Yield the abstract names of this network namespace that match and take connections, each with its inode.

    Anybody may have as many as they like. Raises OSError, and TimeoutError for more than can be read in the time.
    """
    deadline = time.monotonic() + seconds
    with _SOCKETS.open("rb") as lines:
        for line in lines:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{_SOCKETS} is too long to be read")
            entry = _LISTENING.fullmatch(line)
            if entry is not None and names.fullmatch(entry[2]):
                yield b"\0" + entry[2], int(entry[1])


def address_of_peer(descriptor: int) -> bytes | str:
    """Return to what the other end of a socket is bound, "" where it is to nothing; it chose that itself."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as end:
            address = end.getpeername()
    except OSError:
        return ""
    return address if isinstance(address, (bytes, str)) else ""
