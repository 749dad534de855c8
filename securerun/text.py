"""Words for people: what may be printed of what others wrote, and numbers of things."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """Return text of a user's, without what would steer a terminal or break a line of a log."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def count(number: int, thing: str) -> str:
    """Return a number of things, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def nodes_guarded(guarded: int, nodes: int) -> str:
    """Return how many of a job's nodes were seen to have its key. nodes: how many it has, 0 where that is not known."""
    of = f" of {nodes}" if nodes else ""
    return f"{guarded}{of} {'node' if guarded == 1 and nodes <= 1 else 'nodes'} guarded"


def span(first: int, last: int) -> str:
    """Return a range of numbers, both ends included: `29500`, `60000-60015`."""
    return str(first) if first == last else f"{first}-{last}"


def some(things: Sequence[object], most: int) -> str:
    """Return the first few of a list, and how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more
