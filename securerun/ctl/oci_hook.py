"""securerunctl setup oci-hook: what has podman and CRI-O start a hook for containers that are annotated for it."""

from __future__ import annotations

import json
import sys

from securerun.ctl.setup import trusted_program
from securerun.guard import program

_SECONDS = 10
_ANNOTATION = "^securerun\\.peers$"


def print_hook() -> None:
    """Print the hook's file. Raises PrivilegeError for a guard that others than root could change."""
    trusted_program()
    words = program.hook()
    # One interpreter and no other: a container waits for its start.
    hook = {"path": sys.executable, "args": words, "timeout": _SECONDS}
    when = {"annotations": {_ANNOTATION: ".*"}}
    print(json.dumps({"version": "1.0.0", "hook": hook, "when": when, "stages": ["createRuntime"]}, indent=2))
