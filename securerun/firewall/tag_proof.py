"""The proof that tags work on a cgroup: with them a process in it connects to itself, and without them it does not.

Tried with programs of the same making as the shield's, and a key of their own, which are thrown away. The child of the
self-test is the process.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from contextlib import ExitStack

from securerun.errors import Obstacle
from securerun.firewall import selftest, siphash, tag
from securerun.firewall.job_key import JobKey
from securerun.firewall.policy import Admission, Policy
from securerun.firewall.refusals import ShieldUnavailable, explained
from securerun.firewall.shield import Shield

# The loopback delivers while the sender sends; a processor that is busy may put it off. For an answer that is not to
# come nobody waits: what is awaited is that the judge has turned away what was sent.
_CONNECTED_SECONDS, _REFUSED_SECONDS, _COUNTED_SECONDS = 1.0, 0.0, 1.0
_LOOK_SECONDS = 0.001
_THROWN_AWAY = Policy("0" * 12, (), (), close_loopback=True, admission=Admission.TAG, tagged=tag.LOOPBACK)


def require_tags(cgroup: int, like: int | None = None) -> None:
    """Raise ShieldUnavailable where tags cannot be had on this cgroup, or it cannot be judged.

    To be asked before a shield with tags hangs there and before the job moves in: a few milliseconds, in which nothing
    in the cgroup can accept a connection over the loopback. like: as for the proof of the shield.
    """
    key = JobKey(os.urandom(siphash.KEY_SIZE), os.urandom(siphash.KEY_SIZE), "00000000")
    # The child takes a millisecond to be there, in which the programs are made.
    with selftest.started(cgroup, like, _Connector()) as child:
        held = Shield.attach(cgroup, _THROWN_AWAY, key, for_trial=True)
        try:
            _require_told_apart(cgroup, held, child)
        finally:
            held.detach()
            held.close()


def _require_told_apart(cgroup: int, held: Shield, child: selftest.Sender) -> None:
    _require_passed(child.try_to_send())
    if held.denied():
        raise _not_proven("one that carried a tag was refused at first")
    if held.tags is not None:
        with explained("trying a connection without a tag"):
            held.tags.take_off(cgroup)
    if not child.try_to_send():
        raise _not_proven("one that carried no tag was let in")
    _require_counted(held)


def _require_passed(error: int) -> None:
    if error == errno.ETIMEDOUT:
        raise _not_proven("one that should carry a tag was not let in")
    if error:
        raise _not_proven(f"there is no TCP over the loopback ({os.strerror(error)}); `ip link set lo up`")


def _require_counted(held: Shield) -> None:
    """Raise ShieldUnavailable unless it was the judge that turned the connection away."""
    deadline = time.monotonic() + _COUNTED_SECONDS
    while not held.denied():
        if time.monotonic() > deadline:
            raise _not_proven("one that carried no tag did not arrive, and nobody turned it away")
        time.sleep(_LOOK_SECONDS)


def _not_proven(why: str) -> ShieldUnavailable:
    return ShieldUnavailable(
        f"tags in packets do not work on this host: of two connections, {why}", Obstacle.NOT_PROVEN
    )


class _Connector:
    """Connects over the loopback from a new socket to another, in the child.

    The first time it waits for the answer; after that there is to be none, and nothing to wait for.
    """

    def __init__(self) -> None:
        self._seconds = _CONNECTED_SECONDS
        self._kept = ExitStack()

    def __call__(self) -> None:
        """Raise OSError, ETIMEDOUT where nobody answers."""
        selftest.over_loopback(self._connect_over)
        self._seconds = _REFUSED_SECONDS

    def _connect_over(self, family: int, address: str) -> None:
        with ExitStack() as ends:
            listener, near = (ends.enter_context(socket.socket(family, socket.SOCK_STREAM)) for _ in range(2))
            listener.bind((address, 0))
            listener.listen(1)
            near.setblocking(False)
            error = near.connect_ex(listener.getsockname())
            if error == errno.EINPROGRESS:
                answered = select.select([], [near], [], self._seconds)[1]
                error = near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if answered else errno.ETIMEDOUT
            if error:
                # What a busy processor delivers later is to find the one who listens: else nobody is judged.
                self._kept = ends.pop_all()
                raise OSError(error, os.strerror(error))
