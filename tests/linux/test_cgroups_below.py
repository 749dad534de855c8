"""What is below a cgroup, as deep as whoever may make some there likes; plain directories stand for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from securerun.guard import cgroup
from securerun.linux import cgroups

# Of Python's stack there are 1,000 frames.
DEPTH = 1100


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A directory with one below it, and so on: descriptors of the first and of the last."""
    first = os.open(tmp_path, os.O_RDONLY)
    last = os.dup(first)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=last)
        next_one = os.open("d", os.O_RDONLY, dir_fd=last)
        os.close(last)
        last = next_one
    yield first, last
    os.close(first)
    os.close(last)


def test_process_is_found_however_deep_it_is(deep: tuple[int, int]) -> None:
    first, last = deep
    with open("cgroup.procs", "w", opener=lambda name, flags: os.open(name, flags, 0o600, dir_fd=last)) as file:
        file.write("7\n")
    assert cgroups.processes_below(first) == {7}
    os.unlink("cgroup.procs", dir_fd=last)
    cgroup._remove_below(first)


def test_all_that_is_below_is_removed_however_deep_it_is(deep: tuple[int, int]) -> None:
    first, _ = deep
    os.mkdir("e", dir_fd=first)
    os.mkdir("d/f", dir_fd=first)
    cgroup._remove_below(first)
    assert os.listdir(first) == []
