"""Which ports of the job no layer covers yet, looked at while it runs, and closed through the port chains.

With a shield that is the exception: a listener made before the job had its cgroup, received from outside, or counted
as the root cgroup's (net_cls or net_prio, on kernels on which they do that). In scope `ports` it is how every random
port is closed; and where net_cls or net_prio are there and may switch the shield off, what it covers is closed so too.

And where no peer has an address of one of the two IP versions, the chains answer that one on what the job listens on
for all addresses (torch's stores): the shield can only drop, and who has a name with addresses of both would wait.

The chains close a port for the whole host, so an ordinary user's job gets no more closed than is its own, and only for
as long as it listens there.
"""

from __future__ import annotations

import ipaddress
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.policy import covers
from securerun.guard import unasked as unasked_ports
from securerun.guard.caller import ROOT
from securerun.guard.lease import Lease
from securerun.guard.program import LIMITS_FILE
from securerun.guard.share import Share
from securerun.linux import proc, processes, sock_diag
from securerun.linux.processes import Process
from securerun.linux.sock_diag import Listener, SocketDiagnosis, SocketsUnavailable
from securerun.text import some

# What is held changes without any listener being made: one can be inherited or received.
_FULL_LOOK_SECONDS = 1.0
# A job may hold millions of descriptors, at some 4 us each: so many are looked at before the guard does something else,
# for a tenth of a processor's time, and where a port is new for as much again, of which some seconds at once. And so
# many times in a row: what the job has left is closed to others until then.
_DESCRIPTORS_AT_ONCE, _MOST_PARTS = 50_000, 10
_REST = 9
_HURRY_AT_ONCE_SECONDS, _MOST_HURRY = 4.0, 0.1
# A listener may be missed once (sock_diag.py); and each change of the chains is a transaction under the host's lock.
_GONE_SECONDS = 2.0
_LEAVE_SECONDS = 2.0
_FIRST_FREE_PORT = 1024
_PORTS_NAMED = 8
# Stores are one or two a job: what has more such listeners is something else, and each costs the host rules.
_MOST_ANSWERED = 64
_ANY_ADDRESS = ipaddress.IPv6Address("::")
_LATE = (
    "this job opens ports so often, or has so many open files, that its guard closes new ports later: until then one "
    "that no other layer covers is open to every host"
)
_NOT_ALL = (
    f"this job has more than {_DESCRIPTORS_AT_ONCE * _MOST_PARTS} open files, and its guard looks at no more: a port "
    "that no other layer covers, and that is not found among them, stays open to every host"
)
_NOT_YET = "for a moment, since this user's jobs open ports faster than a host closes them for one user"


class Exposure:
    """Looks for listeners of the job that are open to strangers; raises SocketsUnavailable without sock_diag.

    left_open: the ports that are open to every host, and why.
    """

    def __init__(self, lease: Lease) -> None:
        self.left_open: dict[int, str] = {}
        self._lease = lease
        self._diagnosis = SocketDiagnosis()
        self._for_all = lease.order.policy.ports_for_all()
        # Of a whole job of Slurm's some processes are Slurm's own, and their ports are not the job's to close.
        self._may_close_any = lease.caller.is_root and lease.order.slurm is None
        self._limit = math.inf if lease.caller.is_root else lease.site.ports_found_per_run
        self._any_may_be_the_jobs = self._may_close_any or bool(lease.caller.container)
        self._seen: frozenset[Listener] = frozenset()
        self._search: _Search | None = None
        self._haste = Share(_HURRY_AT_ONCE_SECONDS, _MOST_HURRY)
        self._may_hurry = 0.0
        self._said: set[str] = set()
        self._is_waiting = False
        self._recorded: frozenset[int] = frozenset()
        self._given_way_to: dict[int, int] = {}
        self._next_way = 0.0
        self._cgroups: frozenset[int] = frozenset()
        self._next_look = 0.0
        self._next_leave = 0.0
        self._settled = 0.0
        # Each port that the chains close beside the plan, and when the job was last seen to listen there.
        self._closed = dict.fromkeys(lease.found_ports(), time.monotonic())
        self._harmful: dict[int, str] = {}

    def close(self) -> tuple[str, ...]:
        """Close what is found open; return a line for each thing that a person should know.

        Raises SocketsUnavailable, PortChainsUnavailable or PrivilegeError when that does not succeed.
        """
        found, now = self._diagnosis.listeners(), time.monotonic()
        is_hurried = now < self._next_look
        if is_hurried and not self._has_news(found):
            return ()
        if is_hurried and now < max(self._may_hurry, self._lease.turn.due):
            return self._once(_LATE)
        self._next_look = now + _FULL_LOOK_SECONDS
        search = self._go_on(found, is_hurried=is_hurried)
        if search is None:
            return self._once(_LATE)
        words = self._act(search.found, search.holders, time.monotonic())
        self._seen = frozenset(search.found)
        return words if search.is_whole else (*words, *self._once(_NOT_ALL))

    def hurry(self) -> None:
        """Look at everything the next time, whether or not a listener came meanwhile."""
        self._next_look = 0.0
        self._seen = frozenset()

    def _has_news(self, found: Iterable[Listener]) -> bool:
        """Return whether a listener came that the chains may have to close, since the last look, or waits for that.

        What another user makes is closed for no ordinary user's job, and keeps nobody busy.
        """
        own = self._lease.caller.user
        near = (one for one in found if self._any_may_be_the_jobs or one.user == own)
        return self._is_waiting or any(one not in self._seen for one in near)

    def _once(self, line: str) -> tuple[str, ...]:
        """Return a line, unless it was said before."""
        unsaid = (line,) if line not in self._said else ()
        self._said.add(line)
        return unsaid

    def _go_on(self, found: tuple[Listener, ...], *, is_hurried: bool) -> _Search | None:
        """Begin to look for what of these is the job's, or go on with that; return it when that has ended.

        What took long rests long.
        """
        before = time.process_time()
        search, self._search = self._search or _Search(found, self._lease.processes()), None
        has_ended = search.go_on()
        spent = time.process_time() - before
        now = time.monotonic()
        self._next_look = now + max(_REST * spent, _FULL_LOOK_SECONDS if has_ended else 0.0)
        if is_hurried:
            self._may_hurry = now + self._haste.pause_after(spent)
        if has_ended:
            return search
        self._search = search
        return None

    def _act(self, found: tuple[Listener, ...], holders: Mapping[int, int], now: float) -> tuple[str, ...]:
        exposed = [one for one in self._exposed(found, holders) if not covers(self._for_all, one.port)]
        if self._lease.chains is None:
            ports = {listener.port for listener in exposed}
            uncovered = "the shield holds no more" if self._lease.void else "its socket is not behind the shield"
            return self._told(dict.fromkeys(ports, f"{uncovered}, and no chains are set"), ())
        covered = (*self._to_be_answered(found, holders), *self._covered(found, holders, exposed))
        return (*self._settle(exposed, covered, found, now), *self._give_way(exposed, found, now))

    def _exposed(self, found: tuple[Listener, ...], holders: Mapping[int, int]) -> tuple[Listener, ...]:
        cgroup = self._lease.cgroup
        if not self._lease.is_shielded or cgroup is None:
            # On 127.0.0.1 too: route_localnet and DNAT lead there from outside; and chains pass the loopback itself.
            return sock_diag.held(found, holders)
        reachable = [listener for listener in found if not listener.address.is_loopback]
        self._cgroups |= sock_diag.cgroup_ids(cgroup.descriptor)
        return sock_diag.outside(reachable, holders, self._cgroups)

    def _covered(
        self, found: Iterable[Listener], holders: Mapping[int, int], exposed: Iterable[Listener]
    ) -> list[Listener]:
        """Return what the shield covers and is closed by the chains all the same, since it may cease to in a moment."""
        if not self._lease.closes_all:
            return []
        known = {listener.inode for listener in exposed}
        held = sock_diag.held(found, holders)
        return [one for one in held if one.inode not in known and not covers(self._for_all, one.port)]

    def _give_way(self, exposed: Iterable[Listener], found: Iterable[Listener], now: float) -> tuple[str, ...]:
        """Let others have the ports of the plan that nobody asked for and on which they listen by now.

        Not those on which the job itself does, with nothing else to close them.
        """
        unasked = self._lease.order.policy.unasked_ports()
        if not unasked or now < self._next_way:
            return ()
        own, of_the_job = self._lease.caller.user, {listener.port for listener in exposed}
        others = {
            listener.port: listener.user
            for listener in found
            if covers(unasked, listener.port) and listener.user != own and not listener.address.is_loopback
        }
        others = {port: user for port, user in others.items() if port not in of_the_job}
        if others == self._given_way_to:
            return ()
        self._next_way = now + _LEAVE_SECONDS
        left_out = self._lease.give_way(others) if others else {}
        self._given_way_to = others
        return tuple(unasked_ports.told(left_out))

    def _to_be_answered(self, found: Iterable[Listener], holders: Mapping[int, int]) -> list[Listener]:
        """Return the listeners behind the shield that who uses the IP version of no peer can get to."""
        policy = self._lease.policy
        version = policy.answered_version
        if not self._lease.is_shielded or version is None or (version == 6 and not proc.has_global_ipv6()):
            return []

        def takes(listener: Listener) -> bool:
            # `::` takes both, but for a socket that says otherwise: to that the kernel answers by itself.
            address = listener.address
            return not address.is_loopback and (address.version == version or address == _ANY_ADDRESS)

        held = sock_diag.held(found, holders)
        return [one for one in held if takes(one) and policy.opening_at(one.port) is None][:_MOST_ANSWERED]

    def _settle(
        self, exposed: Iterable[Listener], covered: Iterable[Listener], found: Iterable[Listener], now: float
    ) -> tuple[str, ...]:
        """Close what may be closed, and let go of what the job has left. Of what the shield covers nothing is told."""
        listeners = (*exposed, *covered)
        # By the plan they are closed all along.
        planned = self._lease.order.policy.joined_ports()
        unplanned = {listener.port for listener in listeners if not covers(planned, listener.port)}
        uncovered = {listener.port for listener in exposed}
        self._closed.update((port, now) for port in unplanned if port in self._closed)
        self._harmful = {port: why for port, why in self._harmful.items() if port in unplanned}
        new = unplanned - self._closed.keys()
        strangers = {} if self._may_close_any else self._strangers(listeners, found)
        # Whose listeners are on the loopback alone gives way to who comes later: there it stands in nobody's way.
        local = self._closed.keys() - {listener.port for listener in listeners if not listener.address.is_loopback}
        yielded = {port: _shared_with(strangers[port]) for port in local & unplanned & strangers.keys()}
        refused = {**self._objections(new, strangers), **yielded, **self._harmful}
        wanted = new - refused.keys()
        # Not seen at the look before this one either, however long that is ago.
        unseen = {port for port, seen in self._closed.items() if now - seen > _GONE_SECONDS and seen < self._settled}
        gone = unseen | yielded.keys()
        self._settled = now
        has_turn = now >= self._lease.turn.due
        self._is_waiting = bool(wanted) and not has_turn
        if not has_turn:
            refused.update(dict.fromkeys(wanted, _NOT_YET))
        elif wanted or (gone and now >= self._next_leave):
            self._next_leave = now + _LEAVE_SECONDS
            refused.update(self._change(wanted, gone, now))
        left_open = {port: why for port, why in refused.items() if port in uncovered}
        return self._told(left_open, sorted((wanted - refused.keys()) & uncovered))

    def _objections(self, new: Iterable[int], strangers: Mapping[int, int]) -> dict[int, str]:
        """Return which of the new ports may not be closed for this job's user, and why. Root may close any."""
        if self._may_close_any:
            return {}
        refused, room = {}, self._limit - len(self._closed)
        for port in sorted(new):
            if port < _FIRST_FREE_PORT:
                refused[port] = f"ports below {_FIRST_FREE_PORT} are closed for root's jobs alone"
            elif port in strangers:
                refused[port] = _shared_with(strangers[port])
            elif room <= 0:
                refused[port] = (
                    f"this host closes {self._limit} such ports a run (ports_found_per_run in {LIMITS_FILE})"
                )
            else:
                room -= 1
        return refused

    def _strangers(self, exposed: Iterable[Listener], found: Iterable[Listener]) -> dict[int, int]:
        """Return the ports that are another user's as well, by whom: who made the socket says whose it is."""
        own, of_the_job = self._lease.caller.user, {listener.inode for listener in exposed}

        def is_strangers(listener: Listener) -> bool:
            if listener.inode in of_the_job:
                return listener.user != own
            # Of user id 0 without root's privilege, and of any in a container, nobody can tell that a listener of that
            # id is not another's.
            is_shared = own == ROOT or bool(self._lease.caller.container)
            return not listener.address.is_loopback and (listener.user != own or is_shared)

        return {listener.port: listener.user for listener in found if is_strangers(listener)}

    def _change(self, wanted: set[int], gone: set[int], now: float) -> dict[int, str]:
        """Have the chains close what is wanted, and no longer what is gone; return what may not be closed, and why."""
        ports = (self._closed.keys() | wanted) - gone
        try:
            refused = self._lease.close_found(ports)
        except PortChainsUnavailable as error:
            if not wanted:
                raise
            # It is tried again with the next look.
            return dict.fromkeys(wanted, str(error))
        self._harmful.update(refused)
        self._closed = {port: self._closed.get(port, now) for port in ports if port not in refused}
        return refused

    def _told(self, left_open: dict[int, str], closed: Iterable[int]) -> tuple[str, ...]:
        """Take note of what is open, in the record too, and return what is new in words."""
        news: defaultdict[str, list[int]] = defaultdict(list)
        for port in sorted(left_open.keys() - self.left_open):
            news[left_open[port]].append(port)
        if left_open.keys() != self._recorded and time.monotonic() >= self._lease.turn.due:
            self._lease.note_open_ports(left_open)
            self._recorded = frozenset(left_open)
        self.left_open = left_open
        words = tuple(f"port {some(ports, _PORTS_NAMED)} is open to every host: {why}" for why, ports in news.items())
        listed = some(list(closed), _PORTS_NAMED)
        if not self._lease.is_shielded or not listed:
            return words
        return (*words, f"port {listed} is on a socket that the shield does not cover; the port chains close it")


class _Search:
    """Looks for who of the job holds what listens, some descriptors at a time.

    found: what listened when it began. is_whole: whether all descriptors were looked at.
    """

    def __init__(self, found: tuple[Listener, ...], of_the_job: Iterable[Process]) -> None:
        self.found = found
        self.holders: dict[int, int] = {}
        self.is_whole = False
        self._inodes = {listener.inode for listener in found}
        self._parts = 0
        self._left = proc.descriptors_of(self._pids(of_the_job))

    def go_on(self) -> bool:
        """Look at some more; return whether there is no more to look at, or there was too much."""
        seen = 0
        for pid, inode in itertools.islice(self._left, _DESCRIPTORS_AT_ONCE):
            seen += 1
            if inode and inode in self._inodes:
                self.holders.setdefault(inode, pid)
        self._parts += 1
        self.is_whole = seen < _DESCRIPTORS_AT_ONCE
        return self.is_whole or self._parts == _MOST_PARTS

    def _pids(self, of_the_job: Iterable[Process]) -> Iterator[int]:
        """Yield the job's processes; after a pause, a number may be another's by now."""
        return (each.pid for each in of_the_job if not self._parts or processes.lives(each))


def _shared_with(user: int) -> str:
    return f"user {user} listens there too"


def open_exposure(lease: Lease) -> Exposure | None:
    """Open the look-out of a lease; None where it would see nothing, and scope `ports` is refused anyway."""
    if not lease.caller.can_be_looked_into():
        return None
    try:
        return Exposure(lease)
    except SocketsUnavailable:
        return None
