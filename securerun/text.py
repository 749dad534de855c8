"""Words for people: what may be printed of what others wrote, and numbers of things."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text of a user's, without what would steer a terminal or break a line of a log."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def count(number: int, thing: str) -> str:
    """A number of things, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
