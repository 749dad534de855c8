"""Where attacks of an ordinary user take place: a machine with two users, and both ways to a guard open to them.

The fixtures `machine` and `ground` of tests/conftest.py make it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgroups import Cgroup
from conversation import Conversation, order
from holding import Held, hold_as
from hosts import Host, Stream, eventually, is_alive
from process_table import name_of, users_of
from users import PrivateMachine, User


@dataclass(frozen=True)
class Ground:
    """Two ordinary users on a machine where both ways to a guard are open to them; a peer and a stranger beside it."""

    machine: PrivateMachine
    node: Host
    peer: Host
    stranger: Host
    alice: User
    bob: User

    def talk(
        self,
        user: User,
        way: str,
        *,
        before: str = ":",
        apart: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        cgroup: Cgroup | None = None,
    ) -> Conversation:
        return Conversation(
            self.machine, self.node, user, way, before=before, apart=apart, env=env, cwd=cwd, cgroup=cgroup
        )

    def guarded(self, user: User, way: str, *, ports: Sequence[int | tuple[int, int]] = (29500,)) -> Conversation:
        """A job of a user's that is under guard."""
        talk = self.talk(user, way)
        talk.say(order(ports=ports))
        verdict = talk.hear_verdict()
        assert "guarding" in verdict, (verdict, talk.errors())
        return talk

    def refusal(self, user: User, document: dict[str, Any] | bytes, way: str = "socket") -> str:
        """Why a guard refuses."""
        talk = self.talk(user, way)
        talk.say(document)
        verdict = talk.hear_verdict()
        talk.hang_up()
        assert "refused" in verdict, (verdict, talk.errors())
        return str(verdict["refused"]["message"])

    def holder(self, user: User, *options: str, cgroup: Cgroup | None = None) -> Held:
        """A job of a user's that is under guard and listens on one port."""
        return hold_as(user, self.machine, self.node, *options, cgroup=cgroup)

    def run(
        self, user: User, argv: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.machine.run(self.node, argv, user=user, env=env)

    def popen(
        self,
        user: User | None,
        argv: Sequence[str],
        *,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = subprocess.PIPE,
        cgroup: Cgroup | None = None,
    ) -> subprocess.Popen[str]:
        return self.machine.popen(self.node, argv, user=user, stdin=stdin, stdout=stdout, cgroup=cgroup)


def program(text: str, *arguments: str) -> list[str]:
    """A Python program of an attacker's."""
    return [sys.executable, "-I", "-c", text, *arguments]


def cgroup_of(pid: int) -> str:
    """A process' cgroup of version 2, below the mount."""
    lines = Path(f"/proc/{pid}/cgroup").read_bytes().decode(errors="surrogateescape").splitlines()
    return next(line for line in lines if line.startswith("0::"))[3:]


# Makes a process of a user's with a pid of the tester's choice (clone3(2), set_tid); it ends with its input.
_TAKE_PID = """
import ctypes, errno, os, struct, sys, time
pid, user = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
wanted = (ctypes.c_int * 1)(pid)
clone_args = struct.pack("=11Q", 0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
for _ in range(500):
    child = libc.syscall(435, clone_args, len(clone_args))
    if child != -1 or ctypes.get_errno() != errno.EEXIST:
        break
    time.sleep(0.01)
if child == 0:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.execv("/bin/sleep", ["sleep", "600"])
assert child == pid, os.strerror(ctypes.get_errno())
print(child, flush=True)
sys.stdin.read()
os.kill(child, 9)
os.waitpid(child, 0)
"""


@contextlib.contextmanager
def pid_taken(ground: Ground, pid: int, user: int) -> Iterator[None]:
    """Another process has the number of one that ended, and nothing happens to it in the block."""
    taker = ground.popen(None, program(_TAKE_PID, str(pid), str(user)), stdin=subprocess.PIPE)
    assert taker.stdout is not None and taker.stdin is not None and taker.stderr is not None
    assert taker.stdout.readline() == f"{pid}\n", taker.stderr.read()
    assert eventually(lambda: name_of(pid) == "sleep")
    place = cgroup_of(pid)
    yield
    assert is_alive(pid) and users_of(pid) == [user] * 4
    assert cgroup_of(pid) == place
    taker.stdin.close()
    assert taker.wait(timeout=10) == 0


@contextlib.contextmanager
def server(ground: Ground, user: User | None, port: int, address: str = "") -> Iterator[None]:
    """Something of a user's that listens, and has nothing to do with securerun."""
    serve = "import socket, sys, time; s = socket.create_server((sys.argv[2], int(sys.argv[1]))); print(flush=True)"
    process = ground.popen(user, program(f"{serve}; time.sleep(600)", str(port), address))
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "\n", process.stderr.read()
    yield
    process.kill()
    process.wait()
