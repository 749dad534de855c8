"""Where root's Python finds what it imports, before it becomes another user (--run-as): nobody else may write there.

What was imported before this look, and what the interpreter itself did, is too late to look at: `python -m` in a
directory of somebody else's has run what it found there. So this refuses, and the command securerun is the one to use.
"""

from __future__ import annotations

import os
import site
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from securerun import aside
from securerun.errors import PrivilegeError
from securerun.linux import trust

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = Path(os.__file__).parent
_PREFIXES = {Path(place) for place in (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)}
# Debian's group `staff` may write below /usr/local, and is as good as root (base-passwd).
_ANYBODY_WRITES = stat.S_IWOTH


def require_own(source: str) -> None:
    """Raise PrivilegeError where another than root, or than this process' user, has a say in what is imported.

    source: what asks for another user, as messages name it.
    """
    owners = {0, os.geteuid()}
    for place in _before_the_library():
        weakness = _weakness(place, owners, trust.OTHERS_WRITE)
        if weakness is not None:
            raise PrivilegeError(
                f"{source}: root would import Python modules from {place} first, and {weakness}; use the command "
                "securerun in place of `python -m securerun`, or `python -P -m securerun`, and unset PYTHONPATH"
            )
    for place in _of_the_installation():
        weakness = _weakness(place, owners, _ANYBODY_WRITES)
        if weakness is None and place == _PACKAGE:
            weakness = trust.weak_point_below(place, owners, _ANYBODY_WRITES)
        if weakness is not None:
            raise PrivilegeError(
                f"{source}: root would run what is installed in {place}, and {weakness}; install Python and securerun "
                "where only root writes"
            )


def _before_the_library() -> Iterator[Path]:
    """Yield what is looked into before the standard library: the working directory, a script's own, PYTHONPATH."""
    for entry in aside.whole_path():
        place = Path(entry or ".").absolute()
        if place == _LIBRARY:
            return
        if not _is_installed(place):
            yield place


def _of_the_installation() -> Iterator[Path]:
    """Yield where the interpreter, this package and what else was installed are."""
    yield from (Path(sys.executable), _LIBRARY, _PACKAGE)
    yield from (place for place in map(Path, aside.whole_path()) if _is_installed(place))
    if site.ENABLE_USER_SITE and site.USER_SITE in sys.path:
        yield Path(str(site.USER_SITE))


def _is_installed(place: Path) -> bool:
    return not _PREFIXES.isdisjoint((place, *place.parents))


def _weakness(place: Path, owners: set[int], writable: int) -> trust.WeakPoint | None:
    try:
        return trust.weak_point(place, owners, writable)
    except (FileNotFoundError, NotADirectoryError):
        return None  # and whoever could make it was looked at, above
