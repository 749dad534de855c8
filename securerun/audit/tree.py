"""Ways into a tree that change under whoever walks it: by directory descriptors, and never through a link."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from securerun.errors import UsageError

_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A place that is only passed needs the right to search, not to read.
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# So many descriptors are kept of the way to where the walk is; the rest of a deeper way is opened for each directory.
_KEPT = 64


@dataclass(frozen=True)
class Root:
    """Where an audit begins: a directory, by its real path and a descriptor.

    only: the one name in it that is meant. named: what the user wrote.
    """

    path: str
    descriptor: int
    only: str | None = None
    named: Path = Path("/")

    def absolute(self, path: str) -> str:
        """Return the absolute path of what has this path below the root; "" is the root itself."""
        if path.startswith("/"):
            return path  # of a directory above
        return f"{self.path.rstrip('/')}/{path}" if path else self.path

    def contains(self, path: str) -> bool:
        """Return whether an absolute path without links is of this tree."""
        if self.only is not None:
            return path == self.absolute(self.only)
        return path == self.path or path.startswith(f"{self.path.rstrip('/')}/")


def open_roots(paths: Iterable[Path]) -> list[Root]:
    """Return the roots of what a user named, links on the way followed; what is in another of them is not one more.

    Raises UsageError where there is nothing.
    """
    found: list[Root] = []
    # The wider before what is in it.
    for root in sorted(map(_open_root, paths), key=lambda each: (each.only is not None, len(each.path))):
        if any(other.contains(root.absolute(root.only or "")) for other in found):
            os.close(root.descriptor)
        else:
            found.append(root)
    return found


def _open_root(path: Path) -> Root:
    try:
        real = path.resolve(strict=True)
        if stat.S_ISDIR(real.lstat().st_mode):
            return Root(str(real), open_real(str(real)), None, path)
        return Root(str(real.parent), open_real(str(real.parent)), real.name, path)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else "its links go in a circle"
        raise UsageError(f"{path} cannot be looked at: {why}; name a file or directory") from error


def open_real(path: str) -> int:
    """Return a descriptor of a directory by its absolute path, which no link is on. Raises OSError."""
    top = os.open("/", _PASS)
    try:
        return _descend(top, [part for part in path.split("/") if part], _PASS)
    finally:
        os.close(top)


def _descend(descriptor: int, names: Sequence[str], flags: int) -> int:
    """Return a new descriptor of the directory that these names lead to."""
    if not names:
        return os.open(".", flags, dir_fd=descriptor)
    current = descriptor
    for number, name in enumerate(names, start=1):
        try:
            following = os.open(name, flags if number == len(names) else _PASS, dir_fd=current)
        finally:
            if current != descriptor:
                os.close(current)
        current = following
    return current


class Descent:
    """The way from a root down to where a walk is: what is near shares what is open of it."""

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = roots
        self._root: int | None = None
        self._names: list[str] = []
        self._descriptors: list[int] = []

    @contextlib.contextmanager
    def directory(self, root: int, path: str, *, to_read: bool) -> Iterator[int]:
        """Open the directory at a path below a root, by number. Raises OSError, for links on the way too."""
        names = path.split("/") if path else []
        parents = names[:-1][:_KEPT]
        self._go_to(root, parents)
        base = self._descriptors[-1] if self._descriptors else self._roots[root].descriptor
        descriptor = _descend(base, names[len(parents) :], _READ if to_read else _PASS)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self._leave(0)

    def _go_to(self, root: int, names: list[str]) -> None:
        if root != self._root:
            self._leave(0)
            self._root = root
        if names == self._names:
            return
        pairs = enumerate(zip(self._names, names))
        self._leave(next((at for at, pair in pairs if pair[0] != pair[1]), min(len(self._names), len(names))))
        for name in names[len(self._names) :]:
            base = self._descriptors[-1] if self._descriptors else self._roots[root].descriptor
            self._descriptors.append(os.open(name, _PASS, dir_fd=base))
            self._names.append(name)

    def _leave(self, kept: int) -> None:
        for descriptor in self._descriptors[kept:]:
            os.close(descriptor)
        del self._descriptors[kept:], self._names[kept:]
