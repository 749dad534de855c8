"""A file with a secret is believed where nobody else can have read it; anything in its place is refused in one line."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from securerun.linux import secret_file
from securerun.linux.secret_file import Unfit

SECRET = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
MINE = {os.geteuid()}


def put(path: Path, content: bytes = SECRET, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refused(path: Path, owners: set[int] = MINE) -> str:
    began = time.monotonic()
    with pytest.raises(Unfit) as refusal:
        secret_file.read(path, owners)
    said = str(refusal.value)
    assert time.monotonic() - began < 1.0
    assert "\n" not in said
    assert "; " in said or "(" in said, "it says what to do, or why"
    assert SECRET[:8].decode() not in said
    return said


@pytest.mark.parametrize("behind", [b"", b"\n", b"\r\n", b" \n\n"])
def test_the_same_secret_is_read_however_an_editor_ends_its_line(tmp_path: Path, behind: bytes) -> None:
    assert secret_file.read(put(tmp_path / "key", SECRET + behind), MINE) == SECRET


def test_any_bytes_are_a_secret_if_they_are_enough(tmp_path: Path) -> None:
    content = bytes(range(200, 232))
    assert secret_file.read(put(tmp_path / "key", content), MINE) == content
    longest = os.urandom(secret_file.MOST_BYTES - 1) + b"x"
    assert secret_file.read(put(tmp_path / "key", longest), MINE) == longest


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_what_its_owner_alone_can_read_is_believed(tmp_path: Path, mode: int) -> None:
    assert secret_file.read(put(tmp_path / "key", mode=mode), MINE) == SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620, 0o601, 0o777])
def test_what_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    assert f"mode {mode:o}" in refused(put(tmp_path / "key", mode=mode))


CONTENTS: list[tuple[bytes, str]] = [
    (b"", "is empty"),
    (b"\n", "is empty"),
    (b" \r\n\n", "is empty"),
    (b"short", "has 5 bytes"),
    (SECRET[:31], "has 31 bytes"),
    (SECRET[:31] + b"\n" * 40, "has 31 bytes"),
    (bytes(64), "nearly the same byte"),
    (b"password" * 3 + b"password", "nearly the same byte"),
    (SECRET * 100, "more than 4096 bytes"),
]


@pytest.mark.parametrize(("content", "why"), CONTENTS, ids=[f"{len(c)}-{w}" for c, w in CONTENTS])
def test_what_is_no_secret_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    assert why in refused(put(tmp_path / "key", content))


def _link(path: Path) -> None:
    path.symlink_to(put(path.with_name("other")))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (Path.mkdir, "is a directory"),
    "fifo": (os.mkfifo, "is no regular file"),
    "socket": (_socket, "is no regular file"),
    "link": (_link, "is a symbolic link"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    make, why = PLACES[name]
    make(tmp_path / "key")
    assert why in refused(tmp_path / "key")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (Path("/dev/zero"), "is no regular file"),
        (Path("/proc/self/mem"), "can"),
        (Path("/proc/self/environ"), "is no file that is kept"),
        (Path("/etc/passwd/key"), "cannot be read"),
        (Path("a\0b"), "cannot be read"),
        (Path("x" * 300), "cannot be read"),
    ],
)
def test_other_things_with_a_name_are_refused(path: Path, why: str) -> None:
    assert why in refused(path, {0, os.geteuid()})


def test_no_file_is_told_from_one_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        secret_file.read(tmp_path / "key", MINE)


def test_a_file_of_another_user_is_refused(tmp_path: Path, root: None) -> None:
    path = put(tmp_path / "key")
    os.chown(path, 4711, -1)
    assert "belongs to user 4711" in refused(path)
    os.chown(path, 65534, -1)
    assert "root_squash" in refused(path)
