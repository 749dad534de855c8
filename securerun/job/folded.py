"""Folded lists of nodes, as Slurm and ClusterShell write them: `node[0-511]`, `node[0-511]i`, `rack[1-2]n[01-16]`.

A list is split only outside of brackets, and nothing is written out before it is known to be of a reasonable size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from securerun.errors import PolicyError

# As many as the guard takes (securerun.guard.documents.MAXIMUM_PEERS). n[0-999999999] would fill the memory.
MOST_NODES = 100_000

_WORD = re.compile(r"(?:\[[^\[\]]*\]|[^,\s])+")
# Names and IPv4 addresses, never [fd00::1]. To ClusterShell, @ & ! ^ * would be groups and operations.
_FOLDED = re.compile(r"[A-Za-z0-9_.-]*(?:\[[0-9,/\s-]*\][A-Za-z0-9_.-]*)+")
_PIECE = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_RANGE = re.compile(r"\s*([0-9]+)(?:-([0-9]+)(?:/([0-9]+))?)?\s*")
_LONGEST_RANGE = 40
# So much of a wrong list stands in a message.
_SHOWN = 60


def words(text: str) -> list[str]:
    """Return the words of a list with commas or white space between, those inside of brackets aside."""
    return _WORD.findall(text)


def is_folded(word: str) -> bool:
    """Return whether a word stands for several hosts by the ranges in its brackets."""
    return "[" in word and _FOLDED.fullmatch(word) is not None


def expand(word: str, place: str, most: int = MOST_NODES) -> tuple[str, ...]:
    """Return the names that a folded word stands for. most: how many it may be.

    Raises PolicyError, which begins with `place`, for what ClusterShell does not read, and for more than that.
    """
    if size(word) > most:
        raise too_many(word, place)
    try:
        return unfold(word)
    except ValueError as error:
        raise PolicyError(
            f"{place}: {shortened(word)!r} is no list of nodes ({error}); write one like node[0-3] or rack[1-2]n[01-16]"
        ) from error


def too_many(text: str, place: str) -> PolicyError:
    """Return the error of a list that names too many nodes."""
    return PolicyError(f"{place}: {shortened(text)!r} is more than {MOST_NODES} nodes; name networks with --peers")


def unfold(text: str) -> tuple[str, ...]:
    """Return the names in a folded list. Raises ValueError for what ClusterShell does not read.

    Of what it reads, negative numbers are refused too: node names have none, and `size` does not count them.
    """
    wrong = next((part for part in _parts(text) if not _RANGE.fullmatch(part)), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is no range such as 0-3")
    # Imported where a folded list exists: it takes longer than everything else here.
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    try:
        return tuple(NodeSet(text, resolver=RESOLVER_NOGROUP))
    except NodeSetException as error:
        raise ValueError(str(error)) from error


def size(text: str) -> int:
    """Return how many names a folded list holds, or a few more, without writing them out."""
    return sum(math.prod(map(_size_of_ranges, _BRACKETS.findall(piece))) for piece in _PIECE.findall(text))


def shortened(text: str) -> str:
    """Return a list as a message shows it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _parts(text: str) -> Iterator[str]:
    for ranges in _BRACKETS.findall(text):
        yield from ranges.split(",")


def _size_of_ranges(text: str) -> int:
    return sum(_lengths(text)) or 1


def _lengths(text: str) -> Iterator[int]:
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if len(part) > _LONGEST_RANGE:
            yield MOST_NODES + 1
        elif match is not None:
            first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            yield max(1, (last - first) // max(1, step) + 1)
