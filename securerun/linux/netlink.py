"""Netlink: how to ask the kernel, and how it answers and reports, whatever the question (RFC 3549, netlink(7)).

What the questions mean stands in the modules that ask them. All that comes is read strictly: a message, an attribute
or a number that is not whole is an OSError (EBADMSG), never half an answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

# include/uapi/linux/netlink.h: what a socket is for
ROUTE, SOCK_DIAG, NETFILTER = 0, 4, 12
# What is wanted: every message to the kernel is a request; to delete, to make, and to be told of all there is.
REQUEST, ACKNOWLEDGE = 0x1, 0x4
NOT_RECURSIVE, EXCLUSIVE, DUMP = 0x100, 0x200, 0x300
# What stands in an attribute's type beside the type.
NESTED, NETWORK_ORDER = 0x8000, 0x4000
_DUMP_INTERRUPTED = 0x10
_ERROR, _DONE = 2, 3
_CLOSING = (_ERROR, _DONE)
_HEADER = struct.Struct("=IHH8x")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR_NUMBER = struct.Struct("=i")
# netlink_dump (net/netlink/af_netlink.c) never builds more than 32 KiB at once.
_DATAGRAM_BYTES = 65536
_TIMEOUT_SECONDS = 5
_ATTEMPTS = 4


class Attributes(dict[int, bytes]):
    """What stands in a message, by type. One that is asked for and missing is an error of the kernel's, an OSError."""

    def __missing__(self, kind: int) -> bytes:
        raise OSError(errno.EBADMSG, f"a netlink message without its attribute {kind}")


class Channel:
    """A netlink socket that hears the kernel alone, in the network namespace in which it was made.

    protocol: what the socket is for. group: the number of the events to hear of, if any.
    Raises OSError where the kernel has no such sockets or does not permit one.
    """

    def __init__(self, protocol: int, group: int | None = None) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        with contextlib.ExitStack() as undo:
            undo.callback(self._socket.close)
            if group is not None:
                self._socket.bind((0, 1 << (group - 1)))
            # Connected, it takes messages from the kernel alone (net/netlink/af_netlink.c: netlink_getsockbyportid).
            self._socket.connect((0, 0))
            self._socket.settimeout(_TIMEOUT_SECONDS)
            undo.pop_all()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket. May be called again."""
        self._socket.close()

    def stop_waiting(self) -> None:
        """From now on have `receive` raise BlockingIOError where it would wait."""
        self._socket.setblocking(False)

    def receive(self) -> bytes:
        """Return the next datagram. Raises OSError, ENOBUFS when more came than was kept for us."""
        data, _, flags, _ = self._socket.recvmsg(_DATAGRAM_BYTES)
        if flags & socket.MSG_TRUNC:
            raise OSError(errno.EBADMSG, "the kernel's answer came cut short")
        return data

    def ask(self, question: bytes) -> bytes:
        """Return the payload of the one answer. Raises OSError for what the kernel reports instead, as ENOENT."""
        self._socket.send(question)
        for kind, _, payload in messages(self.receive()):
            if kind != _ERROR:
                return payload
            raise_reported(payload)
        raise OSError(errno.EPROTO, "the kernel gave no answer")

    def order(self, order: bytes) -> None:
        """Have done what the message says, or the one of several that asks for an acknowledgement.

        Raises OSError for what the kernel reports.
        """
        self._socket.send(order)
        while True:
            for kind, _, payload in messages(self.receive()):
                if kind == _ERROR:
                    raise_reported(payload)
                    return

    def dump(self, question: bytes) -> Dump:
        """Ask for all there is of something; the answers come when they are iterated over."""
        self._socket.send(question)
        return Dump(self.receive)

    def listed(self, question: bytes, wanted: int) -> list[bytes]:
        """Return the payloads of a dump's messages of the wanted type.

        While the kernel calls a dump inconsistent, it is asked for again, though not for ever. Raises OSError.
        """
        for _ in range(_ATTEMPTS):
            dump = self.dump(question)
            answers = [payload for kind, payload in dump if kind == wanted]
            if not dump.interrupted:
                break
        return answers


class Dump:
    """An answer in many messages, to be iterated over once: type and payload of each, but for the closing one.

    interrupted: whether the kernel calls it inconsistent (NLM_F_DUMP_INTR); known at its end.
    """

    def __init__(self, receive: Callable[[], bytes]) -> None:
        self._receive = receive
        self.interrupted = False

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Raise OSError for what the kernel reports, ENOENT for a protocol that is not built in."""
        while True:
            for kind, flags, payload in messages(self._receive()):
                if flags & _DUMP_INTERRUPTED:
                    self.interrupted = True
                if kind in _CLOSING:
                    # inet_diag tells of its own errors in the closing message (netlink_dump: dump_done_errno).
                    raise_reported(payload)
                    return
                yield kind, payload


def framed(kind: int, payload: bytes, flags: int) -> bytes:
    """Return one message with its header (RFC 3549, 2.3.2)."""
    return struct.pack("=IHHII", _HEADER.size + len(payload), kind, flags, 0, 0) + payload


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, flags and payload of each message in a datagram. Raises OSError for one that is not whole.

    Nothing is copied but the payloads, which shows with thousands of listeners.
    """
    offset, size, header = 0, len(data), _HEADER.size
    while offset < size:
        begin = offset + header
        if begin > size:
            raise OSError(errno.EBADMSG, "a netlink message without its header")
        length, kind, flags = _HEADER.unpack_from(data, offset)
        end = offset + length
        if length < header or end > size:
            raise not_whole()
        yield kind, flags, data[begin:end]
        offset = (end + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute: length, type, value, padded to four bytes."""
    padding = b"\0" * (-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + padding


def attributes(data: bytes) -> Attributes:
    """Return the attributes in `data`, the flags for nested and network order taken off their types.

    Raises OSError for one that is not whole.
    """
    return Attributes(each_attribute(data))


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield what `attributes` returns, each that is of the kind of an earlier one too."""
    offset = 0
    while offset < len(data):
        length, kind = unpacked(_ATTRIBUTE, data, offset)
        end = offset + length
        if length < _ATTRIBUTE.size or end > len(data):
            raise not_whole("a netlink attribute")
        yield kind & ~(NESTED | NETWORK_ORDER), data[offset + _ATTRIBUTE.size : end]
        offset = (end + 3) & ~3


def unpacked(layout: struct.Struct, data: bytes, offset: int = 0) -> tuple[Any, ...]:
    """Return the numbers that stand in `data`. Raises OSError where it is too short for them."""
    if len(data) < offset + layout.size:
        raise not_whole()
    return layout.unpack_from(data, offset)


def raise_reported(payload: bytes) -> None:
    """Raise the error that a closing message or an acknowledgement reports; 0 stands for success."""
    (negative,) = unpacked(_ERROR_NUMBER, payload)
    if negative:
        raise OSError(-negative, os.strerror(-negative))


def not_whole(what: str = "a netlink message") -> OSError:
    """Return the error for what is too short, or ends behind that in which it stands."""
    return OSError(errno.EBADMSG, f"{what} that is not whole")


def is_channel(descriptor: int, protocol: int) -> bool:
    """Return whether a descriptor of this process is a netlink socket for this; False for one that is closed."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        return copy.family == socket.AF_NETLINK and copy.proto == protocol
