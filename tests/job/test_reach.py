"""Jobs on hosts with two networks: a library's network on which no peer has a name is refused before the start.

Names are on eth0, and gloo, NCCL or HCCL are told ib0. Tried on two hosts with both networks, and, for what the routes
say, in a network namespace for each case.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import second_network
from hosts import Host, Network, finish_all
from sandbox import IN_NAMESPACE, needs_namespace

from securerun.job import meeting
from securerun.job.job import Endpoint, Job
from securerun.options import Options

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
    entrance = entrances.entrance(Options(interface=interface), environment, networks, variables)
    print(entrance)
    for warning in (*variables.warnings, *entrance.warnings):
        print("warned:", warning)
except PolicyError as error:
    print("refused:", error)
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
        # Addresses with labels are those of the interface; NCCL reads ports after names.
        ({"GLOO_SOCKET_IFNAME": "eth0:1"}, ON_ETH0, "ip addr add 10.77.0.11/24 dev eth0 label eth0:1"),
        ({"HCCL_IF_IP": "10.77.0.11"}, ON_ETH0, "ip addr add 10.77.0.11/24 dev eth0 label eth0:1"),
        ({"NCCL_SOCKET_IFNAME": "=eth0:1,ib9:2"}, ON_ETH0, ""),
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
def test_gloo_takes_an_interfaces_ipv4_address_and_is_warned_of_peers_that_are_named_by_ipv6() -> None:
    words = (
        "warned: GLOO_SOCKET_IFNAME: gloo takes the IPv4 address of ib0, and peers there are named by IPv6 addresses"
    )
    assert words in said({"GLOO_SOCKET_IFNAME": "ib0"}, "10.77.0.2/32", "fd81::2/128")
    assert "warned" not in said({"GLOO_SOCKET_IFNAME": "ib0"}, "10.81.0.2/32", "fd81::2/128")
    without = "ip addr del 10.81.0.1/24 dev ib0"
    assert "warned" not in said({"GLOO_SOCKET_IFNAME": "ib0"}, "10.77.0.2/32", "fd81::2/128", setup=without)


@needs_namespace
def test_where_this_hosts_own_address_is_those_come_in_who_are_still_to_be_named() -> None:
    """In a host file that grows only this host may stand yet."""
    assert said({"GLOO_SOCKET_IFNAME": "ib0"}, "10.77.0.1/32").startswith("ib0, eth0 (")


@needs_namespace
def test_gloo_on_an_interface_that_the_user_leaves_out_is_warned_of() -> None:
    both = ("10.77.0.2/32", "10.81.0.2/32")
    message = said({"GLOO_SOCKET_IFNAME": "ib0"}, *both, interface="eth0")
    assert message.startswith(
        "eth0 (--interface)\nwarned: GLOO_SOCKET_IFNAME names ib0, and --interface lets peers in "
    )
    assert message.endswith("write --interface eth0,ib0")
    for enough in ("any", "ib0,eth0"):
        assert "warned" not in said({"GLOO_SOCKET_IFNAME": "ib0"}, *both, interface=enough)


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


# --- peers of one IP version, and an endpoint of two


JOB = Job("static", Endpoint("node0", 29500), 2, 2, 0, ("train.py",))


@pytest.mark.parametrize(
    ("host", "peers", "firewall", "words"),
    [
        (
            "node0",
            ["10.0.0.2"],
            "off",
            "the job meets at node0:29500, which is fd00::1 as well, and no peer has an IPv6",
        ),
        (
            "node0",
            ["fd00::2"],
            "off",
            "the job meets at node0:29500, which is 10.0.0.1 as well, and no peer has an IPv4",
        ),
        ("fd00::1", ["10.0.0.2"], "auto", "the job meets at [fd00::1]:29500, and no peer has an IPv6 address: "),
        ("node6", ["10.0.0.2"], "off", "the job meets at node6:29500, and no peer has an IPv6 address: "),
        # With chains, a reset has a client go on to the other address at once.
        ("node0", ["10.0.0.2"], "auto", None),
        ("node0", ["10.0.0.2", "fd00::2"], "off", None),
        ("node0", [], "off", None),
        ("10.0.0.1", ["10.0.0.2"], "off", None),
        # Another host's: it warns there.
        ("node9", ["10.0.0.2"], "off", None),
        ("nowhere", ["10.0.0.2"], "off", None),
    ],
)
def test_an_endpoint_with_addresses_that_no_peer_has_one_of(
    monkeypatch: pytest.MonkeyPatch, host: str, peers: list[str], firewall: str, words: str | None
) -> None:
    known = {"node0": ("10.0.0.1", "fd00::1"), "node6": ("fd00::1",), "node9": ("10.0.0.9", "fd00::9")}
    monkeypatch.setattr("securerun.host.interfaces.may_bind", lambda address: address in known["node0"])

    def resolve(name: str) -> tuple[str, ...]:
        if name not in known:
            raise OSError("no such name")
        return known[name]

    job = replace(JOB, endpoint=Endpoint(host, 29500))
    networks = [ipaddress.ip_network(peer) for peer in peers]
    found = list(meeting.warnings(job, Options(firewall=firewall), networks, resolve))
    assert [line.startswith(words or "") for line in found] == ([True] if words else [])


@pytest.mark.parametrize(("peer", "is_said"), [("10.0.0.2", True), ("fd00::2", False)])
def test_a_workers_store_of_a_version_that_no_peer_has(
    monkeypatch: pytest.MonkeyPatch, peer: str, is_said: bool
) -> None:
    monkeypatch.setattr("securerun.host.interfaces.may_bind", {"fd00::1"}.__contains__)
    job = Job("c10d", Endpoint("node9", 29400), 2, 2, 0, ("train.py",), local_address="node6")
    networks = [ipaddress.ip_network(peer)]
    found = list(meeting.warnings(job, Options(), networks, lambda host: ["fd00::1" if host == "node6" else "fd00::9"]))
    expected = "if this node becomes the first, the workers meet at node6, and no peer has an IPv6 address: "
    assert [line.startswith(expected) for line in found] == [True] * is_said, found


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


@pytest.mark.parametrize("by_name", [False, True], ids=["address", "name"])
def test_a_job_that_meets_on_a_network_without_a_peer_is_warned_of(
    nodes: list[Host], tmp_path: Path, by_name: bool
) -> None:
    node, peer = nodes
    on_ib0 = second_network.address(node)
    for listed, is_said in ((peer.ipv4, True), (f"{peer.ipv4},{second_network.address(peer)}", False)):
        options = ["--nnodes", "2", "--master-addr", "node0-ib" if by_name else on_ib0, "--peers", listed, "train.py"]
        command = [jobs.SECURERUN, "--dry-run", *options]
        done = node.run(second_network.with_hosts_file(tmp_path / "hosts", {"node0-ib": [on_ib0]}, command))
        assert done.returncode == 0, done
        assert ("no peer is reached through ib0 by this host's routes" in done.stderr) == is_said, done.stderr


def test_a_name_with_two_versions_is_said_where_nothing_answers_the_one_that_no_peer_has(
    nodes: list[Host], tmp_path: Path
) -> None:
    node, peer = nodes
    options = ["--nnodes", "2", "--master-addr", "node0", "--peers", peer.ipv4, "train.py"]
    for more, count in (["--firewall", "off"], 1), ([], 0):
        command = [jobs.SECURERUN, "--dry-run", *more, *options]
        done = node.run(second_network.with_hosts_file(tmp_path / "hosts", {"node0": node.addresses}, command))
        assert done.returncode == 0, done
        assert done.stderr.count(f"node0:29500, which is {node.ipv6} as well, and no peer has an IPv6 address") == count


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
        assert all(f"{one}/" in done.stdout for one in (*peer.addresses, second_network.address(peer)))
    else:
        assert " is, through eth0)" in done.stderr
