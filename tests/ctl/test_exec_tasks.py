"""Several tasks of a job on one node, each under securerunctl exec, as srun and mpirun start them without torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from checkout import COMMANDS
from hosts import Network, eventually, finish, finish_all
from probe import reach
from users import GUARD, PrivateMachine, User

EXEC = (str(COMMANDS / "securerunctl"), "exec")
# Listens, reaches the ports that it is told of, says so, and waits for the end of its input.
RANK = """
import socket, sys
listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
print(listener.getsockname()[1], flush=True)
for port in sys.stdin.readline().split():
    socket.create_connection(({host!r}, int(port)), timeout=5).close()
print("reached all", flush=True)
sys.stdin.read()
"""
LISTENERS = """
import socket, sys
listeners = [socket.create_server(("", port)) for port in (6000, 60003)]
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def machine(network: Network) -> Iterator[PrivateMachine]:
    with PrivateMachine() as machine:
        yield machine


@pytest.fixture
def alice(machine: PrivateMachine) -> User:
    user = machine.add_user("alice")
    machine.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
    return user


def of_step(number: int, tasks: int) -> dict[str, str]:
    """What srun tells a task."""
    return {"SLURM_LOCALID": str(number), "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)"}


def test_tasks_that_start_at_once_reach_each_other_and_one_of_them_speaks(
    network: Network, machine: PrivateMachine, alice: User
) -> None:
    """More of an ordinary user's at once than may wait for their orders: the others ask again."""
    node, peer, stranger = network
    command = [
        *EXEC,
        "--preflight",
        "off",
        "--peers",
        peer.ipv4,
        "--",
        sys.executable,
        "-c",
        RANK.format(host=node.ipv4),
    ]
    tasks = 10
    jobs = [
        machine.popen(node, command, user=alice, env=of_step(number, tasks), stdin=subprocess.PIPE)
        for number in range(tasks)
    ]
    ports = []
    for job in jobs:
        assert job.stdout is not None
        ports.append(int(job.stdout.readline()))
    for job in jobs:
        assert job.stdin is not None and job.stdout is not None
        job.stdin.write(" ".join(map(str, ports)) + "\n")
        job.stdin.flush()
        assert job.stdout.readline() == "reached all\n"
    targets = [(node.ipv4, port) for port in ports]
    assert reach(peer, targets) == dict.fromkeys(targets, True)
    assert reach(stranger, targets[:2]) == dict.fromkeys(targets[:2], False)
    for job in jobs:
        assert job.stdin is not None
        job.stdin.close()
        job.stdin = None
    done = finish_all(jobs, timeout=30)
    assert [one.returncode for one in done] == [0] * tasks, done
    assert f"one of {tasks} tasks of this node, each with a lease of its own" in done[0].stderr
    assert done[0].stderr.count("closed to all others by shield") == 1
    # Who was turned away is said by whom it concerns, and nothing else.
    assert f"blocked {stranger.ipv4} → {ports[1]}" in done[1].stderr and "closed to all" not in done[1].stderr
    assert [one.stderr for one in done[2:]] == [""] * (tasks - 2)
    assert eventually(lambda: not machine.records())


@pytest.mark.parametrize("scope", ["auto", "ports"])
def test_ports_that_another_task_has_are_no_finding(
    network: Network, machine: PrivateMachine, alice: User, scope: str
) -> None:
    node = network["node0"]
    command = [*EXEC, "--scope", scope, "--peers", network["node1"].ipv4]
    variables = {"MASTER_ADDR": node.ipv4, "MASTER_PORT": "6000", "HCCL_IF_BASE_PORT": "60000"}
    first = machine.popen(
        node,
        [*command, "--", sys.executable, "-c", LISTENERS],
        user=alice,
        env={**variables, **of_step(0, 2)},
        stdin=subprocess.PIPE,
    )
    assert first.stdout is not None and first.stdout.readline() == "up\n"
    plan = machine.run(
        node, [*command, "--dry-run", "--preflight", "warn", "true"], user=alice, env={**variables, **of_step(1, 2)}
    )
    assert "in use" not in plan.stderr, plan
    alone = machine.run(node, [*command, "--dry-run", "--preflight", "warn", "true"], user=alice, env=variables)
    assert "port 60003 of the plan is in use" in alone.stderr, alone
    second = machine.run(node, [*command, "--", "echo", "ran"], user=alice, env={**variables, **of_step(1, 2)})
    assert (second.returncode, second.stdout) == (0, "ran\n"), second
    assert "closed to all others by shield" not in second.stderr
    # What is weaker than a shield each task says for itself.
    assert ("scope ports:" in second.stderr) is (scope == "ports")
    assert finish(first, timeout=30, text_input="").returncode == 0
