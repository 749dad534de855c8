"""The assembler: what a program looks like to the kernel and to people."""

from __future__ import annotations

import pytest

from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R10,
    Helper,
    Label,
    Remark,
    Symbol,
    assemble,
    atomic_add,
    calculate,
    call,
    constant,
    from_network_order,
    jump,
    jump_if,
    leave,
    listing,
    load,
    map_reference,
    store,
)


def test_instructions_are_encoded_as_the_kernel_documents_them() -> None:
    # Documentation/bpf/standardization/instruction-set.rst
    for instruction, expected in (
        (calculate(R0, "=", 1), "b700000001000000"),
        (calculate(R2, "=", R10), "bfa2000000000000"),
        (calculate(R2, "+=", -8), "07020000f8ffffff"),
        (calculate(R2, "-=", R1), "1f12000000000000"),
        (calculate(R2, ">>=", 2), "7702000002000000"),
        (calculate(R2, "^=", R1), "af12000000000000"),
        (constant(R1, 0x8000000100000002), "1801000002000000" + "0000000001000080"),
        (load(R2, 4, R1, 40), "6112280000000000"),
        (load(R2, 1, R10, -8), "71a2f8ff00000000"),
        (store(2, R10, -4, 5), "6a0afcff05000000"),
        (store(8, R10, -8, R1), "7b1af8ff00000000"),
        (atomic_add(8, R0, 0, R1), "db10000000000000"),
        (from_network_order(R2, 2), "dc02000010000000"),
        (call(Helper.SKB_LOAD_BYTES), "850000001a000000"),
        (leave(), "9500000000000000"),
    ):
        assert assemble((instruction,), {}).hex() == expected, str(instruction)


def test_a_jump_goes_to_its_label_over_instructions_of_two_slots() -> None:
    program = (
        jump_if(R1, "==", 0, "end"),
        map_reference(R1, Symbol("numbers")),
        jump("end"),
        Label("end"),
        leave(),
    )
    assert assemble(program, {"numbers": 7}).hex() == (
        "1501030000000000" + "1811000007000000" + "0000000000000000" + "0500000000000000" + "9500000000000000"
    )


def test_a_jump_can_go_back() -> None:
    assert assemble((Label("again"), jump("again")), {}).hex() == "0500ffff00000000"


def test_a_symbol_can_be_compared_with() -> None:
    code = assemble((jump_if(R2, "==", Symbol("interface eth0"), "end"), Label("end"), leave()), {"interface eth0": 9})
    assert code[:8].hex() == "1502000009000000"


def test_what_cannot_be_assembled_is_refused_by_name() -> None:
    for program, complaint in (
        ((jump("nowhere"),), "no such label"),
        ((map_reference(R1, Symbol("numbers")),), "nothing is known of .numbers."),
        ((Label("twice"), Label("twice"), leave()), "twice"),
        ((calculate(R0, "=", 1 << 31),), "r0 = 2147483648"),
    ):
        with pytest.raises(ValueError, match=complaint):
            assemble(program, {})


def test_a_listing_reads_like_a_program() -> None:
    program = (
        load(R2, 4, R1, 40),
        jump_if(R2, "==", Symbol("interface eth0"), "pass"),
        map_reference(R1, Symbol("peers4")),
        store(4, R10, -20, R2),
        Label("pass"),
        Remark("all is well"),
        leave(),
    )
    assert len(assemble(program, {"interface eth0": 2, "peers4": 3})) == 8 * 6
    assert listing(program).splitlines() == [
        "    r2 = *(u32 *)(r1 + 40)",
        "    if r2 == [interface eth0] goto pass",
        "    r1 = map[peers4]",
        "    *(u32 *)(r10 - 20) = r2",
        "pass:",
        "    ; all is well",
        "    exit",
    ]
