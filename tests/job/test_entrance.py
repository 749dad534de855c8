"""The interfaces that HCCL's, gloo's and NCCL's variables name, and where peers may come in by default.

Each test is in a network namespace of its own. On the wire: a real lease, and a peer with two ways to the job's host.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
from hosts import Host, Network, finish
from probe import reach
from sandbox import IN_NAMESPACE, needs_namespace
from torchless import needs_torch

from securerun.errors import PolicyError
from securerun.job import entrance as entrances
from securerun.options import Options

CODE = """
import ipaddress, json, sys
from securerun.errors import PolicyError
from securerun.job import entrance as entrances
from securerun.options import Options

environment, interface, peers = json.loads(sys.argv[1])
try:
    networks = [ipaddress.ip_network(peer) for peer in peers]
    print(entrances.entrance(Options(interface=interface), environment, networks))
except PolicyError as error:
    print("refused:", error)
"""
# eth0 and eth1 are wires, docker0 a bridge with a network of its own.
HOST = """
ip link add br0 type bridge
for name in eth0 eth1 ib0; do ip link add $name type veth peer name far-$name; ip link set far-$name master br0 up; done
ip addr add 10.77.0.1/24 dev eth0
ip addr add 10.78.0.1/24 dev eth1
ip addr add fd78::1/64 dev eth1 nodad
ip link add docker0 type bridge
ip addr add 172.17.0.1/16 dev docker0
for name in lo br0 eth0 eth1 ib0 docker0; do ip link set $name up; done
"""


NO_ROUTE_LEADS_TO = ["10.99.0.1"]
# What HCCL is told counts where it may be in use: here CANN is, as far as anybody can see.
CANN = {"ASCEND_HOME_PATH": "/"}


def entrance(environment: dict[str, str], *peers: str, interface: str | None = None, setup: str = HOST) -> str:
    """Where peers may come in, in the words of a plan; or why not."""
    argument = json.dumps([environment, interface, peers or NO_ROUTE_LEADS_TO])
    script = f'set -e\n{setup}\nexec {sys.executable} - "$1"'
    command = [*IN_NAMESPACE, "sh", "-c", script, "sh", argument]
    done = subprocess.run(command, input=CODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- what the variables name


@needs_namespace
@pytest.mark.parametrize("variable", ["HCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("eth0", "eth0"),
        ("eth", "eth0, eth1"),
        ("eth,ib", "eth0, eth1, ib0"),
        ("=eth0", "eth0"),
        ("=eth1,ib0", "eth1, ib0"),
        ("=eth1,bond0", "eth1"),
        ("^lo,docker,far,br,eth0", "eth1, ib0"),
        ("^=lo,docker0,br0,far-eth0,far-eth1,far-ib0,eth", "eth0, eth1, ib0"),
        (" eth0 , ib ", "eth0, ib0"),
    ],
)
def test_patterns_as_hccl_and_nccl_read_them(variable: str, pattern: str, names: str) -> None:
    found = entrance({variable: pattern})
    assert found.endswith(f" ({variable})")
    assert set(found.partition(" (")[0].split(", ")) == set(names.split(", "))


@needs_namespace
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("eth9", "HCCL_SOCKET_IFNAME=eth9 matches no interface of this host; this host has "),
        ("=eth", "HCCL_SOCKET_IFNAME==eth matches no interface of this host; this host has "),
        ("^l,e,i,d,f,b", "HCCL_SOCKET_IFNAME=^l,e,i,d,f,b leaves no interface of this host; this host has "),
        ("^=", "HCCL_SOCKET_IFNAME=^= names no interface; this host has "),
        (",", "HCCL_SOCKET_IFNAME=, names no interface; this host has "),
    ],
)
def test_a_pattern_that_names_nothing_here_is_refused(pattern: str, words: str) -> None:
    message = entrance({"HCCL_SOCKET_IFNAME": pattern, **CANN})
    assert message.startswith(f"refused: {words}")
    assert "eth0" in message and "correct or unset HCCL_SOCKET_IFNAME" in message and "--interface" in message


@needs_namespace
def test_gloo_takes_whole_names_and_each_must_be_there() -> None:
    assert entrance({"GLOO_SOCKET_IFNAME": "eth0,ib0"}) == "eth0, ib0 (GLOO_SOCKET_IFNAME)"
    for wrong in ("eth", "=eth0", "^eth0", "eth0,bond0"):
        message = entrance({"GLOO_SOCKET_IFNAME": wrong})
        assert message.startswith(f"refused: GLOO_SOCKET_IFNAME={wrong}: there is no interface "), message


@needs_namespace
def test_all_libraries_count_and_hccls_address_comes_before_its_interface() -> None:
    environment = {"HCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert entrance(environment) == "eth0, ib0 (HCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
    assert entrance({"HCCL_IF_IP": "10.78.0.1", "HCCL_SOCKET_IFNAME": "nowhere"}) == "eth1 (HCCL_IF_IP)"
    assert entrance({"HCCL_IF_IP": "fd78:0::1%eth1"}) == "eth1 (HCCL_IF_IP)"


@needs_namespace
@pytest.mark.parametrize(("address", "words"), [("10.78.0.9", "no interface of this host"), ("node0", "no IP address")])
def test_an_address_for_hccl_that_is_not_here_is_refused(address: str, words: str) -> None:
    message = entrance({"HCCL_IF_IP": address, **CANN})
    assert message.startswith(f"refused: HCCL_IF_IP={address}") and words in message


@needs_namespace
def test_what_the_user_says_comes_first_and_the_variables_are_not_looked_at() -> None:
    environment = {"HCCL_SOCKET_IFNAME": "nowhere"}
    assert entrance(environment, "10.78.0.2", interface="eth1") == "eth1 (--interface)"
    assert entrance(environment, "10.77.0.2", interface="any") == "any (--interface)"
    assert entrance(environment, interface="eth7").startswith("refused: --interface: there is no interface 'eth7'")


@needs_namespace
def test_without_a_word_from_anybody_peers_may_come_in_anywhere() -> None:
    assert entrance({}, "10.77.0.2") == "any (no --interface, and no variable names one)"
    assert entrance({"HCCL_SOCKET_IFNAME": "", "GLOO_SOCKET_IFNAME": " "}, "10.77.0.2").startswith("any (")


# --- no right job is cut off


@needs_namespace
@pytest.mark.parametrize(
    ("peers", "expected"),
    [
        (["10.78.0.2/32", "fd78::2/128"], "eth1 (HCCL_SOCKET_IFNAME)"),
        (["10.77.0.2/32", "10.78.0.2/32"], "eth1, eth0 (HCCL_SOCKET_IFNAME; eth0 on the way to peers)"),
        (["10.77.0.0/24"], "eth1, eth0 (HCCL_SOCKET_IFNAME; eth0 on the way to peers)"),
        (["192.168.9.9/32"], "eth1 (HCCL_SOCKET_IFNAME)"),  # no way there, so nobody comes from there
        ([], "eth1 (HCCL_SOCKET_IFNAME)"),
    ],
)
def test_where_the_routes_lead_to_peers_they_come_in_as_well(peers: list[str], expected: str) -> None:
    assert entrance({"HCCL_SOCKET_IFNAME": "eth1"}, *peers) == expected


@needs_namespace
def test_an_interface_that_only_has_the_address_does_not_keep_the_peers_out() -> None:
    """A host with routed addresses: its address is on no wire, packets come by two wires with one cost."""
    routed = HOST + (
        "ip link add own0 type bridge; ip link set own0 up; ip addr add 10.200.0.1/32 dev own0\n"
        "ip route add 10.200.0.0/16 nexthop via 10.77.0.9 nexthop via 10.78.0.9\n"
    )
    found = entrance({"HCCL_SOCKET_IFNAME": "own0"}, "10.200.3.1/32", setup=routed)
    assert found == "own0, eth0, eth1 (HCCL_SOCKET_IFNAME; eth0, eth1 on the way to peers)"


@needs_namespace
def test_more_interfaces_than_a_policy_holds_are_any() -> None:
    """A node of Kubernetes has one for each pod, and NCCL is told what to leave out."""
    many = HOST + "i=0; while [ $i -lt 70 ]; do ip link add cali$i type bridge; i=$((i+1)); done\n"
    found = entrance({"NCCL_SOCKET_IFNAME": "^docker"}, "10.77.0.2/32", setup=many)
    assert found == "any (NCCL_SOCKET_IFNAME and the routes name more than a firewall can be told)"


@needs_namespace
def test_routes_that_cannot_be_told_are_no_reason_to_keep_a_peer_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("securerun.job.reach.Routes", refuse)
    found = entrances.entrance(Options(), {"HCCL_SOCKET_IFNAME": "lo"}, [ipaddress.ip_network("10.77.0.2")])
    assert found.names == ()
    assert "lo" in found.reason and "Operation not permitted" in found.reason


# --- HCCL's address family


@pytest.mark.parametrize(
    ("environment", "peers", "expected"),
    [
        ({"HCCL_SOCKET_FAMILY": "AF_INET6"}, ["10.0.0.2"], "HCCL_SOCKET_FAMILY=AF_INET6 has HCCL use IPv6"),
        ({"HCCL_SOCKET_FAMILY": "AF_INET"}, ["fd00::2"], "HCCL_SOCKET_FAMILY=AF_INET has HCCL use IPv4"),
        ({"HCCL_IF_IP": "fd00::1", "HCCL_SOCKET_FAMILY": "AF_INET"}, ["10.0.0.2"], "HCCL_IF_IP=fd00::1 has HCCL use"),
        ({"HCCL_SOCKET_FAMILY": "AF_INET6"}, ["10.0.0.2", "fd00::2"], None),
        ({"HCCL_SOCKET_FAMILY": "AF_INET6"}, [], None),
        ({}, ["fd00::2"], None),
    ],
)
def test_peers_without_an_address_that_hccl_uses_are_warned_of(
    environment: dict[str, str], peers: list[str], expected: str | None
) -> None:
    found = list(entrances.warnings(environment, [ipaddress.ip_network(peer) for peer in peers]))
    assert [words.startswith(expected or "") for words in found] == ([True] if expected else [])


@pytest.mark.parametrize("family", ["AF_UNIX", "ipv6", "10"])
def test_a_family_that_hccl_does_not_know_is_refused(family: str) -> None:
    with pytest.raises(PolicyError, match="write AF_INET or AF_INET6"):
        list(entrances.warnings({"HCCL_SOCKET_FAMILY": family, **CANN}, []))


# --- on the wire


def plan(node: Host, *options: str, env: dict[str, str | None]) -> str:
    done = node.run([jobs.SECURERUN, "--dry-run", *options, "train.py"], env=env)
    assert done.returncode == 0, done
    return next(line for line in done.stdout.splitlines() if line.startswith("interfaces"))


def test_the_plan_says_which_variable_names_the_interface(network: Network) -> None:
    node, peer, _ = network
    options = ["--nnodes", "2", "--master-addr", node.ipv4, "--peers", peer.ipv4]
    row = plan(node, *options, env={"GLOO_SOCKET_IFNAME": None, "HCCL_SOCKET_IFNAME": "=eth0"})
    assert row == "interfaces   eth0 (HCCL_SOCKET_IFNAME)"
    row = plan(node, *options, "--interface", "any", env={"HCCL_SOCKET_IFNAME": "nowhere"})
    assert row == "interfaces   any (--interface)"


def test_a_variable_that_names_nothing_here_is_refused_before_anything_is_started(network: Network) -> None:
    node = network["node0"]
    environment = {"HCCL_SOCKET_IFNAME": "bond0", **CANN}
    done = node.run([jobs.SECURERUN, "--peers", "10.77.0.2", "train.py"], env=environment)
    assert (done.returncode, done.stdout) == (78, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "securerun: HCCL_SOCKET_IFNAME=bond0 matches no interface of this host; this host has lo, eth0"
    )


def test_a_variable_for_another_host_is_no_matter_to_a_job_without_peers(network: Network) -> None:
    row = plan(network["node0"], "--standalone", env={"HCCL_SOCKET_IFNAME": "bond0"})
    assert row == "interfaces   any (no peer is to come in)"


@needs_torch
def test_hccl_on_one_wire_and_the_rendezvous_on_another_are_both_open_to_peers(
    network: Network, tmp_path: Path
) -> None:
    node, peer, stranger = network
    connect(node, peer)
    script = tmp_path / "listen.py"
    script.write_text(LISTEN)
    options = ["--nnodes", "1", "--peers", f"{peer.ipv4},10.78.0.2", "--firewall", "off"]
    job = node.popen(
        [jobs.SECURERUN, *options, script],
        env={"HCCL_SOCKET_IFNAME": "=eth1", "GLOO_SOCKET_IFNAME": None},
        stdin=subprocess.PIPE,
    )
    assert job.stdout is not None and job.stdout.readline() == "listening\n"
    targets = [(node.ipv4, 7000), ("10.78.0.1", 7000)]
    assert reach(peer, targets) == dict.fromkeys(targets, True)
    assert reach(stranger, targets[:1]) == {targets[0]: False}
    (tmp_path / "end").touch()
    done = finish(job)
    assert done.returncode == 0, done
    assert "through eth1, eth0 (HCCL_SOCKET_IFNAME; eth0 on the way to peers)" in done.stderr


# A job that listens on all addresses until it is told to end.
LISTEN = """
import pathlib, socket, time
server = socket.create_server(("0.0.0.0", 7000))
print("listening", flush=True)
while not (pathlib.Path(__file__).parent / "end").exists():
    time.sleep(0.05)
"""


def connect(one: Host, other: Host) -> None:
    """A second wire between two hosts: eth1, with 10.78.0.1 and 10.78.0.2."""
    create = ["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", other.namespace]
    one.run(create, check=True)
    for host, address in ((one, "10.78.0.1/24"), (other, "10.78.0.2/24")):
        host.run(["ip", "addr", "add", address, "dev", "eth1"], check=True)
        host.run(["ip", "link", "set", "eth1", "up"], check=True)
