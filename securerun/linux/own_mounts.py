"""Mounts of a process that has a mount namespace of its own (mount_namespaces(7))."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from securerun.linux import libc, proc

# include/uapi/linux/mount.h
_BIND = 4096
_MODE = 0o644


def put_in_place(path: Path, content: str) -> None:
    """Have a file read as this for whoever is in this mount namespace; the file itself stays as it is. Raises OSError.

    The text lies in memory of its own. Where that is made it hides the directory for a moment, from this process alone.
    """
    directory = str(path.parent)
    replaced = os.open(path, os.O_PATH | os.O_CLOEXEC)  # links followed
    try:
        _mount("tmpfs", directory, "tmpfs", 0)
        made = Path(directory, path.name)
        made.write_text(content, encoding="utf-8", errors="surrogateescape")
        made.chmod(_MODE)
        _mount(str(made), proc.path_of_own_descriptor(replaced), None, _BIND)
        libc.check(libc.library.umount2(os.fsencode(directory), 0))
    finally:
        os.close(replaced)


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    libc.check(libc.library.mount(*texts, ctypes.c_ulong(flags), None))
