"""How what a failed job leaves behind is ended, and what of it is not the guard's to end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Callable

from securerun.guard.lease import Lease
from securerun.linux.processes import Process, Request

# What a failed job leaves behind often ends by itself within this; torch_shm_manager then removes its files.
_PATIENCE_SECONDS = 0.25
# While only others' processes are left, which nobody ends here.
_IDLE_SECONDS = 1.0
_PIDS_NAMED = 8


class Ending:
    """Ends what a failed job leaves behind: SIGTERM to each process, a grace period, then SIGKILL to all at once.

    Of it, what the job's user may end. A process of another user's, such as what sudo started, is left alone, and said:
    the layers stay until it ends by itself.
    """

    def __init__(self, lease: Lease, log: Callable[[str], None]) -> None:
        self._lease = lease
        self._log = log
        self._request = Request()
        self._since: float | None = None
        self._next = 0.0
        self._said = False

    def go_on(self) -> None:
        """Take the next step, as far as its time has come."""
        # A failed launcher still writes its traceback; it is a part of the job, and not to be ended in the middle.
        if not self._lease.caller.has_ended():
            return
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since < _PATIENCE_SECONDS or now < self._next:
            return
        if now - self._since >= _PATIENCE_SECONDS + self._lease.order.grace:
            self._lease.kill()
            self._see_what_is_left()
            return
        self._request.make(self._lease.to_be_ended())

    def _see_what_is_left(self) -> None:
        left = self._lease.processes()
        if not left or self._lease.to_be_ended():
            return
        self._next = time.monotonic() + _IDLE_SECONDS
        if not self._said:
            self._said = True
            self._log(_left_alone(left, self._lease.caller.user))


def _left_alone(left: Iterable[Process], user: int) -> str:
    pids = sorted(process.pid for process in left)
    named = " ".join(map(str, pids[:_PIDS_NAMED])) + (" ..." if len(pids) > _PIDS_NAMED else "")
    return (
        f"left alone: process {named} of the failed job, which user {user} may not end, or which carries the run's id "
        "elsewhere; the layers stay until the last of these has ended"
    )
