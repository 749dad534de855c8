"""Violations in words and as JSON's own types. Renders, and looks at nothing."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from securerun.audit.tree import Root
from securerun.audit.violations import Batch, Problem, Violation, Wrong
from securerun.host.permissions import ROWS, Kind
from securerun.text import printable

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
_HEADINGS = ("kind", "files", "directories", "findings")


def lines(batch: Batch, roots: Sequence[Root]) -> list[str]:
    """Return what was found in a directory, a line each: where, what is wrong, and what fixes it. All are one text."""
    place = roots[batch.root].absolute(batch.path)
    prefix = f"{place.rstrip('/')}/"
    found = []
    for name, wrongs, _, _ in batch.entries:
        path = prefix + name if name else place
        if not path.isprintable():
            path = printable(path)
        for wrong in wrongs:
            found.append(f"{path}: {_words(wrong)}")
    # Another process is sent one text more quickly than a thousand.
    return ["\n".join(found)]


def line(violation: Violation, roots: Sequence[Root]) -> str:
    """Return the same of a single violation."""
    return f"{printable(roots[violation.root].absolute(violation.path))}: {_words(violation.wrong)}"


def documents(batch: Batch, roots: Sequence[Root]) -> list[str]:
    """Return what was found in a directory as `audit --json` prints it, with commas between. All of it is one text."""
    place = roots[batch.root].absolute(batch.path)
    prefix = f"{place.rstrip('/')}/"
    found = [
        f'{{"path": {json.dumps(prefix + name if name else place)}, {_document_text(wrong)}}}'
        for name, wrongs, _, _ in batch.entries
        for wrong in wrongs
    ]
    return [",\n".join(found)]


def document(violation: Violation, roots: Sequence[Root]) -> dict[str, Any]:
    """Return the same of a single violation, as JSON's own types."""
    return {"path": roots[violation.root].absolute(violation.path), **_document(violation.wrong)}


def _document(wrong: Wrong) -> dict[str, Any]:
    """Return all but where it is. maximum: of its row, where the mode is what is wrong."""
    is_of_mode = wrong.problem in (Problem.TOO_OPEN, Problem.SET_ID, Problem.OPEN_PARENT)
    return {
        "type": _TYPES.get(stat.S_IFMT(wrong.mode), "unknown"),
        "kind": wrong.kind.value,
        "problem": wrong.problem.value,
        "mode": f"{stat.S_IMODE(wrong.mode):04o}",
        "maximum": f"{wrong.maximum:04o}" if is_of_mode else None,
        "owner": wrong.owner,
        "group": wrong.group,
        "detail": wrong.detail,
    }


@lru_cache(maxsize=1024)
def _document_text(wrong: Wrong) -> str:
    return json.dumps(_document(wrong))[1:-1]


def summary(
    files: Mapping[Kind, int], directories: Mapping[Kind, int], violations: Mapping[Kind, int]
) -> list[dict[str, Any]]:
    """Return how much was seen and found of each row, for the rows of which anything was."""
    counts = [
        (row.kind, files.get(row.kind, 0), directories.get(row.kind, 0), violations.get(row.kind, 0)) for row in ROWS
    ]
    return [dict(zip(_HEADINGS, (kind.value, *numbers))) for kind, *numbers in counts if any(numbers)]


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the summary for a person."""
    cells = [_HEADINGS, *([str(row["kind"]), *(f"{row[each]:,}" for each in _HEADINGS[1:])] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        yield "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))])


@lru_cache(maxsize=1024)
def _words(wrong: Wrong) -> str:
    """Return what is wrong: of a million violations most are wrong in the same way."""
    detail = printable(wrong.detail)
    return _WORDS[wrong.problem].format(
        mode=f"{stat.S_IMODE(wrong.mode):04o}",
        maximum=f"{wrong.maximum:04o}",
        kind=f"{wrong.kind.value}: {detail}" if detail else wrong.kind.value,
        detail=detail,
    )


_WORDS = {
    Problem.TOO_OPEN: "{mode}, may be {maximum} at most ({kind})",
    Problem.SET_ID: "runs as its owner ({detail}); chmod ug-s",
    Problem.CAPABILITIES: "gives capabilities to whoever runs it; getcap shows them, setcap -r removes them",
    Problem.FOREIGN_OWNER: "belongs to {detail}; chown it, or allow it with --owner {detail}",
    Problem.MISSING_OWNER: "belongs to {detail}, which nobody has on this host; chown it",
    Problem.LEAVES_TREE: "leads out of the tree, to {detail}",
    Problem.DEVICE: "is a {detail}; remove it",
    Problem.OPEN_PARENT: "{mode}, so everybody may put something else in place of what was audited; chmod o-w",
    Problem.NOT_LOOKED_AT: "could not be looked at: {detail}; run as root or as its owner, or name another path",
}
