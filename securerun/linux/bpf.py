"""The bpf(2) system call, its maps and its programs, as far as a program on a cgroup needs them.

Nothing here knows what the programs are for. Numbers and layouts are those of include/uapi/linux/bpf.h;
they are the same on every architecture. All descriptors that the kernel hands out here are close-on-exec.
Errors are OSErrors that name the command, with the kernel's errno.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import functools
import os
import resource
import struct
from collections.abc import Collection, Iterator, Mapping
from types import TracebackType
from typing import Callable, NamedTuple, TypeVar

from securerun.linux import libc

# ---------------------------------------------------------------------------------------------------
# The system call
# ---------------------------------------------------------------------------------------------------

# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h
_CALL_NUMBERS = {"x86_64": 321, "aarch64": 280}

# include/linux/errno.h: internal to the kernel, yet it reaches user space from map operations.
ENOTSUPP = 524

# union bpf_attr grows with every kernel. Zeros after the known part are accepted by older kernels
# (bpf_check_uarg_tail_zero), and newer ones write results behind the fields that we know of
# (PROG_QUERY's revision), so every call gets a buffer with ample room.
_ATTRIBUTES_SIZE = 256

_OBJECT_NAME_SIZE = 16
_ATTEMPTS = 5
_LOG_SIZE = 1 << 20
_LOG_LINES_AND_STATISTICS = 1 | 4


class _Command(enum.IntEnum):
    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    MAP_UPDATE_BATCH = 26


class MapType(enum.IntEnum):
    """enum bpf_map_type"""

    HASH = 1
    ARRAY = 2
    LRU_HASH = 9
    LPM_TRIE = 11
    RINGBUF = 27


class AttachType(enum.IntEnum):
    """enum bpf_attach_type"""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_SOCK_OPS = 3


class AttachFlags(enum.IntFlag):
    """How a program on a cgroup and those on the cgroups below get along; no flag: none may be below."""

    NONE = 0
    ALLOW_OVERRIDE = 1
    ALLOW_MULTI = 2


class ProgramType(enum.IntEnum):
    """enum bpf_prog_type"""

    CGROUP_SKB = 8
    SOCK_OPS = 13


_MAP_FLAG_NO_PREALLOC = 1

# What begins the report that Linux 7's verifier writes behind its reason; and what begins the lines of statistics
# after that (kernel/bpf/verifier.c, print_verification_stats).
_REPORT = "\nVerification failed: "
_STATISTICS = ("verification time", "stack depth", "processed", "subprog ")


class VerifierError(OSError):
    """A program was not loaded; `log` is what its verifier wrote, possibly nothing."""

    def __init__(self, number: int, message: str, log: str) -> None:
        super().__init__(number, message)
        self.log = log


def _system_call_number(machine: str) -> int:
    if machine not in _CALL_NUMBERS:
        raise OSError(errno.ENOSYS, f"bpf: the system call's number on {machine} is not known here")
    return _CALL_NUMBERS[machine]


def _describe_error(number: int) -> str:
    return "not supported by this kernel" if number == ENOTSUPP else os.strerror(number)


def _call(command: enum.IntEnum, attributes: bytes) -> tuple[int, bytes]:
    """Return the call's result and the attributes as the kernel left them. Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES_SIZE)
    result = libc.library.syscall(
        ctypes.c_long(_system_call_number(os.uname().machine)),
        ctypes.c_int(command),
        buffer,
        ctypes.c_uint(_ATTRIBUTES_SIZE),
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf {command.name}: {_describe_error(number)}")
    return result, buffer.raw


def _address(buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    return 0 if buffer is None else ctypes.addressof(buffer)


def _copy(content: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(content, len(content))


def _object_name(name: str) -> bytes:
    encoded = name.encode("ascii")
    if len(encoded) >= _OBJECT_NAME_SIZE:
        raise ValueError(f"{name!r} is longer than the {_OBJECT_NAME_SIZE - 1} characters of an object's name")
    return encoded


def _information(descriptor: int, content: bytes) -> bytes:
    """Return what BPF_OBJ_GET_INFO_BY_FD makes of `content`, a bpf_map_info or bpf_prog_info."""
    buffer = _copy(content)
    _call(_Command.OBJ_GET_INFO_BY_FD, struct.pack("=iIQ", descriptor, len(content), _address(buffer)))
    return buffer.raw


_Own = TypeVar("_Own", bound="_Descriptor")


class _Descriptor:
    """Owns a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor; -1 after close()."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor. What it stood for lives on where something else holds it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------


class MapShape(NamedTuple):
    """What a map holds: sizes are bytes, `entries` is the most it can hold."""

    kind: MapType
    key_size: int
    value_size: int
    entries: int
    name: str


class Map(_Descriptor):
    """A map in the kernel. Keys and values are bytes of exactly the map's sizes."""

    def __init__(self, descriptor: int, shape: MapShape) -> None:
        super().__init__(descriptor)
        self.shape = shape

    @classmethod
    def create(cls, shape: MapShape) -> Map:
        """Make a map.

        Raises OSError, EPERM: no privilege, or before Linux 5.11 the limit on locked memory (RLIMIT_MEMLOCK).
        """
        _raise_memory_limit()
        # kernel/bpf/lpm_trie.c: a trie without BPF_F_NO_PREALLOC is refused.
        flags = _MAP_FLAG_NO_PREALLOC if shape.kind is MapType.LPM_TRIE else 0
        sizes = (shape.kind, shape.key_size, shape.value_size, shape.entries)
        attributes = struct.pack("=IIIIIII16s", *sizes, flags, 0, 0, _object_name(shape.name))
        return cls(_call(_Command.MAP_CREATE, attributes)[0], shape)

    @classmethod
    def open(cls, identifier: int) -> Map:
        """Open the map with this id. Raises OSError: ENOENT when there is none, EPERM without CAP_SYS_ADMIN."""
        descriptor, _ = _call(_Command.MAP_GET_FD_BY_ID, struct.pack("=I", identifier))
        try:
            kind, _, key_size, value_size, entries, _, name = struct.unpack(
                "=IIIIII16s", _information(descriptor, bytes(40))
            )
            shape = MapShape(MapType(kind), key_size, value_size, entries, name.rstrip(b"\0").decode("ascii"))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, shape)

    def update(self, key: bytes, value: bytes) -> None:
        """Set one entry. Raises OSError: ENOSPC (a trie) or E2BIG (a hash) when the map is full."""
        self._check(key, self.shape.key_size)
        self._check(value, self.shape.value_size)
        self._element(_Command.MAP_UPDATE_ELEM, key, _copy(value))

    def update_many(self, entries: Mapping[bytes, bytes]) -> None:
        """Set many entries, in one call where the kernel can. After an error some of them may be set."""
        if not entries:
            return
        for key, value in entries.items():
            self._check(key, self.shape.key_size)
            self._check(value, self.shape.value_size)
        try:
            self._update_batch(entries)
        except OSError as error:
            # EINVAL: no such command before Linux 5.6. ENOTSUPP: the command is there, not for this kind of map.
            if error.errno not in (errno.EINVAL, ENOTSUPP):
                raise
            self.update_one_by_one(entries)

    def update_one_by_one(self, entries: Mapping[bytes, bytes]) -> None:
        """Do what update_many() does, where the kernel knows no batches."""
        for key, value in entries.items():
            self.update(key, value)

    def lookup(self, key: bytes) -> bytes | None:
        """Return the value under the key, in a trie that of the longest matching prefix; None where there is none."""
        self._check(key, self.shape.key_size)
        value = ctypes.create_string_buffer(self.shape.value_size)
        return value.raw if self._found(_Command.MAP_LOOKUP_ELEM, key, value) else None

    def delete(self, key: bytes) -> bool:
        """Remove one entry; return False where there was none."""
        self._check(key, self.shape.key_size)
        return self._found(_Command.MAP_DELETE_ELEM, key, None)

    def keys(self) -> Iterator[bytes]:
        """Yield each key once, also while the map changes: entries that come or go meanwhile may be missed.

        Raises OSError ENOTSUPP for a trie before Linux 4.16.
        """
        seen: set[bytes] = set()
        key: bytes | None = None
        # The kernel starts again at the first key when `key` has gone in the meantime. Twice the number of
        # entries is enough for one such restart; the bound ends the walk in a map that never stands still.
        for _ in range(2 * self.shape.entries + 1):
            key = self._next_key(key)
            if key is None:
                return
            if key not in seen:
                seen.add(key)
                yield key

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value of each entry, under the same terms as keys()."""
        for key in self.keys():
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def _next_key(self, key: bytes | None) -> bytes | None:
        following = ctypes.create_string_buffer(self.shape.key_size)
        return following.raw if self._found(_Command.MAP_GET_NEXT_KEY, key, following) else None

    def _found(self, command: _Command, key: bytes | None, value: ctypes.Array[ctypes.c_char] | None) -> bool:
        try:
            self._element(command, key, value)
        except FileNotFoundError:
            return False
        return True

    def _element(self, command: _Command, key: bytes | None, value: ctypes.Array[ctypes.c_char] | None) -> None:
        key_buffer = None if key is None else _copy(key)
        _call(command, struct.pack("=iIQQQ", self._descriptor, 0, _address(key_buffer), _address(value), 0))

    def _update_batch(self, entries: Mapping[bytes, bytes]) -> None:
        keys = _copy(b"".join(entries))
        values = _copy(b"".join(entries.values()))
        attributes = struct.pack(
            "=QQQQIiQQ", 0, 0, _address(keys), _address(values), len(entries), self._descriptor, 0, 0
        )
        _call(_Command.MAP_UPDATE_BATCH, attributes)

    def _check(self, content: bytes, size: int) -> None:
        # The kernel reads as many bytes as the map was made for, whatever the buffer holds.
        if len(content) != size:
            raise ValueError(f"map {self.shape.name}: {len(content)} bytes given where {size} are needed")


# ---------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------


class ProgramInformation(NamedTuple):
    """What the kernel tells about a loaded program."""

    name: str
    map_ids: tuple[int, ...]


class Attached(NamedTuple):
    """The programs that hang on one cgroup itself, and the flags that they were attached with."""

    flags: AttachFlags
    program_ids: tuple[int, ...]


# kernel/bpf/cgroup.c: BPF_CGROUP_MAX_PROGS; a program may use as many maps (MAX_USED_MAPS).
_MOST_OBJECTS = 64


class Program(_Descriptor):
    """A loaded program for a cgroup. One of type cgroup_skb sees packets from the network header on, and returns 1 to
    pass them; one of type sock_ops is called when something happens to a TCP socket."""

    @classmethod
    def load(
        cls,
        name: str,
        code: bytes,
        kind: ProgramType = ProgramType.CGROUP_SKB,
        *,
        shown: Callable[[], bytes] | None = None,
    ) -> Program:
        """Load assembled code under a name. Raises VerifierError with the verifier's log.

        The expected attach type stays 0: the field is unknown before Linux 4.17 (E2BIG when set), and the
        kernel asks for it only from egress programs that return more than 0 and 1.

        shown: returns the same code with other words in place of secret ones, for the log, which has every instruction.
        """
        try:
            return cls(_load(name, code, None, kind))
        except OSError as error:
            log = "" if error.errno == errno.EPERM else verifier_log(name, code if shown is None else shown(), kind)
            message = f"{error.strerror}{_last_words(log)}"
            raise VerifierError(error.errno or errno.EINVAL, message, log) from error

    @classmethod
    def open(cls, identifier: int) -> Program:
        """Open the program with this id. Raises OSError: ENOENT when there is none, EPERM without CAP_SYS_ADMIN."""
        return cls(_call(_Command.PROG_GET_FD_BY_ID, struct.pack("=I", identifier))[0])

    def information(self) -> ProgramInformation:
        """Return the program's name and the ids of its maps."""
        identifiers = ctypes.create_string_buffer(4 * _MOST_OBJECTS)
        # struct bpf_prog_info: 52 bytes of other things, nr_map_ids, map_ids, name
        before = struct.pack("=52xIQ16x", _MOST_OBJECTS, _address(identifiers))
        count, _, name = struct.unpack("=52xIQ16s", _information(self._descriptor, before))
        return ProgramInformation(name.rstrip(b"\0").decode("ascii"), struct.unpack_from(f"={count}I", identifiers))

    def attach(self, cgroup: int, kind: AttachType, flags: AttachFlags) -> None:
        """Hang the program on the cgroup whose directory `cgroup` is open on; it stays when this process ends."""
        _call(_Command.PROG_ATTACH, struct.pack("=iiII", cgroup, self._descriptor, kind, flags))

    def detach(self, cgroup: int, kind: AttachType) -> None:
        """Take the program off the cgroup. Raises OSError: ENOENT when it does not hang there."""
        _call(_Command.PROG_DETACH, struct.pack("=iiI", cgroup, self._descriptor, kind))

    def take_off(self, cgroup: int, kind: AttachType) -> None:
        """Detach the program; nothing happens when it hangs there no more, or when the cgroup is gone."""
        try:
            self.detach(cgroup, kind)
        except OSError as error:
            # ENODEV: the cgroup was removed.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise


def attached(cgroup: int, kind: AttachType) -> Attached:
    """Return what hangs on the cgroup whose directory `cgroup` is open on. Raises OSError: EINVAL before Linux 4.15."""
    identifiers = ctypes.create_string_buffer(4 * _MOST_OBJECTS)
    attributes = struct.pack("=iIIIQI", cgroup, kind, 0, 0, _address(identifiers), _MOST_OBJECTS)
    _, after = _call(_Command.PROG_QUERY, attributes)
    flags, _, count = struct.unpack_from("=12xIQI", after)
    return Attached(AttachFlags(flags), struct.unpack_from(f"={count}I", identifiers))


def programs_on(cgroup: int, kind: AttachType, names: Collection[str]) -> Iterator[Program]:
    """Open the programs of these names that hang on the cgroup; whoever takes one closes it. Raises OSError."""
    for identifier in attached(cgroup, kind).program_ids:
        program = Program.open(identifier)
        if program.information().name in names:
            yield program
        else:
            program.close()


def verifier_log(name: str, code: bytes, kind: ProgramType = ProgramType.CGROUP_SKB) -> str:
    """Return what the verifier writes about the code, good or bad; empty where it was not asked (no privilege)."""
    log = ctypes.create_string_buffer(_LOG_SIZE)
    with contextlib.suppress(OSError):
        os.close(_load(name, code, log, kind))
    return log.value.decode("ascii", "replace")


@functools.cache
def _raise_memory_limit() -> None:
    """Let this process have as many programs and maps as it likes; without CAP_SYS_RESOURCE, as many as it may.

    Before Linux 5.11 they count as locked memory, all of a user's together, and one that is beyond the limit of whoever
    makes it fails with EPERM (kernel/bpf/syscall.c, __bpf_prog_charge()).
    """
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)


def _load(name: str, code: bytes, log: ctypes.Array[ctypes.c_char] | None, kind: ProgramType) -> int:
    _raise_memory_limit()
    instructions = _copy(code)
    # The programs call no helper that is reserved for GPL programs, and say nothing about their licence.
    licence = _copy(b"\0")
    attributes = struct.pack(
        "=IIQQIIQII16s",
        *(kind, len(code) // 8, _address(instructions), _address(licence)),
        *(0 if log is None else _LOG_LINES_AND_STATISTICS, 0 if log is None else len(log), _address(log)),
        *(0, 0, _object_name(name)),
    )
    for _ in range(_ATTEMPTS - 1):
        try:
            return _call(_Command.PROG_LOAD, attributes)[0]
        except BlockingIOError:
            # kernel/bpf/verifier.c gives up with EAGAIN when a signal is waiting.
            continue
    return _call(_Command.PROG_LOAD, attributes)[0]


def _last_words(log: str) -> str:
    """Return the line of a verifier's log that says why it refused, of those before the report and the statistics."""
    refusal, _, _ = log.partition(_REPORT)
    lines = [line for line in refusal.splitlines() if line and not line.startswith(_STATISTICS)]
    return f" ({lines[-1]})" if lines else ""
