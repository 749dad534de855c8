"""Remove what dead runs left, and only that.

A run is dead when its launcher and its guard are both gone, by pid and start time, or belong to another boot, and no
process is left in its cgroup. A guard that died alone is replaced by its launcher; a launcher that died alone is
cleaned up after by its guard.
"""

from __future__ import annotations

from collections.abc import Iterator

from securerun.firewall.backends import NAMES, open_chains
from securerun.firewall.chains import PortChainsUnavailable
from securerun.guard import records, reserved, run_directory
from securerun.guard.cgroup import open_job_cgroup
from securerun.guard.records import Record
from securerun.linux import proc
from securerun.linux.cgroups import CgroupUnavailable
from securerun.linux.port_ranges import ReservationUnavailable

# What stands in the way of reaping, but for the disk.
OBSTACLES = (PortChainsUnavailable, ReservationUnavailable, CgroupUnavailable)


def reap_all(directory: int) -> Iterator[str]:
    """Reap every dead run and yield a line for each that could not be reaped. The caller holds the host's lock."""
    run_directory.remove_partial(directory)
    for record in records.read_all(directory):
        if not may_reap(record):
            continue
        try:
            reap(directory, record)
        except OBSTACLES as error:
            yield f"what run {record.run_id} left cannot be removed: {error}"


def may_reap(record: Record) -> bool:
    """Return whether a run is dead, and what it left can be removed from here. The caller holds the host's lock."""
    return _is_dead(record) and _is_within_reach(record)


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
    cgroup = open_job_cgroup(record.cgroup) if record.cgroup else None
    if cgroup is not None:
        cgroup.remove()
        cgroup.close()
    run_directory.remove(directory, record.run_id)


def _is_dead(record: Record) -> bool:
    if not record.is_abandoned:
        return False
    if record.boot_id != proc.boot_id() or not record.cgroup:
        return True
    cgroup = open_job_cgroup(record.cgroup)
    if cgroup is None:
        return True
    populated = cgroup.populated()
    cgroup.close()
    return not populated


def _is_within_reach(record: Record) -> bool:
    """Return whether its chains can be reached: from within their network namespace, or they are gone with it."""
    if record.boot_id != proc.boot_id() or record.network == proc.namespace("net"):
        return True
    return not proc.namespace_exists("net", record.network)
