"""What the guard does from the moment that a job is guarded until its last process has gone.

One loop, woken by what happens (an order, the launcher's end, the cgroup getting empty, a logged drop) and by the
chores that have to look from time to time.
"""

from __future__ import annotations

import contextlib
import select
import signal
import time
from dataclasses import dataclass
from typing import Callable, Protocol

from securerun.errors import SecurerunError
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.policy import Denial
from securerun.firewall.refusals import ShieldUnavailable
from securerun.guard.documents import ProtocolError
from securerun.guard.exposure import open_exposure
from securerun.guard.lease import Lease
from securerun.guard.protocol import Message, Notice, Peers, Release, Released
from securerun.linux import processes
from securerun.linux.cgroups import CgroupUnavailable
from securerun.linux.networks import Address
from securerun.linux.nf_tables import Deletions
from securerun.linux.processes import Process
from securerun.linux.sock_diag import SocketsUnavailable

# At most one line a source in this time, or a port scanner fills the job's log.
_QUIET_SECONDS = 60.0
_NOTICE_SECONDS = 1.0
# Rules that are deleted from nf_tables are heard of at once; from legacy tables they are not.
_LOOK_FOR_CHAINS_SECONDS = 5.0
_HEARD_CHAINS_SECONDS = 60.0
# Whoever sets the list of reserved ports anew takes the job's off it.
_LOOK_FOR_PORTS_SECONDS = 5.0
# A flush is many deletions, and another firewall's reload fills what it flushed.
_SETTLE_SECONDS = 0.05
# What a failed job leaves behind often ends by itself within this; torch_shm_manager then removes its files.
_PATIENCE_SECONDS = 0.25
_ENDING_SECONDS = 0.05
# Behind a shield an uncovered listener is an exception; in scope `ports` each is open until it is seen.
_EXPOSURE_SECONDS = 1.0
_SOON_SECONDS = 0.05
# Without a pidfd (before kernel 5.3) or a cgroup, ends are seen by looking.
_LOOK_SECONDS = 0.05

_EXPECTED = (SecurerunError, PortChainsUnavailable, ShieldUnavailable, SocketsUnavailable, CgroupUnavailable, OSError)

Send = Callable[[Message], None]
Log = Callable[[str], None]


class Orders(Protocol):
    """The launcher's messages."""

    descriptor: int
    """To be polled; whether there is something to read, `read` says."""
    ended: bool
    """Whether the launcher has closed its end."""

    def read(self) -> Message | None:
        """Read the next message; None when none is complete now. Raises ProtocolError for what is no message."""


@dataclass
class Chore:
    """Something to look after every `seconds`; `due` is when next, on the monotonic clock."""

    seconds: float
    do: Callable[[], None]
    due: float = 0.0


class Watch:
    """Looks after one lease: hears the launcher, does the chores, ends what a failed job leaves behind."""

    def __init__(self, lease: Lease, orders: Orders, send: Send, log: Log) -> None:
        self._lease = lease
        self._orders = orders
        self._send = send
        self._log = log
        self._notices = Notices(lease, send)
        self._ending: Ending | None = None
        self._released = False
        self._complaints: set[str] = set()
        self._poller = select.poll()
        self._listen_to()
        seconds = _LOOK_FOR_CHAINS_SECONDS if self._deletions is None else _HEARD_CHAINS_SECONDS
        self._repair = Chore(seconds, self._repair_chains, time.monotonic() + seconds)
        reserving = Chore(_LOOK_FOR_PORTS_SECONDS, lease.keep_ports_reserved)
        self._chores = [Chore(_NOTICE_SECONDS, self._notices.look), self._repair, reserving]
        self._exposure = open_exposure(lease)
        if self._exposure is not None:
            self._chores.append(Chore(_EXPOSURE_SECONDS if lease.shield else _SOON_SECONDS, self._close_exposed))
        if lease.caller.pidfd is None or lease.cgroup is None:
            self._chores.append(Chore(_LOOK_SECONDS, lambda: None))

    def until_over(self) -> None:
        """Return when the job's last process has gone."""
        while not (self._released and self._lease.is_over()):
            ready = {descriptor for descriptor, _ in self._poller.poll(self._milliseconds_to_wait())}
            self._do_chores()
            self._take_in(ready)
            if not self._released:
                self._hear(ready)
            if self._ending is not None:
                self._attempt(self._ending.go_on)

    def _listen_to(self) -> None:
        lease = self._lease
        self._poller.register(self._orders.descriptor, select.POLLIN)
        if lease.caller.pidfd is not None:
            self._poller.register(lease.caller.pidfd, select.POLLIN)
        if lease.cgroup is not None:
            self._poller.register(lease.cgroup.events, select.POLLPRI)
        if lease.drops is not None:
            self._poller.register(lease.drops.fileno(), select.POLLIN)
        self._deletions = _listen_for_deletions(lease)
        if self._deletions is not None:
            self._poller.register(self._deletions.fileno(), select.POLLIN)

    def _take_in(self, ready: set[int]) -> None:
        """Read what there is: who was dropped, whether rules were deleted, what happened to the job's cgroup."""
        drops, deletions, cgroup = self._lease.drops, self._deletions, self._lease.cgroup
        if cgroup is not None and cgroup.events in ready:
            cgroup.populated()  # poll(2) returns at once until the change has been read (kernfs_generic_poll)
        if drops is not None and drops.fileno() in ready:
            drops.read()
        if deletions is not None and deletions.fileno() in ready and deletions.heard():
            self._repair.due = min(self._repair.due, time.monotonic() + _SETTLE_SECONDS)

    def _close_exposed(self) -> None:
        """Close, by the port chains, listeners of the job that no layer covers."""
        if self._exposure is None:
            return
        words = self._exposure.close()
        for line in words:
            self._log(f"run {self._lease.policy.run_id}: {line}")
        if words:
            self._send(Notice(words=words))

    def _repair_chains(self) -> None:
        """Put the port chains back if somebody flushed them away."""
        run = f"run {self._lease.policy.run_id}"
        if self._lease.chains_stand():
            return
        self._lease.restore_chains()
        self._log(f"{run}: the port chains were flushed away and are back")
        self._send(Notice(words=("somebody flushed the port chains away; they are back",)))

    def _hear(self, ready: set[int]) -> None:
        """Do what the launcher says; notice when it lets the job go, closes its end, or is gone."""
        message = self._read_order()
        while isinstance(message, Peers):
            self._change_peers(message)
            message = self._read_order()
        if isinstance(message, Release):
            self._send(Released(self._notices.denied()))
            self._release(message.failed)
        elif self._orders.ended or self._lease.caller.pidfd in ready or self._lease.caller.has_ended():
            self._release(failed=True)

    def _read_order(self) -> Message | None:
        """Read what the launcher says. After anything out of place nothing more from there is believed."""
        try:
            message = self._orders.read()
            if message is None or isinstance(message, (Peers, Release)):
                return message
            raise ProtocolError("it is not the time for such a message")
        except ProtocolError as error:
            self._log(f"run {self._lease.policy.run_id}: ended, since its launcher sent what it must not: {error}")
            self._orders.ended = True
            return None

    def _change_peers(self, message: Peers) -> None:
        """Let other networks in from now on; whatever is wrong with them, the old ones stay."""

        def change() -> None:
            self._lease.change_peers(message.networks)
            self._log(f"run {self._lease.policy.run_id}: open to {len(message.networks)} peer networks now")

        self._attempt(change)

    def _release(self, failed: bool) -> None:
        self._released = True
        self._poller.unregister(self._orders.descriptor)
        if self._lease.caller.pidfd is not None:
            self._poller.unregister(self._lease.caller.pidfd)
        self._notices.quiet = True
        if failed:
            self._ending = Ending(self._lease)
            self._chores.append(Chore(_ENDING_SECONDS, lambda: None))
        self._attempt(lambda: self._lease.write(draining=True))

    def _milliseconds_to_wait(self) -> float:
        return max(0.0, min(chore.due for chore in self._chores) - time.monotonic()) * 1000

    def _do_chores(self) -> None:
        for chore in self._chores:
            if chore.due <= time.monotonic():
                self._attempt(chore.do)
                chore.due = time.monotonic() + chore.seconds

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do it, and go on if it fails: a full disk or a table that cannot be read must not take the guard away."""
        try:
            work()
        except _EXPECTED as error:
            words = f"a part of the guard's work fails: {error}"
            if words not in self._complaints:
                self._complaints.add(words)
                self._log(f"run {self._lease.policy.run_id}: {words}")
                self._send(Notice(words=(words,)))


def _listen_for_deletions(lease: Lease) -> Deletions | None:
    """Listen where rules tell of their deletion: iptables-nft's do, legacy tables' do not, an owned table is safe."""
    if lease.chains is None or lease.chains.backend != "iptables":
        return None
    try:
        return Deletions("filter", "INPUT", lease.policy.run_id)
    except OSError:
        return None


class Notices:
    """Tells the launcher, and the record, who is being turned away while the job runs."""

    def __init__(self, lease: Lease, send: Send) -> None:
        self.quiet = False
        self._lease = lease
        self._send = send
        self._known: tuple[Denial, ...] = ()
        self._told: dict[Address, float] = {}

    def denied(self) -> tuple[Denial, ...]:
        """Return who was turned away, as far as can be read; else what was known last."""
        with contextlib.suppress(*_EXPECTED):
            return self._lease.denied()
        return self._known

    def look(self) -> None:
        """Tell what is new, at most once a minute a source."""
        denied = self._lease.denied()
        if denied == self._known:
            return
        news = [denial for denial in denied if denial not in self._known and self._is_due(denial.source)]
        self._known = denied
        self._lease.write(denied=denied)
        if news and not self.quiet:
            self._told.update(dict.fromkeys((denial.source for denial in news), time.monotonic()))
            self._send(Notice(tuple(news)))

    def _is_due(self, source: Address) -> bool:
        return time.monotonic() - self._told.get(source, -_QUIET_SECONDS) >= _QUIET_SECONDS


class Ending:
    """Ends what a failed job leaves behind: SIGTERM to each process, a grace period, then SIGKILL to all at once."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._asked: set[Process] = set()
        self._since: float | None = None

    def go_on(self) -> None:
        """Take the next step, as far as its time has come."""
        # A failed launcher still writes its traceback; it is a part of the job, and not to be ended in the middle.
        if not self._lease.caller.has_ended():
            return
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since < _PATIENCE_SECONDS:
            return
        if now - self._since >= _PATIENCE_SECONDS + self._lease.order.grace:
            self._lease.kill()
            return
        new = self._lease.processes() - self._asked
        processes.end(new, signal.SIGTERM)
        # A stopped process would keep the request until it is continued.
        processes.end(new, signal.SIGCONT)
        self._asked |= new
