"""What a container must be given: each set of capabilities gets the scope that the README says, or a clear no."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from containers import DOCKER_CAPABILITIES, READ_ONLY_CGROUPS, WRITABLE_CGROUPS, container
from holding import HOLDER, Held
from hosts import Host, Network, eventually
from probe import reach

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


def _held(node: Host, command: list[str]) -> Held:
    return Held(node.popen(command, stdin=subprocess.PIPE))
