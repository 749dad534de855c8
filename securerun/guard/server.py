"""The guard: a small process that holds one job's lease, from an order on its standard input to the job's last process.

It answers to nothing but its standard input and the end of whoever started it. Terminal signals do not reach it
(its own session), a `pkill python` does not mean it (its own name), and what it inherited of limits does not bind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import syslog

from securerun.errors import PolicyError, SecurerunError
from securerun.guard import lease as leases
from securerun.guard.caller import Caller, find_caller
from securerun.guard.lease import Lease
from securerun.guard.protocol import (
    MAXIMUM_BYTES,
    Guarding,
    Message,
    Order,
    ProtocolError,
    Refused,
    Release,
    Released,
    decode,
    encode,
)

NAME = "securerun-guard"
_PR_SET_NAME = 15
_INPUT, _OUTPUT = 0, 1
# Without a pidfd (before kernel 5.3) the end of the launcher is seen by looking.
_LOOK_MILLISECONDS = 50
_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LIMITS = (
    resource.RLIMIT_CPU,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
    resource.RLIMIT_MEMLOCK,
)


def main() -> int:
    """Serve one launcher. Returns the exit status: 0 when the lease was released, else the refusal's."""
    _stand_alone()
    orders = Orders()
    try:
        caller = find_caller()
        order = orders.wait_for_order()
        if order is None:
            return 0
        lease = leases.acquire(order, caller)
    except ProtocolError as error:
        return _refuse(Refused(PolicyError.status, f"the guard did not understand its orders: {error}"))
    except SecurerunError as error:
        return _refuse(Refused(error.status, str(error)))
    return _hold(lease, orders, caller)


class Orders:
    """The launcher's messages, read as they come and never waited for behind the back of `poll`."""

    def __init__(self) -> None:
        self._pending = b""
        self.ended = False

    def wait_for_order(self) -> Order | None:
        """The first message; None when the launcher thought better of it and closed its end.

        Raises ProtocolError for anything but an order.
        """
        while not self.ended:
            message = self.read()
            if isinstance(message, Order):
                return message
            if message is not None:
                raise ProtocolError("the first message is not an order")
        return None

    def read(self) -> Message | None:
        """The next message, if what can be read now completes one; `ended` says whether another can follow."""
        chunk = os.read(_INPUT, 65536)
        self.ended = not chunk
        self._pending += chunk
        line, newline, following = self._pending.partition(b"\n")
        if len(line) > MAXIMUM_BYTES:
            raise ProtocolError(f"a message of more than {MAXIMUM_BYTES} bytes")
        if not newline:
            return None
        self._pending = following
        return decode(line)


def _hold(lease: Lease, orders: Orders, caller: Caller) -> int:
    """Keep the lease until the job's last process has gone, then release it."""
    _send(lease.guarding)
    policy = lease.policy
    _log(
        f"run {policy.run_id} of user {caller.user}, process {caller.pid}: guarding, {len(policy.peers)} peer networks"
    )
    _until_over(lease, orders, caller)
    _until_empty(lease)
    try:
        lease.release()
    except Exception as error:
        _log(f"run {policy.run_id}: not all of it could be removed: {error}")
        return 1
    _log(f"run {policy.run_id}: released")
    return 0


def _until_over(lease: Lease, orders: Orders, caller: Caller) -> None:
    """Wait until the launcher says that the job is over, closes its end, or is gone."""
    poller = select.poll()
    poller.register(_INPUT, select.POLLIN)
    if caller.pidfd is not None:
        poller.register(caller.pidfd, select.POLLIN)
    if lease.drops is not None:
        poller.register(lease.drops.fileno(), select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poller.poll(_LOOK_MILLISECONDS if caller.pidfd is None else None)}
        if lease.drops is not None and lease.drops.fileno() in ready:
            lease.drops.read()
        if _INPUT in ready and _is_release(orders):
            _send(Released(lease.denied()))
            return
        if orders.ended or caller.pidfd in ready or caller.has_ended():
            return


def _is_release(orders: Orders) -> bool:
    try:
        return isinstance(orders.read(), Release)
    except ProtocolError as error:
        _log(f"a message that is not in the protocol: {error}")
        return False


def _until_empty(lease: Lease) -> None:
    """Wait for the job's last process; what outlives a job that ended well stays guarded until it ends by itself."""
    poller = select.poll()
    poller.register(lease.cgroup.events, select.POLLPRI)
    while lease.cgroup.populated():
        poller.poll()


def _send(message: Guarding | Refused | Released) -> None:
    """Answer the launcher, which may be gone: then nobody needs the answer."""
    with contextlib.suppress(OSError):
        data = encode(message)
        while data:
            data = data[os.write(_OUTPUT, data) :]


def _refuse(refusal: Refused) -> int:
    _log(f"refused: {refusal.message}")
    _send(refusal)
    return refusal.status


def _log(words: str) -> None:
    syslog.syslog(syslog.LOG_NOTICE, words)


def _stand_alone() -> None:
    """Cut what ties this process to whoever started it: name, session, signals, limits, umask, directory."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, NAME.encode(), 0, 0, 0)
    with contextlib.suppress(PermissionError):
        os.setsid()  # refused to a process group leader, which has its own session already or is run by hand
    for ignored in _DEAF_TO:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for limit in _LIMITS:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.umask(0o077)
    os.chdir("/")
    syslog.openlog(NAME, syslog.LOG_PID, syslog.LOG_AUTHPRIV)


if __name__ == "__main__":
    sys.exit(main())
