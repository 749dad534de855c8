"""A real systemd-journald on a private machine, and what it has.

with journal(machine, host):
    ...
    entries(machine, host, "RUN_ID=5292ff20269a")
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hosts import Host, eventually
from users import PrivateMachine

PROGRAM = Path("/lib/systemd/systemd-journald")
SOCKET = "/run/systemd/journal/socket"
_FILES = "/run/log/journal"
# The kernel's own messages and its audit are the machine's, and stay as they are.
_CONFIGURATION = "[Journal]\nStorage=volatile\nAudit=no\nReadKMsg=no\nSeal=no\nRateLimitBurst=0\nRuntimeMaxUse=16M\n"


def is_possible() -> bool:
    """Whether there is a journal to be started."""
    return PROGRAM.exists() and shutil.which("journalctl") is not None


@contextlib.contextmanager
def journal(machine: PrivateMachine, host: Host) -> Iterator[None]:
    """A journal that runs while the block does."""
    machine.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    machine.write("/etc/systemd/journald.conf", _CONFIGURATION)
    process = machine.popen(host, [PROGRAM])
    try:
        assert eventually(machine.place(SOCKET).is_socket), process.poll()
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


def entries(machine: PrivateMachine, host: Host, *matches: str) -> list[dict[str, Any]]:
    """The entries that match all of these, oldest first; the journal is asked to write down what it has before."""
    words = ["journalctl", "--directory", _FILES, "--output", "json", "--quiet", "--all", *matches]
    done = machine.run(host, words)
    assert done.returncode in (0, 1), done
    return [json.loads(line) for line in done.stdout.splitlines()]
