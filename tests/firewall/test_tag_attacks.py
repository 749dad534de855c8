"""Attacks on tags, and much of what is right: masters that are none, subflows without room, thousands of connects."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import kernel
import packets
import pytest
from cgroups import inside, socket_made_in
from dialing import RETRANSMISSION_SECONDS, dial, exchange
from hosts import Network, eventually
from packets import ACK, SYN
from shield_field import FAMILIES, port_of
from tag_field import (
    BY_TAG,
    KEY,
    OTHER_KEY,
    SEQUENCE,
    TagField,
    flow_to,
    link_address,
    segments_in,
    shielded,
    tag_field,
    wire,
)

from securerun.firewall import tag
from securerun.firewall.policy import PortRange, Purpose

PORT = 29500
_IPPROTO_MPTCP = 262


@pytest.fixture
def field(network: Network) -> Iterator[TagField]:
    kernel.require(kernel.TAGS)
    with tag_field(network) as made:
        yield made


@contextlib.contextmanager
def waiting_for_a_master(field: TagField, family: int) -> Iterator[tuple[socket.socket, packets.Flow, int, bytes]]:
    """A socket of the job's that meets at a stranger's, who is silent: its flow back, its number, and its option."""
    address = field.stranger.addresses[0 if family == 4 else 1]

    def connecting() -> socket.socket:
        with inside(field.host):
            made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        made.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            made.connect((address, PORT))
        return made

    silent = f"table inet t {{ chain i {{ type filter hook input priority 0; tcp dport {PORT} drop; }}; }}"
    field.stranger.run(["nft", silent], check=True)
    try:
        with wire(field.stranger) as seen, socket_made_in(field.job, connecting) as made:
            syn = next(
                one
                for one in segments_in(packets.frames_in(seen, 0.3))
                if one[2:4] == PORT.to_bytes(2, "big") and one[13] & (SYN | ACK) == SYN
            )
            (sequence,) = struct.unpack_from("!I", syn, 4)
            options = syn[20 : (syn[12] >> 4) * 4]
            option = options[options.index(tag.HEAD) :][: tag.SIZE]
            yield made, flow_to(field, field.stranger, family, made.getsockname()[1], PORT), sequence, option
    finally:
        field.stranger.run(["nft", "delete", "table", "inet", "t"], check=True)


def answer(field: TagField, flow: packets.Flow, acknowledged: int, options: bytes) -> None:
    segment = packets.tcp(flow, SYN | ACK, sequence=SEQUENCE, acknowledged=acknowledged, options=options)
    with wire(field.stranger) as endpoint:
        own = endpoint.getsockname()[4]
        endpoint.send(packets.frame(packets.packet(flow, segment), to=link_address(field.host), sender=own))


def has_connected(made: socket.socket, seconds: float = 0.05) -> bool:
    return bool(select.select([], [made], [], seconds)[1])


@FAMILIES
def test_a_master_that_is_none_answers_with_no_tag_that_it_has_seen(field: TagField, family: int) -> None:
    """Neither the job's own, sent back to it, nor another's, nor one of another connection."""
    policy = replace(BY_TAG, ports=(PortRange(PORT, PORT, Purpose.STATIC_STORE),))
    with shielded(field.job, policy) as held, waiting_for_a_master(field, family) as (made, flow, sequence, own):
        assert held.tags is not None
        port, next_number = flow.destination_port, sequence + 1 & 0xFFFFFFFF
        assert own == tag.syn_option(KEY.syn, flow.destination, port, sequence)
        wrong = {
            "none": b"",
            "its own": own,
            "its own key": tag.syn_ack_option(KEY.syn, SEQUENCE, next_number),
            "another key": tag.syn_ack_option(OTHER_KEY.syn_ack, SEQUENCE, next_number),
            "of another number": tag.syn_ack_option(KEY.syn_ack, SEQUENCE, next_number + 1),
            "of another number of its own": tag.syn_ack_option(KEY.syn_ack, SEQUENCE + 1, next_number),
            "of one sent again": tag.HEAD_ONCE_MORE + tag.syn_ack_option(KEY.syn_ack, SEQUENCE, next_number)[4:],
            "cut off": tag.syn_ack_option(KEY.syn_ack, SEQUENCE, next_number)[:8],
        }
        for what, options in wrong.items():
            answer(field, flow, next_number, options)
            assert not has_connected(made), what
            (told,) = held.tags.answers()
            assert (told.target, told.port, told.source_port) == (flow.source, PORT, port), what
        # Nobody ended it here, so that one can see what opens it: the right tag alone.
        answer(field, flow, next_number, tag.syn_ack_option(KEY.syn_ack, SEQUENCE, next_number))
        assert has_connected(made, RETRANSMISSION_SECONDS)
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


@kernel.needing(kernel.MPTCP)
def test_a_subflow_of_multipath_tcp_has_no_room_for_a_tag_and_is_refused(field: TagField) -> None:
    """MP_JOIN takes 12 bytes beside those of a SYN: of 40 there is no room for 12 more."""
    if shutil.which("ip") is None or field.peer.run(["ip", "mptcp", "limits", "show"]).returncode != 0:
        pytest.skip("this ip knows no mptcp")
    other = "10.77.0.102"
    for host in (field.host, field.peer):
        host.run(["ip", "mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2"], check=True)
    field.peer.run(["ip", "addr", "add", f"{other}/24", "dev", "eth0"], check=True)
    field.peer.run(["ip", "mptcp", "endpoint", "add", other, "dev", "eth0", "subflow"], check=True)
    with field.shielded() as (held, _), field.listener(protocol=_IPPROTO_MPTCP) as of_the_job:

        def work() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP) as near:
                near.settimeout(RETRANSMISSION_SECONDS)
                near.connect((field.host.ipv4, port_of(of_the_job)))
                with of_the_job.accept()[0] as far:
                    exchange(near, far)
                    eventually(lambda: bool(held.denied()), seconds=2)
                    exchange(near, far)  # and what there is of it goes on

        field.from_far(work)
        assert {str(one.source) for one in held.denied()} == {other}


def test_of_ten_thousand_connections_none_is_refused(field: TagField) -> None:
    with field.shielded() as (held, _), field.listener(backlog=1024) as of_the_job:
        port = port_of(of_the_job)

        def work() -> int:
            done = 0
            for _ in range(10_000):
                with dial(field.host.ipv4, port, seconds=RETRANSMISSION_SECONDS) as near:
                    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    of_the_job.accept()[0].close()
                    done += 1
            return done

        assert field.from_far(work) == 10_000
        assert held.denied() == () and held.tags is not None
        assert [str(each) for each in held.tags.seen().guarded] == [field.peer.ipv4]
        assert not list(held.tags.answers())
