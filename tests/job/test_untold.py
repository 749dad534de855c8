"""What gloo, NCCL and HCCL take where no variable tells them is said before the start, if peers would turn it away."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
import second_network
from hosts import Host, Network, finish_all
from sandbox import IN_NAMESPACE, needs_namespace

CODE = """
import ipaddress, json, sys
from securerun.job import libraries, untold
from securerun.job.job import Job

environment, peers, of_own_name, in_use, nodes = json.loads(sys.argv[1])
libraries.may_be_in_use = lambda library, environment: str(library) in in_use
job = Job(min_nodes=nodes, max_nodes=nodes, backend="static", endpoint=None, node_rank=0, command=())
networks = [ipaddress.ip_network(peer) for peer in peers]

def resolve(name):
    if not of_own_name:
        raise OSError("it has none")
    return of_own_name

for warning in untold.warnings(job, environment, networks, resolve):
    print(warning)
"""
HOST = """
for name in ib0 eth0 b0; do ip link add $name type veth peer name far-$name; done
ip addr add 10.77.0.1/24 dev eth0
ip addr add 10.77.0.101/24 dev eth0
ip addr add fd77::1/64 dev eth0 nodad
ip addr add 10.81.0.1/24 dev ib0
ip addr add 10.81.0.101/24 dev ib0 label ib0:1
ip addr add 10.90.0.1/24 dev b0
ip link add docker0 type bridge
ip addr add 172.17.0.1/16 dev docker0
for name in lo eth0 ib0 b0 far-eth0 far-ib0 far-b0 docker0; do ip link set $name up; done
"""
ON_ETH0 = ("10.77.0.1/32", "10.77.0.2/32")
LINK = "GLOO_SOCKET_IFNAME is not set, so gloo, if the job uses it, takes the address of this host's name, "


def said(
    *peers: str,
    own: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    in_use: tuple[str, ...] = (),
    nodes: int = 2,
) -> str:
    """The lines before the start, on a host whose name has the addresses `own`."""
    argument = json.dumps([environment or {}, peers, own, in_use, nodes])
    script = f'set -e\n{HOST}\nexec {sys.executable} - "$1"'
    command = [*IN_NAMESPACE, "sh", "-c", script, "sh", argument]
    done = subprocess.run(command, input=CODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_namespace
def test_gloos_address_on_another_network_or_of_another_version_or_not_listed_is_said() -> None:
    on_ib0 = said(*ON_ETH0, own=("10.81.0.1",))
    assert on_ib0.startswith(f"{LINK}10.81.0.1: no peer is reached through ib0 by this host's routes (10.77.0.2 is")
    assert on_ib0.endswith("--peers subnet --interface eth0,ib0, or `export GLOO_SOCKET_IFNAME=eth0`"), on_ib0
    # The first that this host can bind counts, as for gloo.
    of_ipv6 = said(*ON_ETH0, own=("10.77.0.99", "fd77::1", "10.77.0.1"))
    assert of_ipv6 == (
        f"{LINK}fd77::1: no peer has an IPv6 address, so its connections are turned away; name the peers' IPv6 "
        "addresses too, or write their names, or `export GLOO_SOCKET_IFNAME=eth0`"
    )
    of_ipv4 = said("fd77::1/128", "fd77::2/128", own=("10.77.0.1",))
    assert of_ipv4.endswith("name the peers' IPv4 addresses too, or write their names"), of_ipv4
    second = said(*ON_ETH0, own=("10.77.0.101",))
    assert second.endswith(
        "the peers have this host by 10.77.0.1 alone, and a host with the same list turns its "
        "connections away; name 10.77.0.101 there as well"
    ), second


@needs_namespace
@pytest.mark.parametrize(
    ("peers", "own", "environment", "nodes"),
    [
        (ON_ETH0, ("10.77.0.1", "fd77::1"), {}, 2),
        (ON_ETH0, ("10.81.0.1",), {"GLOO_SOCKET_IFNAME": "eth0"}, 2),
        (("10.77.0.2/32",), ("10.77.0.101",), {}, 2),
        (("10.77.0.0/24",), ("10.77.0.101",), {}, 2),
        (("0.0.0.0/0", "::/0"), ("10.81.0.1",), {}, 2),
        # torch says itself that others cannot reach it there, and Debian's /etc/hosts has it so.
        (ON_ETH0, ("127.0.1.1",), {}, 2),
        (ON_ETH0, (), {}, 2),
        (ON_ETH0, ("10.81.0.1",), {}, 1),
        (("10.99.0.2/32",), ("10.81.0.1",), {}, 2),
    ],
    ids=["listed", "told", "only-others", "network", "any", "loopback", "no-address", "one-node", "no-route"],
)  # fmt: skip
def test_nothing_is_said_of_an_address_that_peers_may_have(
    peers: tuple[str, ...], own: tuple[str, ...], environment: dict[str, str], nodes: int
) -> None:
    assert said(*peers, own=own, environment=environment, nodes=nodes) == ""


@needs_namespace
def test_an_address_that_gloo_is_told_by_its_label_is_looked_at_as_well() -> None:
    told = {"GLOO_SOCKET_IFNAME": "eth0,ib0:1"}
    message = said(*ON_ETH0, environment=told)
    assert message.startswith("GLOO_SOCKET_IFNAME=eth0,ib0:1 has gloo take 10.81.0.101: no peer is reached through ib0")
    assert said(*ON_ETH0, "10.81.0.101/32", "10.81.0.102/32", environment=told) == ""


@needs_namespace
def test_the_interface_that_nccl_or_hccl_takes_by_itself_is_said_where_no_peer_is_known_there() -> None:
    """NCCL's is one whose name begins with ib, HCCL's the first by name."""
    nccl = said(*ON_ETH0, in_use=("NCCL",))
    assert nccl.startswith("NCCL_SOCKET_IFNAME is not set, so NCCL, if the job uses it, takes ib0: no peer is reached")
    assert nccl.endswith("or `export NCCL_SOCKET_IFNAME=eth0`")
    hccl = said(*ON_ETH0, in_use=("HCCL",))
    assert hccl.startswith("HCCL_SOCKET_IFNAME is not set, so HCCL, if the job uses it, takes b0: no peer is reached")
    assert said(*ON_ETH0, "10.81.0.2/32", in_use=("NCCL",)) == ""
    assert said(*ON_ETH0, in_use=("NCCL",), environment={"NCCL_SOCKET_IFNAME": "eth0"}) == ""
    assert said(*ON_ETH0, in_use=("HCCL",), environment={"RANK_TABLE_FILE": "/table.json"}) == ""


SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1), group=dist.new_group())
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def nodes(root_and_tools: None) -> Iterator[list[Host]]:
    with Network("node0", "node1") as network:
        second_network.connect(network)
        yield list(network)


def run_on_both(nodes: list[Host], tmp_path: Path, *options: str) -> list[subprocess.CompletedProcess[str]]:
    """A job on hosts whose names have their addresses on ib0; nothing tells gloo what to take."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    records = {node.name: (second_network.address(node),) for node in nodes}
    started = []
    for rank, node in enumerate(nodes):
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', node.name]
        launch = [jobs.SECURERUN, *options, "--nnodes", "2", *jobs.rendezvous("static", node, rank, nodes[0])]
        argv = second_network.with_hosts_file(tmp_path / f"hosts-{rank}", records, [*named, *launch, script])
        started.append(node.popen(argv, env={"GLOO_SOCKET_IFNAME": None}))
    return finish_all(started, timeout=60)


def test_a_host_whose_name_is_on_a_network_without_a_peer_hears_so_and_trains_as_it_is_told(
    nodes: list[Host], tmp_path: Path
) -> None:
    on_eth0, on_ib0 = [node.ipv4 for node in nodes], [second_network.address(node) for node in nodes]
    plans = run_on_both(nodes, tmp_path, "--dry-run", "--peers", ",".join(on_eth0))
    assert all(f"{LINK}{address}: no peer is" in plan.stderr for plan, address in zip(plans, on_ib0)), plans
    done = run_on_both(nodes, tmp_path, "--peers", ",".join((*on_eth0, *on_ib0)))
    assert [node.returncode for node in done] == [0, 0], done
    assert not any(LINK in node.stderr for node in done)


def test_c10d_s_first_node_says_where_the_workers_would_meet_on_a_network_without_a_peer(
    nodes: list[Host], tmp_path: Path
) -> None:
    """gloo is told eth0, and the endpoint is there as well: the agent tells the others its host's own name."""
    node, peer = nodes
    on_ib0 = second_network.address(node)
    line = f"if this node becomes the first, the workers meet at {node.name}: no peer is reached through ib0"
    for address, listed, options, is_said in (
        (on_ib0, [peer.ipv4], [], True),
        (on_ib0, [peer.ipv4], ["--local-addr", node.ipv4], False),
        (on_ib0, [peer.ipv4, second_network.address(peer)], [], False),
        (node.ipv4, [peer.ipv4], [], False),
    ):
        launch = [jobs.SECURERUN, "--dry-run", "--peers", ",".join(listed), "--nnodes", "2", *options]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{node.ipv4}:{jobs.PORT}", "train.py"]
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', node.name, *launch, *meeting]
        done = node.run(second_network.with_hosts_file(tmp_path / "hosts", {node.name: [address]}, named))
        assert done.returncode == 0, done
        assert (line in done.stderr) == is_said, done.stderr
