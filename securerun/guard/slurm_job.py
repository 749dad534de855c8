"""What an order says of a job of Slurm's that has no launcher to go on and hear its guard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from securerun.guard import documents
from securerun.guard.documents import ProtocolError

_MOST_JOBS = 2**32 - 1
_MOST_USERS = 2**32 - 2
_LONGEST_PATH = 1024
# src/plugins/cgroup/v2/cgroup_v2.c: below the slice of init's; with the node's name where several slurmds may be.
_SCOPE = re.compile(r"(?:[A-Za-z0-9._-]+_)?slurmstepd\.scope", re.ASCII)
_OF_WHOLE_JOB = ("user", "cgroup", "more")


@dataclass(frozen=True)
class SlurmJob:
    """A job of Slurm's. Whoever orders ends at once: its guard ends with the job, and is heard by `scontrol notify`.

    number: the job's. speaks: whether its guard is one that tells the job, of several on this node. renews: whether
    the job's nodes are Slurm's word, so that Slurm may be asked for them again.
    cgroup: that of the whole job on this node, which root's Prolog orders a guard for; "" where it is for a task: then
    the parent of who orders is guarded, as it will be that task. user: the job's, where it is for the whole job.
    more: who may connect besides the job's nodes, as root's Prolog names them.
    """

    number: int
    speaks: bool = True
    renews: bool = False
    user: int = 0
    cgroup: str = ""
    more: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it is for all of the job on this node, and not for one task."""
        return bool(self.cgroup)


def is_cgroup_of(path: str, number: int) -> bool:
    """Return whether a cgroup has the place that Slurm gives a job of this number."""
    place = PurePosixPath(path)
    named = place.name == f"job_{number}" and _SCOPE.fullmatch(place.parent.name) is not None
    return named and place.is_absolute() and ".." not in place.parts and "\0" not in path and number > 0


def document(job: SlurmJob) -> dict[str, Any]:
    """Return it as JSON's own types."""
    plain = {"job": job.number, "speaks": job.speaks, "renews": job.renews}
    if not job.is_whole:
        return plain
    return {**plain, "user": job.user, "cgroup": job.cgroup, "more": job.more}


def read(body: Mapping[str, Any]) -> SlurmJob:
    """Return what a document says. Raises ProtocolError for one that is not exactly such."""
    whole = _OF_WHOLE_JOB if "cgroup" in body else ()
    documents.require_fields(body, "job", "speaks", "renews", *whole)
    number = documents.number(body, "job")
    speaks, renews = documents.flag(body, "speaks"), documents.flag(body, "renews")
    if not 0 < number <= _MOST_JOBS:
        raise ProtocolError("job is no number of a job of Slurm's")
    if not whole:
        return SlurmJob(number, speaks, renews)
    user, cgroup, more = documents.number(body, "user"), documents.text(body, "cgroup"), documents.text(body, "more")
    if not 0 <= user <= _MOST_USERS:
        raise ProtocolError("user is no id of a user")
    if len(cgroup) > _LONGEST_PATH or not cgroup.isprintable() or not is_cgroup_of(cgroup, number):
        raise ProtocolError(f"cgroup is not that of job {number} of Slurm's")
    if not more.isprintable():
        raise ProtocolError("more is not printable")
    return SlurmJob(number, speaks, renews, user, cgroup, more)
