"""Which ports of the job no layer covers yet, looked at while it runs, and closed through the port chains.

With a shield that is the exception: a listener made before the job had its cgroup, received from outside, or counted
as the root cgroup's (net_cls or net_prio before kernel 5.15). In scope `ports` it is how every random port is closed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from securerun.errors import PolicyError
from securerun.firewall.policy import PortRange, Purpose
from securerun.guard.lease import Lease
from securerun.linux import proc, sock_diag
from securerun.linux.sock_diag import Listener, SocketDiagnosis, SocketsUnavailable

# What is held changes without any listener being made: one can be inherited or received.
_FULL_LOOK_SECONDS = 1.0


class Exposure:
    """Looks for listeners of the job that are open to strangers; raises SocketsUnavailable without sock_diag."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._diagnosis = SocketDiagnosis()
        self._seen: tuple[Listener, ...] = ()
        self._cgroups: frozenset[int] = frozenset()
        self._next_full_look = 0.0
        self._closed: set[int] = set()

    def close(self) -> tuple[str, ...]:
        """Close what is found open; return a line for each thing that a person should know.

        Raises SocketsUnavailable, PortChainsUnavailable or PrivilegeError when that does not succeed.
        """
        found = self._diagnosis.listeners()
        if found == self._seen and time.monotonic() < self._next_full_look:
            return ()
        self._next_full_look = time.monotonic() + _FULL_LOOK_SECONDS
        exposed = self._exposed(found)
        new = sorted({listener.port for listener in exposed} - self._closed)
        words = self._close(new) if new else ()
        self._seen = found
        return words

    def _exposed(self, found: tuple[Listener, ...]) -> tuple[Listener, ...]:
        holders = proc.sockets_of(process.pid for process in self._lease.processes())
        cgroup = self._lease.cgroup
        if self._lease.shield is None or cgroup is None:
            # On 127.0.0.1 too: route_localnet and DNAT lead there from outside; and chains pass the loopback itself.
            return sock_diag.held(found, holders)
        reachable = [listener for listener in found if not listener.address.is_loopback]
        self._cgroups |= sock_diag.cgroup_ids(cgroup.descriptor)
        return sock_diag.outside(reachable, holders, self._cgroups)

    def _close(self, ports: list[int]) -> tuple[str, ...]:
        listed = ", ".join(map(str, ports))
        if self._lease.chains is None:
            self._closed.update(ports)
            return (f"port {listed} is open to every host: its socket is not behind the shield, and no chains are set",)
        refused = self._refused(ports)
        self._closed.update(ports)
        closed = ", ".join(str(port) for port in ports if port not in refused)
        words = tuple(f"port {port} stays open to every host: {reason}" for port, reason in refused.items())
        if self._lease.shield is None or not closed:
            return words
        return (*words, f"port {closed} is on a socket that the shield does not cover; the port chains close it")

    def _refused(self, ports: list[int]) -> dict[int, str]:
        """Close the ports, all at once if that may be; return those that may not be closed, and why."""
        refused: dict[int, str] = {}
        try:
            self._lease.close_ports(_unplanned(ports, self._lease.policy.ports))
        except PolicyError:
            for port in ports:
                try:
                    self._lease.close_ports(_unplanned([port], self._lease.policy.ports))
                except PolicyError as error:
                    refused[port] = str(error)
        return refused


def open_exposure(lease: Lease) -> Exposure | None:
    """Open the look-out of a lease; None where the kernel has no sock_diag, and scope `ports` is refused anyway."""
    try:
        return Exposure(lease)
    except SocketsUnavailable:
        return None


def _unplanned(ports: Iterable[int], planned: tuple[PortRange, ...]) -> list[PortRange]:
    return [
        PortRange(port, port, Purpose.OPENED_MEANWHILE) for port in ports if not any(port in known for known in planned)
    ]
