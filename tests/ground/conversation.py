"""What an ordinary user can say to a guard without securerun's own client: anything at all.

    talk = Conversation(machine, node, alice, "sudo")
    assert talk.hear()["ready"]
    talk.say(order(ports=[22]))
    assert talk.hear()["refused"]

The process that the guard is to serve is relay.py, which passes everything on unread.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cgroups import Cgroup
from hosts import Host, eventually, machine_snapshot
from patience import patient
from process_table import name_of
from users import GUARD, GUARD_NAME, PrivateMachine, User

from securerun.guard.protocol import VERSION

SOCKET = "/run/securerun.sock"
WAYS = ("sudo", "socket")
LOG = "/var/log/securerun.log"
ANSWER_SECONDS = 20.0
_CLEAN_SECONDS = 5.0

_RELAY = [sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py"))]


class Conversation:
    """One guard of one user, spoken to in bytes, and the process that it is to serve.

    way: `sudo`, `socket`, or `direct`, which is root's. before: shell commands that the process to be served begins
    with. apart: another process of the user's does the talking, and goes on when the one to be served has ended.
    """

    def __init__(
        self,
        machine: PrivateMachine,
        host: Host,
        user: User | None,
        way: str,
        *,
        before: str = ":",
        apart: bool = False,
        socket: str = SOCKET,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        cgroup: Cgroup | None = None,
    ) -> None:
        target = {"sudo": ["--", "/usr/bin/sudo", "-n", "--", GUARD], "socket": [socket], "direct": ["--", GUARD]}
        relay = [*_RELAY, "--apart"] if apart else _RELAY
        self.process = machine.popen(
            host,
            ["/bin/sh", "-c", f'{before}\nexec "$@"', "sh", *relay, *target[way]],
            user=user,
            env=env,
            cwd=cwd,
            cgroup=cgroup,
            stdin=subprocess.PIPE,
        )
        self._pending = b""

    @property
    def pid(self) -> int:
        """The process that the guard serves."""
        return self.process.pid

    def say(self, document: Mapping[str, Any] | bytes) -> bool:
        """Send one document as a line, or bytes as they are; whether anybody was there to take them."""
        assert self.process.stdin is not None
        data = document if isinstance(document, bytes) else json.dumps(document).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(self.process.stdin.fileno(), data) :]
        return not data

    def hear(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """The next answer, by the one key that names it; {} at the end. Fails when there is none in time."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + patient(seconds)
        while b"\n" not in self._pending:
            remaining = max(0.0, deadline - time.monotonic())
            assert select.select([self.process.stdout], [], [], remaining)[0], f"no answer within {seconds} s"
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                return {}
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def hear_verdict(self) -> dict[str, Any]:
        """What the guard made of the order: `guarding` or `refused`; {} when it said neither."""
        while answer := self.hear():
            if "ready" not in answer:
                return answer
        return {}

    def release(self, *, failed: bool = False) -> None:
        """Let the guard go as a launcher does whose job is over."""
        self.say({"release": {"failed": failed}})
        while "released" not in (answer := self.hear()):
            assert answer, "the guard went without a word"
        self.hang_up()

    def hang_up(self) -> None:
        """Close the guard's input and end the process that it serves."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=ANSWER_SECONDS)

    def errors(self) -> str:
        """What was said on standard error until now, by sudo too."""
        assert self.process.stderr is not None
        found = b""
        while select.select([self.process.stderr], [], [], 0)[0]:
            chunk = os.read(self.process.stderr.fileno(), 65536)
            if not chunk:
                break
            found += chunk
        return found.decode(errors="replace")


def order(
    *,
    run_id: str | None = None,
    ports: Sequence[int | tuple[int, int]] = (29500,),
    peers: Sequence[str] = (),
    firewall: str = "auto",
    **changes: object,
) -> dict[str, Any]:
    """An order as securerun gives it; `changes` go into the policy where it has such a field, else into the order."""
    ranges = [(port, port) if isinstance(port, int) else port for port in ports]
    policy: dict[str, Any] = {
        "run_id": secrets.token_hex(6) if run_id is None else run_id,
        "ports": [{"first": first, "last": last, "purpose": "master port"} for first, last in ranges],
        "peers": list(peers),
        "interfaces": [],
        "accept": False,
        "close_loopback": False,
    }
    body: dict[str, Any] = {
        "version": VERSION,
        "policy": policy,
        "firewall": firewall,
        "scope": "auto",
        "grace": 0.5,
        "command": "train.py",
        "adopt": False,
    }
    for name, value in changes.items():
        (policy if name in policy else body)[name] = value
    return {"order": body}


def permit(machine: PrivateMachine, *users: User) -> None:
    """The rule of `securerunctl setup sudoers` for these users."""
    machine.allow_sudo("\n".join(f'{user.name} ALL=(root) NOPASSWD:NOSETENV: {GUARD} ""' for user in users))


@contextlib.contextmanager
def socket_unit(machine: PrivateMachine, host: Host) -> Iterator[None]:
    """systemd's part: a guard for each connection to the socket, as its unit has it (Accept=yes)."""
    listening = ["systemd-socket-activate", "--accept", "--inetd", "-l", SOCKET, GUARD, "--socket"]
    unit = machine.popen(host, listening, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually(machine.place(SOCKET).is_socket), "systemd-socket-activate does not listen"
    machine.place(SOCKET).chmod(0o666)  # the unit's SocketMode
    yield
    unit.terminate()
    unit.wait(timeout=ANSWER_SECONDS)
    machine.place(SOCKET).unlink()


def guards(machine: PrivateMachine) -> list[int]:
    """The pids of the guards that run in a machine, whichever way they were started."""
    return [pid for pid in machine.processes() if name_of(pid) == GUARD_NAME]


@contextlib.contextmanager
def nothing_left(machine: PrivateMachine, host: Host) -> Iterator[None]:
    """Whatever the block does, afterwards there is no guard and no run, and the host's rules are as before."""
    rules, state = host.snapshot(), machine_snapshot()
    yield
    clean = eventually(lambda: not guards(machine) and machine.records() is None, seconds=_CLEAN_SECONDS)
    assert clean, f"left: {machine.processes()}, {machine.records()}; {log_of(machine)}"
    assert machine_snapshot() == state, f"{machine_snapshot()} is not {state}"
    assert host.snapshot() == rules, f"{host.snapshot()} is not {rules}"


def log_of(machine: PrivateMachine) -> str:
    """What guards wrote to the file that takes the system log's place in a private machine."""
    place = machine.place(LOG)
    return place.read_text() if place.exists() else ""
