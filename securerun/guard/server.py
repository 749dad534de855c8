"""The guard: a small process that holds one job's lease, from an order on its standard input to the job's last process.

It answers to nothing but its standard input and the end of whoever started it. Terminal signals do not reach it
(its own session), a `pkill python` does not mean it (its own name), and what it inherited of limits does not bind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import syslog

from securerun.errors import PolicyError, SecurerunError
from securerun.firewall.chains import PortChainsUnavailable
from securerun.guard import lease as leases
from securerun.guard.caller import find_caller
from securerun.guard.cgroup import CgroupUnavailable
from securerun.guard.lease import Lease
from securerun.guard.protocol import (
    MAXIMUM_BYTES,
    Message,
    Order,
    ProtocolError,
    Refused,
    decode,
    encode,
)
from securerun.guard.watch import Watch

NAME = "securerun-guard"
_PR_SET_NAME = 15
_INPUT, _OUTPUT = 0, 1
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
    return _hold(lease, orders)


class Orders:
    """The launcher's messages, read as they come and never waited for behind the back of `poll`."""

    def __init__(self) -> None:
        self._pending = b""
        self.descriptor = _INPUT
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
        """The next message, if what can be read now completes one; `ended` says whether another can follow.

        Raises ProtocolError for what is no message.
        """
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


def _hold(lease: Lease, orders: Orders) -> int:
    """Keep the lease until the job's last process has gone, then release it."""
    run = f"run {lease.policy.run_id}"
    _send(lease.guarding)
    _log(f"{run} of user {lease.caller.user}, process {lease.caller.pid}: guarding")
    Watch(lease, orders, _send, _log).until_over()
    try:
        lease.release()
    except (SecurerunError, CgroupUnavailable, PortChainsUnavailable) as error:
        _log(f"{run}: not all of it could be removed, the next run tries again: {error}")
        return 1
    _log(f"{run}: released")
    return 0


def _send(message: Message) -> None:
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
