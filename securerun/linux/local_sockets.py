"""Who is at the other end of a local socket, as the kernel noted when it was connected (unix(7))."""

from __future__ import annotations

import socket
import struct

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
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
