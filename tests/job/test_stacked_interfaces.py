"""--interface with a bridge's port, or with what another interface lies on: the packets are seen on the upper one.

The address is there too, and whoever names the wire means the hosts behind it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from checkout import COMMANDS
from hosts import Host, Network, finish
from probe import reach
from second_network import batch

EXEC = (str(COMMANDS / "securerunctl"), "exec")
PORT = 7000
LISTENER = f"""
import socket, sys
listener = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
sys.stdin.read()
"""
# The shield alone, and each kind of port chains alone.
SHIELD = ("--firewall", "off")
LAYERS = [SHIELD, *(("--firewall", kind, "--scope", "ports") for kind in ("iptables", "legacy", "nftables"))]


@pytest.fixture(scope="module")
def hosts(root_and_tools: None) -> Iterator[list[Host]]:
    """The addresses of node0 are on bridge0, of which eth0 is a port; those of node1 on mac0, which lies on eth0."""
    with Network("node0", "node1", "stranger") as network:
        node0, node1, _ = network
        upper = {node0: ["link add bridge0 type bridge", "link set eth0 master bridge0"]}
        upper[node1] = ["link add link eth0 name mac0 type macvlan mode bridge"]
        for node, name in ((node0, "bridge0"), (node1, "mac0")):
            batch(
                node.namespace,
                *upper[node],
                f"addr del {node.ipv4}/24 dev eth0",
                f"addr del {node.ipv6}/64 dev eth0",
                f"addr add {node.ipv4}/24 dev {name}",
                f"addr add {node.ipv6}/64 dev {name} nodad",
                f"link set {name} up",
                "link add other0 type bridge",
            )
        yield [*network]


@contextlib.contextmanager
def listening(node: Host, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [*EXEC, *options, "--ports", str(PORT), "--", sys.executable, "-c", LISTENER]
    job = node.popen(command, stdin=subprocess.PIPE)
    try:
        assert job.stdout is not None and job.stderr is not None
        assert job.stdout.readline() == "listening\n", job.stderr.read()
        yield job
    finally:
        job.kill()
        finish(job)


def reaches(origin: Host, target: Host) -> set[bool]:
    return set(reach(origin, [(address, PORT) for address in target.addresses]).values())


@pytest.mark.parametrize("layer", LAYERS, ids=["shield", "iptables", "legacy", "nftables"])
def test_peers_come_in_through_the_bridge_of_the_port_that_is_named(hosts: list[Host], layer: tuple[str, ...]) -> None:
    node, peer, stranger = hosts
    options = ("--peers", ",".join(peer.addresses), "--interface", "eth0", *layer)
    with listening(node, *options) as job:
        assert reaches(peer, node) == {True}
        assert reaches(stranger, node) == {False}
        done = finish(job, text_input="")
    assert "through bridge0 (--interface; eth0 is below bridge0)" in done.stderr


@pytest.mark.parametrize("layer", [SHIELD, LAYERS[-1]], ids=["shield", "nftables"])
def test_peers_come_in_through_what_lies_on_the_interface_that_is_named(
    hosts: list[Host], layer: tuple[str, ...]
) -> None:
    peer, node, stranger = hosts
    options = ("--peers", ",".join(peer.addresses), "--interface", "eth0", *layer)
    with listening(node, *options) as job:
        assert reaches(peer, node) == {True}
        assert reaches(stranger, node) == {False}
        done = finish(job, text_input="")
    assert "through mac0 (--interface; eth0 is below mac0)" in done.stderr


def test_the_subnet_of_a_port_is_its_bridges(hosts: list[Host]) -> None:
    done = hosts[0].run([*EXEC, "--dry-run", "--peers", "subnet", "--interface", "eth0", "--", "true"])
    assert done.returncode == 0, done
    assert "10.77.0.0/24" in done.stdout and "interfaces   bridge0 (" in done.stdout


def test_another_bridge_is_not_the_ports(hosts: list[Host]) -> None:
    node, peer, _ = hosts
    done = node.run([*EXEC, "--dry-run", "--peers", peer.ipv4, "--interface", "other0", "--", "true"])
    assert done.returncode == 78
    assert "--interface other0: no peer is reached through other0 " in done.stderr
    assert done.stderr.endswith("write --interface bridge0 in its place\n")
