"""The fenced blocks of a page, and the hosts that they are run on."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from checkout import COMMANDS
from hosts import Host, finish_all
from users import PrivateMachine

# Where the private machine has room that no container has a mount over.
DIRECTORY = "/var/log/job"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. commands: what it says without comments, a logical line each."""

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> tuple[str, ...]:
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = (re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in joined.splitlines())
        return tuple(line for line in lines if line)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    lines = page.read_text().splitlines()
    begin = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin = number
            continue
        text = "\n".join(lines[begin + 1 : number])
        found.append(Block(page.name, begin + 2, lines[begin][3:].strip(), text))
        begin = None
    assert begin is None, f"{page}: the block that begins in line {begin} has no end"
    return found


@dataclass(frozen=True)
class Stage:
    """The hosts of one private machine, as the pages have them: node0, node1 and 10.77.0.3, which is no node.

    path: where their commands are looked for before the system's.
    """

    machine: PrivateMachine
    nodes: tuple[Host, ...]
    path: tuple[Path, ...] = (COMMANDS,)

    def start(self, script: str, rank: int) -> subprocess.Popen[str]:
        """Start a shell script on the node of that rank, as root, where the job's files are."""
        environment = {"HOME": DIRECTORY, "PATH": ":".join([*map(str, self.path), os.environ["PATH"]])}
        shell = ["bash", "-euo", "pipefail", "-c", script]
        return self.machine.popen(self.nodes[rank], shell, env=environment, cwd=DIRECTORY)

    def run(self, *scripts: str, timeout: float = 100) -> list[str]:
        """Run a script a node at once, to the good end; what each said on both streams."""
        done = finish_all([self.start(script, rank) for rank, script in enumerate(scripts)], timeout=timeout)
        for one, script in zip(done, scripts):
            assert one.returncode == 0, (script, one.stdout, one.stderr)
            assert not re.search(r"^Traceback", one.stderr, re.MULTILINE), (
                script,
                one.stderr,
            )  # torch's own log has some
        return [one.stdout + one.stderr for one in done]
