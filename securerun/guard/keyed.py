"""What becomes of the key that an order has, or asks for: made, tried, handed out; or forgotten, and said why.

Loaded where an order has a key.
"""

from __future__ import annotations

import dataclasses
import importlib

from securerun.errors import PolicyError, PrivilegeError
from securerun.firewall import job_key, shield, tag_proof, tag_writer, tagging
from securerun.firewall.job_key import JobKey, JobSecret
from securerun.firewall.refusals import ShieldUnavailable
from securerun.guard import job_secret, keys, run_directory
from securerun.guard.cgroup import JobCgroup
from securerun.guard.keys import Found
from securerun.guard.lease import NO_SHIELD_NO_TAG, Lease
from securerun.guard.program import LIMITS_FILE
from securerun.guard.protocol import KeyOrder
from securerun.linux import addresses
from securerun.linux.networks import listed

# What else is loaded on the way of an order with a key, but when it has come.
_LATER = (
    "securerun.firewall.tag_program",
    "securerun.firewall.tags",
    "securerun.guard.answers",
    "securerun.guard.nodes",
)
_NONE_FOR_CONTAINERS = Found(None, why="a user id in a container is nobody's own, so this host makes no key for it")


def prepare() -> None:
    """Load all that an order with a key takes, and make what does not depend on it, for whoever has time now."""
    for name in _LATER:
        importlib.import_module(name)
    job_key.prepare()
    tag_writer.writing_program()


def take(lease: Lease, wanted: KeyOrder) -> JobSecret | None:
    """Make the key of a lease; return what it is made of, which the order forgets, or None.

    Raises PolicyError where there is none and nobody is to come in without.
    """
    lease.order = dataclasses.replace(lease.order, key=None)
    found = _NONE_FOR_CONTAINERS if _is_of_container(lease, wanted) else keys.find(wanted, lease.caller, lease.site)
    if found.secret is None:
        consequence = "who may connect is told by addresses alone" if found.is_wrong else ""
        _go_on_without(lease, found.why, consequence, required=wanted.required, by_new_rules=found.is_forbidden)
        return None
    if not lease.caller.is_root and lease.site.peers == ():
        why = f"this host allows no peers ({LIMITS_FILE})"
        _go_on_without(lease, why, "nobody may connect", required=wanted.required, by_new_rules=True)
        return None
    _give(lease, found.secret.key(), found.source, wanted)
    if lease.order.scope == "ports":  # known before anybody is asked whether such a run may be beside theirs
        lease.forget_key(NO_SHIELD_NO_TAG)
    return found.secret


def _go_on_without(lease: Lease, why: str, consequence: str, *, required: bool, by_new_rules: bool) -> None:
    """Have no key, for this reason. required: whether nobody is to come in without a tag of one.

    by_new_rules: whether the host's rules, which may have changed since the job began, are the reason: a job that runs
    is closed to all then. Raises PolicyError for any other that requires a key.
    """
    if not required:
        lease.notes += (f"no key ({why}): {consequence}",) if consequence else ()
        return
    if not (by_new_rules and lease.order.adopt):
        raise PolicyError(
            f"the nodes of this job are to be known by a key, and there is none: {why}; make one with "
            "`securerunctl setup key` on one node and copy it to the others, or name the others with --peers and "
            "write --key off; nothing was started"
        )
    from securerun.guard import takeover

    takeover.close_to_all(lease, why)


def _is_of_container(lease: Lease, wanted: KeyOrder) -> bool:
    return wanted.secret is None and bool(lease.caller.container)


def _give(lease: Lease, key: JobKey, source: str, wanted: KeyOrder) -> None:
    """Have the lease go by this key from here on. source: the guard's own, in words, if it is of one."""
    lease.key, lease.key_required, lease.key_towards = key, wanted.required, wanted.towards
    within = () if lease.caller.is_root else lease.site.peers or ()
    try:
        lease.own = addresses.own()
    except OSError as error:
        raise PrivilegeError(f"this host's own addresses cannot be told ({error.strerror})") from error
    lease.policy = tagging.by_key(
        lease.policy,
        lease.own.networks,
        required=wanted.required,
        towards=wanted.towards,
        through_any=wanted.through_any,
        within=within,
    )
    if lease.policy.tags_from and not lease.order.adopt:
        allowed = listed(lease.policy.tags_from)
        lease.notes += (
            f"a tag of the job's key counts from {allowed} alone, where this host allows peers ({LIMITS_FILE})",
        )
    lease.record = dataclasses.replace(
        lease.record,
        policy=lease.policy,
        key=key.fingerprint,
        key_source=source,
        nodes_guarded=1,
        nodes=wanted.nodes,
    )


def try_tags(lease: Lease, cgroup: JobCgroup) -> None:
    """Forget a key whose tags do not work here. Raises PolicyError where nobody is to come in without."""
    try:
        shield.refuse_conflicts(cgroup.ancestors, tags=True)
        if not cgroup.populated():
            tag_proof.require_tags(cgroup.descriptor, lease.caller.pid)
    except ShieldUnavailable as error:
        lease.forget_key(str(error))


def hand_out(lease: Lease, secret: JobSecret) -> None:
    """Make the file with the secret of the job's frameworks, which goes with the run's record; or say that there is
    none."""
    caller = lease.caller
    if lease.found is not None and lease.found.key not in ("", secret.key().fingerprint):
        # Made of what is not there any more: the run goes on by its own, and its secret is where it was.
        lease.secret_path = job_secret.path_of(lease.policy.run_id)
        return
    if caller.container:  # which does not see the file, and on the host somebody else may have its user id
        return
    try:
        with run_directory.host_lock():
            lease.secret_path = job_secret.make(lease.policy.run_id, secret.for_frameworks(), caller.user, caller.group)
    except OSError as error:
        lease.notes += (f"no secret for the job's frameworks: {job_secret.DIRECTORY} cannot be used: {error.strerror}",)
