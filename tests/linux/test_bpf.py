"""The bpf(2) calls, on the running kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cgroups import Cgroup, in_child, new_cgroup

from securerun.linux import bpf
from securerun.linux.assembler import R0, R1, Symbol, assemble, calculate, leave, map_reference
from securerun.linux.bpf import AttachFlags, AttachType, Map, MapShape, MapType, Program, attached

HASH = MapShape(MapType.HASH, 4, 8, 300, "numbers")
PASS_ALL = assemble((calculate(R0, "=", 1), leave()), {})
INGRESS, EGRESS = AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS


@pytest.fixture
def cgroup(root: None) -> Iterator[Cgroup]:
    with new_cgroup() as made:
        yield made


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


def value(number: int) -> bytes:
    return number.to_bytes(8, "little")


def numbers(first: int, last: int) -> Mapping[bytes, bytes]:
    return {key(number): value(2 * number) for number in range(first, last)}


# --- maps -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("root")
def test_a_map_keeps_what_is_put_in_until_it_is_deleted() -> None:
    with Map.create(HASH) as table:
        assert table.lookup(key(1)) is None
        table.update(key(1), value(10))
        assert table.lookup(key(1)) == value(10)
        assert table.delete(key(1))
        assert not table.delete(key(1))
        assert list(table.keys()) == []


@pytest.mark.usefixtures("root")
def test_many_entries_go_in_at_once_and_one_by_one() -> None:
    with Map.create(HASH) as at_once, Map.create(HASH) as one_by_one:
        at_once.update_many({})
        at_once.update_many(numbers(0, 300))
        one_by_one.update_one_by_one(numbers(0, 300))
        assert dict(at_once.items()) == dict(one_by_one.items()) == numbers(0, 300)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("refusal", [errno.EINVAL, bpf.ENOTSUPP])
def test_a_kernel_without_batches_gets_entries_one_by_one(refusal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(refusal, "as before Linux 5.6, or for a kind of map without batches")

    monkeypatch.setattr(Map, "_update_batch", refuse)
    with Map.create(HASH) as table:
        table.update_many(numbers(0, 300))
        assert dict(table.items()) == numbers(0, 300)


@pytest.mark.usefixtures("root")
def test_a_full_map_says_so_and_is_not_tried_one_by_one() -> None:
    with Map.create(HASH) as table:
        with pytest.raises(OSError, match="MAP_UPDATE_BATCH: Argument list too long"):
            table.update_many(numbers(0, 301))
        assert len(list(table.keys())) == 300


@pytest.mark.usefixtures("root")
def test_a_trie_answers_with_the_longest_matching_prefix() -> None:
    shape = MapShape(MapType.LPM_TRIE, 8, 8, 10, "networks")
    with Map.create(shape) as trie:
        trie.update_many({key(8) + bytes([10, 0, 0, 0]): value(1), key(24) + bytes([10, 0, 1, 0]): value(2)})
        assert trie.lookup(key(32) + bytes([10, 0, 1, 7])) == value(2)
        assert trie.lookup(key(32) + bytes([10, 0, 2, 7])) == value(1)
        assert trie.lookup(key(32) + bytes([11, 0, 0, 1])) is None


@pytest.mark.usefixtures("root")
def test_a_walk_ends_while_every_key_that_it_stands_on_disappears() -> None:
    with Map.create(HASH) as table:
        table.update_many(numbers(0, 200))
        walked = []
        for number, found in enumerate(table.keys()):
            walked.append(found)
            table.delete(found)
            table.update(key(1000 + number), value(0))
        assert len(walked) == len(set(walked)) <= 2 * HASH.entries + 1


@pytest.mark.usefixtures("root")
def test_items_leaves_out_what_goes_meanwhile() -> None:
    with Map.create(HASH) as table:
        table.update_many(numbers(0, 2))
        for found, _ in table.items():
            for other in list(table.keys()):
                table.delete(other)
            table.update(found, value(0))
        assert len(list(table.items())) == 1


@pytest.mark.usefixtures("root")
def test_an_lru_map_forgets_instead_of_growing() -> None:
    with Map.create(MapShape(MapType.LRU_HASH, 4, 8, 256, "latest")) as table:
        for number in range(2000):
            table.update(key(number), value(number))
        assert 0 < len(list(table.keys())) <= 256


@pytest.mark.usefixtures("root")
def test_keys_and_values_of_another_size_never_reach_the_kernel() -> None:
    with Map.create(HASH) as table:
        for attempt in (
            lambda: table.update(b"short"[:3], value(0)),
            lambda: table.update(key(0), b""),
            lambda: table.update_many({key(0): b"long" * 4}),
            lambda: table.lookup(b""),
            lambda: table.delete(b"12345"),
        ):
            with pytest.raises(ValueError, match="map numbers"):
                attempt()


def test_a_name_that_the_kernel_cannot_keep_is_refused() -> None:
    with pytest.raises(ValueError, match="15 characters"):
        Map.create(MapShape(MapType.HASH, 4, 8, 1, "a-name-of-16-chr"))


@pytest.mark.usefixtures("root")
def test_descriptors_are_closed_on_exec_and_only_once() -> None:
    table = Map.create(HASH)
    assert not os.get_inheritable(table.fileno())
    table.close()
    table.close()
    assert table.fileno() == -1
    with pytest.raises(OSError, match="MAP_LOOKUP_ELEM: Bad file descriptor"):
        table.lookup(key(1))


# --- programs ---------------------------------------------------------------------------------------


def test_a_program_is_attached_asked_for_and_detached(cgroup: Cgroup) -> None:
    with Program.load("first", PASS_ALL) as first, Program.load("second", PASS_ALL) as second:
        assert attached(cgroup.descriptor, INGRESS) == bpf.Attached(AttachFlags.NONE, ())
        first.attach(cgroup.descriptor, INGRESS, AttachFlags.ALLOW_MULTI)
        second.attach(cgroup.descriptor, INGRESS, AttachFlags.ALLOW_MULTI)
        found = attached(cgroup.descriptor, INGRESS)
        assert found.flags == AttachFlags.ALLOW_MULTI
        names = []
        for identifier in found.program_ids:
            with Program.open(identifier) as program:
                names.append(program.information().name)
        assert names == ["first", "second"]
        assert attached(cgroup.descriptor, EGRESS).program_ids == ()
        first.detach(cgroup.descriptor, INGRESS)
        assert attached(cgroup.descriptor, INGRESS).program_ids == found.program_ids[1:]
        with pytest.raises(FileNotFoundError, match="PROG_DETACH"):
            first.detach(cgroup.descriptor, INGRESS)


@pytest.mark.usefixtures("root")
def test_a_programs_maps_are_found_again_by_id() -> None:
    use_map = (map_reference(R1, Symbol("numbers")), calculate(R0, "=", 1), leave())
    with Map.create(HASH) as table:
        table.update(key(1), value(10))
        with Program.load("user", assemble(use_map, {"numbers": table.fileno()})) as program:
            (identifier,) = program.information().map_ids
            with Map.open(identifier) as again:
                assert again.shape == HASH
                assert again.lookup(key(1)) == value(10)
                assert not os.get_inheritable(again.fileno())


@pytest.mark.usefixtures("root")
def test_what_is_not_there_is_not_opened() -> None:
    for attempt in (lambda: Program.open(0x7FFFFFFF), lambda: Map.open(0x7FFFFFFF)):
        with pytest.raises(FileNotFoundError):
            attempt()


@pytest.mark.usefixtures("root")
def test_a_refused_program_comes_with_the_verifiers_words() -> None:
    with pytest.raises(bpf.VerifierError, match="R0 !read_ok") as caught:
        Program.load("no_result", assemble((leave(),), {}))
    assert caught.value.errno == errno.EACCES
    assert "R0 !read_ok" in caught.value.log


@pytest.mark.parametrize(
    "statistics",
    [
        "processed 1 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0\n",
        "verification time 44 usec\nstack depth 0\nprocessed 1 insns (limit 1000000)\n",
        "\nVerification failed: Register Type Safety: Unreadable register\n\nReason:\n  R0 has never been written\n\n"
        "Suggestion:\n  Initialize R0 on every path before this instruction.\n\nstack depth max 0\n"
        "subprog 0 (<unknown>) main insns_self 1 insns_total 1 stack 0\nprocessed 1 insns (limit 1000000)\n",
    ],
    ids=["5.10", "6.18", "7.3"],
)
def test_reason_of_a_refusal_is_told_and_not_the_statistics_after_it(statistics: str) -> None:
    assert bpf._last_words(f"0: (95) exit\nR0 !read_ok\n{statistics}") == " (R0 !read_ok)"


@pytest.mark.usefixtures("root")
def test_attaching_to_something_else_than_a_cgroup_is_an_error(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with Program.load("first", PASS_ALL) as program, pytest.raises(OSError, match="PROG_ATTACH") as caught:
            program.attach(directory, INGRESS, AttachFlags.ALLOW_MULTI)
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(directory)


@pytest.mark.usefixtures("root")
def test_without_privilege_the_error_is_eperm() -> None:
    def work() -> object:
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        try:
            Program.load("first", PASS_ALL)
        except OSError as error:
            return error.errno
        return None

    assert in_child(work) == errno.EPERM


def test_an_unknown_machine_is_named() -> None:
    with pytest.raises(OSError, match="riscv64 is not known"):
        bpf._system_call_number("riscv64")
    assert (bpf._system_call_number("x86_64"), bpf._system_call_number("aarch64")) == (321, 280)
