"""Steps that all of the shield's programs take: a look into a map, a count, a part of a packet. Asks nobody.

The context of a program is in r6; r0 to r5 are lost by each of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R10,
    Helper,
    Label,
    Register,
    Statement,
    Symbol,
    atomic_add,
    calculate,
    call,
    jump,
    jump_if,
    map_reference,
    store,
)

# include/uapi/linux/bpf.h: BPF_NOEXIST
_ONLY_IF_NEW = 1


def count(name: Symbol, key: int, first: int, then: str) -> Iterator[Statement]:
    """Count one more under the key, and go on at `then`. first: 8 bytes of the stack for the first one."""
    yield from look_up(name, key)
    yield jump_if(R0, "==", 0, f"first in {name}")
    yield calculate(R1, "=", 1)
    yield atomic_add(8, R0, 0, R1)
    yield jump(then)
    yield Label(f"first in {name}")
    yield store(8, R10, first, 1)
    # Another processor may have been first; then its count stands, and this packet is not in it.
    yield from add(name, key, first)
    yield jump(then)


def add(name: Symbol, key: int, value: int) -> Iterator[Statement]:
    """Add an entry to a map, unless it has one for this key; r0 is 0 where that was done."""
    yield map_reference(R1, name)
    yield from point(R2, key)
    yield from point(R3, value)
    yield calculate(R4, "=", _ONLY_IF_NEW)
    yield call(Helper.MAP_UPDATE_ELEM)


def look_up(name: Symbol, key: int) -> Iterator[Statement]:
    """Leave where the value under a key on the stack is in r0, 0 where there is none."""
    yield map_reference(R1, name)
    yield from point(R2, key)
    yield call(Helper.MAP_LOOKUP_ELEM)


def load_packet(offset: int | Register, place: int, size: int, otherwise: str) -> Iterator[Statement]:
    """Copy bytes of the packet, counted from the network header, to the stack; go to `otherwise` if it is short."""
    yield calculate(R1, "=", R6)
    yield calculate(R2, "=", offset)
    yield from point(R3, place)
    yield calculate(R4, "=", size)
    yield call(Helper.SKB_LOAD_BYTES)
    yield jump_if(R0, "!=", 0, otherwise)


def point(register: Register, place: int) -> Iterator[Statement]:
    """Have a register point to a place of the stack."""
    yield calculate(register, "=", R10)
    yield calculate(register, "+=", place)
