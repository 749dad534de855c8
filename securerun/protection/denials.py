"""Who was turned away, by which rule, and what lets them in if they belong to the job: in words, for notice and report.

The rule follows from the policy and the source. A source address is what a packet says: whoever has no right to it may
write it there. So each advice stands under the condition that it is the node, or the process, that one thinks of.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable

from securerun.firewall.policy import Denial, Opening, Policy
from securerun.linux.networks import Address
from securerun.text import count, some

_INTERFACES_NAMED = 4
_DENIALS_NAMED = 10


@dataclass(frozen=True)
class KeyInForce:
    """The key whose tag lets in whoever shows it. required: whether a peer's address alone does not."""

    fingerprint: str
    required: bool


class Reason(enum.Enum):
    """Which rule turned somebody away."""

    STRANGER = "no peer has this address"
    VERSION = "all peers are of the other IP version"
    INTERFACE = "a peer's address, through another interface than --interface permits"
    LOOPBACK = "a process of this host that is none of the job's (--loopback job)"
    PUBLIC = "a public port (--public), and none of its networks has this address"
    KEY = "no tag of the job's key"
    SINCE = "it has become a peer since"


def is_of_this_host(address: Address) -> bool:
    """Return whether an address is one of this host's own."""
    from securerun.host import interfaces  # with it psutil: only where somebody was turned away on a closed loopback

    return interfaces.has(address)


def reason(
    policy: Policy,
    source: Address,
    is_own: Callable[[Address], bool] = is_of_this_host,
    *,
    port: int = 0,
    key: KeyInForce | None = None,
) -> Reason:
    """Return which rule of a policy turned this source away from a port.

    Over the loopback only `close_loopback` turns anybody away, and what comes from an address of this host's own comes
    over the loopback, so only then is it asked for.
    """
    if policy.opening_at(port) is not None and not policy.has_peer(source):
        return Reason.PUBLIC
    if policy.close_loopback and (source.is_loopback or is_own(source)):
        return Reason.LOOPBACK
    if key is not None and (key.required or not policy.has_peer(source)):
        return Reason.KEY
    if policy.has_peer(source):
        return Reason.INTERFACE if policy.interfaces else Reason.SINCE
    return Reason.VERSION if policy.answered_version == source.version else Reason.STRANGER


def blocked(denial: Denial) -> str:
    """Who was turned away from which port, and how often."""
    port = denial.port or "a port that could not be read"
    return f"blocked {denial.source} → {port} ({count(denial.packets, 'attempt')})"


def explained(policy: Policy, denial: Denial, key: KeyInForce | None = None) -> str:
    """Who was turned away, and what to do if it belongs to the job."""
    return f"{blocked(denial)}; {_advice(policy, denial, _reason(policy, denial, key), key)}"


def with_rule(policy: Policy, denial: Denial, key: KeyInForce | None = None) -> str:
    """Who was turned away, and what to do where it is not that no peer has its address."""
    is_stranger = _reason(policy, denial, key) is Reason.STRANGER
    return blocked(denial) if is_stranger else explained(policy, denial, key)


def summary(
    at_start: Policy, now: Policy, denied: Sequence[Denial], more: int = 0, key: KeyInForce | None = None
) -> Iterator[str]:
    """Yield who was turned away, the first few of many, and once for each rule what to do if it was not to be.

    at_start, now: the policy with the peers of either. more: attempts of others than those in `denied`, of whom there
    were too many.
    """
    told: set[Reason | Opening] = set()
    for denial in denied[:_DENIALS_NAMED]:
        why = _reason(now, denial, key)
        if why is Reason.INTERFACE and not at_start.has_peer(denial.source):
            why = Reason.SINCE
        # What mends it is the same for all of a rule, but for public ports: each has networks of its own.
        rule = now.opening_at(denial.port) or why if why is Reason.PUBLIC else why
        advice = "" if why is Reason.STRANGER or rule in told else f"; {_advice(now, denial, why, key)}"
        told.add(rule)
        yield f"{blocked(denial)}{advice}"
    if len(denied) > _DENIALS_NAMED:
        yield f"blocked {len(denied) - _DENIALS_NAMED} more pairs of source and port"
    if more:
        yield f"blocked {count(more, 'attempt')} of still others"
    if Reason.STRANGER in told:
        of_whom = "these" if len(told) == 1 else "the others"
        yield f"if one of {of_whom} is a node of this job, add it with --peers"


def _reason(policy: Policy, denial: Denial, key: KeyInForce | None = None) -> Reason:
    return reason(policy, denial.source, port=denial.port, key=key)


def _advice(policy: Policy, denial: Denial, why: Reason, key: KeyInForce | None = None) -> str:
    source = denial.source
    if why is Reason.KEY and key is not None:
        return (
            f"it did not show the tag of this job's key (fingerprint {key.fingerprint}): if it is a node of this job, "
            "start it by securerun with the same key; if addresses are translated in between, or TCP option 254 is "
            f"taken away, {_without_tags(policy, source)}"
        )
    if why is Reason.PUBLIC:
        return (
            f"port {denial.port} is public, and not to this address: if it may connect there, add it, or its network, "
            f"with --public '{policy.opening_at(denial.port)}=...'"
        )
    if why is Reason.LOOPBACK:
        return (
            "it is a process of this host that this launcher did not start (--loopback job): if it belongs to the job, "
            "start all of the job by one securerun or one securerunctl exec, or let every user of this host connect "
            "with --loopback any"
        )
    if why is Reason.INTERFACE:
        through = some(list(policy.interfaces), _INTERFACES_NAMED)
        return (
            f"that is a peer's address, but it did not come in through {through}: if it is that peer and not somebody "
            f"with its address, see which way it comes with `ip route get {source}`, and name that interface too with "
            f"--interface {','.join(policy.interfaces[:_INTERFACES_NAMED])},..."
        )
    if why is Reason.SINCE:
        return "it is a peer by now"
    if why is Reason.VERSION:
        return (
            f"all peers are IPv{10 - source.version}: if it is a node of this job that does not take that one in the "
            "end, add this address with --peers"
        )
    return "if it is a node of this job, add it with --peers"


def _without_tags(policy: Policy, source: Address) -> str:
    """Return what lets in a node that cannot be known by its tag."""
    if not policy.has_peer(source):
        return "add it with --peers, and --key auto"
    by_address = "say --key auto, which lets peers in by their address"
    if not policy.interfaces:
        return by_address
    through = some(list(policy.interfaces), _INTERFACES_NAMED)
    return f"{by_address}; or it comes through another interface than {through}, to be named with --interface too"
