"""All checks of a preflight, in the order of the documentation's table.

One function a check, each of which looks and changes nothing: no traffic, no rule, no module, no table. What cannot be
looked at (another user's, another namespace's) is no finding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Callable

from securerun.errors import PrivilegeError
from securerun.finding import Finding
from securerun.preflight import files, firewalls, ports, remains, surroundings
from securerun.preflight.scene import Scene

Check = Callable[[Scene], Iterable[Finding]]

_CHECKS: tuple[Check, ...] = (
    *surroundings.CHECKS,
    *files.CHECKS,
    *ports.CHECKS,
    *firewalls.CHECKS,
    *remains.CHECKS,
)


def look(scene: Scene) -> tuple[Finding, ...]:
    """Return all findings, in the order of the checks."""
    return tuple(finding for check in _CHECKS for finding in _made_by(check, scene))


def _made_by(check: Check, scene: Scene) -> Iterator[Finding]:
    # What goes away meanwhile, or lies where this user may not look, is nothing to tell of.
    with contextlib.suppress(OSError, PrivilegeError):
        yield from check(scene)
