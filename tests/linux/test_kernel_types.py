"""What the kernel says of its structures: read as it is, and nothing is made of what is no such file."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from securerun.linux import kernel_types, net_cgroups
from securerun.linux.kernel_types import members_of

_STRUCTURE, _FORWARD = 4, 7


def btf(structures: Mapping[str, Sequence[str]], *, padding: int = 0, kind: int = _STRUCTURE) -> bytes:
    """A BTF file with these structures; `padding` types before them, a name each."""
    names, types = b"\0", b""
    places: dict[str, int] = {}  # each name is there once

    def name(text: str) -> int:
        nonlocal names
        if text not in places:
            places[text] = len(names)
            names += text.encode() + b"\0"
        return places[text]

    for number in range(padding):
        types += struct.pack("=III", name(f"before{number}"), _FORWARD << 24, 0)
    for structure, members in structures.items():
        types += struct.pack("=III", name(structure), kind << 24 | len(members), 8)
        for member in members:
            types += struct.pack("=III", name(member) if member else 0, 1, 0)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    return header + types + names


# include/linux/cgroup-defs.h of 5.10.7 and of 5.15.
_FAULTY, _MENDED = {"sock_cgroup_data": [""]}, {"sock_cgroup_data": ["cgroup", "classid", "prioidx"]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel's types are looked for."""
    monkeypatch.setattr(kernel_types, "_PLACE", tmp_path / "vmlinux")
    return tmp_path / "vmlinux"


@pytest.mark.parametrize("padding", [0, 1, 339, 340, 341, 342, 3000])
def test_members_are_found_wherever_they_stand(place: Path, padding: int) -> None:
    place.write_bytes(btf({"sock": ["sock_cgroup_data"], **_MENDED}, padding=padding))
    assert members_of("sock_cgroup_data") == ("cgroup", "classid", "prioidx")
    assert members_of("sock") == ("sock_cgroup_data",)
    assert members_of("sock_cgroup") is None


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\x9f\xeb",
        btf(_MENDED)[:-40],
        btf(_MENDED)[:30],
        b"\xeb\x9f" + btf(_MENDED)[2:],
        btf(_MENDED, kind=_FORWARD),
        struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 2**32 - 1, 0, 2**32 - 1),
    ],
)
def test_of_what_is_no_such_file_nothing_is_believed(place: Path, content: bytes | None) -> None:
    if content is not None:
        place.write_bytes(content)
    assert members_of("sock_cgroup_data") is None


@pytest.mark.parametrize(("content", "may"), [(btf(_FAULTY), True), (btf(_MENDED), False), (b"", True)])
def test_kernel_is_taken_for_one_with_the_fault_unless_it_says_otherwise(
    place: Path, content: bytes, may: bool
) -> None:
    place.write_bytes(content)
    net_cgroups.may_void_filters.cache_clear()
    try:
        assert net_cgroups.may_void_filters() is may
    finally:
        net_cgroups.may_void_filters.cache_clear()
