"""Which of its node's tasks a launcher is, in the words of batch systems and MPI; it decides only what is said."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from plans import plan

from securerun.firewall.policy import Layer
from securerun.guard.protocol import Guarding
from securerun.job.tasks import Task, of_environment
from securerun.protection import words

STEP = {"SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}
SHIELDED = Guarding((Layer("shield", "socket filter on /job"),), ("a note",))
UNSHIELDED = Guarding((Layer("iptables", "SECURERUN"),), ("no shield (no cgroup)",))


@pytest.mark.parametrize(
    ("variables", "task"),
    [
        ({}, Task()),
        ({"SLURM_LOCALID": "0", **STEP}, Task(0, 8)),
        ({"SLURM_LOCALID": "7", **STEP}, Task(7, 8)),
        ({"SLURM_LOCALID": "1", **STEP, "SLURM_NODEID": "2"}, Task(1, 4)),
        ({"SLURM_LOCALID": "1", **STEP, "SLURM_NODEID": "3"}, Task(1, 0)),
        # Of a batch script's own step, which is one task, whatever the job's steps will be.
        ({"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "8"}, Task(0, 0)),
        (STEP, Task()),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_LOCALID": "0"}, Task(3, 4)),
        ({"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, Task(1, 2)),
        ({"FLUX_TASK_LOCAL_ID": "2"}, Task(2, 0)),
        ({"SLURM_LOCALID": "-1", "SLURM_NODEID": "x", "SLURM_STEP_TASKS_PER_NODE": "8"}, Task()),
        ({"SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "many(x"}, Task(1, 0)),
        ({"SLURM_LOCALID": "9" * 5000}, Task()),
        ({"SLURM_LOCALID": "٣"}, Task()),
    ],
)
def test_task_of_the_node_is_known_in_every_systems_words(variables: Mapping[str, str], task: Task) -> None:
    assert of_environment(variables) == task


def said(task: Task, guarding: Guarding, loopback: str = "any") -> list[str]:
    return list(words.start(plan(task=task, loopback=loopback), guarding, "directly"))


def test_first_task_speaks_for_its_node_and_the_others_of_what_is_weaker() -> None:
    alone, first, second = (said(task, SHIELDED) for task in (Task(), Task(0, 8), Task(1, 8)))
    assert second == []
    (line,) = (one for one in first if one not in alone)
    assert line.endswith(
        "one of 8 tasks of this node, each with a lease of its own; the others say only what goes wrong"
    )
    assert any("no shield (no cgroup)" in one for one in said(Task(1, 8), UNSHIELDED))


def test_tasks_that_a_closed_loopback_keeps_from_each_other_are_told() -> None:
    (line,) = (one for one in said(Task(0, 2), SHIELDED, "job") if "one of 2 tasks" in one)
    assert "--loopback job keeps them from each other; leave it out, or start one task a node" in line
    assert not any("keeps them" in one for one in said(Task(), SHIELDED, "job"))
