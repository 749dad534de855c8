"""What others send along on a local socket: descriptors of theirs (unix(7), SCM_RIGHTS), which nobody here asked for.

Who reads past them, or closes a socket in which they wait, is made to close them, and may be made to wait for that: the
last close of a TCP socket takes as long as its owner has set (socket(7), SO_LINGER), in whichever process it happens.
Not in one that ends (PF_EXITING, inet_release in net/ipv4/af_inet.c). So they stay where they are until a process ends:
this one, or a child that is made for it. Only since Linux 6.16 can a socket refuse them (SO_PASSRIGHTS).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Sequence
from typing import NoReturn

_SIOCINQ = 0x541B
_NUMBER = struct.Struct("=i")
_MOST_DESCRIPTORS = 65536


class DescriptorsSent(OSError):
    """Descriptors were sent along with what would be next to read; nothing of it was taken."""


def deaf() -> socket.socket:
    """Return a socket to ask the kernel about whoever listens somewhere: nobody can send anything to it.

    It does not wait to be connected either.
    """
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    end.shutdown(socket.SHUT_RD)  # asked of the other end when that sends (unix_stream_sendmsg)
    return end


def take_none(end: socket.socket) -> None:
    """Make `receive` see all that is sent to a socket. Raises OSError."""
    # An urgent byte that is not in line would be passed over, with what came along with it.
    end.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def receive(end: socket.socket, size: int, flags: int = 0) -> bytes:
    """Receive what has no descriptors along with it. Raises DescriptorsSent at what has, or OSError."""
    data, _, told, _ = end.recvmsg(size, 0, flags | socket.MSG_PEEK)
    if told & socket.MSG_CTRUNC:
        raise DescriptorsSent("descriptors were sent along, and nobody here takes any")
    return end.recv(len(data), flags) if data else b""


class Parting:
    """Closes sockets, and waits for nobody in it: those with something unread in them by a child, some at a time."""

    def __init__(self) -> None:
        self._unread: list[socket.socket] = []

    def __len__(self) -> int:
        """How many are still to be closed."""
        return len(self._unread)

    def take(self, end: socket.socket, *, is_anothers: bool = False) -> None:
        """Close a socket now if nothing is in it, and else with the others, in `close`.

        is_anothers: whether another process has it as well, and goes on with it.
        """
        if not is_anothers:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)  # from now on nothing comes in
        if _is_empty(end):
            end.close()
        else:
            self._unread.append(end)

    def close(self) -> None:
        """Have a child close them. Where there can be none, they stay until next time."""
        if not self._unread:
            return
        with contextlib.suppress(OSError):
            _close_in_child(self._unread)
            self._unread.clear()


def _is_empty(end: socket.socket) -> bool:
    try:
        (length,) = _NUMBER.unpack(fcntl.ioctl(end, _SIOCINQ, bytes(_NUMBER.size)))
    except OSError:
        return False
    return bool(length == 0)


def _close_in_child(ends: Sequence[socket.socket]) -> None:
    """Close these, of which another process has copies that ends after that, and whom nobody here waits for.

    Raises OSError, and then none is closed.
    """
    with contextlib.ExitStack() as closed:
        for descriptor in (told := os.pipe()):
            closed.callback(os.close, descriptor)
        child = os.fork()
        if child == 0:
            _have_end_when_told(told[0], {end.fileno() for end in ends})
        _, status = os.waitpid(child, 0)
        if status:
            raise OSError("there can be no child")
        for end in ends:  # before the pipe, whose end is what tells
            end.close()


def _have_end_when_told(told: int, kept: set[int]) -> NoReturn:
    """Leave a child that ends when the pipe does, with these descriptors and nothing else, least of all a lock."""
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the handlers are the parent's
        if os.fork() == 0:
            first = 0
            for descriptor in (*sorted({told, *kept}), _MOST_DESCRIPTORS):
                os.closerange(first, descriptor)
                first = descriptor + 1
            os.read(told, 1)
        status = 0
    finally:
        os._exit(status)
