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

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Union

from securerun.errors import PolicyError
from securerun.firewall.backends import NAMES as BACKENDS
from securerun.firewall.job_key import SECRET_BYTES, JobSecret
from securerun.firewall.policy import NAMESPACE, Denial, Layer, Policy
from securerun.guard import documents, slurm_job
from securerun.guard.documents import (
    MAXIMUM_BRACKETS,
    MAXIMUM_BYTES,
    MAXIMUM_COMMAS,
    MAXIMUM_PEERS,
    MAXIMUM_RECORD_BYTES,
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
from securerun.guard.slurm_job import SlurmJob
from securerun.linux.networks import Network

# A guard speaks first, also to launchers of the release before, and those orders without a key that they know are
# served as ever. An order with a key is one of the second version, which guards from before refuse.
VERSION, VERSION_WITH_KEY = VERSIONS = 1, 2
# It tells the processes of a run where no cgroup holds them together, and a launcher which run is around it.
RUN_ID_VARIABLE = "SECURERUN_RUN_ID"
# For programs that take the name of a file with a secret: Ray's RAY_AUTH_TOKEN_PATH.
SECRET_PATH_VARIABLE = "SECURERUN_JOB_SECRET_PATH"
FIREWALLS = ("auto", *BACKENDS, "off")
SCOPES = ("auto", "process", "ports")
MAXIMUM_GRACE_SECONDS = 24 * 3600
MAXIMUM_NODES = 1_000_000
MAXIMUM_TOWARDS = 64
_MOST_VERSIONS = 64
# What launchers of 0.1 take no message with. What else they do not know is about what they never ordered.
_NOT_FOR_THE_FIRST = frozenset({"versions", "later", "more", "needs_guard"})
_DIGEST = re.compile(rf"[0-9a-f]{{{2 * SECRET_BYTES}}}", re.ASCII)
_OF_KEY = ("fingerprint", "key_source", "secret_path")


def presence_of(run_id: str) -> str:
    """Return the abstract address at which the guard of a run stands (unix(7)): of its network namespace."""
    return f"\0securerun-{run_id}"


@dataclass(frozen=True)
class KeyOrder:
    """What becomes of the job's key, whose tag lets in whoever shows it.

    required: whether nobody comes in without; where there are peers, nobody who is none of them either. Else a tag only
    adds to them, and a guard that can have no key goes on by addresses.
    secret: the job's, where its user has the source; else the guard is to make it, of a source that only root reads.
    meeting: for that, the digest of what all nodes of the job know. in_slurm: whether the launcher takes itself to be
    in a job of Slurm's; nothing is proven by it. nodes: how many the job has, 0 where that is not known: for people.
    towards: the addresses where the job meets, which may be none that a node of it has: a Service's, a router's.
    through_any: whether the policy's interfaces, which nobody named, are those of addresses alone.
    """

    required: bool
    secret: JobSecret | None = None
    meeting: bytes = b""
    in_slurm: bool = False
    nodes: int = 0
    towards: tuple[Network, ...] = ()
    through_any: bool = False


@dataclass(frozen=True)
class Order:
    """What the launcher asks for: guard this job by this policy.

    firewall: which port chains; `auto` takes what the host has, `off` none.
    scope: `process` insists on the shield, `ports` leaves it out, `auto` takes the stronger of what can be had.
    grace: seconds between SIGTERM and SIGKILL for what a failed job leaves behind.
    command: how the user started the job, for people who ask what a run is.
    adopt: a guard of this run has died; take over what it left. key: None for a job that goes by addresses alone.
    slurm: the job of Slurm's that it is for, where no launcher goes on with it; None for a launcher's own job.
    """

    policy: Policy
    firewall: str
    scope: str
    grace: float
    command: str
    adopt: bool = False
    key: KeyOrder | None = None
    slurm: SlurmJob | None = None


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
    """A guard is up, has found whom it serves, and waits for the order.

    pid: the guard's process id. versions: of this protocol that it speaks; () where that is not said.
    """

    pid: int
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guarding:
    """The layers that stand, proven. notes: what a person should know about layers that do not, or promise less.

    left_out: first and last of ports of the order's plan that are not in force, since nobody asked for them.
    needs_guard: the shield may be switched off on this kernel (securerun.guard.proof), which only a guard notices.
    fingerprint: of the job's key, "" where it has none; key_source: the guard's own source of it, in words.
    secret_path: the file with the secret of the job's frameworks.
    """

    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[int, int], ...] = ()
    needs_guard: bool = False
    fingerprint: str = ""
    key_source: str = ""
    secret_path: str = ""

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
    later: whether another guard may be had in a moment. another_may: whether one that is come by in another way may do
    what this one cannot; said only to who started it directly. knows_keys: whether it understood an order with a key:
    guards from before there were keys refuse each.
    """

    status: int
    message: str
    later: bool = False
    knows_keys: bool = False
    another_may: bool = False


@dataclass(frozen=True)
class Released:
    """The lease ends with the job's last process.

    denied: who was turned away so far; more: how many packets of others, of whom there were too many. stays: why a
    launcher that goes on is in the job still, "" where it is out of it.
    nodes_guarded: how many of the job's nodes were seen with its key, this one among them; 0 without a key.
    unguarded: the first few addresses that answered at ports of the job's and have no key of it.
    """

    denied: tuple[Denial, ...]
    more: int = 0
    stays: str = ""
    nodes_guarded: int = 0
    unguarded: tuple[str, ...] = ()


Message = Union[Order, Peers, Release, Report, Ready, Runs, Run, Guarding, Notice, Refused, Released]


def mark_of(run_id: str) -> str:
    """Return what the processes of a run have in the environment that they were started with."""
    return f"{RUN_ID_VARIABLE}={run_id}"


def encode(message: Message, *, to_any: bool = False) -> bytes:
    """Return the one line, with its newline, that `decode` reads back. to_any: as launchers of 0.1 can read it too."""
    name, body = _NAMES[type(message)], _body(message)
    if to_any:
        body = {field: value for field, value in body.items() if field not in _NOT_FOR_THE_FIRST}
    return json.dumps({name: body}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes, *, of_guard: bool = False) -> Message:
    """Read one line. Raises ProtocolError for anything that is not exactly a message of this protocol.

    of_guard: it comes from a guard, which may tell of records; a launcher's takes no more memory than an honest order.
    """
    _require_bounded(line, of_guard=of_guard)
    try:
        # All else is written as escapes; one such character has a whole line take four bytes for each of its own.
        document = json.loads(line.decode("ascii"), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
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


def _require_bounded(line: bytes, *, of_guard: bool) -> None:
    """Refuse what would take much memory to read, before it is read. Raises ProtocolError."""
    most = MAXIMUM_RECORD_BYTES if of_guard else MAXIMUM_BYTES
    if len(line) > most:
        raise ProtocolError(f"a message of more than {most} bytes")
    if of_guard:
        return
    if line.count(b",") > MAXIMUM_COMMAS or line.count(b"[") + line.count(b"{") > MAXIMUM_BRACKETS:
        raise ProtocolError("a message of more lists, objects or values than an order has")


def _body(message: Message) -> dict[str, Any]:
    if isinstance(message, Order):
        return {
            "version": VERSION if message.key is None else VERSION_WITH_KEY,
            "policy": policy_document(message.policy),
            "firewall": message.firewall,
            "scope": message.scope,
            "grace": message.grace,
            "command": message.command,
            "adopt": message.adopt,
            **({} if message.key is None else {"key": _key_document(message.key)}),
            **({} if message.slurm is None else {"slurm": slurm_job.document(message.slurm)}),
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
        return {"version": VERSION, "pid": message.pid, **_given(versions=list(message.versions))}
    if isinstance(message, Guarding):
        layers = [layer_document(layer) for layer in message.layers]
        few = _given(
            left_out=[list(ports) for ports in message.left_out],
            needs_guard=message.needs_guard,
            fingerprint=message.fingerprint,
            key_source=message.key_source,
            secret_path=message.secret_path,
        )
        return {"layers": layers, "notes": list(message.notes), **few}
    if isinstance(message, Notice):
        denied = [denial_document(denial) for denial in message.denied]
        return {"denied": denied, "words": list(message.words), **_given(more=message.more)}
    if isinstance(message, Refused):
        few = _given(later=message.later, knows_keys=message.knows_keys, another_may=message.another_may)
        return {"status": message.status, "message": message.message, **few}
    denied = [denial_document(denial) for denial in message.denied]
    of_nodes = _given(nodes_guarded=message.nodes_guarded, unguarded=list(message.unguarded))
    return {"denied": denied, **_given(more=message.more, stays=message.stays), **of_nodes}


def _given(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON's own types
    """Return the fields that are not 0, false or empty, as mostly they are: a version without them reads the rest."""
    return {name: value for name, value in fields.items() if value}


def _read_order(body: Mapping[str, Any]) -> Order:
    fields = ("version", "policy", "firewall", "scope", "grace", "command", "adopt")
    documents.require_fields(body, *fields, may={"key", "slurm"})
    _require_version(body, "the launcher", VERSION_WITH_KEY if "key" in body else VERSION)
    return Order(
        policy=read_policy(documents.mapping(body["policy"], "policy")),
        firewall=_choice(body, "firewall", FIREWALLS),
        scope=_choice(body, "scope", SCOPES),
        grace=_seconds(body, "grace"),
        command=_printable(body, "command"),
        adopt=documents.flag(body, "adopt"),
        key=_read_key(documents.mapping(body["key"], "key")) if "key" in body else None,
        slurm=slurm_job.read(documents.mapping(body["slurm"], "slurm")) if "slurm" in body else None,
    )


def _key_document(key: KeyOrder) -> dict[str, Any]:
    towards = [str(network) for network in key.towards]
    said = {"required": key.required, "nodes": key.nodes, "towards": towards, "through_any": key.through_any}
    if key.secret is not None:
        return {**said, "secret": key.secret.reveal().hex()}
    return {**said, "meeting": key.meeting.hex(), "in_slurm": key.in_slurm}


def _read_key(body: Mapping[str, Any]) -> KeyOrder:
    """Read what an order says of the key. What is wrong with it is said without a word of it."""
    source = ("secret",) if "secret" in body else ("meeting", "in_slurm")
    documents.require_fields(body, "required", "nodes", "towards", "through_any", *source)
    required, nodes = documents.flag(body, "required"), documents.number(body, "nodes")
    if not 0 <= nodes <= MAXIMUM_NODES:
        raise ProtocolError(f"nodes is not a number up to {MAXIMUM_NODES}")
    towards = tuple(read_network(network) for network in documents.items(body, "towards", MAXIMUM_TOWARDS))
    if any(network.prefixlen < network.max_prefixlen for network in towards):
        raise ProtocolError("towards is not a list of single addresses")
    through_any = documents.flag(body, "through_any")
    if "secret" in body:
        secret = JobSecret(_digest(body, "secret"))
        return KeyOrder(required, secret, nodes=nodes, towards=towards, through_any=through_any)
    meeting, in_slurm = _digest(body, "meeting"), documents.flag(body, "in_slurm")
    return KeyOrder(required, None, meeting, in_slurm, nodes, towards, through_any)


def _digest(body: Mapping[str, Any], name: str) -> bytes:
    """Return 32 bytes, written as that many pairs of digits."""
    value = documents.text(body, name)
    if not _DIGEST.fullmatch(value):
        raise ProtocolError(f"{name} is not {SECRET_BYTES} bytes in hexadecimal digits")
    return bytes.fromhex(value)


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
    documents.require_fields(body, "version", "pid", may={"versions"})
    named = documents.items(body, "versions", _MOST_VERSIONS) if "versions" in body else ()
    versions = tuple(map(_version, named))
    if versions and not set(versions) & set(VERSIONS):
        raise ProtocolError(
            f"the guard speaks versions {_some(versions)}, this side {_some(VERSIONS)}; install one securerun"
        )
    if not versions:
        _require_version(body, "the guard", VERSION)
    return Ready(documents.number(body, "pid"), versions)


def _version(number: object) -> int:
    if type(number) is not int or number < 0:
        raise ProtocolError("versions is not a list of numbers")
    return number


def _some(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions))


def _read_guarding(body: Mapping[str, Any]) -> Guarding:
    may = {"left_out", "needs_guard", *_OF_KEY}
    documents.require_fields(body, "layers", "notes", may=may)
    layers = tuple(read_layer(layer) for layer in documents.items(body, "layers", MAXIMUM_TEXT))
    notes = tuple(documents.entry(note) for note in documents.items(body, "notes", MAXIMUM_TEXT))
    left_out = documents.ranges(body, "left_out") if "left_out" in body else ()
    of_key = {name: _printable(body, name) for name in _OF_KEY if name in body}
    return Guarding(layers, notes, left_out, _flag_if_given(body, "needs_guard"), **of_key)


def _read_notice(body: Mapping[str, Any]) -> Notice:
    documents.require_fields(body, "denied", "words", may={"more"})
    denied = tuple(read_denial(denial) for denial in documents.items(body, "denied", MAXIMUM_PEERS))
    words = tuple(documents.entry(line) for line in documents.items(body, "words", MAXIMUM_TEXT))
    return Notice(denied, words, _read_more(body))


def _read_refused(body: Mapping[str, Any]) -> Refused:
    documents.require_fields(body, "status", "message", may={"later", "knows_keys", "another_may"})
    few = {name: _flag_if_given(body, name) for name in ("later", "knows_keys", "another_may")}
    return Refused(documents.number(body, "status"), documents.text(body, "message"), **few)


def _read_released(body: Mapping[str, Any]) -> Released:
    documents.require_fields(body, "denied", may={"more", "stays", "nodes_guarded", "unguarded"})
    denied = tuple(read_denial(denial) for denial in documents.items(body, "denied", MAXIMUM_PEERS))
    guarded = documents.number(body, "nodes_guarded") if "nodes_guarded" in body else 0
    addresses = documents.items(body, "unguarded", MAXIMUM_TEXT) if "unguarded" in body else ()
    unguarded = tuple(str(ipaddress.ip_address(documents.entry(address))) for address in addresses)
    stays = documents.text(body, "stays") if "stays" in body else ""
    return Released(denied, _read_more(body), stays, guarded, unguarded)


def _flag_if_given(body: Mapping[str, Any], name: str) -> bool:
    return name in body and documents.flag(body, name)


def _read_more(body: Mapping[str, Any]) -> int:
    return documents.number(body, "more") if "more" in body else 0


def _require_version(body: Mapping[str, Any], other: str, version: int) -> None:
    if documents.number(body, "version") != version:
        raise ProtocolError(f"{other} speaks version {body['version']}, this side {version}; install one securerun")


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
