"""The launcher's side of the guard: start it, give it its order, hear what stands, and let it go."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from securerun.errors import PrivilegeError, SecurerunError
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

_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
# -I: a `socket.py` in the working directory, PYTHONPATH and the user's site-packages are not for the guard.
# -S: it needs the standard library alone, and site-packages' start-up files take longer than all of its own.
# The package's directory comes last on the path, so that nothing beside it can stand in for the standard library.
_START = "import sys; sys.path.append(sys.argv[1]); from securerun.guard.server import main; sys.exit(main())"
_ANSWER_SECONDS = 120.0
_FAREWELL_SECONDS = 5.0


class Refusal(SecurerunError):
    """The guard's own refusal, with the status and the words that it gave."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.status = refused.status


class Guard:
    """A guard process of our own, waiting for its order. Started early: it comes up while torch is being imported."""

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
        # A worker that is forked, not spawned, must not keep the guard's input open after the launcher's end.
        os.register_at_fork(after_in_child=self._forget)

    def guard(self, order: Order) -> Guarding:
        """Have this process guarded, with everything that it will start.

        Raises Refusal with the guard's reason, or PrivilegeError when the guard cannot be spoken to.
        """
        self._send(order)
        answer = self._receive(_ANSWER_SECONDS)
        if isinstance(answer, Guarding):
            return answer
        if isinstance(answer, Refused):
            raise Refusal(answer)
        raise PrivilegeError(f"the guard ended without an answer: {self._last_words()}")

    def release(self, failed: bool) -> Released | None:
        """Say that the job is over; who was turned away, or None when the guard does not answer any more."""
        with contextlib.suppress(SecurerunError):
            self._send(Release(failed))
            answer = self._receive(_FAREWELL_SECONDS)
            return answer if isinstance(answer, Released) else None
        return None

    def _send(self, message: Order | Release) -> None:
        data = encode(message)
        try:
            while data:
                data = data[os.write(self._orders, data) :]
        except OSError as error:
            raise PrivilegeError(f"the guard is gone: {self._last_words()}") from error

    def _receive(self, seconds: float) -> Message | None:
        """The guard's next message; None when it ended or says nothing within the time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            remaining = max(0.0, deadline - time.monotonic())
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

    def _last_words(self) -> str:
        """The last line of a dead guard's standard error."""
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        lines = os.read(self._words, 65536).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"

    def _forget(self) -> None:
        for descriptor in (self._orders, self._answers, self._words):
            with contextlib.suppress(OSError):
                os.close(descriptor)
