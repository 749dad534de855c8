"""securerunctl plan: what a launch would install."""

from __future__ import annotations

from collections.abc import Sequence

from securerun import run


def print_plan(arguments: Sequence[str]) -> None:
    """Print the plan of the launch with these arguments of securerun's command line."""
    run.main(["--dry-run", *arguments])
