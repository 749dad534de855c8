"""How long tests wait: as they say, times SECURERUN_TESTS_PATIENCE, for machines that are emulated and so slow.

It is 1 unless somebody sets it, and nothing else makes a limit wider.
"""

from __future__ import annotations

import inspect
import os
import subprocess
from typing import Any, Callable

FACTOR = max(1.0, float(os.environ.get("SECURERUN_TESTS_PATIENCE") or 1))


def patient(seconds: float) -> float:
    """So many seconds of an ordinary machine."""
    return seconds * FACTOR


def wait_for_programs_as_patiently() -> None:
    """Have the time-outs of subprocess, which tests name in many places, be seconds of an ordinary machine too."""
    if FACTOR != 1:
        # What wait(), communicate() and run() all end in.
        for name in ("wait", "communicate"):
            setattr(subprocess.Popen, name, _stretched(getattr(subprocess.Popen, name)))


def _stretched(method: Callable[..., Any]) -> Callable[..., Any]:
    named = inspect.signature(method)

    def stretched(*words: Any, **more: Any) -> Any:  # noqa: ANN401
        given = named.bind(*words, **more)
        if given.arguments.get("timeout") is not None:
            given.arguments["timeout"] = patient(given.arguments["timeout"])
        return method(*given.args, **given.kwargs)

    return stretched
