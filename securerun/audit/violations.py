"""What an audit finds: plain data."""

from __future__ import annotations

import enum
import os
import stat
from typing import NamedTuple, Optional

from securerun.host.permissions import Kind


class Problem(str, enum.Enum):
    """What is wrong with a file or directory."""

    TOO_OPEN = "too-open"
    SET_ID = "set-id"
    CAPABILITIES = "capabilities"
    FOREIGN_OWNER = "foreign-owner"
    MISSING_OWNER = "missing-owner"
    LEAVES_TREE = "leaves-tree"
    DEVICE = "device"
    OPEN_PARENT = "open-parent"
    NOT_LOOKED_AT = "not-looked-at"

    __hash__ = str.__hash__  # in C: there may be a million


class Identity(NamedTuple):
    """What has to be as it was for a mode to be changed: the file itself, whose it is, and how open.

    birth: when it was made, as `statx.birth_of` has it; 0 where nobody asked, and where it is not known.
    """

    device: int
    inode: int
    owner: int
    group: int
    mode: int
    birth: int = 0


def identity_of(status: os.stat_result, birth: int = 0) -> Identity:
    """Return what tells this file from others, and this state of it from later ones."""
    mode, inode, device, _, owner, group, *_ = status
    return Identity(device, inode, owner, group, mode, birth)


class Wrong(NamedTuple):
    """What is wrong with a file or directory. A million files of one directory may share one of these.

    mode, owner, group: its st_mode, st_uid, st_gid. maximum: the mode of its row, where that is what it is about.
    detail: what else there is to say, such as an owner's name or a link's target.
    """

    problem: Problem
    kind: Kind
    mode: int
    owner: int
    group: int
    maximum: int = 0
    detail: str = ""


class Violation(NamedTuple):
    """One thing that is wrong with one file or directory.

    root: the number of the PATH that it was found in. path: below that root, "" for the root itself; absolute for a
    directory above it. links: how many names the file has.
    """

    root: int
    path: str
    wrong: Wrong
    identity: Identity
    links: int = 1

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.identity.mode)


# A name in a directory, "" for the directory itself; all that is wrong with it; which file it is exactly, where that is
# asked for; and how many names that file has.
Entry = tuple[str, tuple[Wrong, ...], Optional[Identity], int]


class Batch(NamedTuple):
    """What was found in one directory, which is `path` below the root of this number; in the order of names."""

    root: int
    path: str
    entries: list[Entry]

    def below(self, name: str) -> str:
        """Return the path below the root of what has this name here."""
        return f"{self.path}/{name}" if self.path and name else self.path or name


def violations_of(batch: Batch) -> list[Violation]:
    """Return the violations of a batch, each by itself. Those that do not say which file it is are left out."""
    return [
        Violation(batch.root, batch.below(name), wrong, identity, links)
        for name, wrongs, identity, links in batch.entries
        for wrong in wrongs
        if identity is not None
    ]
