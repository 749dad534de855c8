"""What tests need and this host has not: what asks for it is skipped there, but never in CI."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class Lacking(RuntimeError):
    """A privilege or a program that tests need is not here. The message is one line and says what to do."""


def needed(program: str | Path) -> str:
    """Return the path of a program that scripts/setup.sh installs for the tests. Raises Lacking."""
    found = shutil.which(program)
    if found is None:
        raise Lacking(f"{program} not found; scripts/setup.sh test installs it")
    return found


@contextlib.contextmanager
def skipped_where_lacking() -> Iterator[None]:
    """Skip the running test where the block finds that something is lacking; in CI scripts/setup.sh has to have it."""
    try:
        yield
    except Lacking as error:
        if "CI" in os.environ:
            raise
        import pytest  # scripts/quickstart.py has none

        pytest.skip(str(error))
