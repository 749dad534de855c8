"""Which TCP listeners there are, who holds them and which cgroup each belongs to, from the kernel and quickly.

Reading /proc/net/tcp walks every connection of the host; a sock_diag dump asks for listeners alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from securerun.errors import Unavailable
from securerun.linux import capabilities, netlink
from securerun.linux.netlink import Channel
from securerun.linux.networks import Address

# include/uapi/linux/sock_diag.h
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
# include/uapi/linux/inet_diag.h: struct inet_diag_req_v2 (its socket id all zero), struct inet_diag_msg
_QUESTION = struct.Struct("=BBBBI48x")
# The same with one: own port and the other's, own address and the other's, any interface; and its cookie.
_ONE = struct.Struct("!HH16s16s4x")
_COOKIE = struct.Struct("=II")
_STATE = 1
_PORT = struct.Struct("!4xH")
_PORTS = struct.Struct("!4xHH")
_RETRIES = 3
_SOURCE, _TARGET = 8, 24
_USER_AND_INODE = struct.Struct("=64xII")
_DIAGNOSIS_SIZE = 72
_CGROUP_ID = 21  # INET_DIAG_CGROUP_ID, given unasked since 5.9
_CGROUP_NUMBER = struct.Struct("=Q")
# struct inet_diag_bc_op; INET_DIAG_REQ_BYTECODE, INET_DIAG_BC_S_GE, INET_DIAG_BC_S_LE
_FILTER = struct.Struct("=BBH")
_FILTER_ATTRIBUTE, _PORT_AT_LEAST, _PORT_AT_MOST = 1, 2, 3
# TCP_ESTABLISHED to TCP_LAST_ACK, and TCP_CLOSING; what waits (TCP_TIME_WAIT) belongs to no process any more.
_CONNECTED = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))
_SYN_SENT, _LISTEN = 2, 10  # include/net/tcp_states.h
# Whoever has a thousand connections without an answer is told of some.
_MOST_ATTEMPTS = 4096
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class SocketsUnavailable(Unavailable):
    """The kernel does not tell which sockets listen. The message is one line and says why."""


@dataclass(frozen=True)
class Listener:
    """A TCP socket in state LISTEN.

    address: what it is bound to; `::` may serve IPv4 as well. user: the user id of whoever made it.
    inode: the N of "socket:[N]" in /proc/PID/fd.
    cgroup_id: the cgroup in which it was made, `cgroup_id` says of which directory; None before kernel 5.9.
    """

    address: Address
    port: int
    user: int
    inode: int
    cgroup_id: int | None


@dataclass(frozen=True)
class Connection:
    """A TCP socket that is connected, or about to be, from a port of this host. inode: as of a listener."""

    port: int
    user: int
    inode: int


@dataclass(frozen=True)
class Attempt:
    """A connection that is being opened, and was not answered yet.

    source, target: this host's address and the other's; port: the other's. retries: how often its SYN went out again.
    user, inode, cgroup_id: as of a listener.
    """

    source: Address
    target: Address
    port: int
    retries: int
    user: int
    inode: int
    cgroup_id: int | None


class SocketDiagnosis:
    """One netlink socket to ask about the network namespace in which it was made, again and again.

    Raises SocketsUnavailable where the kernel has no sock_diag.
    """

    def __init__(self) -> None:
        self._channel = _open_channel()
        self._known: dict[bytes, Listener] = {}

    def listeners(self) -> tuple[Listener, ...]:
        """Return all TCP listeners of both families, in the kernel's order, as before if nothing changed.

        MPTCP listeners are among them: the connections of one arrive at a TCP socket, which is what is found here,
        with the inode of the socket that the process holds (net/mptcp/subflow.c: mptcp_subflow_create_socket); a dump
        of IPPROTO_MPTCP walks the same table, 40 times as slowly, and finds no more (mptcp_diag_dump_listeners).
        A listener that others shift in the table, by ending in the middle of a long answer, may be missed once.

        Raises SocketsUnavailable when the kernel refuses or answers what cannot be understood; may be called again.
        """
        try:
            self._known = self._understood([*self._dump(socket.AF_INET), *self._dump_if_built_in(socket.AF_INET6)])
        except OSError as error:
            self._start_over()
            raise SocketsUnavailable(_why(error)) from error
        return tuple(self._known.values())

    def connections(self, first: int, last: int) -> tuple[Connection, ...]:
        """Return the connections of both families whose own port lies between these two, both included.

        Raises SocketsUnavailable as `listeners` does.
        """
        chosen = _port_filter(first, last)
        try:
            found = [
                *self._dump(socket.AF_INET, _CONNECTED, chosen),
                *self._dump_if_built_in(socket.AF_INET6, _CONNECTED, chosen),
            ]
            return tuple(map(_connection, found))
        except OSError as error:
            self._start_over()
            raise SocketsUnavailable(_why(error)) from error

    def attempts(self, retries: int) -> tuple[Attempt, ...]:
        """Return the connections of both families that are being opened and whose SYN went out again so often.

        The kernel walks all connections of the namespace for it and answers with these alone, of which no more than
        some thousands are looked at. Raises SocketsUnavailable as `listeners` does.
        """
        found: list[Attempt] = []
        try:
            for family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(FileNotFoundError):  # IPv6 may not be built in
                    found += self._attempts_of(family, retries)
        except OSError as error:
            self._start_over()
            raise SocketsUnavailable(_why(error)) from error
        return tuple(found)

    def _attempts_of(self, family: int, retries: int) -> Iterator[Attempt]:
        answers = self._channel.dump(_question(family, 1 << _SYN_SENT))
        for number, (kind, answer) in enumerate(answers):
            if number == _MOST_ATTEMPTS:
                self._start_over()
                return
            if kind == _SOCK_DIAG_BY_FAMILY and answer[_RETRIES : _RETRIES + 1] >= bytes([retries]):
                yield _attempt(answer)

    def end(self, source: Address, source_port: int, target: Address, port: int, cookie: int) -> bool:
        """End a TCP socket between these ends: whoever waits for it sees an error (ECONNABORTED).

        cookie: its own number, so that it is no other one that has these ends by now. Return False where it is gone.
        Linux 4.5, with CONFIG_INET_DIAG_DESTROY; CAP_NET_ADMIN. Raises SocketsUnavailable as `listeners` does.
        """
        family = socket.AF_INET if target.version == 4 else socket.AF_INET6
        ends = (source_port, port, source.packed.ljust(16, b"\0"), target.packed.ljust(16, b"\0"))
        chosen = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0) + _ONE.pack(*ends)
        chosen += _COOKIE.pack(cookie & 0xFFFFFFFF, cookie >> 32)
        try:
            self._channel.order(netlink.framed(_SOCK_DESTROY, chosen, netlink.REQUEST | netlink.ACKNOWLEDGE))
        except FileNotFoundError:
            return False
        except OSError as error:
            self._start_over()
            raise SocketsUnavailable(f"a connection cannot be ended: {error.strerror or error}") from error
        return True

    def close(self) -> None:
        """Close the socket."""
        self._channel.close()

    def _dump(self, family: int, states: int = 1 << _LISTEN, chosen: bytes = b"") -> list[bytes]:
        message = _question(family, states, chosen)
        return self._channel.listed(message, _SOCK_DIAG_BY_FAMILY)

    def _dump_if_built_in(self, family: int, states: int = 1 << _LISTEN, chosen: bytes = b"") -> list[bytes]:
        try:
            return self._dump(family, states, chosen)
        except FileNotFoundError:
            return []

    def _understood(self, answers: Iterable[bytes]) -> dict[bytes, Listener]:
        """Return what the answers say; one that is as before, as most are, was understood before."""
        understood = ((answer, self._known.get(answer) or _listener(answer)) for answer in answers)
        return {answer: listener for answer, listener in understood if listener is not None}

    def _start_over(self) -> None:
        """Open another channel: what is left of an answer that went wrong must not be taken for the next one."""
        self._channel.close()
        self._channel = _open_channel()


def listeners() -> tuple[Listener, ...]:
    """Return all TCP listeners of this network namespace, asked once; see `SocketDiagnosis.listeners`."""
    with contextlib.closing(SocketDiagnosis()) as diagnosis:
        return diagnosis.listeners()


def cgroup_id(descriptor: int) -> int:
    """Return the number by which sockets name the cgroup of this directory.

    INET_DIAG_CGROUP_ID is the kernfs id, which has been the inode number since 5.5 (fs/kernfs: kernfs_ino).
    """
    return os.fstat(descriptor).st_ino


def cgroup_ids(descriptor: int) -> frozenset[int]:
    """Return the numbers of a cgroup and of all below it.

    To be asked after the listeners were, so that none is too new.

    Sockets outlive the directory of their cgroup, and stay filtered: unite the answer with the earlier ones.
    """
    found = {cgroup_id(descriptor)}
    below = _children(descriptor, ".")
    while below:
        path, number = below.pop()
        found.add(number)
        # By path from the top, so that neither depth nor breadth, both up to the job, can exhaust descriptors.
        below += _children(descriptor, path)
    return frozenset(found)


def held(found: Iterable[Listener], holders: Mapping[int, int]) -> tuple[Listener, ...]:
    """Return the listeners that the processes of `holders` (from `proc.sockets_of`) hold."""
    return tuple(listener for listener in found if listener.inode in holders)


def outside(found: Iterable[Listener], holders: Mapping[int, int], ids: Collection[int]) -> tuple[Listener, ...]:
    """Return the listeners that the processes hold and no filter on the cgroups `ids` (from `cgroup_ids`) sees.

    A socket belongs for good to the cgroup in which it was made: these were made before joining, received from
    outside, or fell to the root cgroup since net_cls or net_prio is in use (net_cgroups.py). A kernel that does not
    tell the cgroup (before 5.9) accuses nobody.
    """
    return tuple(
        listener
        for listener in held(found, holders)
        if listener.cgroup_id is not None and listener.cgroup_id not in ids
    )


def _question(family: int, states: int, chosen: bytes = b"") -> bytes:
    question = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, states) + chosen
    return netlink.framed(_SOCK_DIAG_BY_FAMILY, question, netlink.REQUEST | netlink.DUMP)


def _open_channel() -> Channel:
    try:
        return Channel(netlink.SOCK_DIAG)
    except OSError as error:
        raise SocketsUnavailable(_why(error)) from error


def _port_filter(first: int, last: int) -> bytes:
    """Return the kernel's own filter: own port at least `first`, and at most `last`; a jump past the end is a no.

    struct inet_diag_bc_op (code, step if yes, step if no), its operand in the third field of the one that follows.
    """
    pieces = (_FILTER.pack(_PORT_AT_LEAST, 8, 20), _FILTER.pack(0, 0, first))
    more = (_FILTER.pack(_PORT_AT_MOST, 8, 12), _FILTER.pack(0, 0, last))
    return netlink.attribute(_FILTER_ATTRIBUTE, b"".join((*pieces, *more)))


def _listener(answer: bytes) -> Listener | None:
    """Return what one answer says; None for a socket that does not listen."""
    if len(answer) < _DIAGNOSIS_SIZE:
        raise netlink.not_whole("an answer about a socket")
    if answer[_STATE] != _LISTEN:
        return None
    size = 4 if answer[0] == socket.AF_INET else 16
    (port,) = _PORT.unpack_from(answer)
    user, inode = _USER_AND_INODE.unpack_from(answer)
    return Listener(_address(answer[_SOURCE : _SOURCE + size]), port, user, inode, _cgroup(answer))


def _attempt(answer: bytes) -> Attempt:
    if len(answer) < _DIAGNOSIS_SIZE:
        raise netlink.not_whole("an answer about a socket")
    size = 4 if answer[0] == socket.AF_INET else 16
    source, target = (_plain(_address(answer[place : place + size])) for place in (_SOURCE, _TARGET))
    _, port = _PORTS.unpack_from(answer)
    user, inode = _USER_AND_INODE.unpack_from(answer)
    return Attempt(source, target, port, answer[_RETRIES], user, inode, _cgroup(answer))


def _plain(address: Address) -> Address:
    """Return the IPv4 address that a socket of IPv6 has or connects to, where it is one."""
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address


def _cgroup(answer: bytes) -> int | None:
    cgroup = netlink.attributes(answer[_DIAGNOSIS_SIZE:]).get(_CGROUP_ID, b"")
    return int(_CGROUP_NUMBER.unpack(cgroup)[0]) if len(cgroup) == _CGROUP_NUMBER.size else None


def _connection(answer: bytes) -> Connection:
    if len(answer) < _DIAGNOSIS_SIZE:
        raise netlink.not_whole("an answer about a socket")
    (port,) = _PORT.unpack_from(answer)
    return Connection(port, *_USER_AND_INODE.unpack_from(answer))


@functools.lru_cache(maxsize=256)
def _address(packed: bytes) -> Address:
    return ipaddress.ip_address(packed)


def _children(top: int, path: str) -> list[tuple[str, int]]:
    """Return the cgroups right below `path`, itself below `top`: path and number of each. Gone meanwhile: none."""
    try:
        directory = os.open(path, _DIRECTORY_FLAGS, dir_fd=top)
    except OSError:
        return []
    try:
        with os.scandir(directory) as entries:
            return [(f"{path}/{entry.name}", entry.inode()) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    finally:
        os.close(directory)


def _why(error: OSError) -> str:
    missing = "this kernel cannot list listening sockets; run `modprobe tcp_diag` on the host"
    reasons = {
        errno.EPROTONOSUPPORT: missing,
        errno.ENOENT: missing,
        errno.EPERM: f"not permitted to ask for listening sockets; {capabilities.run_as_root()}",
        errno.EACCES: "not permitted to ask for listening sockets (SELinux?)",
    }
    return reasons.get(error.errno or 0, f"listening sockets cannot be listed: {error.strerror or error}")
