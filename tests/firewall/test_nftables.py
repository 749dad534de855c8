"""The nftables backend on a real kernel, in hosts of their own: who gets in, what stays, and what goes by itself."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import kernel
import packets
import probe
import pytest
from cgroups import in_child, inside
from hosts import Host, Network, eventually, is_alive
from packets import ACK, CWR, ECE, FIN, FRAGMENT, HOP_BY_HOP, OPTIONS, PSH, ROUTING, SYN, URG, Flow

from securerun.firewall import libnftables, nftables
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.libnftables import Nftables, NftablesError
from securerun.firewall.nftables import TOKEN, NftablesChains, render, table_name
from securerun.firewall.policy import Policy, PortRange
from securerun.linux import nf_tables
from securerun.linux.networks import collapse

RUN, OTHER_RUN = "0123456789ab", "ba9876543210"
TABLE = table_name(RUN)
MASTER, LAST_HCCL, UNPLANNED = 29500, 60015, 29600
PORTS = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))
LISTENED = (MASTER, LAST_HCCL, UNPLANNED)
LOG_GROUP = 4711
FIRST_SOURCE_PORT = 41000

# Holds a run's table in the host that it runs in, and a log group where it is told one, until its end of input.
HOLDER = """
import ipaddress, json, os, subprocess, sys
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.droplog import DropLog
from securerun.firewall.nftables import NftablesChains
from securerun.firewall.policy import Policy, PortRange, collapse

order = json.loads(sys.argv[1])
drops = DropLog(order["log_group"]) if order["log_group"] else None
chains = NftablesChains(order["run_id"])
peers = collapse(ipaddress.ip_network(peer) for peer in order["peers"])
ports = tuple(PortRange(*port) for port in order["ports"])
try:
    chains.install(Policy(order["run_id"], ports, peers, tuple(order["interfaces"])), order["log_group"])
except PortChainsUnavailable as error:
    sys.exit(f"unavailable: {error}")
if order["children"]:
    outliving = subprocess.Popen(["sleep", "60"], close_fds=False).pid, os.fork()
    if not outliving[1]:
        import time
        time.sleep(60)
        os._exit(0)
    print(*outliving, flush=True)
print("held", flush=True)
sys.stdin.read()
if drops:
    drops.read()
    print(json.dumps([[str(denial.source), denial.port, denial.packets] for denial in drops.denied()]))
chains.remove()
chains.remove()
"""
LISTENER = """
import socket, sys
of_both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
listeners = [socket.create_server(("::", int(port)), **of_both) for port in sys.argv[1:]]
print("listening", flush=True)
sys.stdin.read()
"""
# Sends SYNs as fast as it can until its end of input, and counts them and the connections that one completed.
KNOCKER = """
import select, socket, sys
print("knocking", flush=True)
knocks, answers = 0, set()
while not select.select([sys.stdin], [], [], 0)[0]:
    dialling = [socket.socket() for _ in range(200)]
    for one in dialling:
        one.setblocking(False)
        one.connect_ex((sys.argv[1], int(sys.argv[2])))
    knocks += len(dialling)
    answers |= {(knocks, one.fileno()) for one in select.select([], dialling, [], 0)[1]}
    for one in dialling:
        one.close()
print(knocks, len(answers))
"""
# Dials with the token of passed packets (see securerun/firewall/nftables.py) as the socket's own priority.
FORGER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family) as dialling:
    dialling.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, int(sys.argv[3], 16))
    dialling.settimeout(1)
    try:
        dialling.connect((sys.argv[1], int(sys.argv[2])))
    except socket.timeout:
        print("timeout")
"""
DIALLER = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 3, ("", int(sys.argv[3]))).close()
"""


def policy(*peers: str, interfaces: Sequence[str] = (), run_id: str = RUN) -> Policy:
    return Policy(run_id, PORTS, collapse(ipaddress.ip_network(peer) for peer in peers), tuple(interfaces))


@contextlib.contextmanager
def started(host: Host, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program that says a line when it is ready and ends at its end of input."""
    process = host.popen([sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None and process.stderr is not None
    try:
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError, ValueError):
            process.stdin.close()
        process.wait(timeout=30)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.readline().strip() or process.stderr.read().strip()


@contextlib.contextmanager
def held(
    host: Host, *policies: Policy, log_group: int | None = None, children: bool = False
) -> Iterator[list[subprocess.Popen[str]]]:
    """The tables of these policies, each held by a process of its own."""
    kernel.require(kernel.OWNED_TABLES)
    with contextlib.ExitStack() as stack:
        holders = []
        for wanted in policies:
            order = {
                "run_id": wanted.run_id,
                "ports": [(port.first, port.last, port.purpose) for port in wanted.ports],
                "peers": [str(peer) for peer in wanted.peers],
                "interfaces": wanted.interfaces,
                "log_group": log_group,
                "children": children,
            }
            holders.append(stack.enter_context(started(host, HOLDER, json.dumps(order))))
        if not children:
            assert [line_of(holder) for holder in holders] == ["held"] * len(holders)
        yield holders


@pytest.fixture
def hosts(network: Network) -> Iterator[tuple[Host, Host, Host]]:
    """node0 with listeners on both families, node1 and a stranger."""
    node0, node1, stranger = network
    with started(node0, LISTENER, *(str(port) for port in LISTENED)) as listener:
        assert line_of(listener) == "listening"
        yield node0, node1, stranger


def reached(origin: Host, target: Host, ports: Sequence[int] = LISTENED) -> set[tuple[str, int]]:
    """Which of the target's ports a connect() completes to, as (address, port)."""
    results = probe.reach(origin, [(address, port) for address in target.addresses for port in ports])
    return {endpoint for endpoint, connected in results.items() if connected}


def all_of(target: Host, ports: Sequence[int] = LISTENED) -> set[tuple[str, int]]:
    return {(address, port) for address in target.addresses for port in ports}


def has_table(host: Host, name: str = TABLE) -> bool:
    return f"table inet {name}" in host.run(["nft", "list", "tables"], check=True).stdout


# --- the text ---------------------------------------------------------------------------------------------


def test_the_text_is_what_nft_reads_and_people_look_at() -> None:
    ports = (PortRange(29500, 29501, "master ports"), PortRange(60000, 60100, "HCCL"))
    wanted = replace(policy("10.77.0.2", "10.78.0.0/16", "fd77::2"), interfaces=("eth0", "ib0.10"), ports=ports)
    assert (
        render(wanted, 7)
        == """\
create table inet securerun-0123456789ab { flags owner; comment "securerun 0123456789ab"; }
table inet securerun-0123456789ab {
	flags owner

	set hosts4 {
		type ipv4_addr
		elements = { 10.77.0.2 }
	}

	set networks4 {
		type ipv4_addr
		flags interval
		elements = { 10.78.0.0/16 }
	}

	set hosts6 {
		type ipv6_addr
		elements = { fd77::2 }
	}

	chain pass {
		type filter hook input priority -20; policy accept;
		tcp flags & (syn | ack) != syn accept comment "securerun 0123456789ab"
		iifname { "eth0", "ib0.10" } tcp dport { 29500, 29501 } ip saddr @hosts4 meta priority set 5352:4e21 accept \
comment "securerun 0123456789ab"
		iifname { "eth0", "ib0.10" } tcp dport 60000-60100 ip saddr @hosts4 meta priority set 5352:4e21 accept \
comment "securerun 0123456789ab"
		iifname { "eth0", "ib0.10" } tcp dport { 29500, 29501 } ip saddr @networks4 meta priority set 5352:4e21 accept \
comment "securerun 0123456789ab"
		iifname { "eth0", "ib0.10" } tcp dport 60000-60100 ip saddr @networks4 meta priority set 5352:4e21 accept \
comment "securerun 0123456789ab"
		iifname { "eth0", "ib0.10" } tcp dport { 29500, 29501 } ip6 saddr @hosts6 meta priority set 5352:4e21 accept \
comment "securerun 0123456789ab"
		iifname { "eth0", "ib0.10" } tcp dport 60000-60100 ip6 saddr @hosts6 meta priority set 5352:4e21 accept \
comment "securerun 0123456789ab"
	}

	chain refuse {
		limit rate 1000/second burst 1000 packets log prefix "securerun 0123456789ab" group 7 \
comment "securerun 0123456789ab"
		counter drop comment "securerun 0123456789ab"
	}

	chain close {
		type filter hook input priority -10; policy accept;
		tcp flags & (syn | ack) != syn accept comment "securerun 0123456789ab"
		meta priority 5352:4e21 accept comment "securerun 0123456789ab"
		iifname "lo" accept comment "securerun 0123456789ab"
		tcp dport { 29500, 29501 } goto refuse comment "securerun 0123456789ab"
		tcp dport 60000-60100 goto refuse comment "securerun 0123456789ab"
	}
}
"""
    )


def test_without_peers_nothing_passes_and_without_a_log_group_nothing_is_logged() -> None:
    text = render(policy(), None)
    assert "chain pass" not in text
    assert "set peers" not in text
    assert "log" not in text


def test_ranges_that_overlap_or_touch_are_joined() -> None:
    ports = ((60010, 60100), (60000, 60015), (60101, 60101), (5, 5), (7, 8), (8, 9))
    text = render(Policy(RUN, tuple(PortRange(first, last, "x") for first, last in ports), ()), None)
    assert "tcp dport { 5, 7, 8, 9 } goto refuse" in text
    assert "tcp dport 60000-60101 goto refuse" in text
    assert text.count("tcp dport") == 2


# --- who gets in ------------------------------------------------------------------------------------------


def test_only_peers_connect_to_planned_ports_over_both_families(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    with held(node0, policy(*node1.addresses)):
        assert reached(node1, node0) == all_of(node0)
        assert reached(stranger, node0) == all_of(node0, [UNPLANNED])
    assert reached(stranger, node0) == all_of(node0)


def test_a_host_reaches_its_own_ports_over_loopback(hosts: tuple[Host, Host, Host]) -> None:
    node0, *_ = hosts
    own = [(address, MASTER) for address in ("127.0.0.1", "::1", *node0.addresses)]
    with held(node0, policy()):
        assert probe.reach(node0, own) == dict.fromkeys(own, True)


def test_an_outgoing_connection_from_a_closed_port_gets_its_answers(network: Network) -> None:
    node0, node1, _ = network
    with started(node1, LISTENER, "7000") as listener, held(node0, policy()):
        assert line_of(listener) == "listening"
        for address, own_port in zip(node1.addresses, ("60005", "60006")):
            node0.run([sys.executable, "-c", DIALLER, address, "7000", own_port], check=True)


def test_runs_with_the_same_ports_are_reachable_by_the_peers_of_either(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    with held(node0, policy(*node1.addresses), policy(stranger.ipv4, run_id=OTHER_RUN)):
        assert reached(node1, node0) == all_of(node0)
        assert reached(stranger, node0, [MASTER, LAST_HCCL]) == {(node0.ipv4, MASTER), (node0.ipv4, LAST_HCCL)}


def test_a_peer_of_one_run_gets_no_further_than_that_runs_ports(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    first = replace(policy(*node1.addresses), ports=PORTS[:1])
    second = replace(policy(*stranger.addresses, run_id=OTHER_RUN), ports=PORTS[1:])
    with held(node0, first, second):
        assert reached(node1, node0) == all_of(node0, [MASTER, UNPLANNED])
        assert reached(stranger, node0) == all_of(node0, [LAST_HCCL, UNPLANNED])


@pytest.mark.parametrize(("interface", "enters"), [("eth0", True), ("ib0.10", False)])
def test_a_peer_gets_in_through_the_named_interfaces_only(
    hosts: tuple[Host, Host, Host], interface: str, enters: bool
) -> None:
    node0, node1, stranger = hosts
    with held(node0, policy(*node1.addresses, interfaces=["ib0", interface])):
        assert reached(node1, node0, [MASTER]) == (all_of(node0, [MASTER]) if enters else set())
        assert reached(stranger, node0, [MASTER]) == set()


def test_a_peer_that_the_host_turns_away_stays_out(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, _ = hosts
    node0.run(["iptables", "-A", "INPUT", "-p", "tcp", "--dport", str(MASTER), "-j", "DROP"], check=True)
    with held(node0, policy(*node1.addresses)):
        assert reached(node1, node0, [MASTER]) == {(node0.ipv6, MASTER)}


def test_marks_that_the_host_sets_neither_let_a_stranger_in_nor_change(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    rules = """
        table inet marks {
            chain before { type filter hook prerouting priority -150; meta mark set 0xffffffff; }
            chain after { type filter hook input priority 0; iifname eth0 meta mark != 0xffffffff drop; }
        }"""
    node0.run(["nft", "-f", "-"], text_input=rules, check=True)
    with held(node0, policy(*node1.addresses)):
        assert reached(node1, node0) == all_of(node0)
        assert reached(stranger, node0) == all_of(node0, [UNPLANNED])


def test_a_stranger_cannot_bring_the_token_along(hosts: tuple[Host, Host, Host]) -> None:
    node0, _, stranger = hosts
    token = TOKEN.replace(":", "")
    with held(node0, policy("10.99.0.1", "fd99::1")):
        for address in node0.addresses:
            forged = stranger.run([sys.executable, "-c", FORGER, address, str(MASTER), token], check=True)
            assert forged.stdout == "timeout\n"


@kernel.needing(kernel.OWNED_TABLES)
def test_ten_thousand_peers_go_in_at_once(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    # Every other address, so that none of them collapse.
    crowd = [f"10.90.{number // 128}.{number % 128 * 2}" for number in range(9998)]
    with inside(node0):
        chains = NftablesChains(RUN)
        chains.install(policy(*node1.addresses, *crowd), None)
    assert reached(node1, node0, [MASTER]) == all_of(node0, [MASTER])
    assert reached(stranger, node0, [MASTER]) == set()
    listed = node0.run(["nft", "list", "set", "inet", TABLE, "hosts4"], check=True).stdout
    assert len(re.findall(r"\d+\.\d+\.\d+\.\d+", listed)) == len(crowd) + 1
    with inside(node0):
        chains.remove()
    assert not has_table(node0)


@pytest.mark.parametrize("peers", [["0.0.0.0/0"], ["::/0"], ["0.0.0.0/0", "::/0"]])
def test_a_network_of_all_addresses_lets_its_family_in(hosts: tuple[Host, Host, Host], peers: list[str]) -> None:
    node0, node1, _ = hosts
    families = {ipaddress.ip_network(peer).version for peer in peers}
    with held(node0, policy(*peers)):
        entered = {ipaddress.ip_address(address).version for address, _ in reached(node1, node0, [MASTER])}
    assert entered == families


# --- packets that no honest host sends --------------------------------------------------------------------


def openers(flow: Flow) -> list[list[bytes]]:
    """Ways to open a connection, each a list of packets, every one from a source port of its own."""
    flags = [SYN | more for more in (0, PSH, URG, ECE, CWR, FIN, PSH | URG | ECE | CWR)]
    flows = iter(replace(flow, source_port=port) for port in range(FIRST_SOURCE_PORT, 42000))
    crafted = [[packets.packet(one, packets.tcp(one, bits))] for bits, one in zip(flags, flows)]
    if flow.source.version == 4:
        for length in (4, 40):
            one = next(flows)
            crafted.append([packets.ipv4(one, packets.tcp(one, SYN), options=b"\x01" * length)])
        one = next(flows)
        segment = packets.tcp(one, SYN, options=b"\x01" * 20)
        return [*crafted, [packets.ipv4(one, segment[:8], fragment=0x2000), packets.ipv4(one, segment[8:], fragment=1)]]
    for kinds in ([HOP_BY_HOP], [OPTIONS], [ROUTING], [FRAGMENT], [HOP_BY_HOP, OPTIONS, ROUTING, FRAGMENT]):
        one = next(flows)
        crafted.append([packets.ipv6(one, packets.tcp(one, SYN), extensions=kinds)])
    for cut in (8, 16, 24):
        one = next(flows)
        segment = packets.tcp(one, SYN, options=b"\x01" * 20)
        first = packets.ipv6(one, segment[:cut], extensions=(FRAGMENT,), fragment=1)
        crafted.append([first, packets.ipv6(one, segment[cut:], extensions=(FRAGMENT,), fragment=cut)])
    return crafted


def handshakes_begun(origin: Host, target: Host) -> int:
    """How many of all openers, of both families, were answered with SYN and ACK."""
    with wire(target) as endpoint:
        to = endpoint.getsockname()[4]
    begun = 0
    for source, destination in zip(origin.addresses, target.addresses):
        flow = Flow(ipaddress.ip_address(source), ipaddress.ip_address(destination), destination_port=MASTER)
        with wire(origin) as endpoint:
            for content in (content for opener in openers(flow) for content in opener):
                endpoint.send(packets.frame(content, to=to, sender=endpoint.getsockname()[4]))
            received = packets.frames_in(endpoint, 0.3)
        for port in range(FIRST_SOURCE_PORT, FIRST_SOURCE_PORT + len(openers(flow))):
            answers = [packets.answer(frame, replace(flow, source_port=port)) for frame in received]
            begun += any(answer and answer[13] & (SYN | ACK) == SYN | ACK for answer in answers)
    return begun


@contextlib.contextmanager
def wire(host: Host) -> Iterator[socket.socket]:
    """A packet socket on the host's eth0."""
    every_protocol = 3  # include/uapi/linux/if_ether.h: ETH_P_ALL
    with inside(host):
        endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(every_protocol))
        endpoint.bind(("eth0", every_protocol))
    with endpoint:
        yield endpoint


def test_no_crafted_opening_packet_of_a_stranger_is_answered(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    with held(node0, policy(*node1.addresses)):
        assert handshakes_begun(stranger, node0) == 0
        answered_to_a_peer = handshakes_begun(node1, node0)
    # Some of them the host itself answers to nobody.
    assert answered_to_a_peer == handshakes_begun(stranger, node0) > 0


# --- what stays, and what goes by itself ------------------------------------------------------------------


def test_the_table_goes_with_the_holder_however_it_ends(hosts: tuple[Host, Host, Host]) -> None:
    node0, _, stranger = hosts
    with held(node0, policy()) as (holder,):
        holder.kill()
        assert eventually(lambda: not has_table(node0))
    assert reached(stranger, node0) == all_of(node0)


def test_children_of_the_holder_do_not_keep_the_table(network: Network) -> None:
    node0, *_ = network
    with held(node0, policy(), children=True) as (holder,):
        children = [int(pid) for pid in line_of(holder).split()]
        assert line_of(holder) == "held"
        assert has_table(node0)
        holder.kill()
        assert eventually(lambda: not has_table(node0))
        assert all(is_alive(child) for child in children)
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_nobody_else_can_flush_change_or_delete_the_table(hosts: tuple[Host, Host, Host]) -> None:
    node0, _, stranger = hosts
    with held(node0, policy()):
        before = node0.snapshot()
        assert node0.run(["nft", "flush", "ruleset"]).returncode == 0
        for attempt in (
            f"delete table inet {TABLE}",
            f"flush table inet {TABLE}",
            f"flush chain inet {TABLE} close",
            f"delete element inet {TABLE} ports {{ {MASTER} }}",
            f"insert rule inet {TABLE} close accept",
        ):
            assert node0.run(["nft", attempt]).returncode != 0, attempt
        assert node0.snapshot() == before
        assert reached(stranger, node0) == all_of(node0, [UNPLANNED])


def test_rules_of_others_are_the_same_before_during_and_after(network: Network) -> None:
    node0, node1, _ = network
    for rule in (["-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT"], ["-P", "FORWARD", "DROP"]):
        node0.run(["iptables", *rule], check=True)
    foreign = """
        table inet foreign {
            set s { type inet_service; elements = { 22 } }
            chain c { type filter hook input priority -20; tcp dport @s accept; }
        }"""
    node0.run(["nft", "-f", "-"], text_input=foreign, check=True)
    before = node0.snapshot()
    with held(node0, policy(*node1.addresses)):
        during = node0.snapshot()
        assert TABLE in during["nft"]
        during["nft"] = re.sub(rf"\n?table inet {TABLE} \{{.*?\n\}}", "", during["nft"], flags=re.DOTALL)
        assert during == before
    assert node0.snapshot() == before


def test_one_runs_end_leaves_the_others_closed(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    with held(node0, policy(*node1.addresses)):
        with held(node0, policy(stranger.ipv4, run_id=OTHER_RUN)):
            pass
        assert not has_table(node0, table_name(OTHER_RUN))
        assert reached(stranger, node0) == all_of(node0, [UNPLANNED])
        assert reached(node1, node0) == all_of(node0)


@kernel.needing(kernel.OWNED_TABLES)
def test_installing_again_changes_ports_and_peers_of_the_standing_table(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    wider = (*PORTS, PortRange(UNPLANNED, UNPLANNED, "found listening"))
    with inside(node0):
        chains = NftablesChains(RUN)
        chains.install(policy(*node1.addresses), None)
        chains.install(replace(policy(*stranger.addresses), ports=wider), LOG_GROUP)
    assert reached(node1, node0) == set()
    assert reached(stranger, node0) == all_of(node0)
    with inside(node0):
        chains.install(policy(), None)
    assert reached(stranger, node0) == all_of(node0, [UNPLANNED])
    with inside(node0):
        chains.install(policy(stranger.ipv4), None)
    assert reached(stranger, node0, [MASTER]) == {(node0.ipv4, MASTER)}
    with inside(node0):
        chains.remove()
    assert reached(node1, node0) == all_of(node0)


@pytest.mark.parametrize(
    "outlives", [pytest.param(False, marks=kernel.needing(kernel.OWNED_TABLES)), True], ids=["owned", "outlives"]
)
@pytest.mark.parametrize("port", [MASTER, LAST_HCCL - 7, 30100], ids=["alone", "in a range", "in a long range"])
def test_no_packet_slips_through_while_the_table_is_changed(
    hosts: tuple[Host, Host, Host], port: int, outlives: bool
) -> None:
    """What was closed before and is closed afterwards is closed meanwhile."""
    node0, node1, stranger = hosts
    before = replace(policy(*node1.addresses), ports=(*PORTS, PortRange(30000, 30200, "long")))
    beside = (PortRange(MASTER + 1, MASTER + 1, "found listening"), PortRange(UNPLANNED, UNPLANNED, "found listening"))
    after = replace(before, ports=(*before.ports, *beside))
    with started(node0, LISTENER, str(port)) if port not in LISTENED else contextlib.nullcontext() as listener:
        assert listener is None or line_of(listener) == "listening"
        with inside(node0):
            chains = NftablesChains(RUN)
            chains.begin(adopt=False, outlive=outlives)
            chains.install(before, None)
        with started(stranger, KNOCKER, node0.ipv4, str(port)) as knocker:
            assert line_of(knocker) == "knocking"
            with inside(node0):
                for _ in range(150):
                    chains.install(after, None)
                    chains.install(before, None)
            assert knocker.stdin is not None
            knocker.stdin.close()
            knocks, answers = map(int, line_of(knocker).split())
        assert answers == 0
        assert knocks > 1000
        with inside(node0):
            chains.remove()


def test_who_was_dropped_is_counted_in_the_log_group(hosts: tuple[Host, Host, Host]) -> None:
    node0, node1, stranger = hosts
    with held(node0, policy(*node1.addresses), log_group=LOG_GROUP) as (holder,):
        assert reached(node1, node0, [MASTER]) == all_of(node0, [MASTER])
        assert reached(stranger, node0, [MASTER, LAST_HCCL]) == set()
        assert holder.stdin is not None
        holder.stdin.close()
        denied = json.loads(line_of(holder))
    assert {(source, port) for source, port, _ in denied} == {
        (address, port) for address in stranger.addresses for port in (MASTER, LAST_HCCL)
    }
    assert all(count >= 1 for _, _, count in denied)


# --- where it cannot be had -------------------------------------------------------------------------------


def test_accept_is_refused_since_nftables_cannot_keep_that_promise(network: Network) -> None:
    node0, *_ = network
    with inside(node0), pytest.raises(PortChainsUnavailable, match=r"own base chain.*--firewall iptables"):
        NftablesChains(RUN).install(replace(policy(), accept=True), None)
    assert not has_table(node0)


def test_a_table_of_that_name_that_someone_else_made_is_left_alone(network: Network) -> None:
    node0, *_ = network
    node0.run(["nft", f"table inet {TABLE} {{ chain theirs {{ }}; }}"], check=True)
    before = node0.snapshot()
    with inside(node0), pytest.raises(PortChainsUnavailable, match="this process did not make"):
        NftablesChains(RUN).install(policy(), None)
    assert node0.snapshot() == before


def test_a_table_that_another_process_holds_is_not_added_to(network: Network) -> None:
    node0, *_ = network
    with held(node0, policy()):
        before = node0.snapshot()
        with inside(node0), pytest.raises(PortChainsUnavailable, match="this process did not make"):
            NftablesChains(RUN).install(policy("10.77.0.3"), None)
        assert node0.snapshot() == before


def test_a_table_that_another_process_holds_is_not_removed(network: Network) -> None:
    node0, *_ = network
    with held(node0, policy()):
        with inside(node0), pytest.raises(PortChainsUnavailable, match="belongs to another process"):
            NftablesChains(RUN).remove()
        assert has_table(node0)


def test_removing_what_was_never_installed_is_no_error(network: Network) -> None:
    node0, *_ = network
    with inside(node0):
        NftablesChains(RUN).remove()


def test_without_privilege_it_says_so_in_one_line(network: Network) -> None:
    node0, *_ = network

    def refusal() -> str:
        os.setgroups([])
        os.setuid(65534)
        return refusal_of(NftablesChains(RUN))

    with inside(node0):
        assert in_child(refusal).startswith("nf_tables needs CAP_NET_ADMIN")


def test_without_the_library_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libnftables, "LIBRARY", "libnftables.so.99")
    libnftables._load.cache_clear()
    try:
        assert re.match(r"libnftables.so.99 cannot be loaded; install libnftables1", refusal_of(NftablesChains(RUN)))
    finally:
        libnftables._load.cache_clear()


def test_a_kernel_without_owners_is_told_by_its_version(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux before 5.12 answers: flags that it does not know are invalid."""
    run = Nftables.run

    def old_kernel(nftables: Nftables, text: str) -> str:
        if "flags owner" in text:
            raise NftablesError("Could not process rule: Invalid argument")
        return run(nftables, text)

    monkeypatch.setattr(Nftables, "run", old_kernel)
    node0, *_ = network
    with inside(node0):
        assert "kernel 5.12" in refusal_of(NftablesChains(RUN))
    assert not has_table(node0)


def test_what_an_old_library_may_not_know_is_read_alone_first(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libnftables 0.9.8 (Debian 11) knows no owner, and dies of the word in a block with sets, the guard with it."""
    monkeypatch.setattr(nftables, "_OWNER", "flags unheard")
    run, heard = Nftables.run, []

    def hear(nftables: Nftables, text: str) -> str:
        heard.append(text)
        return run(nftables, text)

    monkeypatch.setattr(Nftables, "run", hear)
    node0, *_ = network
    with inside(node0):
        assert "kernel 5.12 and nftables 0.9.9 are the first" in refusal_of(NftablesChains(RUN))
    assert set(heard) == {f"create table inet {TABLE} {{ flags unheard; }}"}
    assert not has_table(node0)


def test_what_is_read_is_not_run(network: Network) -> None:
    node0, *_ = network
    with inside(node0):
        owner = Nftables()
        owner.read(f"create table inet {TABLE}")
        assert owner.run("list tables") == ""
        owner.run(f"create table inet {TABLE}")
        assert TABLE in owner.run("list tables")
        owner.close()


@kernel.needing(kernel.OWNED_TABLES)
def test_success_without_the_rules_is_noticed(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """libnftables 1.0.6 reports success for `create table` with chains in its block, and makes none."""
    run = Nftables.run

    def forgetful(nftables: Nftables, text: str) -> str:
        return run(nftables, text.splitlines()[0] if text.startswith("create") else text)

    monkeypatch.setattr(Nftables, "run", forgetful)
    node0, *_ = network
    with inside(node0):
        assert "reported success, but" in refusal_of(NftablesChains(RUN))
    assert not has_table(node0)


def test_a_process_with_a_thousand_descriptors_is_refused_not_aborted(network: Network) -> None:
    node0, *_ = network

    def refusal() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 2048))
        while os.dup(0) < 1100:
            pass
        return refusal_of(NftablesChains(RUN))

    with inside(node0):
        assert "too many open" in in_child(refusal)


def test_a_failed_installation_leaves_no_descriptor(network: Network) -> None:
    node0, *_ = network
    before = open_descriptors()
    node0.run(["nft", f"add table inet {TABLE}"], check=True)
    with inside(node0):
        refusal_of(NftablesChains(RUN))
    assert open_descriptors() == before


def test_text_that_nft_refuses_changes_nothing_and_is_told_in_one_line(network: Network) -> None:
    node0, *_ = network
    with inside(node0):
        nftables = Nftables()
        with pytest.raises(NftablesError, match=r"^syntax error, unexpected [^\n]*$"):
            nftables.run("add table inet one\nadd bible inet two")
        nftables.close()
        with pytest.raises(NftablesError, match="closed"):
            nftables.run("list tables")
    assert not has_table(node0, "one")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def refusal_of(chains: NftablesChains) -> str:
    with pytest.raises(PortChainsUnavailable) as refused:
        chains.install(policy(), None)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_table_that_is_to_outlive_its_maker_is_whole_again_whatever_happened_to_it(node: Host) -> None:
    """Killed, flushed, or half deleted: it is found wanting, refilled in place, and removed by who did not make it."""
    with inside(node):
        before = node.snapshot()
        first = NftablesChains(RUN)
        first.begin(adopt=False, outlive=True)
        first.install(policy("10.77.0.2", "fd77::/64"), None)
        assert not nf_tables.table_has_owner(nf_tables.INET, TABLE)
        with pytest.raises(PortChainsUnavailable, match="exists already"):
            NftablesChains(RUN).begin(adopt=False, outlive=True)
        for harm in (
            ["flush", "ruleset"],
            ["flush", "chain", "inet", TABLE, "close"],
            ["delete", "table", "inet", TABLE],
        ):
            assert first.stand()
            subprocess.run(["nft", *harm], check=True)
            assert not first.stand()
            first.install(policy("10.77.0.3"), LOG_GROUP)
        whole = node.snapshot()
        second = NftablesChains(RUN)
        second.begin(adopt=True, outlive=True)
        second.install(policy("10.77.0.3"), LOG_GROUP)
        assert second.stand()
        assert node.snapshot() == whole
        NftablesChains(RUN).remove()
        NftablesChains(RUN).remove()
        assert node.snapshot() == before
