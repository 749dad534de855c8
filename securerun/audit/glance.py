"""What the audit says of a launch's own files, for its report: in a moment, and with a command for the rest."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from securerun.audit import report
from securerun.audit.kinds import Kinds, read_rows
from securerun.audit.parents import look_above
from securerun.audit.scan import Directory, Scan, Settings
from securerun.audit.tree import Root, open_roots
from securerun.audit.violations import Problem, Violation, violations_of
from securerun.finding import Finding

# About 50 ms of looking, and more lines than anybody reads.
_MOST_SEEN = 20_000
_MOST_TOLD = 100

_WHY = {
    Problem.TOO_OPEN: "more users get at it than its row of the permission table allows",
    Problem.SET_ID: "whoever runs it gets another's rights",
    Problem.CAPABILITIES: "whoever runs it gets rights that are not theirs",
    Problem.OPEN_PARENT: "everybody may put something else in the place of what is below",
}
_WHOSE = "what is in it is not decided by the job's user alone"


def of_launch(paths: Iterable[Path], environment: Mapping[str, str]) -> tuple[Finding, ...]:
    """Return what is wrong with these files and directories, as `securerunctl audit` has it.

    What is not there is left out; of large trees there is as much as can be seen in a moment. Raises UsageError for a
    table of kinds that cannot be right.
    """
    roots = open_roots(path for path in paths if path.exists())
    try:
        settings = Settings(
            tuple(roots), Kinds(read_rows(None), environment), frozenset({os.geteuid()}), identities=True
        )
        found = [*islice(_look(settings), _MOST_TOLD + 1)]
    finally:
        for root in roots:
            os.close(root.descriptor)
    told = [_told(violation, roots) for violation in found[:_MOST_TOLD]]
    return tuple(told) if len(found) <= _MOST_TOLD else (*told, _rest(roots))


def _look(settings: Settings) -> Iterator[Violation]:
    yield from look_above(settings)
    scan = Scan(settings, violations_of)
    try:
        starts = [
            Directory(number, "", settings.kinds.of_root(root.path)) for number, root in enumerate(settings.roots)
        ]
        yield from scan.look(starts, _MOST_SEEN).found
    finally:
        scan.close()


def _told(violation: Violation, roots: list[Root]) -> Finding:
    path = roots[violation.root].absolute(violation.path)
    return Finding(
        violation.wrong.kind.value,
        report.line(violation, roots),
        _WHY.get(violation.wrong.problem, _WHOSE),
        f"securerunctl audit --fix {shlex.quote(path)}",
    )


def _rest(roots: list[Root]) -> Finding:
    named = " ".join(shlex.quote(str(root.named)) for root in roots)
    return Finding(
        "audit", f"more than {_MOST_TOLD} findings", "only the first are listed here", f"securerunctl audit {named}"
    )
