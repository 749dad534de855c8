"""The shield's programs on packets made by hand: BPF_PROG_TEST_RUN runs them in the kernel as they are loaded."""

from __future__ import annotations

import ipaddress
import itertools
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import kernel
import packets
import pytest
from cgroups import Cgroup, in_child, inside, new_cgroup
from hosts import Host, Network
from judging import Judge, judging
from packets import ACK, FRAGMENT, SYN, TCP, UDP, Flow
from programs import result_of

from securerun.errors import Obstacle, PolicyError
from securerun.firewall import refusals
from securerun.firewall.description import describe
from securerun.firewall.policy import Denial, Policy
from securerun.firewall.shield import Shield, adopt, attach_first_of
from securerun.firewall.shield_program import (
    HEADER_PROGRAM,
    SOCKET_PROGRAM,
    ShieldProgram,
)
from securerun.linux.assembler import Instruction, assemble
from securerun.linux.bpf import verifier_log
from securerun.linux.networks import collapse

SEES_SOCKETS = kernel.needing(kernel.SOCKETS_IN_PROGRAMS)
BY_SOCKET = pytest.param(SOCKET_PROGRAM, marks=SEES_SOCKETS, id=SOCKET_PROGRAM.name)
BY_HEADERS = pytest.param(HEADER_PROGRAM, id=HEADER_PROGRAM.name)
PROGRAMS = (BY_SOCKET, BY_HEADERS)
HERE4, HERE6 = ipaddress.ip_address("10.77.0.1"), ipaddress.ip_address("fd77::1")
PEER4, PEER6 = ipaddress.ip_address("10.77.0.2"), ipaddress.ip_address("fd77::2")
STRANGER4, STRANGER6 = ipaddress.ip_address("10.77.0.3"), ipaddress.ip_address("fd77::3")
FROM_PEER = (Flow(PEER4, HERE4), Flow(PEER6, HERE6))
FROM_STRANGER = (Flow(STRANGER4, HERE4), Flow(STRANGER6, HERE6))

# Linux before 5.2: BPF_MAXINSNS and BPF_COMPLEXITY_LIMIT_INSNS
OLD_MOST_INSTRUCTIONS = 4096
OLD_MOST_VERIFIED = 131072


@pytest.fixture(scope="module")
def host(root_and_tools: None) -> Iterator[Host]:
    """A host with an eth0: packets from no interface count as the loopback's."""
    with Network("node0") as network, inside(network["node0"]):
        yield network["node0"]


def policy(*peers: str, interfaces: Sequence[str] = ()) -> Policy:
    return Policy("0123456789ab", (), collapse(ipaddress.ip_network(peer) for peer in peers), tuple(interfaces))


@pytest.fixture
def judge(host: Host) -> Iterator[Judge]:
    with judging(HEADER_PROGRAM, policy(str(PEER4), str(PEER6))) as made:
        yield made


def syn(flow: Flow) -> bytes:
    return packets.tcp(flow, SYN)


# --- who is judged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_only_syn_without_ack_is_judged_of_all_256_flag_combinations(judge: Judge, family: int) -> None:
    for flags in range(256):
        opens = bool(flags & SYN) and not flags & ACK
        assert judge.passes(packets.packet(FROM_STRANGER[family], packets.tcp(FROM_STRANGER[family], flags))) != opens
        assert judge.passes(packets.packet(FROM_PEER[family], packets.tcp(FROM_PEER[family], flags)))
    assert judge.denials() == {(str(FROM_STRANGER[family].source), 29500, 64)}


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_every_port_is_closed_and_counted_by_its_number(judge: Judge, family: int) -> None:
    ports = (1, 22, 255, 256, 29500, 60000, 65535)
    for port in ports:
        flow = replace(FROM_STRANGER[family], destination_port=port)
        assert not judge.passes(packets.packet(flow, syn(flow)))
    assert judge.denials() == {(str(FROM_STRANGER[family].source), port, 1) for port in ports}


def test_the_loopback_passes_whoever_it_claims_to_be(host: Host) -> None:
    with judging(HEADER_PROGRAM, policy()) as nobody:
        for flow in FROM_STRANGER:
            assert result_of(nobody.program, packets.frame(packets.packet(flow, syn(flow))), 1) == 1
            assert result_of(nobody.program, packets.frame(packets.packet(flow, syn(flow))), nobody.interface) == 0


def test_without_peers_nobody_can_connect(host: Host) -> None:
    with judging(HEADER_PROGRAM, policy()) as nobody:
        for flow in (*FROM_PEER, *FROM_STRANGER):
            assert not nobody.passes(packets.packet(flow, syn(flow)))


def test_frames_that_are_not_ip_are_dropped(judge: Judge) -> None:
    arp = bytes(12) + packets.ETHERTYPE_ARP.to_bytes(2, "big") + bytes(46)
    assert not judge.passes_frame(arp)


@SEES_SOCKETS
def test_a_socket_that_does_not_listen_gets_everything(host: Host) -> None:
    # The socket of a test run is in no state.
    with judging(SOCKET_PROGRAM, policy()) as by_socket:
        for flow in FROM_STRANGER:
            assert by_socket.passes(packets.packet(flow, syn(flow)))
        assert by_socket.denials() == set()


# --- peers ------------------------------------------------------------------------------------------

NETWORKS = (
    *("10.0.0.0/8", "10.77.4.0/23", "10.77.0.128/25", "10.77.0.6/31", "10.77.0.9/32", "0.0.0.0/1"),
    *("fd00::/8", "fd77:1::/32", "fd77:0:0:0:8::/80", "fd77::8/125", "fd77::9/128", "::/1"),
)


@pytest.mark.parametrize("written", NETWORKS)
def test_the_first_and_last_address_of_a_network_are_in_and_their_neighbours_out(host: Host, written: str) -> None:
    network = ipaddress.ip_network(written)
    here = HERE4 if network.version == 4 else HERE6
    last_of_all = 2**network.max_prefixlen - 1
    first, last = int(network[0]), int(network[-1])
    with judging(HEADER_PROGRAM, policy(written)) as judge:
        for number, allowed in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
            if not 0 <= number <= last_of_all:
                continue
            flow = Flow(type(here)(number), here)
            assert judge.passes(packets.packet(flow, syn(flow))) == allowed, flow.source


def test_everybody_of_one_family_is_nobody_of_the_other(host: Host) -> None:
    for everybody, expected in (("0.0.0.0/0", [True, False]), ("::/0", [False, True])):
        with judging(HEADER_PROGRAM, policy(everybody)) as judge:
            assert [judge.passes(packets.packet(flow, syn(flow))) for flow in FROM_STRANGER] == expected


def test_an_ipv4_peer_written_as_ipv6_is_the_ipv4_peer(host: Host) -> None:
    with judging(HEADER_PROGRAM, policy(f"::ffff:{PEER4}/128")) as judge:
        assert judge.passes(packets.packet(FROM_PEER[0], syn(FROM_PEER[0])))
        mapped = Flow(ipaddress.ip_address(f"::ffff:{PEER4}"), HERE6)
        assert not judge.passes(packets.packet(mapped, syn(mapped)))


def test_peers_are_replaced_while_the_shield_hangs(judge: Judge) -> None:
    judge.shield.replace_peers(collapse([ipaddress.ip_network("10.77.0.3/32"), ipaddress.ip_network("fd77::2/127")]))
    passing = [judge.passes(packets.packet(flow, syn(flow))) for flow in (*FROM_PEER, *FROM_STRANGER)]
    assert passing == [False, True, True, True]
    judge.shield.replace_peers(())
    assert not any(judge.passes(packets.packet(flow, syn(flow))) for flow in (*FROM_PEER, *FROM_STRANGER))


def test_more_peers_than_there_is_room_for_change_nothing(judge: Judge) -> None:
    # Every other address, so that they do not collapse.
    many = [ipaddress.ip_network((0x0A000000 + 2 * number, 32)) for number in range(3000)]
    with pytest.raises(refusals.ShieldUnavailable, match="start the job again") as refused:
        judge.shield.replace_peers(many)
    assert refused.value.obstacle is Obstacle.FULL
    passing = [judge.passes(packets.packet(flow, syn(flow))) for flow in (*FROM_PEER, *FROM_STRANGER)]
    assert passing == [True, True, False, False]


def test_ten_thousand_peers_are_ten_thousand_peers(host: Host) -> None:
    many = [f"10.{number // 128}.{2 * (number % 128)}.0/24" for number in range(10000)]
    with judging(HEADER_PROGRAM, policy(*many)) as judge:
        for second in (0, 1, 77, 78):
            for third in range(256):
                flow = Flow(ipaddress.ip_address(f"10.{second}.{third}.5"), HERE4)
                assert judge.passes(packets.packet(flow, syn(flow))) == (
                    third % 2 == 0 and second <= 78 and (second < 78 or third < 32)
                )


# --- interfaces -------------------------------------------------------------------------------------


def test_a_peer_gets_in_through_the_named_interfaces_only(host: Host) -> None:
    subprocess.run(["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth2"], check=True)
    try:
        with judging(HEADER_PROGRAM, policy(str(PEER4), str(PEER6), interfaces=("eth1",))) as judge:
            for flow in FROM_PEER:
                frame = packets.frame(packets.packet(flow, syn(flow)))
                assert result_of(judge.program, frame, socket.if_nametoindex("eth1")) == 1
                assert result_of(judge.program, frame, socket.if_nametoindex("eth0")) == 0
            for flow in FROM_STRANGER:
                frame = packets.frame(packets.packet(flow, syn(flow)))
                assert result_of(judge.program, frame, socket.if_nametoindex("eth1")) == 0
            assert {(source, packets) for source, _, packets in judge.denials()} == {
                (str(flow.source), 1) for flow in (*FROM_PEER, *FROM_STRANGER)
            }
    finally:
        subprocess.run(["ip", "link", "delete", "eth1"], check=True)


def test_the_shield_follows_the_names_of_interfaces_to_other_numbers(host: Host) -> None:
    """Of its own and, as the guard does that takes over, of one that is found."""
    names = ("made", "missing")
    pair = "type veth peer name of"
    links = (f"link add missing {pair}1", f"link add made index 700 {pair}2")
    again = ("link delete made", f"link add other index 700 {pair}3", f"link add made index 701 {pair}4")
    gone = ("link delete made", "link delete missing", "link delete other")
    with new_cgroup() as cgroup:
        for words in links:
            subprocess.run(["ip", *words.split()], check=True)
        hung_up = attach_first_of((HEADER_PROGRAM,), cgroup.descriptor, policy(str(PEER4), interfaces=names))
        missing = socket.if_nametoindex("missing")
        assert not hung_up.follow_interfaces(names)
        assert keys_of(hung_up) == {700, missing}
        for words in again:
            subprocess.run(["ip", *words.split()], check=True)
        assert hung_up.follow_interfaces(names)
        assert not hung_up.follow_interfaces(names)
        assert keys_of(hung_up) == {701, missing}
        hung_up.close()
        found = adopt(cgroup.descriptor)
        assert not found.follow_interfaces(names)
        for words in gone:
            subprocess.run(["ip", *words.split()], check=True)
        assert found.follow_interfaces(names)
        assert keys_of(found) == set()
        found.detach()
        found.close()


def keys_of(hung_up: Shield) -> set[int]:
    """The numbers of the interfaces through which peers come in."""
    assert hung_up._interfaces is not None
    return {int.from_bytes(key, sys.byteorder) for key, _ in hung_up._interfaces.items()}


def test_an_interface_that_is_not_there_is_a_policy_that_cannot_be_right(host: Host) -> None:
    with new_cgroup() as cgroup, pytest.raises(PolicyError, match="no network interface 'eth9'"):
        Shield.attach(cgroup.descriptor, policy(interfaces=("eth9",)))


# --- what can stand before the TCP header -----------------------------------------------------------


@pytest.mark.parametrize("length", range(0, 41, 4))
def test_ipv4_options_hide_no_opening_packet(judge: Judge, length: int) -> None:
    options = b"\x01" * length
    assert not judge.passes(packets.ipv4(FROM_STRANGER[0], syn(FROM_STRANGER[0]), options=options))
    assert judge.passes(packets.ipv4(FROM_PEER[0], syn(FROM_PEER[0]), options=options))
    assert judge.passes(packets.ipv4(FROM_STRANGER[0], packets.tcp(FROM_STRANGER[0], ACK), options=options))
    assert judge.denials() == {(str(STRANGER4), 29500, 1)}


def test_an_ipv4_header_that_says_it_is_shorter_than_it_can_be_is_dropped(judge: Judge) -> None:
    for words in range(5):
        content = bytearray(packets.ipv4(FROM_PEER[0], syn(FROM_PEER[0])))
        content[0] = 0x40 | words
        assert not judge.passes_frame(bytes(12) + b"\x08\x00" + bytes(content)), words


CHAINS = (
    *((kind,) for kind in packets.EXTENSION_HEADERS),
    *itertools.product(packets.EXTENSION_HEADERS, repeat=2),
    *((kind,) * number for kind in packets.EXTENSION_HEADERS for number in range(3, 9)),
    packets.EXTENSION_HEADERS,
    tuple(reversed(packets.EXTENSION_HEADERS)),
)


def test_ipv6_extension_headers_up_to_eight_hide_no_opening_packet(judge: Judge) -> None:
    stranger, peer = FROM_STRANGER[1], FROM_PEER[1]
    for chain in CHAINS:
        assert not judge.passes(packets.ipv6(stranger, syn(stranger), extensions=chain)), chain
        assert judge.passes(packets.ipv6(stranger, packets.tcp(stranger, ACK), extensions=chain)), chain
        assert judge.passes(packets.ipv6(peer, syn(peer), extensions=chain)), chain
        assert judge.passes(packets.ipv6(stranger, bytes(20), extensions=chain, protocol=UDP)), chain
    assert judge.denials() == {(str(STRANGER6), 29500, len(CHAINS))}


def test_nine_extension_headers_are_dropped_whoever_sends_them(judge: Judge) -> None:
    for kind in packets.EXTENSION_HEADERS:
        for flow in (FROM_STRANGER[1], FROM_PEER[1]):
            for flags in (SYN, ACK):
                assert not judge.passes(packets.ipv6(flow, packets.tcp(flow, flags), extensions=(kind,) * 9))
    assert {port for _, port, _ in judge.denials()} == {0}


def test_later_fragments_are_dropped_and_first_ones_judged(judge: Judge) -> None:
    more = 0x2000
    for flow, allowed in ((FROM_STRANGER[0], False), (FROM_PEER[0], True)):
        assert judge.passes(packets.ipv4(flow, syn(flow), fragment=more)) == allowed
        for offset in (1, 2, 0x100, 0x1FFF):
            assert not judge.passes(packets.ipv4(flow, syn(flow), fragment=offset))
            assert not judge.passes(packets.ipv4(flow, syn(flow), fragment=more | offset))
    for flow, allowed in ((FROM_STRANGER[1], False), (FROM_PEER[1], True)):
        assert judge.passes(packets.ipv6(flow, syn(flow), extensions=(FRAGMENT,))) == allowed
        for offset in (1, 2, 0x100, 0x1FFF):
            assert not judge.passes(packets.ipv6(flow, syn(flow), extensions=(FRAGMENT,), fragment=offset << 3))


def test_of_all_ipv4_protocols_only_tcp_is_judged(judge: Judge) -> None:
    for protocol in range(256):
        passes = judge.passes(packets.ipv4(FROM_STRANGER[0], syn(FROM_STRANGER[0]), protocol=protocol))
        assert passes == (protocol != TCP), protocol


def test_of_all_ipv6_next_headers_only_transports_that_are_not_tcp_pass(judge: Judge) -> None:
    # What follows is read as an extension header where there is one of that kind; it then leads nowhere.
    flow = FROM_STRANGER[1]
    for protocol in range(256):
        passes = judge.passes(packets.ipv6(flow, syn(flow) + bytes(20), protocol=protocol))
        assert passes == (protocol in {17, 33, 58, 132, 136}), protocol


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_a_packet_that_ends_too_early_never_passes(judge: Judge, family: int) -> None:
    judged = 0
    for flow in (FROM_PEER[family], FROM_STRANGER[family]):
        whole = packets.packet(flow, syn(flow))
        if family:
            whole = packets.ipv6(flow, syn(flow), extensions=packets.EXTENSION_HEADERS)
        for length in range(len(whole)):
            try:
                assert not judge.passes(whole[:length] or b"\x40"), length
                judged += 1
            except OSError:
                continue  # shorter than the kernel accepts for a test run
    assert judged > 2 * 19


# --- counters ---------------------------------------------------------------------------------------


def test_denials_come_with_the_most_packets_first(judge: Judge) -> None:
    for flow, times in (
        (FROM_STRANGER[0], 2),
        (FROM_STRANGER[1], 5),
        (replace(FROM_STRANGER[0], destination_port=7), 3),
    ):
        for _ in range(times):
            judge.passes(packets.packet(flow, syn(flow)))
    assert judge.shield.denied() == (
        Denial(STRANGER6, 29500, 5),
        Denial(STRANGER4, 7, 3),
        Denial(STRANGER4, 29500, 2),
    )


def test_a_flood_of_invented_sources_is_counted_in_bounded_room(judge: Judge) -> None:
    for number in range(6000):
        flow = Flow(ipaddress.IPv4Address(0x0B000000 + number), HERE4)
        assert not judge.passes(packets.packet(flow, syn(flow)))
    assert 0 < len(judge.shield.denied()) <= 4096
    assert judge.passes(packets.packet(FROM_PEER[0], syn(FROM_PEER[0])))


# --- the programs themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_fit_old_kernels(host: Host, program: ShieldProgram) -> None:
    names = ("eth0",)
    statements = program.build(names)
    assert sum(each.slots for each in statements if isinstance(each, Instruction)) < OLD_MOST_INSTRUCTIONS
    with new_cgroup() as cgroup, new_maps(cgroup, program) as symbols:
        log = verifier_log("measured", assemble(statements, symbols))
    (line,) = (line for line in log.splitlines() if line.startswith("processed"))
    assert int(line.split()[1]) < OLD_MOST_VERIFIED


@contextmanager
def new_maps(cgroup: Cgroup, program: ShieldProgram) -> Iterator[dict[str, int]]:
    hung_up = attach_first_of((program,), cgroup.descriptor, policy(interfaces=("eth0",)))
    maps = (hung_up._peers4, hung_up._peers6, hung_up._denied, hung_up._interfaces)
    yield {each.shape.name: each.fileno() for each in maps if each is not None}
    hung_up.close()


def test_the_program_for_old_kernels_uses_nothing_that_they_lack() -> None:
    for statement in HEADER_PROGRAM.build(("eth0",)):
        if not isinstance(statement, Instruction):
            continue
        jumps = statement.opcode & 0x07 == 0x05
        assert statement.opcode & 0x07 != 0x06, f"{statement}: 32-bit jumps came with Linux 5.1"
        assert not jumps or statement.target or statement.opcode in (0x85, 0x95)
    code = assemble(HEADER_PROGRAM.build(()), {"peers4": 0, "peers6": 0, "denied": 0})
    offsets = [struct.unpack("<BBhi", code[at : at + 8]) for at in range(0, len(code), 8)]
    assert all(offset >= 0 for opcode, _, offset, _ in offsets if opcode & 0x07 == 0x05), "loops came with Linux 5.3"


@kernel.needing(kernel.CAP_BPF)
@pytest.mark.parametrize("program", (*PROGRAMS, pytest.param(None, marks=kernel.needing(kernel.TAGS), id="loopback")))
def test_the_shield_needs_cap_bpf_and_cap_net_admin_and_no_more(host: Host, program: ShieldProgram | None) -> None:
    """With all that a policy can have in it: a verifier that lacks CAP_PERFMON is stricter (5.10 to 6.7).

    The program that writes tags takes a kernel with d75e30dddf73, or more than that.
    """
    script = (
        "import ipaddress, os, sys\n"
        "from securerun.firewall import refusals, selftest, shield\n"
        "from securerun.firewall.policy import Opening, Policy, PortRange, Purpose\n"
        "from securerun.firewall.shield_program import PROGRAMS\n"
        "assert [line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')] == [sys.argv[3]]\n"
        "cgroup = os.open(sys.argv[1], os.O_RDONLY)\n"
        "peers = (ipaddress.ip_network('10.0.0.0/8'), ipaddress.ip_network('fd00::/8'))\n"
        "programs = [each for each in PROGRAMS if each.name == sys.argv[2]]\n"
        "public = (Opening(8080, 8090, peers), Opening(9090, 9090, peers[:1]), Opening(9100, 9100, ()))\n"
        "ports = tuple(PortRange(one.first, one.last, Purpose.PUBLIC) for one in public[:2])\n"
        "of = Policy('0123456789ab', ports, peers, ('eth0',), close_loopback=not programs, public=public)\n"
        "try:\n"
        "    attach = shield.attach_first_of if programs else lambda _, *words: shield.Shield.attach(*words)\n"
        "    held = attach(programs, cgroup, of)\n"
        "except refusals.ShieldUnavailable as error:\n"
        "    print('unavailable:', error)\n"
        "else:\n"
        "    held.replace_peers(peers[:1])\n"
        "    assert held.denied() == ()\n"
        "    shield.refuse_conflicts([cgroup], tags=True)\n"
        "    assert selftest.prove(cgroup)\n"
        "    held.detach()\n"
        "    print('hung up')\n"
    )
    net_admin, sys_admin, bpf = 12, 21, 39
    lacks_sight = program is None and kernel.lack_of(kernel.PACKETS_FOR_CAP_BPF)
    for capabilities, expected in (
        ((net_admin, bpf), "CAP_PERFMON or CAP_SYS_ADMIN" if lacks_sight else "hung up"),
        ((net_admin, sys_admin, bpf), "hung up"),
        ((net_admin,), "CAP_BPF"),
        ((bpf,), "unavailable"),
    ):
        with new_cgroup() as cgroup:
            kept = ",".join(["-all", *(f"+cap_{number}" for number in capabilities)])
            mask = f"{sum(1 << number for number in capabilities):016x}"
            command = ["setpriv", f"--bounding-set={kept}", "--inh-caps=-all", "--", sys.executable, "-c", script]
            command += [str(cgroup.path), program.name if program else "", mask]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert expected in done.stdout, done.stdout + done.stderr


def test_without_any_privilege_the_reason_names_what_is_missing(host: Host) -> None:
    with new_cgroup() as cgroup:

        def work() -> str:
            os.setgroups([])
            os.setresuid(65534, 65534, 65534)
            with pytest.raises(refusals.ShieldUnavailable) as caught:
                Shield.attach(cgroup.descriptor, policy())
            assert caught.value.obstacle is Obstacle.NOT_PERMITTED
            return str(caught.value)

        reason = in_child(work)
    assert "CAP_NET_ADMIN and CAP_BPF" in reason
    assert "\n" not in reason


def test_a_dry_run_shows_peers_interfaces_and_the_program_to_anybody() -> None:
    shown = describe(policy("10.77.0.0/24", "fd77::/64", interfaces=("eth0", "eth7")))
    assert "may connect: 10.77.0.0/24 fd77::/64" in shown
    assert "through: eth0 eth7" in shown
    assert "r1 = map[peers4]" in shown
    assert "r1 = map[interfaces]" in shown
    assert "no other host" in describe(policy())
    assert "any interface" in describe(policy())


def test_the_shield_is_imported_without_the_heavy_modules() -> None:
    script = "import sys, securerun.firewall.shield; print({'torch', 'typer', 'psutil'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "set()"
