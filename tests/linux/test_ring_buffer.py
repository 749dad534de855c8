"""Ring buffers: what programs write is read in order, woken by poll(2), and never more than there is room for."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator

import kernel
import packets
import pytest
from programs import result_of

from securerun.firewall.program_steps import load_packet, point
from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    Helper,
    Label,
    Symbol,
    assemble,
    calculate,
    call,
    leave,
    map_reference,
)
from securerun.linux.bpf import Map, Program
from securerun.linux.ring_buffer import RingBuffer, ring_shape


@contextlib.contextmanager
def ring_and_writer() -> Iterator[tuple[RingBuffer, Program]]:
    """A ring buffer, and a program that writes 40 bytes of each packet to it."""
    statements = (
        calculate(R6, "=", R1),
        *load_packet(offset=20, place=-40, size=40, otherwise="end"),
        map_reference(R1, Symbol("ring")),
        *point(R2, -40),
        calculate(R3, "=", 40),
        calculate(R4, "=", 0),
        call(Helper.RINGBUF_OUTPUT),
        Label("end"),
        calculate(R0, "=", 1),
        leave(),
    )
    with contextlib.ExitStack() as stack:
        buffer = stack.enter_context(Map.create(ring_shape("ring")))
        ring = stack.enter_context(contextlib.closing(RingBuffer(buffer)))
        yield ring, stack.enter_context(Program.load("writer", assemble(statements, {"ring": buffer.fileno()})))


def write(program: Program, number: int) -> bytes:
    content = number.to_bytes(4, "big") * 10
    result_of(program, packets.frame(b"\x45" + bytes(19) + content), 0)
    return content


@pytest.fixture
def ring(root: None) -> Iterator[tuple[RingBuffer, Program]]:
    kernel.require(kernel.TEST_RUNS)
    with ring_and_writer() as made:
        yield made


def is_readable(ring: RingBuffer) -> bool:
    return bool(select.select([ring], [], [], 0.2)[0])


def test_records_come_in_their_order_and_once(ring: tuple[RingBuffer, Program]) -> None:
    buffer, program = ring
    assert not is_readable(buffer) and list(buffer.records()) == []
    for beginning in range(0, 5000, 50):
        written = [write(program, number) for number in range(beginning, beginning + 50)]
        assert is_readable(buffer)
        assert list(buffer.records()) == written
    assert not is_readable(buffer)


def test_of_more_than_there_is_room_for_the_first_ones_are_kept(ring: tuple[RingBuffer, Program]) -> None:
    buffer, program = ring
    written = [write(program, number) for number in range(5000)]
    read = list(buffer.records())
    assert 50 < len(read) < 5000
    assert read == written[: len(read)]
    more = write(program, 7)
    assert list(buffer.records()) == [more]
