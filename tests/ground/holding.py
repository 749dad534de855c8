"""Leases held by holder.py, which starts no job: what the guard does for one can be looked at, and asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cgroups import Cgroup
from checkout import GROUND
from hosts import Host, eventually, machine_snapshot
from users import PrivateMachine, User

HOLDER = GROUND / "holder.py"


class Held:
    """One holder.py: what it said, and its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.start = self.hear()

    @property
    def run_id(self) -> str:
        """The id of its run."""
        return str(self.start["run_id"])

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, self.process.stderr and self.process.stderr.read()
        line: dict[str, Any] = json.loads(text)
        return line

    def hear_of(self, words: str) -> dict[str, Any]:
        """Its next line with these words in it."""
        while True:
            line = self.hear()
            if words in line.get("news", ""):
                return line

    def say(self, line: str) -> None:
        """Write a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Let go of the pipes of one that was killed."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def let_go(self) -> str:
        """End its input, wait for its end, and return what it said until then."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        said = self.process.stdout.read()
        assert self.process.wait(timeout=30) == 0, said
        return said


def hold_as(user: User, machine: PrivateMachine, host: Host, *options: str, cgroup: Cgroup | None = None) -> Held:
    """A lease of a user's, on a host, until it is let go."""
    command = [sys.executable, str(HOLDER), *options]
    holder = Held(machine.popen(host, command, user=user, stdin=subprocess.PIPE, cgroup=cgroup))
    assert "guarding" in holder.start, holder.start
    return holder


@contextmanager
def held(node: Host, *options: str) -> Iterator[Held]:
    """A lease on the node; the node and the machine are as before when it has been let go."""
    before, machine = node.snapshot(), machine_snapshot()
    holder = Held(node.popen([sys.executable, HOLDER, *options], stdin=subprocess.PIPE))
    yield holder
    if holder.process.poll() is None:
        holder.let_go()
    eventually(lambda: node.snapshot() == before and machine_snapshot() == machine, seconds=2)
    assert node.snapshot() == before
    assert machine_snapshot() == machine
