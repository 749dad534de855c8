"""The shield between real hosts: node0 runs the job, node1 is its peer, the stranger is nobody's."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import kernel
import packets
import pytest
from cgroups import Cgroup, cgroup_of_version_1, in_child, inside, leave_for_a_new_network, new_cgroup, socket_made_in
from hosts import Host, Network, cgroup2_mount, eventually, is_alive
from packets import ACK, CWR, ECE, FRAGMENT, HOP_BY_HOP, OPTIONS, PSH, ROUTING, SYN, URG, Flow
from shield_field import EGRESS, FAMILIES, INGRESS, PATIENCE_SECONDS, ShieldField, field_of, port_of

from securerun.errors import Obstacle
from securerun.firewall import selftest
from securerun.firewall.policy import Denial, Policy
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.selftest import egress_is_filtered, prove
from securerun.firewall.shield import Shield, adopt, attach_first_of, refuse_conflicts
from securerun.firewall.shield_program import HEADER_PROGRAM, SOCKET_PROGRAM, ShieldProgram
from securerun.linux import net_cgroups
from securerun.linux.assembler import R0, assemble, calculate, leave
from securerun.linux.bpf import AttachFlags, Program, attached
from securerun.linux.networks import collapse

SEES_SOCKETS = kernel.needing(kernel.SOCKETS_IN_PROGRAMS)
BY_SOCKET = pytest.param(SOCKET_PROGRAM, marks=SEES_SOCKETS, id=SOCKET_PROGRAM.name)
BY_HEADERS = pytest.param(HEADER_PROGRAM, id=HEADER_PROGRAM.name)
PROGRAMS = pytest.mark.parametrize("program", [BY_SOCKET, BY_HEADERS])

_TCP_FASTOPEN = 23


@dataclass(frozen=True)
class Field(ShieldField):
    """Where node1 alone is a peer of the job's."""

    @property
    def policy(self) -> Policy:
        return Policy("0123456789ab", (), collapse(ipaddress.ip_network(address) for address in self.peer.addresses))

    def listener(self, cgroup: Cgroup, leave_to: Path | None = None) -> socket.socket:
        """Listens on every address of the host, IPv4 and IPv6, as torch's stores do."""
        return socket_made_in(cgroup, lambda: listening(self.host, socket.AF_INET6, dual=True), leave_to)


@pytest.fixture
def field(network: Network) -> Iterator[Field]:
    with field_of(Field, network) as made:
        yield made


@contextlib.contextmanager
def shielded(field: Field, *programs: ShieldProgram) -> Iterator[Shield]:
    held = attach_first_of(programs, field.job.descriptor, field.policy) if programs else attach(field)
    try:
        yield held
    finally:
        held.detach()
        held.close()


def attach(field: Field) -> Shield:
    return Shield.attach(field.job.descriptor, field.policy)


def listening(host: Host, family: int, *, dual: bool) -> socket.socket:
    with inside(host):
        made = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
    made.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN, 16)
    made.bind(("", 0))
    made.listen(64)
    return made


def dial(origin: Host, address: str, port: int) -> socket.socket:
    with inside(origin):
        endpoint = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    endpoint.settimeout(PATIENCE_SECONDS)
    try:
        endpoint.connect((address, port))
    except BaseException:
        endpoint.close()
        raise
    return endpoint


def attempt(origin: Host, address: str, listener: socket.socket) -> str:
    """How a connection from there ends: connected, refused or timeout."""
    try:
        dial(origin, address, port_of(listener)).close()
    except socket.timeout:
        return "timeout"
    except ConnectionRefusedError:
        return "refused"
    return "connected"


def attempts(origin: Host, field: Field, listener: socket.socket) -> list[str]:
    """The same over IPv4 and over IPv6."""
    with ThreadPoolExecutor(2) as at_once:
        return list(at_once.map(lambda address: attempt(origin, address, listener), field.host.addresses))


NOT_AT_ALL = ["timeout", "timeout"]
OVER_BOTH = ["connected", "connected"]


# --- strangers and peers ----------------------------------------------------------------------------


@PROGRAMS
@pytest.mark.parametrize("kind", ["ipv4", "ipv6", "dual-stack"])
def test_only_peers_and_the_host_itself_can_open_a_connection_to_a_listener_of_the_job(
    field: Field, program: ShieldProgram, kind: str
) -> None:
    def make() -> socket.socket:
        family = socket.AF_INET if kind == "ipv4" else socket.AF_INET6
        return listening(field.host, family, dual=kind == "dual-stack")

    addresses = [field.host.ipv4] * (kind != "ipv6") + [field.host.ipv6] * (kind != "ipv4")
    loopbacks = ["127.0.0.1"] * (kind != "ipv6") + ["::1"] * (kind != "ipv4")
    with socket_made_in(field.job, make) as of_the_job, socket_made_in(field.elsewhere, make) as control:
        with shielded(field, program) as held:
            assert held.name == program.name
            for address in addresses:
                assert attempt(field.stranger, address, of_the_job) == "timeout"
                assert attempt(field.stranger, address, control) == "connected"
                assert attempt(field.peer, address, of_the_job) == "connected"
            for address in (*loopbacks, *addresses):
                assert attempt(field.host, address, of_the_job) == "connected"
        for address in addresses:
            assert attempt(field.stranger, address, of_the_job) == "connected"


@SEES_SOCKETS
def test_this_kernel_gets_the_program_that_judges_sockets(field: Field) -> None:
    with shielded(field) as held:
        assert held.name == "socket"


@PROGRAMS
def test_who_was_turned_away_is_told_with_port_and_number(field: Field, program: ShieldProgram) -> None:
    with shielded(field, program) as held, field.listener(field.job) as of_the_job:
        assert held.denied() == ()
        flows = flows_between(field.stranger, field.host, port_of(of_the_job))
        with wire(field.stranger) as stranger:
            to = address_on_wire(field.host)
            for flow, times in zip(flows, (3, 2)):
                for _ in range(times):
                    stranger.send(sent_by(stranger, to, packets.packet(flow, packets.tcp(flow, SYN))))
        assert eventually(lambda: sum(denial.packets for denial in held.denied()) == 5, seconds=2)
        assert held.denied() == tuple(
            Denial(flow.source, port_of(of_the_job), times) for flow, times in zip(flows, (3, 2))
        )


@PROGRAMS
def test_connections_that_the_job_opens_to_a_stranger_carry_data_both_ways(
    field: Field, program: ShieldProgram
) -> None:
    for family, address in ((socket.AF_INET, field.stranger.ipv4), (socket.AF_INET6, field.stranger.ipv6)):
        with shielded(field, program), listening(field.stranger, family, dual=False) as listener:
            port = port_of(listener)
            with socket_made_in(field.job, lambda: dial(field.host, address, port)) as near:  # noqa: B023
                far, _ = listener.accept()
                with far:
                    assert_carries_data(near, far)


def test_an_established_connection_outlives_the_peer_that_is_taken_out(field: Field) -> None:
    with shielded(field) as held, field.listener(field.job) as of_the_job:
        for address in field.host.addresses:
            with dial(field.peer, address, port_of(of_the_job)) as near, of_the_job.accept()[0] as far:
                held.replace_peers(())
                assert attempt(field.peer, address, of_the_job) == "timeout"
                assert_carries_data(near, far)
                held.replace_peers(field.policy.peers)
                assert attempt(field.peer, address, of_the_job) == "connected"
                of_the_job.accept()[0].close()


def assert_carries_data(near: socket.socket, far: socket.socket) -> None:
    for one, other in ((near, far), (far, near)):
        one.settimeout(5)
        other.settimeout(5)
        one.sendall(b"x" * 100_000)
        received = 0
        while received < 100_000:
            received += len(other.recv(65536))


def test_a_peer_gets_in_through_the_named_interfaces_only(field: Field) -> None:
    for interface, expected in (("eth0", OVER_BOTH), ("lo", NOT_AT_ALL)):
        with inside(field.host):
            held = Shield.attach(field.job.descriptor, replace(field.policy, interfaces=(interface,)))
        with field.listener(field.job) as of_the_job:
            assert attempts(field.peer, field, of_the_job) == expected
            assert attempts(field.stranger, field, of_the_job) == NOT_AT_ALL
        held.detach()
        held.close()


# --- sockets that move, stay behind or lose their maker ------------------------------------------------


def test_a_listener_stays_closed_when_its_process_has_left_the_job(field: Field) -> None:
    with shielded(field), field.listener(field.job, leave_to=cgroup2_mount()) as of_the_job:
        assert attempts(field.stranger, field, of_the_job) == NOT_AT_ALL
        assert attempts(field.peer, field, of_the_job) == OVER_BOTH


def test_a_listener_from_before_the_shield_is_closed(field: Field) -> None:
    with field.listener(field.job) as of_the_job:
        assert attempts(field.stranger, field, of_the_job) == OVER_BOTH
        with shielded(field):
            assert attempts(field.stranger, field, of_the_job) == NOT_AT_ALL


def test_a_listener_in_a_cgroup_below_the_jobs_is_closed(field: Field) -> None:
    with shielded(field), new_cgroup(field.job) as below, field.listener(below) as of_the_job:
        assert attempts(field.stranger, field, of_the_job) == NOT_AT_ALL
        assert attempts(field.peer, field, of_the_job) == OVER_BOTH


def test_an_orphaned_listener_stays_closed_when_the_cgroup_is_removed(field: Field) -> None:
    held = attach(field)
    with field.listener(field.job) as of_the_job:
        field.job.path.rmdir()
        held.detach()
        held.close()
        assert attempts(field.stranger, field, of_the_job) == NOT_AT_ALL
        assert attempts(field.peer, field, of_the_job) == OVER_BOTH


def test_the_shield_outlives_the_sigkill_of_who_hung_it_up_and_is_adopted(field: Field) -> None:
    hang_up_and_die(field)
    with field.listener(field.job) as of_the_job:
        assert attempts(field.stranger, field, of_the_job) == NOT_AT_ALL
        assert attempts(field.peer, field, of_the_job) == OVER_BOTH
        adopted = adopt(field.job.descriptor)
        assert adopted.name == ("header" if kernel.lack_of(kernel.SOCKETS_IN_PROGRAMS) else "socket")
        assert {str(denial.source) for denial in adopted.denied()} == set(field.stranger.addresses)
        adopted.replace_peers(collapse(ipaddress.ip_network(address) for address in field.stranger.addresses))
        assert attempts(field.stranger, field, of_the_job) == OVER_BOTH
        assert attempts(field.peer, field, of_the_job) == NOT_AT_ALL
        adopted.detach()
        adopted.close()
        assert attempts(field.peer, field, of_the_job) == OVER_BOTH
    with pytest.raises(ShieldUnavailable, match="no shield hangs") as refused:
        adopt(field.job.descriptor)
    assert refused.value.obstacle is Obstacle.NOTHING_THERE


def hang_up_and_die(field: Field) -> None:
    child = os.fork()
    if not child:
        try:
            attach(field)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_adopting_takes_off_the_self_test_that_a_guard_died_in_and_nothing_of_others(field: Field) -> None:
    hang_up_and_die(field)
    cgroup = field.job.descriptor
    forbid = assemble((calculate(R0, "=", 0), leave()), {})
    with Program.load("securerun_probe", forbid) as probe, Program.load("somebody_else", forbid) as foreign:
        foreign.attach(cgroup, EGRESS, AttachFlags.ALLOW_MULTI)
        others = attached(cgroup, EGRESS).program_ids
        probe.attach(cgroup, EGRESS, AttachFlags.ALLOW_MULTI)
        adopt(cgroup).close()
        assert attached(cgroup, EGRESS).program_ids == others


def test_taking_the_shield_off_twice_or_after_its_cgroup_is_no_error(field: Field) -> None:
    held = attach(field)
    held.detach()
    held.detach()
    assert attached(field.job.descriptor, INGRESS).program_ids == ()
    field.job.path.rmdir()
    held.detach()
    held.close()
    held.close()


# --- packets that no honest host sends ------------------------------------------------------------------


@contextlib.contextmanager
def wire(host: Host) -> Iterator[socket.socket]:
    """A packet socket on the host's eth0."""
    with inside(host):
        endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        endpoint.bind(("eth0", 3))
    with endpoint:
        yield endpoint


def address_on_wire(host: Host) -> bytes:
    with wire(host) as endpoint:
        address: bytes = endpoint.getsockname()[4]
        return address


def sent_by(endpoint: socket.socket, to: bytes, content: bytes) -> bytes:
    return packets.frame(content, to=to, sender=endpoint.getsockname()[4])


def flows_between(origin: Host, target: Host, port: int) -> list[Flow]:
    return [
        Flow(ipaddress.ip_address(source), ipaddress.ip_address(destination), destination_port=port)
        for source, destination in zip(origin.addresses, target.addresses)
    ]


def in_fragments(flow: Flow) -> list[bytes]:
    """A SYN in two fragments; with IPv4 the ports come first and the flags later (RFC 7112 forbids it with IPv6)."""
    segment = packets.tcp(flow, SYN, options=b"\x01" * 20)
    if flow.source.version == 4:
        return [packets.ipv4(flow, segment[:8], fragment=0x2000), packets.ipv4(flow, segment[8:], fragment=1)]
    return [
        packets.ipv6(flow, segment[:24], extensions=(FRAGMENT,), fragment=1),
        packets.ipv6(flow, segment[24:], extensions=(FRAGMENT,), fragment=3 << 3),
    ]


def with_flags(flags: int) -> Callable[[Flow], list[bytes]]:
    return lambda flow: [packets.packet(flow, packets.tcp(flow, flags))]


def with_ipv4_options(length: int) -> Callable[[Flow], list[bytes]]:
    return lambda flow: [packets.ipv4(flow, packets.tcp(flow, SYN), options=b"\x01" * length)]


def behind(*extensions: int) -> Callable[[Flow], list[bytes]]:
    return lambda flow: [packets.ipv6(flow, packets.tcp(flow, SYN), extensions=extensions)]


def fast_open(flow: Flow) -> list[bytes]:
    # RFC 7413 4.1.1: an empty cookie option, padded; the data rides on the SYN.
    return [packets.packet(flow, packets.tcp(flow, SYN, options=b"\x22\x02\x01\x01", payload=b"let me in"))]


# A control listener answers each of these with SYN and ACK.
OPENERS_OF_BOTH = (
    *(with_flags(SYN | more) for more in (0, PSH, URG, ECE, CWR, ECE | CWR, PSH | URG | ECE | CWR)),
    in_fragments,
    fast_open,
)
OPENERS = {
    4: (*OPENERS_OF_BOTH, *(with_ipv4_options(length) for length in (4, 20, 40))),
    6: (
        *OPENERS_OF_BOTH,
        *(behind(kind) for kind in (HOP_BY_HOP, OPTIONS, ROUTING, FRAGMENT)),
        behind(HOP_BY_HOP, OPTIONS, ROUTING, FRAGMENT),
        behind(HOP_BY_HOP, *(OPTIONS,) * 7),
    ),
}


@PROGRAMS
@FAMILIES
def test_no_crafted_packet_of_a_stranger_gets_an_answer_out_of_the_job(
    field: Field, program: ShieldProgram, family: int
) -> None:
    allow_fast_open_without_cookie(field.host)
    with field.listener(field.job) as of_the_job, field.listener(field.elsewhere) as control:
        with shielded(field, program):
            assert answers_to(OPENERS[family], field, of_the_job, family) == []
        assert answers_to(OPENERS[family], field, control, family) == [SYN | ACK] * len(OPENERS[family])
        control.settimeout(PATIENCE_SECONDS)
        with control.accept()[0] as opened:
            assert opened.recv(100) == b"let me in"
        of_the_job.setblocking(False)
        with pytest.raises(BlockingIOError):
            of_the_job.accept()


@SEES_SOCKETS
@FAMILIES
def test_a_stranger_does_not_even_hear_no(field: Field, family: int) -> None:
    flags = [bits for bits in range(256) if bits not in (SYN, SYN | ACK)]
    with field.listener(field.job) as of_the_job, field.listener(field.elsewhere) as control:
        crafted = [with_flags(bits) for bits in flags]
        with shielded(field, SOCKET_PROGRAM):
            assert answers_to(crafted, field, of_the_job, family) == []
            assert answers_to([with_flags(ACK)], field, control, family) == [packets.RST]
        with shielded(field, HEADER_PROGRAM):  # less is promised before Linux 5.1
            assert answers_to([with_flags(ACK)], field, of_the_job, family) == [packets.RST]


def allow_fast_open_without_cookie(host: Host) -> None:
    # Documentation/networking/ip-sysctl.rst: client, server, no cookie needed, all listeners
    with inside(host):
        Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x1 | 0x2 | 0x200 | 0x400))


def answers_to(
    crafted: list[Callable[[Flow], list[bytes]]] | tuple[Callable[[Flow], list[bytes]], ...],
    field: Field,
    listener: socket.socket,
    family: int,
) -> list[int]:
    """The TCP flags of the first answer to each of the packets that got one."""
    plain = flows_between(field.stranger, field.host, port_of(listener))[0 if family == 4 else 1]
    flows = [replace(plain, source_port=41000 + number) for number in range(len(crafted))]
    to = address_on_wire(field.host)
    with wire(field.stranger) as stranger:
        for flow, make in zip(flows, crafted):
            for content in make(flow):
                stranger.send(sent_by(stranger, to, content))
        received = packets.frames_in(stranger, PATIENCE_SECONDS)
    found = []
    for flow in flows:
        segments = [segment for frame in received if (segment := packets.answer(frame, flow))]
        found += [segment[13] & (SYN | ACK | packets.RST) for segment in segments[:1]]
    return found


@pytest.mark.parametrize("cookies", [0, 2], ids=["queue", "syncookies"])
@pytest.mark.parametrize("program", [BY_SOCKET, BY_HEADERS, pytest.param(None, id="none")])
def test_a_handshake_from_before_the_shield_is_not_completed_behind_it(
    field: Field, cookies: int, program: ShieldProgram | None
) -> None:
    """But behind the header program, which promises less: it cannot tell the last packet from any of a connection."""
    with inside(field.host):
        Path("/proc/sys/net/ipv4/tcp_syncookies").write_text(str(cookies))
    with field.listener(field.job) as of_the_job, wire(field.stranger) as stranger:
        # An address that the stranger's kernel knows nothing of, so that it sends no RST.
        invented = "10.77.0.99"
        own = ":".join(f"{byte:02x}" for byte in stranger.getsockname()[4])
        neighbour = ["ip", "neigh", "replace", invented, "lladdr", own, "dev", "eth0"]
        field.host.run(neighbour, check=True)
        flow = Flow(
            ipaddress.ip_address(invented),
            ipaddress.ip_address(field.host.ipv4),
            destination_port=port_of(of_the_job),
        )
        to = address_on_wire(field.host)
        stranger.send(sent_by(stranger, to, packets.packet(flow, packets.tcp(flow, SYN))))
        received = packets.frames_in(stranger, PATIENCE_SECONDS)
        answer = next(segment for frame in received if (segment := packets.answer(frame, flow)))
        (theirs,) = struct.unpack_from("!I", answer, 4)
        with shielded(field, program) if program else contextlib.nullcontext():
            last = packets.tcp(flow, ACK, sequence=1001, acknowledged=theirs + 1 & 0xFFFFFFFF)
            stranger.send(sent_by(stranger, to, packets.packet(flow, last)))
            of_the_job.settimeout(PATIENCE_SECONDS)
            with contextlib.suppress(socket.timeout):
                of_the_job.accept()[0].close()
                assert program is not SOCKET_PROGRAM
                return
            assert program is SOCKET_PROGRAM


# --- the self-test ----------------------------------------------------------------------------------


def test_a_shield_is_proven_on_a_cgroup_and_the_proof_leaves_nothing_there(field: Field) -> None:
    with inside(field.host):
        assert prove(field.job.descriptor)
        assert attached(field.job.descriptor, EGRESS).program_ids == ()
        assert not (field.job.path / "cgroup.procs").read_text()
        with shielded(field):
            assert prove(field.job.descriptor)


def test_sockets_that_count_as_another_cgroups_are_no_proof(field: Field) -> None:
    with inside(field.host):
        assert not egress_is_filtered(field.job.descriptor, field.elsewhere.descriptor)
        with new_cgroup(field.job) as below:
            assert not egress_is_filtered(below.descriptor, field.job.descriptor)
            assert egress_is_filtered(field.job.descriptor, below.descriptor)
    assert attached(field.job.descriptor, EGRESS).program_ids == ()


def test_a_host_without_ipv4_loopback_is_proven_over_ipv6(field: Field) -> None:
    field.host.run(["ip", "address", "delete", "127.0.0.1/8", "dev", "lo"], check=True)
    with inside(field.host):
        assert prove(field.job.descriptor)
        assert not egress_is_filtered(field.job.descriptor, field.elsewhere.descriptor)


def test_without_loopback_nothing_is_proven(field: Field) -> None:
    def work() -> None:
        leave_for_a_new_network()
        with pytest.raises(ShieldUnavailable, match="ip link set lo up") as refused:
            prove(field.job.descriptor)
        assert refused.value.obstacle is Obstacle.NOT_PROVEN

    in_child(work)
    assert attached(field.job.descriptor, EGRESS).program_ids == ()


def test_a_firewall_that_forbids_the_datagram_is_no_proof(field: Field) -> None:
    field.host.run(["nft", "add table inet t; add chain inet t o { type filter hook output priority 0; policy drop; }"])
    with inside(field.host), pytest.raises(ShieldUnavailable, match="forbids UDP over the loopback"):
        prove(field.job.descriptor)


def test_a_cgroup_that_cannot_be_entered_is_no_proof(field: Field) -> None:
    with inside(field.host), new_cgroup(field.job) as threaded, new_cgroup(field.job) as invalid:
        (threaded.path / "cgroup.type").write_text("threaded")
        with pytest.raises(ShieldUnavailable, match="could not enter the job's cgroup") as refused:
            prove(invalid.descriptor)
        assert refused.value.obstacle is Obstacle.NOT_PROVEN


@kernel.needing(kernel.FREEZING_CGROUPS)
def test_a_frozen_cgroup_holds_the_self_test_up_for_a_bounded_time(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_LONGEST_SEND_SECONDS", PATIENCE_SECONDS)
    (field.job.path / "cgroup.freeze").write_text("1")
    with inside(field.host), pytest.raises(ShieldUnavailable, match="no answer"):
        prove(field.job.descriptor)
    assert not (field.job.path / "cgroup.procs").read_text()
    assert attached(field.job.descriptor, EGRESS).program_ids == ()


def test_the_self_test_needs_nothing_of_its_callers_signal_handlers(field: Field) -> None:
    def work() -> bool:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with inside(field.host):
            return prove(field.job.descriptor)

    assert in_child(work)


def test_child_that_is_frozen_in_a_cgroup_of_version_1_is_not_waited_for(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL does not end it there; net_cls may be of one hierarchy with freezer, and the cgroup a user's own."""
    monkeypatch.setattr(selftest, "_LONGEST_SEND_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(selftest, "_LONGEST_END_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(net_cgroups, "_CONTROLLERS", frozenset({"freezer"}))
    with cgroup_of_version_1("freezer", os.getuid()) as frozen:
        (frozen / "freezer.state").write_text("FROZEN")
        place = os.open(frozen, os.O_RDONLY | os.O_DIRECTORY)
        sender, began = selftest.Sender(field.elsewhere.descriptor, [place]), time.monotonic()
        with pytest.raises(ShieldUnavailable, match="no answer"):
            sender.try_to_send()
        sender.end()
        os.close(place)
        assert not is_alive(sender.pid)
        assert time.monotonic() - began < 5 * PATIENCE_SECONDS
        assert not (field.elsewhere.path / "cgroup.procs").read_text()


@contextlib.contextmanager
def repeated(field: Field) -> Iterator[selftest.Repeated]:
    """The proof that is made again and again, which has told once that filters run."""
    with inside(field.host):
        proof = selftest.Repeated(field.elsewhere.descriptor, (), lambda: None, ())
        try:
            assert eventually(proof.look)  # type: ignore[arg-type]
            yield proof
        finally:
            proof.end()


def looked(proof: selftest.Repeated) -> bool:
    """What it tells next."""
    while (answer := proof.look()) is None:
        pass
    return answer


def test_proof_is_repeated_until_a_filter_does_not_run(field: Field) -> None:
    with repeated(field) as proof:
        assert [looked(proof) for _ in range(20)] == [True] * 20
        (identifier,) = attached(field.elsewhere.descriptor, EGRESS).program_ids
        with Program.open(identifier) as program:
            program.take_off(field.elsewhere.descriptor, EGRESS)
        assert looked(proof) is False


def test_rule_of_the_hosts_that_forbids_as_the_filter_does_is_no_repeated_proof(field: Field) -> None:
    rule = "add table inet t; add chain inet t o { type filter hook output priority 0; policy drop; }"
    with repeated(field) as proof:
        field.host.run(["nft", rule], check=True)
        with pytest.raises(ShieldUnavailable, match="forbids UDP over the loopback"):
            looked(proof)


def test_child_that_somebody_moved_out_of_its_cgroup_proves_nothing(field: Field) -> None:
    with repeated(field) as proof:
        (child,) = (field.elsewhere.path / "cgroup.procs").read_text().split()
        (field.job.path / "cgroup.procs").write_text(child)
        with pytest.raises(ShieldUnavailable, match="moved it out"):
            looked(proof)


# --- programs of others -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(AttachFlags.NONE, "forbids any below"), (AttachFlags.ALLOW_OVERRIDE, "would switch it off")],
)
def test_a_program_above_that_does_not_get_along_with_ours_is_refused(
    field: Field, flags: AttachFlags, complaint: str
) -> None:
    with new_cgroup(field.job) as below, Program.load("somebody_else", pass_everything()) as foreign:
        refuse_conflicts([field.job.descriptor])
        foreign.attach(field.job.descriptor, INGRESS, flags)
        with pytest.raises(ShieldUnavailable, match=complaint) as refused:
            refuse_conflicts([field.elsewhere.descriptor, field.job.descriptor])
        assert refused.value.obstacle is Obstacle.PROGRAM_ABOVE
        if flags == AttachFlags.NONE:
            with pytest.raises(ShieldUnavailable, match="a program on a cgroup above forbids any below"):
                Shield.attach(below.descriptor, field.policy)
        foreign.detach(field.job.descriptor, INGRESS)
        refuse_conflicts([field.elsewhere.descriptor, field.job.descriptor])


def test_programs_above_that_allow_others_go_on_working(field: Field) -> None:
    with Program.load("somebody_else", pass_everything()) as foreign:
        foreign.attach(field.job.descriptor, INGRESS, AttachFlags.ALLOW_MULTI)
        others = attached(field.job.descriptor, INGRESS).program_ids
        refuse_conflicts([field.job.descriptor])
        with shielded(field), field.listener(field.job) as of_the_job:
            assert attempts(field.stranger, field, of_the_job) == NOT_AT_ALL
            assert attempts(field.peer, field, of_the_job) == OVER_BOTH
        assert attached(field.job.descriptor, INGRESS).program_ids == others


def test_what_is_no_cgroup_is_told_so(field: Field, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for action in (
            lambda: Shield.attach(directory, field.policy),
            lambda: refuse_conflicts([directory]),
            lambda: adopt(directory),
        ):
            with pytest.raises(ShieldUnavailable, match="not one of a directory in a cgroup v2 file system") as refused:
                action()
            assert refused.value.obstacle is Obstacle.NO_CGROUP
    finally:
        os.close(directory)


def pass_everything() -> bytes:
    return assemble((calculate(R0, "=", 1), leave()), {})
