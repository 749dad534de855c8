"""Where a command that is yet to be started says that its job meets, and HCCL listens: none of that may be public.

Looked at is what is certain to be no metric's: the options and variables of torch's launchers and of HCCL, in the
command, in what a shell is given by -c, and in the script that is named. What that calls in its turn is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import PurePath

from securerun.firewall.policy import LAST_PORT, PortRange, Purpose
from securerun.job import elsewhere
from securerun.job.job import C10D_PORT
from securerun.job.ports import HCCL_BASE, HCCL_PORTS_SINCE_8_3, HCCL_RANGE
from securerun.job.shell_words import simple_commands

# torch/distributed/run.py; deepspeed and accelerate have the first as well.
_DEFAULTS = (29500, C10D_PORT)
_LAUNCHERS = frozenset(
    ("torchrun", "torch.distributed.run", "torch.distributed.launch", "torch_npu_run", "deepspeed", "accelerate")
)
_NAMES = re.compile(r"--?(?:master|main-process)-port|(?:pet-)?master-port|--rdzv-endpoint|pet-rdzv-endpoint")
# `6000`, `node0:6000`, and what a shell takes where nothing else is said: `${MASTER_PORT:-6000}`.
_PORT = re.compile(r"(?:.*[:=-])?([0-9]{1,5})\}?", re.DOTALL)
_PORTS = re.compile(r"\b([0-9]{1,5})(?:-([0-9]{1,5}))?\b")
_MOST_COMMANDS = 20_000
# A command's own words that may be scripts: each is looked for as a file.
_MOST_SCRIPTS = 32


def of_command(command: Sequence[str], environment: Mapping[str, str]) -> tuple[PortRange, ...]:
    """Return the ports at which a command says that its job meets; torch's own where a launcher is told none."""
    found: set[int] = set()
    hccl: set[PortRange] = set()
    launches = False
    for words in islice(_commands(command), _MOST_COMMANDS):
        found.update(_named(words))
        hccl.update(_of_hccl(words))
        launches = launches or any(PurePath(word).name in _LAUNCHERS for word in words)
    if launches and not found and not environment.get("MASTER_PORT"):
        found.update(_DEFAULTS)
    return (*(PortRange(port, port, Purpose.MASTER_PORT) for port in sorted(found)), *sorted(hccl))


def _commands(command: Sequence[str]) -> Iterator[Sequence[str]]:
    yield command
    for word in command[:_MOST_SCRIPTS]:
        is_text = any(mark in word for mark in " \n;")
        yield from simple_commands(word if is_text else elsewhere.shell_script(word))


def _named(words: Sequence[str]) -> Iterator[int]:
    for word, following in zip(words, (*words[1:], "")):
        name, equals, value = word.partition("=")
        if not _NAMES.fullmatch(name.lower().replace("_", "-")):
            continue
        match = _PORT.fullmatch(value if equals else following)
        if match is not None and 0 < int(match.group(1)) <= LAST_PORT:
            yield int(match.group(1))


def _of_hccl(words: Sequence[str]) -> Iterator[PortRange]:
    for word in words:
        name, _, value = word.partition("=")
        for match in _PORTS.finditer(value if name in (HCCL_BASE, HCCL_RANGE) else ""):
            first = int(match.group(1))
            last = first + HCCL_PORTS_SINCE_8_3 - 1 if name == HCCL_BASE else int(match.group(2) or first)
            if 0 < first <= last:
                yield PortRange(min(first, LAST_PORT), min(last, LAST_PORT), Purpose.HCCL)
