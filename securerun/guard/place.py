"""Where a job's cgroup is, and how it comes to be there: below the launcher's own, or where Slurm has a whole job's."""

from __future__ import annotations

from securerun.guard.cgroup import JobCgroup, make_job_cgroup, open_job_cgroup, path_of_job_cgroup
from securerun.guard.lease import Lease


def path_for(lease: Lease) -> str:
    """Return where the job's cgroup is, or is to be. Raises CgroupUnavailable where it cannot be."""
    if lease.record.cgroup:
        return lease.record.cgroup
    slurm = lease.order.slurm
    return slurm.cgroup if slurm and slurm.is_whole else path_of_job_cgroup(lease.caller.pid, lease.policy.run_id)


def make(lease: Lease, path: str) -> JobCgroup:
    """Make the job's cgroup, or open what a dead guard made, or Slurm. Raises CgroupUnavailable."""
    if lease.order.slurm and lease.order.slurm.is_whole:
        from securerun.guard import slurm_served  # few hosts are Slurm's

        return slurm_served.make_cgroup(lease.caller, path, lease.policy.run_id)
    return (open_job_cgroup(path) if lease.order.adopt else None) or make_job_cgroup(path)
