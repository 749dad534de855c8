"""What a host's own rules do to an opening packet, as far as that can be told from their text.

iptables-save and `nft -j list ruleset` are read into one shape, and walked with one packet. A match that is not
understood may hold or not, so a walk has a set of possible ends; only what is turned away by each of them is certain.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from securerun.linux.networks import Address

ACCEPT, DROP, UNKNOWN = "accept", "drop", "unknown"
_NEXT, _RETURN = "next", "return"
_DEEPEST = 32  # the kernel allows 16 jumps (NFT_JUMP_STACK_SIZE), and no loops
_TCP = 6


@dataclass(frozen=True)
class Packet:
    """A SYN to this host over TCP. interface: through which it comes in; None where that is not known."""

    source: Address
    port: int
    interface: str | None


# Whether a match holds; None where that cannot be told.
Condition = Callable[[Packet], Optional[bool]]


@dataclass(frozen=True)
class Verdict:
    """What a rule does where it holds. kind: accept, drop, unknown, next (nothing), return, jump or goto a chain."""

    kind: str
    chain: str = ""


@dataclass(frozen=True)
class Rule:
    """A rule: what it does where all of its conditions hold."""

    conditions: tuple[Condition, ...]
    verdict: Verdict

    def holds(self, packet: Packet) -> bool | None:
        """Return whether all conditions hold; None where that cannot be told."""
        answers = [condition(packet) for condition in self.conditions]
        return False if False in answers else None if None in answers else True


@dataclass(frozen=True)
class InputChain:
    """A base chain that every packet to this host passes, with the chains of its table.

    version: the IP version that it sees, 4 or 6; 0 for both. table: as a person and its tool name it.
    """

    tool: str
    table: str
    name: str
    version: int
    policy: str
    chains: Mapping[str, Sequence[Rule]] = field(repr=False)

    def turns_away(self, packet: Packet) -> bool:
        """Return whether it certainly drops or rejects the packet."""
        if self.version not in (0, packet.source.version):
            return False
        ends = self._walk(self.name, packet, 0)
        return {self.policy if end in (_NEXT, _RETURN) else end for end in ends} == {DROP}

    def _walk(self, chain: str, packet: Packet, depth: int) -> set[str]:
        if depth > _DEEPEST or chain not in self.chains:
            return {UNKNOWN}
        ends: set[str] = set()
        for rule in self.chains[chain]:
            holds = rule.holds(packet)
            if holds is False:
                continue
            of_rule = self._ends_of(rule.verdict, packet, depth)
            ends |= of_rule - {_NEXT}
            if holds and _NEXT not in of_rule:
                return ends
        return ends | {_NEXT}

    def _ends_of(self, verdict: Verdict, packet: Packet, depth: int) -> set[str]:
        if verdict.kind not in ("jump", "goto"):
            return {verdict.kind} if verdict.kind != UNKNOWN else {UNKNOWN, _NEXT}
        ends = self._walk(verdict.chain, packet, depth + 1)
        back = {_RETURN} if verdict.kind == "goto" else {_NEXT}
        return ends - {_NEXT, _RETURN} | (back if ends & {_NEXT, _RETURN} else set())


def read_saved(text: str, version: int, ours: str) -> Iterator[InputChain]:
    """Yield the INPUT chain of iptables-save's text of the filter table. ours: a chain to leave out."""
    chains: dict[str, list[Rule]] = {}
    policy = ""
    for line in text.splitlines():
        if line.startswith(":"):
            name, word = line[1:].split()[:2]
            chains[name] = []
            policy = _POLICIES.get(word, UNKNOWN) if name == "INPUT" else policy
        elif line.startswith("-A "):
            words = _words(line)
            if not line.endswith(f"-j {ours}") and len(words) > 1:
                chains.setdefault(words[1], []).append(_saved_rule(words[2:]))
    if "INPUT" in chains:
        tool = "iptables" if version == 4 else "ip6tables"
        yield InputChain(tool, "filter", "INPUT", version, policy, chains)


_POLICIES = {"ACCEPT": ACCEPT, "DROP": DROP}
# Targets that let a packet go on to the next rule (iptables-extensions(8)).
_PASSING = frozenset(
    (
        *("AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CONNSECMARK", "DSCP", "LOG", "MARK"),
        *("NFLOG", "SECMARK", "SET", "TCPMSS", "TCPOPTSTRIP", "TOS", "TRACE"),
    )
)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _saved_rule(words: Sequence[str]) -> Rule:
    conditions: list[Condition] = []
    verdict = Verdict(_NEXT)
    position, negated = 0, False
    while position < len(words):
        word = words[position]
        values = _values(words, position + 1)
        position += 1 + len(values)
        if word == "!":
            negated = True
            continue
        if word in ("-j", "-g"):
            verdict = _target(word, values[0] if values else "")
            break  # options of the target follow
        condition = _saved_condition(word, values)
        if condition is not None:
            conditions.append(_negated(condition) if negated else condition)
        negated = False
    return Rule(tuple(conditions), verdict)


def _values(words: Sequence[str], start: int) -> list[str]:
    """Return the words up to the next option; iptables-save writes no value that begins with a dash."""
    values = []
    for word in words[start:]:
        if word == "!" or (word.startswith("-") and len(word) > 1):
            break
        values.append(word)
    return values


def _target(option: str, name: str) -> Verdict:
    if option == "-g":
        return Verdict("goto", name)
    if name in _PASSING:
        return Verdict(_NEXT)
    known = {"ACCEPT": ACCEPT, "DROP": DROP, "REJECT": DROP, "RETURN": _RETURN}
    if name in known:
        return Verdict(known[name])
    # What is neither known here nor a chain of the table is where the walk ends, as unknown.
    return Verdict("jump", name)


def _saved_condition(option: str, values: Sequence[str]) -> Condition | None:
    """Return the condition of one option; None for one that says nothing (the name of a match, a comment)."""
    value = values[0] if values else ""
    if option in ("-m", "--comment"):
        return None
    if option in ("-s", "--source"):
        return lambda packet: _is_in(packet.source, value)
    if option in ("-i", "--in-interface"):
        return lambda packet: _is_named(packet.interface, value)
    if option in ("-p", "--protocol"):
        return lambda _: value in ("tcp", "all", str(_TCP), "0")
    if option in ("--dport", "--dports", "--destination-port", "--destination-ports"):
        return lambda packet: _has_port(value, packet.port)
    if option in ("--state", "--ctstate"):
        return lambda _: "NEW" in value.split(",")
    if option == "--dst-type":
        return lambda _: value == "LOCAL"
    if option == "--tcp-flags" and len(values) == 2:
        return lambda _: _has_flags(*values)
    return lambda _: None


def _negated(condition: Condition) -> Condition:
    def opposite(packet: Packet) -> bool | None:
        answer = condition(packet)
        return None if answer is None else not answer

    return opposite


def _is_in(address: Address, text: str) -> bool | None:
    try:
        return address in ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _is_named(interface: str | None, pattern: str) -> bool | None:
    """Return whether a packet came through an interface; `eth+` and `eth*` are all that begin so."""
    if pattern == "lo":
        return False
    if interface is None:
        return None
    return interface.startswith(pattern[:-1]) if pattern[-1:] in ("+", "*") else interface == pattern


def _has_port(text: str, port: int) -> bool | None:
    """Return whether a port is in a list such as `22,8000:8010`."""
    ranges = [re.fullmatch(r"(\d+)(?::(\d+))?", word) for word in text.split(",")]
    ends = [(int(match[1]), int(match[2] or match[1])) for match in ranges if match]
    return any(first <= port <= last for first, last in ends) if len(ends) == len(ranges) else None


def _has_flags(looked_at: str, wanted: str) -> bool:
    """Return whether a SYN, which has no other flag, has of these flags those that are wanted."""
    every = {"FIN", "SYN", "RST", "PSH", "ACK", "URG"}
    named = [
        every if word == "ALL" else set() if word == "NONE" else set(word.split(",")) for word in (looked_at, wanted)
    ]
    return named[0] & {"SYN"} == named[1]


# --- nftables' own JSON (libnftables-json(5)) ----------------------------------------------------------

_VERSIONS = {"ip": 4, "ip6": 6, "inet": 0}


def read_listed(text: str, ours: str) -> Iterator[InputChain]:
    """Yield the base chains at the input hook in the output of `nft -j list ruleset`. ours: how our tables begin."""
    objects = [item for item in json.loads(text).get("nftables", ()) if isinstance(item, dict)]
    sets: dict[tuple[str, str, str], Any] = {}
    tables: dict[tuple[str, str], dict[str, list[Rule]]] = {}
    for item in objects:
        for kind, body in item.items():
            if kind in ("set", "map"):
                sets[body["family"], body["table"], body["name"]] = body.get("elem", [])
            elif kind == "chain":
                tables.setdefault((body["family"], body["table"]), {})[body["name"]] = []
    for item in objects:
        body = item.get("rule")
        if body:
            reader = _ListedRule(sets, body["family"], body["table"])
            tables[body["family"], body["table"]][body["chain"]] += reader.rules(body.get("expr", []))
    for item in objects:
        body = item.get("chain")
        if body and body.get("hook") == "input" and body["family"] in _VERSIONS and not body["table"].startswith(ours):
            chains = tables[body["family"], body["table"]]
            version = _VERSIONS[body["family"]]
            place = f"{body['family']} {body['table']}"
            yield InputChain("nft", place, body["name"], version, body.get("policy", ACCEPT), chains)


class _ListedRule:
    """Reads the expressions of one table's rules."""

    def __init__(self, sets: Mapping[tuple[str, str, str], Any], family: str, table: str) -> None:
        self._sets = sets
        self._family = family
        self._table = table

    def rules(self, expressions: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
        """Read a rule as one of ours; one with a verdict map is one for each of its elements."""
        conditions: list[Condition] = []
        for expression in expressions:
            ((kind, body),) = expression.items()
            if kind == "match":
                conditions.append(self._match(body))
            elif kind == "vmap":
                for key, verdict in self._elements(body["data"]):
                    matches = self._compared(body["key"], key)
                    yield Rule((*conditions, matches), _listed_verdict(verdict))
                return
            elif kind in _STATEMENTS:
                continue
            elif kind in _VERDICTS:
                yield Rule(tuple(conditions), _listed_verdict(expression))
                return
            else:  # limit, xt, queue, ...: it may match or not, end the walk or not
                conditions.append(lambda _: None)
                yield Rule(tuple(conditions), Verdict(UNKNOWN))

    def _match(self, body: Mapping[str, Any]) -> Condition:
        compared = self._compared(body["left"], body["right"])
        if body["op"] == "!=":
            return _negated(compared)
        return compared if body["op"] in ("==", "in") else lambda _: None

    def _compared(self, left: Any, right: Any) -> Condition:  # noqa: ANN401 - JSON
        return lambda packet: self._is(_value_of(left, packet), right)

    def _is(self, value: Any, right: Any) -> bool | None:  # noqa: ANN401 - JSON
        """Return whether a packet's value is the right side of a match, or among it. None: not known."""
        if value is None:
            return None
        if value == ():  # a packet that has no such field, or no such state
            return False
        if isinstance(right, str) and right.startswith("@"):
            right = {"set": self._sets.get((self._family, self._table, right[1:]))}
        if isinstance(right, list):
            right = {"set": right}
        if isinstance(right, dict) and "set" in right:
            if right["set"] is None:
                return None
            answers = [self._is(value, _element(element)) for element in right["set"]]
            return True if True in answers else None if None in answers else False
        if isinstance(right, dict) and "range" in right:
            return _is_between(value, *right["range"])
        if isinstance(right, dict) and "prefix" in right:
            return _is_in(value, f"{right['prefix']['addr']}/{right['prefix']['len']}")
        return _is_equal(value, right)

    def _elements(self, data: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 - JSON
        if isinstance(data, str):
            data = {"set": self._sets.get((self._family, self._table, data[1:])) or []}
        return [(_element(element[0]), element[1]) for element in data["set"]]


_VERDICTS = frozenset({"accept", "drop", "reject", "return", "jump", "goto", "continue"})
_STATEMENTS = frozenset({"counter", "log", "mangle", "notrack", "flow", "ct helper", "ct timeout", "secmark"})


def _listed_verdict(body: Mapping[str, Any]) -> Verdict:
    ((kind, argument),) = body.items()
    if kind in ("jump", "goto"):
        return Verdict(kind, argument["target"])
    return Verdict({"reject": DROP, "continue": _NEXT}.get(kind, kind))


def _value_of(left: Any, packet: Packet) -> Any:  # noqa: ANN401 - JSON
    """Return what the left of a match is of this packet; None where that is not known, a tuple for one of several."""
    if not isinstance(left, dict):
        return None
    ((kind, body),) = left.items()
    if kind == "ct":
        return {"state": ("new",), "status": (), "direction": "original"}.get(body.get("key"))
    if kind == "fib":
        return "local" if body.get("result") == "type" and body.get("flags") == "daddr" else None
    if kind == "meta":
        return _meta_of(body.get("key"), packet)
    if kind == "payload":
        protocol = f"ip{'' if packet.source.version == 4 else '6'}"
        field = (body.get("protocol"), body.get("field"))
        if field[0] in ("ip", "ip6") and field[0] != protocol:
            return ()
        if field == (protocol, "saddr"):
            return packet.source
        if field in (("tcp", "dport"), ("th", "dport")):
            return packet.port
        if field[0] in ("udp", "icmp", "icmpv6", "sctp", "dccp", "esp", "ah"):
            return ()
        return ("tcp", str(_TCP)) if field in (("ip", "protocol"), ("ip6", "nexthdr")) else None
    return None


def _meta_of(key: Any, packet: Packet) -> Any:  # noqa: ANN401 - JSON
    family = "ipv4" if packet.source.version == 4 else "ipv6"
    known: dict[Any, Any] = {
        "iifname": packet.interface or _Unnamed(),
        "iif": packet.interface or _Unnamed(),
        "iiftype": None,
        "l4proto": ("tcp", str(_TCP)),
        "nfproto": family,
        "protocol": ("ip",) if family == "ipv4" else ("ip6",),
    }
    return known.get(key)


class _Unnamed:
    """An interface of which nobody knows the name, but that it is not the loopback."""


def _is_equal(value: Any, right: Any) -> bool | None:  # noqa: ANN401 - JSON
    if isinstance(value, _Unnamed):
        return False if right == "lo" else None
    if isinstance(value, tuple):
        return str(right) in value
    if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
        return _is_in(value, str(right))
    if isinstance(value, int):
        return value == right if isinstance(right, int) else None
    return _is_named(str(value), str(right))


def _is_between(value: Any, first: Any, last: Any) -> bool | None:  # noqa: ANN401 - JSON
    if isinstance(value, int) and isinstance(first, int) and isinstance(last, int):
        return first <= value <= last
    if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
        try:
            ends = (ipaddress.ip_address(first), ipaddress.ip_address(last))
        except ValueError:
            return None
        return int(ends[0]) <= int(value) <= int(ends[1]) if ends[0].version == value.version else False
    return None


def _element(element: Any) -> Any:  # noqa: ANN401 - JSON
    """Return an element of a set, without its time-out, counter or comment."""
    return element["elem"]["val"] if isinstance(element, dict) and "elem" in element else element
