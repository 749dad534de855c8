"""What a guard makes of the run of one that died: it goes on from its record, and lets nobody in who was kept out.

What the site lets users do is what its file says now. That may be less than when the run began, and then the run has
less from here on; it may be more, and then that is for runs that begin now.

Loaded where a guard takes over.
"""

from __future__ import annotations

import dataclasses

from securerun.errors import PrivilegeError
from securerun.firewall import tagging
from securerun.firewall.policy import Admission, Policy, Purpose, covers
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.shield import Shield
from securerun.guard.lease import Lease
from securerun.guard.program import LIMITS_FILE
from securerun.guard.records import Record
from securerun.linux import port_ranges
from securerun.linux.networks import common, listed

_NOW = f"by what this host allows now ({LIMITS_FILE})"


def _is_of_same_job(lease: Lease, found: Record) -> bool:
    """Return whether a record is of the very job. Whole ones of Slurm's, which root alone orders, have no launcher."""
    slurm, caller = lease.order.slurm, lease.caller
    if slurm is not None and slurm.is_whole:
        return (found.slurm_job, found.cgroup, found.user) == (slurm.number, slurm.cgroup, caller.user)
    return (found.launcher, found.launcher_start, found.user) == (caller.pid, caller.start, caller.user)


def take_over(lease: Lease, found: Record) -> None:
    """Go on from the record of a dead guard of this very job. Raises PrivilegeError where that cannot be."""
    if not lease.order.adopt or found.guard_lives or not _is_of_same_job(lease, found):
        by = f"by process {found.guard} " if found.owner == lease.caller.owner else ""
        raise PrivilegeError(f"run {found.run_id} is guarded {by}already")
    if found.policy.public != lease.order.policy.public:
        raise PrivilegeError(f"run {found.run_id} has other public ports, and whoever takes it over keeps them")
    lease.stands = True
    # What it left out was told of then.
    kept = found.policy.joined_ports()
    unasked_ports = port_ranges.numbers(lease.order.policy.unasked_ports())
    lease.leave_out({port: "" for port in unasked_ports if not covers(kept, port)})
    # Its layers too: they stand, and whoever finds this guard dead in its turn has to know of them.
    lease.record = dataclasses.replace(
        lease.record,
        cgroup=found.cgroup,
        started=found.started,
        layers=found.layers,
        void=found.void,
        guard_restarts=found.guard_restarts + 1,
    )
    if found.void:
        lease.lose_shield(found.void)
    _narrow(lease, found.policy)
    more = tuple(port for port in found.policy.ports if port.purpose == Purpose.OPENED_MEANWHILE)
    lease.policy = dataclasses.replace(lease.policy, ports=(*lease.order.policy.ports, *more))
    # And what was closed while the job ran: it would be open until it is found again.
    lease.record = dataclasses.replace(lease.record, policy=lease.policy)
    if lease.key is not None and found.key:  # of what stands, whatever a file has by now that it was made of
        lease.record = dataclasses.replace(lease.record, key=found.key)
    lease.found = found


def close_to_all(lease: Lease, why: str) -> None:
    """Let nobody in from here on: each would have to show a tag, and none counts any more."""
    lease.policy = tagging.by_address(lease.policy, ())
    lease.key, lease.key_required = None, True
    lease.record = dataclasses.replace(lease.record, policy=lease.policy, key="", key_source="", nodes_guarded=0)
    lease.notes += (f"nobody may connect to this job any more: {why}",)


def _narrow(lease: Lease, found: Policy) -> None:
    """Have a tag count from nowhere that it did not count from."""
    if lease.key is None:
        return
    if found.admission is Admission.BOTH and lease.policy.admission is Admission.TAG:
        close_to_all(lease, f"none of its peers may be one {_NOW}")
        return
    if not lease.policy.admits_by_tag or not found.tags_from:
        return
    now = lease.policy.tags_from
    both = common(found.tags_from, now) if now else found.tags_from
    if both:
        lease.policy = dataclasses.replace(lease.policy, tags_from=both)
    elif lease.key_required:
        close_to_all(lease, f"a tag of its key counts from nowhere {_NOW}")
    else:
        lease.forget_key(f"a tag of it counts from nowhere {_NOW}")


def fit_shield(lease: Lease, cgroup: int) -> None:
    """Have what stands judge by the lease's policy: as it is if it does, with other peers, or by a shield in its place.

    Raises ShieldUnavailable, and PrivilegeError where what stands cannot be replaced; it stands then.
    """
    if lease.shield is None or lease.found is None:
        return
    if _judged_by(lease.found.policy) != _judged_by(lease.policy):
        _replace_shield(lease, cgroup, lease.shield, lease.found)
    lease.shield.replace_peers(lease.policy.peers)
    if lease.shield.tags is not None and lease.key is not None:
        lease.shield.tags.replace_networks(lease.policy.tagged)
        lease.key = dataclasses.replace(lease.key, fingerprint=lease.record.key)


def require_same_key(lease: Lease) -> None:
    """Raise PrivilegeError where a shield is to be hung for a run whose key cannot be made any more."""
    if lease.key is not None and lease.key.fingerprint != lease.record.key:
        raise PrivilegeError(
            f"the key of run {lease.policy.run_id} was made of what is not there any more, and a shield cannot be hung "
            "without it: what stands stays; start the job again"
        )


def _judged_by(policy: Policy) -> tuple[object, ...]:
    """Return what is in a shield for good."""
    return policy.admission, policy.has_tags, policy.tags_from, policy.tags_through_any


def _replace_shield(lease: Lease, cgroup: int, standing: Shield, found: Record) -> None:
    """Hang another shield in the place of the one that stands. For a moment both judge, and each has to let one in."""
    require_same_key(lease)
    try:
        lease.shield = Shield.attach(cgroup, lease.policy, lease.key)
        standing.detach()
    except ShieldUnavailable as error:
        raise PrivilegeError(f"the shield of run {found.run_id} cannot be made to judge otherwise: {error}") from error
    standing.close()
    if lease.key is None:
        lease.notes += ("the shield asks nobody for a tag any more",)
    elif lease.policy.tags_from:
        counts = listed(lease.policy.tags_from)
        lease.notes += (f"the shield lets tags count from {counts} alone now",)
