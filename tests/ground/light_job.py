"""A job without torch, for tests that kill: a launcher with a lease, and children that listen.

    light_job.py --run-id ID --lifeline FIFO [--peers A,B] [--port N] [--firewall B] [--scope S] [--grace S]
                 [--key FILE] [--naked]

The launcher holds its lease through `securerun.guarded`. On standard output it and its children write one JSON
object a line:

    {"mark": "before policy"}       a guard is up, and waits for its order
    {"mark": "guarded"}             the lease stands, nothing listens yet
    {"mark": "rendezvous"}          the first child listens, on the planned port
    {"mark": "training"}            all children listen
    {"mark": "restart"}             the children are being replaced
    {"mark": "release"}             the job is over, the lease is being given back
    {"child": ROLE, "pid": N, "port": N}
    {"news": TEXT}                  what the guard said, at the start and while the job ran

Each has "at", the monotonic clock's time.

At each of the first four it waits for a line on its standard input: `go`; in training `restart`, `end` or `fail`. A
child that ends unasked makes the job fail, and so does the end of the launcher's input. A child ends when it is told
to or when the last writer of the fifo is gone, so nothing outlives whoever tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a child starts in 15 ms without these
    import argparse
    from types import FrameType

    from securerun.firewall.policy import Policy
    from securerun.guard.protocol import Notice

PORT = 29500
# Who listens where; port 0 is one that the kernel chooses, 60000 and up lie in its range and in the port plan.
CHILDREN = {
    "planned": ("::", PORT),
    "ipv4": ("0.0.0.0", 0),  # noqa: S104 - what a stranger is to try
    "hccl": ("0.0.0.0", 60000),  # noqa: S104
    "orphan": ("::", 0),
    "stubborn": ("::", 0),
    "forked": ("::", 0),
}
_LOOK_MILLISECONDS = 100
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class JobFailed(Exception):
    """The job is over, and did not end well."""


class Launcher:
    """The children of one job, and the conversation with whoever tests."""

    def __init__(self, lifeline: str) -> None:
        self._lifeline = lifeline
        self._children: dict[str, Child] = {}

    def run(self) -> None:
        """The job, from the first listener to the end that it is told to have."""
        self.pause("guarded")
        self._start("planned")
        self.pause("rendezvous")
        # As torchrun does from the moment that it has workers: one of these ends the job and unwinds.
        for number in ENDING_SIGNALS:
            signal.signal(number, _end_by_signal)
        self._start(*(role for role in CHILDREN if role != "planned"))
        while True:
            order = self.pause("training")
            if order == "end":
                self._end_children()
                return
            if order != "restart":
                raise JobFailed(f"told to {order or 'end without a word'}")
            _say(mark="restart")
            self._end_children()
            self._start(*CHILDREN)

    def pause(self, mark: str) -> str:
        """Say where the job is and wait for a line, or for the end of a child, which ends the job."""
        _say(mark=mark)
        poller = select.poll()
        poller.register(sys.stdin, select.POLLIN)
        for child in self._children.values():
            poller.register(child.pidfd, select.POLLIN)
        ready: set[int] = set()
        while not ready:
            # Not for ever: a signal that comes just before the system call has its handler run after it.
            ready = {descriptor for descriptor, _ in poller.poll(_LOOK_MILLISECONDS)}
        for role, child in self._children.items():
            if child.pidfd in ready:
                raise JobFailed(f"the child {role} ended")
        return sys.stdin.readline().strip()

    def _start(self, *roles: str) -> None:
        """Start children; return when all of them listen."""
        ready, starting = os.pipe()
        for role in roles:
            child = _start_child(role, self._lifeline, ready, starting)
            if role == "orphan":
                os.waitpid(child.pid, 0)
                os.close(child.pidfd)
            else:
                self._children[role] = child
        os.close(starting)
        with open(ready) as listening:  # noqa: PTH123 - a descriptor
            heard = listening.readlines()
        if len(heard) != len(roles):
            raise JobFailed("a child ended before it listened")

    def _end_children(self) -> None:
        """SIGTERM, and for the one that ignores it SIGKILL; the orphan is out of reach, as under torchrun."""
        for child in self._children.values():
            signal.pidfd_send_signal(child.pidfd, signal.SIGTERM)
        for role, child in self._children.items():
            if role == "stubborn":
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            os.close(child.pidfd)
        self._children.clear()


class Child:
    """One child of the launcher's, by pid and pidfd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)


def main() -> None:
    options = _parse()
    launcher = Launcher(options.lifeline)
    if options.naked:
        launcher.run()
        return
    import securerun

    _mark_moments(launcher)
    with securerun.guarded(
        _policy(options),
        firewall=options.firewall,
        scope=options.scope,
        grace=options.grace,
        tell=_tell,
        key=options.key,
    ) as guarding:
        for note in guarding.notes:
            _say(news=note)
        launcher.run()


def _mark_moments(launcher: Launcher) -> None:
    """Let the tester in between the guard's start and its order, and tell when the lease is being given back."""
    from securerun.guard.protocol import Guarding, Order, Released
    from securerun.protection import client

    class MarkedGuard(client.Guard):
        def guard(self, order: Order, tell: Callable[[Notice], None]) -> Guarding:
            launcher.pause("before policy")
            return super().guard(order, tell)

        def release(self, failed: bool) -> Released | None:
            _say(mark="release")
            return super().release(failed)

    client.Guard = MarkedGuard  # type: ignore[misc]


def _parse() -> argparse.Namespace:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--lifeline", required=True, help="a fifo; its end is the children's")
    parser.add_argument("--peers", default="")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--firewall", default="auto")
    parser.add_argument("--scope", default="auto")
    parser.add_argument("--grace", type=float, default=0.5)
    parser.add_argument("--key", default="off", help="a file; who shows the tag of its key comes in")
    parser.add_argument("--naked", action="store_true", help="no lease: what a stranger reaches then is the control")
    options = parser.parse_args()
    CHILDREN["planned"] = ("::", options.port)
    return options


def _policy(options: argparse.Namespace) -> Policy:
    import ipaddress

    from securerun.firewall.policy import Policy, PortRange
    from securerun.linux.networks import collapse

    ports = (PortRange(options.port, options.port, "master port"), PortRange(60000, 60015, "HCCL"))
    peers = collapse(ipaddress.ip_network(peer) for peer in options.peers.split(",") if peer)
    return Policy(options.run_id, ports, peers)


def _tell(notice: Notice) -> None:
    for line in notice.words:
        _say(news=line)


def _end_by_signal(number: int, _frame: FrameType | None) -> None:
    raise JobFailed(f"signal {number}")


def _start_child(role: str, lifeline: str, ready: int, starting: int) -> Child:
    """A child that says on `starting` when it listens."""
    if role == "forked":
        # As multiprocessing forks a DataLoader's workers: with all that the launcher has open.
        pid = os.fork()
        if pid:
            return Child(pid)
        with contextlib.suppress(BaseException):
            os.close(ready)
            listen(role, lifeline, starting)
        os._exit(1)
    address, port = CHILDREN[role]
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, "listen", role, address, str(port), lifeline, str(starting)],
        stdin=subprocess.DEVNULL,
        pass_fds=[starting],
        # One stays in the launcher's process group, as all did under torch 2.1.
        start_new_session=role != "planned",
    )
    pinned = Child(child.pid)
    child.returncode = 0  # waited for by pid, not by subprocess
    return pinned


def listen(role: str, lifeline: str, starting: int) -> None:
    """A child's life: listen, say so, and wait for the end."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if role == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if role == "orphan":
        _leave_the_family()
    with _listener(*CHILDREN[role]) as server:
        _say(child=role, pid=os.getpid(), port=server.getsockname()[1])
        os.write(starting, b".\n")
        os.close(starting)
        _wait_for_the_end_of(lifeline)


def _leave_the_family() -> None:
    """What a daemon does: a session of its own, and init for a parent."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


@contextlib.contextmanager
def _listener(address: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((address, port))
        server.listen(1024)
        yield server


def _wait_for_the_end_of(lifeline: str) -> None:
    # Without O_NONBLOCK the open itself would wait, for ever if the last writer has gone already (fifo(7)).
    descriptor = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    while True:
        with contextlib.suppress(BlockingIOError):
            if not os.read(descriptor, 1):
                return
        select.select([descriptor], [], [])


def _say(**fields: object) -> None:
    # One write, so that the lines of several processes do not mix (pipe(7), PIPE_BUF).
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps({**fields, "at": time.monotonic()}).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["listen"]:
        _, _, own_role, own_address, own_port, fifo, announcement = sys.argv
        CHILDREN[own_role] = (own_address, int(own_port))
        listen(own_role, fifo, int(announcement))
    else:
        main()
