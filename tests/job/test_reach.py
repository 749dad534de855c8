"""Jobs on hosts with two networks: a library's network on which no peer has a name is refused before the start.

Names are on eth0, and gloo, NCCL or HCCL are told ib0. Tried on two hosts with both networks, and, for what the routes
say, in a network namespace for each case.
"""

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

# --- what the routes say

CODE = """
import ipaddress, json, sys
from securerun.errors import PolicyError
from securerun.job import entrance as entrances
from securerun.job import libraries
from securerun.job.libraries import Variables
from securerun.options import Options

environment, interface, peers, in_use = json.loads(sys.argv[1])
libraries.may_be_in_use = lambda library, environment: in_use or library is libraries.Library.GLOO
networks = [ipaddress.ip_network(peer) for peer in peers]
variables = Variables(environment)
try:
    print(entrances.entrance(Options(interface=interface), environment, networks, variables))
except PolicyError as error:
    print("refused:", error)
for warning in variables.warnings:
    print("warned:", warning)
"""
# eth0 and ib0 are wires, each with a network of its own; docker0 is a bridge, own0 has an address and no network.
HOST = """
for name in eth0 ib0; do ip link add $name type veth peer name far-$name; done
ip addr add 10.77.0.1/24 dev eth0
ip addr add fd77::1/64 dev eth0 nodad
ip addr add 10.81.0.1/24 dev ib0
ip addr add fd81::1/64 dev ib0 nodad
ip link add docker0 type bridge
ip addr add 172.17.0.1/16 dev docker0
ip link add own0 type bridge
ip addr add 10.200.0.1/32 dev own0
for name in lo eth0 ib0 far-eth0 far-ib0 docker0 own0; do ip link set $name up; done
"""
ON_ETH0 = ("10.77.0.1/32", "10.77.0.2/32", "fd77::2/128")


def said(
    environment: dict[str, str],
    *peers: str,
    interface: str | None = None,
    setup: str = "",
    in_use: bool = True,
) -> str:
    """Where peers may come in, in the words of a plan; or why not."""
    argument = json.dumps([environment, interface, peers, in_use])
    script = f'set -e\n{HOST}\n{setup}\nexec {sys.executable} - "$1"'
    command = [*IN_NAMESPACE, "sh", "-c", script, "sh", argument]
    done = subprocess.run(command, input=CODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_namespace
def test_a_library_on_a_network_without_a_peer_is_refused_with_all_that_mends_it() -> None:
    assert said({"GLOO_SOCKET_IFNAME": "ib0"}, *ON_ETH0) == (
        "refused: GLOO_SOCKET_IFNAME=ib0: no peer is reached through ib0 by this host's routes (10.77.0.2 is, through "
        "eth0), and whoever connects there has an address that nobody named; name the peers' addresses or names on "
        "10.81.0.0/24, fd81::/64 too, with --peers, or let all of these networks in with --peers subnet --interface "
        "eth0,ib0, or unset GLOO_SOCKET_IFNAME"
    )


@needs_namespace
@pytest.mark.parametrize(
    ("environment", "setup"),
    [
        ({"NCCL_SOCKET_IFNAME": "ib"}, ""),
        ({"NCCL_SOCKET_IFNAME": "=ib0,docker0"}, ""),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo,eth,far,own"}, ""),
        ({"HCCL_SOCKET_IFNAME": "=ib0"}, ""),
        ({"HCCL_IF_IP": "10.81.0.1"}, ""),
        ({"GLOO_SOCKET_IFNAME": "docker0"}, ""),
        ({"GLOO_SOCKET_IFNAME": "lo"}, ""),
        # gloo connects through each of them.
        ({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, ""),
        # A table for what comes from ib0's own address, as hosts with several cards have it, is not asked for a peer.
        (
            {"GLOO_SOCKET_IFNAME": "ib0"},
            "ip route add default via 10.81.0.254 dev ib0 table 101; ip rule add from 10.81.0.1 lookup 101",
        ),
        # The way to everywhere leads through eth0.
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "ip route add default via 10.77.0.254"),
    ],
)
def test_however_it_is_named(environment: dict[str, str], setup: str) -> None:
    (variable,) = environment
    message = said(environment, *ON_ETH0, setup=setup)
    assert message.startswith(f"refused: {variable}={environment[variable]}: no peer is reached through "), message
    assert message.endswith(f"unset {variable}") and "10.77.0.2" in message


@needs_namespace
@pytest.mark.parametrize(
    ("environment", "peers", "setup"),
    [
        ({"GLOO_SOCKET_IFNAME": "ib0"}, (*ON_ETH0, "10.81.0.2/32"), ""),
        # Networks, and everybody.
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ("10.0.0.0/8",), ""),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ("0.0.0.0/0", "::/0"), ""),
        # Behind a router that is reached through ib0.
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ("10.99.0.2/32",), "ip route add 10.99.0.0/16 via 10.81.0.254"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ("10.99.0.2/32",), "ip route add default via 10.81.0.254"),
        (
            {"GLOO_SOCKET_IFNAME": "ib0"},
            ("fd99::2/128",),
            "ip route add default via fd81::fe; ip addr del 10.81.0.1/24 dev ib0",
        ),
        # A route may say by which address peers are reached.
        (
            {"GLOO_SOCKET_IFNAME": "ib0"},
            ("10.99.0.2/32",),
            "ip route add 10.99.0.0/16 via 10.77.0.254 src 10.81.0.1",
        ),
        # Two cards on one network.
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ("10.77.0.2/32",), "ip addr add 10.77.0.11/24 dev ib0"),
        # An address that is on no network says nothing of the peers.
        ({"GLOO_SOCKET_IFNAME": "own0"}, ("10.77.0.2/32",), ""),
        # One of several is enough for NCCL, which takes one that leads there.
        ({"NCCL_SOCKET_IFNAME": "^docker0"}, ON_ETH0, ""),
        ({"NCCL_SOCKET_IFNAME": "eth,ib"}, ON_ETH0, ""),
        # Nobody but this host is known yet, as in a host file that grows.
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ("10.77.0.1/32",), ""),
        # There is no way to the peers at all.
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ("10.99.0.2/32",), ""),
        ({}, ON_ETH0, ""),
    ],
)
def test_no_job_that_would_run_is_refused(environment: dict[str, str], peers: tuple[str, ...], setup: str) -> None:
    message = said(environment, *peers, setup=setup)
    assert "refused" not in message and "warned" not in message, message


@needs_namespace
def test_this_hosts_own_address_on_the_other_network_is_no_peers() -> None:
    """A list of all nodes has this one in it, with all of its addresses."""
    assert said({"GLOO_SOCKET_IFNAME": "ib0"}, "10.81.0.1/32", *ON_ETH0).startswith("refused: GLOO_SOCKET_IFNAME=ib0: ")


@needs_namespace
def test_gloo_takes_an_interfaces_ipv4_address_and_peers_that_are_known_by_ipv6_are_elsewhere() -> None:
    message = said({"GLOO_SOCKET_IFNAME": "ib0"}, "10.77.0.2/32", "fd81::2/128")
    assert message.startswith("refused: GLOO_SOCKET_IFNAME=ib0: "), message
    without = "ip addr del 10.81.0.1/24 dev ib0"
    assert "refused" not in said({"GLOO_SOCKET_IFNAME": "ib0"}, "10.77.0.2/32", "fd81::2/128", setup=without)


@needs_namespace
@pytest.mark.parametrize("variable", ["NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"])
def test_where_the_library_cannot_be_in_use_it_is_a_warning(variable: str) -> None:
    message = said({variable: "ib0"}, *ON_ETH0, in_use=False)
    assert message.startswith("ib0, eth0 ("), message
    assert f"\nwarned: {variable}=ib0: no peer is reached through ib0 " in message


@needs_namespace
def test_an_interface_that_leads_to_no_peer_is_refused() -> None:
    message = said({}, *ON_ETH0, interface="ib0")
    assert message.startswith("refused: --interface ib0: no peer is reached through ib0 by this host's routes"), message
    assert message.endswith("with --peers subnet --interface eth0,ib0, or write --interface eth0 in its place")
    assert said({}, *ON_ETH0, interface="ib0,eth0") == "ib0, eth0 (--interface)"
    assert said({}, *ON_ETH0, interface="any") == "any (--interface)"
    assert said({}, interface="ib0") == "ib0 (--interface)"


@needs_namespace
def test_the_users_interface_does_not_make_peers_of_gloos_network() -> None:
    for interface in ("any", "eth0", "eth0,ib0"):
        message = said({"GLOO_SOCKET_IFNAME": "ib0"}, *ON_ETH0, interface=interface)
        assert message.startswith("refused: GLOO_SOCKET_IFNAME=ib0: no peer is reached through ib0 "), message


# --- on the wire


@pytest.fixture(scope="module")
def nodes(root_and_tools: None) -> Iterator[list[Host]]:
    """Two hosts with two networks."""
    with Network("node0", "node1") as network:
        second_network.connect(network)
        yield [*network]


# Four processes of one group on two hosts, and an extra group.
SCRIPT = (str(jobs.TRAIN), "--groups", "1", "--epochs", "2")
GLOO_ON_IB0 = {"GLOO_SOCKET_IFNAME": second_network.NAME}


def run_on_both(nodes: list[Host], kind: str, *options: str) -> list[subprocess.CompletedProcess[str]]:
    launcher = [jobs.SECURERUN, *options]
    started = jobs.start_on_both(nodes, kind, launcher=launcher, script=SCRIPT, workers=1, env=GLOO_ON_IB0)
    return finish_all(started, timeout=60)


@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_names_on_eth0_and_gloo_on_ib0_are_refused_before_the_start(nodes: list[Host], kind: str) -> None:
    for node, done in zip(nodes, run_on_both(nodes, kind, "--peers", f"{nodes[0].ipv4},{nodes[1].ipv4}")):
        assert (done.returncode, done.stdout) == (78, ""), (node, done)
        (line,) = done.stderr.splitlines()
        assert line.startswith("securerun: GLOO_SOCKET_IFNAME=ib0: no peer is reached through ib0 ")


@pytest.mark.parametrize(("kind", "how"), [("static", "addresses"), ("c10d", "addresses"), ("static", "subnet")])
def test_what_the_refusal_advises_has_the_job_trained(nodes: list[Host], kind: str, how: str) -> None:
    listed = ",".join(address for node in nodes for address in (node.ipv4, second_network.address(node)))
    options = ("--peers", listed) if how == "addresses" else ("--peers", "subnet", "--interface", "eth0,ib0")
    for done in run_on_both(nodes, kind, *options):
        assert done.returncode == 0, done


def test_the_plan_of_a_dry_run_is_refused_as_well(nodes: list[Host]) -> None:
    node, peer = nodes
    options = ["--nnodes", "2", "--master-addr", node.ipv4, "--peers", peer.ipv4]
    done = node.run([jobs.SECURERUN, "--dry-run", *options, "train.py"], env=GLOO_ON_IB0)
    assert (done.returncode, done.stdout) == (78, "")
    assert "GLOO_SOCKET_IFNAME=ib0: no peer is reached through ib0" in done.stderr


@pytest.mark.parametrize("has_both", [False, True], ids=["names on eth0", "names on both"])
def test_a_node_list_of_slurms_with_names_in_the_hosts_file(nodes: list[Host], tmp_path: Path, has_both: bool) -> None:
    node, peer = nodes
    records = {one.name: [*one.addresses, *([second_network.address(one)] if has_both else [])] for one in nodes}
    command = [jobs.SECURERUN, "--dry-run", "--nnodes", "2", "--master-addr", "node0", "train.py"]
    done = node.run(
        second_network.with_hosts_file(tmp_path / "hosts", records, command),
        env={"SLURM_JOB_NODELIST": "node[0-1]", **GLOO_ON_IB0},
    )
    assert done.returncode == (0 if has_both else 78), done
    if has_both:
        assert second_network.address(peer) in done.stdout
    else:
        assert " is, through eth0)" in done.stderr
