"""securerunctl setup oci-hook: containers are behind a shield before their process starts, by real podman."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from checkout import COMMANDS
from engines import IMAGE_USER, Engine, Node
from holding import Held
from hosts import Host, Network, eventually
from node_guard import HOLDING, MOUNTED, in_pod, listening, network_of
from probe import Probe, reach

from securerun.errors import PolicyError
from securerun.guard.container_hook import hang, understood
from securerun.linux.cgroups import CgroupUnavailable

PORT = 7001
SETUP = [str(COMMANDS / "securerunctl"), "setup", "oci-hook"]
HOOKS = "/run/engines/hooks.d"
SERVE = ("import socket", f"s = socket.create_server(('', {PORT}))", "print('up', flush=True)")
SERVING = [sys.executable, "-I", "-S", "-c", "; ".join((*SERVE, "[s.accept()[0] for _ in iter(int, 1)]"))]


@pytest.fixture(scope="module")
def network(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "pod0", "pod1", "stranger") as network:
        yield network


@pytest.fixture(scope="module")
def podman(network: Network) -> Iterator[Engine]:
    """podman of a node whose administrator has installed the hook that is printed."""
    with Node(network["node0"]) as node:
        podman = node.podman()
        printed = node.run(node.host, SETUP, timeout=30)
        assert printed.returncode == 0, printed
        node.place(HOOKS).mkdir()
        node.write(f"{HOOKS}/securerun.json", printed.stdout)
        configuration = node.place("/run/engines/containers.conf")
        configuration.write_text(configuration.read_text() + f'hooks_dir = ["{HOOKS}"]\n')
        yield podman


def serving(podman: Engine, pod: Host, *options: str) -> subprocess.Popen[str]:
    return podman.popen("--cap-drop=all", f"--user={IMAGE_USER}", network_of(pod), *options, command=SERVING)


def test_stranger_cannot_connect_at_any_moment_of_an_annotated_container(network: Network, podman: Engine) -> None:
    pod, peer, stranger = network["pod0"], network["pod1"], network["stranger"]
    with Probe(stranger, pod) as probe:
        container = serving(podman, pod, f"--annotation=securerun.peers={peer.ipv4}", "--name=annotated")
        assert container.stdout is not None
        assert container.stdout.readline() == "up\n", container.stderr and container.stderr.read()
        assert reach(peer, [(pod.ipv4, PORT)]) == {(pod.ipv4, PORT): True}
        assert eventually(lambda: bool(probe.tried))
        time.sleep(0.5)
    assert probe.reached == set()
    podman.kill("annotated")
    container.wait(timeout=20)


def test_container_without_the_annotation_is_as_ever(network: Network, podman: Engine) -> None:
    target = (network["pod0"].ipv4, PORT)
    container = serving(podman, network["pod0"], "--name=plain")
    assert container.stdout is not None and container.stdout.readline() == "up\n"
    assert reach(network["stranger"], [target]) == {target: True}
    podman.kill("plain")
    container.wait(timeout=20)


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        (["securerun.peers=node0"], "'node0' is neither an address nor a network"),
        (["securerun.peers=10.0.0.5/24"], "10.0.0.5/24 is an address inside a network; write 10.0.0.0/24 for"),
        (["securerun.peers=10.0.0.1", "securerun.public=http"], "'http' is no port or range"),
    ],
)
def test_container_does_not_start_where_its_annotation_is_not_understood(
    network: Network, podman: Engine, annotations: list[str], said: str
) -> None:
    given = [f"--annotation={annotation}" for annotation in annotations]
    container = serving(podman, network["pod0"], *given)
    stdout, stderr = container.communicate(timeout=30)
    assert container.returncode != 0 and "up" not in stdout and said in stderr, (stdout, stderr)


def test_public_port_of_an_annotation_is_for_every_host(network: Network, podman: Engine) -> None:
    target = (network["pod0"].ipv4, PORT)
    given = ("--annotation=securerun.peers=", f"--annotation=securerun.public={PORT}", "--name=public")
    container = serving(podman, network["pod0"], *given)
    assert container.stdout is not None and container.stdout.readline() == "up\n"
    assert reach(network["stranger"], [target]) == {target: True}
    podman.kill("public")
    container.wait(timeout=20)


def test_order_from_within_can_only_narrow_what_the_annotation_says(network: Network, podman: Engine) -> None:
    pod, peer, stranger = network["pod0"], network["pod1"], network["stranger"]
    with listening(podman.node):
        peers = ("--peers", f"{peer.ipv4},{stranger.ipv4}")
        wide = [*HOLDING, *peers, "--listen", str(PORT)]
        given = (f"--annotation=securerun.peers={peer.ipv4}", MOUNTED)
        holder = Held(in_pod(podman, pod, *given, command=wide))
        assert holder.start["guarding"] == ["shield"]
        target = (pod.ipv4, PORT)
        assert (reach(stranger, [target]), reach(peer, [target])) == ({target: False}, {target: True})
        holder.let_go()


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"pid": 1, "annotations": {"securerun.peers": ""}}',
        b'{"pid": true, "annotations": {"securerun.peers": ""}}',
        b'{"pid": 7, "annotations": {}}',
        b'{"pid": 7, "annotations": {"securerun.peers": 7}}',
        b'{"pid": 7, "annotations": {"securerun.peers": "10.0.0.1/8"}}',
        b'{"pid": 7, "annotations": {"securerun.peers": "", "securerun.public": "0"}}',
        b'{"pid": 7, "annotations": {"securerun.peers": "", "securerun.public": "9-8"}}',
        b"[" * 100_000,
        b" " * ((1 << 20) + 1),
    ],
    ids=lambda state: repr(state[:60]),
)
def test_state_that_is_none_is_not_acted_upon(state: bytes) -> None:
    with pytest.raises(PolicyError):
        understood(state)


def test_annotation_says_peers_and_public_ports() -> None:
    text: dict[str, Any] = {"pid": 7, "annotations": {"securerun.peers": "10.0.0.2, 10.0.0.3 fd00::/8"}}
    text["annotations"]["securerun.public"] = "9000-9010,8080"
    pid, policy = understood(json.dumps(text).encode())
    assert pid == 7 and [str(peer) for peer in policy.peers] == ["10.0.0.2/31", "fd00::/8"]
    assert [str(opening) for opening in policy.public] == ["8080", "9000-9010"]


@pytest.mark.parametrize(
    ("peers", "said"),
    [
        ("10.0.0.5/24", "write 10.0.0.0/24 for the network, or 10.0.0.5 for the host"),
        ("fd00::5/64", "write fd00::/64 for the network, or fd00::5 for the host"),
        ("fe80::1%eth0", "has a scope id"),
        ("node0/24", "'node0/24' is neither an address nor a network"),
    ],
)
def test_annotation_that_is_not_understood_is_said_with_what_to_write(peers: str, said: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(said)):
        understood(json.dumps({"pid": 7, "annotations": {"securerun.peers": peers}}).encode())


def test_container_whose_process_has_ended_is_said_to_have() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    text = json.dumps({"pid": process.pid, "annotations": {"securerun.peers": ""}})
    with pytest.raises(CgroupUnavailable, match=f"process {process.pid} has ended"):
        hang(*understood(text.encode()))
