"""What launcher and guard say to each other: everything that is meant survives, and nothing else is understood."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securerun.firewall.job_key import JobSecret
from securerun.firewall.policy import MOST_OPENINGS, Denial, Layer, Opening, Policy, PortRange, Purpose
from securerun.guard import documents
from securerun.guard.documents import ProtocolError
from securerun.guard.program import launcher_address, reads_versions
from securerun.guard.protocol import (
    VERSIONS,
    Guarding,
    KeyOrder,
    Message,
    Notice,
    Order,
    Peers,
    Ready,
    Refused,
    Release,
    Released,
    Report,
    Run,
    Runs,
    decode,
    encode,
)
from securerun.linux.networks import collapse

POLICY = Policy(
    "0123456789ab",
    (PortRange(29500, 29500, "master port"),),
    collapse(ipaddress.ip_network(peer) for peer in ("10.0.0.1", "fd00::/64")),
    ("eth0",),
)
ORDER = Order(POLICY, "auto", "auto", 10.0, "train.py --epochs 3")


@pytest.mark.parametrize(
    "message",
    [
        ORDER,
        Peers(POLICY.peers),
        Release(failed=True),
        Release(failed=False, goes_on=True),
        Report(),
        Ready(4711),
        Runs(1),
        Run({"policy": {"run_id": "0123456789ab"}, "layers": []}),
        Guarding((Layer("shield", "socket"),), ("a note",)),
        Guarding((), ("a note",), ((60000, 60002), (60005, 60005))),
        Guarding((Layer("shield", "socket"),), (), needs_guard=True),
        Guarding((), (), (), False, "0123abcd", "/etc/securerun/site.key", "/run/securerun-jobs/x/secret"),
        Notice((Denial(ipaddress.ip_address("10.0.0.3"), 1, 2),), ("a word",)),
        Refused(77, "why"),
        Refused(77, "why", later=True),
        Refused(78, "why", knows_keys=True),
        Released((Denial(ipaddress.ip_address("fd00::3"), 29500, 12),)),
        Released((), 3, "it still listens on port 7002"),
        Released((), nodes_guarded=2, unguarded=("10.0.0.7", "fd00::7")),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_survives_the_way(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line) == message


def order(**changes: object) -> bytes:
    document: dict[str, Any] = json.loads(encode(ORDER))
    for path, value in changes.items():
        place = document["order"]
        *parents, last = path.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b'{"order": {}}',
        b'{"order": []}',
        b'{"release": {"failed": 1}}',
        b'{"release": {"failed": true}, "order": {}}',
        b'{"release": {"failed": true, "more": 1}}',
        b'{"halt": {}}',
        b'{"release": {"failed": true, "failed": false}}',
        b'{"release": {"failed": true}, "release": {"failed": false}}',
        b'{"ready": {"version": 1, "pid": NaN}}',
        b'{"ready": {"version": 2, "pid": 1}}',
        b'{"peers": {"networks": ["fe80::1%x/128"]}}',
        '{"report": {}}'.encode("utf-16"),
        b"[" * 100_000,
        order(version=2),
        order(version=True),
        order(firewall="ufw"),
        order(firewall=["auto"]),
        order(scope="none"),
        order(grace=-1),
        order(grace=True),
        order(grace=1e9),
        order(adopt="no"),
        order(command=3),
        order(command="x" * 5000),
        order(command="two\nlines"),
        order(command="\x1b[2J"),
        order(command="\ud800"),
        order(grace=float("nan")),
        order(grace=float("inf")),
        order(policy__peers=["fe80::1%x\n-A INPUT -j ACCEPT/128"]),
        order(more=1),
        order(policy=None),
        order(policy__run_id="../../../etc"),
        order(policy__run_id="0123456789AB"),
        order(policy__peers=["10.0.0.1/24"]),
        order(policy__peers=["10.0.0.0/24", "10.0.0.7/32"]),
        order(policy__peers=["node1"]),
        order(policy__peers="10.0.0.1"),
        order(policy__peers=["10.0.0.1"] * 100_001),
        order(policy__peers=[167772161]),
        order(policy__ports=[{"first": 0, "last": 1, "purpose": "p"}]),
        order(policy__ports=[{"first": 1, "last": 65536, "purpose": "p"}]),
        order(policy__ports=[{"first": 2, "last": 1, "purpose": "p"}]),
        order(policy__ports=[{"first": 1.0, "last": 2, "purpose": "p"}]),
        order(policy__ports=[{"first": 1, "last": 2, "purpose": "p\n-j ACCEPT"}]),
        order(policy__ports=[{"first": 1, "last": 2}]),
        order(policy__interfaces=["eth0 -j ACCEPT"]),
        order(policy__interfaces=["../eth0"]),
        order(policy__interfaces=["-j"]),
        order(policy__accept="yes"),
        order(policy__close_loopback=1),
    ],
    ids=lambda line: line[:60].decode(errors="replace"),
)
def test_anything_else_is_refused_in_words(line: bytes) -> None:
    with pytest.raises(ProtocolError) as refusal:
        decode(line)
    assert "\n" not in str(refusal.value)


def test_message_beyond_the_limit_is_not_even_parsed() -> None:
    with pytest.raises(ProtocolError, match="more than"):
        decode(b" " * (documents.MAXIMUM_BYTES + 1))


def _peers(count: int) -> list[str]:
    """Networks that cannot be joined, written as long as they can be."""
    start = 0x1000_1000
    return [
        f"2001:db8:1234:5678:9abc:def0:{at >> 16:x}:{at & 0xFFFF:x}/128" for at in range(start, start + 2 * count, 2)
    ]


def _largest_order() -> bytes:
    """The most that an honest launcher may ask for, with all in texts that an order is counted by."""
    openings = [{"first": 2 * at + 1, "last": 2 * at + 1, "networks": ["10.0.0.0/8"]} for at in range(MOST_OPENINGS)]
    public = [{"first": one["first"], "last": one["last"], "purpose": str(Purpose.PUBLIC)} for one in openings]
    free = documents.MAXIMUM_PORT_RANGES - len(public)
    ports = [{"first": at, "last": at, "purpose": "a purpose, [once"} for at in range(2000, 2000 + free)]
    return order(
        command=",[{" * (documents.MAXIMUM_TEXT // 3),
        policy__peers=_peers(documents.MAXIMUM_PEERS),
        policy__ports=[*public, *ports],
        policy__public=openings,
        policy__interfaces=[f"eth{number}" for number in range(documents.MAXIMUM_INTERFACES)],
    )


def test_largest_honest_order_is_understood() -> None:
    message = decode(_largest_order())
    assert isinstance(message, Order) and len(message.policy.peers) == documents.MAXIMUM_PEERS


# That of 100,000 peers takes nearly as much.
_MOST_MEMORY = 8 * documents.MAXIMUM_BYTES


def _peak(line: bytes) -> int:
    """How much memory Python asks for at most while a line is read."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ProtocolError):
            decode(line)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# What takes the most memory for its text.
_DENSE = {
    "lists in lists": b"[" * 200 + b"]" * 200 + b",",
    "lists": b"[],",
    "objects": b"{},",
    "objects with a field": b'{"":0},',
    "whole numbers": b"999,",
    "other numbers": b"1e9,",
    "texts": b'"ab",',
    "texts of wide characters": b'"\\u4e00\\u4e00",',
    "texts of the widest": '"\U0001f600",'.encode(),
}
_WIDE = b"\\ud83d\\ude00"  # the text that it is in takes four bytes a character


@pytest.mark.parametrize("most", [documents.MAXIMUM_BYTES, documents.MAXIMUM_COMMAS, documents.MAXIMUM_BRACKETS])
@pytest.mark.parametrize("unit", _DENSE.values(), ids=list(_DENSE))
def test_no_line_of_a_launchers_takes_more_memory_than_an_honest_one(unit: bytes, most: int) -> None:
    """As many as there may be, and the rest one long text."""
    brackets = unit.count(b"[") + unit.count(b"{")
    each = {documents.MAXIMUM_BYTES: len(unit), documents.MAXIMUM_COMMAS: 1, documents.MAXIMUM_BRACKETS: brackets}[most]
    times = min((most - 100) // each, (documents.MAXIMUM_BYTES - 100) // len(unit)) if each else 0
    start = b'{"order":[' + unit * times + b'"' + _WIDE
    line = start + b"a" * (documents.MAXIMUM_BYTES - len(start) - 3) + b'"]}'
    assert _peak(line) <= _MOST_MEMORY


@pytest.mark.parametrize("form", ['"%s%x":999', '"%s%x":"%s"'])
def test_nor_does_one_of_an_object_with_very_many_fields(form: str) -> None:
    fields = documents.MAXIMUM_COMMAS - 10
    wide = _WIDE.decode()
    made = (form.replace("%x", f"{number:x}").replace("%s", wide) for number in range(fields))
    line = f'{{"order":{{{",".join(made)}}}}}'.encode()
    assert len(line) <= documents.MAXIMUM_BYTES
    assert _peak(line) <= _MOST_MEMORY


def test_what_no_launcher_writes_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []
    monkeypatch.setattr(json, "loads", lambda text, **_: parsed.append(text))
    for unit in (b"0,", b"[]", b"{}"):
        with pytest.raises(ProtocolError, match="more lists, objects or values"):
            decode(b'{"order":[' + unit * (documents.MAXIMUM_COMMAS + 1) + b"0]}")
    assert not parsed


def test_record_that_a_guard_tells_of_may_have_all_that_it_wrote_down() -> None:
    ports = [{"first": 1, "last": 1}] * documents.MAXIMUM_RECORDED_RANGES
    told = Run({"policy": {"ports": ports}, "text": "x" * documents.MAXIMUM_BYTES})
    assert decode(encode(told), of_guard=True) == told
    with pytest.raises(ProtocolError, match="more than"):
        decode(b" " * (documents.MAXIMUM_RECORD_BYTES + 1), of_guard=True)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@given(_JSON)
@settings(max_examples=500, deadline=None)
def test_no_document_makes_the_guard_stumble(document: object) -> None:
    for line in (json.dumps(document), json.dumps({"order": document}), json.dumps({"release": document})):
        try:
            decode(line.encode())
        except ProtocolError:
            continue


@pytest.mark.slow
@given(st.sampled_from(["version", "policy", "firewall", "command"]), _JSON)
@settings(max_examples=300, deadline=None)
def test_no_field_makes_the_guard_stumble(field: str, value: object) -> None:
    try:
        assert isinstance(decode(order(**{field: value})), Order)
    except ProtocolError:
        return


@pytest.mark.slow
@given(st.sampled_from(["run_id", "ports", "peers", "interfaces", "accept"]), _JSON)
@settings(max_examples=300, deadline=None)
def test_no_policy_field_makes_the_guard_stumble(field: str, value: object) -> None:
    try:
        assert isinstance(decode(order(**{f"policy__{field}": value})), Order)
    except ProtocolError:
        return


PUBLIC = Policy(
    "0123456789ab",
    (PortRange(29500, 29500, Purpose.MASTER_PORT), PortRange(8080, 8090, Purpose.PUBLIC)),
    (),
    public=(
        Opening(8080, 8090, collapse(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/64")))),
        Opening(9100, 9100),
    ),
)


def test_public_ports_survive_the_way_and_what_has_none_is_as_it_was_before_there_were_any() -> None:
    message = Order(PUBLIC, "auto", "auto", 10.0, "train.py")
    assert decode(encode(message)) == message
    # A guard or a launcher of a version without them understands what has none, and refuses what has some.
    assert b"public" not in encode(ORDER)


@pytest.mark.parametrize(
    "public",
    [
        [{"first": 0, "last": 1, "networks": []}],
        [{"first": 2, "last": 1, "networks": []}],
        [{"first": 7001, "last": 7001}],
        [{"first": 7001, "last": 7001, "networks": [], "more": 1}],
        [{"first": True, "last": 7001, "networks": []}],
        [{"first": 7001, "last": 7001, "networks": "10.0.0.0/8"}],
        [{"first": 7001, "last": 7001, "networks": ["10.0.0.1/8"]}],
        [{"first": 7001, "last": 7001, "networks": ["fe80::1%eth0"]}],
        [{"first": 7001, "last": 7001, "networks": ["node1"]}],
        [{"first": 7001, "last": 7001, "networks": ["10.0.0.0/8", "10.1.0.0/16"]}],
        [{"first": 7001, "last": 7005, "networks": []}, {"first": 7003, "last": 7003, "networks": []}],
        [{"first": 7003, "last": 7003, "networks": []}, {"first": 7001, "last": 7001, "networks": []}],
        [{"first": 29500, "last": 29500, "networks": []}],
        [{"first": port, "last": port, "networks": []} for port in range(7001, 7130, 2)],
        [{"first": 7001, "last": 7001, "networks": [f"10.{number}.0.0/24" for number in range(65)]}],
        ["7001"],
        {},
        "7001",
    ],
    ids=str,
)
def test_an_order_with_public_ports_that_cannot_be_right_is_refused_whole(public: object) -> None:
    line = order(policy__public=public)
    with pytest.raises(ProtocolError):
        decode(line)


SECRET = JobSecret(bytes(range(32)))
WITH_KEYS = [
    KeyOrder(required=True, secret=SECRET),
    KeyOrder(required=False, secret=SECRET, nodes=2, towards=(ipaddress.ip_network("10.0.0.1"),)),
    KeyOrder(required=False, meeting=bytes(32), in_slurm=True, nodes=1),
    KeyOrder(required=True, meeting=bytes(range(32))),
]


@pytest.mark.parametrize("key", WITH_KEYS)
def test_an_order_with_a_key_survives_the_way_and_one_without_is_of_the_version_before(key: KeyOrder) -> None:
    line = encode(replace(ORDER, key=key))
    assert decode(line) == replace(ORDER, key=key)
    assert json.loads(line)["order"]["version"] == 2
    assert json.loads(encode(ORDER))["order"]["version"] == 1
    assert json.loads(encode(Ready(1)))["ready"]["version"] == 1, "launchers of the release before know no other"


def with_key(**changes: object) -> bytes:
    """An order with a key, with these fields of it changed; None takes one away."""
    document = json.loads(encode(replace(ORDER, key=WITH_KEYS[1])))
    key = document["order"]["key"]
    key.update(changes)
    document["order"]["key"] = {name: value for name, value in key.items() if value is not None}
    return json.dumps(document).encode()


MEETING = {"secret": None, "meeting": "00" * 32, "in_slurm": False}


@pytest.mark.parametrize(
    "line",
    [
        order(key=None),
        order(key={}),
        order(key=json.loads(with_key())["order"]["key"]),
        with_key().replace(b'"version": 2', b'"version": 1'),
        with_key().replace(b'"version": 2', b'"version": 3'),
        with_key(required=1),
        with_key(required=None),
        with_key(nodes=None),
        with_key(nodes=-1),
        with_key(towards=None),
        with_key(towards="10.0.0.1/32"),
        with_key(towards=["10.0.0.0/8"]),
        with_key(towards=["node0"]),
        with_key(towards=["fe80::1%x\n-j ACCEPT/128"]),
        with_key(towards=["10.0.0.1/32"] * 65),
        with_key(nodes=True),
        with_key(nodes=10**9),
        with_key(secret=""),
        with_key(secret="00" * 31),
        with_key(secret="00" * 33),
        with_key(secret="0g" * 32),
        with_key(secret="AB" * 32),
        with_key(secret=" " + "0" * 63),
        with_key(secret="\u0660" * 64),
        with_key(secret=["00" * 32]),
        with_key(secret=0),
        with_key(meeting="00" * 32),
        with_key(in_slurm=False),
        with_key(more=1),
        with_key(**{**MEETING, "in_slurm": 1}),
        with_key(**{**MEETING, "in_slurm": None}),
        with_key(**{**MEETING, "meeting": "../../etc/munge/munge.key"}),
        with_key(**{**MEETING, "path": "/etc/shadow"}),
    ],
)
def test_a_key_that_is_not_exactly_one_is_refused_without_a_word_of_it(line: bytes) -> None:
    with pytest.raises(ProtocolError) as refusal:
        decode(line)
    assert "0" * 12 not in str(refusal.value) and "ABAB" not in str(refusal.value)


def test_nothing_that_is_logged_has_the_key_of_an_order() -> None:
    said = f"{replace(ORDER, key=WITH_KEYS[0])!r} {WITH_KEYS[0]}"
    assert SECRET.reveal().hex() not in said and repr(SECRET.reveal())[2:-1] not in said


def test_versions_of_a_guard_are_for_who_can_read_them() -> None:
    """Launchers of 0.1 take no field that they do not know."""
    assert json.loads(encode(Ready(7))) == {"ready": {"version": 1, "pid": 7}}
    assert encode(Ready(7, VERSIONS), to_any=True) == encode(Ready(7))
    busy = Refused(77, "why", later=True)
    assert json.loads(encode(busy, to_any=True)) == {"refused": {"status": 77, "message": "why"}}
    named = Ready(7, VERSIONS)
    assert decode(encode(named)) == named
    assert reads_versions(launcher_address()) and reads_versions(launcher_address().encode())
    assert not any(reads_versions(address) for address in ("", b"", "\0securerun-0123456789ab", "/run/x"))
    assert launcher_address() != launcher_address()


@pytest.mark.parametrize(
    ("body", "is_understood"),
    [
        ({"version": 1, "pid": 7, "versions": [1, 2, 9]}, True),
        ({"version": 3, "pid": 7, "versions": [2, 3]}, True),
        ({"version": 3, "pid": 7, "versions": [3, 4]}, False),
        ({"version": 3, "pid": 7}, False),
        ({"version": 1, "pid": 7, "versions": [True]}, False),
        ({"version": 1, "pid": 7, "versions": "1"}, False),
        ({"version": 1, "pid": 7, "versions": list(range(65))}, False),
    ],
)
def test_guard_of_another_release_is_understood_where_one_version_is_common(
    body: dict[str, Any], is_understood: bool
) -> None:
    line = json.dumps({"ready": body}).encode()
    if is_understood:
        assert decode(line) == Ready(7, tuple(body["versions"]))
        return
    with pytest.raises(ProtocolError):
        decode(line)
