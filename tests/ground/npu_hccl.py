"""A stand-in for HCCL: listens on its 16 ports, on all addresses of both families, until end of input.

HCCL_IF_BASE_PORT is the first one, 60000 without it. Every worker of a host may run one: they share the ports.
"""

from __future__ import annotations

import os
import socket
import sys

PORTS = 16


def listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("::", port))
    listener.listen()
    return listener


def main() -> None:
    base = int(os.environ.get("HCCL_IF_BASE_PORT", "60000"))
    listeners = [listen(port) for port in range(base, base + PORTS)]
    print("listening", flush=True)
    sys.stdin.read()
    for listener in listeners:
        listener.close()


if __name__ == "__main__":
    main()
