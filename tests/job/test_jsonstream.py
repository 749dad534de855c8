"""JSON read piece by piece says the same as JSON read at once, wherever the text is cut."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securerun.job import jsonstream
from securerun.job.jsonstream import JSONError, ListStart

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
KEYS = st.text(max_size=5)
VALUES = st.recursive(
    LEAVES | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(KEYS, inside, max_size=4),
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)
WINDOWS = st.sampled_from([1, 2, 3, 7, 64])


def read(text: str, *whole: str) -> list[tuple[str, object]]:
    pieces = jsonstream.pieces(io.StringIO(text), whole)
    return [(piece.path, piece.value) for piece in pieces if not isinstance(piece.value, ListStart)]


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """What `read` should find, by the whole document."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from leaves(member, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, f"{path}.item" if path else "item")
    else:
        yield path, value


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, WINDOWS, st.booleans())
def test_pieces_are_those_of_the_document(document: object, window: int, indented: bool) -> None:
    text = json.dumps(document, indent=2 if indented else None, ensure_ascii=window % 2 == 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonstream, "_WINDOW", window)
        assert read(text) == list(leaves(document))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.data())
def test_a_document_without_its_end_is_told_from_one_that_is_wrong(document: object, data: st.DataObject) -> None:
    text = json.dumps(document)
    end = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(JSONError) as error:
        read(text[:end])
    assert error.value.is_cut_off


def test_a_value_can_be_taken_whole_and_lists_say_where_they_begin() -> None:
    text = '{"a": [{"b": [1, 2]}, {"b": []}], "c": {"d": [[]]}}'
    assert read(text, "a.item") == [("a.item", {"b": [1, 2]}), ("a.item", {"b": []})]
    starts = [p.path for p in jsonstream.pieces(io.StringIO(text), {"a.item"}) if isinstance(p.value, ListStart)]
    assert starts == ["a", "c.d", "c.d.item"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a" 1}', 1, "colon"),
        ('{"a": 1\n "b": 2}', 2, "comma or }"),
        ('{"a": [1\n\n 2]}', 3, "comma or ]"),
        ("{a: 1}", 1, "quotation marks"),
        ('{"a": 1,}', 1, "quotation marks"),
        ('{"a": [1,]}', 1, "Expecting value"),
        ('{"a": 1}\n}', 2, "more text"),
        ('{"a": 1} // comment', 1, "more text"),
        ('\n{"a": xyz}', 2, "Expecting value"),
        ('{"a": "\n"}', 1, "control character"),
        ('{"a": "\\x"}', 1, "escape"),
        ('{"a": "\\u00zz"}        ', 1, "escape"),
        ("[" * 40 + "]" * 40, 1, "deeper than 32"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(JSONError, match=words) as error:
        read(text)
    assert (error.value.line, error.value.is_cut_off) == (line, False)


@pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads numbers of any length")
def test_a_number_that_python_does_not_read_is_wrong() -> None:
    with pytest.raises(JSONError, match="digits"):
        read('{"a": ' + "9" * 5000 + "}")


def test_lines_are_counted_over_the_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonstream, "_WINDOW", 16)
    text = '{"a": [\n' + "1,\n" * 1000 + "oops]}"
    with pytest.raises(JSONError) as error:
        read(text)
    assert error.value.line == 1002


def test_a_value_without_an_end_is_not_read_to_the_end_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonstream, "_WINDOW", 64)
    monkeypatch.setattr(jsonstream, "_LONGEST_PIECE", 1024)
    file = io.StringIO('{"a": "' + "x" * 1_000_000)
    with pytest.raises(JSONError, match="single value of more than"):
        list(jsonstream.pieces(file, ()))
    assert file.tell() < 10_000


def test_nesting_within_a_piece_is_no_stack_overflow() -> None:
    with pytest.raises(JSONError, match="recursion"):
        read('{"a": [' + "[" * 100_000 + "]" * 100_000 + "]}", "a.item")
