"""What one run may not do to the other runs and servers of this host, by the records and the sockets that are there.

Port chains are for the whole host: a drop closes a port for whoever listens there, and the pass rules of all runs come
before any drop. Root may do anything; between others nobody gets the better of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable

from securerun.errors import PolicyError, PrivilegeError
from securerun.firewall.policy import covers, joined, overlap
from securerun.guard.caller import ROOT
from securerun.guard.limits import SitePolicy
from securerun.guard.records import Record
from securerun.linux import sock_diag
from securerun.linux.networks import Network, collapse
from securerun.linux.sock_diag import SocketsUnavailable


def require_room(run: Record, known: Iterable[Record], site: SitePolicy) -> None:
    """Raise PrivilegeError when an ordinary user has as many other runs as the site allows."""
    if run.root:
        return
    others = {record.run_id for record in known if record.owner == run.owner and record.guard_lives} - {run.run_id}
    if len(others) >= site.runs_per_user:
        raise PrivilegeError(
            f"user {run.user} has {len(others)} runs on this host, which allows {site.runs_per_user}; wait for an end"
        )


def require_harmless(run: Record, known: Iterable[Record]) -> None:
    """Raise PolicyError for port chains by which an ordinary user would take another's service or protection away.

    A port on which somebody else listens would be closed to its clients, unless it is a guarded job's as well: then
    the clients that count are passed before any drop.
    """
    if run.root:
        return
    found = _neighbours(run, known)
    _require_harmless_peers(run, found)
    guarded = joined((port.first, port.last) for record in found for port in record.policy.ports)
    planned = run.policy.joined_ports()
    with contextlib.suppress(SocketsUnavailable):
        for listener in sock_diag.listeners():
            # Of user id 0 without root's privilege nobody can tell that a listener of that id is not root's own.
            if (listener.user == run.user != ROOT) or listener.address.is_loopback:
                continue
            if covers(planned, listener.port) and not covers(guarded, listener.port):
                raise PolicyError(
                    f"port {listener.port} is in use by user {listener.user}; choose another for this job, or end that"
                )


def harmful_ports(run: Record, ports: Collection[int], known: Iterable[Record]) -> dict[int, str]:
    """Return which of these ports may not be closed for an ordinary user's run as well, and why.

    They are of another user's job that has no shield, and this run's peers would be let to them.
    """
    if run.root:
        return {}
    found: dict[int, str] = {}
    for record in known:
        if not _is_neighbour(run, record) or not record.is_bare:
            continue
        if _are_within(run.policy.peers, record.policy.peers):
            continue
        theirs = record.policy.joined_ports()
        why = (
            f"run {record.run_id} of user {record.user} has it, and no shield, so this job's peers could reach that run"
        )
        found.update((port, why) for port in ports if covers(theirs, port))
    return found


def require_harmless_peers(run: Record, known: Iterable[Record]) -> None:
    """Raise PolicyError for peers that would be let to the ports of another user's job that has no shield."""
    if not run.root:
        _require_harmless_peers(run, _neighbours(run, known))


def require_unweakened(run: Record, known: Iterable[Record]) -> None:
    """Raise PolicyError, for a run without a shield, where another user's run lets its own peers to our ports."""
    for record in _neighbours(run, known):
        if not record.root and not _are_within(record.policy.peers, run.policy.peers):
            raise PolicyError(
                f"this job has no shield, and run {record.run_id} of user {record.user} lets its own peers to ports of "
                "this plan; choose other ports"
            )


def _require_harmless_peers(run: Record, found: Iterable[Record]) -> None:
    for record in found:
        if record.is_bare and not _are_within(run.policy.peers, record.policy.peers):
            raise PolicyError(
                f"run {record.run_id} of user {record.user} has ports of this plan and no shield, so this job's peers "
                "could reach it; choose other ports"
            )


def _neighbours(run: Record, known: Iterable[Record]) -> list[Record]:
    """Return the runs of other users in this network that have ports of ours in their plans.

    Also those whose guard is gone: another may be about to take over, and processes may be left.
    """
    ours = run.policy.joined_ports()
    near = (record for record in known if _is_neighbour(run, record))
    return [record for record in near if overlap(ours, record.policy.joined_ports())]


def _is_neighbour(run: Record, record: Record) -> bool:
    return record.owner != run.owner and record.network == run.network


def _are_within(networks: tuple[Network, ...], others: tuple[Network, ...]) -> bool:
    return collapse((*others, *networks)) == others
