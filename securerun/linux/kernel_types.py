"""What the kernel says of its own structures: the BTF of vmlinux (Documentation/bpf/btf.rst), Linux 5.4 and newer."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

_PLACE = Path("/sys/kernel/btf/vmlinux")
# struct btf_header: magic, version, flags, its own length, where types and names begin behind it, and their lengths.
_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
# struct btf_type: name, number of members and kind, size; struct btf_member: name, type, place.
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_NAME = struct.Struct("=I")
_STRUCTURE = 4
_MOST_MEMBERS = 512
_LONGEST_NAME = 64
# As much as sysfs gives at once (fs/kernfs/file.c).
_PIECE = 4096


def members_of(structure: str) -> tuple[str, ...] | None:
    """Return the names of a structure's members, "" for those without; None where the kernel does not tell.

    What is looked for is mostly near the beginning: a third of a millisecond, and 6 ms for all of it.
    """
    try:
        descriptor = os.open(_PLACE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _Types(descriptor).members_of(structure.encode())
    except (OSError, ValueError, struct.error):
        return None
    finally:
        os.close(descriptor)


class _Types:
    """The two parts of a BTF file: types and names. Raises ValueError for another file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        magic, _, _, length, types, types_length, names, names_length = _HEADER.unpack(self._read(0, _HEADER.size))
        if magic != _MAGIC:
            raise ValueError("no BTF of this machine's byte order")
        self._types = range(length + types, length + types + types_length)
        self._names = range(length + names, length + names + names_length)

    def members_of(self, structure: bytes) -> tuple[str, ...] | None:
        # Each name is there once, between two zeros.
        place = next(self._places(b"\0" + structure + b"\0", self._names), None)
        if place is None:
            return None
        name = place + 1 - self._names.start
        for place in self._places(_NAME.pack(name), self._types):
            if (place - self._types.start) % _NAME.size:
                continue
            _, kind_and_number, size = _TYPE.unpack(self._read(place, _TYPE.size))
            number = kind_and_number & 0xFFFF
            if kind_and_number >> 24 & 0x1F == _STRUCTURE and size and 0 < number <= _MOST_MEMBERS:
                return tuple(self._members(place + _TYPE.size, number))
        return None

    def _members(self, place: int, number: int) -> Iterator[str]:
        for name, _, _ in _MEMBER.iter_unpack(self._read(place, number * _MEMBER.size)):
            text = self._read(self._names.start + name, min(_LONGEST_NAME, len(self._names) - name))
            yield text.partition(b"\0")[0].decode("ascii")

    def _places(self, text: bytes, where: range) -> Iterator[int]:
        """Yield where a text stands in a part of the file."""
        seen, begin = b"", where.start
        for place in range(where.start, where.stop, _PIECE):
            piece = seen + self._read(place, min(_PIECE, where.stop - place))
            found = piece.find(text)
            while found >= 0:
                yield begin + found
                found = piece.find(text, found + 1)
            seen = piece[1 - len(text) :]
            begin = place + _PIECE - len(seen)

    def _read(self, place: int, length: int) -> bytes:
        pieces = b""
        while len(pieces) < length:
            piece = os.pread(self._descriptor, length - len(pieces), place + len(pieces))
            if not piece:
                raise ValueError("the file ends in the middle")
            pieces += piece
        return pieces
