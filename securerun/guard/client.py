"""The launcher's side of the guard: start it, give it its order, hear from it, replace it when it dies, let it go."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

from securerun.errors import PrivilegeError, SecurerunError
from securerun.firewall.policy import Policy
from securerun.guard.processes import RUN_ID_VARIABLE
from securerun.guard.protocol import (
    MAXIMUM_BYTES,
    Guarding,
    Message,
    Notice,
    Order,
    ProtocolError,
    Refused,
    Release,
    Released,
    decode,
    encode,
)

_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
# -I: a `socket.py` in the working directory, PYTHONPATH and the user's site-packages are not for the guard.
# -S: it needs the standard library alone, and site-packages' start-up files take longer than all of its own.
# The package's directory comes last on the path, so that nothing beside it can stand in for the standard library.
_START = "import sys; sys.path.append(sys.argv[1]); from securerun.guard.server import main; sys.exit(main())"
_ANSWER_SECONDS = 120.0
_FAREWELL_SECONDS = 5.0
# Guards that die again and again are being killed by somebody; that has to be said, not fought.
_REPLACEMENTS = 5
DEFAULT_GRACE_SECONDS = 10.0

Tell = Callable[[Notice], None]


class Refusal(SecurerunError):
    """The guard's own refusal, with the status and the words that it gave."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.status = refused.status


class GuardProcess:
    """One guard process of our own, and the pipes to it."""

    def __init__(self) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        # Not the launcher's standard error: a guard that held it would keep `2>&1 | tee` waiting.
        self._words, words = os.pipe()
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
            [sys.executable, "-I", "-S", "-c", _START, _PACKAGE_PARENT],
            stdin=orders,
            stdout=answers,
            stderr=words,
            start_new_session=True,
        )
        for theirs in (orders, answers, words):
            os.close(theirs)
        self._pending = b""

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def send(self, message: Message) -> bool:
        """Write a message; False when nobody is there to read it."""
        data = encode(message)
        try:
            while data:
                data = data[os.write(self._orders, data) :]
        except OSError:
            return False
        return True

    def receive(self, seconds: float | None) -> Message | None:
        """The guard's next message; None when it has ended, or says nothing within the time.

        Raises PrivilegeError for what this version of securerun does not understand.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._pending:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._answers], [], [], remaining)[0]:
                return None
            chunk = os.read(self._answers, 65536)
            if not chunk or len(self._pending) > MAXIMUM_BYTES:
                return None
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            return decode(line)
        except ProtocolError as error:
            raise PrivilegeError(f"the guard is not of this securerun: {error}; install one version") from error

    def last_words(self) -> str:
        """The last line of a dead guard's standard error."""
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        lines = os.read(self._words, 65536).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {status}"

    def close(self) -> None:
        """Close the pipes; a guard that holds a lease takes the end of its input for the launcher's."""
        for descriptor in (self._orders, self._answers, self._words):
            with contextlib.suppress(OSError):
                os.close(descriptor)


class Guard:
    """The guard of one job, whichever process it is at the time.

    Made early: the process comes up while torch is being imported, and installs nothing before it has its order.
    """

    def __init__(self) -> None:
        self._process = GuardProcess()
        self._order: Order | None = None
        self._tell: Tell = lambda _: None
        self._replaced = 0
        self._change = threading.Lock()
        self._farewell = threading.Event()
        self._released: Released | None = None
        self._releasing: Release | None = None
        # A worker that is forked, not spawned, must not keep the guard's input open after the launcher's end.
        os.register_at_fork(after_in_child=lambda: self._process.close())

    def guard(self, order: Order, tell: Tell) -> Guarding:
        """Have this process guarded, with everything that it will start; `tell` gets the news while it runs.

        From then on the environment names the run (SECURERUN_RUN_ID), for guards that have no cgroup to go by.
        Raises Refusal with the guard's reason, or PrivilegeError when no guard can be spoken to.
        """
        self._order, self._tell = order, tell
        answer = self._ordered(order)
        if answer is None:
            # It was killed in the middle of installing; another finds what it left and goes on from there.
            reason = self._process.last_words()
            answer = self._replace()
            if answer is None:
                raise PrivilegeError(f"the guard ended without an answer: {reason}")
        os.environ[RUN_ID_VARIABLE] = order.policy.run_id
        self._listen()
        return answer

    def release(self, failed: bool) -> Released | None:
        """Say that the job is over; who was turned away, or None when no guard answers any more."""
        with self._change:
            self._releasing = Release(failed)
            self._process.send(self._releasing)
        self._farewell.wait(_FAREWELL_SECONDS)
        return self._released

    def _ordered(self, order: Order) -> Guarding | None:
        """Give an order; what stands, or None when the guard died over it. Raises Refusal."""
        if not self._process.send(order):
            return None
        answer = self._process.receive(_ANSWER_SECONDS)
        if isinstance(answer, Refused):
            raise Refusal(answer)
        return answer if isinstance(answer, Guarding) else None

    def _replace(self) -> Guarding | None:
        """Start another guard over what a dead one left; None when that has failed too often. Raises Refusal."""
        if self._order is None:
            return None
        while self._replaced < _REPLACEMENTS:
            self._replaced += 1
            self._process.close()
            self._process = GuardProcess()
            answer = self._ordered(dataclasses.replace(self._order, adopt=True))
            if answer is not None:
                return answer
        return None

    def _listen(self) -> None:
        """Listen in a thread of its own. Signals are the main thread's: blocked there, they would be handled late."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        threading.Thread(target=self._hear, name="securerun", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _hear(self) -> None:
        while True:
            with contextlib.suppress(PrivilegeError):
                message = self._process.receive(None)
                if isinstance(message, Notice):
                    self._tell(message)
                    continue
                if isinstance(message, Released):
                    self._released = message
                    self._farewell.set()
                    return
            if not self._carry_on():
                self._farewell.set()
                return

    def _carry_on(self) -> bool:
        """After a guard's death: have another take over, and say so; False when that is not to be."""
        with self._change:
            try:
                answer = self._replace()
            except SecurerunError as error:
                self._tell(Notice(words=(f"the guard died and no other can take over: {error}",)))
                return False
            if answer is None:
                self._tell(Notice(words=("guards die again and again; what stands stays, but nobody looks after it",)))
                return False
            if self._releasing is not None:
                self._process.send(self._releasing)
        self._tell(Notice(words=("the guard died; another has taken over", *answer.notes)))
        return True


@contextlib.contextmanager
def guarded(
    policy: Policy,
    *,
    firewall: str = "auto",
    scope: str = "auto",
    grace: float = DEFAULT_GRACE_SECONDS,
    command: str = "",
    tell: Tell = lambda _: None,
) -> Iterator[Guarding]:
    """Hold a lease on this process, and on all that it starts within the block, for a policy.

    grace: seconds between SIGTERM and SIGKILL for what is left when the block raises or this process is killed.
    Raises PrivilegeError, with nothing installed, when the job cannot be guarded.
    """
    guard = Guard()
    guarding = guard.guard(Order(policy, firewall, scope, grace, command), tell)
    failed = True
    try:
        yield guarding
        failed = False
    finally:
        guard.release(failed)
