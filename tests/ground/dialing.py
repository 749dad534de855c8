"""Listeners and connections of the tests' own, in whatever network they are made, and how these end."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cgroups import inside
from hosts import Host
from shield_field import PATIENCE_SECONDS

# A SYN that was dropped is sent again after one second, and again after two more.
RETRANSMISSION_SECONDS = 10.0


def listening(host: Host, port: int = 0, *, protocol: int = 0, fast_open: int = 0, backlog: int = 64) -> socket.socket:
    """A listener of both families on a host."""
    with inside(host):
        made = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, protocol)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if fast_open:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, fast_open)
    made.bind(("", port))
    made.listen(backlog)
    return made


def endpoint_for(address: str, protocol: int = 0) -> socket.socket:
    """A socket in the caller's network."""
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, protocol)


def target_of(address: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    if ":" not in address:
        return (address, port)
    host, _, zone = address.partition("%")
    return (host, port, 0, socket.if_nametoindex(zone) if zone else 0)


def dial(
    address: str, port: int, *, source_port: int = 0, interface: str = "", seconds: float = PATIENCE_SECONDS
) -> socket.socket:
    """Connected from within the caller's network. With a source port it leaves nothing behind when it is closed."""
    endpoint = endpoint_for(address)
    try:
        endpoint.settimeout(seconds)
        if interface:
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        if source_port:
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            endpoint.bind(("", source_port))
        endpoint.connect(target_of(address, port))
    except BaseException:
        endpoint.close()
        raise
    return endpoint


def attempt(
    address: str, port: int, *, source_port: int = 0, interface: str = "", seconds: float = PATIENCE_SECONDS
) -> str:
    """How a connection from within the caller's network ends: connected, refused or timeout."""
    try:
        dial(address, port, source_port=source_port, interface=interface, seconds=seconds).close()
    except socket.timeout:
        return "timeout"
    except ConnectionRefusedError:
        return "refused"
    return "connected"


def attempts(addresses: Sequence[str], port: int) -> list[str]:
    """How connections to each of these addresses end."""
    with ThreadPoolExecutor(len(addresses)) as at_once:
        return list(at_once.map(lambda address: attempt(address, port), addresses))


def exchange(near: socket.socket, far: socket.socket) -> None:
    """Asserts that data gets through, both ways."""
    for one, other in ((near, far), (far, near)):
        other.settimeout(RETRANSMISSION_SECONDS)
        one.sendall(b"tensor")
        assert other.recv(100) == b"tensor"
