"""The host's own firewall rules, read by their own tools: begun early, and looked at when the plan is known."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from securerun.linux import nf_tables

if TYPE_CHECKING:
    from securerun.preflight.rules import InputChain

_DIRECTORIES = "/usr/sbin:/sbin:/usr/bin:/bin"
_ENVIRONMENT = {"PATH": _DIRECTORIES, "LC_ALL": "C"}
# Which legacy tables there are; to list one that is not would register it in the kernel.
_LEGACY_TABLES = {4: Path("/proc/net/ip_tables_names"), 6: Path("/proc/net/ip6_tables_names")}
_COMMANDS = {4: "iptables", 6: "ip6tables"}
_FAMILIES = {4: nf_tables.IPV4, 6: nf_tables.IPV6}
_OUR_CHAIN = "SECURERUN"
_OUR_TABLES = "securerun-"
_READING_SECONDS = 2.0
_LONGEST_TEXT = 16 * 1024 * 1024


@dataclass(frozen=True)
class _Text:
    """A command that prints rules. version: of iptables-save's; None for nft's."""

    process: subprocess.Popen[bytes]
    version: int | None


class Reading:
    """The host's rules, read by their own tools while this process does something else.

    Nothing is started where no base chain and no legacy table sees packets to this host. Only root may read rules:
    `readable` says whether this process could, and `chains` is empty where it could not.
    """

    def __init__(self) -> None:
        self._texts: list[_Text] = []
        self._chains: tuple[InputChain, ...] | None = None
        self.readable = False
        if os.geteuid() == 0:
            with contextlib.suppress(OSError):
                self._begin()
                self.readable = True

    def chains(self) -> tuple[InputChain, ...]:
        """Return the chains that packets to this host pass, securerun's own left out."""
        if self._chains is None:
            self._chains = tuple(self._read())
        return self._chains

    def close(self) -> None:
        """End what still reads. May be called again."""
        while self._texts:
            _end(self._texts.pop().process)

    def _begin(self) -> None:
        for version, path in _LEGACY_TABLES.items():
            with contextlib.suppress(OSError):
                if "filter" in path.read_text(encoding="ascii").split():
                    self._start(f"{_COMMANDS[version]}-legacy-save", "-t", "filter", version=version)
        chains = [chain for chain in nf_tables.input_chains() if not chain.table.startswith(_OUR_TABLES)]
        judged = [chain for chain in chains if chain.rules or not chain.accepts]
        for version, family in _FAMILIES.items():
            if any((chain.family, chain.table, chain.name) == (family, "filter", "INPUT") for chain in judged):
                self._start(f"{_COMMANDS[version]}-nft-save", "-t", "filter", version=version)
        if judged:
            self._start("nft", "-j", "list", "ruleset", version=None)

    def _start(self, command: str, *arguments: str, version: int | None) -> None:
        path = shutil.which(command, path=_DIRECTORIES)
        if path is None:
            return
        process = subprocess.Popen(  # noqa: S603 - an absolute path, and an environment of our own
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            close_fds=True,
        )
        self._texts.append(_Text(process, version))

    def _read(self) -> Iterator[InputChain]:
        """Tables that iptables understands come in its own words; nft knows its matches by no more than their names."""
        if not self._texts:
            return
        from securerun.preflight.rules import read_listed, read_saved

        saved: set[str] = set()
        for text in sorted(self._texts, key=lambda text: text.version is None):
            # Loading what somebody else's tool prints: what is not understood is left out, not the job's end.
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                content = _output(text.process)
                if text.version is not None:
                    found = [*read_saved(content, text.version, _OUR_CHAIN)]
                    saved |= {f"ip{'' if text.version == 4 else '6'} filter" for _ in found}
                    yield from found
                else:
                    yield from (one for one in read_listed(content, _OUR_TABLES) if one.table not in saved)
        self.close()


def _output(process: subprocess.Popen[bytes]) -> str:
    try:
        output, _ = process.communicate(timeout=_READING_SECONDS)
    except subprocess.TimeoutExpired:
        _end(process)
        return ""
    return output.decode(errors="replace") if len(output) <= _LONGEST_TEXT else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if process.stdout is not None:
            process.stdout.close()  # it ends by itself too, when nobody reads: it may be root's, and this process not
        if process.poll() is None:
            process.kill()
        process.wait(_READING_SECONDS)
