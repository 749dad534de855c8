"""One task a rank, as mpirun and srun start them: each has a lease of its own, on two nodes that nobody named, and all
are one job by its key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Network, finish_all
from key_homes import make_homes
from probe import Probe
from remains import nothing_left_behind

EXEC = (str(COMMANDS / "securerunctl"), "exec", "--")
TASKS = 2  # a node

# Meets the others at MASTER_ADDR, and adds ranks up in two groups; the second one's ports are opened when all have met.
MEET = """
import os, time, torch, torch.distributed as dist
def meet():
    dist.init_process_group("gloo")
    for group in (None, dist.new_group()):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=group)
        assert total.item() == 6, total
    time.sleep(1)
    dist.barrier()
    dist.destroy_process_group()
    print("all-reduce right", flush=True)
"""
GUARDED = """
from securerun import guarded, policy
with guarded(policy(key="auto"), key="auto"):
    meet()
"""


@pytest.mark.parametrize("way", ["exec", "guarded"])
def test_tasks_of_two_nodes_meet_by_their_key_and_nobody_else_comes_in(
    network: Network, tmp_path: Path, way: str
) -> None:
    node0, node1, stranger = network
    homes = make_homes(node0, tmp_path)
    program = [sys.executable, "-c", MEET + (GUARDED if way == "guarded" else "meet()")]
    command = program if way == "guarded" else [*EXEC, *program]
    started: list[subprocess.Popen[str]] = []
    with (
        nothing_left_behind(node0, node1),
        Probe(stranger, node0) as outside,
        Probe(node1, node0) as beside_the_peer,
    ):
        for number, (node, home) in enumerate(zip((node0, node1), homes)):
            for local in range(TASKS):
                variables = {
                    "HOME": str(home),
                    "MASTER_ADDR": node0.ipv4,
                    "MASTER_PORT": str(jobs.PORT),
                    "NNODES": "2",
                    "RANK": str(number * TASKS + local),
                    "WORLD_SIZE": str(2 * TASKS),
                    # What Open MPI's mpirun tells a task.
                    "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
                    "OMPI_COMM_WORLD_LOCAL_SIZE": str(TASKS),
                }
                started.append(node.popen(command, env=variables))
        done = finish_all(started, timeout=120)
    assert [each.returncode for each in done] == [0] * 2 * TASKS, done
    assert all("all-reduce right" in each.stdout for each in done)
    assert outside.tried and outside.reached == beside_the_peer.reached == set()
    if way == "exec":
        assert "2 of 2 nodes guarded" in done[0].stderr and "2 of 2 nodes guarded" in done[TASKS].stderr, done
        assert done[0].stderr.count("closed to all others by shield") == 1
        assert "closed to all others" not in done[1].stderr, done[1].stderr
