"""The job's processes where no cgroup holds them together, and how they are ended without hitting another.

A process of the job is known by its mark, a `NAME=value` in the environment it was started with, by descent from such a
process, or because it was known before. The environment is the process' own memory: it can write there what it likes,
so it is a claim, not a proof. What that gets a hostile process:

- To claim a job that it does not belong to: it is ended with that job, and its listeners are closed with that job's.
  Only processes of the job's own user are asked, and whoever may set the variable there may end them anyway.
- To deny the job it belongs to: it outlives the job, as it would without all this. Against that only a cgroup helps.

So none is ended on behalf of a user who could not end that process (`may_end`): also not one that descends from the job
or stands in its cgroup, such as what sudo started.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal as signals
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from securerun.linux import namespaces, proc
from securerun.linux.proc import Stat

_ROOT = 0
_LOOK_SECONDS = 0.02
# A process is in the middle of execve(2) for far less than 1 ms, unless it waits for a core or a slow disk.
_EXECVE_LOOKS = 20
_EXECVE_SECONDS = 0.005
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # include/linux/proc_ns.h, PROC_PID_INIT_INO
_STOPPING_ROUNDS = 50
_GROWN_SECONDS = 2.0
# Whose /proc is mounted with hidepid sees nobody else's processes (proc(5)).
_UNSEEN = (*proc.GONE, PermissionError)


@dataclass(frozen=True)
class Process:
    """A process for good: a pid is used again, a pid and its start time (clock ticks since boot, proc(5)) are not."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the process that has this pid now. Raises OSError when there is none."""
        return cls(pid, proc.start_time(pid))


Find = Callable[[], Collection[Process]]


class JobProcesses:
    """The processes of one job, remembered from look to look.

    Memory finds those that no longer show it: a process that was forked, not executed, by the launcher (whose own
    variable was set too late to be seen), one that wrote its title over its environment (setproctitle), one whose
    parent has ended. So look now and then while the job runs, not only at its end.

    mark: the `NAME=value` in their environment. user: the job's real user id. known: processes to begin with, such as
    the launcher. spare: pids never to be found. kin: of what was found last, who is more than a claim: was known, or
    descends from such. The mark alone is copied to where it means nothing (sbatch, ssh).
    """

    def __init__(
        self, mark: str, user: int, known: Iterable[Process] = (), spare: Collection[int] = frozenset()
    ) -> None:
        self._mark = mark
        self._user = user
        self._known = frozenset(known)
        self._spare = spare
        self._listed: dict[int, int] = {}
        self._others: dict[int, int] = {}
        self.kin = self._known

    def find(
        self, also: Collection[Process] = (), spare: Collection[int] = (), *, patient: bool = False
    ) -> frozenset[Process]:
        """Return the processes that live now, as `marked` finds them.

        also: more that are known to be the job's. spare: more pids that are not to be found this time. patient: leave
        out who was not there yet at the last look: most have ended by the next, and need not be read at all.
        """
        listed, before = proc.listed(), self._listed
        self._listed = listed
        # Who was none of the job's a while after its start becomes none, and what it starts is looked at anew.
        self._others = {pid: number for pid, number in self._others.items() if listed.get(pid) == number}
        known = {*self._known, *also}
        pids = listed.keys() - self._others.keys()
        if patient and before:
            # Of `also` those who are there still: they may have ended since somebody saw them.
            pids = {pid for pid in pids if before.get(pid) == listed[pid]} | listed.keys() & {one.pid for one in also}
        look = _Look(self._user, {os.getpid(), *self._spare, *spare}, known, pids)
        self.kin = look.kin({*self.kin, *also})
        self._known = self.kin | look.marked(self._mark, known)
        self._others.update((pid, listed[pid]) for pid in look.for_good_others())
        return self._known

    def forget(self, process: Process) -> None:
        """Have a process be none of the job's any more, nor what it starts from now on."""
        self._known -= {process}
        self.kin -= {process}


class _Look:
    """One look at processes, for those of a user's job.

    excepted: pids that are not to be found, nor what descends from the job through these alone. known: with the
    launcher among them where that is pid 1. pids: whom to look at, by default all.
    """

    def __init__(
        self, user: int, excepted: Collection[int], known: Collection[Process], pids: Collection[int] | None = None
    ) -> None:
        self._user = user
        self._pids = frozenset(proc.pids() if pids is None else pids)
        self._living = _living(self._pids)
        self._excepted = {*excepted, *({proc.INIT} - {process.pid for process in known})}
        self._reached: set[int] = set()

    def kin(self, known: Iterable[Process]) -> frozenset[Process]:
        """Return those of the known that live, and what descends from them."""
        return self._of({process.pid for process in known if _is_among(process, self._living)})

    def marked(self, mark: str, known: Iterable[Process]) -> frozenset[Process]:
        """Return as `kin` does, and those that show the mark as well."""
        roots = {process.pid for process in known if _is_among(process, self._living)}
        # Nobody else's environment is looked at.
        own = {pid for pid in self._living if pid not in self._excepted and proc.real_user(pid) == self._user}
        return self._of(roots | started_with(mark, own))

    def for_good_others(self) -> set[int]:
        """Return who was looked at, is none of the job's and does not come to be: it has ended, or is not young.

        A process shows its mark when it has executed its program, and one that changes its user does it soon.
        """
        others = self._pids - self._reached
        return {pid for pid in others if pid not in self._living or _is_grown(self._living[pid])}

    def _of(self, roots: Iterable[int]) -> frozenset[Process]:
        found = _with_descendants({*roots} - self._excepted, self._living, self._excepted)
        self._reached |= found
        return frozenset(
            Process(pid, self._living[pid].start)
            for pid in found
            if self._user == _ROOT or proc.real_user(pid) == self._user
        )


def marked(
    mark: str, user: int, *, known: Collection[Process] = (), spare: Collection[int] = frozenset()
) -> frozenset[Process]:
    """Return the living processes that were started with a mark, those of `known` that still live, and all descendants.

    mark: the `NAME=value` in their environment. Only processes with this real user id. A job of root may have
    descendants of any user, since descent is the kernel's word; but not processes of others that merely carry it.
    Never this process, a kernel thread or a pid in `spare`, nor what descends from the job through these alone; and
    pid 1 only where it is the launcher itself, as in a container whose command is the launcher.
    """
    return _Look(user, {os.getpid(), *spare}, known).marked(mark, known)


def descendants(pid: int, spare: Collection[int] = ()) -> frozenset[Process]:
    """Return the children of a process, and theirs, without looking at any other; not through those in `spare`."""
    found: set[int] = set()
    pending = [pid]
    while pending:
        new = {child for child in proc.children_of_all_threads(pending.pop()) if child not in spare} - found
        found |= new
        pending += new
    living = set()
    for child in found:
        with contextlib.suppress(OSError):
            living.add(Process.of(child))
    return frozenset(living)


def all_are_seen() -> bool:
    """Return whether this process is in the host's own pid namespace, which ends with the host alone."""
    return proc.namespace("pid") == _FIRST_PID_NAMESPACE


def lives(process: Process) -> bool:
    """Return whether this process, and not a later one of its number, has a thread that runs.

    Raises OSError where that cannot be seen for a moment.
    """
    try:
        found = proc.stat(process.pid)
    except _UNSEEN:
        return False
    return found.start == process.start and not found.has_ended


def started_with(variable: str, pids: Iterable[int]) -> set[int]:
    """Return those of the processes in whose environment this `NAME=value` was when they were started.

    In the middle of execve(2) an environment cannot be read, though the parent may have been told already that it went
    well (fs/exec.c: descriptors are closed before the new stack, where the environment lies, is made). So whoever is
    there is looked at again, for 0.1 s at most: what it runs may come from a file system that never answers.
    """
    found, unsettled = set(), set(pids)
    for _ in range(_EXECVE_LOOKS):
        shown = {pid: _shows(variable.encode(), pid) for pid in unsettled}
        found |= {pid for pid, shows in shown.items() if shows}
        unsettled = {pid for pid, shows in shown.items() if shows is None}
        if not unsettled:
            break
        time.sleep(_EXECVE_SECONDS)
    return found


def claimants(variable: str, user: int, until: float = math.inf) -> frozenset[int]:
    """Return the processes with this real user id that may have been started with this `NAME=value`, without waiting.

    Who does not show an environment yet is asked once more after all others, since most are through execve(2) by then.
    Who still is in the middle of it is among them: to be asked where one too many does no harm.

    until: on the monotonic clock. Users may have thousands of processes with megabytes of environment, of which each
    takes tens of milliseconds to read. Raises TimeoutError when not all could be asked until then.
    """
    own = (pid for pid in proc.of_user(user) if pid != os.getpid())
    shown = {pid: _shows(variable.encode(), pid) for pid in _in_time(own, until)}
    unsettled = [pid for pid, shows in shown.items() if shows is None]
    again = {pid: _shows(variable.encode(), pid) for pid in _in_time(unsettled, until)}
    return frozenset(pid for pid, shows in {**shown, **again}.items() if shows is not False)


def _in_time(pids: Iterable[int], until: float) -> Iterator[int]:
    """Yield these. Raises TimeoutError at the first that comes too late, with all that is done in between."""
    for pid in pids:
        if time.monotonic() > until:
            raise TimeoutError
        yield pid


def may_end(user: int, pid: int) -> bool:
    """Return whether to end a process for a user without privilege: by the rule of kill(2), and more narrowly.

    One that is his and nobody else's, by its real, effective and saved user ids: sudo, which he may signal, passes the
    signal on to what he may not. And who is in a user namespace of his, whatever he is in there (user_namespaces(7):
    its owner has all capabilities in it).
    """
    try:
        return {*proc.status(pid).users[:3]} == {user} or user in namespaces.owners_of_user_namespaces(pid)
    except OSError:
        return False


def signal(process: Process, number: int) -> bool:
    """Send a signal to this very process; return False when it has ended or may not be signalled."""
    if process.pid <= proc.INIT:
        return False
    try:
        return _signal_held(process, number)
    except ProcessLookupError:
        return False
    except (AttributeError, OSError):
        # No pidfd: a kernel before 5.3, a Python built on one, or a container whose seccomp filter forbids it.
        return _signal_by_pid(process, number)


def end(processes: Iterable[Process], number: int = signals.SIGKILL) -> int:
    """Signal each of the processes; return how many there were to be signalled."""
    return sum(signal(process, number) for process in processes)


def end_all(find: Find, grace_seconds: float, kill_seconds: float = 5.0) -> frozenset[Process]:
    """End what `find` finds: SIGTERM, a grace period, then SIGKILL until it finds none; return what is left.

    Takes at most the two periods and a look. What is left then is stuck in the kernel (a device that does not answer)
    or forks and ends faster than one can look, which only a cgroup catches.
    """
    if _ask_to_end(find, time.monotonic() + grace_seconds):
        return frozenset()
    return _kill(find, time.monotonic() + kill_seconds)


def kill_all(find: Find, seconds: float) -> frozenset[Process]:
    """SIGKILL what `find` finds until it finds none; return what is left after some seconds, as `end_all` does."""
    return _kill(find, time.monotonic() + seconds)


def _living(pids: Iterable[int]) -> dict[int, Stat]:
    """Find those that are neither kernel threads nor only wait to be reaped, by pid. Raises OSError as `lives` does."""
    living = {}
    for pid in pids:
        with contextlib.suppress(*_UNSEEN):
            found = proc.stat(pid)
            if not (found.is_kernel_thread or found.has_ended):
                living[pid] = found
    return living


def _is_grown(found: Stat) -> bool:
    return proc.seconds_since_start(found) > _GROWN_SECONDS


def _is_among(process: Process, living: Mapping[int, Stat]) -> bool:
    return process.pid in living and living[process.pid].start == process.start


def _shows(variable: bytes, pid: int) -> bool | None:
    """Return whether a process shows this in its environment; None where it may still come to show one."""
    text = proc.environment(pid)
    if not text and proc.has_environment_to_come(pid):
        return None
    return b"\0%b\0" % variable in b"\0%b\0" % text


def _with_descendants(roots: Iterable[int], living: Mapping[int, Stat], excepted: Collection[int]) -> set[int]:
    children = defaultdict(list)
    for pid, status in living.items():
        if pid not in excepted:
            children[status.parent].append(pid)
    found = set(roots)
    pending = list(found)
    while pending:
        new = set(children[pending.pop()]) - found
        found |= new
        pending += new
    return found


def pidfd(pid: int) -> int | None:
    """Return a descriptor that means this process and no later one; None where it has ended, or below Linux 5.3."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _signal_held(process: Process, number: int) -> bool:
    """Signal through a pidfd, which never means a later process of that number."""
    held = os.pidfd_open(process.pid)
    try:
        # Looked at after it is held: if the pid still has the old start time, it is the one that is held.
        if not _is_current(process):
            return False
        signals.pidfd_send_signal(held, number)
    finally:
        os.close(held)
    return True


def _signal_by_pid(process: Process, number: int) -> bool:
    try:
        if not _is_current(process):
            return False
        os.kill(process.pid, number)
    except OSError:
        return False
    return True


def _is_current(process: Process) -> bool:
    try:
        return Process.of(process.pid) == process
    except OSError:
        return False


class Request:
    """Asks processes to end by SIGTERM, each once, but none that one of those starts when it was asked.

    With that it saves its work, or tidies up, as a shell's trap does: it may take as long as whoever started it.
    """

    def __init__(self) -> None:
        # Since when each knows, in clock ticks since boot. What ended is remembered: it is none of its later number's.
        self._knows_since: dict[Process, int] = {}
        self._latest: int | None = None

    def make(self, found: Iterable[Process]) -> None:
        """Ask those that were not asked yet; they may have been forked before, and not been seen then."""
        new = set(found) - self._knows_since.keys()
        started_since = {process for process in new if self._is_started_by_who_knows(process)}
        self._knows_since.update((process, process.start) for process in started_since)
        asked = new - started_since
        if not asked:
            return
        self._latest = proc.ticks_since_boot()
        end(asked, signals.SIGTERM)
        # A stopped process would keep the request until it is continued.
        end(asked, signals.SIGCONT)
        self._knows_since.update(dict.fromkeys(asked, self._latest))

    def _is_started_by_who_knows(self, process: Process) -> bool:
        """Return whether it is not to be asked. In doubt, which is a tick's of 10 ms, it has the grace period too."""
        if self._latest is None:
            return False
        parent = _parent_of(process)
        since = self._latest if parent is None else self._knows_since.get(parent, self._latest)
        return process.start >= since


def _parent_of(process: Process) -> Process | None:
    """Return its parent; None where one of the two has ended, or the parent is not to be seen from here."""
    try:
        return Process.of(proc.stat(process.pid).parent)
    except OSError:
        return None


def _ask_to_end(find: Find, deadline: float) -> bool:
    """Have all know, as `Request` does, that they are to end; return whether none was left at the deadline."""
    request = Request()
    while True:
        found = find()
        # Two looks: one is no snapshot, and a child may get a pid that it has passed already.
        if not found and not find():
            return True
        request.make(found)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        time.sleep(min(_LOOK_SECONDS, remaining))


def _kill(find: Find, deadline: float) -> frozenset[Process]:
    while True:
        _stop(find, deadline)
        end(find(), signals.SIGKILL)
        if not find() and not find():
            return frozenset()
        if time.monotonic() > deadline:
            return frozenset(find())
        time.sleep(_LOOK_SECONDS)


def _stop(find: Find, deadline: float) -> None:
    """Stop all before any is killed: what stands still forks no more, and its children keep it as their parent."""
    stopped: set[Process] = set()
    for _ in range(_STOPPING_ROUNDS):
        new = set(find()) - stopped
        if not new or time.monotonic() > deadline:
            return
        end(new, signals.SIGSTOP)
        stopped |= new
