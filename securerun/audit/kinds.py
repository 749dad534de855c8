"""What kind a file or directory is, by its name: a table of patterns, ours and a site's."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from securerun.errors import UsageError
from securerun.host.permissions import Kind
from securerun.linux import capabilities, trust

BUILT_IN = Path(__file__).with_name("kinds.txt")
SITE_FILE = Path("/etc/securerun/kinds")

_WILDCARD = re.compile(r"[*?\[]")
_NEVER = r"(?!)"
HEAD = 3
# These rows name a mode for directories alone: what is in one is by its name, else data.
_OF_DIRECTORIES = frozenset({Kind.HOME, Kind.TEMP, Kind.UPGRADE})
_SECRET = frozenset({Kind.KEY, Kind.CRYPTO_TOOL})
_TOOLS = frozenset({Kind.PROGRAM, Kind.CRYPTO_TOOL})


class Row(NamedTuple):
    """A pattern, as the head of kinds.txt explains them, and the kind of what it matches."""

    pattern: str
    kind: Kind


class _Candidate(NamedTuple):
    rank: int
    matches: Callable[[str], object]
    kind: Kind


def read_rows(patterns: Path | None) -> tuple[Row, ...]:
    """Return the rows of a file, or of the site's where none is named, before the built-in ones.

    Raises UsageError for a file that cannot be read or understood, and for a site file that others could have written.
    """
    return (*(_site_rows() if patterns is None else _rows_of(patterns)), *_rows_of(BUILT_IN))


def _site_rows() -> tuple[Row, ...]:
    try:
        weakness = trust.weak_point(SITE_FILE, trust.roots())
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise UsageError(f"{SITE_FILE} cannot be looked at: {error.strerror}; {capabilities.run_as_root()}") from error
    if weakness is not None:
        raise UsageError(f"{SITE_FILE} decides what may be open, but {weakness}; fix that, or remove {SITE_FILE}")
    return _rows_of(SITE_FILE)


def _rows_of(path: Path) -> tuple[Row, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{path} cannot be read: {why}; name a file of patterns and kinds") from error
    return parse_rows(text, str(path))


def parse_rows(text: str, source: str) -> tuple[Row, ...]:
    """Return the rows of a table of patterns. Raises UsageError that names the line."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.rsplit(None, 1)
        if not words or line.lstrip().startswith("#"):
            continue
        place = f"{source}, line {number}"
        if len(words) == 1:
            raise UsageError(f"{place}: {words[0]!r} stands alone; write a pattern, spaces and a kind")
        pattern, kind = words[0].strip(), words[1]
        if kind not in Kind.__members__.values():
            raise UsageError(f"{place}: {kind!r} is no kind; write one of {', '.join(each.value for each in Kind)}")
        if "/" in pattern.rstrip("/") and not pattern.startswith(("/", "$")):
            raise UsageError(
                f"{place}: {pattern!r} is neither a name nor a whole path; begin it with /, or name one part"
            )
        if pattern.startswith(("/", "$")) and not pattern.endswith("/"):
            raise UsageError(f"{place}: {pattern!r} is a path, and only directories have one here; end it with /")
        rows.append(Row(pattern, Kind(kind)))
    return tuple(rows)


class Shortcuts(NamedTuple):
    """What tells that more than its ending decides about a name, in lower case.

    heads: the first `HEAD` letters of such names. tails: such endings. inner: looked for in names with several dots
    only, since after a single one it would be part of the ending. elsewhere: looked for in all names, if anything is.
    """

    heads: frozenset[str]
    tails: frozenset[str]
    inner: Callable[[str], object]
    elsewhere: Callable[[str], object] | None

    def needs_all_of(self, name: str, dot: int) -> bool:
        """Return whether more of a name than its part from its last dot on decides.

        The audit's loop has this in line.
        """
        return (
            name[:HEAD] in self.heads
            or (dot >= 0 and name[dot:] in self.tails)
            or (name.find(".") != dot and self.inner(name) is not None)
            or (self.elsewhere is not None and self.elsewhere(name) is not None)
        )


class Kinds:
    """The table, ready to be asked a million times.

    For most files the end of the name, from its last dot on, decides; `shortcuts` tells the others. `given` is the
    kind that somebody says all of a tree has (--as): then only what is secret by its name is of another.
    """

    def __init__(self, rows: Sequence[Row], environment: Mapping[str, str], given: Kind | None = None) -> None:
        self._given = given
        self._is_given = given is not None and given not in _OF_DIRECTORIES
        self._files = _FileNames()
        self._directories = _DirectoryNames()
        for rank, row in enumerate(rows):
            if row.pattern.endswith("/"):
                self._directories.add(rank, row, environment)
            else:
                self._files.add(rank, row)
        self.shortcuts = self._files.shortcuts()

    def of_root(self, path: str) -> Kind:
        """Return the kind of a directory, by its absolute path, where an audit begins; those above it count too."""
        if self._given is not None:
            return self._given
        kind = Kind.DATA
        for end in (*(match.start() for match in re.finditer("/", path)), len(path)):
            kind = self.of_directory(path[:end] or "/", kind)
        return kind

    def of_directory(self, path: str, parent: Kind) -> Kind:
        """Return the kind of a directory, by its absolute path, in one of kind `parent`."""
        if parent is Kind.KEY:
            return parent
        own = self._directories.kind(path)
        if self._is_given:
            return own if own is Kind.KEY else parent
        return own or (Kind.DATA if parent is Kind.HOME else parent)

    def of_file(self, name: str, directory: Kind) -> tuple[Kind, bool]:
        """Return the kind of a file in a directory of kind `directory`, and whether its name, in lower case, told."""
        own = self._files.kind(name)
        if directory is Kind.KEY:
            return (Kind.CRYPTO_TOOL if own in _TOOLS else Kind.KEY), True
        if self._is_given:
            return (own if own in _SECRET and own is not None else directory), True
        if own is not None:
            return own, True
        return (Kind.DATA if directory is Kind.HOME and self._given is None else directory), False


class _FileNames:
    """The patterns for files, by what of a name has to be looked at."""

    def __init__(self) -> None:
        self._endings: dict[str, _Candidate] = {}  # *.pem
        self._heads: dict[str, list[_Candidate]] = {}  # core.[0-9]*, by its first letters
        self._tails: dict[str, list[_Candidate]] = {}  # *_encrypt.py, by its ending
        self._others: list[_Candidate] = []
        self._inner: list[str] = []
        self._elsewhere: list[str] = []

    def add(self, rank: int, row: Row) -> None:
        pattern = row.pattern.lower()
        regex = fnmatch.translate(pattern)
        candidate = _Candidate(rank, re.compile(regex).match, row.kind)
        wildcard = _WILDCARD.search(pattern)
        ending = pattern[pattern.rfind(".") :] if "." in pattern else ""
        inside = _inside(pattern)
        if wildcard is None or wildcard.start() >= HEAD:
            self._heads.setdefault(pattern[:HEAD], []).append(candidate)
        elif pattern == f"*{ending}" and ending and not _WILDCARD.search(ending):
            self._endings.setdefault(ending, candidate)
        elif inside is not None:
            self._others.append(candidate)
            self._inner.append(re.escape(inside))
        elif ending and not _WILDCARD.search(ending):
            self._tails.setdefault(ending, []).append(candidate)
        else:
            self._others.append(candidate)
            self._elsewhere.append(regex)

    def kind(self, name: str) -> Kind | None:
        dot = name.rfind(".")
        ending = name[dot:] if dot >= 0 else ""
        first = self._endings.get(ending)
        for candidates in (self._heads.get(name[:HEAD], ()), self._tails.get(ending, ()), self._others):
            for candidate in candidates:
                if (first is None or candidate.rank < first.rank) and candidate.matches(name):
                    first = candidate
        return first.kind if first is not None else None

    def shortcuts(self) -> Shortcuts:
        return Shortcuts(
            frozenset(self._heads),
            frozenset(self._tails),
            re.compile("|".join(self._inner) or _NEVER).search,
            re.compile("|".join(self._elsewhere)).match if self._elsewhere else None,
        )


class _DirectoryNames:
    """The patterns for directories: names, and whole paths."""

    def __init__(self) -> None:
        self._exact: dict[str, tuple[int, Kind]] = {}
        self._patterns: list[_Candidate] = []
        self._paths: list[_Candidate] = []

    def add(self, rank: int, row: Row, environment: Mapping[str, str]) -> None:
        pattern = _expanded(row.pattern, environment)
        if pattern.startswith("/"):
            self._paths.append(_Candidate(rank, partial(_is_path_like, _parts(pattern)), row.kind))
        elif _WILDCARD.search(pattern):
            matches = re.compile(fnmatch.translate(pattern.rstrip("/").lower())).match
            self._patterns.append(_Candidate(rank, matches, row.kind))
        elif pattern:
            self._exact.setdefault(pattern.rstrip("/").lower(), (rank, row.kind))

    def kind(self, path: str) -> Kind | None:
        name = path[path.rfind("/") + 1 :].lower()
        found = [self._exact[name]] if name in self._exact else []
        found += [(each.rank, each.kind) for each in self._patterns if each.matches(name)]
        found += [(each.rank, each.kind) for each in self._paths if each.matches(path)]
        return min(found)[1] if found else None


def _inside(pattern: str) -> str | None:
    """Return what names with a dot before their ending have to contain to match, for *.log.* and *.pt.trace.json."""
    middle = pattern[1:].rstrip("*")
    return middle if pattern[:1] == "*" and middle[:1] == "." and not _WILDCARD.search(middle) else None


def _expanded(pattern: str, environment: Mapping[str, str]) -> str:
    """Return a pattern with the path that an environment variable says in its place; "" where it says none."""
    if not pattern.startswith("$"):
        return pattern
    name, _, rest = pattern[1:].partition("/")
    value = environment.get(name, "")
    return f"{glob.escape(os.path.realpath(value))}/{rest}" if value.startswith("/") else ""


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _is_path_like(patterns: Sequence[str], path: str) -> bool:
    parts = _parts(path)
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
