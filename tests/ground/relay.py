"""A launcher that says to a guard whatever it is told, and nothing of its own.

    relay.py [--apart] SOCKET             connects to a socket
    relay.py [--apart] -- COMMAND ...     starts a command, with pipes for its standard input and output

Standard input goes to the guard and the guard's answers to standard output, unread. It ends with its input: as a
launcher it would wait for itself if it waited for its guard's end.

`--apart` leaves the talking to a child in a session of its own, so that the guard's pipes outlive the launcher. The
launcher then waits for SIGUSR1, at which it becomes what the environment has in BECOME. The process is called what the
environment has in NAME.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    arguments = sys.argv[1:]
    apart = arguments[0] == "--apart"
    target = arguments[1:] if apart else arguments
    if "NAME" in os.environ:
        Path("/proc/self/comm").write_text(os.environ["NAME"])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1} if apart else ())
    to_guard, from_guard = started(target[1:]) if target[0] == "--" else connected(target[0])
    if apart and os.fork():
        signal.sigwait({signal.SIGUSR1})
        os.execv("/bin/sh", ["sh", "-c", os.environ["BECOME"]])  # noqa: S606
    if apart:
        os.setsid()
    relay(to_guard, from_guard)


def relay(to_guard: int, from_guard: int) -> None:
    inputs = [0, from_guard]
    while inputs:
        for ready in select.select(inputs, [], [])[0]:
            data = read(ready)
            if ready == from_guard and not (data and write(1, data)):
                inputs.remove(from_guard)
                os.close(1)
            if ready == 0 and not data:
                return
            if ready == 0 and not write(to_guard, data):
                inputs.remove(0)  # the guard has gone; what it said is still to be heard


def connected(path: str) -> tuple[int, int]:
    end = socket.socket(socket.AF_UNIX)
    end.connect(path)
    descriptor = end.detach()
    return descriptor, descriptor


def started(command: list[str]) -> tuple[int, int]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    return process.stdin.fileno(), process.stdout.fileno()


def read(descriptor: int) -> bytes:
    """b"" at the end, and when the guard has gone with something unread."""
    with contextlib.suppress(OSError):
        return os.read(descriptor, 65536)
    return b""


def write(descriptor: int, data: bytes) -> bool:
    """Whether all of it could be written."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]
        return True
    return False


if __name__ == "__main__":
    main()
