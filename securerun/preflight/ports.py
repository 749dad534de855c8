"""Ports of the plan that the job may not get."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

from securerun.finding import Finding
from securerun.linux import port_ranges, proc
from securerun.linux.sock_diag import Connection, Listener, SocketDiagnosis, SocketsUnavailable
from securerun.preflight.scene import Scene

_NAMED = 8
# Below what the kernel gives to connections by default (32768-60999).
_ANOTHER_BASE = 20000
# A range as wide as what the kernel gives to connections is for the port chains, and no list of ports to listen on.
_WIDEST_RANGE = 1024


def unreserved(scene: Scene) -> Iterator[Finding]:
    """Planned ports that the kernel may hand out to anyone; a lease reserves them for as long as its job lasts."""
    if scene.reserved:
        return
    ports = port_ranges.lacking((port.first, port.last) for port in scene.ports)
    if ports:
        listed = port_ranges.written_ranges(ports)
        yield Finding(
            "unreserved-ports",
            f"TCP ports {listed} are among those that the kernel gives to connections, and are not reserved",
            "any connection of this host may hold one of them when the job wants to listen there",
            f"sysctl -w {port_ranges.NAME}={port_ranges.written_ranges(port_ranges.with_others(ports))}",
        )


def in_use(scene: Scene) -> Iterator[Finding]:
    """Planned ports that somebody has: the job cannot listen there, and the port chains would close them to him."""
    try:
        with contextlib.closing(SocketDiagnosis()) as diagnosis:
            found = {listener.port: listener for listener in diagnosis.listeners() if _is_in_the_way(listener, scene)}
            sources = {
                connection.port: connection
                for planned in scene.ports
                if planned.last - planned.first < _WIDEST_RANGE
                for connection in diagnosis.connections(planned.first, planned.last)
                if connection.port != scene.meeting_port and not _may_be_a_siblings(connection, scene)
            }
    except SocketsUnavailable:
        return
    had: dict[int, Listener | Connection] = {**sources, **found}
    holders = _holders({one.inode for one in had.values()}) if had else {}
    for port, held in list(had.items())[:_NAMED]:
        holder = holders.get(held.inode)
        who = f"process {holder} ({_command(holder)})" if holder else "a process"
        use = "in use by" if port in found else "the source of a connection of"
        if not any(port in planned for planned in scene.ports if planned.is_asked_for):
            yield Finding(
                "port-in-use",
                f"port {port}, of HCCL's default range, is {use} {who} of user {held.user}",
                "HCCL cannot have it, and securerun leaves it to that program",
                f"export HCCL_IF_BASE_PORT={_ANOTHER_BASE}",
            )
            continue
        yield Finding(
            "port-in-use",
            f"port {port} of the plan is {use} {who} of user {held.user}",
            "the job cannot listen there"
            + (", and securerun closes the port to that program's clients" if port in found else " until it ends"),
            f"kill {holder}" if holder else f"sudo ss -Hatnp sport = {port}",
        )


CHECKS = (unreserved, in_use)


def _is_in_the_way(listener: Listener, scene: Scene) -> bool:
    if not any(listener.port in planned for planned in scene.ports):
        return False
    if _may_be_a_siblings(listener, scene):
        return False
    return not (listener.port == scene.meeting_port and listener.user == os.geteuid())


def _may_be_a_siblings(held: Listener | Connection, scene: Scene) -> bool:
    return scene.siblings and held.user == os.geteuid()


def _holders(inodes: Collection[int]) -> dict[int, int]:
    """Return the process of each of these sockets; without those that this user may not look into."""
    return proc.sockets_of(proc.pids(), inodes)


def _command(pid: int) -> str:
    try:
        return proc.name(pid).strip()
    except OSError:
        return "gone"
