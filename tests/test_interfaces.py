"""Interfaces and their networks, each test in a network namespace of its own, made and gone with a child process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from securerun.errors import PolicyError
from securerun.host import interfaces

IN_NAMESPACE = ["unshare", "--map-root-user", "--net", "--user"]

TWO_NETWORKS = """
ip link set lo up
ip link add wire0 type veth peer name far0
ip link add wire1 type veth peer name far1
ip addr add 10.77.0.1/24 dev wire0
ip addr add 192.168.5.1/16 dev wire0
ip addr add 169.254.3.1/16 dev wire0
ip -6 addr add fd00:77::1/64 dev wire0 nodad
ip addr add 172.20.0.1/24 dev wire1
for link in wire0 wire1 far0 far1; do ip link set $link up; done
ip route add 10.99.0.0/16 via 172.20.0.9
"""
ONE_NETWORK = "ip link add wire0 type veth peer name far0; ip addr add 10.77.0.1/24 dev wire0; ip link set wire0 up\n"
# As on Google's cloud: the interface has its own address and no network.
NO_NETWORK = "ip link add wire0 type veth peer name far0; ip addr add 10.77.0.1/32 dev wire0; ip link set wire0 up\n"

PRELUDE = """
from securerun.errors import PolicyError
from securerun.host import interfaces
from securerun.job.launchers import Endpoint, Job
from securerun.job.peers import find_peers
from securerun.options import Options

def subnet(host, interface=None, backend="c10d"):
    job = Job(backend, Endpoint(host, 29400), 2, 2, 0, ())
    try:
        found = find_peers(Options(peers="subnet", interface=interface), job, lambda name: ["10.77.0.5"])
    except PolicyError as error:
        return str(error)
    return " ".join(map(str, found.networks))
"""


def in_namespace(setup: str, code: str) -> str:
    """What `code` prints in a new network namespace."""
    script = f"set -e\n{setup}\nexec {sys.executable} -"
    done = subprocess.run([*IN_NAMESPACE, "sh", "-c", script], input=PRELUDE + code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _available() -> bool:
    probe = [*IN_NAMESPACE, "sh", "-c", ONE_NETWORK]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_namespace = pytest.mark.skipif(not _available(), reason="no network namespaces with veth devices here")


def test_an_interface_that_is_there() -> None:
    assert interfaces.require(["lo"]) == ("lo",)
    assert interfaces.require([]) == ()


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(PolicyError) as error:
        interfaces.require(["lo", "eth77"], "SECURERUN_INTERFACE")
    assert str(error.value).startswith("SECURERUN_INTERFACE: there is no interface 'eth77' here; write one of lo")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, ()), ("", ()), ("eth0", ("eth0",)), (" eth0, ib0,,eth0 ", ("eth0", "ib0"))],
)
def test_a_list_of_interfaces(text: str | None, expected: tuple[str, ...]) -> None:
    assert interfaces.parse(text) == expected


@needs_namespace
def test_networks_are_without_link_local_ones() -> None:
    code = """
print(interfaces.names())
print(interfaces.with_networks())
print(*interfaces.networks_of(["wire0"]))
print(*interfaces.networks_of(["wire0", "wire1", "lo", "far0"]))
"""
    names, with_networks, one, all_of_them = in_namespace(TWO_NETWORKS, code).splitlines()
    assert "'wire0'" in names
    assert with_networks in {"('wire0', 'wire1')", "('wire1', 'wire0')"}
    assert one == "10.77.0.0/24 192.168.0.0/16 fd00:77::/64"
    assert all_of_them == "10.77.0.0/24 172.20.0.0/24 192.168.0.0/16 fd00:77::/64"


@needs_namespace
@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.77.0.5", "wire0"),
        ("fd00:77::5", "wire0"),
        ("172.20.0.5", "wire1"),
        ("10.99.1.1", "wire1"),
        ("10.77.0.1", "wire0"),  # this host's own
        ("127.0.0.1", "None"),
        ("8.8.8.8", "None"),  # no route
    ],
)
def test_the_interface_that_leads_to_an_address(address: str, interface: str) -> None:
    assert in_namespace(TWO_NETWORKS, f"print(interfaces.towards([{address!r}]))") == interface


@needs_namespace
def test_subnet_is_the_network_of_the_interface_that_leads_to_the_endpoint() -> None:
    code = """
print(subnet("172.20.0.5"))
print(subnet("node0"))
print(subnet("172.20.0.5", "wire0"))
print(subnet("172.20.0.5", "wire0,wire1"))
"""
    assert in_namespace(TWO_NETWORKS, code).splitlines() == [
        "172.20.0.0/24",
        "10.77.0.0/24 192.168.0.0/16 fd00:77::/64",
        "10.77.0.0/24 192.168.0.0/16 fd00:77::/64",
        "10.77.0.0/24 172.20.0.0/24 192.168.0.0/16 fd00:77::/64",
    ]


@needs_namespace
def test_subnet_without_a_way_to_tell_asks_for_the_interface() -> None:
    for endpoint in ('"8.8.8.8"', '"172.20.0.5", backend="etcd"'):
        message = in_namespace(TWO_NETWORKS, f"print(subnet({endpoint}))")
        assert "subnet of which interface?" in message
        assert "--interface wire" in message


@needs_namespace
def test_subnet_with_one_network_is_that_network() -> None:
    assert in_namespace(ONE_NETWORK, 'print(subnet("8.8.8.8"))') == "10.77.0.0/24"


@needs_namespace
def test_subnet_without_a_network_is_refused() -> None:
    message = in_namespace(NO_NETWORK, 'print(subnet("10.77.0.1", "wire0"))')
    assert message.startswith("--peers: wire0 is on no network with other hosts")
    assert "--peers node1,node2" in message


@needs_namespace
def test_subnet_of_an_unknown_interface_is_refused() -> None:
    message = in_namespace(ONE_NETWORK, 'print(subnet("10.77.0.1", "eth0"))')
    assert message.startswith("--interface: there is no interface 'eth0' here; write one of ")
