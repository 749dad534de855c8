"""Jobs without torch for the kernel matrix: they listen, and the nodes of one meet each other.

    kernel_job.py listen FILE               a port of the kernel's choice every second, eight at most, until FILE exists
    kernel_job.py serve PORT SECONDS        tells who says hello at PORT of another port, and waits there too
    kernel_job.py join ADDRESS PORT SECONDS comes to PORT, and to the port that it is told of

serve and join end with status 0 only if they have met.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path

PATIENCE_SECONDS = 120.0


def listener(port: int = 0) -> socket.socket:
    return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)


def listen(file: str) -> None:
    kept: list[socket.socket] = []
    while not Path(file).exists():
        kept.append(listener())
        for old in kept[:-8]:
            old.close()
        kept = kept[-8:]
        time.sleep(1)


def serve(port: int, seconds: float) -> None:
    with listener(port) as known, listener() as chosen:
        answer(known, str(chosen.getsockname()[1]))
        answer(chosen, "welcome")
        time.sleep(seconds)


def answer(server: socket.socket, words: str) -> None:
    """Say this to the first who says hello; whoever only tries the port does not."""
    server.settimeout(PATIENCE_SECONDS)
    while True:
        peer, _ = server.accept()
        with peer, contextlib.suppress(OSError):
            peer.settimeout(10)
            if peer.recv(16) == b"hello\n":
                peer.sendall(f"{words}\n".encode())
                return


def join(address: str, port: int, seconds: float) -> None:
    with listener():
        chosen = int(hear(address, port))
        if hear(address, chosen) != "welcome":
            raise SystemExit("nobody said welcome")
        time.sleep(seconds)


def hear(address: str, port: int) -> str:
    """The line that is said at a port, which may not be open yet."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5) as peer:
            peer.sendall(b"hello\n")
            words = peer.makefile().readline().strip()
            if words:
                return words
        if time.monotonic() > end:
            raise SystemExit(f"nobody answers at {address}:{port}")
        time.sleep(0.2)


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "listen":
        listen(words[0])
    elif what == "serve":
        serve(int(words[0]), float(words[1]))
    else:
        join(words[0], int(words[1]), float(words[2]))


if __name__ == "__main__":
    main()
