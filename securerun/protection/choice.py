"""By what a job is closed: a guard with privilege, or a network of its own, which takes none and is for one node alone.

It is chosen before torch is there to read the command line, since a network of its own has to be begun by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from securerun.errors import PolicyError, UsageError
from securerun.job.job import UNKNOWN_NODES
from securerun.protection.client import Guard
from securerun.protection.own_process import A_PROGRAM_STAYS

if TYPE_CHECKING:
    from securerun.job.job import Job
    from securerun.options import Options
    from securerun.protection.apart import Apart

NAMESPACE = "namespace"
_GUARD = "leave --scope out, and have a guard: see securerunctl doctor"


def begin(asked: Options, several: str, meanwhile: Iterable[None] = (), *, goes_on: bool) -> Guard | Apart:
    """Return what is to close a job. several: what says that it may be of more than one node, "" if nothing does.

    goes_on: whether this process may go on after the job, which then is not to leave it in another network.
    meanwhile: steps of what is to be done anyway, and starts no thread, for the time until a guard has answered.

    Where nobody asked for either, a guard if one is available; a network of the job's own if none is, it is of one
    node, and there is a way out. Raises PrivilegeError or UsageError for one that was asked for and cannot be had.
    """
    if asked.scope == NAMESPACE:
        return _by_name(asked, several, goes_on=goes_on)
    guard = Guard(goes_on=goes_on, brings_key=_may_bring_key(asked, several))
    if not _may_be_apart(asked) or several or guard.is_roots:
        return guard
    if goes_on:
        guard.note(*A_PROGRAM_STAYS)
        return guard
    from securerun.protection import apart

    option = apart.insists(asked)
    bar = None if option else apart.bar()
    if not option and bar is None and guard.can_be_had(meanwhile):
        return guard
    why, fix = f"{option} is for those who connect", f"leave {option} out, or write `--` before a script of that option"
    if bar is not None:
        why, fix = bar.what, bar.fix
    elif not option:
        guard.forget()
        try:
            return apart.Apart(by_name=False)
        except apart.Barred as error:
            why, fix = error.bar.what, error.bar.fix
    guard.note(f"in a network of its own: {why}", fix)
    return guard


def require_right(chosen: Guard | Apart, job: Job, asked: Options) -> tuple[Job, Options]:
    """Return the job and what is asked of securerun, now that all of it is known, for a job that is closed by this.

    Raises PolicyError for a job of several nodes in a network of its own, PrivilegeError for one whose way out does not
    come, and UsageError where the choice went by an option that was the script's.
    """
    if isinstance(chosen, Guard):
        if asked.scope == NAMESPACE:
            raise UsageError(f"{asked.scope_source} {NAMESPACE}: write it before the script, and before `--`")
        return job, asked
    if chosen.by_name and asked.scope != NAMESPACE:
        raise UsageError(f"--scope {NAMESPACE}: is it securerun's option or the script's? Write `--` before the script")
    if job.max_nodes not in (1, UNKNOWN_NODES):
        raise PolicyError(
            f"this job is of {job.nodes}, and nobody can connect to one in a network of its own; {_GUARD}"
        )
    chosen.wait_for_way()
    # Nobody comes by any interface.
    return of_one_node(job), replace(asked, scope=NAMESPACE, interface=None)


def of_one_node(job: Job) -> Job:
    """Return the job as it is in a network of its own, whatever was not known of its nodes."""
    return replace(job, min_nodes=1, max_nodes=1) if job.max_nodes == UNKNOWN_NODES else job


def without_guard(asked: Options, job: Job) -> str:
    """Return what becomes of a job that no guard is available to, in words; "" where it is refused."""
    if not _may_be_apart(asked) and asked.scope != NAMESPACE:
        return ""
    from securerun.protection import apart, way_out

    if job.max_nodes not in (1, UNKNOWN_NODES) or apart.insists(asked):
        return ""
    bar = apart.bar()
    if bar is not None:
        return f"this job would go into a network of its own, but {bar}"
    found = way_out.find()
    return f"this job goes into a network of its own, out by {found.name if found else 'nothing'}"


def _may_be_apart(asked: Options) -> bool:
    """Return whether nothing that is asked for keeps a job from a network of its own."""
    return asked.scope == "auto" and asked.run_as is None and not asked.unprotected and not asked.dry_run


def _may_bring_key(asked: Options, several: str) -> bool:
    """Return whether the order is likely to have a key, for which a guard then loads ahead; the order has the word."""
    if asked.unprotected or (asked.key == "auto" and not several):
        return False
    from securerun.job import key

    return key.is_likely(asked, os.environ)


def _by_name(asked: Options, several: str, *, goes_on: bool) -> Apart:
    from securerun.protection import apart

    if goes_on:
        raise UsageError(
            f"{asked.scope_source} {NAMESPACE}: a program that goes on after the job would stay in another network; "
            f"start the command securerun, or this program by securerunctl exec --scope {NAMESPACE}"
        )
    if several:
        raise PolicyError(
            f"{asked.scope_source} {NAMESPACE}: {several}, and nobody can connect to a job in a network of its own; "
            f"{_GUARD}; or, if that is the script's own option, write `--` before the script"
        )
    if asked.run_as is not None:
        raise UsageError(
            f"{asked.scope_source} {NAMESPACE}: {asked.run_as_source} has a guard of root's, which closes as much; "
            "leave one of them out"
        )
    bar = apart.insists(asked)
    if bar:
        raise PolicyError(
            f"{asked.scope_source} {NAMESPACE}: nobody can connect to a job in a network of its own, and {bar} is for "
            f"those who do; leave {bar} out, or the scope"
        )
    return apart.Apart(by_name=True)
