"""Which name servers this host asks (resolv.conf(5)), and the same for a network that has this host's own addresses."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator
from pathlib import Path

from securerun.linux.networks import Address

FILE = Path("/etc/resolv.conf")
_MOST_BYTES = 65536


def configured(path: Path = FILE) -> str:
    """Return what the file says; nothing where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def are_here(text: str, own: Collection[Address] = ()) -> bool:
    """Return whether any of the servers is on this host: on its loopback, as systemd-resolved's 127.0.0.53 is, or at
    one of its own addresses.
    """
    return any(_is_here(server, own) for _, server in _servers(text))


def forwarded(text: str, address: str, own: Collection[Address] = ()) -> str:
    """Return the file with one address in place of those that are on this host, once."""
    lines, replaced = text.splitlines(), [number for number, server in _servers(text) if _is_here(server, own)]
    for number in replaced:
        lines[number] = f"nameserver {address}" if number == replaced[0] else ""
    return "\n".join([*lines, ""])


def _servers(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines()):
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            yield number, words[1]


def _is_here(server: str, own: Collection[Address]) -> bool:
    try:
        address = ipaddress.ip_address(server.partition("%")[0])
    except ValueError:
        return False
    # All addresses stands for this host (resolv.conf(5) takes 0.0.0.0 so).
    return address.is_loopback or address.is_unspecified or address in own
