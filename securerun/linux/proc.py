"""What the kernel says of a process in /proc/PID, and of this one in /proc/self (proc(5)): read here and nowhere else.

Much of it is the process' own word: its name, its title, its environment, the names of its cgroups. So a line ends
where the kernel ends it, at a newline, and not at the ten other characters of Python's splitlines; and nobody can make
their reader take in more than an environment can hold.

A process may end while it is looked at: then all of these raise OSError, but for those that say otherwise. That it has
ended is what GONE says, and no other error: whoever is without a descriptor or memory for a moment has not seen it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Union

# A process by its id, or this one.
Pid = Union[int, str]
SELF = "self"
INIT = 1

# What execve(2) takes of arguments and environment together: a quarter of the stack's limit, and three quarters of
# 8 MiB at most (fs/exec.c: bprm_stack_limits, since 4.13). A process may have its memory shown as far longer than that
# (PR_SET_MM_MAP); what it was started with is whole within this. The kernel's own texts are shorter: the longest is
# a status with 65,536 groups, 720 kB.
_MOST_BYTES = 6 * 1024 * 1024
_READ_BYTES = 65536
# The first may have ended; the others show the same memory, and there may be thousands.
_THREADS_ASKED = 4
_KERNEL_THREAD = 0x00200000  # include/linux/sched.h: PF_KTHREAD
_FIRST_FIELD = 3
# Of a process that is no more: its directory is gone (ENOENT), or it ended after that was found (ESRCH).
GONE = (FileNotFoundError, ProcessLookupError)
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What the kernel puts behind the name of a program whose file was removed (fs/d_path.c).
_DELETED = " (deleted)"
# ioctl_ns(2).
_NS_GET_USERNS = 0xB701
# What the host's own user namespace maps.
EVERYBODY = "0 0 4294967295"
# include/linux/proc_ns.h, PROC_USER_INIT_INO
_FIRST_USER_NAMESPACE = 0xEFFFFFFD


# Plain classes: making dataclasses of them would take a guard half a millisecond at its start.
class Stat:
    """/proc/PID/stat at one moment. fields: from the third on, the state; before it the command may hold anything."""

    def __init__(self, fields: list[bytes]) -> None:
        self._fields = fields

    @property
    def parent(self) -> int:
        """The id of its parent."""
        return int(self._field(4))

    @property
    def start(self) -> int:
        """When it started, in clock ticks since boot."""
        return int(self._field(22))

    @property
    def is_kernel_thread(self) -> bool:
        """Whether it has no program at all."""
        return bool(int(self._field(9)) & _KERNEL_THREAD)

    @property
    def first_thread_has_ended(self) -> bool:
        """Whether the thread that the process began with is a zombie or gone; others of it may run on."""
        return self._field(3) in (b"Z", b"X")

    @property
    def has_ended(self) -> bool:
        """Whether it only waits to be reaped."""
        return self.first_thread_has_ended and int(self._field(20)) <= 1

    @property
    def environment_span(self) -> tuple[int, int]:
        """Where in its memory the environment begins and ends: zeros before it is there, or is not for us to know."""
        return int(self._field(50)), int(self._field(51))

    def _field(self, number: int) -> bytes:
        return self._fields[number - _FIRST_FIELD]


class Status:
    """/proc/PID/status at one moment."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    @property
    def parent(self) -> int:
        """The id of its parent."""
        return int(self.words("PPid")[0])

    @property
    def users(self) -> tuple[int, ...]:
        """The user ids: real, effective, saved, and for file systems."""
        return tuple(map(int, self.words("Uid")))

    @property
    def groups(self) -> frozenset[int]:
        """The ids of all its groups."""
        return frozenset(map(int, (*self.words("Gid"), *self.words("Groups"))))

    def words(self, field: str) -> list[bytes]:
        """Return what a field holds; nothing where this kernel has no such field.

        The name of the process comes first, and the kernel escapes newlines in it (and nothing else).
        """
        return self._text.partition(f"\n{field}:".encode())[2].partition(b"\n")[0].split()

    def bits(self, field: str) -> frozenset[int]:
        """Return the numbers of the bits that are set in a field: capabilities from 0 on, signals less one."""
        words = self.words(field)
        mask = int(words[0], 16) if words else 0
        return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)


def pids() -> Iterator[int]:
    """Yield the ids of all processes that can be seen from here, in one pass."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield int(entry.name)


def stat(pid: Pid) -> Stat:
    """Read what the scheduler and the memory say of a process."""
    # The command stands in parentheses and may hold anything, parentheses too.
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    if len(fields) <= 51 - _FIRST_FIELD:
        raise ProcessLookupError(f"/proc/{pid}/stat is not whole")
    return Stat(fields)


def status(pid: Pid) -> Status:
    """Read who a process is and what it may do."""
    return Status(_read(f"/proc/{pid}/status"))


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot: with its id that names it for good."""
    return stat(pid).start


def is_running(pid: int, start: int) -> bool:
    """Return whether this process, and not another of the same id, runs; one that waits to be reaped does not.

    Raises OSError where that cannot be seen for a moment.
    """
    try:
        found = stat(pid)
    except GONE:
        return False
    return found.start == start and not found.first_thread_has_ended


def exists(pid: int) -> bool:
    """Return whether any process has this id, one that waits to be reaped apart. Raises OSError likewise."""
    try:
        return not stat(pid).first_thread_has_ended
    except GONE:
        return False


def real_user(pid: int) -> int | None:
    """Return the real user id of a process; None when it has ended. (The owner of /proc/PID is the effective one.)"""
    try:
        return status(pid).users[0]
    except (OSError, IndexError):
        return None


def owner(pid: int) -> int:
    """Return the effective user id of a process, or root's for one that changed its user and executed nothing since."""
    return Path(f"/proc/{pid}").stat().st_uid


def children(pid: int) -> list[int]:
    """Read the children of a process' first thread (CONFIG_PROC_CHILDREN): a walk of /proc takes 15 us a process."""
    return _children_of(f"/proc/{pid}/task/{pid}")


def children_of_all_threads(pid: int) -> list[int]:
    """Read the children of a process; while some are made or end, others may be missed. None when it has ended."""
    found = []
    for thread in _threads(pid):
        with contextlib.suppress(OSError):
            found += _children_of(thread)
    return found


def name(pid: int) -> str:
    """Read the name of a process, which it gives itself: there may be anything in it, newlines too."""
    return _read(f"/proc/{pid}/comm").decode("utf-8", "replace")


def arguments(pid: Pid) -> list[bytes]:
    """Read the command line of a process, or what it wrote there since, in words."""
    return _read(f"/proc/{pid}/cmdline").split(b"\0")


def environment(pid: int) -> bytes:
    """Read what a process was started with, or what it wrote there since, as `NAME=value` with a NUL after each.

    Empty when it cannot be read: the process has ended, may not be looked into, or is in the middle of execve(2); see
    `has_environment_to_come`. A process cannot keep its reader waiting with memory that is a file of its own (since
    4.17, CVE-2018-1120).
    """
    text = _read_or_nothing(f"/proc/{pid}/environ")
    threads = itertools.islice(_threads(pid), _THREADS_ASKED)
    return text or next(filter(None, (_read_or_nothing(f"{thread}/environ") for thread in threads)), b"")


def has_environment_to_come(pid: int) -> bool:
    """Return whether a process that shows no environment is in the middle of execve(2), or was when it was read."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/exe").readlink()  # fails for one that is gone, and for one that may not be looked into
        start, end = stat(pid).environment_span  # not set yet, and empty, are two
        return not end or start != end
    return False


def program(pid: int) -> tuple[os.stat_result, str]:
    """Return the file that a process executes, and its name; it may be removed by now."""
    link = Path(f"/proc/{pid}/exe")
    return link.stat(), link.readlink().name.removesuffix(_DELETED)


def cgroups(pid: Pid) -> list[str]:
    """Read the cgroup of a process in each hierarchy, as `ID:CONTROLLERS:PATH` (cgroups(7))."""
    # Users name cgroups, and may do so with all that splitlines ends a line at.
    return os.fsdecode(_read(f"/proc/{pid}/cgroup")).split("\n")


def listed() -> dict[int, int]:
    """Return the ids of all processes, each with a number that another process of that id does not have.

    The inode of its directory: the kernel makes one for each process that is looked at, and another when it had to
    forget it (fs/proc/base.c: proc_fill_cache). No file is read.
    """
    with os.scandir("/proc") as entries:
        return {int(entry.name): entry.inode() for entry in entries if entry.name.isdecimal()}


def seconds_since_start(found: Stat) -> float:
    """Return how long ago a process started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - found.start / os.sysconf("SC_CLK_TCK")


def ticks_since_boot() -> int:
    """Return the time as that of a process' start is told."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def of_user(user: int) -> Iterator[int]:
    """Yield the ids of the processes with this real user id: of whom else nothing is to be known, nothing is read."""
    return (pid for pid in pids() if real_user(pid) == user)


def sockets_of(
    processes: Iterable[int], among: Collection[int] | None = None, most: int | None = None
) -> dict[int, int]:
    """Return the inodes of the sockets that the processes hold, each with one process that holds it.

    among: the inodes to look for, by default all: a process may hold a million, which nobody is to remember. most: how
    many descriptors to look at, by default all.

    One readlink a descriptor, some ten microseconds for a worker's fifty and milliseconds for thousands: to be
    called when the set of listeners changed, not at every look. A process that received a listener changes nothing in
    that set, so look once in a while all the same. Processes that end meanwhile, or that this one may not look into
    (without CAP_SYS_PTRACE those of other users), are passed over.
    """
    holders: dict[int, int] = {}
    for pid, inode in itertools.islice(descriptors_of(processes), most):
        if inode and (among is None or inode in among):
            holders.setdefault(inode, pid)
    return holders


def descriptors_of(processes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield each descriptor that the processes hold: whose it is, and the inode of the socket that it is, or 0.

    For whoever has other things to do than to look at millions of them at a stretch; else as `sockets_of`.
    """
    for pid in processes:
        is_empty = True
        for inode in _sockets_in(f"/proc/{pid}/fd"):
            is_empty = False
            yield pid, inode
        if is_empty:
            yield from ((pid, inode) for thread in _threads(pid) for inode in _sockets_in(f"{thread}/fd"))


def may_be_looked_into(pid: int) -> bool:
    """Return whether what a process holds can be seen from here."""
    return os.access(f"/proc/{pid}/fd", os.R_OK)


def namespace(kind: str, pid: Pid = SELF) -> int:
    """Return a process' namespace of a kind (`net`, `pid`), by default this one's: its inode (namespaces(7))."""
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino


def open_namespace(kind: str, pid: Pid = SELF) -> int:
    """Open a process' namespace of a kind, by default this one's."""
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def is_in_first_user_namespace() -> bool:
    """Return whether user ids and capabilities of this process are those of the host itself."""
    try:
        return namespace("user") == _FIRST_USER_NAMESPACE
    except FileNotFoundError:  # a kernel without any
        return True


def governs_network() -> bool:
    """Return whether capabilities of this process count in its network namespace: not where that is of an outer one.

    Before kernel 4.9 nobody is told, and it is taken for granted.
    """
    network = open_namespace("net")
    try:
        os.close(fcntl.ioctl(network, _NS_GET_USERNS))
    except OSError as error:
        # EPERM: its owner is none of this user namespace and those within (ns_get_owner, kernel/user_namespace.c).
        return error.errno != errno.EPERM
    finally:
        os.close(network)
    return True


def outer_user(user: int) -> int | None:
    """Return the number that a user of this user namespace has in the one around it; None where there is none."""
    for line in own_user_map().splitlines():
        first, outside, number = map(int, line.split())
        if first <= user < first + number:
            return outside + user - first
    return None


def inner_user(user: int) -> int | None:
    """Return the number that a user of the user namespace around this one has in here; None where there is none."""
    for line in own_user_map().splitlines():
        first, outside, number = map(int, line.split())
        if outside <= user < outside + number:
            return first + user - outside
    return None


def time_namespace() -> int:
    """Return this process' time namespace, by which it is told start times; 0 before kernel 5.6, which has none."""
    try:
        return namespace("time")
    except FileNotFoundError:
        return 0


def is_of_this_pid_namespace() -> bool:
    """Return whether /proc shows the numbers by which the kernel knows processes here, and not those of outside."""
    return os.readlink("/proc/self") == str(os.getpid())  # noqa: PTH115 - a number, not a path


def namespace_exists(kind: str, inode: int) -> bool:
    """Return whether a process is seen in this namespace or, for a network, `ip netns` has a name for it."""
    if any(_is_in_namespace(pid, kind, inode) for pid in pids()):
        return True
    return kind == "net" and any(_has_inode(place, inode) for place in Path("/run/netns").glob("*"))


def boot_id() -> str:
    """Read this boot's id: process ids and start times of another boot mean nothing (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def mountinfo(pid: Pid = SELF) -> list[str]:
    """Read what is mounted where a process is, a line a mount."""
    # The kernel's own text, and as long as there are mounts. Those of users are in it too (FUSE), below names of
    # theirs; of what ends a line, the kernel escapes the newline.
    return os.fsdecode(Path(f"/proc/{pid}/mountinfo").read_bytes()).split("\n")


def has_global_ipv6() -> bool:
    """Return whether this network namespace has an IPv6 address by which hosts beyond the link may know it."""
    with contextlib.suppress(OSError):  # no IPv6
        lines = Path("/proc/self/net/if_inet6").read_bytes().split(b"\n")
        # Address, interface, prefix, scope, flags, name; the scope of a global one is 0 (net/ipv6/addrconf.c).
        return any(fields[3] == b"00" for fields in map(bytes.split, lines) if len(fields) > 3)
    return False


def root(pid: Pid) -> str:
    """Return the path that leads from here to the root directory of a process."""
    return f"/proc/{pid}/root"


def own_threads() -> int:
    """Count the threads of this process."""
    return sum(1 for _ in _threads(os.getpid()))


def own_descriptors() -> list[int]:
    """Return the open descriptors of this process; the one that read the list is among them, and is closed by now."""
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


def path_of_own_descriptor(descriptor: int) -> str:
    """Return the path that leads to the very file that a descriptor holds, whatever has its name by now.

    For what takes a path alone, or works on descriptors that were opened to read or write, and not on those of O_PATH.
    """
    return f"/proc/self/fd/{descriptor}"


def own_mapped_files() -> Iterator[Path]:
    """Yield the files that are mapped into this process, its libraries among them."""
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n"):
        words = line.split(maxsplit=5)
        if len(words) > 5:
            yield Path(words[5])


def own_personality() -> int:
    """Read the execution domain of this process, which what it starts inherits (personality(2))."""
    return int(Path("/proc/self/personality").read_text(encoding="ascii"), 16)


def own_user_map() -> str:
    """Read which user ids of outside are which in here (user_namespaces(7))."""
    try:
        return Path("/proc/self/uid_map").read_text(encoding="ascii")
    except FileNotFoundError:  # a kernel without user namespaces
        return EVERYBODY


def overflow_user() -> int:
    """Return the number by which those are shown who have none in a user namespace, such as the host's root."""
    return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))


def map_own_ids(user: int, group: int) -> None:
    """Have one user and one group keep their numbers in this process' new user namespace, where nobody else has any."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text, encoding="ascii")


def set_own_out_of_memory_adjustment(value: int) -> None:
    """Say how soon this process is to go when memory is short: from -1000, never, to 1000, first."""
    Path("/proc/self/oom_score_adj").write_text(str(value), encoding="ascii")


def set_own_autogroup_nice(value: int) -> None:
    """Say how nice the session of this process is to others (sched(7), autogroup). Raises OSError."""
    Path("/proc/self/autogroup").write_text(str(value), encoding="ascii")


def set_own_core_filter(mask: int) -> None:
    """Say which memory of this process, and of what it starts, goes into a core (core(5)). Raises OSError."""
    Path("/proc/self/coredump_filter").write_text(hex(mask), encoding="ascii")


def _read(path: str) -> bytes:
    """Read a file of /proc, up to what an honest one can hold. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        left = _MOST_BYTES
        while left and (piece := os.read(descriptor, min(left, _READ_BYTES))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def _children_of(thread: str) -> list[int]:
    return [int(child) for child in _read(f"{thread}/children").split()]


def _read_or_nothing(path: str) -> bytes:
    try:
        return _read(path)
    except OSError:
        return b""


def _threads(pid: int) -> Iterator[str]:
    """Yield the directories of a process' threads.

    One whose first thread has exited shows its memory and its descriptors through its other threads only.
    """
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/task") as threads:
        for thread in threads:
            yield thread.path


def _sockets_in(place: str) -> Iterator[int]:
    """Yield for each of a process' descriptors what `_socket_at` says; nothing where none is seen."""
    try:
        directory = os.open(place, _DIRECTORY_FLAGS)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                yield _socket_at(directory, entry.name)
    finally:
        os.close(directory)


def _socket_at(directory: int, name: str) -> int:
    """Return the inode behind a link "socket:[N]"; 0 for any other, or when it was closed meanwhile."""
    with contextlib.suppress(OSError, ValueError):
        target = os.readlink(name, dir_fd=directory)
        if target.startswith("socket:["):
            return int(target[8:-1])
    return 0


def _is_in_namespace(pid: int, kind: str, inode: int) -> bool:
    try:
        return namespace(kind, pid) == inode
    except OSError:
        return False


def _has_inode(place: Path, inode: int) -> bool:
    try:
        return place.stat().st_ino == inode
    except OSError:
        return False
