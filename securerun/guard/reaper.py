"""Remove what dead runs left, and only that.

A run is dead when its launcher and its guard are both gone, by pid and start time, or belong to another boot, and no
process of it is left: in its cgroup, with its id in the environment, or, where it has no shield, on a port of its plan.
What has processes left, and nobody to look after them, stays as it is until they end. A guard that died alone is
replaced by its launcher; a launcher that died alone is cleaned up after by its guard.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator

from securerun.firewall.backends import NAMES, open_chains
from securerun.firewall.chains import PortChainsUnavailable
from securerun.guard import records, reserved, run_directory
from securerun.guard.caller import ROOT
from securerun.guard.cgroup import JobCgroup, open_job_cgroup
from securerun.guard.records import Brief, Record
from securerun.linux import cgroups, proc, sock_diag
from securerun.linux.cgroups import CgroupUnavailable
from securerun.linux.port_ranges import ReservationUnavailable
from securerun.linux.sock_diag import SocketsUnavailable

# What stands in the way of reaping, but for the disk.
OBSTACLES = (PortChainsUnavailable, ReservationUnavailable, CgroupUnavailable)

_PIDS_NAMED = 8
# Whoever launches meanwhile waits for the lock. A dead run's processes are long gone, and so is its set's last rule.
_REMOVAL_SECONDS = 0.2
# What is left then is for the next launch.
_REAPING_SECONDS = 3.0
# Of that, for asking processes whether they are of a dead run: how many there are is for their users to say.
_ASKING_SECONDS = 0.5


def reap_all(directory: int, user: int, *, may_be_root: bool = True, container: str = "") -> Iterator[str]:
    """Reap every dead run and yield a line for each that could not be reaped, and for the user's own that still runs.

    may_be_root: user id 0 is root's, to whom all of them are told; to whoever is in a container its own alone. The
    caller holds the host's lock, so what has not been looked at after some seconds is left, and so is a run of whom not
    all processes could be asked by then.
    """
    run_directory.remove_partial(directory)
    is_root = user == ROOT and may_be_root
    owner = (user, False, container)
    deadline, seconds_to_ask = time.monotonic() + _REAPING_SECONDS, _ASKING_SECONDS
    for brief in _own_first(records.read_briefs(directory), owner):
        began = time.monotonic()
        record = brief.whole() if began < deadline and brief.is_abandoned else None
        if record is None:
            continue
        left = what_runs(record, began + seconds_to_ask)
        seconds_to_ask -= time.monotonic() - began
        if left and (is_root or record.owner == owner):
            yield f"run {record.run_id} has no guard, and {left}; what closes its ports stays until that ends"
        if left or not is_within_reach(record):
            continue
        try:
            reap(directory, record)
        except OBSTACLES as error:
            if not container or record.owner == owner:
                yield f"what run {record.run_id} left cannot be removed: {error}"


def _own_first(known: Iterable[Brief], owner: tuple[int, bool, str]) -> list[Brief]:
    """Return an owner's runs before all others, and these in another order each time.

    So no runs for which the time is never enough come before the same others launch after launch.
    """
    return sorted(known, key=lambda brief: (brief.owner != owner, os.urandom(8)))


def reap(directory: int, record: Record) -> None:
    """Remove a dead run's chains, reserved ports, cgroup and record. The caller holds the host's lock.

    Raises PortChainsUnavailable, ReservationUnavailable or CgroupUnavailable for what cannot be removed; then the
    record stays.
    """
    if record.stands_here:
        for layer in record.layers:
            if layer.backend in NAMES:
                open_chains(layer.backend, record.run_id).remove()
        reserved.give_back(directory, record.run_id)
    else:
        reserved.forget(directory, record)
    if record.cgroup:
        from securerun.guard import proof  # few launches reap

        proof.remove_remains(record.cgroup, record.run_id)
    cgroup = open_job_cgroup(record.cgroup) if record.cgroup else None
    if cgroup is not None:
        cgroup.remove(_REMOVAL_SECONDS)
        cgroup.close()
    run_directory.remove(directory, record.run_id)


def what_runs(record: Record, until: float) -> str:
    """Return, in words, what is left running of a run whose launcher and guard are gone; "" when nothing is.

    until: on the monotonic clock. A run of whose processes not all could be asked by then counts as one that runs.
    """
    if record.boot_id != proc.boot_id():
        return ""
    try:
        pids = sorted(records.processes_of(record, until))
    except TimeoutError:
        return f"user {record.user} has more processes than could be asked in a moment whether they are of it"
    if pids:
        listed = " ".join(map(str, pids[:_PIDS_NAMED])) + (" ..." if len(pids) > _PIDS_NAMED else "")
        return f"processes of it still run ({listed})"
    cgroup = open_job_cgroup(record.cgroup) if record.cgroup else None
    if cgroup is not None:
        populated, holds = cgroup.populated(), _holds(record, cgroup)
        cgroup.close()
        if populated:
            return "processes of it still run"
        if holds:
            return f"job {record.slurm_job} of Slurm's has not ended here"
    port = _port_in_use(record) if record.is_bare and record.stands_here else None
    return "" if port is None else f"user {record.user} still listens on port {port} of it"


def _holds(record: Record, cgroup: JobCgroup) -> bool:
    """Return whether the cgroup is that of a whole job of Slurm's, and no epilog has let go of it."""
    return record.is_of_whole_slurm_job and f"securerun-{record.run_id}" in cgroups.children(cgroup.descriptor)


def _port_in_use(record: Record) -> int | None:
    """Return a port of the run's on which its user listens: a process may have written over its environment."""
    with contextlib.suppress(SocketsUnavailable):
        for listener in sock_diag.listeners():
            if listener.user == record.user and any(listener.port in ports for ports in record.policy.ports):
                return listener.port
    return None


def is_within_reach(record: Record) -> bool:
    """Return whether its chains can be reached: from within their network namespace, or they are gone with it."""
    if record.boot_id != proc.boot_id() or record.network == proc.namespace("net"):
        return True
    return not proc.namespace_exists("net", record.network)
