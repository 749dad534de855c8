"""Tags between real hosts: whoever opens a connection to the job proves in its first packet that they belong to it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import select
import socket
from collections.abc import Iterator
from dataclasses import replace

import kernel
import packets
import pytest
from cgroups import inside, socket_made_in
from dialing import RETRANSMISSION_SECONDS, attempt, attempts, dial, exchange, listening
from hosts import Host, Network
from packets import ACK, RST, SYN, Flow
from shield_field import FAMILIES, PATIENCE_SECONDS, port_of
from tag_field import (
    BY_TAG,
    KEY,
    OTHER_KEY,
    SEQUENCE,
    TagField,
    answer_to,
    answers_to,
    flow_to,
    has_tag,
    link_address,
    policy_with,
    segments_in,
    shielded,
    tag_field,
    wire,
    within,
)

from securerun.firewall import tag
from securerun.firewall.policy import Admission, Opening, PortRange, Purpose
from securerun.firewall.tag_maps import Answer
from securerun.linux.networks import collapse
from securerun.linux.sock_diag import SocketDiagnosis

OVER_BOTH, NOT_AT_ALL = ["connected"] * 2, ["timeout"] * 2


@pytest.fixture
def field(network: Network) -> Iterator[TagField]:
    kernel.require(kernel.TAGS)
    with tag_field(network) as made:
        yield made


# --- who connects -----------------------------------------------------------------------------------


def test_of_all_hosts_only_processes_of_the_job_connect_and_nobody_named_them(field: TagField) -> None:
    addresses = (*field.host.addresses, f"::ffff:{field.host.ipv4}")
    with field.shielded() as (held, _), field.listener() as of_the_job, field.listener(field.elsewhere) as control:
        port = port_of(of_the_job)
        assert field.from_far(lambda: attempts(addresses, port)) == ["connected"] * 3
        assert field.beside_far(lambda: attempts(addresses, port)) == ["timeout"] * 3
        assert within(field.elsewhere, field.stranger, lambda: attempts(addresses, port)) == ["timeout"] * 3
        assert field.beside_far(lambda: attempts(addresses, port_of(control))) == ["connected"] * 3
        assert held.name == "socket and tag"
        assert held.tags is not None
        assert {str(address) for address in held.tags.seen().guarded} == set(field.peer.addresses)
        refused = {(str(denial.source), denial.port) for denial in held.denied()}
    assert refused == {(source, port) for host in (field.peer, field.stranger) for source in host.addresses}


def test_data_gets_through_and_carries_no_tag(field: TagField) -> None:
    with field.shielded(), field.listener() as of_the_job, wire(field.host) as seen:
        port = port_of(of_the_job)
        for address in field.host.addresses:

            def work() -> None:
                with dial(address, port) as near, of_the_job.accept()[0] as far:  # noqa: B023
                    for _ in range(20):
                        exchange(near, far)

            field.from_far(work)
        segments = list(segments_in(packets.frames_in(seen, PATIENCE_SECONDS)))
    opening = [segment for segment in segments if segment[13] & SYN]
    assert [bool(segment[13] & ACK) for segment in opening] == [False, True] * 2
    assert all(map(has_tag, opening))
    assert len(segments) > 80
    assert not any(has_tag(segment) for segment in segments if not segment[13] & SYN)


def test_tags_are_what_python_makes_of_them(field: TagField) -> None:
    with field.shielded(), field.listener() as of_the_job, wire(field.host) as seen:
        for family, address in zip((4, 6), field.host.addresses):
            assert field.from_far(lambda: attempt(address, port_of(of_the_job))) == "connected"  # noqa: B023
            first, second = (each for each in segments_in(packets.frames_in(seen, 0.2)) if each[13] & SYN)
            flow = flow_to(field, field.peer, family, port_of(of_the_job))
            source_port, sequence = int.from_bytes(first[:2], "big"), int.from_bytes(first[4:8], "big")
            assert first.endswith(tag.syn_option(KEY.syn, flow.source, source_port, sequence))
            numbers = (int.from_bytes(second[4:8], "big"), int.from_bytes(second[8:12], "big"))
            assert second.endswith(tag.syn_ack_option(KEY.syn_ack, *numbers))


def test_nobody_beyond_where_nodes_can_be_sees_a_tag(field: TagField) -> None:
    beyond, within_reach = "203.0.113.9", "10.99.0.1"
    for address in (beyond, within_reach):
        field.peer.run(["ip", "route", "add", address, "via", field.host.ipv4], check=True)
    with field.shielded(), wire(field.peer) as seen:
        field.from_far(lambda: attempts([beyond, within_reach], 80))
        frames = packets.frames_in(seen, PATIENCE_SECONDS)
    tagged = {frame[30:34]: has_tag(next(segments_in([frame]))) for frame in frames if list(segments_in([frame]))}
    assert tagged == {socket.inet_aton(beyond): False, socket.inet_aton(within_reach): True}


def test_another_jobs_key_opens_nothing(field: TagField) -> None:
    with field.shielded(OTHER_KEY) as (held, _), field.listener() as of_the_job:
        assert field.from_far(lambda: attempts(field.host.addresses, port_of(of_the_job))) == NOT_AT_ALL
        assert held.tags is not None and held.tags.seen().guarded == ()


def test_connections_that_the_job_opens_to_others_are_nobodys_business(field: TagField) -> None:
    with field.shielded(), listening(field.stranger) as service:
        for address in field.stranger.addresses:

            def work() -> None:
                with dial(address, port_of(service)) as near, service.accept()[0] as far:  # noqa: B023
                    exchange(near, far)

            field.in_job(work)


def test_a_listener_from_before_the_shield_goes_by_tags_as_well(field: TagField) -> None:
    with field.listener() as of_the_job, field.shielded():
        port = port_of(of_the_job)
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == OVER_BOTH
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == NOT_AT_ALL


def test_processes_of_this_host_connect_over_its_loopback_unless_it_is_closed(field: TagField) -> None:
    addresses = ("127.0.0.1", "::1", *field.host.addresses)
    for closed, expected in ((False, "connected"), (True, "timeout")):
        policy = replace(BY_TAG, close_loopback=closed, tagged=collapse((*BY_TAG.tagged, *tag.LOOPBACK)))
        with shielded(field.job, policy) as held, field.listener() as of_the_job:
            port = port_of(of_the_job)
            assert within(field.elsewhere, field.host, lambda: attempts(addresses, port)) == [expected] * 4  # noqa: B023
            assert field.in_job(lambda: attempts(addresses, port)) == ["connected"] * 4  # noqa: B023
            assert held.name == ("socket, tag and loopback" if closed else "socket and tag")


# --- tags and addresses -----------------------------------------------------------------------------


def test_a_key_may_only_add_to_what_addresses_let_in(field: TagField) -> None:
    policy = policy_with(Admission.EITHER, *field.stranger.addresses)
    with field.shielded(policy=policy) as (held, _), field.listener() as of_the_job:
        port = port_of(of_the_job)
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == OVER_BOTH
        assert within(field.elsewhere, field.stranger, lambda: attempts(field.host.addresses, port)) == OVER_BOTH
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == NOT_AT_ALL
        assert held.tags is not None
        seen = held.tags.seen()
        assert {str(address) for address in seen.guarded} == set(field.peer.addresses)
        assert {(str(one.address), one.port) for one in seen.without} == {
            (each, 0) for each in field.stranger.addresses
        }


@pytest.mark.parametrize("named", [True, False], ids=["named", "not-named"])
def test_a_key_may_narrow_what_addresses_let_in(field: TagField, named: bool) -> None:
    peers = (*(field.peer.addresses if named else ()), *field.stranger.addresses)
    policy = policy_with(Admission.BOTH, *peers)
    with field.shielded(policy=policy), field.listener() as of_the_job:
        port = port_of(of_the_job)
        expected = OVER_BOTH if named else NOT_AT_ALL
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == expected
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == NOT_AT_ALL
        assert within(field.elsewhere, field.stranger, lambda: attempts(field.host.addresses, port)) == NOT_AT_ALL


@pytest.mark.parametrize("admission", [Admission.EITHER, Admission.TAG])
def test_a_tag_counts_from_the_networks_of_the_site_alone(field: TagField, admission: Admission) -> None:
    peers = field.stranger.addresses if admission is Admission.EITHER else ()
    policy = policy_with(admission, *peers, tags_from=collapse([ipaddress.ip_network(field.peer.ipv4)]))
    with field.shielded(policy=policy) as (held, _), field.listener() as of_the_job:
        port = port_of(of_the_job)
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == ["connected", "timeout"]
        assert {str(one.source) for one in held.denied()} == {field.peer.ipv6}
        # Who is named comes in by address as ever, and nobody else does.
        expected = OVER_BOTH if peers else NOT_AT_ALL
        assert within(field.elsewhere, field.stranger, lambda: attempts(field.host.addresses, port)) == expected
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == NOT_AT_ALL


def test_a_node_comes_in_through_the_named_interfaces_only(field: TagField) -> None:
    for interface, expected in (("eth0", OVER_BOTH), ("lo", NOT_AT_ALL)):
        policy = replace(BY_TAG, interfaces=(interface,))
        with inside(field.host), field.shielded(policy=policy), field.listener() as of_the_job:
            port = port_of(of_the_job)
            assert field.from_far(lambda: attempts(field.host.addresses, port)) == expected  # noqa: B023


def test_where_only_the_loopback_goes_by_tags_others_go_by_address(field: TagField) -> None:
    policy = replace(
        BY_TAG,
        admission=Admission.ADDRESS,
        tagged=tag.LOOPBACK,
        close_loopback=True,
        peers=policy_with(Admission.EITHER, *field.peer.addresses).peers,
    )
    with shielded(field.job, policy), field.listener() as of_the_job:
        port = port_of(of_the_job)
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == OVER_BOTH
        assert within(field.elsewhere, field.stranger, lambda: attempts(field.host.addresses, port)) == NOT_AT_ALL
        assert within(field.elsewhere, field.host, lambda: attempts(["127.0.0.1", "::1"], port)) == NOT_AT_ALL
        assert field.in_job(lambda: attempts(["127.0.0.1", "::1"], port)) == OVER_BOTH


# --- what is no tag ---------------------------------------------------------------------------------


@FAMILIES
def test_a_tag_is_good_for_the_one_packet_that_it_was_made_for(field: TagField, family: int) -> None:
    with field.shielded(), field.listener() as of_the_job:
        port = port_of(of_the_job)
        made = {
            what: (flow, options_of(flow_to(field, field.peer, family, port), flow)[what])
            for number, what in enumerate(options_of(flow_to(field, field.peer, family, port), SOME_FLOW))
            for flow in (flow_to(field, field.stranger, family, port, 42000 + number),)
        }
        segments = {flow: packets.tcp(flow, SYN, sequence=SEQUENCE, options=options) for flow, options in made.values()}
        found = answers_to(field, field.stranger, segments)
        answered = {what for what, (flow, _) in made.items() if found[flow]}
        assert answered == {what for what in made if what.startswith("right")}
        assert all(found[flow] in ([], [SYN | ACK]) for flow in found)
        assert len(made) == 28


SOME_FLOW = Flow(ipaddress.ip_address("10.77.0.3"), ipaddress.ip_address("10.77.0.1"))


def options_of(other: Flow, flow: Flow) -> dict[str, bytes]:
    """Options of a SYN of this flow, by what they are. other: that of another host."""
    source, port = flow.source, flow.source_port
    right = tag.syn_option(KEY.syn, source, port, SEQUENCE)
    once_more = tag.syn_option_once_more(KEY.syn, source, SEQUENCE)
    return {
        "none": b"",
        "another key": tag.syn_option(OTHER_KEY.syn, source, port, SEQUENCE),
        "the key of answers": tag.syn_option(KEY.syn_ack, source, port, SEQUENCE),
        "an answer's": tag.syn_ack_option(KEY.syn_ack, SEQUENCE, 0),
        "an answer's under the other key": tag.syn_ack_option(KEY.syn, SEQUENCE, 0),
        "another source": tag.syn_option(KEY.syn, other.source, port, SEQUENCE),
        "another port": tag.syn_option(KEY.syn, source, port + 1, SEQUENCE),
        "another number": tag.syn_option(KEY.syn, source, port, SEQUENCE + 1),
        "one sent again, of another source": tag.syn_option_once_more(KEY.syn, other.source, SEQUENCE),
        "one sent again, of another number": tag.syn_option_once_more(KEY.syn, source, SEQUENCE + 1),
        "one sent again, said to be the first": tag.HEAD + once_more[4:],
        "the first, said to be sent again": tag.HEAD_ONCE_MORE + right[4:],
        "a bit": right[:-1] + bytes((right[-1] ^ 0x80,)),
        "zeros": tag.HEAD + bytes(8),
        "another experiment": right[:2] + b"\xf9\x89" + right[4:],
        "another kind": b"\xfd" + right[1:],
        "too short": right[:1] + b"\x0b" + right[2:],
        "too long": right[:1] + b"\x0d" + right[2:],
        "no length": right[:1] + b"\x00" + right[2:],
        "cut off": right[:8],
        "cut off at the end of the longest header": b"\x01" * 32 + right[:8],
        "beside a word": b"\x01\x01" + right + b"\x01\x01",
        "right": right,
        "right, sent again": once_more,
        "right, before others": right + b"\x01" * 4,
        "right, before many": right + b"\x01" * 28,
        "right, behind many": b"\x01" * 28 + right,
        "right, behind a wrong one": tag.HEAD + bytes(8) + right,
    }


@FAMILIES
def test_no_packet_but_a_syn_opens_anything(field: TagField, family: int) -> None:
    with field.shielded(), field.listener() as of_the_job:
        segments = {}
        for number, flags in enumerate((ACK, ACK | packets.PSH, packets.FIN, RST, 0, SYN | ACK)):
            flow = flow_to(field, field.stranger, family, port_of(of_the_job), 43000 + number)
            right = tag.syn_option(KEY.syn, flow.source, flow.source_port, SEQUENCE)
            segments[flow] = packets.tcp(flow, flags, sequence=SEQUENCE, options=right)
        assert not any(answers_to(field, field.stranger, segments).values())


# --- answers ----------------------------------------------------------------------------------------


def planned(port: int) -> tuple[PortRange, ...]:
    return (PortRange(port, port, Purpose.STATIC_STORE),)


def test_an_answer_without_a_tag_from_a_planned_port_is_none_and_told(field: TagField) -> None:
    with listening(field.stranger) as fake:
        policy = replace(BY_TAG, ports=planned(port_of(fake)))
        for address in (*field.stranger.addresses, f"::ffff:{field.stranger.ipv4}"):
            with shielded(field.job, policy) as held:
                made = field.in_job(lambda: attempt(address, port_of(fake), source_port=44000))  # noqa: B023
                assert made == "timeout"
                assert held.tags is not None
                told = set(held.tags.answers())
                plain = address.rpartition("ffff:")[2]
                own = field.host.ipv6 if ":" in plain else field.host.ipv4
                assert {(str(one.target), one.port, str(one.source), one.source_port) for one in told} == {
                    (plain, port_of(fake), own, 44000)
                }
                assert {(str(one.address), one.port) for one in held.tags.seen().without} == {(plain, port_of(fake))}
                assert not list(held.tags.answers())


@FAMILIES
def test_a_socket_that_was_answered_without_a_tag_is_ended_at_once(field: TagField, family: int) -> None:
    with listening(field.stranger) as fake, shielded(field.job, replace(BY_TAG, ports=planned(port_of(fake)))) as held:
        assert held.tags is not None
        waiting = socket_made_in(field.job, lambda: _connecting(field, field.stranger, family, port_of(fake)))
        with waiting, inside(field.host), contextlib.closing(SocketDiagnosis()) as diagnosis:
            assert select.select([held.tags], [], [], RETRANSMISSION_SECONDS)[0]
            (told,) = held.tags.answers()
            other = replace(told, cookie=told.cookie + 1)
            # Of another socket that has the same ends by then nothing is to be ended.
            assert not ended(diagnosis, other) and not waiting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            assert ended(diagnosis, told)
            assert waiting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
            assert not ended(diagnosis, told)


def ended(diagnosis: SocketDiagnosis, told: Answer) -> bool:
    return diagnosis.end(told.source, told.source_port, told.target, told.port, told.cookie)


@FAMILIES
def test_who_does_not_see_the_syn_cannot_have_its_socket_ended(field: TagField, family: int) -> None:
    """An answer to another number is left to TCP, which refuses it: the right one may still come."""
    field.peer.run(["nft", "table inet t { chain i { type filter hook input priority 0; tcp dport 29500 drop; }; }"])
    with shielded(field.job, replace(BY_TAG, ports=planned(29500))) as held:
        assert held.tags is not None
        with socket_made_in(field.job, lambda: _connecting(field, field.peer, family, 29500)) as waiting:
            flow = flow_to(field, field.peer, family, waiting.getsockname()[1], 29500)
            for guess in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
                segment = packets.tcp(flow, SYN | ACK, sequence=SEQUENCE, acknowledged=guess)
                assert answer_to(field, field.peer, flow, segment) in ([RST], [RST | ACK])
            assert not list(held.tags.answers()) and held.tags.seen().without == ()
            assert not waiting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def test_an_answer_without_a_tag_from_any_other_port_is_counted_and_passes(field: TagField) -> None:
    with listening(field.stranger) as other, shielded(field.job, replace(BY_TAG, ports=planned(29500))) as held:
        assert field.in_job(lambda: attempts(field.stranger.addresses, port_of(other))) == OVER_BOTH
        assert held.tags is not None and not list(held.tags.answers())
        assert [(str(one.address), one.port, one.packets) for one in held.tags.seen().without] == [
            (address, port_of(other), 1) for address in field.stranger.addresses
        ]


def test_the_answers_of_nodes_pass_and_so_do_those_of_peers_by_address_where_a_key_only_adds(field: TagField) -> None:
    with listening(field.stranger) as plain, socket_made_in(field.far, lambda: listening(field.peer)) as node:
        # Made before its shield was: nobody asked this listener for tags.
        ports = (*planned(port_of(plain)), *planned(port_of(node)))
        policy = policy_with(Admission.EITHER, *field.stranger.addresses, ports=tuple(sorted(ports)))
        with field.shielded(policy=policy) as (held, _):
            assert field.in_job(lambda: attempts(field.stranger.addresses, port_of(plain))) == OVER_BOTH
            assert field.in_job(lambda: attempts(field.peer.addresses, port_of(node))) == NOT_AT_ALL
            with socket_made_in(field.far, lambda: listening(field.peer)) as guarded:
                assert field.in_job(lambda: attempts(field.peer.addresses, port_of(guarded))) == OVER_BOTH
            assert held.tags is not None
            assert {str(address) for address in held.tags.seen().guarded} == set(field.peer.addresses)


@FAMILIES
def test_who_opens_towards_a_waiting_socket_is_no_answer(field: TagField, family: int) -> None:
    """A simultaneous open needs no SYN-ACK: a SYN that meets a SYN."""
    policy = replace(BY_TAG, ports=planned(29500))
    drop = "table inet t { chain i { type filter hook input priority 0; tcp dport 29500 drop; }; }"
    field.stranger.run(["nft", drop], check=True)
    for closes in (False, True):
        with contextlib.ExitStack() as stack:
            if closes:
                stack.enter_context(shielded(field.job, policy))
            waiting = socket_made_in(field.job, lambda: _connecting(field, field.stranger, family, 29500))
            stack.enter_context(waiting)
            flow = flow_to(field, field.stranger, family, waiting.getsockname()[1], 29500)
            answered = answer_to(field, field.stranger, flow, packets.tcp(flow, SYN, sequence=SEQUENCE))
            # What else is seen there is the SYN of the waiting socket, sent again.
            assert (SYN | ACK in answered) != closes


def _connecting(field: TagField, target: Host, family: int, port: int) -> socket.socket:
    with inside(field.host):
        endpoint = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    endpoint.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        endpoint.connect((target.addresses[0 if family == 4 else 1], port))
    return endpoint


@FAMILIES
def test_nobody_has_the_answer_made_that_a_node_waits_for_elsewhere(field: TagField, family: int) -> None:
    """With a node's sequence number, at a public port, whose answer would be right for that node."""
    public = 29777
    policy = replace(BY_TAG, public=(Opening(9100, 9101), Opening(public, public)))
    with shielded(field.job, policy), field.listener(port=public):
        answers = _answers_to_a_stranger(field, flow_to(field, field.stranger, family, public))
        assert answers and all(each[13] & SYN for each in answers) and not any(map(has_tag, answers))


@FAMILIES
def test_nor_by_opening_towards_a_socket_that_waits_at_a_port_of_no_plan(field: TagField, family: int) -> None:
    drop = "table inet t { chain i { type filter hook input priority 0; tcp dport 29777 drop; }; }"
    field.stranger.run(["nft", drop], check=True)
    with shielded(field.job):
        with socket_made_in(field.job, lambda: _connecting(field, field.stranger, family, 29777)) as waiting:
            flow = flow_to(field, field.stranger, family, waiting.getsockname()[1], 29777)
            answers = _answers_to_a_stranger(field, flow)
        assert answers and all(each[13] & SYN for each in answers) and not any(map(has_tag, answers))


def _answers_to_a_stranger(field: TagField, flow: Flow) -> list[bytes]:
    """The segments with an ACK that the stranger's host gets for a SYN of its own."""
    with wire(field.stranger) as stranger:
        asking = packets.packet(flow, packets.tcp(flow, SYN, sequence=SEQUENCE))
        stranger.send(packets.frame(asking, to=link_address(field.host), sender=stranger.getsockname()[4]))
        return [each for each in segments_in(packets.frames_in(stranger, PATIENCE_SECONDS / 2)) if each[13] & ACK]


@FAMILIES
def test_a_public_port_of_a_node_answers_other_nodes_too(field: TagField, family: int) -> None:
    public = 29777
    some = Opening(public, public, collapse(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/8"))))
    policy = replace(BY_TAG, public=(some,), ports=(PortRange(public, public, Purpose.PUBLIC),))
    with shielded(field.job, policy), field.listener(port=public), shielded(field.far, policy) as far:
        assert field.from_far(lambda: attempt(field.host.addresses[family == 6], public)) == "connected"
        assert far.tags is not None and not list(far.tags.answers())
