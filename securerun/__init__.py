"""torchrun, with the job's network closed to everyone but the job.

`securerun.guarded(policy)` is the same lease as a context manager. Importing this package starts nothing and loads
nothing: workers that are spawned import the launcher's script again.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module holds
    if name == "guarded":
        from securerun.guard.client import guarded

        return guarded
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
