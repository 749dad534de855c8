"""The shield that closes the loopback: of the job's own host, too, only the job's own processes connect."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, TypeVar

import kernel
import packets
import pytest
from cgroups import Cgroup, enter, in_child, inside, new_cgroup, socket_made_in
from dialing import RETRANSMISSION_SECONDS, attempt, attempts, dial, endpoint_for, exchange, listening
from hosts import Host, Network, cgroup2_mount
from packets import ACK, FIN, HOP_BY_HOP, OPTIONS, PSH, RST, SYN, Flow
from shield_field import FAMILIES, INGRESS, PATIENCE_SECONDS, ShieldField, field_of, port_of

from securerun.errors import Obstacle
from securerun.firewall import tag_maps, tags
from securerun.firewall.description import describe
from securerun.firewall.policy import Policy
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.selftest import prove
from securerun.firewall.shield import Shield, adopt
from securerun.linux.assembler import R0, R10, assemble, calculate, leave, load
from securerun.linux.bpf import AttachFlags, AttachType, MapShape, MapType, Program, ProgramType, attached
from securerun.linux.networks import collapse

Result = TypeVar("Result")

NOBODY = 65534
SOCK_OPS = AttachType.CGROUP_SOCK_OPS


# linux/in.h, linux/in6.h, linux/tcp.h
_IPPROTO_MPTCP = 262
_IPV6_DSTOPTS = 59
_TCP_DEFER_ACCEPT, _TCP_FASTOPEN = 9, 23


@dataclass(frozen=True)
class Field(ShieldField):
    """Where the job's own host is among its peers, and every process there is somebody."""

    @property
    def policy(self) -> Policy:
        """The job's own host is among its peers, as where all its nodes are listed."""
        known = (*self.peer.addresses, *self.host.addresses)
        peers = collapse(ipaddress.ip_network(address) for address in known)
        return Policy("0123456789ab", (), peers, close_loopback=True)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every way from the host to itself."""
        with inside(self.host):
            lines = Path("/proc/thread-self/net/if_inet6").read_text().split("\n")
        (local,) = (line.split()[0] for line in lines if line.startswith("fe80") and line.endswith("eth0"))
        link_local = f"{ipaddress.IPv6Address(bytes.fromhex(local))}%eth0"
        own = self.host.addresses
        return ("127.0.0.1", "127.1.2.3", "::1", *own, f"::ffff:{own[0]}", "::ffff:127.0.0.1", link_local)

    def listener(self, cgroup: Cgroup, port: int = 0) -> socket.socket:
        """Listens on every address of the host, IPv4 and IPv6, as torch's stores do."""
        return socket_made_in(cgroup, lambda: listening(self.host, port))

    def from_job(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in a process of the job."""
        return self._from(self.job, work, user=0)

    def from_elsewhere(self, work: Callable[[], Result], *, user: int = 0) -> Result:
        """The same in a process of the host that is not the job's."""
        return self._from(self.elsewhere, work, user)

    def _from(self, cgroup: Cgroup, work: Callable[[], Result], user: int) -> Result:
        def enter_and_work() -> Result:
            cgroup.enter()
            with inside(self.host):
                os.seteuid(user)
                try:
                    return work()
                finally:
                    os.seteuid(0)

        return in_child(enter_and_work)


@pytest.fixture
def field(network: Network) -> Iterator[Field]:
    kernel.require(kernel.TAGS)  # without them nothing can close the loopback
    with field_of(Field, network) as made:
        yield made


@pytest.fixture
def held(field: Field) -> Iterator[Shield]:
    made = Shield.attach(field.job.descriptor, field.policy)
    try:
        yield made
    finally:
        made.detach()
        made.close()


def knock(origin: Host, address: str, port: int) -> str:
    """The same from another host."""
    with inside(origin):
        return attempt(address, port)


def write_setting(host: Host, setting: str, value: int) -> None:
    with inside(host):
        Path("/proc/sys/net", setting).write_text(str(value))


# --- who connects -----------------------------------------------------------------------------------


def test_processes_of_the_job_connect_over_every_address_of_their_host(field: Field, held: Shield) -> None:
    addresses = field.addresses

    def work() -> int:
        connected = 0
        with listening(field.host) as listener:
            for address in addresses * 25:
                with dial(address, port_of(listener)) as near, listener.accept()[0] as far:
                    exchange(near, far)
                connected += 1
        return connected

    assert field.from_job(work) == 25 * len(addresses)
    assert held.denied() == ()


def test_processes_of_the_job_connect_all_at_once(field: Field, held: Shield) -> None:
    addresses = field.addresses
    with field.listener(field.job) as of_the_job:
        port = port_of(of_the_job)

        def work() -> int:
            with ThreadPoolExecutor(len(addresses)) as at_once:
                return sum(at_once.map(fetch, addresses * 25))

        def fetch(address: str) -> bool:
            with dial(address, port) as near:
                near.settimeout(RETRANSMISSION_SECONDS)
                return near.recv(1) == b"!"

        def serve() -> None:
            of_the_job.settimeout(RETRANSMISSION_SECONDS)
            for _ in addresses * 25:
                with of_the_job.accept()[0] as far:
                    far.sendall(b"!")

        server = threading.Thread(target=serve)
        server.start()
        try:
            assert field.from_job(work) == 25 * len(addresses)
        finally:
            server.join()
    assert held.denied() == ()


@pytest.mark.parametrize("user", [0, NOBODY], ids=["root", "another-user"])
def test_other_processes_of_the_host_connect_over_none_of_its_addresses(field: Field, held: Shield, user: int) -> None:
    addresses = field.addresses
    with field.listener(field.job) as of_the_job, field.listener(field.elsewhere) as control:
        closed = port_of(of_the_job)
        for listener, expected in ((of_the_job, {"timeout"}), (control, {"connected"})):
            port = port_of(listener)
            assert field.from_elsewhere(lambda: set(attempts(addresses, port)), user=user) == expected  # noqa: B023
        sources = {(str(denial.source), denial.port) for denial in held.denied()}
    # To 127.1.2.3 the kernel goes from 127.0.0.1, and to each other address from that one itself.
    known = {"127.0.0.1", "::1", *field.host.addresses, addresses[-1].partition("%")[0]}
    assert sources == {(source, closed) for source in known}


def test_a_stranger_on_the_host_who_binds_to_the_outer_interface_is_still_on_the_host(
    field: Field, held: Shield
) -> None:
    with field.listener(field.job) as of_the_job:
        port = port_of(of_the_job)
        for address in field.host.addresses:
            assert field.from_elsewhere(lambda: attempt(address, port, interface="eth0")) == "timeout"  # noqa: B023
        assert {str(denial.source) for denial in held.denied()} == set(field.host.addresses)


def test_between_hosts_nothing_changes(field: Field, held: Shield) -> None:
    with field.listener(field.job) as of_the_job:
        for address in field.host.addresses:
            assert knock(field.peer, address, port_of(of_the_job)) == "connected"
            assert knock(field.stranger, address, port_of(of_the_job)) == "timeout"
    with contextlib.ExitStack() as stack:
        for host in (field.stranger, field.peer):
            listener = stack.enter_context(listening(host))
            for address in host.addresses:
                assert field.from_job(lambda: attempt(address, port_of(listener))) == "connected"  # noqa: B023


def test_an_open_loopback_has_no_tags_and_lets_everybody_in(field: Field) -> None:
    addresses = field.addresses
    made = Shield.attach(field.job.descriptor, replace(field.policy, close_loopback=False))
    with field.listener(field.job) as of_the_job:
        assert made.name == "socket"
        assert attached(field.job.descriptor, SOCK_OPS).program_ids == ()
        assert field.from_elsewhere(lambda: set(attempts(addresses, port_of(of_the_job)))) == {"connected"}
    made.detach()
    made.close()


def test_the_job_connects_to_services_of_its_host_that_are_not_its_own(field: Field, held: Shield) -> None:
    with field.listener(field.elsewhere) as service:
        for address in field.addresses:

            def work() -> None:
                with dial(address, port_of(service)) as near, service.accept()[0] as far:  # noqa: B023
                    exchange(near, far)

            field.from_job(work)


def test_two_jobs_on_one_host_are_strangers_to_each_other(field: Field, held: Shield) -> None:
    other = Shield.attach(field.elsewhere.descriptor, field.policy)
    with field.listener(field.job) as first, field.listener(field.elsewhere) as second:
        ports = (port_of(first), port_of(second))
        assert [field.from_job(lambda: attempt("127.0.0.1", port)) for port in ports] == [  # noqa: B023
            "connected",
            "timeout",
        ]
        assert [field.from_elsewhere(lambda: attempt("127.0.0.1", port)) for port in ports] == [  # noqa: B023
            "timeout",
            "connected",
        ]
    other.detach()
    other.close()


def test_a_process_below_the_jobs_cgroup_is_the_jobs(field: Field, held: Shield) -> None:
    with new_cgroup(field.job) as below, field.listener(below) as of_the_job:
        for cgroup in (field.job, below):
            inner = replace(field, job=cgroup)
            assert inner.from_job(lambda: attempt("::1", port_of(of_the_job))) == "connected"


def test_what_counts_is_where_a_socket_was_made(field: Field, held: Shield) -> None:
    root = cgroup2_mount()
    assert root is not None
    with field.listener(field.job) as of_the_job:
        target = ("127.0.0.1", port_of(of_the_job))

        def made_before(cgroup: Path) -> str:
            with endpoint_for(target[0]) as endpoint:
                enter(cgroup)
                endpoint.settimeout(PATIENCE_SECONDS)
                try:
                    endpoint.connect(target)
                except socket.timeout:
                    return "timeout"
                return "connected"

        assert field.from_job(lambda: made_before(root)) == "connected"
        assert field.from_elsewhere(lambda: made_before(field.job.path)) == "timeout"


# --- handshakes that take their time ----------------------------------------------------------------


def test_connections_of_the_job_wait_for_a_listener_whose_queue_is_full(field: Field, held: Shield) -> None:
    def work() -> int:
        with listening(field.host) as listener, contextlib.ExitStack() as stack:
            listener.listen(0)
            before = counter("ListenOverflows")
            waiting = []
            for address in ("127.0.0.1", "::1", *field.host.addresses) * 2:
                endpoint = stack.enter_context(endpoint_for(address))
                endpoint.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    endpoint.connect((address, port_of(listener)))
                waiting.append(endpoint)
            assert counter("ListenOverflows") > before
            listener.listen(64)
            listener.settimeout(RETRANSMISSION_SECONDS)
            accepted = [stack.enter_context(listener.accept()[0]) for _ in waiting]
            by_peer = {far.getpeername()[1]: far for far in accepted}
            for near in waiting:
                near.settimeout(RETRANSMISSION_SECONDS)
                exchange(near, by_peer[near.getsockname()[1]])
            return len(accepted)

    assert field.from_job(work) == 8
    assert held.denied() == ()


def counter(name: str) -> int:
    """One of the extended TCP counters of the caller's network."""
    lines = Path("/proc/thread-self/net/netstat").read_text().split("\n")
    names, values = (next(group) for group in ((line.split() for line in lines[n:2]) for n in (0, 1)))
    return int(values[names.index(name)])


@FAMILIES
def test_a_connection_of_the_job_that_is_accepted_with_its_first_data_only(
    field: Field, held: Shield, family: int
) -> None:
    """The listener ignores the handshake's ACK, and the data comes to it as the ACK did: judged like it."""
    address = "127.0.0.1" if family == 4 else "::1"

    def work() -> None:
        with listening(field.host) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT, 30)
            with dial(address, port_of(listener)) as near:
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listener.accept()
                near.sendall(b"late")
                listener.settimeout(RETRANSMISSION_SECONDS)
                with listener.accept()[0] as far:
                    assert far.recv(100) == b"late"
                    exchange(near, far)

    field.from_job(work)
    assert held.denied() == ()


@FAMILIES
def test_a_connection_of_the_job_by_syn_cookie(field: Field, held: Shield, family: int) -> None:
    write_setting(field.host, "ipv4/tcp_syncookies", 2)
    address = "127.0.0.1" if family == 4 else "::1"

    def work() -> int:
        before = counter("SyncookiesRecv")
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listening(field.host))
            near = stack.enter_context(dial(address, port_of(listener)))
            exchange(near, stack.enter_context(listener.accept()[0]))
        return counter("SyncookiesRecv") - before

    assert field.from_job(work) == 1


@FAMILIES
def test_a_connection_of_the_job_by_fast_open(field: Field, held: Shield, family: int) -> None:
    """A SYN with data has no tag, and is sent again without: the data comes behind the handshake."""
    # Documentation/networking/ip-sysctl.rst: client, server, no cookie needed, all listeners
    write_setting(field.host, "ipv4/tcp_fastopen", 0x1 | 0x2 | 0x4 | 0x200 | 0x400)
    address = "127.0.0.1" if family == 4 else "::1"

    def work() -> int:
        before = counter("TCPFastOpenPassive")
        with listening(field.host) as listener, endpoint_for(address) as near:
            listener.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN, 16)
            near.sendto(b"early", socket.MSG_FASTOPEN, (address, port_of(listener)))
            listener.settimeout(RETRANSMISSION_SECONDS)
            with listener.accept()[0] as far:
                assert far.recv(100) == b"early"
                exchange(near, far)
        return counter("TCPFastOpenPassive") - before

    assert field.from_job(work) == 0


@kernel.needing(kernel.MPTCP)
def test_a_connection_of_the_job_by_multipath_tcp(field: Field, held: Shield) -> None:
    def work() -> str:
        with endpoint_for("127.0.0.1", _IPPROTO_MPTCP) as listener, endpoint_for("127.0.0.1", _IPPROTO_MPTCP) as near:
            listener.bind(("127.0.0.1", 0))
            listener.listen(4)
            near.settimeout(RETRANSMISSION_SECONDS)
            near.connect(listener.getsockname())
            with listener.accept()[0] as far:
                exchange(near, far)
        return "connected"

    assert field.from_job(work) == "connected"


def test_a_connection_of_the_job_with_a_header_before_tcps_is_nobodys(field: Field, held: Shield) -> None:
    """It would take a walk over headers to tell whose it is, and no library that trains anything sets one."""
    options = (
        ("127.0.0.1", socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01" * 4),
        ("::1", socket.IPPROTO_IPV6, _IPV6_DSTOPTS, bytes((0, 0, 1, 4, 0, 0, 0, 0))),
    )
    for address, level, option, value in options:
        for cgroup, expected in ((field.job, "timeout"), (field.elsewhere, "connected")):
            with field.listener(cgroup) as listener:

                def work() -> str:
                    with endpoint_for(address) as endpoint:  # noqa: B023
                        endpoint.setsockopt(level, option, value)  # noqa: B023
                        endpoint.settimeout(PATIENCE_SECONDS)
                        try:
                            endpoint.connect((address, port_of(listener)))  # noqa: B023
                        except socket.timeout:
                            return "timeout"
                        return "connected"

                assert field.from_job(work) == expected


def test_addresses_that_the_host_translates_are_seen_alike_on_both_ways(field: Field, held: Shield) -> None:
    with field.listener(field.job) as of_the_job:
        rule = f"ip daddr 10.99.99.99 tcp dport 7000 dnat to 127.0.0.1:{port_of(of_the_job)}"
        table = f"table ip t {{ chain o {{ type nat hook output priority -100; {rule}; }}; }}"
        field.host.run(["ip", "route", "add", "10.99.99.99/32", "dev", "lo"], check=True)
        field.host.run(["nft", table], check=True)
        assert field.from_job(lambda: attempt("10.99.99.99", 7000)) == "connected"
        assert field.from_elsewhere(lambda: attempt("10.99.99.99", 7000)) == "timeout"


def test_a_firewall_that_restores_marks_does_not_tell_the_job_from_a_stranger(field: Field, held: Shield) -> None:
    rules = "table inet t { chain p { type filter hook prerouting priority -150; meta mark set ct mark; }; }"
    field.host.run(["nft", rules], check=True)
    with field.listener(field.job) as of_the_job:
        assert field.from_job(lambda: attempt("127.0.0.1", port_of(of_the_job))) == "connected"
        assert field.from_elsewhere(lambda: attempt("127.0.0.1", port_of(of_the_job))) == "timeout"


# --- what a port number is good for ------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_port_number_of_a_connection_that_has_ended_opens_nothing(field: Field, held: Shield, address: str) -> None:
    with field.listener(field.job) as of_the_job:
        port = port_of(of_the_job)
        for _ in range(3):
            assert field.from_job(lambda: attempt(address, port, source_port=47000)) == "connected"
            for user in (0, NOBODY):
                stranger = field.from_elsewhere(lambda: attempt(address, port, source_port=47000), user=user)
                assert stranger == "timeout"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_port_number_of_a_connection_that_was_refused_opens_nothing(
    field: Field, held: Shield, address: str
) -> None:
    """As torch does it: the workers try until the store is up."""
    with field.listener(field.job) as first:
        port = port_of(first)
    assert field.from_job(lambda: attempt(address, port, source_port=47001)) == "refused"
    with field.listener(field.job, port) as of_the_job:
        assert port_of(of_the_job) == port
        for user in (0, NOBODY, 0):
            stranger = field.from_elsewhere(lambda: attempt(address, port, source_port=47001), user=user)
            assert stranger == "timeout"
        assert field.from_job(lambda: attempt(address, port, source_port=47001)) == "connected"


def test_connections_that_were_refused_by_the_ten_thousand_take_nothing_from_the_next(
    field: Field, held: Shield
) -> None:
    with field.listener(field.job) as first:
        nobody_listens = port_of(first)

    def work() -> None:
        with listening(field.host) as listener, dial("127.0.0.1", port_of(listener)) as near:
            with listener.accept()[0] as far:
                for _ in range(20_000):
                    with endpoint_for("127.0.0.1") as endpoint, pytest.raises(ConnectionRefusedError):
                        endpoint.connect(("127.0.0.1", nobody_listens))
                exchange(near, far)
            for address in ("127.0.0.1", "::1") * 50:
                with dial(address, port_of(listener)) as another, listener.accept()[0] as accepted:
                    exchange(another, accepted)

    field.from_job(work)
    assert held.denied() == ()


# --- packets that no honest process sends -----------------------------------------------------------


def loopback_flow(family: int, port: int, source_port: int) -> Flow:
    here = ipaddress.ip_address("127.0.0.1" if family == 4 else "::1")
    return Flow(here, here, source_port, port)


@contextlib.contextmanager
def watched(host: Host) -> Iterator[socket.socket]:
    """A packet socket on the host's loopback."""
    with inside(host):
        endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        endpoint.bind(("lo", 3))
    with endpoint:
        yield endpoint


def throw(field: Field, flow: Flow, content: bytes) -> set[int]:
    """The flags of what answers a packet of a process that is not the job's."""
    with watched(field.host) as wire:
        field.from_elsewhere(lambda: send_raw(flow, content))
        received = packets.frames_in(wire, PATIENCE_SECONDS / 2)
    segments = [packets.answer(frame, flow) for frame in received]
    return {segment[13] & (SYN | ACK | RST) for segment in segments if segment}


def send_raw(flow: Flow, content: bytes) -> None:
    family = socket.AF_INET if flow.source.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(content, (str(flow.destination), 0))


def overheard(field: Field, flow: Flow, work: Callable[[], Result]) -> tuple[Result, int]:
    """What a process of the job comes to, and the sequence number of its SYN."""
    with watched(field.host) as wire:
        result = field.from_job(work)
        received = packets.frames_in(wire, PATIENCE_SECONDS / 2)
    there = Flow(flow.destination, flow.source, flow.destination_port, flow.source_port)
    sent = (packets.answer(frame, there) for frame in received)
    (sequence,) = struct.unpack_from("!I", next(segment for segment in sent if segment and segment[13] & SYN), 4)
    return result, sequence


@FAMILIES
def test_no_packet_of_a_stranger_gets_an_answer_out_of_the_job(field: Field, held: Shield, family: int) -> None:
    with field.listener(field.job) as of_the_job, field.listener(field.elsewhere) as control:
        for number, flags in enumerate((SYN, SYN | PSH, SYN | FIN, ACK, PSH | ACK, FIN)):
            for listener, silent in ((of_the_job, True), (control, flags in (SYN | FIN, FIN))):
                flow = loopback_flow(family, port_of(listener), 48000 + number)
                answers = throw(field, flow, packets.packet(flow, packets.tcp(flow, flags)))
                assert (answers == set()) == silent, flags


@FAMILIES
def test_no_header_hides_the_syn_of_a_stranger(field: Field, held: Shield, family: int) -> None:
    with field.listener(field.job) as of_the_job, field.listener(field.elsewhere) as control:
        for number, (listener, expected) in enumerate(((of_the_job, set()), (control, {SYN | ACK, RST}))):
            flow = loopback_flow(family, port_of(listener), 48100 + number)
            segment = packets.tcp(flow, SYN)
            if family == 4:
                crafted = [packets.ipv4(flow, segment, options=b"\x01" * 8)]
            else:
                crafted = [packets.ipv6(flow, segment, extensions=(kind,)) for kind in (HOP_BY_HOP, OPTIONS)]
            for content in crafted:
                assert throw(field, flow, content) <= expected
                assert bool(throw(field, flow, content)) == bool(expected)


@FAMILIES
def test_a_replay_of_the_jobs_own_handshake_opens_nothing(field: Field, held: Shield, family: int) -> None:
    with field.listener(field.job) as of_the_job:
        flow = loopback_flow(family, port_of(of_the_job), 48200)
        work = lambda: attempt(str(flow.source), flow.destination_port, source_port=flow.source_port)  # noqa: E731
        outcome, sequence = overheard(field, flow, work)
        assert outcome == "connected"
        of_the_job.accept()[0].close()
        for _ in range(2):
            assert throw(field, flow, packets.packet(flow, packets.tcp(flow, SYN, sequence=sequence))) == set()
        # The ACK that ended it is no SYN and passes, but comes to nothing: there is no handshake left to end.
        last = packets.tcp(flow, ACK, sequence=sequence + 1 & 0xFFFFFFFF, acknowledged=1)
        assert throw(field, flow, packets.packet(flow, last)) == {RST}
        of_the_job.setblocking(False)
        with pytest.raises(BlockingIOError):
            of_the_job.accept()
        assert [(denial.source, denial.packets) for denial in held.denied()] == [(flow.source, 2)]


@FAMILIES
def test_a_sequence_number_that_was_overheard_opens_nothing(field: Field, held: Shield, family: int) -> None:
    """Nor does one that no listener of the job's ever saw. It takes the tag as well, and to hear that takes root."""
    with field.listener(field.job) as first:
        port = port_of(first)
    flow = loopback_flow(family, port, 48300)
    work = lambda: attempt(str(flow.source), flow.destination_port, source_port=flow.source_port)  # noqa: E731
    outcome, sequence = overheard(field, flow, work)
    assert outcome == "refused"
    with field.listener(field.job, port):
        for number in (sequence ^ 1, sequence):
            wrong = packets.tcp(flow, SYN, sequence=number)
            assert throw(field, flow, packets.packet(flow, wrong)) == set()


# --- hanging up, dying, taking over and taking down ---------------------------------------------------


def hang_up_and_die(field: Field) -> None:
    child = os.fork()
    if not child:
        try:
            Shield.attach(field.job.descriptor, field.policy)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def programs_on(cgroup: Cgroup) -> tuple[int, int]:
    """How many judge what comes in, and how many write tags."""
    judging, writing = (len(attached(cgroup.descriptor, kind).program_ids) for kind in (INGRESS, SOCK_OPS))
    return judging, writing


def test_a_shield_whose_guard_was_killed_stays_closed_and_is_adopted_whole(field: Field) -> None:
    hang_up_and_die(field)
    with field.listener(field.job) as of_the_job:
        port = port_of(of_the_job)

        def assert_closed() -> None:
            assert field.from_job(lambda: attempt("127.0.0.1", port)) == "connected"
            assert field.from_elsewhere(lambda: attempt("127.0.0.1", port)) == "timeout"

        assert_closed()
        adopted = adopt(field.job.descriptor)
        assert adopted.name == "socket, tag and loopback"
        assert {str(denial.source) for denial in adopted.denied()} == {"127.0.0.1"}
        assert_closed()
        adopted.replace_peers(())
        assert_closed()
        assert knock(field.peer, field.host.ipv4, port) == "timeout"
        adopted.detach()
        adopted.detach()
        adopted.close()
        adopted.close()
        assert programs_on(field.job) == (0, 0)
        assert field.from_elsewhere(lambda: attempt("127.0.0.1", port)) == "connected"


def test_half_a_shield_is_taken_off_by_who_would_adopt_it(field: Field) -> None:
    hang_up_and_die(field)
    (identifier,) = attached(field.job.descriptor, INGRESS).program_ids
    with Program.open(identifier) as judging:
        judging.detach(field.job.descriptor, INGRESS)
    assert programs_on(field.job) == (0, 1)
    with pytest.raises(ShieldUnavailable, match="no shield hangs"):
        adopt(field.job.descriptor)
    assert programs_on(field.job) == (0, 0)


def test_a_half_from_an_earlier_shield_is_not_taken_for_this_ones(field: Field) -> None:
    for _ in range(2):
        hang_up_and_die(field)
    first, _ = attached(field.job.descriptor, INGRESS).program_ids
    with Program.open(first) as judging:
        judging.detach(field.job.descriptor, INGRESS)
    assert programs_on(field.job) == (1, 2)
    adopted = adopt(field.job.descriptor)
    assert programs_on(field.job) == (1, 1)
    with field.listener(field.job) as of_the_job:
        assert field.from_job(lambda: attempt("::1", port_of(of_the_job))) == "connected"
    adopted.detach()
    adopted.close()
    assert programs_on(field.job) == (0, 0)


def test_a_self_test_and_programs_of_others_get_along_with_it(field: Field, held: Shield) -> None:
    with inside(field.host):
        assert prove(field.job.descriptor)
    assert programs_on(field.job) == (1, 1)
    with Program.load("somebody_else", pass_everything(), ProgramType.SOCK_OPS) as foreign:
        foreign.attach(field.job.descriptor, SOCK_OPS, AttachFlags.ALLOW_MULTI)
        with field.listener(field.job) as of_the_job:
            assert field.from_job(lambda: attempt("127.0.0.1", port_of(of_the_job))) == "connected"
        adopt(field.job.descriptor).close()
        assert programs_on(field.job) == (1, 2)


def test_a_cgroup_that_is_removed_takes_both_programs_along(field: Field) -> None:
    made = Shield.attach(field.job.descriptor, field.policy)
    field.job.path.rmdir()
    made.detach()
    made.close()


def test_of_a_shield_that_cannot_hang_nothing_hangs(field: Field) -> None:
    with new_cgroup(field.job) as below, Program.load("somebody_else", pass_everything()) as foreign:
        foreign.attach(field.job.descriptor, INGRESS, AttachFlags.NONE)
        with pytest.raises(ShieldUnavailable, match="forbids any below"):
            Shield.attach(below.descriptor, field.policy)
        assert programs_on(below) == (0, 0)


def pass_everything() -> bytes:
    return assemble((calculate(R0, "=", 1), leave()), {})


# --- the programs themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", ["maps", "options"])
def test_a_kernel_that_cannot_is_told_so_and_gets_none(
    field: Field, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks == "maps":
        unknown = MapShape(MapType.LRU_HASH, 0, 0, 0, tag_maps.ANSWERS.name)
        monkeypatch.setattr(tag_maps, "ring_shape", lambda _: unknown)
    else:
        monkeypatch.setattr(tags, "writing_program", lambda _: (calculate(R0, "=", 1), load(R0, 8, R10, 8), leave()))
    with pytest.raises(ShieldUnavailable, match="--loopback job needs Linux 5.10") as caught:
        Shield.attach(field.job.descriptor, field.policy)
    assert caught.value.obstacle is Obstacle.OLD_KERNEL
    assert "\n" not in str(caught.value)
    assert programs_on(field.job) == (0, 0)


def test_a_dry_run_shows_both_programs_and_who_may_use_the_loopback() -> None:
    shown = describe(Policy("0123456789ab", (), (), close_loopback=True))
    assert "from this host's own addresses: the job's own processes, by tag, nobody else" in shown
    assert "always passes: connections that the job opens itself" in shown
    assert shown.count("r1 = map[tag_networks]") == 3
    open_to_all = describe(Policy("0123456789ab", (), ()))
    assert "always passes: the loopback" in open_to_all
    assert "tag" not in open_to_all
