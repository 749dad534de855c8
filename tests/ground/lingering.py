"""Sends descriptors along whose last close takes as long as their owner likes, to whoever listens at a local socket.

    lingering.py PATH TEXT [--before TEXT] [--times N]     a PATH with @ in front is an abstract name

Each is of a TCP connection to somebody who does not read, and lingers (socket(7), SO_LINGER); nobody else has it. TEXT
is a line that it goes with, after a first line of `--before` and an answer to that. Answers are printed, then `sent`,
and the end of input is waited for.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import socket
import struct
import sys
import time

_SECONDS = 3600
_BUFFER = 4096


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("text")
    parser.add_argument("--before", default="")
    parser.add_argument("--times", type=int, default=1)
    asked = parser.parse_args()
    kept: list[socket.socket] = []
    for _ in range(asked.times):
        end = connected("\0" + asked.path[1:] if asked.path[0] == "@" else asked.path)
        if asked.before:
            say(end, asked.before)
        with contextlib.suppress(BrokenPipeError):  # turned away by now
            send_along(end, f"{asked.text}\n".encode(), kept)
        kept.append(end)
    print("sent", flush=True)
    sys.stdin.read()


def connected(path: str) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(10)
    while True:
        with contextlib.suppress(BlockingIOError):  # as many wait there as may
            end.connect(path)
            return end
        time.sleep(0.01)


def say(end: socket.socket, text: str) -> None:
    end.sendall(f"{text}\n".encode())
    heard = b""
    while b"guarding" not in heard:
        chunk = end.recv(65536)
        assert chunk, heard
        heard += chunk
    print(heard.decode(), flush=True)


def send_along(end: socket.socket, data: bytes, kept: list[socket.socket]) -> None:
    """Send data with a descriptor of its own, which is then nowhere but there. kept: what is to stay open meanwhile."""
    listener = socket.create_server(("127.0.0.1", 0))
    # Full at once: eighty times what a connection may hold by itself is all that a small machine has for TCP (tcp_mem).
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    lingering = socket.create_connection(listener.getsockname())
    lingering.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    kept += [listener, listener.accept()[0]]
    lingering.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            lingering.send(b"x" * 65536)
    lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, _SECONDS))
    descriptors = array.array("i", [lingering.fileno()])
    end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    lingering.close()


if __name__ == "__main__":
    main()
