"""A small assembler of eBPF programs, as far as a program on a cgroup needs one.

Pure: it asks the kernel nothing, and knows nothing of what the programs are for. Numbers and layouts are those of
include/uapi/linux/bpf.h; they are the same on every architecture.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Union


class Register(NamedTuple):
    """r0 to r10; r10 is the frame pointer, below which lie 512 bytes of stack."""

    number: int

    def __str__(self) -> str:
        return f"r{self.number}"


R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = (Register(number) for number in range(11))


class Symbol(NamedTuple):
    """A number that is known only when the program is assembled, by a name that a person understands."""

    name: str

    def __str__(self) -> str:
        return f"[{self.name}]"


class Label(NamedTuple):
    """Where a jump can go."""

    name: str

    def __str__(self) -> str:
        return f"{self.name}:"


class Remark(NamedTuple):
    """A word to the reader of a listing; nothing to the kernel."""

    text: str

    def __str__(self) -> str:
        return f"; {self.text}"


class Instruction(NamedTuple):
    """One instruction: its fields as the kernel wants them, but for what assemble() fills in, and its text.

    A tuple, since each guard makes some thousand. words: what the text is made of, which few people read. target: the
    label to jump to. symbol: the symbol whose number becomes the immediate value.
    """

    words: tuple[object, ...]
    opcode: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0
    target: str = ""
    symbol: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        """Return the instruction for people."""
        return "".join(map(str, self.words))

    @property
    def slots(self) -> int:
        """Return how many of the kernel's 8-byte instructions this one takes."""
        return 2 if self.opcode == _LOAD_64_BIT_IMMEDIATE else 1


Operand = Union[Register, Symbol, int]
Statement = Union[Instruction, Label, Remark]


class Helper(enum.IntEnum):
    """Functions of the kernel that a program can call: arguments in r1 to r5, result in r0 (enum bpf_func_id)."""

    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    KTIME_GET_NS = 5
    SKB_LOAD_BYTES = 26
    GET_SOCKET_COOKIE = 46
    SOCK_OPS_CB_FLAGS_SET = 59
    TCP_SOCK = 96
    RINGBUF_OUTPUT = 130
    STORE_HDR_OPT = 143
    RESERVE_HDR_OPT = 144


_ARITHMETIC = {"+=": 0x07, "-=": 0x17, "|=": 0x47, "&=": 0x57, "<<=": 0x67, ">>=": 0x77, "^=": 0xA7, "=": 0xB7}
_COMPARISONS = {"==": 0x15, ">": 0x25, ">=": 0x35, "&": 0x45, "!=": 0x55, "<": 0xA5}
_WIDTHS = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
_FROM_REGISTER = 0x08
_LOAD = 0x61
_STORE_IMMEDIATE = 0x62
_STORE_REGISTER = 0x63
_ATOMIC_ADD = 0xC3
_BIG_ENDIAN = 0xDC
_JUMP = 0x05
_CALL = 0x85
_EXIT = 0x95
_LOAD_64_BIT_IMMEDIATE = 0x18
_MAP_DESCRIPTOR = 1
_SLOT = struct.Struct("<BBhi")


def calculate(destination: Register, operator: str, operand: Register | int) -> Instruction:
    """Do `destination operator operand` in 64 bits; `=` copies."""
    words = (destination, f" {operator} ", operand)
    if isinstance(operand, Register):
        opcode = _ARITHMETIC[operator] | _FROM_REGISTER
        return Instruction(words, opcode, destination.number, operand.number)
    return Instruction(words, _ARITHMETIC[operator], destination.number, immediate=operand)


def from_network_order(destination: Register, width: int) -> Instruction:
    """Turn `width` bytes of a register from the network's byte order into the host's."""
    words = (destination, f" = be{8 * width} ", destination)
    return Instruction(words, _BIG_ENDIAN, destination.number, immediate=8 * width)


def load(destination: Register, width: int, base: Register, offset: int) -> Instruction:
    """Read `width` bytes at base + offset, the rest of the register becomes zero."""
    words = (destination, " = ", *_memory(width, base, offset))
    return Instruction(words, _LOAD | _WIDTHS[width], destination.number, base.number, offset)


def store(width: int, base: Register, offset: int, value: Register | int) -> Instruction:
    """Write the lower `width` bytes of the value to base + offset."""
    words = (*_memory(width, base, offset), " = ", value)
    if isinstance(value, Register):
        return Instruction(words, _STORE_REGISTER | _WIDTHS[width], base.number, value.number, offset)
    return Instruction(words, _STORE_IMMEDIATE | _WIDTHS[width], base.number, 0, offset, value)


def atomic_add(width: int, base: Register, offset: int, value: Register) -> Instruction:
    """Add to the 4 or 8 bytes at base + offset, undisturbed by other processors."""
    words = ("lock ", *_memory(width, base, offset), " += ", value)
    return Instruction(words, _ATOMIC_ADD | _WIDTHS[width], base.number, value.number, offset)


def jump(target: str) -> Instruction:
    """Go on at the label."""
    return Instruction(("goto ", target), _JUMP, target=target)


def jump_if(left: Register, comparison: str, right: Operand, target: str) -> Instruction:
    """Go on at the label when `left comparison right` holds, unsigned, in 64 bits; `&` asks for common bits."""
    words = ("if ", left, f" {comparison} ", right, " goto ", target)
    opcode = _COMPARISONS[comparison]
    if isinstance(right, Register):
        return Instruction(words, opcode | _FROM_REGISTER, left.number, right.number, target=target)
    if isinstance(right, Symbol):
        return Instruction(words, opcode, left.number, target=target, symbol=right.name)
    return Instruction(words, opcode, left.number, immediate=right, target=target)


def map_reference(destination: Register, name: Symbol) -> Instruction:
    """Put a map into a register, for a helper; the symbol stands for the map's descriptor."""
    words = (destination, " = map", name)
    return Instruction(words, _LOAD_64_BIT_IMMEDIATE, destination.number, _MAP_DESCRIPTOR, symbol=name.name)


def constant(destination: Register, value: Symbol | int) -> Instruction:
    """Put a number of 64 bits into a register; others can only be 32 bits long, and are extended by their sign."""
    words = (destination, " = ", value, " ll")
    if isinstance(value, Symbol):
        return Instruction(words, _LOAD_64_BIT_IMMEDIATE, destination.number, symbol=value.name)
    return Instruction(words, _LOAD_64_BIT_IMMEDIATE, destination.number, immediate=value)


def call(helper: Helper) -> Instruction:
    """Call a helper; r1 to r5 are lost."""
    return Instruction(("call ", helper.name.lower()), _CALL, immediate=int(helper))


def leave() -> Instruction:
    """End the program with the value of r0."""
    return Instruction(("exit",), _EXIT)


def assemble(program: Sequence[Statement], symbols: Mapping[str, int]) -> bytes:
    """Return the program as the kernel takes it, 8 bytes an instruction.

    Raises ValueError for a label or symbol that is missing, a label that is there twice, a number that does not fit.
    """
    labels = _label_positions(program)
    code = bytearray()
    # Of a hash the same statements come again and again, and are the same wherever they stand.
    known: dict[int, bytes] = {}
    for statement in program:
        if isinstance(statement, Instruction):
            encoded = known.get(id(statement))
            if encoded is None:
                encoded = _encode(statement, len(code) // 8, labels, symbols)
                if not statement.target:
                    known[id(statement)] = encoded
            code += encoded
    return bytes(code)


def listing(program: Sequence[Statement]) -> str:
    """Return the program for people: a line for each label and, indented, for each instruction and remark."""
    return "\n".join(str(line) if isinstance(line, Label) else f"    {line}" for line in program)


def _memory(width: int, base: Register, offset: int) -> tuple[object, ...]:
    return f"*(u{8 * width} *)(", base, " - " if offset < 0 else " + ", abs(offset), ")"


def _label_positions(program: Sequence[Statement]) -> dict[str, int]:
    positions: dict[str, int] = {}
    position = 0
    for statement in program:
        if isinstance(statement, Instruction):
            position += 2 if statement.opcode == _LOAD_64_BIT_IMMEDIATE else 1
        elif isinstance(statement, Label):
            if statement.name in positions:
                raise ValueError(f"label {statement.name} is there twice")
            positions[statement.name] = position
    return positions


def _encode(instruction: Instruction, position: int, labels: Mapping[str, int], symbols: Mapping[str, int]) -> bytes:
    offset, immediate = instruction.offset, instruction.immediate
    if instruction.target:
        if instruction.target not in labels:
            raise ValueError(f"{instruction}: there is no such label")
        offset = labels[instruction.target] - position - instruction.slots
    if instruction.symbol:
        if instruction.symbol not in symbols:
            raise ValueError(f"{instruction}: nothing is known of [{instruction.symbol}]")
        immediate = symbols[instruction.symbol]
    registers = instruction.source << 4 | instruction.destination
    try:
        if instruction.opcode != _LOAD_64_BIT_IMMEDIATE:
            return _SLOT.pack(instruction.opcode, registers, offset, immediate)
        if instruction.source == _MAP_DESCRIPTOR:
            return _SLOT.pack(instruction.opcode, registers, offset, immediate) + bytes(_SLOT.size)
        lower, upper = struct.unpack("<ii", struct.pack("<Q", immediate))
        return struct.pack("<BBhiii", instruction.opcode, registers, offset, lower, 0, upper)
    except struct.error as error:
        raise ValueError(f"{instruction}: {error}") from error
