"""A ring buffer that programs in the kernel write to and one process reads, woken by poll(2). Linux 5.8.

Layout and protocol: kernel/bpf/ringbuf.c, tools/lib/bpf/ringbuf.c. The reader's position is a page of its own, which it
writes; then come the writer's position and the records, to be read only. A record is 8 bytes of length and flags and
what was written, up to a multiple of 8. The kernel refuses to write to a full one.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator

from securerun.linux.bpf import Map, MapShape, MapType

_POSITION = struct.Struct("=Q")
_LENGTH = struct.Struct("=I")
_HEADER_SIZE = 8
_BUSY, _DISCARDED = 1 << 31, 1 << 30


def ring_shape(name: str) -> MapShape:
    """Return the shape of the smallest ring buffer: one page of records, of which there are some dozens."""
    return MapShape(MapType.RINGBUF, 0, 0, mmap.PAGESIZE, name)


class RingBuffer:
    """Reads a ring buffer. Made of its map, which it does not close; fileno() is to be polled.

    Raises OSError where the map is none, or cannot be mapped.
    """

    def __init__(self, buffer: Map) -> None:
        self._buffer = buffer
        self._size = buffer.shape.entries
        with contextlib.ExitStack() as undo:
            self._read_position = mmap.mmap(buffer.fileno(), mmap.PAGESIZE)
            undo.callback(self._read_position.close)
            # The records lie there twice, one after the other, so that none has to be put together.
            length = mmap.PAGESIZE + 2 * self._size
            self._written = mmap.mmap(buffer.fileno(), length, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
            undo.pop_all()

    def fileno(self) -> int:
        """Return the descriptor; it is readable when there is a record."""
        return self._buffer.fileno()

    def records(self) -> Iterator[bytes]:
        """Yield what was written since the last look; a record is forgotten when the next one is asked for.

        No more than the buffer holds, however fast others write.
        """
        (position,) = _POSITION.unpack_from(self._read_position)
        end = position + self._size
        while position < end and position < _POSITION.unpack_from(self._written)[0]:
            place = mmap.PAGESIZE + position % self._size
            (length,) = _LENGTH.unpack_from(self._written, place)
            if length & _BUSY:  # it is being written
                return
            position += _HEADER_SIZE + (length & ~_DISCARDED) + -(length & ~_DISCARDED) % 8
            content = bytes(self._written[place + _HEADER_SIZE : place + _HEADER_SIZE + (length & ~_DISCARDED)])
            _POSITION.pack_into(self._read_position, 0, position)
            if not length & _DISCARDED:
                yield content

    def close(self) -> None:
        """Let go of the memory; the map stays open."""
        self._read_position.close()
        self._written.close()
