"""What an ordinary machine has for networks of a user's own, and a test machine lacks: a tunnel, and names by files.

make_ordinary(machine)           before its users start anything
with Job(machine, node, alice) as job:
    job.port                     on which it listens, over both families
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from checkout import COMMANDS
from hosts import Host, eventually, finish, is_alive, kill_group
from process_table import fields_of, users_of
from users import FIRST_USER, PrivateMachine, User

CONTROL = str(COMMANDS / "securerunctl")
SECURERUN = str(COMMANDS / "securerun")
# As a guard is not available to a new user, and the command says that it is of one node.
EXEC = (CONTROL, "exec", "--preflight", "off", "--peers", "localhost")
_WAYS_OUT = frozenset({"pasta", "pasta.avx2", "passt.avx2", "slirp4netns"})
_TUNNEL = os.makedev(10, 200)  # Documentation/admin-guide/devices.txt
LISTENER = (
    "import os, signal, socket, sys\n"
    "listener = socket.create_server(('::', 0), family=socket.AF_INET6, dualstack_ipv6=True)\n"
    "print(listener.getsockname()[1], os.getpid(), flush=True)\n"
    "sys.stdin.read()\n"
)


def make_ordinary(machine: PrivateMachine, mode: int = 0o666) -> None:
    """Give a private machine /dev/net/tun, as distributions have it, and a name service that asks nobody."""
    tunnel = machine.place("/dev/net/tun")
    tunnel.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        tunnel.unlink()
    os.mknod(tunnel, stat.S_IFCHR | mode, _TUNNEL)
    tunnel.chmod(mode)
    machine.write("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")


class Job:
    """A command of a user's that listens, in a network of its own. A context manager.

    pid: the launcher's; worker: that of what listens; said: what the launcher said at its start.
    """

    def __init__(
        self,
        machine: PrivateMachine,
        node: Host,
        user: User | None,
        *options: str,
        script: str = LISTENER,
        env: Mapping[str, str] | None = None,
    ) -> None:
        command = [*EXEC, *options, "--", sys.executable, "-c", script]
        self._machine = machine
        self.process = machine.popen(node, command, user=user, stdin=subprocess.PIPE, env=env)
        self.pid = self.process.pid

    def __enter__(self) -> Job:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, finish(self.process, timeout=20).stderr
        self.port, self.worker = map(int, line.split())
        return self

    def __exit__(self, *_: object) -> None:
        kill_group(self.process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=10)
        assert eventually(lambda: not self.keepers()), self._machine.processes()

    def end(self) -> subprocess.CompletedProcess[str]:
        """Let the command end well."""
        return finish(self.process, timeout=20, text_input="")

    def entered(self, *command: str) -> list[str]:
        """Return a command as it is run in the job's network, which its user may do."""
        return ["nsenter", f"--target={self.worker}", "--user", "--net", "--preserve-credentials", "--", *command]

    def keepers(self) -> list[int]:
        """The keepers that live on the machine, and what they have started."""
        return ours(self._machine)

    def keeper(self) -> int:
        """The one of them that keeps this job; the other stands by. It has started the way out."""
        return parent_of(self.way_out())

    def way_out(self, but: Collection[int] = ()) -> int:
        """The way out, once there is one and none of those that are named."""
        found: list[int] = []

        def has_one() -> bool:
            found[:] = [pid for pid in self.keepers() if pid not in but and _is_way_out(pid)]
            return len(found) == 1

        assert eventually(has_one)
        return found[0]


def ours(machine: PrivateMachine) -> list[int]:
    """The keepers of a private machine, and the ways out of its users, which hide in mounts of their own."""
    keepers = [pid for pid in machine.processes() if name_of(pid) == "securerun-keep"]
    named = (int(place.name) for place in Path("/proc").glob("[0-9]*") if name_of(int(place.name)) in _WAYS_OUT)
    return [*keepers, *(pid for pid in named if users_of(pid)[:1] >= [FIRST_USER] and is_alive(pid))]


def _is_way_out(pid: int) -> bool:
    """Whether this is what a keeper has started, and none of the processes that it makes for a moment."""
    with contextlib.suppress(OSError):
        return name_of(pid) in _WAYS_OUT and name_of(parent_of(pid)) == "securerun-keep"
    return False


def parent_of(pid: int) -> int:
    return int(fields_of(pid)[1])


def name_of(pid: int) -> str:
    """The name of a process; "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def shell(*words: str | Sequence[str]) -> list[str]:
    """A shell that runs a script."""
    return ["sh", "-c", *[word if isinstance(word, str) else shlex.join(word) for word in words]]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
