"""How many nodes a launch has, before torch's parser is there to say it: more than one anywhere counts."""

from __future__ import annotations

import pytest

from securerun.job import environment
from securerun.job.nodes import several, several_of_command


@pytest.mark.parametrize(
    ("arguments", "variable", "says"),
    [
        ("train.py", "", ""),
        ("--nnodes 1 train.py", "", ""),
        ("--nnodes=1:1 train.py", "1", ""),
        ("--standalone --nproc-per-node 2 train.py", "", ""),
        ("--nnodes 2 train.py", "", "--nnodes 2"),
        ("--nnodes=2 train.py", "", "--nnodes=2"),
        ("--nno 1:2 train.py", "", "--nno 1:2"),
        ("--nn=4 train.py", "", "--nn=4"),
        ("--nnodes two train.py", "", "--nnodes two"),
        ("--nnodes", "", "--nnodes "),
        ("train.py", "2", "PET_NNODES=2"),
        ("train.py", "1:4", "PET_NNODES=1:4"),
        ("--nnodes 1 train.py", "2", "PET_NNODES=2"),
        ("--nproc-per-node 2 --node-rank 0 --no-python train.py", "", ""),
        ("train.py --nnodes 2", "", "--nnodes 2"),
        ("-- train.py --nnodes 2", "", ""),
    ],
)
def test_more_than_one_node_anywhere_counts(arguments: str, variable: str, says: str) -> None:
    assert several(arguments.split(), {"PET_NNODES": variable}) == says


@pytest.mark.parametrize(
    ("variables", "peers", "by_name", "says"),
    [
        ({}, None, False, "nothing says that it is of one node (--peers localhost does)"),
        ({}, None, True, ""),
        ({}, "localhost", False, ""),
        ({"NNODES": "1"}, None, False, ""),
        ({"NNODES": "2"}, None, True, "it is of 2 nodes"),
        ({"NNODES": "2"}, "localhost", False, "it is of 2 nodes"),
        ({"MASTER_ADDR": "127.0.0.1"}, None, False, ""),
        ({"MASTER_ADDR": "node0"}, None, False, "nothing says that it is of one node (--peers localhost does)"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "localhost", True, "it is one of several tasks of this node"),
    ],
)
def test_command_that_nobody_has_read_says_it_by_its_environment(
    variables: dict[str, str], peers: str | None, by_name: bool, says: str
) -> None:
    job = environment.describe_job(variables, ["deepspeed"])
    assert several_of_command(job, peers, variables, by_name=by_name) == says
