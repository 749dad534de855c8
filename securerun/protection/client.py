"""The launcher's side of the guard: start it, give it its order, hear from it, replace it when it dies, let it go."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Callable

from securerun.errors import PolicyError, PrivilegeError, SecurerunError
from securerun.guard.documents import ProtocolError
from securerun.guard.protocol import (
    RUN_ID_VARIABLE,
    SECRET_PATH_VARIABLE,
    VERSION_WITH_KEY,
    Guarding,
    Message,
    Notice,
    Order,
    Peers,
    Ready,
    Refused,
    Release,
    Released,
    Report,
    Run,
    Runs,
)
from securerun.linux import proc, seclusion, signals
from securerun.linux.networks import Network, collapse
from securerun.protection.ways import DIRECTLY, Connection, Way, advice, ways

_READY_SECONDS = 30.0
_ANSWER_SECONDS = 120.0
_FAREWELL_SECONDS = 5.0
# Of a user's jobs that start at once, some get their guards when the guards of others have theirs.
_BUSY_SECONDS = 120.0
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 3.0
# Guards that die again and again are being killed by somebody: so many are replaced at once, the next ones with a pause
# between them. Never given up: nobody else would end what the job leaves behind, and remove what stands.
_REPLACEMENTS = 5
_REPLACEMENTS_SECONDS = 60.0
_PAUSE_SECONDS = 15.0

_KNOWS_NO_KEYS = (
    "no key (the guard of this host is of an older securerun, which knows none): who may connect is told by addresses "
    "alone; have its administrator install this version"
)

Tell = Callable[[Notice], None]

# The runs that this process began: those that have not ended, and why it could not leave those that have.
_running: dict[str, Guard] = {}
_stays: dict[str, str] = {}
# Held while one is begun: of two threads' runs, the second is to know of the first.
_beginning = threading.Lock()


class Refusal(SecurerunError):
    """The guard's own refusal, with the status and the words that it gave."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.status = refused.status


class Guard:
    """The guard of one job, whichever process it is at the time.

    Made early: it comes up while torch is being imported, and installs nothing before it has its order.

    goes_on: whether this process may go on after the job, and then is to be out of it. has_parted: whether it is. by:
    the ways to try, by default all. brings_key: whether the order is likely to have a key, by the ways that are tried
    by default.
    """

    def __init__(
        self, *, goes_on: bool = True, by: Callable[[], Sequence[Way]] | None = None, brings_key: bool = False
    ) -> None:
        self._by = by or (partial(ways, brings_key=True) if brings_key else ways)
        self.has_parted = False
        self._goes_on = goes_on
        self._before: dict[str, str | None] = {}
        self._untried: list[Way] = []
        self._obstacles: list[str] = []
        self._more_advice = ""
        self._refused: Refusal | None = None
        self._connection: Connection | None = None
        self._current: Way | None = None
        self._way = ""
        self._order: Order | None = None
        self._tell: Tell = lambda _: None
        self._replaced: deque[float] = deque(maxlen=_REPLACEMENTS)
        self._hurry = threading.Event()
        self._tried_last = False
        self._is_ready = False
        self._versions: tuple[int, ...] = ()
        self._change = threading.Lock()
        self._farewell = threading.Event()
        self._asked = False
        self._released: Released | None = None
        self._ended: Refusal | None = None
        self._releasing: Release | None = None
        # A worker that is forked, not spawned, must not keep the guard's input open after the launcher's end.
        seclusion.let_go_in_children(self._hang_up)
        self._start_over()

    @property
    def way(self) -> str:
        """How the guard came by its privilege, in words; right once the job is guarded."""
        return self._way

    @property
    def is_roots(self) -> bool:
        """Whether this process has started it by its own privilege; it is believed to come."""
        return self._connection is not None and self._way == DIRECTLY

    def can_be_had(self, meanwhile: Iterable[None] = ()) -> bool:
        """Return whether a guard waits for its order; takes as long as it takes to tell. None that refuses is one.

        meanwhile: steps of what is to be done anyway; as many are taken as there is time for.
        """
        for _ in meanwhile:
            if self._connection is None or self._connection.has_answer():
                break
        if self._connection is not None:
            with contextlib.suppress(PrivilegeError):
                try:
                    self._ready()
                except Refusal as refusal:
                    self._refused = refusal
                    self._hang_up()
        return self._connection is not None

    def forget(self) -> None:
        """Be as if it had never been asked for: nothing was started that still runs."""
        self._hang_up()
        seclusion.end()

    def note(self, obstacle: str, fix: str = "") -> None:
        """Have another reason named why nothing closes the job's ports, and what would help."""
        self._note(obstacle)
        self._more_advice = fix

    def guard(self, order: Order, tell: Tell) -> Guarding:
        """Have this process guarded, with everything that it will start; `tell` gets the news while it runs.

        From then on the environment names the run (SECURERUN_RUN_ID), for guards that have no cgroup to go by, and the
        file with the job's secret, if it has one.
        Raises Refusal with the guard's reason, PrivilegeError when no guard can be spoken to, or PolicyError while this
        process is in a run with other peers, which another thread may have begun meanwhile.
        """
        self._begin_run(order)
        self._tell = tell
        try:
            answer = self._installed(order)
        except BaseException:
            _running.pop(order.policy.run_id, None)
            raise
        self._before = {name: os.environ.get(name) for name in (RUN_ID_VARIABLE, SECRET_PATH_VARIABLE)}
        os.environ[RUN_ID_VARIABLE] = order.policy.run_id
        # What is there, and not of this run, is no secret of this job. In a container the host's guard has a
        # /run of its own.
        put_back(SECRET_PATH_VARIABLE, answer.secret_path if os.access(answer.secret_path, os.R_OK) else None)
        self._listen()
        return answer

    def _begin_run(self, order: Order) -> None:
        """Be the guard of a run of this process, from before anything is installed for it. Raises PolicyError."""
        with _beginning:
            try:
                require_parted()
                require_peers_of_others(order.policy.peers)
            except PolicyError:
                self._hang_up()
                raise
            self._order = order
            _running[order.policy.run_id] = self

    def _installed(self, order: Order) -> Guarding:
        """Give the order; what stands. Raises Refusal or PrivilegeError."""
        answer = self._ordered(order)
        if answer is None:
            # It was killed in the middle of installing; another finds what it left and goes on from there.
            reason = self._connection.last_words() if self._connection else "nothing was started"
            answer = self._replace()
            if answer is None:
                raise PrivilegeError(f"the guard ended without an answer: {reason}")
        return answer

    def change_peers(self, networks: tuple[Network, ...]) -> None:
        """Have these networks let in from now on in place of the order's, by this guard and by any later one."""
        with self._change:
            if self._order is None or self._connection is None:
                return
            self._order = dataclasses.replace(
                self._order, policy=dataclasses.replace(self._order.policy, peers=networks)
            )
            self._connection.send(Peers(networks))

    def report(self) -> tuple[Mapping[str, Any], ...]:
        """Return the records of this user's runs, which only root may read unasked. May be asked again and again.

        Raises Refusal with the guard's reason, or PrivilegeError when no guard can be spoken to.
        """
        connection = self._connection if self._asked else self._ready()
        if connection is None or not connection.send(Report()):
            raise PrivilegeError("the guard ended without an answer")
        self._asked = True
        runs = self._received(connection, _ANSWER_SECONDS)
        if not isinstance(runs, Runs):
            raise PrivilegeError("the guard ended without an answer")
        found = [self._received(connection, _ANSWER_SECONDS) for _ in range(runs.count)]
        return tuple(message.record for message in found if isinstance(message, Run))

    def require_kept(self) -> None:
        """Raise Refusal when the guard had the job ended, since it could no longer keep what was ordered."""
        if self._ended is not None:
            raise self._ended

    def release(self, failed: bool) -> Released | None:
        """Say that the job is over; who was turned away, or None when no guard answers any more."""
        with self._change:
            self._releasing = Release(failed, self._goes_on)
            self._hurry.set()
            connection = self._connection
            if connection is not None:
                connection.send(self._releasing)
        if connection is not None:
            self._farewell.wait(_FAREWELL_SECONDS)
        self._part()
        return self._released

    def _part(self) -> None:
        """Put the environment back if this process is out of the job, and note it if it is not."""
        run_id = self._order.policy.run_id if self._order is not None else ""
        if not self._goes_on or _running.pop(run_id, None) is None:
            return
        stays = "its guard was gone when it ended" if self._released is None else self._released.stays
        if stays:
            _stays[run_id] = stays
            return
        self.has_parted = True
        for name, value in self._before.items():
            put_back(name, value)
        self._hang_up()

    def _start_over(self) -> None:
        """Begin with the first way that can be tried.

        A guard that this process starts itself answers, whatever is wrong, unless somebody kills it in its start. That
        says nothing of the way, and root's job would get a guard with a user's limits by the next one: so tried twice.
        """
        self._untried = [way for way in self._by() for _ in range(2 if way.name == DIRECTLY else 1)]
        self._obstacles = []
        self._try_next_way()

    def _try_next_way(self) -> None:
        """Open the next way that has no obstacle; without any, there is no connection."""
        self._hang_up()
        self._is_ready = False
        while self._untried and self._connection is None:
            way = self._untried.pop(0)
            self._current, self._way = way, way.name
            if way.obstacle:
                self._note(way.obstacle)
                continue
            if way.name != DIRECTLY:
                # Whoever has our end of the pipe orders as we do. A guard of our own user's and privilege could not
                # look into us then, and whoever has as much as that needs no pipe.
                seclusion.begin()
            try:
                with seclusion.without_forks():
                    self._connection = way.open()
                    self._way = self._connection.by or way.name
            except OSError as error:
                self._note(f"{way.name}: {error.strerror or error}")

    def _note(self, obstacle: str) -> None:
        if obstacle not in self._obstacles:
            self._obstacles.append(obstacle)

    def _try_same_way(self) -> None:
        """Open the way again by which a guard said that another may be had in a moment."""
        if self._current is not None:
            self._untried.insert(0, self._current)
        self._try_next_way()

    def _hang_up(self) -> None:
        """Once: in a forked child, and in what that forks, the numbers soon belong to descriptors of others."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _ready(self) -> Connection:
        """Return a guard that waits for its order, by the first way that leads to one.

        Raises PrivilegeError, Refusal.
        """
        deadline, pause = time.monotonic() + _BUSY_SECONDS, 0.0
        while self._connection is not None:
            if self._is_ready:
                return self._connection
            answer = self._received(self._connection, _READY_SECONDS)
            if isinstance(answer, Refused):
                if answer.another_may and self._may_go_on(answer):
                    continue
                if not answer.later or time.monotonic() > deadline:
                    raise Refusal(answer)
                # Not all at the same moments again: each by another part of the pause.
                time.sleep(pause * (1 + os.urandom(1)[0] / 255) / 2)
                pause = min(max(2 * pause, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
                self._try_same_way()
                continue
            if isinstance(answer, Ready):
                if self._way == DIRECTLY:
                    self._connection.reap()
                self._is_ready = True
                self._versions = answer.versions
                return self._connection
            self._note(f"{self._way}: {self._connection.last_words()}")
            self._try_next_way()
        if self._refused is not None:
            raise self._refused
        raise PrivilegeError(_no_way(self._obstacles, self._more_advice))

    def _ordered(self, order: Order) -> Guarding | None:
        """Give an order; what stands, or None when the guard died over it. Raises Refusal or PrivilegeError."""
        connection = self._ready()
        notes: tuple[str, ...] = ()
        if order.key is not None and not order.key.required and not self._knows_keys():
            order, notes = dataclasses.replace(order, key=None), (_KNOWS_NO_KEYS,)
        if not connection.send(order):
            return None
        answer = self._received(connection, _ANSWER_SECONDS)
        if isinstance(answer, Refused):
            if answer.another_may and self._may_go_on(answer):
                return self._ordered(order)
            if order.key is not None and not (order.key.required or answer.knows_keys):
                return self._ordered_without_key(order)
            raise Refusal(answer)
        if not isinstance(answer, Guarding):
            return None
        return dataclasses.replace(answer, notes=(*answer.notes, *notes))

    def _knows_keys(self) -> bool:
        """Whether the guard that is ready may know keys: one that does not say which versions it speaks is tried."""
        return not self._versions or VERSION_WITH_KEY in self._versions

    def _may_go_on(self, refused: Refused) -> bool:
        """Turn from a guard that this process started itself, which has too little privilege, to one of another way."""
        self._untried = [way for way in self._untried if way.name != DIRECTLY]
        self._note(f"{self._way}: {refused.message}")
        self._try_next_way()
        return self._connection is not None

    def _ordered_without_key(self, order: Order) -> Guarding | None:
        """Give the order to another guard as those from before there were keys understand it, where that will do."""
        self._start_over()
        answer = self._ordered(dataclasses.replace(order, key=None))
        return None if answer is None else dataclasses.replace(answer, notes=(*answer.notes, _KNOWS_NO_KEYS))

    def _received(self, connection: Connection, seconds: float | None) -> Message | None:
        try:
            return connection.receive(seconds)
        except ProtocolError as error:
            raise PrivilegeError(f"the guard is not of this securerun: {error}; install one version") from error

    def _replace(self) -> Guarding | None:
        """Have another guard take over what a dead one left; None when a few have died over it. Raises Refusal."""
        for _ in range(_REPLACEMENTS):
            answer = self._take_over()
            if answer is not None:
                return answer
        return None

    def _take_over(self) -> Guarding | None:
        """Start another guard over what a dead one left; None when it dies too. Raises Refusal or PrivilegeError."""
        if self._order is None:
            return None
        self._replaced.append(time.monotonic())
        self._start_over()
        return self._ordered(dataclasses.replace(self._order, adopt=True))

    def _listen(self) -> None:
        signals.start_deaf_thread(self._hear, "securerun")

    def _hear(self) -> None:
        while True:
            with contextlib.suppress(PrivilegeError):
                connection = self._connection
                message = self._received(connection, None) if connection is not None else None
                if isinstance(message, Notice):
                    self._pass_on(message)
                    continue
                if isinstance(message, Refused):
                    self._ended = Refusal(message)
                    self._pass_on(Notice(words=(message.message,)))
                    _end_job(message.status)
                    continue
                if isinstance(message, Released):
                    self._released = message
                    self._farewell.set()
                    return
            if not self._carry_on():
                self._farewell.set()
                return

    def _pass_on(self, notice: Notice) -> None:
        """Tell the caller. What is wrong with their own function is shown; the guard is heard and replaced as ever."""
        try:
            self._tell(notice)
        except Exception:
            with contextlib.suppress(Exception):  # nobody may be there to be shown it
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def _carry_on(self) -> bool:
        """After a guard's death: have another take over, and say so; False when none has once the job is over."""
        obstacle, said = self._why_to_pause(), False
        while True:
            if obstacle and not said:
                self._pass_on(Notice(words=(_every_now_and_then(obstacle),)))
                said = True
            if obstacle and not self._may_try_again():
                return False
            try:
                answer = self._take_over_and_let_go()
            except (SecurerunError, OSError) as error:  # this process may have no descriptor left for a moment
                obstacle = f"the guard died and no other can take over: {error}"
                continue
            if answer is not None:
                self._pass_on(Notice(words=("the guard died; another has taken over", *answer.notes)))
                return True
            obstacle = self._why_to_pause()

    def _may_try_again(self) -> bool:
        """Wait for the next try, or until the job is over; False when the one try that there is after that was made."""
        if self._tried_last:
            return False
        self._hurry.wait(_PAUSE_SECONDS)
        self._tried_last = self._releasing is not None
        return True

    def _take_over_and_let_go(self) -> Guarding | None:
        """Have another guard take over, and tell it at once if the job is over by now."""
        with self._change:
            answer = self._take_over()
            if answer is not None and self._releasing is not None and self._connection is not None:
                self._connection.send(self._releasing)
            return answer

    def _why_to_pause(self) -> str:
        tried = len(self._replaced) == _REPLACEMENTS and time.monotonic() - self._replaced[0] < _REPLACEMENTS_SECONDS
        return "guards die again and again" if tried else ""


def put_back(variable: str, value: str | None) -> None:
    """Have a variable of the environment be as it was; None where there was none."""
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def require_parted() -> None:
    """Raise PolicyError in a process that is still in a run of its own which has ended.

    What it starts now would be behind the layers of that one as well, which know other peers.
    """
    for run_id, why in _stays.items():
        raise PolicyError(
            f"run {run_id} of this process has ended, and the process cannot leave it: {why}; start each run in a "
            "process of its own"
        )


def peers_in_force() -> Mapping[str, tuple[Network, ...]]:
    """Return the peers of the runs that this process began and that have not ended, by their ids."""
    guards = dict(_running)
    return {run_id: guard._order.policy.peers for run_id, guard in guards.items() if guard._order is not None}


def require_peers_of_others(peers: Collection[Network]) -> None:
    """Raise PolicyError while this process has a run with other peers, of which these are not a part."""
    for run_id, theirs in peers_in_force().items():
        if not are_within(peers, theirs):
            raise PolicyError(in_the_way(run_id))


def are_within(peers: Iterable[Network], others: Collection[Network]) -> bool:
    """Whether whoever is one of the peers is one of the others as well."""
    return collapse((*peers, *others)) == collapse(others)


def in_the_way(run_id: str) -> str:
    """Say that a run of this process keeps another one with other peers from being started in it."""
    return (
        f"run {run_id} of this process has not ended and has other peers; wait for its end, or start each run in a "
        "process of its own"
    )


def _every_now_and_then(obstacle: str) -> str:
    return f"{obstacle}; what stands stays, and another guard is tried every {_PAUSE_SECONDS:.0f} s"


def _end_job(status: int) -> None:
    """Have the main thread end its job as by a batch system's SIGTERM; where it would not hear of it, end at once."""
    heard = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    if not heard and not _is_waited_for(signal.SIGTERM):
        os._exit(status)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_waited_for(number: int) -> bool:
    """Return whether the main thread takes this signal when it likes, as by linux/child.py; also if nobody can tell."""
    try:
        return number - 1 in proc.status(os.getpid()).bits("SigBlk")
    except OSError:
        return True


def _no_way(obstacles: list[str], more: str) -> str:
    """Several lines, since there are several ways, and each takes another person."""
    from securerun.host.account import name_of

    nothing = f"no guard is available to user {name_of(os.getuid())}"
    if not proc.governs_network():
        nothing = "no guard is available in this user namespace"
    return "\n".join(
        [
            f"{nothing}, so nothing was started. One of these gives one:",
            *advice(),
            *([f"  for a job of one node it takes no guard: {more}"] if more else []),
            f"Tried: {'; '.join(obstacles)}",
        ]
    )
