"""slurm.conf as a node has it: where the controllers are, and at which addresses it has each node.

Slurm's pages ask prologs not to ask slurmctld: those of 1,000 nodes do at once. What the file does not say for certain
is not believed: of nodes that get their addresses while Slurm runs (State=CLOUD, FUTURE) it says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from securerun import site_file
from securerun.job import folded
from securerun.linux import slurm

_FIELD = re.compile(r"(\w+)\s*=\s*(\"[^\"]*\"|\S+)")
_COMMENT = re.compile(r"(?<!\\)#.*")
# slurm.conf(5): `SlurmctldHost=name(address)`, one a controller; ControlMachine and BackupController before 18.08.
_HOST = re.compile(r"([^\s(]+)(?:\(([^\s)]+)\))?")
_OLDER = ("controladdr", "controlmachine", "backupaddr", "backupcontroller")
_INCLUDE = re.compile(r"Include\s+(\S+)", re.IGNORECASE)
_ADDRESSES = ("nodeaddr", "nodehostname", "bcastaddr")
_MOVING = {"CLOUD", "FUTURE"}
_DEFAULT = "DEFAULT"
_MOST_FILES = 16


def controllers(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what the configuration has in the place of controllers: an address where there is one, else a name."""
    for line in _lines(environment):
        fields = _fields(line)
        host = _HOST.fullmatch(fields.get("slurmctldhost", ""))
        if host is not None:
            yield host[2] or host[1]
        yield from (fields[name] for name in _OLDER if name in fields)


def ways(names: Collection[str], environment: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return, of those of these nodes that the file describes, their addresses and names beside their own."""
    wanted, found, usual = set(names), dict[str, "tuple[str, ...]"](), ""
    for line in _lines(environment):
        fields = _fields(line)
        text = fields.get("nodename", "")
        if text == _DEFAULT:
            usual = fields.get("state", usual)
        elif text and fields.get("state", usual).upper() not in _MOVING:
            found.update((name, others) for name, others in _described(text, fields) if name in wanted)
    return found


def _described(text: str, fields: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each node of a line, with what else it is called; none where the lists do not match."""
    lists = [_unfolded(fields[name]) for name in _ADDRESSES if name in fields]
    nodes = _unfolded(text)
    if any(len(each) != len(nodes) for each in lists):
        return
    for number, name in enumerate(nodes):
        yield name, tuple(dict.fromkeys(each[number] for each in lists))


def _unfolded(text: str) -> tuple[str, ...]:
    words: list[str] = []
    for word in folded.words(text):
        if not folded.is_folded(word):
            words.append(word)
        elif folded.size(word) <= folded.MOST_NODES:
            try:
                words += folded.unfold(word)
            except ValueError:
                return ()
    return tuple(words)


def _fields(line: str) -> dict[str, str]:
    return {name.lower(): value.strip('"') for name, value in _FIELD.findall(line)}


def _lines(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of slurm.conf and of what it includes, without comments; one that goes on is one."""
    start = slurm.environment(environment.get("SLURM_CONF")).get("SLURM_CONF")
    pending = [Path(start)] if start else []
    for _ in range(_MOST_FILES):
        if not pending:
            return
        path = pending.pop(0)
        try:
            text = site_file.content(path).decode("utf-8", "replace")
        except (OSError, ValueError):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            stripped = _COMMENT.sub("", line).strip()
            included = _INCLUDE.match(stripped)
            if included is not None:
                pending.append(path.parent / included[1])
            else:
                yield stripped
