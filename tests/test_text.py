"""Words for people."""

from __future__ import annotations

import pytest

from securerun.text import count, printable, some


@pytest.mark.parametrize(("number", "words"), [(0, "0 hosts"), (1, "1 host"), (1000, "1000 hosts")])
def test_things_are_counted_in_words(number: int, words: str) -> None:
    assert count(number, "host") == words


@pytest.mark.parametrize(
    ("things", "words"), [([], ""), (["a"], "a"), (["a", "b"], "a, b"), ([1, 2, 3, 4], "1, 2 and 2 more")]
)
def test_of_a_long_list_the_first_are_named(things: list[object], words: str) -> None:
    assert some(things, 2) == words


def test_what_others_wrote_does_not_steer_a_terminal() -> None:
    assert printable("a\x1b[2J\nb\udce9é") == "a\\x1b[2J\\nb\\udce9é"
