"""Which systems securerun runs on."""

from __future__ import annotations

import platform
import sys

from securerun.errors import UsageError

MACHINES = ("x86_64", "aarch64")


def require_supported(system: str = sys.platform, machine: str = platform.machine()) -> None:
    """Raise UsageError anywhere but on Linux on x86-64 or aarch64: the shield is a program for those two."""
    if system != "linux" or machine not in MACHINES:
        raise UsageError(
            f"securerun runs on Linux on x86-64 or aarch64, and this is {system} on {machine}; use torchrun"
        )
