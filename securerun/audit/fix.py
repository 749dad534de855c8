"""Taking away the bits that a file or directory has beyond its row, and giving them back from the log of it.

Whoever may write in the tree can change it meanwhile. So each file is reached by directory descriptors and through no
link, must be the one that was found and as it was found, and its mode is changed by a descriptor of this very file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from securerun.audit.tree import Descent, Root
from securerun.audit.violations import Identity, Problem, Violation, identity_of
from securerun.host import permissions
from securerun.linux import proc
from securerun.linux.statx import birth_of

# Neither a link is followed nor is anything of the file read: it may be a pipe, or somebody's tape.
_THIS_FILE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OF_MODES = frozenset({Problem.TOO_OPEN, Problem.SET_ID})


class Change(NamedTuple):
    """One mode to change: the file, which has to be found like this, and its permission bits afterwards."""

    root: int
    path: str
    found: Identity
    mode: int

    @property
    def taken_back(self) -> Change:
        """The change that undoes this one."""
        changed = self.found._replace(mode=stat.S_IFMT(self.found.mode) | self.mode)
        return self._replace(found=changed, mode=stat.S_IMODE(self.found.mode))


class Result(NamedTuple):
    """What became of a change; why: the reason that it was not made, "" if it was."""

    change: Change
    why: str


@dataclass(frozen=True)
class Proposal:
    """What fixing would do: the changes, directories before what is in them, and what is left as it is."""

    changes: tuple[Change, ...]
    refused: tuple[Result, ...]


def is_of_mode(violation: Violation) -> bool:
    """Return whether taking bits away fixes it."""
    return violation.wrong.problem in _OF_MODES


def propose(violations: Iterable[Violation], owners: frozenset[int]) -> Proposal:
    """Return the changes that fix the modes among these violations.

    owners: ids of the users whose files may be changed.
    """
    changes, refused = {}, []
    for violation in violations:
        where = (violation.root, violation.path)
        if not is_of_mode(violation) or where in changes:
            continue
        mode = violation.identity.mode
        after = stat.S_IMODE(mode) & ~permissions.excess(mode, violation.wrong.kind)
        change = changes[where] = Change(violation.root, violation.path, violation.identity, after)
        if violation.identity.owner not in owners and violation.identity.owner != 0:
            refused.append(Result(change, "its owner is a stranger here"))
        elif not violation.is_directory and violation.links > 1:
            refused.append(Result(change, _several_names(violation.links)))
    left = {result.change for result in refused}
    return Proposal(tuple(sorted(change for change in changes.values() if change not in left)), tuple(refused))


def make(roots: Sequence[Root], changes: Iterable[Change]) -> Iterator[Result]:
    """Make changes, one after the other, each only where the file is still as it was found."""
    descent = Descent(roots)
    try:
        for change in changes:
            yield Result(change, _make(descent, change))
    finally:
        descent.close()


def _make(descent: Descent, change: Change) -> str:
    parent, _, name = change.path.rpartition("/")
    try:
        with descent.directory(change.root, parent, to_read=False) as directory:
            file = os.open(name or ".", _THIS_FILE, dir_fd=directory)
        try:
            return _change_mode(file, change)
        finally:
            os.close(file)
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return error.strerror or str(error)


def _change_mode(file: int, change: Change) -> str:
    status = os.fstat(file)
    found = identity_of(status, birth_of(file))
    if found == change.taken_back.found:
        return ""  # somebody did it already
    if found != change.found:
        return "it changed meanwhile"
    if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
        return _several_names(status.st_nlink)
    # fchmod(2) wants a file that was opened to read or write; this way leads to the same file (proc(5)).
    os.chmod(proc.path_of_own_descriptor(file), change.mode)  # noqa: PTH101
    mode = stat.S_IMODE(os.fstat(file).st_mode)
    return "" if mode == change.mode else f"its file system made it {mode:04o}"


def _several_names(links: int) -> str:
    """Of a file with several names one may be outside of the tree, and somebody else's."""
    return f"it has {links} names (hard links), of which some may be elsewhere"
