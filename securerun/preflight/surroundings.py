"""What a job inherits from its shell and its kernel, and the torch that it will load."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from securerun.finding import Finding
from securerun.host import umask
from securerun.job import weights
from securerun.linux import packages, proc
from securerun.preflight.scene import Scene

_RANDOMIZE = Path("/proc/sys/kernel/randomize_va_space")
_CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
_FULLY_RANDOM = 2
# include/uapi/linux/personality.h: ADDR_NO_RANDOMIZE, set by `setarch -R`.
_NOT_RANDOM = 0x0040000
_SAFE_TORCH = (2, 6)
_DISTRIBUTION = re.compile(r"torch-([0-9][^-]*)\.dist-info")
_VERSION = re.compile(r"([0-9]+)\.([0-9]+)")


def shells_umask(scene: Scene) -> Iterator[Finding]:
    """Find a loose umask of the shell's own.

    The job's is securerun's, but what stands beside it in the job script has the shell's.
    """
    if scene.umask & umask.LEAST != umask.LEAST:
        yield Finding(
            "umask",
            f"the shell's umask is {scene.umask:04o}",
            "what `| tee`, `>` and mkdir in the job script make is open to others; a job's own files are not",
            f"umask {scene.umask | umask.LEAST:04o}",
        )


def root(scene: Scene) -> Iterator[Finding]:
    """Find a job that runs as root."""
    # In a user namespace somebody else may have the number, and be nobody to the host.
    if scene.command and os.geteuid() == 0 and proc.outer_user(0) == 0:
        yield Finding(
            "root",
            "running as root, and so is the job",
            "a flaw in anything that it loads has the whole host, its guard included",
            "securerun --run-as USER",
        )


def address_randomisation(scene: Scene) -> Iterator[Finding]:
    """Address space layout randomisation: of the whole host, and of this process and its children."""
    level = _RANDOMIZE.read_text(encoding="ascii").strip()
    if level != str(_FULLY_RANDOM):
        yield Finding(
            "aslr",
            f"kernel.randomize_va_space is {level}",
            "addresses in memory can be guessed, which exploits need",
            f"sysctl -w kernel.randomize_va_space={_FULLY_RANDOM}",
        )
    elif proc.own_personality() & _NOT_RANDOM:
        yield Finding(
            "aslr",
            "addresses are not randomised for this process and its children (setarch -R)",
            "addresses in memory can be guessed, which exploits need",
            "start the job without `setarch -R`",
        )


def torch_release(scene: Scene) -> Iterator[Finding]:
    """Find a torch whose `torch.load` runs code whatever it is told (CVE-2025-32434)."""
    version = _torch_version()
    match = _VERSION.match(version)
    if match and (int(match.group(1)), int(match.group(2))) < _SAFE_TORCH:
        yield Finding(
            "torch",
            f"torch {version} is older than 2.6",
            "its torch.load can be made to run code even with weights_only=True (CVE-2025-32434)",
            "pip install 'torch>=2.6'",
        )


def code_in_weights(scene: Scene) -> Iterator[Finding]:
    """Find the variable that has torch.load run code again."""
    value = scene.environment.get(weights.ALLOWED, "")
    if weights.is_true(value):
        yield Finding(
            "weights-only",
            f"{weights.ALLOWED}={value}",
            "torch.load runs whatever code a checkpoint holds",
            f"unset {weights.ALLOWED}",
        )


def core_dumps(scene: Scene) -> Iterator[Finding]:
    """Core files that land beside the job; a pattern with a pipe hands them to a program of the host's."""
    limit, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = _CORE_PATTERN.read_text(encoding="utf-8", errors="surrogateescape").strip()
    if limit == 0 or not pattern or pattern.startswith("|"):
        return
    size = "unlimited" if limit == resource.RLIM_INFINITY else f"up to {limit} bytes"
    place = os.path.dirname(pattern) or "its working directory"  # noqa: PTH120 - a pattern, no path
    yield Finding(
        "core",
        f"core dumps are on ({size}, kernel.core_pattern {pattern})",
        f"a worker that crashes leaves its memory, with data, weights and keys, in {place}",
        "ulimit -c 0",
    )


CHECKS = (shells_umask, root, address_randomisation, torch_release, code_in_weights, core_dumps)


def _torch_version() -> str:
    """Return the loaded torch's, else that of the installed one; "" where there is none. Nothing is imported for it."""
    loaded = sys.modules.get("torch")
    if loaded is not None:
        return str(getattr(loaded, "__version__", ""))
    for directory in packages.directories():
        for path in directory.glob("torch-*.dist-info"):
            match = _DISTRIBUTION.fullmatch(path.name)
            if match:
                return match.group(1)
    return ""
