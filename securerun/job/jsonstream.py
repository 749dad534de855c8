"""JSON text read piece by piece, for documents that are too large to have in memory as a whole.

The standard library decodes each piece; what is here only finds where the pieces are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TextIO

# Between two pieces this much text is in memory, and more only while a piece needs it.
_WINDOW = 1 << 18
# No piece may be longer. Without this, a missing quotation mark would bring the rest of the file into memory.
_LONGEST_PIECE = 1 << 22
_DEEPEST = 32

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
# What the decoder does not take for the beginning of a value, or for more of one, and may be just that.
_BEGINNING = re.compile(r"-?|\.|[eE][+-]?|t|tr|tru|f|fa|fal|fals|n|nu|nul")
# What may follow the first digits of a number whose others are not in the window yet.
_MORE_OF_NUMBER = re.compile(r"(?:\.|[eE][+-]?)?")


class JSONError(Exception):
    """The text is not JSON. line: where; is_cut_off: whether it may only lack its end."""

    def __init__(self, message: str, line: int, is_cut_off: bool) -> None:
        super().__init__(message)
        self.line = line
        self.is_cut_off = is_cut_off


@dataclass(frozen=True)
class Piece:
    """One value of the document. path: the keys that lead to it, `item` for a place in a list, dots between."""

    path: str
    value: object


class ListStart:
    """The value of a piece that stands for the beginning of a list."""


def pieces(file: TextIO, whole: Container[str]) -> Iterator[Piece]:
    """Yield every value in a document, in its order; containers are entered, unless their path is one of `whole`.

    Each list announces itself with a `ListStart`. Raises JSONError, and UnicodeDecodeError from the file.
    """
    text = _Text(file)
    yield from _value(text, "", whole, 0)
    if text.peek():
        raise text.error("more text after the end of the document")


def _value(text: _Text, path: str, whole: Container[str], depth: int) -> Iterator[Piece]:
    opening = text.peek()
    if opening not in ("{", "[") or path in whole:
        yield Piece(path, text.decode())
        return
    if depth == _DEEPEST:
        raise text.error(f"nested deeper than {_DEEPEST} levels")
    text.skip()
    if opening == "[":
        yield Piece(path, ListStart())
    closing = "]" if opening == "[" else "}"
    if text.peek() == closing:
        text.skip()
        return
    while True:
        step = _step(text, opening)
        yield from _value(text, f"{path}.{step}" if path else step, whole, depth + 1)
        if _separator(text, closing) == closing:
            return


def _step(text: _Text, opening: str) -> str:
    if opening == "[":
        return "item"
    if text.peek() != '"':
        raise text.error("a key in quotation marks should stand here")
    key = text.decode()
    if text.peek() != ":":
        raise text.error("a colon should stand here")
    text.skip()
    return str(key)


def _separator(text: _Text, closing: str) -> str:
    found = text.peek()
    if found not in (",", closing):
        raise text.error(f"a comma or {closing} should stand here")
    text.skip()
    return found


class _Text:
    """A window on the text of a file, and a place in it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._window = ""
        self._place = 0
        self._line = 1
        self._ended = False

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end of the file."""
        while True:
            space = _SPACE.match(self._window, self._place)
            self._place = space.end() if space else self._place
            if self._place < len(self._window) or not self._read_more():
                return self._window[self._place : self._place + 1]

    def skip(self) -> None:
        """Pass the character that `peek` found."""
        self._place += 1

    def decode(self) -> object:
        """Return the value that begins with the character that `peek` found."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._place)
            except json.JSONDecodeError as error:
                if not self._read_more():
                    raise self.error(error.msg, error.pos, self._is_cut_off(error)) from error
                continue
            except (ValueError, RecursionError) as error:  # a number of more digits than Python reads; nested too deep
                raise self.error(str(error)) from error
            if not _MORE_OF_NUMBER.fullmatch(self._window, end) or not self._read_more():
                self._place = end
                return value

    def error(self, message: str, place: int | None = None, is_cut_off: bool = False) -> JSONError:
        """Return what to raise for something wrong here."""
        place = self._place if place is None else place
        at_end = self._ended and _BEGINNING.fullmatch(self._window[place:].rstrip()) is not None
        return JSONError(message, self._line + self._window.count("\n", 0, place), is_cut_off or at_end)

    def _is_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Return whether the text ends within a string: the error is then where it begins, or at an escape in it."""
        in_escape = error.msg.startswith("Invalid \\u") and '"' not in self._window[error.pos :]
        return in_escape or error.msg.startswith("Unterminated")

    def _read_more(self) -> bool:
        """Make the window longer at its end; what was passed falls out of it. False where there is no more."""
        if self._ended:
            return False
        kept = len(self._window) - self._place
        if kept > _LONGEST_PIECE:
            raise self.error(f"a single value of more than {_LONGEST_PIECE >> 20} MB")
        more = self._file.read(max(_WINDOW, kept))  # twice as long each time, so that long pieces cost no more
        if not more:
            self._ended = True
            return False
        self._line += self._window.count("\n", 0, self._place)
        self._window = self._window[self._place :] + more
        self._place = 0
        return True
