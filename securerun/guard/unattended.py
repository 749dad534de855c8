"""What a guard does that no launcher hears: notices go by Slurm's `scontrol notify`, and Slurm is asked for the peers.

A job of Slurm's has no launcher of ours where its Prolog or TaskProlog ordered the guard. Who is turned away, and what
else a person should know, then stands in the system's log, and a line a minute in the job's own output. Slurm's word is
asked for: that the job is the user's, before anything is said to it, and where its nodes are, so that one that was
given back is let in no more. All of that is another program's, started without a capability and never waited for.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from typing import Callable

from securerun.firewall.policy import Denial
from securerun.guard import program
from securerun.guard.documents import MAXIMUM_BYTES, ProtocolError
from securerun.guard.lease import Lease
from securerun.guard.protocol import Message, Notice, Peers, decode
from securerun.guard.slurm_job import SlurmJob
from securerun.linux import capabilities
from securerun.linux import slurm as commands
from securerun.text import count, printable

# scontrol(1): a line to the standard error of the job's srun or batch script.
_NOTICE_SECONDS = 60.0
_MOST_LINES = 8
_LINE_CHARACTERS = 300
# slurmctld has better things to do: 1,000 nodes of a job ask it so often.
_PEERS_SECONDS = 1800.0
# And as often where somebody was turned away who may be a node of the job by another address.
_HURRIED_SECONDS = 120.0
# Where nothing of a whole job runs here, and no epilog has let go of it.
_OVER_SECONDS = 300.0
_PROGRAM_SECONDS = 30.0
# Of a job that has not left its nodes; scontrol(1) adds others after a `+`.
_HERE = re.compile(r"\sJobState=(RUNNING|SUSPENDED|CONFIGURING|COMPLETING|STOPPED|SIGNALING|RESIZING|STAGE_OUT)\b")
_STATE = re.compile(r"\sJobState=[A-Z]")
_UNKNOWN_JOB = "Invalid job id specified"
_OWNER = re.compile(r"\sUserId=[^\s(]*\(([0-9]{1,10})\)")

Log = Callable[[str], None]


class Unattended:
    """In the place of a launcher: it says nothing but the peers that Slurm names now, and passes on what it hears.

    As the watch's orders, and as what it sends to.
    """

    def __init__(self, lease: Lease, job: SlurmJob, log: Log) -> None:
        self._lease = lease
        self._job = job
        # A package of the guard alone has not got what asks.
        self._renews = job.renews and program.PACKAGE.joinpath("slurm.py").exists()
        self._log = log
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._left_out = 0
        self._notice_due = 0.0
        self._is_owner: bool | None = None
        began = time.monotonic()
        self._over_due = began + _OVER_SECONDS
        self._hurried = False
        # While the one before this was dead the nodes may have become others.
        self._asked = began - _PEERS_SECONDS if lease.order.adopt else began
        if lease.order.adopt:
            log(f"run {lease.policy.run_id}: its guard was killed, and this one goes on")
        self._running: _Program | None = None
        self._peers: Peers | None = None
        # Nobody is at the other end, and it is held open.
        self.descriptor, self._other_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.ended = False

    def read(self) -> Message | None:
        """Return the peers that Slurm names, where they are others than before."""
        peers, self._peers = self._peers, None
        return peers

    def send(self, message: Message) -> None:
        """Take what a launcher would have heard: news go to the log and, a line a minute, to the job."""
        if not isinstance(message, Notice):
            return
        lines = [*map(_of_denial, message.denied)]
        if message.more:
            lines.append(f"turned away: {count(message.more, 'more source')} in the last minute")
        for line in lines:
            self._log(f"run {self._lease.policy.run_id}: {line}")
        self._hurried = self._hurried or bool(lines)
        if not self._job.speaks:
            return
        for line in (*lines, *message.words):
            if len(self._lines) == _MOST_LINES:
                self._left_out += 1
            self._lines.append(line)

    def look(self) -> None:
        """Do what is due: hear a program out that has ended, else start the next one."""
        if self._running is not None:
            if not self._running.has_ended():
                return
            running, self._running = self._running, None
            running.then(running.output())
        now = time.monotonic()
        if self._lines and now >= self._notice_due:
            self._notify(now)
        elif self._job.is_whole and now >= self._over_due:
            self._over_due = now + _OVER_SECONDS
            self._ask_whether_it_is_over()
        elif self._renews and now >= self._asked + (_HURRIED_SECONDS if self._hurried else _PEERS_SECONDS):
            self._asked, self._hurried = now, False
            self._run(self._ask_for_peers(), self._take_peers)

    def _notify(self, now: float) -> None:
        """Tell the job the oldest line, and how many more there are; first ask whose the job is."""
        scontrol = commands.find_scontrol()
        if scontrol is None or self._is_owner is False:
            self._lines.clear()
            return
        if self._is_owner is None:
            self._run([scontrol, "--oneliner", "show", "job", str(self._job.number)], self._take_owner)
            return
        line = printable(self._lines.popleft()[:_LINE_CHARACTERS])
        more = len(self._lines) + self._left_out
        self._lines.clear()
        self._left_out = 0
        self._notice_due = now + _NOTICE_SECONDS
        rest = f" (and {count(more, 'line')} more in the log of this node)" if more else ""
        words = f"securerun on {os.uname().nodename}: run {self._lease.policy.run_id}: {line}{rest}"
        self._run([scontrol, "notify", str(self._job.number), words], lambda _: None)

    def _take_owner(self, answer: str) -> None:
        """Note whether the job is the user's: an ordinary user's order may name any. Without an answer, ask again."""
        owner = _OWNER.search(answer)
        if owner is None and _UNKNOWN_JOB not in answer:
            self._notice_due = time.monotonic() + _NOTICE_SECONDS
            return
        self._is_owner = owner is not None and int(owner[1]) == self._lease.caller.user
        if not self._is_owner:
            self._log(
                f"run {self._lease.policy.run_id}: nothing is said to job {self._job.number} of Slurm's, which is not "
                f"known to be user {self._lease.caller.user}'s"
            )

    def _ask_whether_it_is_over(self) -> None:
        """Let go of a job that Slurm says has ended, where there is no epilog that does."""
        scontrol, cgroup = commands.find_scontrol(), self._lease.cgroup
        if scontrol is not None and cgroup is not None and not cgroup.populated():
            self._run([scontrol, "--oneliner", "show", "job", str(self._job.number)], self._take_state)

    def _take_state(self, answer: str) -> None:
        has_left = _STATE.search(answer) is not None and _HERE.search(answer) is None
        if (has_left or _UNKNOWN_JOB in answer) and self._lease.cgroup is not None:
            self._lease.cgroup.remove()

    def _ask_for_peers(self) -> list[str]:
        more = ["--peers", self._job.more] if self._job.more else []
        return program.of_slurm("peers", str(self._job.number), str(self._lease.caller.user), *more)

    def _take_peers(self, answer: str) -> None:
        """Take the peers that Slurm's job has now; without an answer that is understood, those of before stay."""
        try:
            message = decode(answer.strip().encode()) if answer.strip() else None
        except ProtocolError:
            message = None
        if isinstance(message, Peers) and message.networks and set(message.networks) != set(self._lease.policy.peers):
            self._peers = message

    def _run(self, command: Sequence[str], then: Callable[[str], None]) -> None:
        # SubprocessError: it could be started, and not give up its privilege.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self._running = _Program(command, then)


class _Program:
    """A program that runs beside the watch, and is killed where it takes too long."""

    def __init__(self, command: Sequence[str], then: Callable[[str], None]) -> None:
        """Start it. then: takes what it printed. Raises OSError, or SubprocessError where it keeps a privilege."""
        self.then = then
        self._until = time.monotonic() + _PROGRAM_SECONDS
        self._output = os.memfd_create("output")
        try:
            self._process = subprocess.Popen(  # noqa: S603 - absolute paths of root's, arguments of ours
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=commands.environment(),
                start_new_session=True,
                preexec_fn=_give_up_privilege,
            )
        except BaseException:
            os.close(self._output)
            raise

    def has_ended(self) -> bool:
        """Return whether it has ended; it is killed when its time is over."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() > self._until:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return False

    def output(self) -> str:
        """Return what it printed, on standard error as well, as far as that is not more than anything of Slurm's."""
        try:
            return os.pread(self._output, MAXIMUM_BYTES, 0).decode("utf-8", "replace")
        finally:
            os.close(self._output)


def _give_up_privilege() -> None:
    capabilities.keep_only(())  # nor does execve(2) give any back


def _of_denial(denial: Denial) -> str:
    return f"turned away: {denial.source} at port {denial.port} ({count(denial.packets, 'attempt')})"
