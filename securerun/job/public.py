"""Ports of the job that are for others than its nodes: metrics, HTTP, probes. Text → openings; asks nobody.

Such a port is open to every host or to some networks, as far as the host's own rules let them, while everything else
of the job stays closed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence

from securerun.errors import PolicyError
from securerun.firewall.policy import Opening, PortRange, Purpose, require_openings, require_ports
from securerun.job.ports import HCCL_BASE, HCCL_RANGE
from securerun.linux.networks import Network, collapse

_EXAMPLE = "8080,9090=10.0.0.0/8;9100"
_LONGEST_TEXT = 16384


def openings(text: str, source: str) -> tuple[Opening, ...]:
    """Return the openings in a text such as `8080,9090=10.0.0.0/8,10.1.0.0/16; 9100`, in ascending order.

    source: the option or variable that it comes from. Raises PolicyError for what cannot be right.
    """
    if len(text) > _LONGEST_TEXT:
        raise PolicyError(f"{source}: {len(text)} characters are too many; name fewer ports, and larger networks")
    found = [opening for part in text.split(";") if part.strip() for opening in _part(part.strip(), source)]
    if not found:
        raise PolicyError(f"{source}: {text!r} names no port; write ports and who may connect, as in {_EXAMPLE}")
    public = tuple(sorted(found, key=lambda opening: (opening.first, opening.last)))
    try:
        require_openings(public)
    except PolicyError as error:
        raise PolicyError(f"{source}: {error}") from error
    return public


def within(planned: Iterable[PortRange], public: Sequence[Opening], source: str) -> tuple[PortRange, ...]:
    """Return a port plan with public ports in place of what the user added there.

    Those for some networks are planned, to be closed to all others; those for every host are not, so `--ports` with
    one of them closes nothing there. Raises PolicyError where one is among those that only the job's nodes may reach.
    """
    found: list[PortRange] = []
    for ports in planned:
        inside = [one for one in public if one.first <= ports.last and ports.first <= one.last]
        if inside and ports.purpose != Purpose.ADDED:
            raise PolicyError(
                f"{source}: port {inside[0]} is among {ports}, which {_reached(ports)}; have what others are to reach "
                "listen on another port, and name that"
            )
        first = ports.first
        for opening in inside:
            if first < opening.first:
                found.append(PortRange(first, opening.first - 1, ports.purpose))
            first = opening.last + 1
        if first <= ports.last:
            found.append(PortRange(first, ports.last, ports.purpose))
    found += (PortRange(one.first, one.last, Purpose.PUBLIC) for one in public if not one.is_for_all)
    return tuple(sorted(found))


def _reached(ports: PortRange) -> str:
    if ports.purpose in (Purpose.HCCL, Purpose.HCCL_DEFAULT):
        return f"HCCL listens on and only the job's nodes may reach ({HCCL_BASE} or {HCCL_RANGE} would move it)"
    return f"only the job's nodes may reach ({ports.purpose})"


def _part(text: str, source: str) -> Iterator[Opening]:
    ports, equals, whom = text.partition("=")
    networks = _networks(ports.strip(), whom, source) if equals else ()
    words = _words(re.sub(r"\s*-\s*", "-", ports))
    if not words:
        raise PolicyError(f"{source}: {text!r} names no port before =; write it as in {_EXAMPLE}")
    for word in words:
        yield Opening(*_range(word, source), networks)


def _range(word: str, source: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word)
    if match is None:
        raise PolicyError(f"{source}: {_short(word)} is no port and no range of ports; write it as in {_EXAMPLE}")
    first, last = int(match.group(1)), int(match.group(2) or match.group(1))
    try:
        require_ports(first, last)
    except PolicyError as error:
        raise PolicyError(f"{source}: {error}") from error
    return first, last


def _networks(ports: str, text: str, source: str) -> tuple[Network, ...]:
    words = _words(text)
    if not words:
        raise PolicyError(
            f"{source}: nobody stands after {_short(ports + '=')}; name networks, or write {_short(ports)} alone for "
            "every host"
        )
    return collapse(_network(word, source) for word in words)


def _network(word: str, source: str) -> Network:
    # Python takes any text after it for a scope id (RFC 4007, 11).
    if "%" in word:
        raise PolicyError(f"{source}: {_short(word)} has a scope id, which no firewall knows; write it without")
    try:
        return ipaddress.ip_network(word)
    except ValueError:
        pass
    try:
        whole = ipaddress.ip_network(word, strict=False)
    except ValueError:
        raise PolicyError(
            f"{source}: {_short(word)} is no address and no network; names are not looked up here, so write addresses "
            "or networks, as in 8080=10.0.0.0/8, or no = at all for every host"
        ) from None
    raise PolicyError(f"{source}: {word} is an address within a network; write {whole}, or the address alone")


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _short(word: str) -> str:
    return repr(word if len(word) <= 60 else f"{word[:60]}...")
