"""The nodes with container engines: what the tests of containers stand on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import ENGINES, IMAGE_USER, Node
from hosts import Host, Network, machine_snapshot
from probe import reach


@pytest.fixture(scope="module")
def network(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "stranger") as network:
        yield network


@pytest.fixture(scope="module")
def node(network: Network) -> Iterator[Node]:
    with Node(network["node0"]) as node:
        yield node


@pytest.mark.parametrize("name", ENGINES)
def test_container_has_the_engines_own_defaults_and_the_tests_python(node: Node, name: str) -> None:
    done = node.engine(name).run("--init", command=["sh", "-c", _LOOK])
    assert done.returncode == 0, done
    assert "CapEff:\t00000000a80425fb" in done.stdout and "Seccomp:\t2" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["0::/", "securerun"]


_LOOK = """
grep -E 'CapEff|Seccomp:' /proc/self/status; grep 0:: /proc/self/cgroup
python -c 'import securerun as s; print(s.__name__)'
"""


@pytest.mark.parametrize("name", ENGINES)
def test_container_with_the_hosts_network_is_reached_there_and_ends_with_sigkill(
    network: Network, node: Node, name: str
) -> None:
    engine, target = node.engine(name), (node.host.ipv4, 7003)
    listen = "import socket; s = socket.create_server(('', 7003)); print('up', flush=True); s.accept()"
    options = ["--network=host", f"--name={name}", f"--user={IMAGE_USER}"]
    process = engine.popen(*options, command=["python", "-c", listen])
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    assert f"/{engine.cgroup_of(name)}".startswith("/libpod_parent/" if name == "podman" else "/docker/")
    engine.kill(name)
    assert process.wait(timeout=20) == 137
    assert reach(network["stranger"], [target]) == {target: False}


def test_nothing_of_a_node_is_left(network: Network) -> None:
    before = machine_snapshot()
    host: Host = network["stranger"]
    with Node(host) as node:
        process = node.podman().popen(command=["sleep", "1000"])
        node.podman().call("ps")
        root = node.cgroup
    process.wait(timeout=20)
    assert not root.exists() and machine_snapshot() == before
