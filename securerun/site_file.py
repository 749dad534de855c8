"""A file of the site's settings, read so that nothing in its place keeps a launch waiting or fills its memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# The addresses of 50,000 nodes.
_MOST_BYTES = 1024 * 1024


def content(path: Path) -> bytes:
    """Read the file at a path, links followed. Raises OSError, or ValueError for what is no file of reasonable size."""
    # Whoever opens a FIFO waits for its other end, without this.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        read = file.read(_MOST_BYTES + 1)
    if len(read) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES // 1024} KiB")
    return read
