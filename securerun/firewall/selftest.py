"""The proof that a shield on a cgroup works: while a program forbids it everything, a process in it cannot send.

The process is a child, made for that, which enters the cgroup, answers whether it could send, and is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from typing import Callable

from securerun.errors import Obstacle
from securerun.firewall.refusals import FORBIDDEN_ABOVE, ShieldUnavailable, explained
from securerun.linux.assembler import R0, assemble, calculate, leave
from securerun.linux.bpf import AttachFlags, AttachType, Program, programs_on

_PROBE_NAME = "securerun_probe"
_FORBID_EVERYTHING = (calculate(R0, "=", 0), leave())
_LONGEST_SEND_SECONDS = 5.0
# What the child answers: why it could not enter the cgroup, and why it could not send; 0 where it could.
_ANSWER = struct.Struct("=ii")


def prove(cgroup: int) -> bool:
    """Whether programs on this cgroup really see the packets of sockets that its processes make.

    They do not where sockets count as the root cgroup's (before Linux 5.15, once net_cls or net_prio was in use).
    While this runs, a few milliseconds, nothing in the cgroup can send: prove before the job moves in.
    Raises ShieldUnavailable when it cannot be judged.
    """
    return egress_is_filtered(cgroup, cgroup)


def egress_is_filtered(attached_to: int, entered: int) -> bool:
    """Whether a program on one cgroup keeps a new socket of a process that entered the other from sending.

    Raises ShieldUnavailable when it cannot be judged.
    """
    with explained("starting the self-test"):
        before = _send_from_within(entered)
    if before == errno.EPERM:
        raise _cannot_judge("something forbids UDP over the loopback already")
    if before:
        raise _cannot_judge(f"no UDP over the loopback ({os.strerror(before)}); `ip link set lo up`")
    with explained("loading the self-test"):
        probe = Program.load(_PROBE_NAME, assemble(_FORBID_EVERYTHING, {}))
    with probe, explained("hanging the self-test on the cgroup", FORBIDDEN_ABOVE):
        probe.attach(attached_to, AttachType.CGROUP_INET_EGRESS, AttachFlags.ALLOW_MULTI)
        try:
            after = _send_from_within(entered)
        finally:
            probe.take_off(attached_to, AttachType.CGROUP_INET_EGRESS)
    if after not in (0, errno.EPERM):
        raise _cannot_judge(os.strerror(after))
    return after == errno.EPERM


def take_off_remains(cgroup: int) -> None:
    """Take a self-test off that a guard died in: it would forbid the job to send anything. Raises OSError."""
    for probe in programs_on(cgroup, AttachType.CGROUP_INET_EGRESS, (_PROBE_NAME,)):
        with probe:
            probe.take_off(cgroup, AttachType.CGROUP_INET_EGRESS)


def _send_from_within(cgroup: int) -> int:
    """Return the errno of sending over the loopback, from a new socket of a new process in the cgroup; 0: sent."""
    near, far = socket.socketpair()
    with near, far:
        child = os.fork()
        if not child:
            near.close()
            _answer_and_exit(cgroup, far)
        # Held here too, it would hide the child's death: a batch system kills all of a cgroup, this child included.
        far.close()
        answer = _answer_of(child, near)
    if len(answer) != _ANSWER.size:
        raise ShieldUnavailable(
            f"the self-test was killed, or gave no answer within {_LONGEST_SEND_SECONDS:g} s", Obstacle.NOT_PROVEN
        )
    not_entered, not_sent = _ANSWER.unpack(answer)
    if not_entered:
        raise ShieldUnavailable(
            f"the self-test could not enter the job's cgroup: {os.strerror(not_entered)}", Obstacle.NOT_PROVEN
        )
    return int(not_sent)


def _cannot_judge(reason: str) -> ShieldUnavailable:
    return ShieldUnavailable(f"the self-test cannot judge: {reason}", Obstacle.NOT_PROVEN)


def _answer_of(child: int, near: socket.socket) -> bytes:
    near.settimeout(_LONGEST_SEND_SECONDS)
    try:
        return near.recv(_ANSWER.size)
    except socket.timeout:
        return b""
    finally:
        # The child waits for this, frozen or not, so the pid is still its own.
        os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored, the kernel reaps
            os.waitpid(child, 0)


def _answer_and_exit(cgroup: int, far: socket.socket) -> None:
    """Live the child's whole life: answer, and then wait to be killed or for the parent's end."""
    try:
        # The handlers are the guard's, and not for this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        not_entered = _errno_of(lambda: _enter(cgroup))
        not_sent = 0 if not_entered else _errno_of(_send_to_self)
        far.sendall(_ANSWER.pack(not_entered, not_sent))
        far.recv(1)
    finally:
        os._exit(0)


def _errno_of(action: Callable[[], None]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _enter(cgroup: int) -> None:
    membership = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup)
    try:
        # A file object would hide that the kernel refuses the move, as it does below a threaded cgroup.
        os.write(membership, b"0")
    finally:
        os.close(membership)
    # A threaded cgroup lists its threads only; of a process with one thread that is the process.
    if os.getpid() not in _listed(cgroup, "cgroup.procs") | _listed(cgroup, "cgroup.threads"):
        raise OSError(errno.ESRCH, "the move had no effect")


def _listed(cgroup: int, name: str) -> set[int]:
    try:
        with open(name, "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=cgroup)) as members:
            return set(map(int, members))
    except FileNotFoundError:  # cgroup.threads, before kernel 4.14
        return set()
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return set()


def _send_to_self() -> None:
    try:
        _send_over(socket.AF_INET, "127.0.0.1")
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EAFNOSUPPORT):
            raise
        _send_over(socket.AF_INET6, "::1")


def _send_over(family: int, address: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as endpoint:
        endpoint.bind((address, 0))
        endpoint.sendto(b"securerun", endpoint.getsockname())
