"""Leases held by holder.py, which starts no job: what the guard does for one can be looked at, and asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from checkout import GROUND
from hosts import Host, eventually, machine_snapshot

HOLDER = GROUND / "holder.py"


class Held:
    """One holder.py: what it said, and its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.start = self.hear()

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(self.process.stdout.readline())
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

    def let_go(self) -> str:
        """End its input, wait for its end, and return what it said until then."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        said = self.process.stdout.read()
        assert self.process.wait(timeout=30) == 0, said
        return said


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
