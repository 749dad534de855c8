"""The proof that a shield on a cgroup works: while a program forbids it everything, a process in it cannot send.

The process is a child, made for that, which enters the cgroup, answers whether it could send, and is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Callable

from securerun.errors import Obstacle
from securerun.firewall.refusals import FORBIDDEN_ABOVE, ShieldUnavailable, explained
from securerun.linux import forked, net_cgroups, prctl, proc
from securerun.linux.assembler import R0, assemble, calculate, leave
from securerun.linux.bpf import AttachFlags, AttachType, Program, programs_on

_NAME = "securerun-proof"
_PROBE_NAME = "securerun_probe"
_FORBID_EVERYTHING = (calculate(R0, "=", 0), leave())
_LONGEST_SEND_SECONDS = 5.0
_LONGEST_END_SECONDS = 1.0
# Mostly it answers in a tenth of a millisecond; who has other things to do asks later.
_SHORT_ANSWER_SECONDS = 0.005
# What the child answers: why it could not enter the cgroups, then, each time, why it could not send; 0 where it could.
_ANSWER = struct.Struct("=i")
_QUESTION = b"?"


def prove(cgroup: int, like: int | None = None) -> bool:
    """Whether programs on this cgroup really see the packets of sockets that its processes make.

    They do not where sockets count as the root cgroup's (`securerun.linux.net_cgroups`).
    While this runs, a few milliseconds, nothing in the cgroup can send: prove before the job moves in.

    like: the process that is to move in. What net_cls and net_prio note of a socket goes by where its maker is.
    Raises ShieldUnavailable when it cannot be judged.
    """
    return egress_is_filtered(cgroup, cgroup, like)


def require_proof(cgroup: int, like: int | None = None) -> None:
    """Raise ShieldUnavailable where `prove` says no, or where it cannot be judged."""
    if not prove(cgroup, like):
        raise ShieldUnavailable(
            "filters on a cgroup do not run on this host: one use of net_cls or net_prio, such as the start of a "
            "container with cgroup v1, switches them off until the next boot (mended in Linux 5.15 and later 5.10.y)",
            Obstacle.NET_CLS,
        )


def egress_is_filtered(attached_to: int, entered: int, like: int | None = None) -> bool:
    """Whether a program on one cgroup keeps a new socket of a process that entered the other from sending.

    Raises ShieldUnavailable when it cannot be judged.
    """
    with started(entered, like) as sender:
        _require_allowed(sender.try_to_send())
        with _forbidding() as probe, explained("hanging the self-test on the cgroup", FORBIDDEN_ABOVE):
            probe.attach(attached_to, AttachType.CGROUP_INET_EGRESS, AttachFlags.ALLOW_MULTI)
            try:
                after = sender.try_to_send()
            finally:
                probe.take_off(attached_to, AttachType.CGROUP_INET_EGRESS)
        _require_where(like, sender)
    return _is_forbidden(after)


def take_off_remains(cgroup: int) -> None:
    """Take a self-test off that a guard died in: it would forbid the job to send anything. Raises OSError."""
    for probe in programs_on(cgroup, AttachType.CGROUP_INET_EGRESS, (_PROBE_NAME,)):
        with probe:
            probe.take_off(cgroup, AttachType.CGROUP_INET_EGRESS)


def send_to_self() -> None:
    """Send a datagram over the loopback from a new socket. Raises OSError."""
    over_loopback(_send_over)


class Sender:
    """A child in a cgroup that answers, whenever it is asked, whether a new socket of its own could send.

    Raises OSError where there can be no child.
    """

    def __init__(
        self,
        cgroup: int,
        others: Sequence[int] = (),
        at_end: Callable[[], None] = lambda: None,
        kept: Sequence[int] = (),
        action: Callable[[], None] = send_to_self,
    ) -> None:
        """Start it.

        others: directories of cgroups of version 1 that it enters as well. at_end: what it does when this process ends
        before it. kept: the descriptors that it takes for that. action: what it tries instead of sending a datagram.
        """
        self.pid, self._near = forked.fork(lambda far: _live(cgroup, others, far, at_end, kept, action))
        self._has_entered = False

    def try_to_send(self) -> int:
        """Return the errno of what it tries; 0: it went well.

        Raises ShieldUnavailable when it gives no answer, or could not enter the cgroup.
        """
        deadline = time.monotonic() + _LONGEST_SEND_SECONDS
        self.require_entered(deadline)
        self.ask()
        return self._answer(deadline)

    def require_entered(self, deadline: float) -> None:
        """Raise ShieldUnavailable where it could not enter the cgroups, or does not say so until then."""
        if not self._has_entered:
            _require_entered(self._answer(deadline))
            self._has_entered = True

    def ask(self) -> None:
        """Have it try to send, without waiting for the answer."""
        with contextlib.suppress(OSError):  # it has ended, and then has no answer
            self._near.send(_QUESTION)

    def answer_within(self, seconds: float) -> int | None:
        """Return its next answer; None where there is none so soon. Raises ShieldUnavailable where none will come."""
        if not self._can_be_read(seconds):
            return None
        answer = b""
        with contextlib.suppress(OSError):
            answer = self._near.recv(_ANSWER.size)
        if len(answer) != _ANSWER.size:
            raise _no_answer()
        return int(_ANSWER.unpack(answer)[0])

    def _can_be_read(self, seconds: float) -> bool:
        """Wait for an answer, or the end. A guard holds a descriptor of each cgroup above its job's, and of those there
        may be more than select(2) knows numbers for, 1024."""
        poller = select.poll()
        poller.register(self._near, select.POLLIN)
        return bool(poller.poll(max(0.0, seconds) * 1000))

    def _answer(self, deadline: float) -> int:
        answer = self.answer_within(deadline - time.monotonic())
        if answer is None:
            raise _no_answer()
        return answer

    def end(self) -> None:
        """Kill it.

        What is frozen in a cgroup of version 1 does not end, and is not waited for: at the top nothing is frozen.
        """
        with contextlib.suppress(ProcessLookupError):  # where SIGCHLD is ignored, the kernel reaps
            os.kill(self.pid, signal.SIGKILL)
            if not self._has_ended():
                with contextlib.suppress(OSError):
                    net_cgroups.move_to_top(self.pid)
        if self._has_ended():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
        self._near.close()

    def _has_ended(self) -> bool:
        """Return whether its end of the conversation is closed within a moment; with it goes the rest of it."""
        deadline = time.monotonic() + _LONGEST_END_SECONDS
        with contextlib.suppress(OSError):
            while self._can_be_read(deadline - time.monotonic()):
                if not self._near.recv(_ANSWER.size):
                    return True
        return False


class Repeated:
    """The proof again and again, in a cgroup where nothing else is and everything is forbidden for good.

    Where something switches filters on cgroups off, it does so for all of them. Raises OSError.
    """

    def __init__(self, cgroup: int, others: Sequence[int], at_end: Callable[[], None], kept: Sequence[int]) -> None:
        """Begin, without waiting for anything. The arguments are those of `Sender`."""
        self._cgroup = cgroup
        self._sender = Sender(cgroup, others, at_end, kept)
        self._probe: Program | None = None
        self._may_send_outside = False
        # First it says whether it could enter, then, with nothing forbidden, whether it can send at all.
        self._judge: Callable[[int], bool | None] = self._judge_entering
        self._asked_until = time.monotonic() + _LONGEST_SEND_SECONDS
        self._is_asked = True

    def look(self) -> bool | None:
        """Return whether programs on a cgroup run, as was just tried; None while there is no answer yet.

        Raises ShieldUnavailable when it cannot be judged; then it has to be begun anew.
        """
        if not self._is_asked:
            self._sender.ask()
            self._is_asked, self._asked_until = True, time.monotonic() + _LONGEST_SEND_SECONDS
        answer = self._sender.answer_within(_SHORT_ANSWER_SECONDS)
        if answer is None:
            if time.monotonic() > self._asked_until:
                raise _no_answer()
            return None
        self._is_asked = False
        return self._judge(answer)

    def end(self) -> None:
        """End the child and let go of the program, which goes with the cgroup."""
        self._sender.end()
        if self._probe is not None:
            self._probe.close()

    def _judge_entering(self, not_entered: int) -> None:
        _require_entered(not_entered)
        self._judge = self._judge_before

    def _judge_before(self, not_sent: int) -> None:
        _require_allowed(not_sent)
        self._may_send_outside = not _errno_of(send_to_self)
        with explained("loading the self-test"):
            self._probe = Program.load(_PROBE_NAME, assemble(_FORBID_EVERYTHING, {}))
        with explained("hanging the self-test on a cgroup", FORBIDDEN_ABOVE):
            self._probe.attach(self._cgroup, AttachType.CGROUP_INET_EGRESS, AttachFlags.ALLOW_MULTI)
        self._judge = self._judge_sending

    def _judge_sending(self, not_sent: int) -> bool:
        if not not_sent and self._sender.pid not in _members(self._cgroup):
            raise _cannot_judge("somebody moved it out of its cgroup")
        # A rule of the host's that came meanwhile would forbid it too, and hide that no filter does.
        if not_sent and self._may_send_outside:
            _require_allowed(_errno_of(send_to_self))
        return _is_forbidden(not_sent)


@contextlib.contextmanager
def started(cgroup: int, like: int | None, action: Callable[[], None] = send_to_self) -> Iterator[Sender]:
    """Have a child in a cgroup, and where `like` is, for the length of a block. Raises ShieldUnavailable."""
    with ExitStack() as undo:
        places = []
        with explained("looking where the launcher is", "not permitted"):
            for name, path in _elsewhere(like).items():
                places.append(net_cgroups.open_place(name, path))
                undo.callback(os.close, places[-1])
        with explained("starting the self-test"):
            sender = Sender(cgroup, places, action=action)
        undo.callback(sender.end)
        yield sender


def _elsewhere(like: int | None) -> net_cgroups.Memberships:
    """Return the cgroups of net_cls and net_prio in which a process is and this one is not, where they matter."""
    if like is None:
        return {}
    found = net_cgroups.differing(net_cgroups.of(like), net_cgroups.of(proc.SELF))
    return found if found and net_cgroups.may_void_filters() else {}


def _require_where(like: int | None, sender: Sender) -> None:
    """Raise ShieldUnavailable where the child is not where the process is: then it tells nothing of it."""
    if like is None:
        return
    with explained("looking where the launcher is"):
        there, here = net_cgroups.of(like), net_cgroups.of(sender.pid)
    if net_cgroups.differing(there, here) and net_cgroups.may_void_filters():
        where = ", ".join(f"{name}:{path}" for name, path in there.items())
        raise _cannot_judge(f"it could not be made where the launcher is, in {where}")


@contextlib.contextmanager
def _forbidding() -> Iterator[Program]:
    with explained("loading the self-test"):
        probe = Program.load(_PROBE_NAME, assemble(_FORBID_EVERYTHING, {}))
    with probe:
        yield probe


def _require_entered(not_entered: int) -> None:
    if not_entered:
        raise ShieldUnavailable(
            f"the self-test could not enter the job's cgroup: {os.strerror(not_entered)}", Obstacle.NOT_PROVEN
        )


def _require_allowed(not_sent: int) -> None:
    """Raise ShieldUnavailable where it cannot send with nothing of ours in its way."""
    if not_sent == errno.EPERM:
        raise _cannot_judge("something forbids UDP over the loopback already")
    if not_sent:
        raise _cannot_judge(f"no UDP over the loopback ({os.strerror(not_sent)}); `ip link set lo up`")


def _is_forbidden(not_sent: int) -> bool:
    if not_sent not in (0, errno.EPERM):
        raise _cannot_judge(os.strerror(not_sent))
    return not_sent == errno.EPERM


def _no_answer() -> ShieldUnavailable:
    return ShieldUnavailable(
        f"the self-test was killed, or gave no answer within {_LONGEST_SEND_SECONDS:g} s", Obstacle.NOT_PROVEN
    )


def _cannot_judge(reason: str) -> ShieldUnavailable:
    return ShieldUnavailable(f"the self-test cannot judge: {reason}", Obstacle.NOT_PROVEN)


def _live(
    cgroup: int,
    others: Collection[int],
    far: socket.socket,
    at_end: Callable[[], None],
    kept: Collection[int],
    action: Callable[[], None],
) -> None:
    """Live the child's whole life: enter, and answer until the parent's end, or until it is killed."""
    prctl.set_name(_NAME)
    # What else the guard has open ends with the guard: locks, the launcher's pipe, programs.
    _close_all_but({cgroup, *others, *kept, far.fileno()})
    # A parent that dies between a question and the look at its answer is an error of the conversation, not its end.
    with contextlib.suppress(ConnectionError):
        far.sendall(_ANSWER.pack(_errno_of(lambda: _enter(cgroup, others))))
        while far.recv(len(_QUESTION)):
            far.sendall(_ANSWER.pack(_errno_of(action)))
    at_end()


def _close_all_but(kept: Collection[int]) -> None:
    for descriptor in proc.own_descriptors():
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _errno_of(action: Callable[[], None]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _enter(cgroup: int, others: Collection[int]) -> None:
    # Those of version 1 first: once in the job's cgroup it may be kept from doing anything.
    for directory in (*others, cgroup):
        net_cgroups.enter(directory)
    # A threaded cgroup lists its threads only; of a process with one thread that is the process.
    if os.getpid() not in _members(cgroup):
        raise OSError(errno.ESRCH, "the move had no effect")


def _members(cgroup: int) -> set[int]:
    return _listed(cgroup, "cgroup.procs") | _listed(cgroup, "cgroup.threads")


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


def over_loopback(work: Callable[[int, str], None]) -> None:
    """Do something with a family and its loopback address, IPv4 first, IPv6 where there is none. Raises OSError."""
    try:
        work(socket.AF_INET, "127.0.0.1")
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EAFNOSUPPORT):
            raise
        work(socket.AF_INET6, "::1")


def _send_over(family: int, address: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as endpoint:
        endpoint.bind((address, 0))
        endpoint.sendto(b"securerun", endpoint.getsockname())
