"""The keeper of a job's own network: a small process of the user's, outside of it, from before it is until it is empty.

It starts the way out, again when that dies, and tells the user's other commands of the run. When the launcher ends, it
ends what is left of a failed or killed job, or waits until that has ended; then it ends the way out. It runs as
`python -I -S` and loads the standard library alone.

It is two processes: one that does all this, and its parent, which stands by and has another take over from one that was
killed. So a launcher and a keeper that are killed at once leave nothing either.

What launcher and keeper say to each other is a JSON object a line:

    launcher → keeper   begin      the launcher is in its network: the way out's command, None where there is none
                        record     the job is about to start: its record, and its grace
                        release    the job is over; whether it failed
    keeper → launcher   gone       the way out has ended: its last words, and whether there is another
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from securerun.lines import LineBuffer
from securerun.linux import forked, local_sockets, namespaces, own_network, prctl, proc, processes, user_namespaces
from securerun.linux.processes import Process
from securerun.linux.sent_along import Parting

NAME = "securerun-keep"
# In the command of a way out: the process whose network it is for.
TARGET = "PID"
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from securerun.protection.keeper import main; sys.exit(main(sys.argv[1:]))"
)
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
# What ends a process that a batch system or a person wants to end: this one ends when its work is done.
_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_MOST_BYTES = 16 * 1024 * 1024
_WORDS_BYTES, _MOST_CHUNKS = 4096, 16
_DEFAULT_GRACE_SECONDS = 10.0
_KILL_SECONDS = 5.0
_END_SECONDS = 2.0
_TELL_SECONDS = 1.0
# Where no process can be held by a descriptor (a kernel before 5.3), it is looked at so often.
_LOOK_SECONDS = 0.1
_ROUTES_SECONDS, _SHORT_LOOK_SECONDS = 10.0, 0.005
_DRAIN_SECONDS = 5.0
# A way out, or a keeper, that ends again and again is not started for ever.
_RESTARTS, _RESTARTS_SECONDS = 5, 60.0
_NAMESPACES = ("net", "user")


def command(launcher: int) -> list[str]:
    """Return the command line of a keeper for a launcher, whose end of the connection is its standard input."""
    return [sys.executable, "-I", "-S", "-c", _PROGRAM, _PACKAGE_PARENT, str(launcher)]


def place_of(run_id: str) -> str:
    """Return the abstract address at which the keeper of a run tells of it (unix(7)): of the host's network."""
    return f"\0securerun-own-network-{run_id}"


def encode(kind: str, body: object) -> bytes:
    """Return one message as a line."""
    return json.dumps({kind: body}, separators=(",", ":")).encode() + b"\n"


class Lines:
    """The messages that come by a connection, however they are cut. closed: whether no more will."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pending = LineBuffer()
        self.closed = False

    def read(self) -> list[tuple[str, Any]]:
        """Return the messages that are whole by now; waits for some as long as the connection does."""
        try:
            chunk = self._connection.recv(65536)
        except (BlockingIOError, socket.timeout):
            return []
        except OSError:
            chunk = b""
        self.closed = not chunk or len(self._pending) > _MOST_BYTES
        self._pending.add(chunk)
        return [next(iter(json.loads(line).items())) for line in iter(self._pending.take, None)]


def main(arguments: Sequence[str]) -> int:
    """Be the keeper of the launcher with the process id in `arguments`."""
    (launcher,) = map(int, arguments)
    life = _Life(launcher)
    # Nobody waits for this process, and what waits for all of its children is not to find it.
    if os.getppid() != launcher or os.fork():
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    prctl.set_name(NAME)
    with socket.socket(fileno=os.dup(0)) as connection:
        _replace_input()
        connection.setblocking(False)
        _stand_by(life, connection)
    return 0


@dataclass(frozen=True)
class _Kept:
    """What a keeper has to know that takes over from another.

    namespaces: descriptors of the job's network and user namespace. They keep both from ending, so that no other job's
    get their numbers, which are given again at once. command: the way out's; None where there is none. unwanted: IP
    versions whose default route goes. failed: whether the job did; None while it is not over. is_done: nothing is left.
    """

    namespaces: tuple[int, ...] = ()
    command: list[str] | None = None
    unwanted: list[int] = field(default_factory=list)
    record: dict[str, Any] | None = None
    grace: float = _DEFAULT_GRACE_SECONDS
    failed: bool | None = None
    is_done: bool = False


def _stand_by(life: _Life, connection: socket.socket) -> None:
    """Have a child be the keeper, and another in its place when that is killed, until nothing is left to keep."""
    kept = _Kept()
    died: deque[float] = deque(maxlen=_RESTARTS)
    while not kept.is_done and (len(died) < _RESTARTS or time.monotonic() - died[0] > _RESTARTS_SECONDS):
        before = kept
        child, near = forked.fork(lambda far: _Keeper(life, connection, before, far).keep())  # noqa: B023 - at once
        with near:
            kept = _told_by(near, before)
        os.waitpid(child, 0)
        died.append(time.monotonic())


def _told_by(keeper: socket.socket, kept: _Kept) -> _Kept:
    """Return what is to be known when a keeper has ended, as it told meanwhile."""
    pending = LineBuffer()
    while True:
        chunk, descriptors, _, _ = socket.recv_fds(keeper, 65536, len(_NAMESPACES))
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        if descriptors:
            kept = replace(kept, namespaces=tuple(descriptors))
        if not chunk:
            return kept
        pending.add(chunk)
        lines = [line for line in iter(pending.take, None) if line]
        if lines:
            kept = replace(kept, **json.loads(lines[-1]))


class _Life:
    """The life of a process that is not ours to wait for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start = proc.start_time(pid)
        held = processes.pidfd(pid)
        self.descriptor = -1 if held is None else held

    @property
    def lasts(self) -> bool:
        """Whether the process has not ended, as far as is to be seen."""
        if self.descriptor >= 0:
            return not select.select([self.descriptor], [], [], 0)[0]
        try:
            return proc.is_running(self.pid, self._start)
        except OSError:
            return True


class _Keeper:
    def __init__(self, life: _Life, connection: socket.socket, kept: _Kept, standby: socket.socket) -> None:
        self._life = life
        self._connection = connection
        self._lines = Lines(connection)
        self._kept = kept
        self._standby = standby
        self._way: _Way | None = None
        self._inside_child = 0
        self._ended: deque[float] = deque(maxlen=_RESTARTS)
        self._teller: socket.socket | None = None
        self._parting = Parting()

    def keep(self) -> None:
        """Do all of the work, until nothing is left of it."""
        if self._kept.namespaces:
            self._take_over()
        while self._life.lasts:
            self._wait([self._life.descriptor])
            self._look_after_way()
        while not self._lines.closed and (self._connection in select.select([self._connection], [], [], 0)[0]):
            self._hear()
        self._end_inside_child()
        if self._kept.namespaces:
            self._see_it_empty()
        if self._way is not None:
            self._way.end()
        self._remember(is_done=True)

    def _take_over(self) -> None:
        """Go on where a keeper was killed, whose way out ended with it."""
        if self._kept.record is not None:
            self._have_record(self._kept.record)
        if self._kept.command is None or not (self._life.lasts or self._kept.failed is False):
            return
        self._start_way()
        if self._kept.record is not None:
            self._say_gone("its keeper was killed", again=True)

    def _remember(self, **changes: Any) -> None:  # noqa: ANN401 - the fields of what is kept
        """Have the process that stands by know what changes."""
        self._kept = replace(self._kept, **changes)
        told = asdict(replace(self._kept, namespaces=()))
        del told["namespaces"]
        with contextlib.suppress(OSError):  # it was killed: this one goes on without
            if "namespaces" in changes:
                socket.send_fds(self._standby, [b"\n"], self._kept.namespaces)
            self._standby.sendall(json.dumps(told).encode() + b"\n")

    def _wait(self, descriptors: Sequence[int], seconds: float = _DRAIN_SECONDS) -> None:
        """Wait until something happens, and take care of it, but for these descriptors."""
        poller = select.poll()
        known = [*descriptors]
        for one in {*known} - {-1}:
            poller.register(one, select.POLLIN)
        if not self._lines.closed:
            poller.register(self._connection, select.POLLIN)
        if self._teller is not None:
            poller.register(self._teller, select.POLLIN)
        if self._way is not None:
            known.append(self._way.life.descriptor)
            for one in {self._way.words, self._way.life.descriptor} - {-1}:
                poller.register(one, select.POLLIN)
        blind = -1 in known
        found = {one for one, _ in poller.poll((_LOOK_SECONDS if blind else seconds) * 1000)}
        if self._connection.fileno() in found:
            self._hear()
        if self._teller is not None and self._teller.fileno() in found:
            self._tell()
        if self._way is not None and self._way.words in found:
            self._way.listen()

    def _hear(self) -> None:
        for kind, body in self._lines.read():
            if kind == "begin":
                self._begin(body)
            elif kind == "record":
                self._remember(grace=float(body["grace"]))
                self._have_record(body["record"])
            elif kind == "release":
                self._remember(failed=bool(body["failed"]))

    def _begin(self, body: dict[str, Any]) -> None:
        namespaces = tuple(proc.open_namespace(kind, self._life.pid) for kind in _NAMESPACES)
        # What is in there is ended one day: never what is out here.
        if any(_number(one) == proc.namespace(kind) for one, kind in zip(namespaces, _NAMESPACES)):
            return
        self._remember(namespaces=namespaces, command=body["command"], unwanted=list(body["unwanted_routes"]))
        self._start_way()

    def _have_record(self, record: dict[str, Any]) -> None:
        """Be who keeps the run of this record, and stand where the user's other commands find it."""
        self._remember(record={**record, "guard": os.getpid(), "guard_start": proc.start_time(os.getpid())})
        teller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            teller.bind(place_of(record["policy"]["run_id"]))
            teller.listen()
        except OSError:
            teller.close()
            return
        self._teller = teller

    def _start_way(self) -> None:
        target = self._target()
        if self._kept.command is not None and target:
            self._way = _Way([target if word == TARGET else word for word in self._kept.command])
            self._remove_routes(int(target))

    def _target(self) -> str:
        """Return the id of a process in the job's network; "" where there is none."""
        if self._life.lasts:
            return str(self._life.pid)
        found = (
            one.pid for one in self._inside() if proc.namespace("net", one.pid) == _number(self._kept.namespaces[0])
        )
        with contextlib.suppress(OSError):
            return str(next(found, ""))
        return ""

    def _remove_routes(self, pid: int) -> None:
        """Take routes away that the way out brings and the host has not; by a child, since there is no way back."""
        if not self._kept.unwanted:
            return
        self._end_inside_child()
        keeper = os.getpid()
        self._inside_child = os.fork()
        if self._inside_child == 0:
            with contextlib.suppress(OSError):
                prctl.set_signal_at_parents_end(signal.SIGKILL)
                if os.getppid() == keeper:
                    _remove_routes(pid, self._kept.unwanted)
            os._exit(0)

    def _end_inside_child(self) -> None:
        """End the one that waits for the routes of a way out that has ended."""
        if self._inside_child:
            os.kill(self._inside_child, signal.SIGKILL)
            os.waitpid(self._inside_child, 0)
            self._inside_child = 0

    def _look_after_way(self) -> None:
        """Have another way out in place of one that has ended, and tell the launcher."""
        if self._inside_child and os.waitpid(self._inside_child, os.WNOHANG)[0]:
            self._inside_child = 0
        if self._way is None or not self._way.has_ended():
            return
        words, self._way = self._way.last_words(), None
        now = time.monotonic()
        often = len(self._ended) == _RESTARTS and now - self._ended[0] < _RESTARTS_SECONDS
        again = self._kept.record is not None and not often
        self._ended.append(now)
        self._say_gone(words, again=again)
        if again:
            self._start_way()

    def _say_gone(self, words: str, *, again: bool) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(encode("gone", {"words": words, "again": again}))

    def _tell(self) -> None:
        """Tell of the run to whoever has come, if that is this user or root."""
        if self._teller is None:
            return
        with contextlib.suppress(OSError):
            asking, _ = self._teller.accept()
            try:
                if local_sockets.peer_of(asking)[1] in {os.getuid(), 0}:
                    asking.settimeout(_TELL_SECONDS)
                    asking.sendall(json.dumps(self._kept.record).encode())
            finally:
                self._parting.take(asking)
                self._parting.close()

    def _see_it_empty(self) -> None:
        """End what a job left that failed or whose launcher was killed; wait for what one left that ended well."""
        if self._kept.failed is not False:
            processes.end_all(self._inside, self._kept.grace, _KILL_SECONDS)
            return
        if self._kept.record is not None:
            self._remember(record={**self._kept.record, "draining": True})
        while left := self._inside():
            lives = [_Life(one.pid) for one in left if processes.lives(one)]
            for life in lives[:1]:
                self._wait([life.descriptor])
            for life in lives:
                if life.descriptor >= 0:
                    os.close(life.descriptor)
            self._look_after_way()

    def _inside(self) -> frozenset[Process]:
        """Return what is in the job's network, or in a user namespace that was made in there, and is this user's."""
        found = set()
        # The way out is in the job's user namespace too; only root can see it there.
        way = self._way.life.pid if self._way is not None else 0
        for pid in proc.pids():
            with contextlib.suppress(OSError):
                if pid != way and self._is_inside(pid) and processes.may_end(os.getuid(), pid):
                    process = Process.of(pid)
                    if processes.lives(process):
                        found.add(process)
        return frozenset(found)

    def _is_inside(self, pid: int) -> bool:
        network, users = map(_number, self._kept.namespaces)
        if proc.namespace("net", pid) == network:
            return True
        return proc.namespace("user", pid) == users or namespaces.is_within_user_namespace(pid, users)


def _number(namespace: int) -> int:
    return os.fstat(namespace).st_ino


class _Way:
    """A way out that was started. life: whether it lasts. words: where what it says comes; -1 when no more will."""

    def __init__(self, command: Sequence[str]) -> None:
        self.words, theirs = os.pipe()
        os.set_blocking(self.words, False)
        keeper = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _become(command, theirs, keeper)
            finally:
                os._exit(127)
        os.close(theirs)
        self.life = _Life(self._pid)
        self._said = b""
        self._status: int | None = None

    def listen(self) -> None:
        """Take in what it says, the last of it; of one that says more and more, a part, since there is more to do."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_CHUNKS):
                if self.words < 0:
                    return
                chunk = os.read(self.words, 65536)
                self._said = (self._said + chunk)[-_WORDS_BYTES:]
                if not chunk:
                    os.close(self.words)
                    self.words = -1

    def has_ended(self) -> bool:
        """Return whether it has ended by itself."""
        if self._status is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def last_words(self) -> str:
        """Why it ended: the last line that it said, or how."""
        self.listen()
        lines = self._said.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._status}"

    def end(self) -> None:
        """End it: it has nothing to save."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.has_ended():
                return
            os.kill(self._pid, number)
            deadline = time.monotonic() + _END_SECONDS
            while not self.has_ended() and time.monotonic() < deadline:
                time.sleep(0.01)


def _become(command: Sequence[str], words: int, keeper: int) -> None:
    """Be the way out, which ends with its keeper: nobody else would end it."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.dup2(words, 2)
    prctl.set_signal_at_parents_end(signal.SIGKILL)
    if os.getppid() == keeper:
        os.execve(command[0], list(command), {"PATH": "/usr/bin:/bin", "LC_ALL": "C"})  # noqa: S606 - an absolute path


def _remove_routes(pid: int, versions: Sequence[int]) -> None:
    """Wait, in a process' network, for default routes to come, and take them away."""
    user_namespaces.enter(pid)
    deadline = time.monotonic() + _ROUTES_SECONDS
    for version in versions:
        while not own_network.remove_default_route(version) and time.monotonic() < deadline:
            time.sleep(_SHORT_LOOK_SECONDS)


def _replace_input() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
