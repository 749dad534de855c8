"""Interfaces and their networks, each test in a network namespace of its own, made and gone with a child process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sandbox import IN_NAMESPACE, needs_namespace

from securerun.errors import PolicyError
from securerun.host import interfaces

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
from securerun.job.job import Endpoint, Job
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


def test_an_interface_that_is_there() -> None:
    assert interfaces.require(["lo"]) == ("lo",)
    assert interfaces.require([]) == ()


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(PolicyError) as error:
        interfaces.require(["lo", "eth77"], "SECURERUN_INTERFACE")
    assert str(error.value).startswith("SECURERUN_INTERFACE: there is no interface 'eth77' here; write one of lo")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, ()), ("", ()), ("any", ()), ("eth0", ("eth0",)), (" eth0, ib0,,eth0 ", ("eth0", "ib0"))],
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


# What a host of a routed cluster looks like: two ways to the same networks, an address on no wire, a second table.
ROUTED = (
    TWO_NETWORKS
    + """
ip link add own0 type bridge
ip addr add 10.200.0.1/32 dev own0
ip link set own0 up
ip route add 10.1.0.0/16 nexthop via 10.77.0.9 nexthop via 172.20.0.9
ip route add 10.2.0.0/16 via 10.77.0.9
ip route add 10.2.7.0/24 via 172.20.0.9
ip route add default via 172.20.0.9 table 1001
ip -6 route add fd00:99::/32 via fd00:77::9
"""
)


@needs_namespace
@pytest.mark.parametrize(
    ("networks", "expected"),
    [
        ("10.77.0.5/32", "wire0 wire1"),  # table 1001 leads anywhere, through wire1
        ("10.1.2.3/32", "wire0 wire1"),
        ("10.2.7.1/32", "wire1"),
        ("fd00:77::5/128", "wire0"),
        ("fd00:99::5/128 10.2.7.1/32", "wire0 wire1"),
        ("fd00:5::5/128", ""),
    ],
)
def test_all_interfaces_that_lead_to_a_network_by_any_route(networks: str, expected: str) -> None:
    code = f"""
import ipaddress
print(*sorted(interfaces.leading_to([ipaddress.ip_network(word) for word in {networks!r}.split()])))
"""
    assert in_namespace(ROUTED, code) == expected


@needs_namespace
def test_the_longest_prefix_decides_and_every_part_of_a_network_counts() -> None:
    code = """
import ipaddress
for network in ("10.2.1.1/32", "10.2.7.1/32", "10.2.0.0/16", "10.2.7.0/25", "10.0.0.0/8", "10.9.9.9/32", "0.0.0.0/0"):
    print(*sorted(interfaces.leading_to([ipaddress.ip_network(network)])))
"""
    setup = ROUTED.replace("ip route add default via 172.20.0.9 table 1001\n", "")
    assert in_namespace(setup, code).splitlines() == [
        "wire0",
        "wire1",
        "wire0 wire1",
        "wire1",
        "wire0 wire1",
        "",
        "wire0 wire1",
    ]


@needs_namespace
def test_two_interfaces_on_one_network_both_lead_there() -> None:
    """A host answers for both of its addresses on both of its wires (arp(7), arp_ignore 0)."""
    both = ONE_NETWORK + "ip link add wire1 type veth peer name far1; ip addr add 10.77.0.2/24 dev wire1\n"
    code = """
import ipaddress
print(*sorted(interfaces.leading_to([ipaddress.ip_network("10.77.0.5")])))
"""
    assert in_namespace(both + "ip link set wire1 up", code) == "wire0 wire1"


@needs_namespace
def test_the_addresses_of_this_host() -> None:
    code = """
print(*interfaces.own_addresses())
print(*(interfaces.with_address(address) for address in ("172.20.0.1", "fd00:77:0::1", "127.0.0.1", "10.77.0.5")))
"""
    addresses, holders = in_namespace(TWO_NETWORKS, code).splitlines()
    assert set(addresses.split()) == {"127.0.0.1", "::1", "10.77.0.1", "192.168.5.1", "fd00:77::1", "172.20.0.1"}
    assert holders == "wire1 wire0 lo None"


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
