"""What there is to tell of a launch while it goes on, to whoever keeps a report of it (`securerun.evidence.report`).

The guard's own messages, what the launcher adds to them, and nothing that takes time to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Union

from securerun.finding import Finding
from securerun.guard.protocol import Guarding, Notice, Released

if TYPE_CHECKING:
    from securerun.job.peers import Peers
    from securerun.protection.plan import Plan


@dataclass(frozen=True)
class Checked:
    """What the checks before the job found: on the host, and on the modes of the job's files."""

    preflight: Sequence[Finding] = ()
    permissions: Sequence[Finding] = ()


@dataclass(frozen=True)
class Installed:
    """The layers stand. way: how the guard that installed them came by its privilege, in words."""

    guarding: Guarding
    way: str


@dataclass(frozen=True)
class Renewed:
    """The names of the peers have other addresses than before."""

    before: Peers
    now: Peers


@dataclass(frozen=True)
class Finished:
    """The job is over; the lease is about to be given back."""

    failed: bool


@dataclass(frozen=True)
class Gone:
    """No guard answered at the end, so it is not known who was turned away."""


News = Union["Plan", Checked, Installed, Notice, Renewed, Finished, Released, Gone]
Hear = Callable[[News], None]


def nobody(_: News) -> None:
    """Hears nothing: no report is kept."""
