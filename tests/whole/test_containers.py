"""What a container must be given: each set of capabilities gets the scope that the README says, or a clear no."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import kernel
import pytest
from checkout import COMMANDS
from containers import DOCKER_CAPABILITIES, READ_ONLY_CGROUPS, WRITABLE_CGROUPS, container
from engines import ENGINES, HOSTS_CGROUPS, Engine, Node
from holding import HOLDER, Held
from hosts import Host, Network, eventually, finish_all
from key_homes import make_homes
from probe import Probe, reach
from process_table import name_of
from remains import nothing_left_behind

HOLDING = (sys.executable, str(HOLDER))
LISTENING = (*HOLDING, "--listen", "7001")


@pytest.fixture
def node(network: Network) -> Iterator[Host]:
    node = network["node0"]
    before = node.snapshot()
    yield node
    assert eventually(lambda: node.snapshot() == before, seconds=2)


def test_default_capabilities_are_refused_with_77_and_what_is_missing(node: Host) -> None:
    done = node.run(container(DOCKER_CAPABILITIES, READ_ONLY_CGROUPS, *HOLDING), timeout=30)
    assert done.returncode == 77, done
    assert "CAP_NET_ADMIN" in done.stdout and "--unprotected" in done.stdout


def test_net_admin_alone_gives_scope_ports(network: Network, node: Host) -> None:
    holder = _held(node, container(f"{DOCKER_CAPABILITIES},+net_admin", READ_ONLY_CGROUPS, *LISTENING))
    assert holder.start["guarding"] == ["iptables"]
    assert "no shield" in " ".join(holder.start["notes"])
    target = (node.ipv4, 7001)
    assert eventually(lambda: not reach(network["stranger"], [target])[target], seconds=2)
    holder.let_go()


def test_net_admin_and_bpf_with_a_writable_cgroup_give_the_shield(network: Network, node: Host) -> None:
    holder = _held(node, container(f"{DOCKER_CAPABILITIES},+net_admin,+bpf", WRITABLE_CGROUPS, *LISTENING))
    assert holder.start["guarding"] == ["shield", "iptables"], holder.start
    target = (node.ipv4, 7001)
    assert reach(network["stranger"], [target]) == {target: False}
    assert reach(node, [target]) == {target: True}
    holder.let_go()


@pytest.mark.kernel(kernel.TAGS)
def test_two_containers_with_their_hosts_network_are_nodes_by_the_key_alone(network: Network, tmp_path: Path) -> None:
    node0, node1, stranger = network
    homes = make_homes(node0, tmp_path)
    with nothing_left_behind(node0, node1), Probe(stranger, node0) as outside, Probe(node1, node0) as beside_the_peer:
        started = [
            node.popen(
                container(f"{DOCKER_CAPABILITIES},+net_admin,+bpf", WRITABLE_CGROUPS, *_training(node, rank, node0)),
                env={"HOME": str(home)},
            )
            for rank, (node, home) in enumerate(zip((node0, node1), homes))
        ]
        done = finish_all(started, timeout=120)
    assert [each.returncode for each in done] == [0, 0], done
    assert all("2 of 2 nodes guarded" in each.stderr for each in done), done
    assert outside.tried and outside.reached == beside_the_peer.reached == set()


@pytest.mark.kernel(kernel.TAGS)
def test_a_container_that_can_have_no_shield_takes_addresses_or_is_told_what_it_lacks(
    network: Network, tmp_path: Path
) -> None:
    node, peer, _ = network
    home, _ = make_homes(node, tmp_path)
    env = {"HOME": str(home), "MASTER_ADDR": node.ipv4, "MASTER_PORT": str(jobs.PORT), "NNODES": "2"}
    limited = (f"{DOCKER_CAPABILITIES},+net_admin", READ_ONLY_CGROUPS, str(COMMANDS / "securerunctl"), "exec")
    alone = node.run(container(*limited, "--", "true"), env=env)
    assert alone.returncode == 78 and "--peers" in alone.stderr, alone
    named = node.run(container(*limited, "--peers", peer.ipv4, "--", "true"), env=env)
    assert named.returncode == 0 and "no key (" in named.stderr, named


def _training(node: Host, rank: int, first: Host) -> list[str]:
    meeting = jobs.rendezvous("static", node, rank, first)
    return [jobs.SECURERUN, "--nnodes", "2", *meeting, str(jobs.TRAIN), "--groups", "1", "--epochs", "5"]


def _held(node: Host, command: list[str]) -> Held:
    return Held(node.popen(command, stdin=subprocess.PIPE))


# --- on real engines ---


@pytest.fixture(scope="module")
def own_network(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "stranger") as network:
        yield network


@pytest.fixture(scope="module")
def machine(own_network: Network) -> Iterator[Node]:
    with Node(own_network["node0"]) as machine:
        yield machine


@pytest.mark.parametrize("first", [(), ("--init",)], ids=["alone", "init"])
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left_on_the_host_after_a_good_end(machine: Node, engine: str, first: tuple[str, ...]) -> None:
    before = machine.host.snapshot()
    held = contained(machine.engine(engine), *machine.engine(engine).privileged, *first)
    assert held.start["guarding"] == ["shield", "iptables"], held.start
    during = machine.host.snapshot()
    assert held.run_id in during["iptables-save"] and "60000-60015" in during["reserved ports"]
    held.let_go()
    assert machine.host.snapshot() == before


# A name that the engine knows a container by, so that it can be killed.
NAMED = "--name=training"


@pytest.fixture
def left(machine: Node) -> Iterator[str]:
    """The id of a run of a container that was killed as a whole: its rules are on the host, and its record is not."""
    before = machine.host.snapshot()
    podman = machine.podman()
    held = contained(podman, *RIGHTS, NAMED)
    podman.kill("training")
    held.process.wait(timeout=20)
    held.close()
    assert held.run_id in rules(machine)
    yield held.run_id
    assert machine.host.snapshot() == before


# The shield and the port chains; the list of reserved ports is read-only then.
RIGHTS = ("--cap-add=NET_ADMIN", "--cap-add=SYS_ADMIN", *HOSTS_CGROUPS)


def test_killed_containers_rules_go_with_the_next_run_on_the_host(machine: Node, left: str) -> None:
    held = on_host(machine)
    assert left in rules(machine)
    held.let_go()
    assert eventually(lambda: left not in rules(machine), seconds=2)


def test_killed_containers_rules_go_with_the_next_container(machine: Node, left: str) -> None:
    held = contained(machine.podman(), *RIGHTS)
    held.let_go()
    assert left not in rules(machine)


def test_clean_on_the_host_removes_what_a_killed_container_left(machine: Node, left: str) -> None:
    would = clean(machine, "--dry-run")
    assert f"would remove what is left of run {left}, which has no record here" in would.stdout and left in rules(
        machine
    )
    done = clean(machine)
    assert f"removed what was left of run {left}, which has no record here" in done.stdout and done.returncode == 0


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("crowd", [0, 40], ids=["alone", "crowded"])
def test_nobody_keeps_rules_by_standing_where_their_guard_stood(machine: Node, left: str, uid: int, crowd: int) -> None:
    """Neither a user of the host, nor a container's root without capabilities, nor who answers nobody there."""
    squat = machine.podman().popen(
        "--network=host", f"--user={uid}", command=["python", "-c", SQUAT, left, str(crowd)], stdin=subprocess.PIPE
    )
    assert squat.stdout is not None and squat.stdout.readline() == "stands\n"
    assert f"removed what was left of run {left}" in clean(machine).stdout
    squat.communicate(timeout=20)


SQUAT = """
import socket, sys
ends = []
for name in (f"\\0securerun-{sys.argv[1]}", f"\\0securerun-{sys.argv[1]}-{'0' * 16}"):
    end = socket.socket(socket.AF_UNIX)
    end.bind(name)
    end.listen(1)
    ends.append(end)
    for _ in range(int(sys.argv[2])):
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.connect_ex(name)
        ends.append(client)
print("stands", flush=True)
sys.stdin.read()
"""


def test_rules_of_a_container_that_lives_stay(machine: Node) -> None:
    before = machine.host.snapshot()
    held = contained(machine.podman(), *RIGHTS)
    during = rules(machine)
    assert "nothing to remove" in clean(machine).stdout
    on_host(machine).let_go()
    contained(machine.podman(), *RIGHTS, listen=60001).let_go()
    assert eventually(lambda: rules(machine) == during, seconds=2)
    held.let_go()
    assert machine.host.snapshot() == before


def test_nobody_has_a_live_runs_rules_removed_by_taking_its_guards_name(machine: Node) -> None:
    """Whoever waits for the guard's death has the name before the next guard, which stands at another one then."""
    before = machine.host.snapshot()
    podman = machine.podman()
    held = contained(podman, *RIGHTS, NAMED)
    take = podman.popen(
        "--network=host", "--user=1000", command=["python", "-c", TAKE, held.run_id], stdin=subprocess.PIPE
    )
    assert take.stdout is not None and take.stdout.readline() == "waits\n"
    guard = next(pid for pid in podman.pids_in("training") if name_of(pid) == "securerun-guard")
    os.kill(guard, signal.SIGKILL)
    assert take.stdout.readline() == "stands\n"
    held.hear_of("another")
    during = rules(machine)
    assert "nothing to remove" in clean(machine).stdout
    assert held.run_id in during and rules(machine) == during
    take.communicate(timeout=20)
    held.let_go()
    assert machine.host.snapshot() == before


TAKE = """
import socket, sys, time
print("waits", flush=True)
end = socket.socket(socket.AF_UNIX)
while True:
    try:
        end.bind(f"\\0securerun-{sys.argv[1]}")
        break
    except OSError:
        time.sleep(0.001)
end.listen()
print("stands", flush=True)
sys.stdin.read()
"""


def rules(machine: Node) -> str:
    return machine.host.snapshot()["iptables-save"]


def clean(machine: Node, *options: str) -> subprocess.CompletedProcess[str]:
    return machine.run(machine.host, [COMMANDS / "securerunctl", "clean", *options])


def on_host(machine: Node) -> Held:
    return Held(machine.popen(machine.host, [*HOLDING, "--listen", "7002"], stdin=subprocess.PIPE))


def contained(engine: Engine, *options: str, listen: int = 60000) -> Held:
    """A lease in a container with the host's network."""
    command = ["python", str(HOLDER), "--peers", "10.77.0.9", "--listen", str(listen)]
    return Held(engine.popen("--network=host", *options, command=command, stdin=subprocess.PIPE))
