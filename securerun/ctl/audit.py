"""securerunctl audit: what is more open than the permission table allows, and taking the bits away."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pwd
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, TypeVar

from securerun.audit import fix, report, undolog
from securerun.audit.kinds import BUILT_IN, Kinds, read_rows
from securerun.audit.parents import look_above
from securerun.audit.scan import Directory, Outcome, Settings
from securerun.audit.tree import Root, open_roots
from securerun.audit.violations import Batch, Violation, violations_of
from securerun.audit.workers import look
from securerun.errors import UsageError
from securerun.host.permissions import Kind
from securerun.text import printable

T = TypeVar("T")

CLEAN, FINDINGS = 0, 1
_REFRESH_SECONDS = 0.1
# A bar is worth its while for so many changes.
_MANY_CHANGES = 1000
_NO_MODE = "only modes are fixed"


@dataclass(frozen=True)
class Request:
    """What a user asks for: see `securerunctl audit --help`."""

    paths: Sequence[Path]
    given: Kind | None = None
    fix: bool = False
    yes: bool = False
    as_json: bool = False
    owners: Sequence[str] = ()
    kinds: Path | None = None
    one_file_system: bool = False
    undo_log: Path | None = None


@dataclass
class _Sum:
    """How much was seen and found, by row."""

    files: Counter[Kind] = field(default_factory=Counter)
    directories: Counter[Kind] = field(default_factory=Counter)
    violations: Counter[Kind] = field(default_factory=Counter)

    def add(self, outcome: Outcome[Any]) -> None:
        self.files += outcome.files
        self.directories += outcome.directories
        self.violations += outcome.violations

    @property
    def seen(self) -> int:
        return sum(self.files.values()) + sum(self.directories.values())

    @property
    def rows(self) -> list[dict[str, Any]]:
        return report.summary(self.files, self.directories, self.violations)

    @property
    def sentence(self) -> str:
        found = sum(self.violations.values())
        return f"{_number(found, 'finding')} in {_number(self.seen, 'file')} and directories"


def kind_of(name: str) -> Kind:
    """Return the kind of this name. Raises UsageError for one that is none."""
    try:
        return Kind(name)
    except ValueError as error:
        kinds = ", ".join(kind.value for kind in Kind)
        raise UsageError(f"--as: {name!r} is no kind; name one of {kinds}") from error


def print_kinds() -> None:
    """Print the built-in table of patterns, for a site that wants rows of its own."""
    print(BUILT_IN.read_text(encoding="utf-8"), end="")


def audit(request: Request) -> int:
    """Look at what is named, print what is found, fix it if that is asked for; returns the exit status.

    Raises UsageError for what cannot be looked at or understood, SecurerunError where no undo log can be written.
    """
    if not request.paths:
        raise UsageError("no PATH to look at; name files or directories")
    _allow_many_descriptors()
    roots = open_roots(request.paths)
    try:
        kinds = Kinds(read_rows(request.kinds), os.environ, request.given)
        owners = _owners(request.owners, roots)
        settings = Settings(tuple(roots), kinds, owners, request.one_file_system, identities=request.fix)
        return _fix(request, settings) if request.fix else _show(request, settings)
    except BrokenPipeError:
        # `| head` has seen enough; what Python still holds for it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINDINGS
    finally:
        for root in roots:
            os.close(root.descriptor)


def undo(log: Path, *, as_json: bool) -> int:
    """Give back the modes that the log of a --fix says were changed; returns the exit status.

    Raises UsageError for what is no log of this user's, SecurerunError where its trees are others by now.
    """
    _allow_many_descriptors()
    with undolog.opened(log) as (roots, changes):
        # What is in a directory before the directory itself, the other way round than it was changed.
        results = [*_make(roots, [change.taken_back for change in reversed(changes)], "undoing")]
    left = [result for result in results if result.why]
    if as_json:
        document = [{"path": roots[each.change.root].absolute(each.change.path), "why": each.why} for each in left]
        print(json.dumps({"restored": len(results) - len(left), "left": document}, indent=2))
    else:
        _print(f"{_path(roots, result.change)} is left as it is: {result.why}" for result in left)
        print(f"{_number(len(results) - len(left), 'mode')} restored of {len(results)}")
    return FINDINGS if left else CLEAN


def _show(request: Request, settings: Settings) -> int:
    """Print what is found as it is found; on a terminal after the progress bar, with which it would be mixed."""
    total = _Sum()
    roots = settings.roots
    present = partial(report.documents if request.as_json else report.lines, roots=roots)
    above = [
        json.dumps(report.document(violation, roots)) if request.as_json else report.line(violation, roots)
        for violation in _look_above(settings, total)
    ]
    blocks: Iterable[Sequence[str]] = itertools.chain([above], _look(settings, total, present))
    if sys.stderr.isatty() and sys.stdout.isatty():
        blocks = [*blocks]
    if request.as_json:
        _print_document(blocks, lambda: {"seen": total.seen, "summary": total.rows, "undo_log": None})
    else:
        for block in blocks:
            _print(block)
        _print_end(total)
    return FINDINGS if total.violations else CLEAN


def _fix(request: Request, settings: Settings) -> int:
    """Print what is found and what will be done about it, do it, and say what is left."""
    total = _Sum()
    violations = _look_above(settings, total)
    for block in _look(settings, total, violations_of):
        violations += block
    proposal = fix.propose(violations, settings.owners)
    if not request.as_json:
        _print(_proposal_lines(violations, proposal, settings.roots))
        _print_end(total)
    results: list[fix.Result] = []
    log = None
    if proposal.changes and _is_wanted(request, len(proposal.changes)):
        log = request.undo_log or undolog.default_path()
        undolog.write(log, settings.roots, proposal.changes)
        results = _make_saying_how_to_undo(settings.roots, proposal.changes, log)
    elif proposal.changes:
        results = [fix.Result(change, "it was not wanted") for change in proposal.changes]
    outcome = {(each.change.root, each.change.path): each.why for each in (*proposal.refused, *results)}
    # Why a violation is left; only modes are fixed.
    left = [outcome[each.root, each.path] if fix.is_of_mode(each) else _NO_MODE for each in violations]
    if request.as_json:
        _print_fixed(violations, left, total, log, settings.roots)
    else:
        _print_what_is_left(results, left, log, settings.roots)
    return FINDINGS if any(left) else CLEAN


def _look_above(settings: Settings, total: _Sum) -> list[Violation]:
    violations = [*look_above(settings)]
    total.violations.update(violation.wrong.kind for violation in violations)
    return violations


def _look(settings: Settings, total: _Sum, present: Callable[[Batch], list[T]]) -> Iterator[list[T]]:
    """Yield what is found, block by block, while `total` grows and, where it takes long, a bar shows that it does."""
    starts = [Directory(number, "", settings.kinds.of_root(root.path)) for number, root in enumerate(settings.roots)]
    with _Bar("{task.completed:,} files and directories looked at") as bar:
        for number, outcome in enumerate(look(settings, starts, present)):
            total.add(outcome)
            if number:
                bar.show(total.seen)
            yield outcome.found


def _make(roots: Sequence[Root], changes: Sequence[fix.Change], doing: str) -> Iterator[fix.Result]:
    with _Bar(f"{doing} {{task.completed:,}} of {{task.total:,}} modes") as bar:
        for number, result in enumerate(fix.make(roots, changes)):
            if number and number % _MANY_CHANGES == 0:
                bar.show(number, len(changes))
            yield result


def _make_saying_how_to_undo(roots: Sequence[Root], changes: Sequence[fix.Change], log: Path) -> list[fix.Result]:
    try:
        return [*_make(roots, changes, "mending")]
    except KeyboardInterrupt:
        print(f"securerunctl: stopped half way; {_undo_words(log)}", file=sys.stderr)
        raise


def _is_wanted(request: Request, count: int) -> bool:
    """Asked on a terminal. Elsewhere nobody could answer, and --fix has said it."""
    if request.yes or not sys.stdin.isatty():
        return True
    import typer

    return typer.confirm(f"Take these bits away from {_number(count, 'file')} and directories?", err=True)


def _owners(names: Sequence[str], roots: Sequence[Root]) -> frozenset[int]:
    """Return who may own what is audited: who asks, whom he names, and for root the owners of what he named."""
    owners = {os.geteuid(), *map(_user_id, names)}
    if os.geteuid() == 0:
        owners.update(os.stat(root.only or ".", dir_fd=root.descriptor, follow_symlinks=False).st_uid for root in roots)
    return frozenset(owners)


def _user_id(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise UsageError(f"--owner: there is no user {name!r} on this host; name one of `getent passwd`") from error


def _allow_many_descriptors() -> None:
    """Raise the limit: each path that is named takes one, and a shell's * names many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _print(lines: Iterable[str]) -> None:
    text = "\n".join(lines)
    if text:
        print(text)


def _print_end(total: _Sum) -> None:
    _print(["", *report.table(total.rows), total.sentence])


def _print_document(blocks: Iterable[Sequence[str]], rest: Callable[[], dict[str, Any]]) -> None:
    """JSON whose violations, each a text, are printed as they come."""
    separator = '{"findings": ['
    for block in blocks:
        if block:
            print(separator, ",\n".join(block), sep="\n", end="")
            separator = ","
    print("\n], " if separator == "," else f"{separator}], ", json.dumps(rest())[1:], sep="")


def _print_fixed(
    violations: Sequence[Violation], left: Sequence[str], total: _Sum, log: Path | None, roots: Sequence[Root]
) -> None:
    documents = [
        json.dumps({**report.document(violation, roots), "mended": not why, "left": why or None})
        for violation, why in zip(violations, left)
    ]
    rest = {"seen": total.seen, "summary": total.rows, "undo_log": str(log) if log else None}
    _print_document([documents], lambda: rest)


def _print_what_is_left(
    results: Sequence[fix.Result], left: Sequence[str], log: Path | None, roots: Sequence[Root]
) -> None:
    if log is None and results:
        print("nothing was changed")
    else:
        _print(f"{_path(roots, result.change)} is left as it is: {result.why}" for result in results if result.why)
    if log is not None:
        fixed = sum(not result.why for result in results)
        print(f"{_number(fixed, 'mode')} fixed; {_undo_words(log)}")
    if any(left):
        print(f"{_number(sum(map(bool, left)), 'finding')} left")


def _proposal_lines(violations: Sequence[Violation], proposal: fix.Proposal, roots: Sequence[Root]) -> Iterator[str]:
    """Yield each violation, and what will be done about it."""
    will = {(change.root, change.path): f"--fix makes it {change.mode:04o}" for change in proposal.changes}
    will.update(((each.change.root, each.change.path), f"--fix leaves it: {each.why}") for each in proposal.refused)
    for violation in violations:
        words = will[violation.root, violation.path] if fix.is_of_mode(violation) else f"--fix leaves it: {_NO_MODE}"
        yield f"{report.line(violation, roots)}; {words}"


def _path(roots: Sequence[Root], change: fix.Change) -> str:
    return printable(roots[change.root].absolute(change.path))


def _undo_words(log: Path) -> str:
    return f"undo with: securerunctl audit --undo {log}"


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


class _Bar:
    """A progress bar on the terminal of standard error, from the first time that it is shown; elsewhere nothing."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._shown = 0.0
        self._progress: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, done: int, total: int | None = None) -> None:
        if not sys.stderr.isatty() or time.monotonic() - self._shown < _REFRESH_SECONDS:
            return
        if self._progress is None:
            self._start(total)
        self._progress.update(0, completed=done, refresh=True)
        self._shown = time.monotonic()

    def _start(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        # No thread of its own: the workers are forked beside it.
        columns = (BarColumn(), TextColumn(self._words), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
        self._progress.add_task("", total=total)
        self._progress.start()
