"""Which of a node's tasks this process is, where a batch system or MPI starts several of one job side by side.

`srun --ntasks-per-node=8 securerunctl exec -- python train.py` is eight launchers, each with a lease of its own, and
one of them speaks for all. Only what is said goes by these variables, never what is guarded: that goes by the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# The number of the task among those of its node: srun(1); Open MPI; MPICH's and Intel's Hydra; MVAPICH; PALS; jsrun;
# flux. All that are there count: a mpirun that srun starts sees both.
_NUMBERS = (
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "JSM_NAMESPACE_LOCAL_RANK",
    "FLUX_TASK_LOCAL_ID",
)
# How many they are, where one variable says so.
_COUNTS = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "PALS_LOCAL_SIZE",
    "JSM_NAMESPACE_LOCAL_SIZE",
)
_MOST_TASKS = 100_000
_NUMBER = re.compile(r"[0-9]{1,5}")
# "8(x2),4": so many tasks on so many nodes, in the order of the nodes (srun(1), SLURM_TASKS_PER_NODE).
_SHARE = re.compile(r"([0-9]{1,5})(?:\(x([0-9]{1,6})\))?")


@dataclass(frozen=True)
class Task:
    """One task of a node. number: 0 for the first, and where nobody says so. of: how many, 0 where nobody says so."""

    number: int = 0
    of: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it speaks for the tasks of its node."""
        return self.number == 0

    @property
    def has_siblings(self) -> bool:
        """Whether the node has other tasks of the job."""
        return self.number > 0 or self.of > 1


def of_environment(environment: Mapping[str, str]) -> Task:
    """Return which task of its node a process with this environment is."""
    numbers = [_number(environment.get(name, "")) for name in _NUMBERS]
    counts = [*(_number(environment.get(name, "")) for name in _COUNTS), _of_slurm(environment)]
    return Task(max(number or 0 for number in numbers), max(count or 0 for count in counts))


def _of_slurm(environment: Mapping[str, str]) -> int | None:
    """Return how many tasks of its step a node of Slurm's has."""
    node = _number(environment.get("SLURM_NODEID", ""))
    shares = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    if node is None or "SLURM_LOCALID" not in environment:
        return None
    for share in shares.split(","):
        match = _SHARE.fullmatch(share)
        if match is None:
            return None
        node -= int(match.group(2) or 1)
        if node < 0:
            return min(int(match.group(1)), _MOST_TASKS)
    return None


def _number(text: str) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) else None
