"""Jobs in real containers without any privilege, behind the guard of their node."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
import pytest
from conversation import guards, log_of
from engines import IMAGE_USER, Engine, Node
from holding import Held
from hosts import Host, Network, eventually, finish_all
from node_guard import HOLDING, MOUNTED, RESTRICTED, held, in_pod, listening, network_of
from probe import Probe, reach
from users import CONFIGURATION, GUARD

from securerun.guard.program import SOCKET

RELEASE_HOLDER = (sys.executable, str(Path(__file__).parent.parent / "ground" / "release_holder.py"))
LISTENING = ("--listen", "7001")
PORT = 7001
# What a container's root has where nothing is said of it; and a user namespace of the engine's making.
AS_ENGINES_DO = (MOUNTED, "--user=0")
IN_USER_NAMESPACE = ("--uidmap=0:200000:65536", "--gidmap=0:200000:65536")


@pytest.fixture(scope="module")
def network(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "pod0", "pod1", "stranger") as network:
        yield network


@pytest.fixture(scope="module")
def serving(network: Network) -> Iterator[Node]:
    with Node(network["node0"]) as node, listening(node):
        yield node


@pytest.fixture
def node(serving: Node) -> Iterator[Node]:
    """The node, with nothing left on it afterwards."""
    yield serving
    serving.place(CONFIGURATION).unlink(missing_ok=True)
    serving.podman().call("rm", "--all", "--force", "--time=0", check=False)
    assert eventually(lambda: serving.records() is None and not guards(serving)), (serving.records(), log_of(serving))


@pytest.fixture
def podman(node: Node) -> Engine:
    return node.podman()


def test_two_pods_train_and_a_third_reaches_no_port_of_theirs(network: Network, podman: Engine) -> None:
    pods = [network["pod0"], network["pod1"]]
    peers = ["--peers", ",".join(pod.ipv4 for pod in pods)]
    with Probe(network["stranger"], pods[0]) as at_first, Probe(network["stranger"], pods[1]) as at_second:
        started = [
            in_pod(
                podman,
                pod,
                command=[
                    *(jobs.SECURERUN, *peers, "--nnodes", "2", "--nproc-per-node", "1"),
                    *(*jobs.rendezvous("static", pod, rank, pods[0]), str(jobs.TRAIN), "--groups", "1"),
                ],
            )
            for rank, pod in enumerate(pods)
        ]
        done = finish_all(started, timeout=120)
    assert [pod.returncode for pod in done] == [0, 0], done
    assert jobs.last_loss(done[0].stdout) < 0.35
    for probe in (at_first, at_second):
        assert probe.tried and probe.reached == set()
    for pod in done:
        assert "closed to all others by shield" in pod.stderr
        assert f"blocked {network['stranger'].ipv4} → " in pod.stderr


@pytest.mark.parametrize("options", [(), IN_USER_NAMESPACE], ids=["host-ids", "user-namespace"])
def test_guard_that_is_killed_is_replaced_and_one_whose_container_is_killed_leaves_nothing(
    network: Network, node: Node, podman: Engine, options: Sequence[str]
) -> None:
    pod, peer, stranger = network["pod0"], network["pod1"], network["stranger"]
    target = (pod.ipv4, PORT)
    holder = held(podman, pod, "--peers", peer.ipv4, *LISTENING, options=["--name=killed", *options])
    assert holder.start["guarding"] == ["shield"], holder.start
    # In a user namespace the host's root is nobody, and is believed all the same.
    (guard,) = guards(node)
    os.kill(guard, signal.SIGKILL)
    assert reach(stranger, [target]) == {target: False}
    assert "another has taken over" in holder.hear_of("the guard died")["news"]
    assert (reach(stranger, [target]), reach(peer, [target])) == ({target: False}, {target: True})
    podman.kill("killed")
    began = time.monotonic()
    assert eventually(lambda: node.records() is None, seconds=2), log_of(node)
    assert time.monotonic() - began < 2
    holder.process.wait(timeout=20)


def test_container_with_the_nodes_network_has_port_chains_as_well(network: Network, podman: Engine) -> None:
    target = (network["node0"].ipv4, PORT)
    holder = held(podman, None, "--peers", network["pod1"].ipv4, *LISTENING)
    assert holder.start["guarding"] == ["shield", "iptables"], holder.start
    assert reach(network["stranger"], [target]) == {target: False}
    assert reach(network["pod1"], [target]) == {target: True}
    holder.let_go()


def test_docker_container_without_privilege_gets_the_shield_in_a_network_of_its_own(node: Node) -> None:
    given = (*RESTRICTED, MOUNTED, "--network=none", f"--user={IMAGE_USER}")
    holder = Held(node.docker().popen(*given, command=[*HOLDING, *LISTENING], stdin=subprocess.PIPE))
    assert holder.start["guarding"] == ["shield"], holder.start
    holder.let_go()


def test_tables_of_a_containers_own_network_are_left_alone_unless_the_site_says_otherwise(
    network: Network, node: Node, podman: Engine
) -> None:
    pod = network["pod0"]
    refused = held(podman, pod, "--firewall", "iptables", *LISTENING)
    assert "no port chains are installed in a container's own network" in refused.start["refused"]
    node.configure("container_chains = true\n")
    holder = held(podman, pod, *LISTENING)
    assert holder.start["guarding"] == ["shield", "iptables"]
    assert "SECURERUN" in _rules(pod) and "SECURERUN" not in _rules(network["node0"])
    holder.let_go()
    assert eventually(lambda: "SECURERUN" not in _rules(pod))


def test_containers_know_nothing_of_each_others_runs(network: Network, node: Node, podman: Engine) -> None:
    """One user id, two containers: neither status nor an order with the other's id crosses over."""
    first = held(podman, network["pod0"], *LISTENING, options=["--name=first"])
    second = held(podman, network["pod1"], *LISTENING, options=["--name=second"])
    for name, run_id in (("first", first.run_id), ("second", second.run_id)):
        shown = podman.call("exec", name, "securerunctl", "status", "--json")
        # No process of the guard's is to be seen in there: that it lives is the guard's own word.
        assert [(run["run_id"], run["state"]) for run in json.loads(shown)["runs"]] == [(run_id, "guarding")]
    for adopt in (True, False):
        taken = json.loads(podman.call("exec", "second", *_ordering(run_id=first.run_id, adopt=adopt)))
        assert "guarded" in taken["refused"] and str(guards(node)[0]) not in taken["refused"]
    # Who shows another container's run in the environment is none of that run's.
    copied = ["sh", "-c", "exec sleep 600"]
    podman.call("exec", "--detach", f"--env=SECURERUN_RUN_ID={first.run_id}", "second", *copied)
    first.let_go()
    assert eventually(lambda: node.runs() == {f"{second.run_id}.json"}, seconds=5)
    second.let_go()


def test_refusal_for_another_containers_run_does_not_name_it(network: Network, podman: Engine) -> None:
    first = held(podman, None, "--scope", "ports", "--ports", "7001-7001", *LISTENING)
    second = held(podman, None, "--peers", network["pod1"].ipv4, "--ports", "7001-7002", "--listen", "7002")
    assert "a run outside of this container has ports of this plan" in second.start["refused"]
    assert first.run_id not in second.start["refused"]
    first.let_go()


def test_limits_hold_for_a_container_whatever_users_are_in_it_and_for_all_together(
    network: Network, node: Node, podman: Engine
) -> None:
    node.configure("runs_per_container = 1\nruns_in_containers = 2\n")
    first = held(podman, network["pod0"], *LISTENING, options=["--name=full"])
    for user in (IMAGE_USER, IMAGE_USER + 1):
        more = json.loads(podman.call("exec", f"--user={user}", "full", *_ordering(), check=False))
        assert "this container has 1 runs" in more["refused"], more
    second = held(podman, network["pod1"], *LISTENING)
    third = held(podman, network["stranger"], *LISTENING)
    assert "the containers of this host have as many runs as it allows, 2" in third.start["refused"]
    for holder in (first, second):
        holder.let_go()


def test_site_that_names_its_users_means_none_in_containers(network: Network, node: Node, podman: Engine) -> None:
    node.configure(f"users = [{IMAGE_USER}]\n")
    refused = held(podman, network["pod0"], *LISTENING)
    assert "jobs in containers may not have a guard on this host" in refused.start["refused"]
    for users in (f"users = [{IMAGE_USER}]", "users = [0]\ngroups = []"):
        node.configure(f"{users}\ncontainers = true\n")
        held(podman, network["pod0"], *LISTENING).let_go()


def test_launcher_of_the_release_before_has_its_job_guarded(network: Network, podman: Engine) -> None:
    pod, peer, stranger = network["pod0"], network["pod1"], network["stranger"]
    mounted = f"--volume={SOCKET}:/run/securerun.sock"
    holder = Held(in_pod(podman, pod, mounted, command=[*RELEASE_HOLDER, peer.ipv4, str(PORT)]))
    assert holder.start["guarding"] == ["shield"] and "release_before.zip" in holder.start["module"]
    target = (pod.ipv4, PORT)
    assert (reach(stranger, [target]), reach(peer, [target])) == ({target: False}, {target: True})
    assert holder.hear_of(stranger.ipv4)
    holder.say("report")
    assert holder.hear()["runs"] == 1
    holder.say(stranger.ipv4)
    assert eventually(lambda: reach(stranger, [target])[target])
    assert stranger.ipv4 in holder.let_go()


def test_listener_that_comes_back_is_found_by_containers_that_were_there_before(
    network: Network, tmp_path: Path
) -> None:
    with Node(network["node0"]) as node:
        podman = node.podman()
        with listening(node):
            holder = held(podman, network["pod0"], *LISTENING, options=["--name=waits"])
        os.kill(guards(node)[0], signal.SIGKILL)
        with listening(node):
            assert holder.hear_of("another has taken over")
            holder.let_go()


def test_root_of_a_container_is_a_user_like_others_at_the_socket(podman: Engine) -> None:
    """It closed the node's port 22 to everybody, through the socket that was mounted for its users."""
    podman.popen("--name=root", *AS_ENGINES_DO, "--network=host", command=["sleep", "1000"])
    podman.pid_of("root")
    asked: dict[str, dict[str, Any]] = {
        "port 22 may not be named by user 0": {"ports": [[22, 22]]},
        "--accept is root's, or the site's": {"accept": True},
        "more addresses in sum than a /8": {"peers": ["0.0.0.0/1"]},
        "is in use by user": {"ports": [[7002, 7002]]},
    }
    for words, order in asked.items():
        if words == "is in use by user":
            podman.popen("--network=host", "--user=0", command=["python", "-m", "http.server", "7002"])
            assert eventually(lambda: ("0.0.0.0", 7002) in podman.node.host.listening())  # noqa: S104
        told = json.loads(podman.call("exec", "root", *_ordering(**order), check=False))
        assert words in told["refused"], told


def test_pod_that_floods_the_guard_keeps_no_other_from_it(network: Network, node: Node, podman: Engine) -> None:
    flood = podman.popen(
        *AS_ENGINES_DO,
        "--name=floods",
        network_of(network["pod0"]),
        command=[sys.executable, "-c", _FLOOD, str(SOCKET)],
    )
    assert flood.stdout is not None and flood.stdout.readline() == "flooding\n"
    began = time.monotonic()
    holder = held(podman, network["pod1"], *LISTENING)
    took = time.monotonic() - began
    assert len(guards(node)) <= 48 + 1
    assert eventually(lambda: "turned away at the door" in log_of(node), seconds=30), (flood.poll(), log_of(node))
    podman.kill("floods")
    assert holder.start["guarding"] == ["shield"] and took < 20, (holder.start, took)
    holder.let_go()


_FLOOD = """
import os, socket, sys, time
kept = []
for number in range(2**40):
    # Who is of two users at once is refused at the first look, and who is of another each time is not.
    if number % 4 == 0: os.setresuid(number % 60000, number % 60000, 0)
    end = socket.socket(socket.AF_UNIX)
    end.setblocking(False)
    try: end.connect(sys.argv[1])
    except BlockingIOError: pass
    os.setresuid(0, 0, 0)
    kept = [end, *kept[:200]]
    # A busy listener falls so far behind the fast ones that all have hung up that it comes to; it turns away the slow.
    time.sleep(0.001 if number < 4000 else 0.005)
    if number == 50: print("flooding", flush=True)
"""


@pytest.mark.parametrize("place", ["", "system"], ids=["top", "guards-own"])
def test_caller_that_moved_to_where_its_guard_is_is_refused(podman: Engine, place: str) -> None:
    """A container with the host's cgroups may be anywhere in them, and nothing tells it from others there."""
    move = f'echo $$ > /sys/fs/cgroup/{place}/cgroup.procs && exec "$@"'
    given = (*AS_ENGINES_DO, "--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw", "--network=host")
    done = podman.run(*given, command=["sh", "-c", move, "sh", *_ordering()])
    assert "nothing tells its container from others" in json.loads(done.stdout)["refused"], done


def test_second_order_in_a_container_opens_nothing_of_the_first(network: Network, podman: Engine) -> None:
    peer, stranger = network["pod1"], network["stranger"]
    words = ["--peers", stranger.ipv4, "--ports", "7001-7009"]
    within = [*("securerunctl", "exec", "--peers", peer.ipv4, "--", *HOLDING), *words, *LISTENING]
    holder = Held(in_pod(podman, None, "--name=narrow", command=within))
    second = Held(
        podman.node.popen(
            podman.node.host,
            [*podman._client(), "exec", "--interactive", "narrow", *HOLDING, *words, "--listen", "7005"],
            stdin=subprocess.PIPE,
        )
    )
    target = (network["node0"].ipv4, PORT)
    for host in (stranger, peer):
        assert reach(host, [target]) == {target: False}
    second.let_go()
    holder.let_go()


def test_socket_of_another_user_in_a_symlinked_mount_is_no_guards(network: Network, podman: Engine) -> None:
    """Of a container in a user namespace, where the number of nobody is that of the host's root as well."""
    fake = "mkdir -p /tmp/fake; ln -s /tmp/fake /run/securerun.d; chown 65534 /tmp/fake; "
    serve = f"exec setpriv --reuid 65534 --clear-groups {sys.executable} -c '{_FAKE}'"
    given = (*IN_USER_NAMESPACE, "--name=fake", "--user=0", "--network=none", "--tmpfs=/run")
    podman.popen(*given, command=["sh", "-c", fake + serve])
    podman.pid_of("fake")
    told = ""

    def is_refused() -> bool:
        nonlocal told
        told = podman.call("exec", f"--user={IMAGE_USER}", "fake", *_ordering(), check=False)
        return "is served by user 65534, not by root" in told

    assert eventually(is_refused), told


_FAKE = """
import os, socket, time
os.umask(0)
s = socket.socket(socket.AF_UNIX)
s.bind("/tmp/fake/guard.sock")
s.listen()
time.sleep(600)
"""


def test_listener_takes_no_directory_that_leads_elsewhere(network: Network) -> None:
    with Node(network["node0"]) as node:
        node.place(str(SOCKET.parent)).symlink_to("/run/lock")
        done = node.run(node.host, [GUARD, "--listen"], timeout=20)
        assert done.returncode == 77 and "is no directory that root alone can change" in done.stderr


def _rules(host: Host) -> str:
    return str(host.run(["iptables-save"], check=True).stdout)


def _ordering(*, run_id: str = "", adopt: bool = False, **policy: object) -> list[str]:
    """A launcher that orders, and prints what it was told. policy: fields of it, as JSON has them."""
    return [sys.executable, "-c", _ORDER, run_id or secrets.token_hex(6), str(int(adopt)), json.dumps(policy)]


_ORDER = """
import ipaddress, json, sys
from securerun.errors import SecurerunError
from securerun.firewall.policy import Policy, PortRange, Purpose
from securerun.guard.protocol import Order
from securerun.protection import ways
from securerun.protection.client import Guard
run_id, adopt, asked = sys.argv[1], sys.argv[2] == "1", json.loads(sys.argv[3])
ports = tuple(PortRange(first, last, Purpose.ADDED) for first, last in asked.get("ports", ()))
peers = tuple(map(ipaddress.ip_network, asked.get("peers", ())))
policy = Policy(run_id, ports, peers, accept=asked.get("accept", False))
try:
    guarding = Guard(by=ways.by_socket_alone).guard(Order(policy, "auto", "auto", 0.5, "x", adopt), print)
    print(json.dumps({"guarding": [layer.backend for layer in guarding.layers]}))
except SecurerunError as error:
    print(json.dumps({"refused": str(error)}))
"""
