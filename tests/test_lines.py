"""What comes in pieces: lines are what they were, and who cuts them small has nobody look at all of it each time."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from securerun import lines
from securerun.guard.protocol import Message, Release, encode
from securerun.guard.server import Answers, Orders
from securerun.lines import LineBuffer
from securerun.protection import keeper, ways

PIECES = 5000


class Tally:
    """How many bytes were copied or looked at."""

    spent: ClassVar[int] = 0


class Piece(bytes):
    """Bytes that have come, which tell of what they are put to, and of each look at all of them."""

    def __add__(self, other: bytes) -> Piece:  # type: ignore[override]
        return self._told(bytes(self) + other)

    def __radd__(self, other: bytes) -> Piece:
        return self._told(other + bytes(self))

    def __contains__(self, other: bytes) -> bool:  # type: ignore[override]
        return self._told(bytes(self)).find(other) >= 0

    def partition(self, other: bytes) -> tuple[Piece, Piece, Piece]:  # type: ignore[override]
        before, found, after = bytes(self._told(bytes(self))).partition(other)
        return Piece(before), Piece(found), Piece(after)

    def split(self, other: bytes) -> list[Piece]:  # type: ignore[override]
        return list(map(Piece, bytes(self._told(bytes(self))).split(other)))

    @staticmethod
    def _told(whole: bytes) -> Piece:
        Tally.spent += len(whole)
        return Piece(whole)


class Buffer(bytearray):
    """What is there of a line, which tells of the same."""

    def __iadd__(self, other: bytes) -> Buffer:  # type: ignore[override,misc]
        Tally.spent += len(other)
        super().extend(other)
        return self

    def find(self, what: bytes, start: int = 0) -> int:  # type: ignore[override]
        found = super().find(what, start)
        Tally.spent += (len(self) if found < 0 else found) - start
        return found


@pytest.fixture(autouse=True)
def _counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tally, "spent", 0)
    monkeypatch.setattr(lines, "bytearray", Buffer, raising=False)


def heard_by_a_guard(pieces: Iterator[bytes], _: pytest.MonkeyPatch) -> Callable[[], Message | None]:
    channel: Any = SimpleNamespace(read=lambda: next(pieces), descriptor=-1)
    return Orders(channel).read


def heard_by_a_launcher(pieces: Iterator[bytes], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Message | None]:
    monkeypatch.setattr(ways, "os", SimpleNamespace(read=lambda *_: next(pieces)))
    monkeypatch.setattr(ways, "_can_be_read", lambda *_: True)
    connection = ways.Connection(-1, -1, None, None)
    return lambda: connection.receive(None)


def heard_by_a_keeper(pieces: Iterator[bytes], _: pytest.MonkeyPatch) -> Callable[[], Message | None]:
    connection: Any = SimpleNamespace(recv=lambda _: next(pieces))
    found = keeper.Lines(connection)

    def read() -> Message | None:
        for kind, body in found.read():
            assert kind == "release"
            return Release(**body)
        return None

    return read


@pytest.mark.parametrize("who", [heard_by_a_guard, heard_by_a_launcher, heard_by_a_keeper])
def test_message_that_comes_a_byte_at_a_time_is_looked_at_a_few_times_and_not_at_each_byte_anew(
    who: Callable[[Iterator[bytes], pytest.MonkeyPatch], Callable[[], Message | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = Release(failed=True)
    line = encode(message).replace(b":", b":" + b" " * PIECES, 1)
    hear = who(iter([Piece(bytes([byte])) for byte in line]), monkeypatch)
    assert next(found for found in iter(hear, 0) if found is not None) == message
    assert Tally.spent <= 8 * len(line)


def test_what_is_said_to_a_launcher_that_reads_a_byte_at_a_time_is_not_copied_for_each() -> None:
    whole: list[object] = []

    def write(data: bytes) -> int:
        whole.append(memoryview(data).obj)
        return 1

    near, far = socket.socketpair()
    with near, far:
        channel: Any = SimpleNamespace(write=write, descriptor=near.fileno())
        Answers(channel).send(Release(failed=True))
    assert len(whole) == len(encode(Release(failed=True))) and len(set(map(id, whole))) == 1


def test_lines_are_the_same_however_they_are_cut() -> None:
    text = b"one\n\ntwo two\n" + b"3" * 100 + b"\nrest"
    for size in range(1, len(text) + 1):
        buffer = LineBuffer()
        found: list[bytes] = []
        for at in range(0, len(text), size):
            buffer.add(text[at : at + size])
            assert buffer.has_line() == (b"\n" in text[: at + size].split(b"\n", len(found))[-1])
            found += iter(buffer.take, None)
        assert [*found, text[-len(buffer) :]] == text.split(b"\n")
        assert not buffer.has_line() and buffer.take() is None
