"""The directories above a tree: whoever may write to one of them can put another tree in its place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from securerun.audit.scan import Settings, owner_problems
from securerun.audit.violations import Problem, Violation, Wrong, identity_of
from securerun.linux import trust


def look_above(settings: Settings) -> Iterator[Violation]:
    """Yield what is wrong with the directories, and links, on the way from / to what is audited. Raises OSError."""
    seen: set[str] = set()
    for number, root in enumerate(settings.roots):
        kind = settings.kinds.of_root(root.path)
        for place in map(str, trust.way_to(root.named)):
            if place in seen or any(each.contains(place) for each in settings.roots):
                continue
            seen.add(place)
            status = os.lstat(place)
            problems = [*owner_problems(status.st_uid, status.st_gid, settings.owners)]
            mode = status.st_mode
            # In a sticky directory only the owner of a file can put another in its place.
            if stat.S_ISDIR(mode) and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                problems.append((Problem.OPEN_PARENT, ""))
            maximum = stat.S_IMODE(mode) & ~stat.S_IWOTH
            for problem, detail in problems:
                yield Violation(
                    number,
                    place,
                    Wrong(problem, kind, mode, status.st_uid, status.st_gid, maximum, detail),
                    identity_of(status),
                )
