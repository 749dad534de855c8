"""What a container must be given: each set of capabilities gets the scope that the README says, or a clear no."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import kernel
import pytest
from checkout import COMMANDS
from containers import DOCKER_CAPABILITIES, READ_ONLY_CGROUPS, WRITABLE_CGROUPS, container
from holding import HOLDER, Held
from hosts import Host, Network, eventually, finish_all
from key_homes import make_homes
from probe import Probe, reach
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
