"""What launcher and guard say to each other: one JSON object a line, each with exactly one key that names it.

    launcher → guard   order      the policy and which layers to install; the first line, once
                       peers      while the job runs: who may connect from now on
                       release    the job is over, whether it failed, and whether the launcher's process goes on; then
                                  end of input
                       report     instead of an order, any number of times: which runs has this user?
    guard → launcher   ready      the guard is up and takes its order
                       runs       how many `run` messages follow, each with one record of /run/securerun
                       guarding   the layers that stand now
                       notice     while the job runs: who was turned away, and what else a person should know
                       refused    the exit status and one line why: nothing stands, or the job that runs is to end now,
                                  since what it insists on cannot be kept
                       released   who was turned away, and why a launcher that goes on is in the job still, if it is

The guard may run with more privilege than whoever talks to it: what is not exactly one of these is refused whole, as
`securerun.guard.documents` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Union

from securerun.errors import PolicyError
from securerun.firewall.backends import NAMES as BACKENDS
from securerun.firewall.policy import NAMESPACE, Denial, Layer, Policy
from securerun.guard import documents
from securerun.guard.documents import (
    MAXIMUM_BYTES,
    MAXIMUM_PEERS,
    MAXIMUM_TEXT,
    ProtocolError,
    denial_document,
    layer_document,
    policy_document,
    read_denial,
    read_layer,
    read_network,
    read_policy,
)
from securerun.linux.networks import Network

VERSION = 1
# It tells the processes of a run where no cgroup holds them together, and a launcher which run is around it.
RUN_ID_VARIABLE = "SECURERUN_RUN_ID"
FIREWALLS = ("auto", *BACKENDS, "off")
SCOPES = ("auto", "process", "ports")
MAXIMUM_GRACE_SECONDS = 24 * 3600


def presence_of(run_id: str) -> str:
    """Return the abstract address at which the guard of a run stands (unix(7)): of its network namespace."""
    return f"\0securerun-{run_id}"


@dataclass(frozen=True)
class Order:
    """What the launcher asks for: guard this job by this policy.

    firewall: which port chains; `auto` takes what the host has, `off` none.
    scope: `process` insists on the shield, `ports` leaves it out, `auto` takes the stronger of what can be had.
    grace: seconds between SIGTERM and SIGKILL for what a failed job leaves behind.
    command: how the user started the job, for people who ask what a run is.
    adopt: a guard of this run has died; take over what it left.
    """

    policy: Policy
    firewall: str
    scope: str
    grace: float
    command: str
    adopt: bool = False


@dataclass(frozen=True)
class Peers:
    """Who may connect from now on, in place of the order's peers: names may come to stand for other addresses."""

    networks: tuple[Network, ...]


@dataclass(frozen=True)
class Release:
    """The job is over. failed: it did not end well. goes_on: the launcher's process does, and wants to be out of it."""

    failed: bool
    goes_on: bool = False


@dataclass(frozen=True)
class Report:
    """Asks for the records of the caller's own runs, which only root can read in /run/securerun."""


@dataclass(frozen=True)
class Runs:
    """How many messages of one run each follow."""

    count: int


@dataclass(frozen=True)
class Run:
    """One run's record, as `securerun.guard.records` writes it."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Ready:
    """A guard is up, has found whom it serves, and waits for the order. pid: the guard's process id."""

    pid: int


@dataclass(frozen=True)
class Guarding:
    """The layers that stand, proven. notes: what a person should know about layers that do not, or promise less.

    left_out: first and last of ports of the order's plan that are not in force, since nobody asked for them.
    needs_guard: the shield may be switched off on this kernel (securerun.guard.proof), which only a guard notices.
    """

    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[int, int], ...] = ()
    needs_guard: bool = False

    @property
    def has_shield(self) -> bool:
        """Whether the shield is one of them: then no port of the job is open to strangers, planned or not."""
        return any(layer.is_shield for layer in self.layers)

    @property
    def is_apart(self) -> bool:
        """Whether the job is in a network of its own, which no guard closes: nobody can come to any port of it."""
        return any(layer.backend == NAMESPACE for layer in self.layers)


@dataclass(frozen=True)
class Notice:
    """News of a run.

    denied: who was turned away, with the count so far; words: anything else, a line each; more: how many other sources
    were turned away in the last minute.
    """

    denied: tuple[Denial, ...] = ()
    words: tuple[str, ...] = ()
    more: int = 0


@dataclass(frozen=True)
class Refused:
    """Nothing stands, or what stands is no longer what was ordered, and the launcher has to end its job.

    status: the launcher's exit status; message: one line, what is wrong and what to do.
    later: whether another guard may be had in a moment.
    """

    status: int
    message: str
    later: bool = False


@dataclass(frozen=True)
class Released:
    """The lease ends with the job's last process.

    denied: who was turned away so far; more: how many packets of others, of whom there were too many. stays: why a
    launcher that goes on is in the job still, "" where it is out of it.
    """

    denied: tuple[Denial, ...]
    more: int = 0
    stays: str = ""


Message = Union[Order, Peers, Release, Report, Ready, Runs, Run, Guarding, Notice, Refused, Released]


def mark_of(run_id: str) -> str:
    """Return what the processes of a run have in the environment that they were started with."""
    return f"{RUN_ID_VARIABLE}={run_id}"


def encode(message: Message) -> bytes:
    """Return the one line, with its newline, that `decode` reads back."""
    return json.dumps({_NAMES[type(message)]: _body(message)}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Read one line. Raises ProtocolError for anything that is not exactly a message of this protocol."""
    if len(line) > MAXIMUM_BYTES:
        raise ProtocolError(f"a message of more than {MAXIMUM_BYTES} bytes")
    try:
        document = json.loads(line.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message that is not JSON") from error
    if not isinstance(document, dict) or len(document) != 1:
        raise ProtocolError("a message that is not an object with one key")
    ((name, body),) = document.items()
    if name not in _READERS:
        raise ProtocolError(f"a message of unknown kind {name[:40]!r}")
    if not isinstance(body, dict):
        raise ProtocolError(f"{name}: not an object")
    try:
        return _READERS[name](body)
    except (PolicyError, ValueError) as error:
        raise ProtocolError(f"{name}: {error}") from error


def _body(message: Message) -> dict[str, Any]:
    if isinstance(message, Order):
        return {
            "version": VERSION,
            "policy": policy_document(message.policy),
            "firewall": message.firewall,
            "scope": message.scope,
            "grace": message.grace,
            "command": message.command,
            "adopt": message.adopt,
        }
    if isinstance(message, Peers):
        return {"networks": [str(network) for network in message.networks]}
    if isinstance(message, Release):
        return {"failed": message.failed, **_given(goes_on=message.goes_on)}
    if isinstance(message, Report):
        return {}
    if isinstance(message, Runs):
        return {"count": message.count}
    if isinstance(message, Run):
        return {"record": message.record}
    if isinstance(message, Ready):
        return {"version": VERSION, "pid": message.pid}
    if isinstance(message, Guarding):
        layers = [layer_document(layer) for layer in message.layers]
        few = _given(left_out=[list(ports) for ports in message.left_out], needs_guard=message.needs_guard)
        return {"layers": layers, "notes": list(message.notes), **few}
    if isinstance(message, Notice):
        denied = [denial_document(denial) for denial in message.denied]
        return {"denied": denied, "words": list(message.words), **_given(more=message.more)}
    if isinstance(message, Refused):
        return {"status": message.status, "message": message.message, **_given(later=message.later)}
    denied = [denial_document(denial) for denial in message.denied]
    return {"denied": denied, **_given(more=message.more, stays=message.stays)}


def _given(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON's own types
    """Return the fields that are not 0, false or empty, as mostly they are: a version without them reads the rest."""
    return {name: value for name, value in fields.items() if value}


def _read_order(body: Mapping[str, Any]) -> Order:
    documents.require_fields(body, "version", "policy", "firewall", "scope", "grace", "command", "adopt")
    _require_version(body, "the launcher")
    return Order(
        policy=read_policy(documents.mapping(body["policy"], "policy")),
        firewall=_choice(body, "firewall", FIREWALLS),
        scope=_choice(body, "scope", SCOPES),
        grace=_seconds(body, "grace"),
        command=_printable(body, "command"),
        adopt=documents.flag(body, "adopt"),
    )


def _read_peers(body: Mapping[str, Any]) -> Peers:
    documents.require_fields(body, "networks")
    return Peers(tuple(read_network(peer) for peer in documents.items(body, "networks", MAXIMUM_PEERS)))


def _read_release(body: Mapping[str, Any]) -> Release:
    documents.require_fields(body, "failed", may={"goes_on"})
    return Release(documents.flag(body, "failed"), _flag_if_given(body, "goes_on"))


def _read_report(body: Mapping[str, Any]) -> Report:
    documents.require_fields(body)
    return Report()


def _read_runs(body: Mapping[str, Any]) -> Runs:
    documents.require_fields(body, "count")
    return Runs(documents.number(body, "count"))


def _read_run(body: Mapping[str, Any]) -> Run:
    documents.require_fields(body, "record")
    return Run(documents.mapping(body["record"], "a record"))


def _read_ready(body: Mapping[str, Any]) -> Ready:
    documents.require_fields(body, "version", "pid")
    _require_version(body, "the guard")
    return Ready(documents.number(body, "pid"))


def _read_guarding(body: Mapping[str, Any]) -> Guarding:
    documents.require_fields(body, "layers", "notes", may={"left_out", "needs_guard"})
    layers = tuple(read_layer(layer) for layer in documents.items(body, "layers", MAXIMUM_TEXT))
    notes = tuple(documents.entry(note) for note in documents.items(body, "notes", MAXIMUM_TEXT))
    left_out = documents.ranges(body, "left_out") if "left_out" in body else ()
    return Guarding(layers, notes, left_out, _flag_if_given(body, "needs_guard"))


def _read_notice(body: Mapping[str, Any]) -> Notice:
    documents.require_fields(body, "denied", "words", may={"more"})
    denied = tuple(read_denial(denial) for denial in documents.items(body, "denied", MAXIMUM_PEERS))
    words = tuple(documents.entry(line) for line in documents.items(body, "words", MAXIMUM_TEXT))
    return Notice(denied, words, _read_more(body))


def _read_refused(body: Mapping[str, Any]) -> Refused:
    documents.require_fields(body, "status", "message", may={"later"})
    return Refused(documents.number(body, "status"), documents.text(body, "message"), _flag_if_given(body, "later"))


def _read_released(body: Mapping[str, Any]) -> Released:
    documents.require_fields(body, "denied", may={"more", "stays"})
    denied = tuple(read_denial(denial) for denial in documents.items(body, "denied", MAXIMUM_PEERS))
    return Released(denied, _read_more(body), documents.text(body, "stays") if "stays" in body else "")


def _flag_if_given(body: Mapping[str, Any], name: str) -> bool:
    return name in body and documents.flag(body, name)


def _read_more(body: Mapping[str, Any]) -> int:
    return documents.number(body, "more") if "more" in body else 0


def _require_version(body: Mapping[str, Any], other: str) -> None:
    if documents.number(body, "version") != VERSION:
        raise ProtocolError(f"{other} speaks version {body['version']}, this side {VERSION}; install one securerun")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands twice: it means one thing to one reader and another to the next (RFC 8259, 4)."""
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name that stands twice")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _printable(document: Mapping[str, Any], name: str) -> str:
    """Return a text for logs and terminals: nothing in it would steer them, nor is it half of a surrogate pair."""
    value = documents.text(document, name)
    if not value.isprintable():
        raise ProtocolError(f"{name} is not printable")
    return value


def _seconds(document: Mapping[str, Any], name: str) -> float:
    value = document[name]
    if type(value) not in (int, float) or not 0 <= value <= MAXIMUM_GRACE_SECONDS:
        raise ProtocolError(f"{name} is not a number of seconds up to {MAXIMUM_GRACE_SECONDS}")
    return float(value)


def _choice(document: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    value = documents.text(document, name)
    if value not in choices:
        raise ProtocolError(f"{name} {value[:40]!r} is none of {', '.join(choices)}")
    return value


_NAMES = {
    Order: "order",
    Peers: "peers",
    Release: "release",
    Report: "report",
    Ready: "ready",
    Runs: "runs",
    Run: "run",
    Guarding: "guarding",
    Notice: "notice",
    Refused: "refused",
    Released: "released",
}
_READERS: dict[str, Callable[[Mapping[str, Any]], Message]] = {
    "order": _read_order,
    "peers": _read_peers,
    "release": _read_release,
    "report": _read_report,
    "ready": _read_ready,
    "runs": _read_runs,
    "run": _read_run,
    "guarding": _read_guarding,
    "notice": _read_notice,
    "refused": _read_refused,
    "released": _read_released,
}
