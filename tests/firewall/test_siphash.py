"""SipHash-2-4 against the vectors of its authors, in Python and as instructions that the kernel runs."""

from __future__ import annotations

import random
import struct

import kernel
import packets
import pytest
from programs import result_of

from securerun.firewall import siphash
from securerun.firewall.program_steps import load_packet
from securerun.linux.assembler import R0, R1, R2, R6, Label, assemble, calculate, constant, jump_if, leave
from securerun.linux.bpf import Program

# https://github.com/veorq/SipHash, vectors.h: the hashes of the messages 00 01 02 ..., each a byte longer, under a key
# that begins likewise.
KEY = bytes(range(16))
VECTORS = [
    "310e0edd47db6f72",
    "fd67dc93c539f874",
    "5a4fa9d909806c0d",
    "2d7efbd796666785",
    "b7877127e09427cf",
    "8da699cd64557618",
    "cee3fe586e46c9cb",
    "37d1018bf50002ab",
    "6224939a79f5f593",
    "b0e4a90bdf82009e",
    "f3b9dd94c5bb5d7a",
    "a7ad6b22462fb3f4",
    "fbe50e86bc8f1e75",
    "903d84c02756ea14",
    "eef27a8e90ca23f7",
    "e545be4961ca29a1",
]


@pytest.mark.parametrize("length", range(len(VECTORS)))
def test_the_hash_is_that_of_the_reference(length: int) -> None:
    assert siphash.siphash(KEY, bytes(range(length))).to_bytes(8, "little").hex() == VECTORS[length]


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(17)])
def test_a_key_of_another_length_is_none(key: bytes) -> None:
    with pytest.raises(ValueError, match="16 are needed"):
        siphash.siphash(key, b"")
    with pytest.raises(ValueError, match="16 are needed"):
        siphash.state_words("name", key)


def test_the_instructions_are_that_hash(root: None) -> None:
    kernel.require(kernel.TEST_RUNS)
    numbers = random.Random(24)  # noqa: S311 - the same each time
    cases = [(KEY, bytes(range(15)))]
    cases += [(numbers.randbytes(16), numbers.randbytes(length)) for length in (0, 7, 8, 22, 22, 22, 39)]
    for key, message in cases:
        expected = siphash.siphash(key, message)
        assert _kernel_says(key, message, expected)
        assert not _kernel_says(key, message, expected ^ 1 << numbers.randrange(64))


def _kernel_says(key: bytes, message: bytes, expected: int) -> bool:
    """Whether a program that hashes what is in a packet comes to this."""
    padded = message + bytes(-len(message) % 8) if len(message) % 8 else message + bytes(8)
    words = struct.unpack(f"<{len(padded) // 8}Q", padded)
    content = struct.pack(f"<{len(words)}Q", *words[:-1], words[-1] | siphash.last_word(len(message)))
    statements = (
        calculate(R6, "=", R1),
        *load_packet(offset=20, place=-len(content), size=len(content), otherwise="no"),
        *siphash.begin("any"),
        *siphash.take_in(tuple(range(-len(content), 0, 8))),
        constant(R2, expected),
        calculate(R0, "=", 1),
        jump_if(siphash.RESULT, "==", R2, "end"),
        Label("no"),
        calculate(R0, "=", 0),
        Label("end"),
        leave(),
    )
    with Program.load("hashing", assemble(statements, siphash.state_words("any", key))) as program:
        header = b"\x45" + bytes(19)
        return result_of(program, packets.frame(header + content), 0) == 1


def test_a_key_stands_in_no_listing() -> None:
    statements = tuple(siphash.begin("secret"))
    assert [str(each) for each in statements] == [f"r{n + 1} = [secret key {n}] ll" for n in range(4)]
