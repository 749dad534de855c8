"""What one run may not do to the other runs and servers of this host, by the records and the sockets that are there.

Port chains are for the whole host: a drop closes a port for whoever listens there, and the pass rules of all runs come
before any drop. Root may do anything; between others nobody gets the better of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

from securerun.errors import PolicyError, PrivilegeError
from securerun.firewall.policy import Opening, covers, joined, overlap
from securerun.guard.caller import ROOT
from securerun.guard.limits import SitePolicy
from securerun.guard.records import Brief, Record
from securerun.linux import sock_diag
from securerun.linux.networks import EVERY_HOST, Network, collapse
from securerun.linux.sock_diag import SocketsUnavailable
from securerun.text import some, span

_PORTS_NAMED = 8


def require_room(run: Record, known: Iterable[Brief], site: SitePolicy, *, guarded: bool = False) -> None:
    """Raise PrivilegeError when an ordinary user has as many other runs as the site allows.

    What is left of a run without a guard takes as much of the host as one that has one. guarded: count only the others,
    while nobody has looked whether those are dead.
    """
    if run.root:
        return
    if run.container:
        _require_room_for_containers(run, known, site, guarded=guarded)
        return
    own = [brief for brief in known if brief.owner == run.owner and brief.run_id != run.run_id]
    others = _to_count(own, guarded=guarded)
    if len(others) >= site.runs_per_user:
        raise PrivilegeError(
            f"user {run.user} has {len(others)} runs on this host, which allows {site.runs_per_user}; wait for an end, "
            "or end what `securerunctl status` shows to be left of one"
        )


def _to_count(others: list[Brief], *, guarded: bool) -> list[Brief]:
    return [brief for brief in others if brief.guard_lives] if guarded else others


def _require_room_for_containers(run: Record, known: Iterable[Brief], site: SitePolicy, *, guarded: bool) -> None:
    """Raise PrivilegeError when a container has as many other runs as the site allows, or all of them together."""
    contained = [brief for brief in known if brief.container and brief.run_id != run.run_id]
    others = _to_count(contained, guarded=guarded)
    own = [brief for brief in others if brief.container == run.container]
    if len(own) >= site.runs_per_container:
        raise PrivilegeError(
            f"this container has {len(own)} runs, and its host allows {site.runs_per_container}; wait for an end"
        )
    if len(others) >= site.runs_in_containers:
        raise PrivilegeError(
            f"the containers of this host have as many runs as it allows, {site.runs_in_containers}; wait for an end"
        )


def require_harmless(run: Record, known: Iterable[Brief], standing: list[tuple[int, int]] | None = None) -> None:
    """Raise PolicyError for port chains by which an ordinary user would take another's service or protection away.

    A port on which somebody else listens would be closed to its clients, unless it is a guarded job's as well: then
    the clients that count are passed before any drop.

    standing: what the chains of a guard that died close already. Who came to listen there since is not helped by a job
    without a guard, and could keep the next one away from it.
    """
    if run.root:
        return
    found = _neighbours(run, known)
    _require_harmless_peers(run, known)
    guarded = joined(ports for brief in found for ports in brief.ports())
    planned = run.policy.joined_ports()
    with contextlib.suppress(SocketsUnavailable):
        for listener in sock_diag.listeners():
            # Of user id 0 without root's privilege, and of any in a container, nobody can tell that a listener of that
            # id is not another's.
            if (listener.user == run.user != ROOT and not run.container) or listener.address.is_loopback:
                continue
            if covers(standing or [], listener.port):
                continue
            if covers(planned, listener.port) and not covers(guarded, listener.port):
                raise PolicyError(
                    f"port {listener.port} is in use by user {listener.user}; choose another for this job, or end that"
                )


def harmful_ports(run: Record, ports: Collection[int], known: Iterable[Brief]) -> dict[int, str]:
    """Return which of these ports may not be closed for an ordinary user's run as well, and why.

    They are of another user's job that has no shield, and this run's peers would be let to them.
    """
    if run.root:
        return {}
    found: dict[int, str] = {}
    for brief in known:
        if not _is_neighbour(run, brief) or not brief.is_bare:
            continue
        theirs = brief.ports()
        shared = [port for port in ports if covers(theirs, port)]
        if shared and _would_let_others_in(run, brief):
            whose = f"{named(run, brief)} has it, and no shield"
            found.update(dict.fromkeys(shared, f"{whose}, so this job's peers could reach that run"))
    return found


def require_harmless_peers(run: Record, known: Iterable[Brief]) -> None:
    """Raise PolicyError for peers that would be let to the ports of another user's job that has no shield."""
    if not run.root:
        _require_harmless_peers(run, known)


def require_unweakened(run: Record, known: Iterable[Brief]) -> None:
    """Raise PolicyError, for a run without a shield, where another user's run lets its own peers to our ports."""
    for brief in harming(run, known):
        raise PolicyError(
            f"this job has no shield, and {named(run, brief)} lets its own peers to ports of this plan; choose other "
            "ports"
        )


def named(run: Record, brief: Brief) -> str:
    """Return a run in words for whoever has another: in a container, of one that is not in it, nothing but that."""
    if run.container and run.container != brief.container:
        return "a run outside of this container"
    return f"run {brief.run_id} of user {brief.user}"


def runs_of_owner(run: Record, known: Iterable[Brief]) -> int:
    """Return how many runs whoever has this one has, with it."""
    return max(1, sum(brief.owner == run.owner for brief in known))


def harmed_by(run: Record, known: Iterable[Brief]) -> Iterator[Brief]:
    """Yield the runs of other users that have ports of ours and no shield, and would get others than their peers."""
    for brief in _neighbours(run, known):
        if brief.is_bare and _would_let_others_in(run, brief):
            yield brief


def harming(run: Record, known: Iterable[Brief]) -> Iterator[Brief]:
    """Yield the runs of other users that let others than our peers to ports of ours; root may."""
    for brief in _neighbours(run, known):
        peers = None if brief.root else brief.peers()
        if peers is None:
            continue
        if not _are_within((*peers, *_let_to(run.policy.joined_ports(), brief.public())), run.policy.peers):
            yield brief


def closing_public(run: Record, known: Iterable[Brief]) -> Iterator[str]:
    """Yield a line for each run whose plan closes, for the whole host, a port that this one has open to every host.

    Those for networks are passed before any drop.
    """
    public = run.policy.ports_for_all()
    for brief in known if public else ():
        has_chains = any(not layer.is_shield for layer in brief.layers)
        if brief.run_id == run.run_id or brief.network != run.network or not has_chains:
            continue
        theirs = brief.ports()
        both = [(max(one[0], two[0]), min(one[1], two[1])) for one in public for two in theirs]
        closed = [span(first, last) for first, last in both if first <= last]
        if closed:
            yield (
                f"public port {some(closed, _PORTS_NAMED)} is in the plan of {named(run, brief)}, "
                "so it is closed to others until that run ends; have this job listen on another port"
            )


def _require_harmless_peers(run: Record, known: Iterable[Brief]) -> None:
    for brief in harmed_by(run, known):
        raise PolicyError(
            f"{named(run, brief)} has ports of this plan and no shield, so this job's peers could reach it; choose "
            "other ports"
        )


def _would_let_others_in(run: Record, brief: Brief) -> bool:
    """Return whether a run would let others in to another. Whose peers cannot be understood has none to protect."""
    peers = brief.peers()
    own = EVERY_HOST if run.policy.admits_by_tag else run.policy.peers
    let_in = (*own, *_let_to(brief.ports(), run.policy.public))
    return peers is not None and not _are_within(let_in, peers)


def _let_to(ports: list[tuple[int, int]], public: Iterable[Opening]) -> Iterator[Network]:
    """Yield the networks that public ports among these are for: the rules for them pass by every run's."""
    for opening in public:
        if overlap(ports, [(opening.first, opening.last)]):
            yield from opening.networks


def _neighbours(run: Record, known: Iterable[Brief]) -> list[Brief]:
    """Return the runs of other users in this network that have ports of ours in their plans.

    Also those whose guard is gone: another may be about to take over, and processes may be left.
    """
    ours = run.policy.joined_ports()
    near = (brief for brief in known if _is_neighbour(run, brief))
    return [brief for brief in near if overlap(ours, brief.ports())]


def _is_neighbour(run: Record, brief: Brief) -> bool:
    """Return whether a run is not this one's to weaken. In a container anybody may order: none of its others is."""
    is_anothers = brief.owner != run.owner or (bool(run.container) and brief.run_id != run.run_id)
    return is_anothers and brief.network == run.network


def _are_within(networks: tuple[Network, ...], others: tuple[Network, ...]) -> bool:
    return collapse((*others, *networks)) == others
