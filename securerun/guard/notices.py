"""What the guard tells of a run while it lasts: who is being turned away, and what else a person should know.

Whoever is turned away may invent as many sources as they like, and a job may give as many occasions as it likes. So
what is said is rationed, to the launcher and to the system's log alike, and what is beyond that is a number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Callable

from securerun.errors import SecurerunError
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.policy import Denial, Denials
from securerun.firewall.refusals import ShieldUnavailable
from securerun.guard.lease import Lease
from securerun.guard.protocol import Message, Notice
from securerun.linux.cgroups import CgroupUnavailable
from securerun.linux.networks import Address
from securerun.linux.sock_diag import SocketsUnavailable

EXPECTED = (SecurerunError, PortChainsUnavailable, ShieldUnavailable, SocketsUnavailable, CgroupUnavailable, OSError)

# Lines a minute about who is turned away, and at most one about one source; what is beyond is told as a number.
_DENIALS_A_PERIOD = 6
# Lines a minute about anything else.
_WORDS_A_PERIOD = 20
_PERIOD_SECONDS = 60.0
# So many sources are told apart for that number.
_SOURCES_COUNTED = 4096
# How often the record is written for no other reason than that more were turned away.
_RECORD_SECONDS = 5.0

Send = Callable[[Message], None]
Log = Callable[[str], None]


class Notices:
    """Tells the launcher, and the record, who is being turned away while the job runs.

    quiet: nobody is there to be told any more; the record is kept all the same.
    """

    def __init__(self, lease: Lease, send: Send) -> None:
        self.quiet = False
        self._lease = lease
        self._send = send
        self._known = Denials()
        self._counts: dict[tuple[Address, int], int] = {}
        self._recorded = Denials()
        self._record_due = 0.0
        self._period_ends = 0.0
        self._left = 0
        self._told: dict[Address, float] = {}
        self._untold: set[Address] = set()

    def denied(self) -> Denials:
        """Return who was turned away, as far as can be read; else what was known last."""
        with contextlib.suppress(*EXPECTED):
            return self._lease.denied()
        return self._known

    def look(self) -> None:
        """Tell what is new, as far as there is something left of the minute's ration, and record it."""
        now = time.monotonic()
        denied = self._lease.denied()
        news = self._new_in(denied)
        self._known = denied
        if not self.quiet:
            self._tell(news, now)
        self._record(now)

    def _new_in(self, denied: Denials) -> list[Denial]:
        """Return the lines that are not as they were at the last look."""
        before = self._counts
        self._counts = {(line.source, line.port): line.packets for line in denied.listed}
        return [line for line in denied.listed if before.get((line.source, line.port)) != line.packets]

    def _tell(self, news: Iterable[Denial], now: float) -> None:
        rest = self._begin_period(now) if now >= self._period_ends else 0
        said: list[Denial] = []
        for line in news:
            if line.source in self._told:
                continue
            if len(said) < self._left:
                said.append(line)
            elif len(self._untold) < _SOURCES_COUNTED:
                self._untold.add(line.source)
        self._left -= len(said)
        self._told.update((line.source, now) for line in said)
        self._untold.difference_update(self._told)
        if said or rest:
            self._send(Notice(tuple(said), more=rest))

    def _begin_period(self, now: float) -> int:
        """Begin the next minute; return how many sources of the last one were not told of."""
        rest = len(self._untold)
        self._untold.clear()
        self._told = {source: at for source, at in self._told.items() if now - at < _PERIOD_SECONDS}
        self._left = _DENIALS_A_PERIOD
        self._period_ends = now + _PERIOD_SECONDS
        return rest

    def _record(self, now: float) -> None:
        """Write down who was turned away; not often, and not while another guard has the host's lock."""
        if self._known == self._recorded or now < self._record_due:
            return
        if self._lease.write_unless_locked(denied=self._known.listed, denied_more=self._known.more):
            self._recorded, self._record_due = self._known, now + _RECORD_SECONDS


class Speech:
    """Says things to the launcher and to the system's log, so many lines a minute to each.

    log: writes a line to the system's log.
    """

    def __init__(self, run_id: str, send: Send, log: Log) -> None:
        self._run = f"run {run_id}"
        self._send = send
        self._write = log
        self._to_launcher = _Ration()
        self._to_log = _Ration()

    def say(self, *words: str) -> None:
        """Tell the launcher these lines, and the log."""
        for line in words:
            self.log(line)
        allowed, missed = self._to_launcher.of(words)
        if missed:
            allowed = (f"{missed} more lines like these were not said in the last minute", *allowed)
        if allowed:
            self._send(Notice(words=allowed))

    def log(self, *words: str) -> None:
        """Write these lines to the log alone."""
        allowed, missed = self._to_log.of(words)
        if missed:
            allowed = (f"{missed} more lines like these were not written in the last minute", *allowed)
        for line in allowed:
            self._write(f"{self._run}: {line}")


class _Ration:
    """So many lines a minute, and how many there were beyond."""

    def __init__(self) -> None:
        self._left = 0
        self._missed = 0
        self._ends = 0.0

    def of(self, words: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """Return which of these lines may be said, and how many were held back in the minute before."""
        missed = 0
        if time.monotonic() >= self._ends:
            missed, self._missed = self._missed, 0
            self._left, self._ends = _WORDS_A_PERIOD, time.monotonic() + _PERIOD_SECONDS
        allowed = words[: self._left]
        self._left -= len(allowed)
        self._missed += len(words) - len(allowed)
        return allowed, missed
