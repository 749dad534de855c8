"""Public ports in the shield's programs: who passes by port and source, and what that costs on any kernel."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import replace

import kernel
import packets
import pytest
from cgroups import inside, new_cgroup
from hosts import Host, Network
from judging import Judge, judging
from packets import ACK, SYN, Flow

from securerun.firewall.description import describe
from securerun.firewall.policy import MOST_OPENINGS, MOST_PUBLIC_NETWORKS, Opening, Policy, PortRange, Purpose
from securerun.firewall.shield import Shield, adopt, attach_first_of
from securerun.firewall.shield_maps import map_shapes, public_shape
from securerun.firewall.shield_program import HEADER_PROGRAM, PROGRAMS, ShieldProgram
from securerun.linux.assembler import Instruction, assemble
from securerun.linux.bpf import Map, verifier_log
from securerun.linux.networks import collapse

HERE4, HERE6 = ipaddress.ip_address("10.77.0.1"), ipaddress.ip_address("fd77::1")
# Linux before 5.2: BPF_MAXINSNS and BPF_COMPLEXITY_LIMIT_INSNS
OLD_MOST_INSTRUCTIONS, OLD_MOST_VERIFIED = 4096, 131072
OF_THIS_KERNEL = [
    pytest.param(
        program,
        id=program.name,
        marks=[] if program is HEADER_PROGRAM else kernel.needing(kernel.SOCKETS_IN_PROGRAMS),
    )
    for program in PROGRAMS
]


@pytest.fixture(scope="module")
def host(root_and_tools: None) -> Iterator[Host]:
    """A host with an eth0: packets from no interface count as the loopback's."""
    with Network("node0") as network, inside(network["node0"]):
        yield network["node0"]


def opening(first: int, last: int, *networks: str) -> Opening:
    return Opening(first, last, collapse(ipaddress.ip_network(network) for network in networks))


def policy(*public: Opening, peers: tuple[str, ...] = (), close_loopback: bool = False) -> Policy:
    ports = tuple(PortRange(one.first, one.last, Purpose.PUBLIC) for one in public if not one.is_for_all)
    networks = collapse(ipaddress.ip_network(peer) for peer in peers)
    return Policy("0123456789ab", ports, networks, ("eth0",), close_loopback=close_loopback, public=public)


def largest() -> Policy:
    """As many public ports as may be, each with networks of its own."""
    assert MOST_OPENINGS == MOST_PUBLIC_NETWORKS
    return policy(*(opening(1000 + 4 * n, 1001 + 4 * n, f"10.{n}.0.0/16") for n in range(MOST_OPENINGS)))


def passes(judge: Judge, source: str, port: int, flags: int = SYN) -> bool:
    address = ipaddress.ip_address(source)
    flow = Flow(address, HERE4 if address.version == 4 else HERE6, destination_port=port)
    return judge.passes(packets.packet(flow, packets.tcp(flow, flags)))


def test_each_public_port_is_open_to_its_own_networks_and_no_port_beside_it(host: Host) -> None:
    public = (
        opening(1, 1),
        opening(8080, 8090, "10.9.0.0/16", "10.10.1.1/32", "fd09::/32"),
        opening(9090, 9090, "10.10.0.0/16"),
        opening(9100, 9100),
        opening(9101, 9101, "::/0"),
        opening(65535, 65535, "0.0.0.0/0"),
    )
    open_to = {
        "10.9.255.255": {1, 8080, 8085, 8090, 9100, 65535},
        "10.10.1.1": {1, 8080, 8085, 8090, 9090, 9100, 65535},
        "10.10.1.2": {1, 9090, 9100, 65535},
        "10.8.255.255": {1, 9100, 65535},
        "fd09::1": {1, 8080, 8085, 8090, 9100, 9101},
        "fd0a::1": {1, 9100, 9101},
        # Its first bytes are those of 10.9.0.0/16.
        "0a09::1": {1, 9100, 9101},
    }
    ports = {1, 2, 8079, 8080, 8085, 8090, 8091, 9089, 9090, 9091, 9099, 9100, 9101, 9102, 65534, 65535}
    with judging(HEADER_PROGRAM, policy(*public)) as judge:
        for source, expected in open_to.items():
            assert {port for port in ports if passes(judge, source, port)} == expected, source
        refused = {(source, port, 1) for source, expected in open_to.items() for port in ports - expected}
        assert {(source, port, packets) for source, port, packets in judge.denials()} == {
            (str(ipaddress.ip_address(source)), port, packets) for source, port, packets in refused
        }


def test_peers_keep_every_port_and_public_ports_need_none_of_their_interfaces(host: Host) -> None:
    of = policy(opening(8080, 8080, "10.9.0.0/16"), peers=("10.77.0.2",))
    with judging(HEADER_PROGRAM, of) as judge:
        assert passes(judge, "10.77.0.2", 8080) and passes(judge, "10.77.0.2", 29500)
        assert passes(judge, "10.9.0.1", 8080) and not passes(judge, "10.9.0.1", 29500)
        assert passes(judge, "10.1.0.1", 29500, SYN | ACK)
        judge.shield.follow_interfaces(())
        assert not passes(judge, "10.77.0.2", 8080)
        assert passes(judge, "10.9.0.1", 8080)


def test_public_ports_stay_when_the_shield_is_taken_over_and_has_other_peers(host: Host) -> None:
    of = policy(opening(8080, 8080, "10.9.0.0/16"), opening(9100, 9100))
    with new_cgroup() as cgroup:
        attach_first_of((HEADER_PROGRAM,), cgroup.descriptor, of).close()
        adopted = adopt(cgroup.descriptor)
        adopted.replace_peers(collapse([ipaddress.ip_network("10.77.0.0/24")]))
        judge = Judge(adopted, adopted._program, 2)
        assert passes(judge, "10.9.0.1", 8080) and passes(judge, "10.1.0.1", 9100) and passes(judge, "10.77.0.2", 1)
        assert not passes(judge, "10.1.0.1", 8080) and not passes(judge, "10.9.0.1", 29500)
        adopted.close()


@pytest.mark.parametrize("program", OF_THIS_KERNEL)
def test_the_most_public_ports_fit_old_kernels(root: None, program: ShieldProgram) -> None:
    of = largest()
    statements = program.build(of.interfaces, of.public)
    instructions = [each for each in statements if isinstance(each, Instruction)]
    assert sum(each.slots for each in instructions) < OLD_MOST_INSTRUCTIONS
    assert all(each.opcode & 0x07 != 0x06 for each in instructions), "32-bit jumps came with Linux 5.1"
    shape = public_shape(of.public)
    assert shape is not None
    with contextlib.ExitStack() as stack:
        shapes = (*map_shapes(of), shape)
        maps = [stack.enter_context(Map.create(shape)) for shape in shapes]
        log = verifier_log("measured", assemble(statements, {each.shape.name: each.fileno() for each in maps}))
    (line,) = (line for line in log.splitlines() if line.startswith("processed"))
    assert int(line.split()[1]) < OLD_MOST_VERIFIED


@pytest.mark.parametrize("program", OF_THIS_KERNEL)
def test_the_shield_with_the_most_public_ports_is_hung_up(host: Host, program: ShieldProgram) -> None:
    with new_cgroup() as cgroup:
        attach_first_of((program,), cgroup.descriptor, largest()).close()


@kernel.needing(kernel.TAGS)
def test_the_shield_with_the_most_public_ports_is_hung_up_with_tags_too(host: Host) -> None:
    with new_cgroup() as cgroup:
        Shield.attach(cgroup.descriptor, replace(largest(), close_loopback=True)).close()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_without_public_ports_a_program_has_not_one_instruction_for_them(program: ShieldProgram) -> None:
    assert program.build(("eth0",)) == program.build(("eth0",), ())
    shown = [str(statement) for statement in program.build(("eth0",))]
    assert not any("public" in line for line in shown)


def test_a_dry_run_shows_public_ports_to_anybody() -> None:
    shown = describe(policy(opening(8080, 8090, "10.9.0.0/16", "fd09::/32"), opening(9100, 9100)))
    assert "port 8080-8090, through any interface: 10.9.0.0/16 fd09::/32" in shown
    assert "port 9100, through any interface: every host" in shown
    assert "r1 = map[public]" in shown
    assert "public" not in describe(policy())
