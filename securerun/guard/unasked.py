"""HCCL's default ports, which nobody asked for, and which of them a plan is better without.

They are planned on every host, since HCCL opens them whoever thinks of it. On most hosts nobody uses HCCL, and others
may have these ports: then they are left out of the plan. Never is a job refused for them, nor another's listener
closed. That a port was not asked for is the launcher's word, and believed: it only ever closes less, of its own job.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from securerun.firewall.policy import covers, joined
from securerun.guard import neighbours
from securerun.guard.records import Brief, Record
from securerun.linux import port_ranges, sock_diag
from securerun.linux.sock_diag import SocketsUnavailable
from securerun.text import some, span

_REASONS_NAMED = 3
_PORTS_NAMED = 8


def in_the_way(run: Record, known: Collection[Brief]) -> dict[int, str]:
    """Return the unasked ports on which somebody listens before the job does, and why each is to be left out.

    Also somebody of the job's own user: whatever listens there now is not the job. A listener in the plan of a run of
    its own user is none: that run's peers are passed before any drop.
    """
    unasked = run.policy.unasked_ports()
    found: dict[int, int] = {}
    with contextlib.suppress(SocketsUnavailable):
        for listener in sock_diag.listeners() if unasked else ():
            if covers(unasked, listener.port) and not listener.address.is_loopback:
                found[listener.port] = listener.user
    return of_listeners(run, known, found)


def of_listeners(run: Record, known: Iterable[Brief], listeners: Mapping[int, int]) -> dict[int, str]:
    """Return which of these unasked ports, each with the user who listens there, are to be left out, and why."""
    guarded: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for record in known if listeners else ():
        if record.network == run.network and record.run_id != run.run_id:
            guarded[record.user] += record.ports()
    ranges = {user: joined(ports) for user, ports in guarded.items()}
    return {
        port: f"user {user} listens there" for port, user in listeners.items() if not covers(ranges.get(user, []), port)
    }


def harmful(run: Record, known: Iterable[Brief]) -> dict[int, str]:
    """Return the unasked ports to which this run's peers would be let although they are a shieldless neighbour's."""
    why = "{} has it, and no shield"
    return _shared(run, neighbours.harmed_by(run, known), why)


def weakening(run: Record, known: Iterable[Brief]) -> dict[int, str]:
    """Return the unasked ports to which neighbours let peers of their own, for a run without a shield."""
    why = "{} lets its own peers there"
    return _shared(run, neighbours.harming(run, known), why)


def told(left_out: Mapping[int, str]) -> Iterator[str]:
    """Yield the line on the ports that were left out; none for those that were before."""
    reasons: defaultdict[str, list[int]] = defaultdict(list)
    for port, why in sorted(left_out.items()):
        if why:
            reasons[why].append(port)
    listed = [f"{some(_written(ports), _PORTS_NAMED)} ({why})" for why, ports in reasons.items()]
    if listed:
        yield (
            f"of HCCL's default ports, which nobody asked for, these are left out: {some(listed, _REASONS_NAMED)}; if "
            "this job uses HCCL, give it others with HCCL_IF_BASE_PORT"
        )


def _shared(run: Record, others: Iterable[Brief], why: str) -> dict[int, str]:
    unasked = port_ranges.numbers(run.policy.unasked_ports())
    found: dict[int, str] = {}
    for record in others if unasked else ():
        theirs = record.ports()
        found.update((port, why.format(neighbours.named(run, record))) for port in unasked if covers(theirs, port))
    return found


def _written(ports: Iterable[int]) -> list[str]:
    return [span(first, last) for first, last in joined((port, port) for port in ports)]
