"""What stands in the guard's records, and in what launcher and guard say to each other, as JSON's own types.

The guard may run with more privilege than whoever wrote a document. Reading therefore knows every field, its type and
its limits; an unknown, missing or oversized one refuses the whole document.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, Set
from typing import Any

from securerun.firewall.policy import (
    MOST_OPENINGS,
    MOST_PUBLIC_NETWORKS,
    Admission,
    Denial,
    Layer,
    Opening,
    Policy,
    PortRange,
    purpose_of,
    require_ports,
)
from securerun.linux.networks import Network

# 100,000 collapsed IPv6 networks with quotes and commas are 4.6 MB.
MAXIMUM_BYTES = 8 * 1024 * 1024
MAXIMUM_PEERS = 100_000
# What orders are counted by before they are read: a list, an object or a value takes up to 50 times the memory of its
# text. Beside so many peers an honest one has some 12,000 commas and 6,000 opening brackets at most, texts counted in.
MAXIMUM_COMMAS = MAXIMUM_PEERS + 32 * 1024
MAXIMUM_BRACKETS = 8 * 1024
# In the record of a run with a key its peers stand twice, and the networks that its site allows besides.
MAXIMUM_RECORD_BYTES = 4 * MAXIMUM_BYTES
MAXIMUM_PORT_RANGES = 1024
# A guard adds those that it finds while the job runs: of 65,535 ports at most every other.
MAXIMUM_RECORDED_RANGES = MAXIMUM_PORT_RANGES + 32768
MAXIMUM_INTERFACES = 64
MAXIMUM_TEXT = 4096
# What the policy of a job that has no key does not say.
_OF_TAGS = ("admission", "tagged", "tags_through_any", "tags_from")
_IPV4 = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}/[0-9]{1,2}", re.ASCII)


class ProtocolError(Exception):
    """A message or a record says something that it must not, or not so. The message is one line."""


def policy_document(policy: Policy) -> dict[str, Any]:
    """Return the policy as JSON's own types. What few runs have is left out where it is not: a version without it
    understands the rest, and refuses what it does not know."""
    public = [opening_document(opening) for opening in policy.public]
    return {
        "run_id": policy.run_id,
        "ports": [{"first": port.first, "last": port.last, "purpose": port.purpose} for port in policy.ports],
        "peers": list(policy.written_peers),
        "interfaces": list(policy.interfaces),
        "accept": policy.accept,
        "close_loopback": policy.close_loopback,
        **({"public": public} if public else {}),
        **(_tags_document(policy) if policy.has_tags else {}),
    }


def _tags_document(policy: Policy) -> dict[str, Any]:
    through = {"tags_through_any": True} if policy.tags_through_any else {}
    counting = {"tags_from": [str(network) for network in policy.tags_from]} if policy.tags_from else {}
    return {
        "admission": str(policy.admission),
        "tagged": [str(network) for network in policy.tagged],
        **through,
        **counting,
    }


def opening_document(opening: Opening) -> dict[str, Any]:
    """Return one public port or range as JSON's own types; no networks are every host."""
    return {"first": opening.first, "last": opening.last, "networks": [str(network) for network in opening.networks]}


def read_policy(document: Mapping[str, Any], *, recorded: bool = False) -> Policy:
    """Return the policy in a document; the opposite of `policy_document`. Raises ProtocolError or PolicyError.

    recorded: by a guard, which adds ports, and to where tags are written the networks of its host.
    """
    most_ranges = MAXIMUM_RECORDED_RANGES if recorded else MAXIMUM_PORT_RANGES
    most_of_tags = MAXIMUM_RECORD_BYTES if recorded else MAXIMUM_PEERS
    names = ("run_id", "ports", "peers", "interfaces", "accept", "close_loopback")
    require_fields(document, *names, may={"public", *_OF_TAGS})
    return Policy(
        run_id=text(document, "run_id"),
        ports=tuple(_read_port(port) for port in items(document, "ports", most_ranges)),
        peers=tuple(read_network(peer) for peer in items(document, "peers", MAXIMUM_PEERS)),
        interfaces=tuple(entry(name) for name in items(document, "interfaces", MAXIMUM_INTERFACES)),
        accept=flag(document, "accept"),
        close_loopback=flag(document, "close_loopback"),
        public=read_openings(document),
        admission=Admission(text(document, "admission")) if "admission" in document else Admission.ADDRESS,
        tagged=_networks_in(document, "tagged", most_of_tags),
        tags_through_any="tags_through_any" in document and flag(document, "tags_through_any"),
        tags_from=_networks_in(document, "tags_from", most_of_tags),
    )


def _networks_in(document: Mapping[str, Any], name: str, most: int) -> tuple[Network, ...]:
    """Return the networks in a field, none where there is no such field."""
    return tuple(read_network(each) for each in items(document, name, most)) if name in document else ()


def read_openings(document: Mapping[str, Any]) -> tuple[Opening, ...]:
    """Return the public ports of the policy in a document, which has none where it does not say so.

    Raises ProtocolError, PolicyError or ValueError.
    """
    public = items(document, "public", MOST_OPENINGS) if "public" in document else []
    return tuple(_read_opening(opening) for opening in public)


def denial_document(denial: Denial) -> dict[str, Any]:
    """Return one denial as JSON's own types, as `securerunctl status --json` shows it."""
    return {"source": str(denial.source), "port": denial.port, "packets": denial.packets}


def layer_document(layer: Layer) -> dict[str, Any]:
    """Return one layer as JSON's own types."""
    return {"backend": layer.backend, "name": layer.name}


def read_layer(document: object) -> Layer:
    """Return the layer in a document; the opposite of `layer_document`. Raises ProtocolError."""
    layer = mapping(document, "a layer")
    require_fields(layer, "backend", "name")
    return Layer(text(layer, "backend"), text(layer, "name"))


def read_denial(document: object) -> Denial:
    """Return the denial in a document; the opposite of `denial_document`. Raises ProtocolError or ValueError."""
    denial = mapping(document, "a denial")
    require_fields(denial, "source", "port", "packets")
    return Denial(ipaddress.ip_address(text(denial, "source")), number(denial, "port"), number(denial, "packets"))


def read_network(document: object) -> Network:
    """Return the network that a text names. Raises ProtocolError or ValueError."""
    written = entry(document)
    # Python takes any text after it for a scope id (RFC 4007, 11), and these texts become rules.
    if "%" in written:
        raise ProtocolError(f"{written[:40]!r} has a scope id, which no firewall knows")
    address, _, length = written.partition("/")
    if _IPV4.fullmatch(written) is None:
        return ipaddress.ip_network(written)
    # What ip_network() makes of it too, in half the time: nearly all peers are written like this.
    return ipaddress.IPv4Network((_packed(address), int(length)))


def require_fields(document: Mapping[str, Any], *names: str, may: Set[str] = frozenset()) -> None:
    """Raise ProtocolError for a document that has not exactly these fields. may: those that it has mostly not."""
    if document.keys() - may != set(names):
        raise ProtocolError(f"fields other than {', '.join((*names, *sorted(may & document.keys())))}")


def mapping(document: object, what: str) -> Mapping[str, Any]:
    """Return an object of JSON's. Raises ProtocolError for anything else."""
    if not isinstance(document, dict):
        raise ProtocolError(f"{what} is not an object")
    return document


def text(document: Mapping[str, Any], name: str) -> str:
    """Return the text in a field. Raises ProtocolError for anything else, and for one that is too long."""
    return entry(document[name])


def entry(value: object) -> str:
    """Return an item of a list as the text that it is. Raises ProtocolError as `text` does."""
    if not isinstance(value, str) or len(value) > MAXIMUM_TEXT:
        raise ProtocolError("a value that is not a text of reasonable length")
    return value


def number(document: Mapping[str, Any], name: str) -> int:
    """Return the whole number in a field. Raises ProtocolError for anything else."""
    value = document[name]
    # bool is an int in Python, and no number here.
    if type(value) is not int:
        raise ProtocolError(f"{name} is not a whole number")
    return value


def flag(document: Mapping[str, Any], name: str) -> bool:
    """Return whether a field is true. Raises ProtocolError for what is neither true nor false."""
    value = document[name]
    if not isinstance(value, bool):
        raise ProtocolError(f"{name} is neither true nor false")
    return value


def items(document: Mapping[str, Any], name: str, most: int) -> list[Any]:
    """Return the list in a field. Raises ProtocolError for anything else, and for more than `most` items."""
    value = document[name]
    if not isinstance(value, list) or len(value) > most:
        raise ProtocolError(f"{name} is not a list of at most {most}")
    return value


def ranges(document: Mapping[str, Any], name: str) -> tuple[tuple[int, int], ...]:
    """Return the first and last ports in a field. Raises ProtocolError for anything else, or PolicyError."""
    found = []
    for pair in items(document, name, MAXIMUM_RECORDED_RANGES):
        if not isinstance(pair, list) or [type(port) for port in pair] != [int, int]:
            raise ProtocolError(f"{name} is not a list of first and last ports")
        require_ports(*pair)
        found.append((pair[0], pair[1]))
    return tuple(found)


def _read_port(document: object) -> PortRange:
    port = mapping(document, "a port range")
    require_fields(port, "first", "last", "purpose")
    return PortRange(number(port, "first"), number(port, "last"), purpose_of(text(port, "purpose")))


def _read_opening(document: object) -> Opening:
    opening = mapping(document, "a public port")
    require_fields(opening, "first", "last", "networks")
    networks = items(opening, "networks", MOST_PUBLIC_NETWORKS)
    return Opening(number(opening, "first"), number(opening, "last"), tuple(read_network(each) for each in networks))


def _packed(address: str) -> bytes:
    try:
        return socket.inet_pton(socket.AF_INET, address)
    except OSError as error:
        raise ProtocolError(f"{address!r} is not an address") from error
