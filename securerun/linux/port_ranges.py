"""Which TCP ports the kernel hands out by itself, and which of them it keeps back (ip-sysctl.rst), read from /proc/sys.

Both are settings of a network namespace: whichever one the process that reads them is in, these are its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from securerun.errors import PrivilegeError, Unavailable
from securerun.text import span

NAME = "net.ipv4.ip_local_reserved_ports"
LIST = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Every second port of all alone is 190 kB, and only what the first read takes is told (kernel/sysctl.c).
_LONGEST_LIST = 512 * 1024
_WORD = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_LAST_PORT = 0xFFFF
# Nothing can be bound to it, so in a list of reserved ports it says nothing.
_NO_PORT = 0

Ports = frozenset[int]
Ranges = tuple[tuple[int, int], ...]


class ReservationUnavailable(PrivilegeError, Unavailable):
    """The list of reserved ports cannot be read or written. The message is a part of a sentence, without its end."""


def reserved() -> Ports:
    """Read the ports that the kernel hands out to nobody. Raises ReservationUnavailable."""
    try:
        descriptor = os.open(LIST, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return understood(os.pread(descriptor, _LONGEST_LIST, 0).decode("ascii"))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ReservationUnavailable(f"{NAME} cannot be read: {error.strerror}") from error


def handed_out() -> tuple[int, int]:
    """Read the first and the last of the ports that the kernel hands out by itself. Raises ReservationUnavailable."""
    try:
        first, last = map(int, _RANGE.read_text(encoding="ascii").split())
    except (OSError, ValueError) as error:
        raise ReservationUnavailable(f"{_RANGE} cannot be read: {error}") from error
    return first, last


def all_handed_out() -> Ports:
    """Return each port in the range of those that the kernel hands out. Raises ReservationUnavailable."""
    first, last = handed_out()
    return frozenset(range(first, last + 1))


def lacking(wanted: Iterable[tuple[int, int]]) -> Ranges:
    """Return those of the ports that the kernel may hand out: in its range for that, and not in the list.

    Raises ReservationUnavailable.
    """
    return ranges(numbers(wanted) & all_handed_out() - reserved())


def with_others(ports: Ranges) -> Ranges:
    """Return the whole list with these ports in it, as a write has to give it. Raises ReservationUnavailable."""
    return ranges(reserved() - {_NO_PORT} | numbers(ports))


def written(ports: Iterable[int]) -> str:
    """Return ports as the kernel writes them: `29500,60000-60015`."""
    return written_ranges(ranges(ports))


def written_ranges(joined: Ranges) -> str:
    """Return ranges as the kernel writes them."""
    return ",".join(span(first, last) for first, last in joined)


def understood(text: str) -> Ports:
    """Return the ports of a list that the kernel wrote. Raises ValueError for what is none."""
    found: set[int] = set()
    for word in text.strip().split(",") if text.strip() else ():
        match = _WORD.fullmatch(word)
        if match is None:
            raise ValueError(f"{word[:20]!r} is no port and no range of ports")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if not first <= last <= _LAST_PORT:
            raise ValueError(f"{word} is no range of ports")
        found.update(range(first, last + 1))
    return frozenset(found)


def numbers(wanted: Iterable[tuple[int, int]]) -> Ports:
    """Return each port of some ranges."""
    return frozenset(number for first, last in wanted for number in range(first, last + 1))


def ranges(ports: Iterable[int]) -> Ranges:
    """Return ports as the fewest ranges that hold them, ascending."""
    joined: list[tuple[int, int]] = []
    for port in sorted(ports):
        if joined and port == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], port)
        else:
            joined.append((port, port))
    return tuple(joined)
