"""What the shield's programs write to their stack, walked through as the strictest verifier does.

To who has CAP_BPF and not CAP_PERFMON, Linux 5.10 to 6.7 refuse "to corrupt a spilled pointer": once a store began at a
multiple of 8, nothing but another store of 8 bytes may go to these 8 (kernel/bpf/verifier.c). Newer kernels take it, so
that no test that asks the kernel at hand would tell.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from securerun.firewall.policy import Admission, Opening
from securerun.firewall.shield_program import PROGRAMS
from securerun.firewall.tag_program import tag_program
from securerun.firewall.tag_writer import writing_program
from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R10,
    Helper,
    Instruction,
    Label,
    Statement,
    calculate,
    call,
    leave,
    store,
)

NETWORKS = (ipaddress.ip_network("10.9.0.0/16"), ipaddress.ip_network("fd09::/32"))
PUBLIC = (Opening(8080, 8090, NETWORKS), Opening(9090, 9090, NETWORKS[:1]), Opening(9100, 9100, ()))

# include/uapi/linux/bpf.h: classes of instructions, and widths
CLASS, STORE_IMMEDIATE, STORE_REGISTER, JUMP = 0x07, 0x02, 0x03, 0x05
WIDTHS = {0x10: 1, 0x08: 2, 0x00: 4, 0x18: 8}
ATOMIC, MEMORY = 0xC0, 0xE0
COPY, ADD, COPY_IMMEDIATE = 0xBF, 0x07, 0xB7
GOTO, CALL, EXIT = 0x05, 0x85, 0x95


@dataclass
class State:
    """What may be so at one place of a program.

    kept: the multiples of 8 where a store began. points, numbers: what registers hold, of the stack or as a number.
    """

    kept: set[int] = field(default_factory=set)
    points: dict[int, int] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)

    def copy(self) -> State:
        return State(set(self.kept), dict(self.points), dict(self.numbers))

    def join(self, other: State) -> None:
        self.kept |= other.kept
        self.points = dict(self.points.items() & other.points.items())
        self.numbers = dict(self.numbers.items() & other.numbers.items())


def corrupting(program: Sequence[Statement]) -> Iterator[str]:
    """Yield what such a verifier refuses. All jumps go forward, so that each place is come to once."""
    arriving: dict[str, State] = {}
    state: State | None = State()
    for statement in program:
        if isinstance(statement, Label):
            if statement.name in arriving:
                state = _joined(state, arriving.pop(statement.name))
        elif isinstance(statement, Instruction) and state is not None:
            yield from (f"{statement}: {place} was kept" for place in _step(statement, state))
            if statement.target:
                arriving[statement.target] = _joined(arriving.get(statement.target), state.copy())
            if statement.opcode in (GOTO, EXIT):
                state = None
    assert not arriving, "a jump went back"


def _joined(one: State | None, other: State) -> State:
    if one is not None:
        other.join(one)
    return other


def _step(statement: Instruction, state: State) -> set[int]:
    """Do what an instruction does; return the kept places of which it writes a part."""
    kind, destination = statement.opcode & CLASS, statement.destination
    if statement.opcode == CALL:
        written: set[int] = set()
        if statement.immediate == Helper.SKB_LOAD_BYTES:
            first = state.points[R3.number]
            written = _eights(first, state.numbers[R4.number])
        for register in range(R0.number, R6.number):
            state.points.pop(register, None)
            state.numbers.pop(register, None)
        return written & state.kept
    if kind in (STORE_IMMEDIATE, STORE_REGISTER):
        if destination != R10.number:
            assert destination not in state.points, "the stack is written by r10 alone"
            return set()
        assert statement.opcode & MEMORY != ATOMIC
        return _store(statement.offset, WIDTHS[statement.opcode & 0x18], state)
    if kind != JUMP:
        _calculate(statement, state)
    return set()


def _store(place: int, width: int, state: State) -> set[int]:
    assert place % width == 0
    (eight,) = _eights(place, width)
    refused = {eight} & state.kept if width < 8 else set()
    if place == eight:
        state.kept.add(eight)
    return refused


def _calculate(statement: Instruction, state: State) -> None:
    destination = statement.destination
    pointed = state.points.pop(destination, None)
    state.numbers.pop(destination, None)
    if statement.opcode == COPY and statement.source == R10.number:
        state.points[destination] = 0
    elif statement.opcode == ADD and pointed is not None:
        state.points[destination] = pointed + statement.immediate
    elif statement.opcode == COPY_IMMEDIATE:
        state.numbers[destination] = statement.immediate


def _eights(first: int, size: int) -> set[int]:
    return {place - place % 8 for place in range(first, first + size)}


ALL = {
    **{
        f"{program.name}, {'public' if public else 'private'}": program.build(interfaces, public)
        for program in PROGRAMS
        for interfaces, public in (((), ()), (("eth0",), PUBLIC))
    },
    **{
        f"{admission}, loopback {'closed' if closes else 'open'}, from {'any' if any_ else 'some'}": tag_program(
            admission, close_loopback=closes, from_anywhere=any_
        ).build(("eth0",), PUBLIC)
        for admission in Admission
        for closes in (False, True)
        for any_ in (False, True)
    },
    "writing": writing_program(),
}


@pytest.mark.parametrize("program", ALL.values(), ids=ALL.keys())
def test_no_part_of_what_the_verifier_keeps_is_overwritten(program: Sequence[Statement]) -> None:
    assert not list(corrupting(program))


def _loaded(place: int, size: int) -> tuple[Statement, ...]:
    point = (calculate(R3, "=", R10), calculate(R3, "+=", place))
    return (calculate(R1, "=", R6), *point, calculate(R4, "=", size), call(Helper.SKB_LOAD_BYTES))


@pytest.mark.parametrize(
    ("statements", "refused"),
    [
        ((store(4, R10, -8, R2), store(4, R10, -4, R2)), True),
        ((store(4, R10, -4, R2), store(4, R10, -8, R2)), False),
        ((store(4, R10, -8, 1), store(4, R10, -8, 1)), True),
        ((store(8, R10, -8, R2), store(2, R10, -2, R2)), True),
        ((store(8, R10, -8, R2), store(8, R10, -8, R2)), False),
        ((store(4, R10, -4, R2), store(4, R10, -4, R2)), False),
        ((store(4, R10, -8, R2), *_loaded(-20, 16)), True),
        ((store(4, R10, -8, R2), *_loaded(-20, 12)), False),
        ((*_loaded(-20, 16), store(4, R10, -8, R2)), False),
    ],
)
def test_the_walk_refuses_what_such_a_verifier_refuses(statements: tuple[Statement, ...], refused: bool) -> None:
    assert bool(list(corrupting((*statements, leave())))) is refused
