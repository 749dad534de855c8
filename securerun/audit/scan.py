"""Looking at a tree: one pass, one fstatat(2) a file, violations as they come.

A scan takes some directories and a budget, and hands back what it found and which directories are left. So several
processes can share one tree (`workers`).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import Callable, Generic, NamedTuple, TypeVar

from securerun.audit.kinds import HEAD, Kinds
from securerun.audit.tree import Descent, Root
from securerun.audit.violations import Batch, Entry, Identity, Problem, Wrong, identity_of
from securerun.host import permissions
from securerun.host.permissions import Kind
from securerun.linux import proc, trust
from securerun.linux.statx import birth_of

T = TypeVar("T")

# Deeper than any tree that somebody made on purpose, and the way to a directory takes a step a level.
_DEEPEST = 4096
# So many combinations of ending, mode and owner are remembered at once.
_MOST_KNOWN = 50_000
_EXECUTE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH
_SET_ID_WORDS = {
    stat.S_ISUID: "set-user-id",
    stat.S_ISGID: "set-group-id",
    stat.S_ISUID | stat.S_ISGID: "set-user-id and set-group-id",
}
_DEVICE_WORDS = {stat.S_IFCHR: "character device", stat.S_IFBLK: "block device"}
_PROGRAM_STARTS = (b"\x7fELF", b"#!")
_NAME = itemgetter(0)
_NOTHING = os.stat_result((0,) * 10)
_CAPABILITY = "security.capability"


class Directory(NamedTuple):
    """A directory to look at: the number of its root, its path below it, and the kind that its name gives it."""

    root: int
    path: str
    kind: Kind


@dataclass(frozen=True)
class Settings:
    """What an audit goes by. owners: ids of the users besides root who may own what is in the trees.

    identities: whether violations tell which file it is exactly, which a fix wants to know.
    """

    roots: tuple[Root, ...]
    kinds: Kinds
    owners: frozenset[int]
    one_file_system: bool = False
    identities: bool = False


@dataclass
class Outcome(Generic[T]):
    """What was found, in the asker's form; how much was seen, by kind; and what is left to look at.

    What was found is in the order of names, directory by directory.
    """

    found: list[T] = field(default_factory=list)
    files: Counter[Kind] = field(default_factory=Counter)
    directories: Counter[Kind] = field(default_factory=Counter)
    violations: Counter[Kind] = field(default_factory=Counter)
    left: list[Directory] = field(default_factory=list)


class _Verdict:
    """What holds for all files of one ending, mode and owner in directories of one kind; count: how many there were.

    is_known: nothing more has to be looked at, and if nothing is wrong, there is nothing to say.
    """

    __slots__ = ("count", "is_executable", "is_known", "kind", "wrongs")

    def __init__(self, kind: Kind, mode: int, wrongs: tuple[Wrong, ...], *, makes_key_directory: bool) -> None:
        self.kind = kind
        self.wrongs = wrongs
        # A capability works only on what can be executed; asking for it costs another system call.
        self.is_executable = stat.S_ISREG(mode) and bool(mode & _EXECUTE)
        self.is_known = not (self.is_executable or makes_key_directory)
        self.count = 0


class Scan(Generic[T]):
    """One process' look at the trees of an audit. present: makes of a directory's violations what the asker wants."""

    def __init__(self, settings: Settings, present: Callable[[Batch], list[T]]) -> None:
        self._settings = settings
        self._kinds = settings.kinds
        self._present = present
        self._descent = Descent(settings.roots)
        self._known: dict[Kind, dict[tuple[str, int, int, int], _Verdict]] = {kind: {} for kind in Kind}
        self._out: Outcome[T] = Outcome()
        self._seen = 0

    def look(self, directories: Iterable[Directory], budget: int) -> Outcome[T]:
        """Look into directories and what is below them, until about so many files have been seen."""
        self._out, self._seen = Outcome(), 0
        left = [*directories]
        while left and self._seen < budget:
            directory = left.pop()
            entries: list[Entry] = []
            below = self._look_into(directory, entries)
            if entries:
                entries.sort(key=_NAME)
                self._out.found += self._present(Batch(directory.root, directory.path, entries))
            left += sorted(below, reverse=True)
        self._count_known()
        self._out.left = left
        return self._out

    def close(self) -> None:
        self._descent.close()

    def _count_known(self) -> None:
        for known in self._known.values():
            for verdict in known.values():
                if verdict.count:
                    self._out.files[verdict.kind] += verdict.count
                    self._out.violations[verdict.kind] += verdict.count * len(verdict.wrongs)
                    verdict.count = 0
            if len(known) > _MOST_KNOWN:
                known.clear()

    def _look_into(self, directory: Directory, entries: list[Entry]) -> list[Directory]:
        """Judge a directory and the files in it; returns the directories in it."""
        only = self._settings.roots[directory.root].only
        try:
            with self._descent.directory(directory.root, directory.path, to_read=True) as descriptor:
                visit = _Visit(directory, descriptor, entries)
                if only is not None:
                    self._judge_one(visit, only)
                else:
                    self._judge_files(visit)
                    self._judge_directory(visit, os.fstat(descriptor))
                return visit.below
        except OSError as error:
            self._excuse(directory, error, entries)
            return []

    def _excuse(self, directory: Directory, error: OSError, entries: list[Entry]) -> None:
        """Judge a directory that may not be read: it has a mode all the same; one that is gone has nothing."""
        if error.errno == errno.ENOENT:
            return
        status = os.stat_result((stat.S_IFDIR, *_NOTHING[1:]))
        opening = self._descent.directory(directory.root, directory.path, to_read=False)
        with contextlib.suppress(OSError), opening as place:
            status = os.fstat(place)
            self._judge_directory(_Visit(directory, place, entries), status)
        why = "it became something else meanwhile" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        self._not_looked_at(entries, "", status, directory.kind, why)

    def _judge_files(self, visit: _Visit) -> None:
        """Judge files, a million of which may go through this loop: of most, ending, mode and owner are known."""
        known = self._known[visit.directory.kind]
        heads, _, inner, elsewhere = self._kinds.shortcuts
        is_enough = not self._settings.identities
        seen = 0
        with os.scandir(visit.descriptor) as listing:
            for file in listing:
                seen += 1
                try:
                    status = file.stat(follow_symlinks=False)
                except OSError as error:
                    self._could_not_stat(visit, file.name, error)
                    continue
                name = file.name.lower()
                dot = name.rfind(".")
                # By number, which is faster: st_mode, st_uid, st_gid.
                verdict = known.get((name[dot:] if dot >= 0 else "", status[0], status[4], status[5]))
                if (
                    verdict is None
                    or name[:HEAD] in heads
                    or (name.find(".") != dot and inner(name) is not None)
                    or (elsewhere is not None and elsewhere(name) is not None)
                ):
                    self._judge(visit, file.name, status)
                elif verdict.is_known and is_enough:
                    verdict.count += 1
                    if verdict.wrongs:
                        visit.entries.append((file.name, verdict.wrongs, None, 0))
                else:
                    verdict.count += 1
                    self._apply(visit, file.name, status, verdict)
        self._seen += seen

    def _judge_one(self, visit: _Visit, name: str) -> None:
        self._seen += 1
        try:
            self._judge(visit, name, os.stat(name, dir_fd=visit.descriptor, follow_symlinks=False))
        except OSError as error:
            self._could_not_stat(visit, name, error)

    def _could_not_stat(self, visit: _Visit, name: str, error: OSError) -> None:
        if error.errno != errno.ENOENT:
            self._not_looked_at(visit.entries, name, _NOTHING, visit.directory.kind, error.strerror)

    def _not_looked_at(
        self, entries: list[Entry], name: str, status: os.stat_result, kind: Kind, why: str | None
    ) -> None:
        self._out.violations[kind] += 1
        entries.append((name, (_wrong(Problem.NOT_LOOKED_AT, kind, status, why or ""),), identity_of(status), 0))

    def _judge(self, visit: _Visit, name: str, status: os.stat_result) -> None:
        """Judge what no verdict is known for."""
        form = stat.S_IFMT(status.st_mode)
        if form == stat.S_IFDIR:
            self._go_below(visit, name, status)
        elif form == stat.S_IFLNK:
            self._judge_link(visit, name, status)
        elif form in _DEVICE_WORDS:
            kind = visit.directory.kind
            self._out.files[kind] += 1
            self._find(visit, name, status, kind, (_wrong(Problem.DEVICE, kind, status, _DEVICE_WORDS[form]),))
        else:
            self._judge_file(visit, name, status)

    def _judge_file(self, visit: _Visit, name: str, status: os.stat_result) -> None:
        lowered = name.lower()
        kind, is_by_name = self._kinds.of_file(lowered, visit.directory.kind)
        mode = status.st_mode
        if not is_by_name and stat.S_ISREG(mode) and mode & _EXECUTE:
            kind = Kind.PROGRAM if _begins_as_program(name, visit.descriptor) else kind
        makes_key_directory = kind is Kind.KEY and visit.directory.kind is not Kind.KEY
        verdict = _Verdict(kind, mode, self._wrongs(status, kind), makes_key_directory=makes_key_directory)
        dot = lowered.rfind(".")
        if (is_by_name or not verdict.is_executable) and not self._kinds.shortcuts.needs_all_of(lowered, dot):
            ending = lowered[dot:] if dot >= 0 else ""
            self._known[visit.directory.kind][ending, mode, status.st_uid, status.st_gid] = verdict
            verdict.count += 1
        else:
            self._out.files[kind] += 1
            self._out.violations[kind] += len(verdict.wrongs)
        self._apply(visit, name, status, verdict)

    def _apply(self, visit: _Visit, name: str, status: os.stat_result, verdict: _Verdict) -> None:
        """Say about a file, which has been counted, what its verdict and its capabilities are."""
        if verdict.kind is Kind.KEY and visit.key is None:
            visit.key = name
        if verdict.wrongs:
            visit.entries.append((name, verdict.wrongs, self._identity(visit, name, status), status.st_nlink))
        if verdict.is_executable and _has_capabilities(name, visit.descriptor):
            self._find(visit, name, status, verdict.kind, (_wrong(Problem.CAPABILITIES, verdict.kind, status),))

    def _judge_directory(self, visit: _Visit, status: os.stat_result) -> None:
        """Take a directory that holds key material for one of key material."""
        kind, detail = visit.directory.kind, ""
        if visit.key is not None and kind is not Kind.KEY:
            kind, detail = Kind.KEY, f"it holds {visit.key}"
        self._out.directories[kind] += 1
        self._find(visit, "", status, kind, self._wrongs(status, kind, detail))

    def _go_below(self, visit: _Visit, name: str, status: os.stat_result) -> None:
        path = f"{visit.directory.path}/{name}" if visit.directory.path else name
        root = self._settings.roots[visit.directory.root]
        if self._settings.one_file_system and status.st_dev != visit.device:
            return
        if path.count("/") >= _DEEPEST:
            why = f"it is more than {_DEEPEST} directories deep"
            self._not_looked_at(visit.entries, name, status, visit.directory.kind, why)
            return
        kind = self._kinds.of_directory(root.absolute(path), visit.directory.kind)
        visit.below.append(Directory(visit.directory.root, path, kind))

    def _judge_link(self, visit: _Visit, name: str, status: os.stat_result) -> None:
        kind = visit.directory.kind
        self._out.files[kind] += 1
        wrongs = _of_owners(status, kind, self._settings.owners)
        # Nothing is said of one that is gone, or something else by now.
        with contextlib.suppress(OSError):
            target = os.readlink(name, dir_fd=visit.descriptor)
            if not self._stays_within(visit.directory, target):
                wrongs = (*wrongs, _wrong(Problem.LEAVES_TREE, kind, status, target))
        self._find(visit, name, status, kind, wrongs)

    def _stays_within(self, directory: Directory, target: str) -> bool:
        """Return whether a link in a directory leads to what is audited. Others on its way are judged by themselves."""
        parts = [part for part in target.split("/") if part not in ("", ".")]
        ups = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
        depth = len(directory.path.split("/")) if directory.path else 0
        root = self._settings.roots[directory.root]
        if not target.startswith("/") and ups <= depth and ".." not in parts[ups:] and root.only is None:
            return True
        real = os.path.realpath(f"{root.absolute(directory.path)}/{target}" if target[:1] != "/" else target)
        return any(each.contains(real) for each in self._settings.roots)

    def _wrongs(self, status: os.stat_result, kind: Kind, detail: str = "") -> tuple[Wrong, ...]:
        """Return what is wrong with the mode and the owners of what is of this kind. detail: about its kind."""
        return (*_of_mode(status, kind, detail), *_of_owners(status, kind, self._settings.owners))

    def _identity(self, visit: _Visit, name: str, status: os.stat_result) -> Identity | None:
        return identity_of(status, birth_of(visit.descriptor, name)) if self._settings.identities else None

    def _find(self, visit: _Visit, name: str, status: os.stat_result, kind: Kind, wrongs: tuple[Wrong, ...]) -> None:
        if wrongs:
            self._out.violations[kind] += len(wrongs)
            visit.entries.append((name, wrongs, self._identity(visit, name, status), status.st_nlink))


class _Visit:
    """A directory that is being looked at. key: a file of key material in it. below: the directories in it."""

    __slots__ = ("below", "descriptor", "device", "directory", "entries", "key")

    def __init__(self, directory: Directory, descriptor: int, entries: list[Entry]) -> None:
        self.directory = directory
        self.descriptor = descriptor
        self.device = os.fstat(descriptor).st_dev
        self.entries = entries
        self.key: str | None = None
        self.below: list[Directory] = []


def _wrong(problem: Problem, kind: Kind, status: os.stat_result, detail: str = "", maximum: int = 0) -> Wrong:
    return Wrong(problem, kind, status.st_mode, status.st_uid, status.st_gid, maximum, detail)


def _of_mode(status: os.stat_result, kind: Kind, detail: str) -> Iterator[Wrong]:
    mode = status.st_mode
    excess, maximum = permissions.excess(mode, kind), permissions.row(kind).maximum(mode)
    if excess & 0o777:
        yield _wrong(Problem.TOO_OPEN, kind, status, detail, maximum)
    set_id = excess & (stat.S_ISUID | stat.S_ISGID)
    if set_id:
        yield _wrong(Problem.SET_ID, kind, status, _SET_ID_WORDS[set_id], maximum)


def _of_owners(status: os.stat_result, kind: Kind, owners: frozenset[int]) -> tuple[Wrong, ...]:
    problems = owner_problems(status.st_uid, status.st_gid, owners)
    return tuple(_wrong(problem, kind, status, detail) for problem, detail in problems)


@lru_cache(maxsize=4096)
def owner_problems(user: int, group: int, owners: frozenset[int]) -> tuple[tuple[Problem, str], ...]:
    """Whose a file may be: root's, or one of the owners'. An id that nobody has now may be somebody's tomorrow.

    The auditing user is somebody, also in a container that knows no name for him.
    """
    problems = []
    if user != os.geteuid() and not _has_name(pwd.getpwuid, user):
        problems.append((Problem.MISSING_OWNER, f"user {user}"))
    elif user not in owners | trust.roots():
        problems.append((Problem.FOREIGN_OWNER, pwd.getpwuid(user).pw_name))
    if group not in (os.getegid(), *os.getgroups()) and not _has_name(grp.getgrgid, group):
        problems.append((Problem.MISSING_OWNER, f"group {group}"))
    return tuple(problems)


def _has_name(look_up: Callable[[int], object], number: int) -> bool:
    try:
        look_up(number)
    except (KeyError, OverflowError):
        return False
    return True


def _begins_as_program(name: str, descriptor: int) -> bool:
    """Return whether a file that may be executed is one: after `chmod -R 777` everything may be."""
    try:
        # Whatever took its name meanwhile, opening it does not wait.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError:
        return True
    try:
        return stat.S_ISREG(os.fstat(file).st_mode) and os.read(file, 4).startswith(_PROGRAM_STARTS)
    except OSError:
        return True
    finally:
        os.close(file)


def _has_capabilities(name: str, descriptor: int) -> bool:
    """Return whether executing a file gives capabilities (capabilities(7))."""
    place = f"{proc.path_of_own_descriptor(descriptor)}/{name}"
    try:
        return bool(os.getxattr(place, _CAPABILITY, follow_symlinks=False))
    except OSError:
        return False  # none, a file system without, or gone
