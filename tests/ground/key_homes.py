"""Homes of one user on several hosts: the key is made in the first, and copied to the others as an ssh key is."""

from __future__ import annotations

import shutil
from pathlib import Path

import kernel
from checkout import COMMANDS
from hosts import Host


def make_homes(node: Host, place: Path, count: int = 2) -> tuple[Path, ...]:
    """Make homes below `place`; skips the test where the kernel knows no tags."""
    kernel.require(kernel.TAGS)
    first = place / "home0"
    first.mkdir()
    node.run([str(COMMANDS / "securerunctl"), "setup", "key"], env={"HOME": str(first)}, check=True)
    others = tuple(place / f"home{number}" for number in range(1, count))
    for home in others:
        shutil.copytree(first, home)
    return first, *others
