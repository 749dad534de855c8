"""The log of what --fix changed: written before anything is changed, and read to take it back."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from securerun.audit.fix import Change
from securerun.audit.tree import Root, open_real
from securerun.audit.violations import Identity
from securerun.errors import SecurerunError, UsageError
from securerun.linux import proc

_FORMAT = "securerun undo 1"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ROOTS_DIRECTORY = Path("/var/lib/securerun/undo")


def default_path() -> Path:
    """Return where a log goes when nobody says: a new name in root's directory, or in the user's for state."""
    name = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.jsonl"
    if os.geteuid() == 0:
        return _ROOTS_DIRECTORY / name
    state = os.environ.get("XDG_STATE_HOME", "")  # XDG base directory specification: only absolute ones count
    base = Path(state) if state.startswith("/") else Path.home() / ".local/state"
    return base / "securerun/undo" / name


def write(path: Path, roots: Sequence[Root], changes: Sequence[Change]) -> None:
    """Write a log, whole or not at all, for its owner's eyes only. Raises SecurerunError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_whole(path, "".join(f"{json.dumps(line)}\n" for line in _lines(roots, changes)))
    except FileExistsError as error:
        raise UsageError(f"{path} is there already; name another file with --undo-log") from error
    except OSError as error:
        raise SecurerunError(
            f"the undo log {path} cannot be written ({error.strerror}), so nothing was changed; "
            "name another file with --undo-log"
        ) from error


def _lines(roots: Sequence[Root], changes: Sequence[Change]) -> Iterator[dict[str, Any]]:
    """Yield what roots there are, each change, and how many there were."""
    places = [(root.path, os.fstat(root.descriptor)) for root in roots]
    described = [{"path": path, "device": status.st_dev, "inode": status.st_ino} for path, status in places]
    yield {"format": _FORMAT, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "roots": described}
    for change in changes:
        found = change.found._asdict()
        yield {
            "root": change.root,
            "path": change.path,
            **found,
            "mode": f"{change.found.mode:o}",
            "to": f"{change.mode:o}",
        }
    yield {"changes": len(changes)}


def _write_whole(path: Path, text: str) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    part = f".{path.name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(part, flags, 0o600, dir_fd=directory)
        try:
            with os.fdopen(file, "w", encoding="ascii") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(file)
                # rename(2) would replace a log that is there; and a descriptor is this file, whoever may write here.
                os.link(proc.path_of_own_descriptor(file), path.name, dst_dir_fd=directory, follow_symlinks=True)
        finally:
            os.unlink(part, dir_fd=directory)
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[list[Root], list[Change]]]:
    """Open a log; yields its roots and its changes, to be taken back while the block lasts.

    Raises UsageError for a log that cannot be understood or was not written by this user, and SecurerunError where a
    root is not the directory any more that it was.
    """
    lines = _read(path).splitlines()
    try:
        head, changes = _understood([json.loads(line) for line in lines])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is no whole undo log of this version; name one that --fix wrote") from error
    roots: list[Root] = []
    try:
        devices = []
        for entry in head:
            roots.append(_open_again(entry))
            devices.append((entry["device"], os.fstat(roots[-1].descriptor).st_dev))
        yield roots, [_on_device(change, devices) for change in changes]
    finally:
        for root in roots:
            os.close(root.descriptor)


def _read(path: Path) -> str:
    """Return the text of a log that only this user can have written: what it says will be done."""
    try:
        with open(path, encoding="ascii", opener=_open_itself) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} is no file; name an undo log that --fix wrote")
            if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
                raise UsageError(
                    f"{path} can have been written by others (owner {status.st_uid}, mode "
                    f"{stat.S_IMODE(status.st_mode):04o}); name an undo log of your own"
                )
            return stream.read()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; name an undo log that --fix wrote") from error
    except ValueError as error:
        raise UsageError(f"{path} is no undo log; name one that --fix wrote") from error


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _understood(lines: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Change]]:
    head, *middle, end = lines
    if head["format"] != _FORMAT or end != {"changes": len(middle)}:
        raise ValueError
    roots = [
        {"path": _typed(root["path"], str), "device": _typed(root["device"], int), "inode": _typed(root["inode"], int)}
        for root in head["roots"]
    ]
    return roots, [_change(line, len(roots)) for line in middle]


def _change(line: dict[str, Any], roots: int) -> Change:
    numbers = {key: _typed(line[key], int) for key in ("device", "inode", "owner", "group", "birth")}
    found = Identity(mode=int(line["mode"], 8), **numbers)
    change = Change(_typed(line["root"], int), _typed(line["path"], str), found, int(line["to"], 8))
    names = change.path.split("/") if change.path else []
    only_took_away = 0 <= change.mode <= 0o7777 and not change.mode & ~change.found.mode
    if not (0 <= change.root < roots and only_took_away) or any(name in ("", ".", "..") for name in names):
        raise ValueError
    return change


def _typed(value: object, kind: type) -> Any:  # noqa: ANN401 - what is read is of that type
    if type(value) is not kind:
        raise TypeError
    return value


def _open_again(entry: dict[str, Any]) -> Root:
    path = entry["path"]
    try:
        descriptor = open_real(path)
    except OSError as error:
        raise SecurerunError(f"{path} cannot be looked at ({error.strerror}); nothing was changed") from error
    if os.fstat(descriptor).st_ino != entry["inode"]:
        os.close(descriptor)
        raise SecurerunError(f"{path} is not the directory any more that it was; nothing was changed")
    return Root(path, descriptor)


def _on_device(change: Change, devices: Sequence[tuple[int, int]]) -> Change:
    """Have a change name its device as it is now: a file system mounted again may have another number."""
    then, now = devices[change.root]
    return change._replace(found=change.found._replace(device=now)) if change.found.device == then else change
