"""100,000 documents at the guard's door: nothing is done for any that is not an order, and the guard never stumbles.

What an order is, is said a second time here, in other words than the guard's own (`is_order`); what an ordinary user
may ask for as well (`is_permitted`). The bulk goes through the guard's own code between its input and its first act;
a part goes to real guards, started by a user through systemd's socket, and the host is as before.
"""

from __future__ import annotations

import copy
import ipaddress
import json
import os
import random
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from conversation import Conversation, nothing_left, order, socket_unit
from hosts import Host
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from users import PrivateMachine, User

from securerun.errors import SecurerunError
from securerun.guard.channel import Channel
from securerun.guard.documents import ProtocolError
from securerun.guard.limits import SitePolicy, require_permitted
from securerun.guard.protocol import Order
from securerun.guard.server import Orders

_EXAMPLES = 500
_DOCUMENTS = 200  # an example
_REAL = 80
# Decoding may take a few times what a document of 8 MB takes, and no more of it after 100,000 than after one.
_LONGEST_BYTES = 8 * 1024 * 1024
_MEMORY_BYTES = 256 * 1024 * 1024
_LARGE = 100_000

_TEXTS = (
    *("", "auto", "off", "process", "0123456789ab", "0123456789AB", "../../etc", "10.0.0.1", "10.0.0.0/8", "0.0.0.0/0"),
    *("::/0", "fe80::1%eth0", "fe80::1%x\n-A INPUT -j ACCEPT/128", "::ffff:10.0.0.1", "10.0.0.1/24", "1", "eth0", "-j"),
    *("eth0 -j ACCEPT", "\x00", "\ud800", "\x1b[2J", "%s%n", "$(reboot)", "`id`", "x" * 5000, "é", "١٢٣", "a;b", "\n"),
)
_NUMBERS = (0, -1, 1, 22, 1023, 1024, 29500, 65535, 65536, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"))
_VALUES: tuple[Any, ...] = (*_TEXTS, *_NUMBERS, float("inf"), None, True, False, [], {}, [[]], {"": None})


class _Caller:
    """An ordinary user, as `require_permitted` looks at one."""

    user = 6001
    groups = frozenset({6001})
    is_root = False
    container = ""


def is_order(document: Any) -> bool:  # noqa: ANN401 - anything at all
    """Whether this is an order, by the words of the design: known fields, right types, sizes and characters."""
    if not _has(document, "order") or type(document["order"]) is not dict:
        return False
    body = document["order"]
    more = ("key",) if "key" in body else ()
    of_slurm = ("slurm",) if "slurm" in body else ()
    return (
        _has(body, "version", "policy", "firewall", "scope", "grace", "command", "adopt", *more, *of_slurm)
        and body["version"] == 1 + len(more)
        and type(body["version"]) is int
        and body["firewall"] in ("auto", "iptables", "nftables", "legacy", "off")
        and body["scope"] in ("auto", "process", "ports")
        and type(body["grace"]) in (int, float)
        and 0 <= body["grace"] <= 86400
        and type(body["command"]) is str
        and len(body["command"]) <= 4096
        and body["command"].isprintable()
        and type(body["adopt"]) is bool
        and _is_policy(body["policy"])
        and (not more or _is_key(body["key"]))
        and (not of_slurm or _is_of_slurm(body["slurm"]))
    )


def _is_of_slurm(job: Any) -> bool:  # noqa: ANN401 - anything at all
    """Whether this is what an order may say of a job of Slurm's: flags and a number, and of a whole job its place."""
    is_whole = type(job) is dict and "cgroup" in job
    if not _has(job, "job", "speaks", "renews", *(("user", "cgroup", "more") if is_whole else ())):
        return False
    number = job["job"]
    if type(number) is not int or not 0 < number < 2**32 or {type(job["speaks"]), type(job["renews"])} != {bool}:
        return False
    if not is_whole:
        return True
    user, more, cgroup = job["user"], job["more"], job["cgroup"]
    place = rf"/system\.slice/([\w.-]+_)?slurmstepd\.scope/job_{number}"
    return (
        type(user) is int
        and 0 <= user < 2**32 - 1
        and type(more) is str
        and len(more) <= 4096
        and more.isprintable()
        and type(cgroup) is str
        and re.fullmatch(place, cgroup, re.ASCII) is not None
    )


def _is_key(key: Any) -> bool:  # noqa: ANN401 - anything at all
    """Whether this is what an order may say of the job's key: no path, nobody's name, two texts of one form."""
    of_launcher = _has(key, "required", "nodes", "towards", "through_any", "secret")
    if not of_launcher and not (
        _has(key, "required", "nodes", "towards", "through_any", "meeting", "in_slurm")
        and type(key["in_slurm"]) is bool
    ):
        return False
    digest = key["secret" if of_launcher else "meeting"]
    return (
        type(key["required"]) is bool
        and type(key["nodes"]) is int
        and 0 <= key["nodes"] <= 1_000_000
        and _are_addresses(key["towards"])
        and type(key["through_any"]) is bool
        and type(digest) is str
        and re.fullmatch("[0-9a-f]{64}", digest) is not None
    )


def _are_addresses(networks: Any) -> bool:  # noqa: ANN401 - anything at all
    if type(networks) is not list or len(networks) > 64:
        return False
    if not all(type(one) is str and re.fullmatch(r"[0-9a-fA-F.:/]+", one) for one in networks):
        return False
    try:
        return all(ipaddress.ip_network(one).num_addresses == 1 for one in networks)
    except ValueError:
        return False


def is_permitted(document: Any) -> bool:  # noqa: ANN401 - anything at all
    """Whether an ordinary user may have this order where the site says nothing else."""
    policy = document["order"]["policy"]
    ports = {number for port in policy["ports"] for number in range(port["first"], port["last"] + 1)}
    peers = [ipaddress.ip_network(peer) for peer in policy["peers"]]
    addresses = {version: sum(peer.num_addresses for peer in peers if peer.version == version) for version in (4, 6)}
    public = policy.get("public", [])
    return (
        all(number >= 1024 for number in ports)
        and all(one["first"] >= 1024 for one in public)
        and len(ports) + sum(one["last"] - one["first"] + 1 for one in public if not one["networks"]) <= 256
        and addresses[4] <= 2**24
        and addresses[6] <= 2**112
        and not policy["accept"]
    )


def _is_policy(policy: Any) -> bool:  # noqa: ANN401 - anything at all
    return (
        type(policy) is dict
        and set(policy) - {"public"} == {"run_id", "ports", "peers", "interfaces", "accept", "close_loopback"}
        and type(policy["run_id"]) is str
        and re.fullmatch("[0-9a-f]{12}", policy["run_id"]) is not None
        and type(policy["accept"]) is bool
        and type(policy["close_loopback"]) is bool
        and type(policy["ports"]) is type(policy["peers"]) is type(policy["interfaces"]) is list
        and all(_is_port(port) for port in policy["ports"])
        and len(policy["interfaces"]) <= 64
        and all(
            type(name) is str and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}", name)
            for name in policy["interfaces"]
        )
        and _are_peers(policy["peers"])
        and ("public" not in policy or _are_openings(policy["public"], policy["ports"]))
    )


# Who gets at one of these has the job.
_OF_THE_NODES = {
    *("rendezvous store (c10d)", "master port (static rendezvous)", "parallel store (torch_npu_run)"),
    *("rendezvous endpoint", "master port", "HCCL", "HCCL (rank table)", "HCCL (default range)"),
}


def _are_openings(public: Any, ports: list[Any]) -> bool:  # noqa: ANN401 - anything at all
    """Whether public ports are right beside this plan, whose ports are."""
    if type(public) is not list or len(public) > 64:
        return False
    of_nodes = {n for port in ports if port["purpose"] in _OF_THE_NODES for n in range(port["first"], port["last"] + 1)}
    planned = {number for port in ports for number in range(port["first"], port["last"] + 1)}
    last = 0
    for one in public:
        if not (
            _has(one, "first", "last", "networks")
            and type(one["first"]) is type(one["last"]) is int
            and last < one["first"] <= one["last"] <= 65535
            and type(one["networks"]) is list
            and len(one["networks"]) <= 64
            and _are_peers(one["networks"])
        ):
            return False
        last = one["last"]
        numbers = set(range(one["first"], one["last"] + 1))
        if numbers & of_nodes or (not numbers <= planned if one["networks"] else numbers & planned):
            return False
    return True


def _is_port(port: Any) -> bool:  # noqa: ANN401 - anything at all
    return (
        _has(port, "first", "last", "purpose")
        and type(port["first"]) is type(port["last"]) is int
        and 1 <= port["first"] <= port["last"] <= 65535
        and type(port["purpose"]) is str
        and re.fullmatch("[ -~]{1,80}", port["purpose"]) is not None
    )


def _are_peers(peers: list[Any]) -> bool:
    if not all(type(peer) is str and re.fullmatch(r"[0-9a-fA-F.:/]+", peer) for peer in peers):
        return False
    try:
        networks = [ipaddress.ip_network(peer) for peer in peers]
    except ValueError:
        return False
    by_version = [[n for n in networks if n.version == version] for version in (4, 6)]
    collapsed = [*ipaddress.collapse_addresses(by_version[0]), *ipaddress.collapse_addresses(by_version[1])]  # type: ignore[type-var]
    mapped = any(n.version == 6 and n.network_address.ipv4_mapped and n.prefixlen >= 96 for n in networks)
    return networks == collapsed and not mapped


def _has(document: Any, *names: str) -> bool:  # noqa: ANN401 - anything at all
    return type(document) is dict and set(document) == set(names)


def mutated(chance: random.Random) -> bytes:
    """A line that began as a right order: a few values, names or bytes of it are others now; some are right still."""
    document: Any = order(
        run_id=f"{chance.getrandbits(48):012x}",
        ports=chance.choice(((29500,), (29500, (60000, 60015)), (22,), ((2000, 3000),), ())),
        peers=chance.choice((("10.0.0.1/32", "fd00::/64"), ("10.0.0.0/7",), ("0.0.0.0/0",), ("fc00::/7",), ())),
        accept=chance.random() < 0.1,
    )
    if chance.random() < 0.3:
        _make_public(document["order"]["policy"], chance)
    if chance.random() < 0.3:
        _give_key(document["order"], chance)
    if chance.random() < 0.3:
        _give_job_of_slurm(document["order"], chance)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        document = _changed(document, chance)
    line = json.dumps(document).encode()
    if chance.random() < 0.15:
        line = _damaged(line, chance)
    return line.replace(b"\n", b" ")


def _give_key(body: dict[str, Any], chance: random.Random) -> None:
    """Have the order be one with a key, mostly such as may be."""
    digest = chance.choice(("5a" * 32, "0123456789abcdef" * 4, "5A" * 32, "5a" * 31, "/etc/shadow"))
    body["version"] = chance.choice((2, 2, 2, 1, 3))
    towards = chance.choice(([], ["10.0.0.1/32", "fd00::7/128"], ["10.0.0.1"], ["10.0.0.0/24"]))
    body["key"] = {
        "required": chance.random() < 0.3,
        "nodes": chance.choice((0, 2, 1_000_001)),
        "towards": towards,
        "through_any": chance.choice((True, False)),
    }
    if chance.random() < 0.5:
        body["key"]["secret"] = digest
    if "secret" not in body["key"] or chance.random() < 0.1:
        body["key"].update(meeting=digest, in_slurm=chance.random() < 0.5)


def _give_job_of_slurm(body: dict[str, Any], chance: random.Random) -> None:
    """Have the order be for a job of Slurm's, mostly such as may be."""
    number = chance.choice((7, 7, 7, 0, 2**32))
    body["slurm"] = {"job": number, "speaks": chance.random() < 0.5, "renews": chance.random() < 0.5}
    if chance.random() < 0.5:
        scope = chance.choice(("slurmstepd.scope", "cn1_slurmstepd.scope", "sshd.scope", "../slurmstepd.scope"))
        cgroup = f"/system.slice/{scope}/job_{chance.choice((number, number, 8))}"
        body["slurm"].update(user=chance.choice((0, 1000, -1)), cgroup=cgroup, more=chance.choice(("", "login1", "\n")))


def _make_public(policy: dict[str, Any], chance: random.Random) -> None:
    """Add public ports, mostly such as may be."""
    first = chance.choice((7001, 7001, 7001, 1023, 6500))
    policy["public"] = [{"first": first, "last": 7001, "networks": []}]
    if chance.random() < 0.5:
        networks = chance.choice((["10.9.0.0/16", "fd09::/32"], ["0.0.0.0/0"], ["10.9.0.0/15"], ["10.9.0.1/16"]))
        policy["public"] += [{"first": 7003, "last": 7004, "networks": networks}]
        if chance.random() < 0.8:
            policy["ports"] += [{"first": 7003, "last": 7004, "purpose": "public to some networks (--public)"}]
    if chance.random() < 0.2:
        policy["public"] += [{"first": chance.choice((7002, 7004, 29500)), "last": 29500, "networks": []}]


def _changed(document: Any, chance: random.Random) -> Any:  # noqa: ANN401 - anything at all
    """The document with one place in it changed, taken away, doubled or added."""
    document = copy.deepcopy(document)
    places = _places(document)
    if not places:
        return chance.choice(_VALUES)
    container, key = chance.choice(places)
    change: Callable[[], None] = chance.choice(
        (
            lambda: container.__setitem__(key, chance.choice(_VALUES)),
            lambda: container.__setitem__(key, chance.choice(_VALUES)),
            lambda: container.__delitem__(key),
            lambda: _add(container, key, chance),
            lambda: container.__setitem__(
                key, [container[key]] * chance.choice((1, 2) if _is_large(document) else (1, 2, 300))
            ),
        )
    )
    with suppress(RecursionError):
        change()
    return document


def _is_large(document: Any) -> bool:  # noqa: ANN401 - anything at all
    """Whether 300 of it would be many times what a guard reads, and more than the test itself should hold."""
    size, left = 0, [document]
    while left and size < _LARGE:
        value = left.pop()
        size += len(value) if isinstance(value, str) else 1
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return size >= _LARGE


def _add(container: Any, key: Any, chance: random.Random) -> None:  # noqa: ANN401 - anything at all
    if isinstance(container, list):
        container.append(copy.deepcopy(container[key]) if chance.random() < 0.5 else chance.choice(_VALUES))
    else:
        container[chance.choice(("path", "pid", "user", "", "order", "__class__"))] = chance.choice(_VALUES)


def _places(document: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 - anything at all
    found: list[tuple[Any, Any]] = []
    left = [document]
    while left:
        value = left.pop()
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            found.append((value, key))
            if isinstance(value[key], (dict, list)):
                left.append(value[key])
    return found


def _damaged(line: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(line))
    return chance.choice(
        (
            line[:place],
            line[:place] + os.urandom(3) + line[place:],
            line[:place] + line[place + 1 :],
            line + line,
            b"[" * 5000 + line,
            line.decode().encode("utf-16"),
            line.replace(b'"scope"', b'"scope": "off", "scope"'),
        )
    )


def acted_upon(line: bytes) -> Order | None:
    """What the guard would act upon, after all that its code does before the first act; None when it refuses."""
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        orders = Orders(Channel(reading, os.O_RDONLY))
        data = line + b"\n"
        message = None
        while message is None and not orders.ended:
            if data:
                data = data[os.write(writing, data[:65536]) :]
            elif writing >= 0:
                os.close(writing)
                writing = -1
            message = orders.read()
        if not isinstance(message, Order):
            return None
        require_permitted(SitePolicy(), message, _Caller())  # type: ignore[arg-type]
        return message
    except (ProtocolError, SecurerunError):
        return None
    finally:
        for descriptor in {reading, writing, orders.descriptor} - {-1}:
            os.close(descriptor)


def _understood(line: bytes) -> Any:  # noqa: ANN401 - anything at all
    """The document of a line by Python's own reader; None where it is none, says something twice, or is too long."""
    if len(line) > _LONGEST_BYTES:
        return None
    doubled: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        doubled.extend(name for name in names if names.count(name) > 1)
        return dict(pairs)

    try:
        document = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return None if doubled else document


@pytest.mark.slow
@settings(max_examples=_EXAMPLES, deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(min_value=0, max_value=2**64))
def test_of_a_hundred_thousand_documents_only_orders_are_acted_upon(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - to be had again from the seed
    for _ in range(_DOCUMENTS):
        line = mutated(chance)
        document = _understood(line)
        wanted = document is not None and is_order(document) and is_permitted(document)
        assert (acted_upon(line) is not None) == wanted, line[:2000]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < _peak_before() + _MEMORY_BYTES


def _peak_before(peak: list[int] = []) -> int:  # noqa: B006 - remembered from the first call on
    if not peak:
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return peak[0]


@pytest.mark.slow
@settings(max_examples=500, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=2000) | st.recursive(st.none() | st.text(), st.lists).map(json.dumps).map(str.encode))
def test_bytes_that_were_never_an_order_are_refused(data: bytes) -> None:
    assert acted_upon(data.replace(b"\n", b"")) is None


@pytest.fixture(scope="module")
def door(node: Host) -> Iterator[tuple[PrivateMachine, Host, User]]:
    """A machine whose user alice may connect to systemd's socket, in a host."""
    with PrivateMachine() as machine, socket_unit(machine, node):
        yield machine, node, machine.add_user("alice")


def test_real_guards_answer_each_document_and_leave_the_host_as_it_was(
    door: tuple[PrivateMachine, Host, User],
) -> None:
    machine, host, alice = door
    chance = random.Random(20261122)  # noqa: S311 - the same documents each time
    with nothing_left(machine, host):
        for _ in range(_REAL):
            line = mutated(chance)
            document = _understood(line)
            wanted = document is not None and is_order(document) and is_permitted(document)
            talk = Conversation(machine, host, alice, "socket")
            talk.say(line + b"\n")
            verdict = talk.hear_verdict()
            if not wanted:
                assert "refused" in verdict, (line[:2000], verdict)
            else:
                assert "guarding" in verdict or "refused" in verdict, (line[:2000], verdict)
            talk.hang_up()
