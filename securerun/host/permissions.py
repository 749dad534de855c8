"""The permission table of the security notes for Ascend training: how open a file or directory may be, by its kind."""

from __future__ import annotations

import enum
import stat
from dataclasses import dataclass


class Kind(str, enum.Enum):
    """What a file or directory is, as far as the table tells things apart."""

    HOME = "home"
    PROGRAM = "program"
    CONFIG = "config"
    LOG = "log"
    ARCHIVED_LOG = "archived-log"
    DEBUG = "debug"
    TEMP = "temp"
    UPGRADE = "upgrade"
    DATA = "data"
    KEY = "key"
    CRYPTO_TOOL = "crypto-tool"

    # An audit looks kinds up for every file; an enumeration's own hash is computed by Python code.
    __hash__ = str.__hash__


@dataclass(frozen=True)
class Row:
    """One row of the table: the maximum mode of files and of directories of a kind, and the kind in words."""

    kind: Kind
    file: int
    directory: int
    words: str

    def maximum(self, mode: int) -> int:
        """Return the maximum for whatever has this `st_mode`: a directory's, or that of all else."""
        return self.directory if stat.S_ISDIR(mode) else self.file


# The notes name no mode for files in homes, temporary and upgrade directories: they are held to that of business
# data. Nor one for directories of encryption tools: as with programs, it is that of the files.
ROWS: tuple[Row, ...] = (
    Row(Kind.HOME, 0o640, 0o750, "home directory"),
    Row(Kind.PROGRAM, 0o550, 0o550, "program, script or library"),
    Row(Kind.CONFIG, 0o640, 0o750, "configuration"),
    Row(Kind.LOG, 0o640, 0o750, "log being written"),
    Row(Kind.ARCHIVED_LOG, 0o440, 0o750, "log finished or archived"),
    Row(Kind.DEBUG, 0o640, 0o750, "debug file"),
    Row(Kind.TEMP, 0o640, 0o750, "temporary"),
    Row(Kind.UPGRADE, 0o640, 0o770, "maintenance and upgrade"),
    Row(Kind.DATA, 0o640, 0o750, "business data"),
    Row(Kind.KEY, 0o600, 0o700, "key material, certificate or ciphertext"),
    Row(Kind.CRYPTO_TOOL, 0o500, 0o500, "encryption or decryption tool"),
)

_BY_KIND: dict[str, Row] = {row.kind: row for row in ROWS}
_SET_ID = stat.S_ISUID | stat.S_ISGID


def row(kind: str) -> Row:
    """Return the row of a kind. Raises ValueError for a name that is no kind."""
    try:
        return _BY_KIND[kind]
    except KeyError as error:
        raise ValueError(f"{kind!r} is no kind of the permission table") from error


def excess(mode: int, kind: str) -> int:
    """Return the permission bits that `st_mode` has beyond its row; 0 when it is no more open than it may be.

    Of the bits above the nine of read, write and execute, set-id bits of files count. Those of directories make files
    take over the group and give no right to anyone; the sticky bit takes rights away.
    """
    allowed = row(kind).maximum(mode)
    judged = 0o777 if stat.S_ISDIR(mode) else 0o777 | _SET_ID
    return mode & judged & ~allowed
