"""The permission table: each row right at its maximum and one bit above it, by itself and through the command."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest
from checkout import CHECKOUT

from securerun.ctl.audit import Request, audit
from securerun.host import permissions
from securerun.host.permissions import Kind

# The notes' own numbers, and for what they name no mode the one that docs/permissions.md promises.
TABLE = {
    "home": (0o640, 0o750),
    "program": (0o550, 0o550),
    "config": (0o640, 0o750),
    "log": (0o640, 0o750),
    "archived-log": (0o440, 0o750),
    "debug": (0o640, 0o750),
    "temp": (0o640, 0o750),
    "upgrade": (0o640, 0o770),
    "data": (0o640, 0o750),
    "key": (0o600, 0o700),
    "crypto-tool": (0o500, 0o500),
}
BITS = [1 << place for place in range(9)]


def found(capsys: pytest.CaptureFixture[str], *paths: Path, given: str) -> tuple[int, set[tuple[str, str, str]]]:
    """The status, and path, problem and maximum of each finding."""
    status = audit(Request(paths, Kind(given), as_json=True))
    findings = json.loads(capsys.readouterr().out)["findings"]
    return status, {(each["path"], each["problem"], each["maximum"]) for each in findings}


def test_the_table_has_a_row_for_each_kind_with_the_modes_of_the_notes() -> None:
    assert {row.kind.value: (row.file, row.directory) for row in permissions.ROWS} == TABLE
    assert {kind.value for kind in Kind} == set(TABLE)
    assert permissions.row("key") is permissions.row(Kind.KEY)
    with pytest.raises(ValueError, match="nonsense"):
        permissions.row("nonsense")


def test_the_page_shows_the_same_table() -> None:
    page = (CHECKOUT / "docs/permissions.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    assert {kind: (int(file, 8), int(directory, 8)) for kind, file, directory in rows} == TABLE


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("kind", TABLE)
def test_a_file_at_its_maximum_is_in_order_and_one_bit_more_is_found(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maximum, directory = TABLE[kind]
    tmp_path.chmod(directory)
    file = tmp_path / "file"
    file.touch()
    file.chmod(maximum)
    assert found(capsys, file, given=kind) == (0, set())
    too_open = set()
    for bit in BITS:
        if not bit & maximum:
            file = tmp_path / f"file{bit:o}"
            file.touch()
            file.chmod(maximum | bit)
            too_open.add((str(file), "too-open", f"{maximum:04o}"))
    assert found(capsys, tmp_path, given=kind) == (1, too_open)


@pytest.mark.parametrize("kind", TABLE)
def test_a_directory_at_its_maximum_is_in_order_and_one_bit_more_is_found(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, maximum = TABLE[kind]
    tmp_path.chmod(maximum)
    assert found(capsys, tmp_path, given=kind) == (0, set())
    for bit in BITS:
        if not bit & maximum:
            tmp_path.chmod(maximum | bit)
            assert found(capsys, tmp_path, given=kind) == (1, {(str(tmp_path), "too-open", f"{maximum:04o}")})


@pytest.mark.parametrize("kind", TABLE)
def test_what_a_mode_has_too_many_are_all_its_bits_beyond_the_row_and_no_other(kind: str) -> None:
    file, directory = TABLE[kind]
    for mode in range(0o10000):
        of_file = permissions.excess(stat.S_IFREG | mode, kind)
        assert of_file == mode & 0o6777 & ~file
        # set-group-id on a directory passes the group on to new files, the sticky bit keeps others from removing them
        assert permissions.excess(stat.S_IFDIR | mode, kind) == mode & 0o777 & ~directory
