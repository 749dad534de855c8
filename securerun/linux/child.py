"""A child that stands for this process: what is meant for us is passed on to it, and as it ends, we end.

`run` is for a command, to everyone else as if this process had become it. It shares our process group, terminal and
standard streams, so what is meant for all of the group (Ctrl-C, `timeout`, `kill -TERM -GROUP`) reaches it without us;
what is sent to us alone we pass on. When it stops, we stop. An exec would be simpler, but nobody except a parent learns
how a process ended (wait(2)).

`go_on_apart` is for whoever is to become another user, as `su -c` does it: the child has a session of its own without
a terminal, so what is meant for all of our group is passed on to all of its.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from securerun.linux import prctl, proc, terminals

_EVERY = signal.valid_signals()
# Python ignores these; what it starts is not to (signal(7): an ignored signal stays so across execve).
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_JOB_CONTROL = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_CAT = Path("/bin/cat")
# Who ends a batch job or a service signals its processes one after the other.
_FOR_ALL_SECONDS = 0.1
_LOOK_SECONDS = 0.005


def become(program: str, arguments: Sequence[str]) -> NoReturn:
    """Run a program in place of this one. Raises OSError when that cannot be."""
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    os.execve(program, list(arguments), os.environ)  # noqa: S606 - what the user asked for; no shell


def run(program: str, arguments: Sequence[str]) -> int:
    """Run a program to its end, and return how it ended (wait(2), status). Raises OSError when it cannot be started.

    From here on every signal is for the program: all of them are blocked in this thread, also afterwards.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it is not told of ends
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _EVERY)
    bystanders = _Bystanders()
    try:
        pid = os.posix_spawn(program, list(arguments), os.environ, setsigmask=before, setsigdef=_IGNORED_BY_PYTHON)
        return _wait_for(pid, bystanders)
    finally:
        bystanders.end()


def end_as(status: int) -> NoReturn:
    """End as a process ended that had this wait status: with its exit status, or by its signal."""
    _flush()
    if os.WIFSIGNALED(status):
        _end_by(os.WTERMSIG(status))
    sys.exit(_exit_status(status))


def go_on_apart() -> int:
    """Go on in a child that has a session of its own and no terminal; returns, in the child alone, its parent's id.

    This process stays behind: it passes signals on, stops for Ctrl-Z together with the child, and ends as the child
    ends, at once, since all that was to be done at the end of this program is the child's to do now. Raises OSError
    when there can be no child, or it cannot leave its terminals, and RuntimeError for a process of several threads: one
    of them would take the signals, and the child would have the locks that the others held.
    """
    if proc.own_threads() > 1:
        raise RuntimeError(f"this process has {proc.own_threads()} threads")
    _flush()
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _EVERY)
    bystanders = _Bystanders()
    pid = os.fork()
    if pid == 0:
        try:
            bystanders.forget()
            terminals.leave()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return parent
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = _wait_for(pid, bystanders)
        bystanders.end()
        if os.WIFSIGNALED(status):
            _end_by(os.WTERMSIG(status))
        os._exit(_exit_status(status))
    finally:  # whatever it was: the program that called us goes on in the child and nowhere else
        os._exit(1)


def end_with(parent: int) -> None:
    """Have this process killed when its parent is: whoever kills what stands for a job means the job."""
    prctl.set_signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _exit_status(status: int) -> int:
    """Return what a shell says of a process that ended like this."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _wait_for(pid: int, bystanders: _Bystanders) -> int:
    """Wait for a child's end, passing signals on; its wait status."""
    while True:
        received = signal.sigwaitinfo(_EVERY)
        number = received.si_signo
        if number == signal.SIGCHLD:
            for status in _changes(pid):
                if not os.WIFSTOPPED(status):
                    return status
                _stop_by(os.WSTOPSIG(status))
        elif received.si_pid != pid:
            with contextlib.suppress(PermissionError):  # root of a container may be without CAP_KILL
                _pass_on(number, pid, bystanders)


def _pass_on(number: int, pid: int, bystanders: _Bystanders) -> None:
    """Send a signal on to a child that did not get it: to the child alone, or to all of its group as to all of ours."""
    if os.getsid(pid) == os.getsid(0):
        if not (_is_of_our_group(pid) and bystanders.were_sent(number)):
            os.kill(pid, number)
        return
    for_all = bystanders.were_sent(number)
    if number in _JOB_CONTROL:
        # A group without a terminal is not stopped by these (setpgid(2), orphaned), but by this it is.
        if signal.getsignal(number) != signal.SIG_IGN:
            os.killpg(pid, signal.SIGSTOP)
            _stop_by(number)
    elif for_all or number == signal.SIGCONT:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)


def _changes(pid: int) -> Iterator[int]:
    """Yield the wait statuses that are there now: one SIGCHLD may stand for several."""
    while True:
        changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not changed:
            return
        yield status


def _is_of_our_group(pid: int) -> bool:
    """Return whether signals to our group reach the child; an interactive shell makes a group of its own."""
    return os.getpgid(pid) == os.getpgrp()


def _stop_by(number: int) -> None:
    """Stop as the child did, so that the shell sees it; go on when we are continued.

    Not for SIGSTOP: somebody who stops a process and continues it does not know of us.
    """
    if number in _JOB_CONTROL:
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})


def _flush() -> None:
    """Write what is buffered; Python would end with status 120 where nobody reads it (Py_FinalizeEx)."""
    for name in ("stdout", "stderr"):
        try:
            if getattr(sys, name) is not None:
                getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, None)


def _end_by(number: int) -> None:
    """End by a signal: a shell tells an interrupted command from one that failed, and ends its loop only then.

    Returns for the first process of a container, which is not ended like this.
    """
    # One core file, the command's, is enough.
    prctl.set_dumpable(False)
    with contextlib.suppress(OSError):  # SIGKILL has no other disposition
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


class _Bystanders:
    """Processes of our group that nobody has a reason to signal by themselves: what they got, all of us got.

    A signal tells of itself once by each of them, so after one that did there is a new one; the one before stays for
    signals that followed at once, as SIGTERM follows SIGCONT when Slurm cancels a job.
    """

    def __init__(self) -> None:
        self._present = [_Bystander()]

    def were_sent(self, number: int) -> bool:
        """Return whether this signal was for all of the group; each is told of once."""
        deadline = time.monotonic() + _FOR_ALL_SECONDS
        while True:
            told = [bystander for bystander in self._present if bystander.tells_of(number)]
            if told:
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        if self._present[-1] in told:
            self._present.append(_Bystander())
        # A signal that waits for us may be one that only an earlier one got.
        if not signal.sigpending():
            for bystander in self._present[:-2]:
                bystander.end()
            self._present = self._present[-2:]
        return True

    def end(self) -> None:
        """End them."""
        for bystander in self._present:
            bystander.end()

    def forget(self) -> None:
        """Let go of what is another process', in a child of it."""
        for bystander in self._present:
            bystander.forget()


class _Bystander:
    """It blocks every signal, so what it was sent stays pending, and reads our pipe, so it ends when we do."""

    def __init__(self) -> None:
        read, self._pipe = os.pipe()
        # Images without a shell have no cat either.
        command = [str(_CAT)] if _CAT.exists() else [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
        try:
            self._pid = os.posix_spawn(
                command[0],
                command,
                {},
                setsigmask=_EVERY,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, read, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
            )
        finally:
            os.close(read)
        self._told: set[int] = set()

    def tells_of(self, number: int) -> bool:
        """Return whether it was sent this signal and has not told so before."""
        if number in self._told:
            return False
        if number - 1 not in proc.status(self._pid).bits("ShdPnd"):
            return False
        self._told.add(number)
        return True

    def end(self) -> None:
        """End it."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._pipe)

    def forget(self) -> None:
        """Have it end with the other process that has our end of the pipe."""
        os.close(self._pipe)
