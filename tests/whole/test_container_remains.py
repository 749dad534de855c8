"""What a container leaves on its host: nothing after a good end; after SIGKILL what the next run finds, or clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from checkout import COMMANDS
from engines import ENGINES, HOSTS_CGROUPS, Engine, Node
from holding import HOLDER, Held
from hosts import eventually, finish
from process_table import name_of


@pytest.fixture(scope="module")
def node(container_node: Node) -> Node:
    return container_node


@pytest.mark.parametrize("first", [(), ("--init",)], ids=["alone", "init"])
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left_on_the_host_after_a_good_end(node: Node, engine: str, first: tuple[str, ...]) -> None:
    before = node.host.snapshot()
    held = contained(node.engine(engine), *node.engine(engine).privileged, *first)
    assert held.start["guarding"] == ["shield", "iptables"], held.start
    during = node.host.snapshot()
    assert held.run_id in during["iptables-save"] and "60000-60015" in during["reserved ports"]
    held.let_go()
    assert node.host.snapshot() == before


NO_SHIELD = ("--cap-add=NET_ADMIN",)


@pytest.mark.parametrize("given", [(), NO_SHIELD], ids=["shield", "ports"])
def test_nothing_is_left_after_a_real_job_however_it_ends(node: Node, given: tuple[str, ...]) -> None:
    before = node.host.snapshot()
    podman = node.podman()
    launch = ["securerun", "--standalone", "--nproc-per-node=1", "--peers=10.77.0.9"]
    for script, status in ((["--no-python", "true"], 0), (["--no-python", "false"], 1)):
        job = podman.popen("--network=host", "--init", *(given or podman.privileged), command=[*launch, *script])
        done = finish(job, timeout=60)
        assert done.returncode == status, done
        assert ("by shield" in done.stderr) is not bool(given), done
        assert node.host.snapshot() == before


# A name that the engine knows a container by, so that it can be killed.
NAMED = "--name=training"


@pytest.fixture
def left(node: Node) -> Iterator[str]:
    """The id of a run of a container that was killed as a whole: its rules are on the host, and its record is not."""
    before = node.host.snapshot()
    run_id = killed(node)
    assert run_id in rules(node)
    yield run_id
    # Who goes on after an end removes rules of one version after those of the other.
    assert eventually(lambda: node.host.snapshot() == before, seconds=2), (node.host.snapshot(), before)


# The shield and the port chains; the list of reserved ports is read-only then.
RIGHTS = ("--cap-add=NET_ADMIN", "--cap-add=SYS_ADMIN", *HOSTS_CGROUPS)


def test_killed_containers_rules_go_with_the_next_run_on_the_host(node: Node, left: str) -> None:
    held = on_host(node)
    assert left in rules(node)
    held.let_go()
    assert eventually(lambda: left not in rules(node), seconds=2)


def test_killed_containers_rules_go_with_the_next_container(node: Node, left: str) -> None:
    held = contained(node.podman(), *RIGHTS)
    held.let_go()
    assert left not in rules(node)


def test_clean_on_the_host_removes_what_a_killed_container_left(node: Node, left: str) -> None:
    would = clean(node, "--dry-run")
    assert f"would remove what is left of run {left}, which has no record here" in would.stdout
    assert left in rules(node)
    done = clean(node)
    assert f"removed what was left of run {left}, which has no record here" in done.stdout and done.returncode == 0


def test_ports_that_a_killed_container_reserved_are_given_back_and_no_others(node: Node) -> None:
    """Neither those of the host's administrator, nor those of another container that lives."""
    before = node.host.snapshot()
    podman = node.podman()
    reserve(node, "60010-60019,61000")
    run_id = killed(node, "--ports", "60000-60015", given=podman.privileged)
    other = contained(podman, *podman.privileged, listen=7004, asked=("--ports", "60008-60012"))
    assert node.host.snapshot()["reserved ports"] == "0,60000-60019,61000\n"
    done = clean(node)
    assert f"run {run_id}, which has no record here (a container's, then): reserved ports" in done.stdout
    assert eventually(lambda: node.host.snapshot()["reserved ports"] == "0,60008-60019,61000\n", seconds=7)
    other.let_go()
    assert node.host.snapshot()["reserved ports"] == "60010-60019,61000\n"
    reserve(node, "")
    assert node.host.snapshot() == before


def test_ports_that_a_killed_container_reserved_are_given_back_by_the_next_run(node: Node) -> None:
    before = node.host.snapshot()
    killed(node, given=node.podman().privileged)
    contained(node.podman(), *node.podman().privileged).let_go()
    assert node.host.snapshot() == before


def reserve(node: Node, ports: str) -> None:
    """As the host's administrator does."""
    node.run(node.host, ["sysctl", "-q", "-w", f"net.ipv4.ip_local_reserved_ports={ports}"])


@pytest.mark.parametrize("backend", ["nftables", "legacy"])
def test_clean_finds_what_is_left_in_every_backend(node: Node, backend: str) -> None:
    run_id = killed(node, "--firewall", backend, "--scope", "ports")
    assert any(run_id in text for text in node.host.snapshot(legacy=True).values())
    assert f"removed what was left of run {run_id}" in clean(node).stdout
    assert not any("securerun" in text.lower() for text in node.host.snapshot(legacy=True).values())


def test_clean_lets_others_launch_between_one_run_and_the_next(node: Node) -> None:
    """Of 8,000, which who has CAP_NET_ADMIN over the network may have made, it kept everybody waiting for minutes."""
    before = node.host.snapshot()
    done = node.run(node.host, [sys.executable, "-c", _CLEAN_AND_COUNT])
    assert done.stdout.split() == ["3", "4"], done
    assert node.host.snapshot() == before


_CLEAN_AND_COUNT = """
import ipaddress
from securerun.firewall import backends
from securerun.firewall.policy import Policy, PortRange
from securerun.guard import cleaning, run_directory
for number in range(3):
    policy = Policy(f"00000000000{number + 1}", (PortRange(7001, 7001, "planned"),), ())
    chains = backends.open_chains("iptables", policy.run_id)
    chains.begin(adopt=False, outlive=False)
    chains.install(policy, None)
locked, lock = 0, run_directory.host_lock
def counted():
    global locked
    locked += 1
    return lock()
run_directory.host_lock = counted
cleaning._LOCKED_SECONDS = 0.0
print(len(cleaning.clean(dry_run=False).rules), locked)
"""


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("crowd", [0, 40], ids=["alone", "crowded"])
def test_nobody_keeps_rules_by_standing_where_their_guard_stood(node: Node, left: str, uid: int, crowd: int) -> None:
    """Neither a user of the host, nor a container's root without capabilities, nor who answers nobody there."""
    squat = node.podman().popen(
        "--network=host", f"--user={uid}", command=["python", "-c", SQUAT, left, str(crowd)], stdin=subprocess.PIPE
    )
    assert squat.stdout is not None and squat.stdout.readline() == "stands\n"
    assert f"removed what was left of run {left}" in clean(node).stdout
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


def test_rules_of_a_container_that_lives_stay(node: Node) -> None:
    before = node.host.snapshot()
    held = contained(node.podman(), *RIGHTS)
    during = rules(node)
    assert "nothing to remove" in clean(node).stdout
    on_host(node).let_go()
    contained(node.podman(), *RIGHTS, listen=60001).let_go()
    assert eventually(lambda: rules(node) == during, seconds=2)
    held.let_go()
    assert node.host.snapshot() == before


def test_nobody_has_a_live_runs_rules_removed_by_taking_its_guards_name(node: Node) -> None:
    """Whoever waits for the guard's death has the name before the next guard, which stands at another one then."""
    before = node.host.snapshot()
    podman = node.podman()
    held = contained(podman, *RIGHTS, NAMED)
    take = podman.popen(
        "--network=host", "--user=1000", command=["python", "-c", TAKE, held.run_id], stdin=subprocess.PIPE
    )
    assert take.stdout is not None and take.stdout.readline() == "waits\n"
    guard = next(pid for pid in podman.pids_in("training") if name_of(pid) == "securerun-guard")
    os.kill(guard, signal.SIGKILL)
    assert take.stdout.readline() == "stands\n"
    held.hear_of("another")
    during = rules(node)
    assert "nothing to remove" in clean(node).stdout
    assert held.run_id in during and rules(node) == during
    take.communicate(timeout=20)
    held.let_go()
    assert node.host.snapshot() == before


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


def rules(node: Node) -> str:
    return node.host.snapshot()["iptables-save"]


def clean(node: Node, *options: str) -> subprocess.CompletedProcess[str]:
    return node.run(node.host, [COMMANDS / "securerunctl", "clean", *options])


def on_host(node: Node) -> Held:
    return Held(node.popen(node.host, [sys.executable, HOLDER, "--listen", "7002"], stdin=subprocess.PIPE))


def killed(node: Node, *asked: str, given: Sequence[str] = RIGHTS) -> str:
    """The run of a container whose first process was killed, and by the kernel all others of it."""
    held = contained(node.podman(), *given, NAMED, asked=asked)
    node.podman().kill("training")
    held.process.wait(timeout=20)
    held.close()
    return held.run_id


def contained(engine: Engine, *options: str, listen: int = 60000, asked: Sequence[str] = ()) -> Held:
    """A lease in a container with the host's network."""
    command = ["python", str(HOLDER), "--peers", "10.77.0.9", "--listen", str(listen), *asked]
    return Held(engine.popen("--network=host", *options, command=command, stdin=subprocess.PIPE))
