"""A shield that goes by tags promises what one that goes by addresses does: no packet, place or moment hides."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import kernel
import packets
import pytest
from cgroups import inside, new_cgroup, socket_made_in
from dialing import attempts, dial, exchange, listening
from hosts import Host, Network
from packets import ACK, CWR, ECE, FRAGMENT, HOP_BY_HOP, OPTIONS, PSH, ROUTING, SYN, URG, Flow
from shield_field import FAMILIES, PATIENCE_SECONDS, port_of
from tag_field import KEY, OTHER_KEY, SEQUENCE, TagField, answer_to, flow_to, link_address, shielded, tag_field, wire

from securerun.firewall import tag

OVER_BOTH, NOT_AT_ALL = ["connected"] * 2, ["timeout"] * 2


@pytest.fixture
def field(network: Network) -> Iterator[TagField]:
    kernel.require(kernel.TAGS)
    with tag_field(network) as made:
        yield made


def crafted(flow: Flow, options: bytes) -> dict[str, bytes]:
    """Packets of this flow that would open a connection, with these TCP options."""

    def syn(more: int = 0, payload: bytes = b"") -> bytes:
        return packets.tcp(flow, SYN | more, sequence=SEQUENCE, options=options, payload=payload)

    found = {f"flags {more:02x}": packets.packet(flow, syn(more)) for more in (0, PSH, URG, ECE, CWR, ECE | CWR)}
    found["with data"] = packets.packet(flow, syn(payload=b"let me in"))
    if flow.source.version == 4:
        for length in (4, 20, 40):
            found[f"{length} bytes of options"] = packets.ipv4(flow, syn(), options=b"\x01" * length)
    else:
        chains = ((HOP_BY_HOP,), (OPTIONS,), (ROUTING,), (FRAGMENT,), (HOP_BY_HOP, OPTIONS, ROUTING))
        found.update((f"behind {chain}", packets.ipv6(flow, syn(), extensions=chain)) for chain in chains)
    return found


def answered(field: TagField, origin: Host, family: int, port: int, ports: Iterator[int], kind: str) -> set[str]:
    """Which of the packets are answered with a SYN-ACK, of those that carry this kind of a tag."""
    flows: dict[str, Flow] = {}
    to = link_address(field.host)
    with wire(origin) as endpoint:
        own = endpoint.getsockname()[4]
        for name in crafted(flow_to(field, origin, family, port), b""):
            flow = flows[name] = flow_to(field, origin, family, port, next(ports))
            right = tag.syn_option(KEY.syn, flow.source, flow.source_port, SEQUENCE)
            wrong = tag.syn_option(OTHER_KEY.syn, flow.source, flow.source_port, SEQUENCE)
            options = {"none": b"", "wrong": wrong, "right": right}[kind]
            endpoint.send(packets.frame(crafted(flow, options)[name], to=to, sender=own))
        frames = packets.frames_in(endpoint, PATIENCE_SECONDS / 2)
    return {
        name
        for name, flow in flows.items()
        if any(segment[13] & 0x3F == SYN | ACK for frame in frames if (segment := packets.answer(frame, flow)))
    }


@FAMILIES
def test_no_packet_without_a_right_tag_gets_an_answer_however_it_is_made(field: TagField, family: int) -> None:
    with inside(field.host):
        # Documentation/networking/ip-sysctl.rst: data of a SYN is taken without a cookie, by all listeners
        Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x1 | 0x2 | 0x200 | 0x400))
    ports = itertools.count(42000)
    with field.listener(backlog=256) as of_the_job:
        port = port_of(of_the_job)
        every = answered(field, field.stranger, family, port, ports, "none")
        assert len(every) >= 10
        with shielded(field.job):
            for kind in ("none", "wrong"):
                assert answered(field, field.stranger, family, port, ports, kind) == set(), kind
            # A right one counts where the program sees it: who writes tags sends no other headers before TCP's.
            plain = {name for name in every if name.startswith(("flags", "with data"))}
            assert answered(field, field.stranger, family, port, ports, "right") == plain


def test_a_listener_of_the_job_stays_one_wherever_it_is_and_whatever_is_left_of_the_job(field: TagField) -> None:
    with field.shielded() as (near, _), new_cgroup(field.job) as below:
        with socket_made_in(below, lambda: listening(field.host)) as of_a_child:
            assert field.from_far(lambda: attempts(field.host.addresses, port_of(of_a_child))) == OVER_BOTH
            assert field.beside_far(lambda: attempts(field.host.addresses, port_of(of_a_child))) == NOT_AT_ALL
        assert near.denied()


def test_an_orphaned_listener_stays_closed_when_the_cgroup_is_removed(field: TagField) -> None:
    with shielded(field.far), field.listener() as of_the_job:
        with shielded(field.job):
            field.job.path.rmdir()
        port = port_of(of_the_job)
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == NOT_AT_ALL
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == OVER_BOTH


def test_a_connection_that_stands_outlives_the_shield_of_either_side(field: TagField) -> None:
    with field.listener() as of_the_job:
        near = socket_made_in(field.far, lambda: _dialled(field, port_of(of_the_job)))
        with near, of_the_job.accept()[0] as far, field.shielded():
            exchange(near, far)  # it stood before anybody asked for tags
        with field.shielded():
            near = socket_made_in(field.far, lambda: _dialled(field, port_of(of_the_job)))
            far = of_the_job.accept()[0]
        with near, far, shielded(field.job, key=OTHER_KEY):
            exchange(near, far)


def _dialled(field: TagField, port: int) -> socket.socket:
    with inside(field.peer):
        return dial(field.host.ipv4, port)


@FAMILIES
def test_a_handshake_from_before_the_shield_is_not_completed_behind_it(field: TagField, family: int) -> None:
    """Its SYN was noted by nobody."""
    silent = "table inet t { chain i { type filter hook input priority 0; tcp dport 43000 drop; }; }"
    field.stranger.run(["nft", silent], check=True)  # its kernel would answer with a RST
    with field.listener() as of_the_job:
        flow = flow_to(field, field.stranger, family, port_of(of_the_job), 43000)
        with wire(field.stranger) as endpoint:
            own, to = endpoint.getsockname()[4], link_address(field.host)
            syn = packets.packet(flow, packets.tcp(flow, SYN, sequence=SEQUENCE))
            endpoint.send(packets.frame(syn, to=to, sender=own))
            frames = packets.frames_in(endpoint, PATIENCE_SECONDS / 2)
        answer = next(segment for frame in frames if (segment := packets.answer(frame, flow)))
        (theirs,) = struct.unpack_from("!I", answer, 4)
        last = packets.tcp(flow, ACK, sequence=SEQUENCE + 1, acknowledged=theirs + 1 & 0xFFFFFFFF)
        of_the_job.settimeout(PATIENCE_SECONDS)
        with shielded(field.job):
            answer_to(field, field.stranger, flow, last)
            with pytest.raises(socket.timeout):
                of_the_job.accept()
        answer_to(field, field.stranger, flow, last)
        of_the_job.accept()[0].close()  # it would have been one
