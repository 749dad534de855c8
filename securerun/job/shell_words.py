"""The simple commands of a shell's text, as far as they can be told without running it: words, without their quotes.

No shell's grammar: loops, branches and functions are read as the commands in them, and what a variable holds is not
known. Linear in the text, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_HERE = re.compile(r"<<-?[ \t]*(['\"]?)([A-Za-z_][A-Za-z0-9_]*)\1")
_ENDS_COMMAND = frozenset("\n;&|()`")
# What a here document is read by as a script.
_READS_COMMANDS = frozenset(("sh", "bash", "dash", "zsh", "ksh"))


class _Reader:
    """What has been read of the command that is being read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._word: list[str] | None = None
        self._words: list[str] = []
        self._depth = 0
        self._to_skip: list[str] = []

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each simple command."""
        while self._place < len(self._text):
            character = self._text[self._place]
            self._place += 1
            if character in _ENDS_COMMAND:
                yield from self._end_command(character)
            elif character in " \t\r":
                self._end_word()
            elif character == "#" and self._word is None:
                self._skip_to("\n")
            elif character == "<" and self._text.startswith("<", self._place):
                self._begin_here_document()
            elif character == "\\":
                self._take_escaped()
            elif character in "'\"":
                self._take_quoted(character)
            else:
                self._add(character)
        yield from self._end_command("\n")

    def _end_command(self, character: str) -> Iterator[list[str]]:
        self._end_word()
        words, self._words = self._words, []
        is_pattern = character == ")" and self._depth == 0  # of a `case`
        self._depth = max(0, self._depth + (character == "(") - (character == ")"))
        if character == "\n":
            self._skip_here_documents()
        if words and not is_pattern:
            yield words

    def _end_word(self) -> None:
        if self._word is not None:
            self._words.append("".join(self._word))
        self._word = None

    def _add(self, text: str) -> None:
        self._word = self._word or []
        self._word.append(text)

    def _take_escaped(self) -> None:
        escaped = self._text[self._place : self._place + 1]
        self._place += 1
        if escaped != "\n":
            self._add(escaped)

    def _take_quoted(self, quote: str) -> None:
        self._add("")
        while self._place < len(self._text):
            character = self._text[self._place]
            self._place += 1
            if character == quote:
                return
            if character == "\\" and quote == '"':
                character = self._text[self._place : self._place + 1]
                self._place += 1
            self._add(character)

    def _begin_here_document(self) -> None:
        match = _HERE.match(self._text, self._place - 1)
        self._end_word()
        if match is None:  # <<<, or arithmetic
            self._skip_over("<")
            return
        self._place = match.end()
        if not (self._words and self._words[0] in _READS_COMMANDS):
            self._to_skip.append(match.group(2))

    def _skip_here_documents(self) -> None:
        for end in self._to_skip:
            match = re.compile(rf"^\t*{end}$", re.MULTILINE).search(self._text, self._place)
            self._place = len(self._text) if match is None else match.end()
        self._to_skip.clear()

    def _skip_over(self, character: str) -> None:
        while self._text.startswith(character, self._place):
            self._place += 1

    def _skip_to(self, character: str) -> None:
        found = self._text.find(character, self._place)
        self._place = len(self._text) if found < 0 else found


def simple_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each simple command in a shell's text."""
    return _Reader(text).commands()
