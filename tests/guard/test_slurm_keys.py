"""In a job of a real Slurm's nobody makes a key: guards make one of munge's, the same on all nodes of the job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest
import slurm
from checkout import COMMANDS
from hosts import Network, require_root_and_tools
from slurm import Cluster

EXEC = (str(COMMANDS / "securerunctl"), "exec")
PRINT = "from securerun import job_secret; print('secret', job_secret().decode())"
PATH = {"PATH": f"{COMMANDS}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def cluster(root: None) -> Iterator[Cluster]:
    require_root_and_tools()
    slurm.require_tools()
    with (
        Network("sl0", "sl1", "controller") as network,
        Cluster(network, "controller", ("sl0", "sl1"), as_installed=True) as made,
    ):
        yield made


def step(
    cluster: Cluster, *options: str, env: Mapping[str, str | None] | None = None, program: str = PRINT
) -> list[str]:
    """What a job of two nodes prints, on standard error as well."""
    tasks = ("srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c", 'exec "$@" 2>&1', "sh")
    launch = (*EXEC, "--preflight", "off", *options, "--", "python", "-c", program)
    return cluster.run(*tasks, *launch, env={**PATH, "MASTER_PORT": "29500", **(env or {})}).splitlines()


def test_nodes_of_a_job_of_slurms_have_a_key_that_nobody_made(cluster: Cluster) -> None:
    said = step(cluster, "--key", "require")
    keys = [line.partition(": ")[2].partition(": ")[2] for line in said if ": key " in line]
    secrets = [line for line in said if line.startswith("secret ")]
    assert len(keys) == len(secrets) == 2 and len(set(keys)) == len(set(secrets)) == 1, said
    assert "of /etc/munge/munge.key, the same on all nodes" in keys[0]
    another = [line for line in step(cluster, "--key", "require") if line.startswith("secret ")]
    assert len(set(another)) == 1 and set(another) != set(secrets), "of another job it is another"


def test_by_itself_the_key_adds_to_the_nodes_that_slurm_names(cluster: Cluster) -> None:
    said = step(cluster)
    assert sum("(Slurm (SLURM_JOB_NODELIST))" in line for line in said) == 2, said
    assert sum(": key " in line and "may connect as well" in line for line in said) == 2, said


def test_nodes_of_a_job_of_slurms_are_guarded_by_it_and_say_how_many_they_are(cluster: Cluster) -> None:
    """One of them listens, and the other connects to it: each has then seen the other."""
    meet = (
        "import os, socket, time; rank = int(os.environ['SLURM_PROCID']); address = ('10.77.0.1', 29500)\n"
        "if rank == 0:\n"
        "    with socket.create_server(('', 29500)) as store: store.accept()[0].recv(1)\n"
        "else:\n"
        "    deadline = time.monotonic() + 20\n"
        "    while True:\n"
        "        try: socket.create_connection(address, 1).close(); break\n"
        "        except OSError:\n"
        "            if time.monotonic() > deadline: raise\n"
        "            time.sleep(0.2)\n"
    )
    said = step(cluster, "--key", "require", program=meet)
    assert sum("2 of 2 nodes guarded" in line for line in said) >= 2, "\n".join(said)
