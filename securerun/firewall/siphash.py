"""SipHash-2-4: a keyed hash of few bytes, 64 bits of it, in Python and as instructions of a program.

Jean-Philippe Aumasson and Daniel J. Bernstein, "SipHash: a fast short-input PRF" (2012). It was made for what comes
with a packet: who does not have the key cannot tell a right value from any other, and one takes some 30 ns.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator

from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R10,
    Register,
    Statement,
    Symbol,
    calculate,
    constant,
    load,
)

KEY_SIZE = 16
WORD_SIZE = 8

_BEGINNING = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
_END_MARK = 0xFF
_ROUNDS_A_WORD, _LAST_ROUNDS = 2, 4
_MASK = (1 << 64) - 1

# Of a program: the four words of the state, the word of the message that is taken in, and one to turn words with.
_STATE = (R1, R2, R3, R4)
_WORD, _SPARE = R5, R0
RESULT = R1


def siphash(key: bytes, message: bytes) -> int:
    """Return the hash of a message, of any length, under a key of 16 bytes."""
    state = list(_first_state(key))
    for word in _words_of(message):
        state[3] ^= word
        for _ in range(_ROUNDS_A_WORD):
            state = _after_round(*state)
        state[0] ^= word
    state[2] ^= _END_MARK
    for _ in range(_LAST_ROUNDS):
        state = _after_round(*state)
    return state[0] ^ state[1] ^ state[2] ^ state[3]


def last_word(rest: int) -> int:
    """Return what is in the last word beside the end of the message, of whose length these are the lower 8 bits."""
    return rest << 56


def state_symbols(name: str) -> tuple[Symbol, ...]:
    """Return what stands in a program for the words that a key begins with, by the name of the key."""
    return tuple(Symbol(f"{name} key {number}") for number in range(len(_STATE)))


def state_words(name: str, key: bytes) -> dict[str, int]:
    """Return the numbers that those symbols stand for."""
    return {symbol.name: word for symbol, word in zip(state_symbols(name), _first_state(key))}


def begin(name: str) -> Iterator[Statement]:
    """Begin with a key, by its name: r0 to r5 belong to the hash until its end."""
    for register, symbol in zip(_STATE, state_symbols(name)):
        yield constant(register, symbol)


def take_in(places: tuple[int, ...]) -> Iterator[Statement]:
    """Take in the words of a message, which lie at these places of the stack, and leave the hash in `RESULT`."""
    for place in places:
        yield load(_WORD, WORD_SIZE, R10, place)
        yield calculate(_STATE[3], "^=", _WORD)
        yield from _rounds(_ROUNDS_A_WORD)
        yield calculate(_STATE[0], "^=", _WORD)
    yield calculate(_STATE[2], "^=", _END_MARK)
    yield from _rounds(_LAST_ROUNDS)
    for register in _STATE[1:]:
        yield calculate(RESULT, "^=", register)


def _first_state(key: bytes) -> tuple[int, ...]:
    if len(key) != KEY_SIZE:
        raise ValueError(f"a key of {len(key)} bytes where {KEY_SIZE} are needed")
    halves = struct.unpack("<QQ", key)
    return tuple(word ^ halves[number % 2] for number, word in enumerate(_BEGINNING))


def _words_of(message: bytes) -> Iterator[int]:
    whole = len(message) // WORD_SIZE * WORD_SIZE
    for place in range(0, whole, WORD_SIZE):
        yield int.from_bytes(message[place : place + WORD_SIZE], "little")
    yield int.from_bytes(message[whole:], "little") | last_word(len(message) & 0xFF)


def _after_round(v0: int, v1: int, v2: int, v3: int) -> list[int]:
    v0, v2 = v0 + v1 & _MASK, v2 + v3 & _MASK
    v1, v3 = _turned(v1, 13) ^ v0, _turned(v3, 16) ^ v2
    v0, v2 = _turned(v0, 32) + v3 & _MASK, v2 + v1 & _MASK
    v3, v1 = _turned(v3, 21) ^ v0, _turned(v1, 17) ^ v2
    return [v0, v1, _turned(v2, 32), v3]


def _turned(word: int, bits: int) -> int:
    return (word << bits | word >> 64 - bits) & _MASK


def _rounds(number: int) -> tuple[Statement, ...]:
    return _round() * number


@functools.cache
def _round() -> tuple[Statement, ...]:
    """Return the statements of a round, made once: a program has ten of them, and each guard two programs."""
    v0, v1, v2, v3 = _STATE
    return (
        calculate(v0, "+=", v1),
        calculate(v2, "+=", v3),
        *_turn(v1, 13),
        *_turn(v3, 16),
        calculate(v1, "^=", v0),
        calculate(v3, "^=", v2),
        *_turn(v0, 32),
        calculate(v0, "+=", v3),
        calculate(v2, "+=", v1),
        *_turn(v3, 21),
        *_turn(v1, 17),
        calculate(v3, "^=", v0),
        calculate(v1, "^=", v2),
        *_turn(v2, 32),
    )


def _turn(register: Register, bits: int) -> Iterator[Statement]:
    yield calculate(_SPARE, "=", register)
    yield calculate(_SPARE, ">>=", 64 - bits)
    yield calculate(register, "<<=", bits)
    yield calculate(register, "|=", _SPARE)
