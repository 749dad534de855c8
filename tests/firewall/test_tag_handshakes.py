"""Handshakes of the job by tag that take their time, are repeated, or come in other words; and replays of them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, TypeVar

import kernel
import packets
import pytest
from cgroups import inside
from dialing import RETRANSMISSION_SECONDS, attempt, dial, exchange
from hosts import Host, Network
from packets import ACK, RST, SYN, Flow
from shield_field import FAMILIES, INGRESS, PATIENCE_SECONDS, port_of
from tag_field import (
    KEY,
    SEQUENCE,
    TagField,
    answer_to,
    answers_to,
    flow_to,
    has_tag,
    link_address,
    segments_in,
    tag_field,
    wire,
)

from securerun.firewall import tag
from securerun.firewall.tag_maps import NOTES
from securerun.firewall.tag_program import NOTE_SECONDS
from securerun.linux.bpf import Map, Program, attached

Result = TypeVar("Result")
# linux/in.h, linux/tcp.h
_IPPROTO_MPTCP = 262
_TCP_DEFER_ACCEPT = 9


@pytest.fixture
def field(network: Network) -> Iterator[TagField]:
    kernel.require(kernel.TAGS)
    with tag_field(network) as made:
        yield made


def write_setting(host: Host, setting: str, value: int) -> None:
    with inside(host):
        Path("/proc/sys/net", setting).write_text(str(value))


def counter(host: Host, name: str) -> int:
    """One of the extended TCP counters of a host."""
    with inside(host):
        lines = Path("/proc/thread-self/net/netstat").read_text().split("\n")
    names, values = (next(group) for group in ((line.split() for line in lines[n:2]) for n in (0, 1)))
    return int(values[names.index(name)])


def address_of(field: TagField, family: int) -> str:
    return field.host.addresses[0 if family == 4 else 1]


# --- handshakes that take their time ----------------------------------------------------------------


@FAMILIES
def test_a_connection_of_the_job_by_syn_cookie(field: TagField, family: int) -> None:
    write_setting(field.host, "ipv4/tcp_syncookies", 2)
    with field.shielded() as (held, _), field.listener() as of_the_job:
        before = counter(field.host, "SyncookiesRecv")

        def work() -> None:
            with dial(address_of(field, family), port_of(of_the_job)) as near, of_the_job.accept()[0] as far:
                exchange(near, far)

        field.from_far(work)
        assert counter(field.host, "SyncookiesRecv") - before == 1
        assert held.denied() == ()


@FAMILIES
def test_a_connection_of_the_job_that_is_accepted_with_its_first_data_only(field: TagField, family: int) -> None:
    with field.shielded() as (held, _), field.listener() as of_the_job:
        of_the_job.setsockopt(socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT, 30)

        def work() -> None:
            with dial(address_of(field, family), port_of(of_the_job)) as near:
                of_the_job.setblocking(False)
                with pytest.raises(BlockingIOError):
                    of_the_job.accept()
                near.sendall(b"late")
                of_the_job.settimeout(RETRANSMISSION_SECONDS)
                with of_the_job.accept()[0] as far:
                    assert far.recv(100) == b"late"
                    exchange(near, far)

        field.from_far(work)
        assert held.denied() == ()


def test_connections_of_the_job_wait_for_a_listener_whose_queue_is_full(field: TagField) -> None:
    with field.shielded() as (held, _), field.listener(backlog=0) as of_the_job:
        before = counter(field.host, "ListenOverflows")

        def work() -> int:
            with contextlib.ExitStack() as stack:
                waiting = []
                for address in field.host.addresses * 3:
                    family = socket.AF_INET6 if ":" in address else socket.AF_INET
                    endpoint = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    endpoint.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        endpoint.connect((address, port_of(of_the_job)))
                    waiting.append(endpoint)
                time.sleep(0.1)
                of_the_job.listen(64)
                of_the_job.settimeout(RETRANSMISSION_SECONDS)
                accepted = [stack.enter_context(of_the_job.accept()[0]) for _ in waiting]
                by_peer = {far.getpeername()[1]: far for far in accepted}
                for near in waiting:
                    near.settimeout(RETRANSMISSION_SECONDS)
                    exchange(near, by_peer[near.getsockname()[1]])
                return len(accepted)

        assert field.from_far(work) == 6
        assert counter(field.host, "ListenOverflows") > before
        assert held.denied() == ()


def test_a_syn_that_was_lost_is_sent_again_with_its_tag(field: TagField) -> None:
    drop = "table inet t { chain i { type filter hook input priority -300; tcp flags & (syn | ack) == syn drop; }; }"
    field.host.run(["nft", drop], check=True)
    with field.shielded(), field.listener() as of_the_job, wire(field.host) as seen:
        port = port_of(of_the_job)
        with _later(1.5, lambda: field.host.run(["nft", "delete table inet t"], check=True)):
            work = lambda: attempt(field.host.ipv4, port, seconds=RETRANSMISSION_SECONDS)  # noqa: E731
            assert field.from_far(work) == "connected"
        opening = [each for each in segments_in(packets.frames_in(seen, 0.2)) if each[13] & (SYN | ACK) == SYN]
    assert len(opening) > 1 and all(map(has_tag, opening))
    assert len({each[-12:] for each in opening}) == 2, "the first has another one than all that follow"


@contextlib.contextmanager
def _later(seconds: float, work: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, work)
    timer.start()
    try:
        yield
    finally:
        timer.join()


# --- other words ------------------------------------------------------------------------------------


@FAMILIES
def test_fast_open_goes_without_a_tag_and_is_sent_again_with_one(field: TagField, family: int) -> None:
    """With a cookie there is no room for a tag, and an answer to data has none either."""
    for host in (field.host, field.peer):
        write_setting(host, "ipv4/tcp_fastopen", 0x1 | 0x2)
    address = address_of(field, family)
    with field.shielded(), field.listener(fast_open=16) as of_the_job, wire(field.host) as seen:

        def open_early() -> None:
            open_with_data(of_the_job, address)

        # The first one asks for a cookie, the second one has it.
        field.from_far(open_early)
        field.from_far(open_early)
        opening = [each for each in segments_in(packets.frames_in(seen, 0.2)) if each[13] & (SYN | ACK) == SYN]
    with_data = [each for each in opening if each.endswith(b"early")]
    assert with_data and not any(map(has_tag, with_data))
    assert sum(map(has_tag, opening)) >= 2


@FAMILIES
def test_fast_open_without_cookies_connects_as_well(field: TagField, family: int) -> None:
    # Documentation/networking/ip-sysctl.rst: client, server, no cookie needed, all listeners
    for host in (field.host, field.peer):
        write_setting(host, "ipv4/tcp_fastopen", 0x1 | 0x2 | 0x4 | 0x200 | 0x400)
    address = address_of(field, family)
    with field.shielded(), field.listener(fast_open=16) as of_the_job:
        field.from_far(lambda: open_with_data(of_the_job, address))


def open_with_data(listener: socket.socket, address: str) -> None:
    """Connect with the first data in the SYN, where that may be."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as near:
        near.sendto(b"early", socket.MSG_FASTOPEN, (address, port_of(listener)))
        listener.settimeout(RETRANSMISSION_SECONDS)
        with listener.accept()[0] as far:
            far.settimeout(RETRANSMISSION_SECONDS)
            assert far.recv(100) == b"early"
            exchange(near, far)


@kernel.needing(kernel.MPTCP)
def test_a_connection_of_the_job_by_multipath_tcp(field: TagField) -> None:
    with field.shielded(), field.listener(protocol=_IPPROTO_MPTCP) as of_the_job:
        port = port_of(of_the_job)

        def work() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP) as near:
                near.settimeout(RETRANSMISSION_SECONDS)
                near.connect((field.host.ipv4, port))
                with of_the_job.accept()[0] as far:
                    exchange(near, far)

        field.from_far(work)
        assert field.beside_far(lambda: attempt(field.host.ipv4, port)) == "timeout"


def test_an_address_that_is_translated_on_the_way_makes_no_difference(field: TagField) -> None:
    """As behind the address of a Kubernetes Service: where it arrives the destination is another one."""
    with field.shielded(), field.listener() as of_the_job:
        service = "10.96.0.10"
        rule = f"ip daddr {service} tcp dport 7000 dnat to {field.host.ipv4}:{port_of(of_the_job)}"
        for hook, host in (("output", field.peer), ("prerouting", field.host)):
            table = f"table ip t {{ chain o {{ type nat hook {hook} priority -100; {rule}; }}; }}"
            host.run(["nft", table], check=True)
            field.peer.run(["ip", "route", "replace", service, "via", field.host.ipv4], check=True)
            assert field.from_far(lambda: attempt(service, 7000)) == "connected"
            assert field.beside_far(lambda: attempt(service, 7000)) == "timeout"
            host.run(["nft", "delete table ip t"], check=True)


@FAMILIES
def test_a_port_that_is_translated_with_it_makes_it_wait_for_the_second_syn(field: TagField, family: int) -> None:
    """As netfilter does where it has another connection from that port to the true target."""
    kind, source = ("ip", field.peer.ipv4) if family == 4 else ("ip6", f"[{field.peer.ipv6}]")
    rule = f"meta l4proto tcp snat to {source}:50000-50099"
    table = f"table {kind} t {{ chain p {{ type nat hook postrouting priority 100; {rule}; }}; }}"
    field.peer.run(["nft", table], check=True)
    with field.shielded(), field.listener() as of_the_job:
        address, port = address_of(field, family), port_of(of_the_job)

        def work() -> None:
            with dial(address, port, seconds=RETRANSMISSION_SECONDS) as near, of_the_job.accept()[0] as far:
                assert near.getsockname()[1] != far.getpeername()[1]
                exchange(near, far)

        field.from_far(work)
        assert field.beside_far(lambda: attempt(address, port, seconds=RETRANSMISSION_SECONDS)) == "timeout"


# --- replays ----------------------------------------------------------------------------------------


def recorded(field: TagField, family: int, port: int) -> bytes:
    """The SYN of a connection of the job's that was made and has ended."""
    with wire(field.host) as seen:
        assert field.from_far(lambda: attempt(address_of(field, family), port, source_port=45000)) == "connected"
        return next(each for each in segments_in(packets.frames_in(seen, 0.2)) if each[13] & (SYN | ACK) == SYN)


def sent_again(field: TagField, origin: Host, flow: Flow, segment: bytes) -> list[int]:
    """What the same SYN is answered from this host, with the addresses of the flow."""
    content = packets.tcp(
        flow, SYN, sequence=struct.unpack_from("!I", segment, 4)[0], options=segment[20 : (segment[12] >> 4) * 4]
    )
    return answer_to(field, origin, flow, content)


def notes_of(field: TagField) -> Map:
    """The map of the judge's notes, which only the program has."""
    (identifier,) = attached(field.job.descriptor, INGRESS).program_ids
    with Program.open(identifier) as judge:
        opened = [Map.open(each) for each in judge.information().map_ids]
    for each in opened:
        if each.shape.name != NOTES.name:
            each.close()
    (notes,) = (each for each in opened if each.shape.name == NOTES.name)
    return notes


@pytest.fixture
def _older_than_a_note() -> None:
    """No note can be older than the machine, as those of kernel_program.py are young."""
    time.sleep(max(0, 1.2 * NOTE_SECONDS - time.monotonic()))


def age_notes(field: TagField, seconds: float) -> int:
    """Make all notes so much older."""
    with notes_of(field) as notes:
        entries = dict(notes.items())
        for key, value in entries.items():
            noted = struct.unpack("=Q", value)[0] - round(seconds * 1e9)
            notes.update(key, struct.pack("=Q", max(0, noted)))
        return len(entries)


@pytest.mark.usefixtures("_older_than_a_note")
@FAMILIES
def test_the_same_syn_is_a_retransmission_and_later_a_replay(field: TagField, family: int) -> None:
    with field.shielded() as (held, _), field.listener() as of_the_job:
        flow = flow_to(field, field.peer, family, port_of(of_the_job), 45000)
        segment = recorded(field, family, port_of(of_the_job))
        of_the_job.accept()[0].close()
        assert sent_again(field, field.peer, flow, segment) == [SYN | ACK]
        # It was answered to whoever has that address and port, who knows nothing of it.
        assert age_notes(field, NOTE_SECONDS - 10) == 1
        assert sent_again(field, field.peer, flow, segment) == [SYN | ACK]
        assert held.denied() == ()
        assert age_notes(field, 11) == 1
        for _ in range(3):
            assert sent_again(field, field.peer, flow, segment) == []
        assert [(denial.source, denial.packets) for denial in held.denied()] == [(flow.source, 3)]
        of_the_job.setblocking(False)
        with pytest.raises(BlockingIOError):
            of_the_job.accept()


@pytest.mark.usefixtures("_older_than_a_note")
@FAMILIES
def test_a_syn_that_was_sent_again_is_a_replay_later_whatever_its_port(field: TagField, family: int) -> None:
    with field.shielded(), field.listener() as of_the_job:
        flow, from_another = (flow_to(field, field.peer, family, port_of(of_the_job), port) for port in (45000, 45001))
        option = tag.syn_option_once_more(KEY.syn, flow.source, SEQUENCE)
        again = {each: packets.tcp(each, SYN, sequence=SEQUENCE, options=option) for each in (flow, from_another)}
        last = packets.tcp(flow, ACK, sequence=SEQUENCE + 1, acknowledged=1)
        assert answer_to(field, field.peer, flow, last) == []
        assert answers_to(field, field.peer, again) == {each: [SYN | ACK] for each in again}
        assert answer_to(field, field.peer, flow, last) == [RST]
        assert age_notes(field, NOTE_SECONDS) == 1
        assert answers_to(field, field.peer, again) == {each: [] for each in again}
        assert answer_to(field, field.peer, flow, last) == []


@FAMILIES
def test_from_another_address_or_port_the_same_tag_is_wrong(field: TagField, family: int) -> None:
    with field.shielded(), field.listener() as of_the_job:
        segment = recorded(field, family, port_of(of_the_job))
        stranger = flow_to(field, field.stranger, family, port_of(of_the_job), 45000)
        other_port = flow_to(field, field.peer, family, port_of(of_the_job), 45001)
        assert sent_again(field, field.stranger, stranger, segment) == []
        assert sent_again(field, field.peer, other_port, segment) == []


@pytest.mark.usefixtures("_older_than_a_note")
@FAMILIES
def test_what_follows_a_handshake_comes_to_nothing_by_its_note(field: TagField, family: int) -> None:
    with field.shielded(), field.listener() as of_the_job:
        port = port_of(of_the_job)
        segment = recorded(field, family, port)
        of_the_job.accept()[0].close()
        (sequence,) = struct.unpack_from("!I", segment, 4)
        flow = flow_to(field, field.peer, family, port, 45000)
        last = packets.tcp(flow, ACK, sequence=sequence + 1 & 0xFFFFFFFF, acknowledged=1)
        assert answer_to(field, field.peer, flow, last) == [RST]
        for number in (sequence, sequence + 2):
            other = packets.tcp(flow, ACK, sequence=number & 0xFFFFFFFF, acknowledged=1)
            assert answer_to(field, field.peer, flow, other) == []
        age_notes(field, NOTE_SECONDS)
        assert answer_to(field, field.peer, flow, last) == []


# --- floods -----------------------------------------------------------------------------------------


def test_wrong_tags_by_the_ten_thousand_drive_out_no_note_and_no_node(field: TagField) -> None:
    with field.shielded() as (held, _), field.listener() as of_the_job:
        port = port_of(of_the_job)
        recorded(field, 4, port)
        to, sent = link_address(field.host), 0
        flow = flow_to(field, field.stranger, 4, port)
        with wire(field.stranger) as endpoint:
            own = endpoint.getsockname()[4]
            frames = [
                packets.frame(
                    packets.packet(flow, packets.tcp(flow, SYN, sequence=n, options=tag.HEAD + struct.pack("!Q", n))),
                    to=to,
                    sender=own,
                )
                for n in range(500)
            ]
            until = time.monotonic() + 2
            connected = 0
            while time.monotonic() < until:
                for frame in frames:
                    endpoint.send(frame)
                sent += len(frames)
                if connected < 5:
                    assert field.from_far(lambda: attempt(field.host.ipv4, port)) == "connected"
                    connected += 1
        assert sent > 10_000 and connected == 5
        with notes_of(field) as notes:
            assert len(list(notes.keys())) == 1 + connected
        assert held.tags is not None and len(held.tags.seen().guarded) == 1
        assert sum(denial.packets for denial in held.denied()) == sent


def test_a_listener_that_comes_and_goes_needs_nobody_to_be_told(field: TagField) -> None:
    with field.shielded():
        for _ in range(3):
            with field.listener() as of_the_job:
                assert field.from_far(lambda: attempt(field.host.ipv6, port_of(of_the_job))) == "connected"
        assert field.from_far(lambda: attempt(field.host.ipv6, 29555, seconds=PATIENCE_SECONDS)) == "refused"
