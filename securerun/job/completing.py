"""torchrun's own `--print-completion` (torch 2.14), with securerun's options and for the command that was called.

torch prints a script for the command torchrun, made by shtab from its parser. `securerunctl setup completion` makes
another that takes neither that torch nor shtab, and completes values too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from securerun.options import OPTIONS, Option

# torch/distributed/run.py, get_args_parser(): 2.14.
SPELLINGS = ("--print-completion", "--print_completion")
# Under whose names securerun is called; anything else is how Python calls a module.
_COMMANDS = ("securerun", "torchrun")
_FILES = {"--report"}


def is_asked_for(arguments: Sequence[Any]) -> bool:
    """Whether a script may be asked for, abbreviated or not."""
    names = (argument.partition("=")[0] for argument in arguments if isinstance(argument, str))
    return any(len(name) > len("--p") and spelling.startswith(name) for name in names for spelling in SPELLINGS)


def prepare(parser: argparse.ArgumentParser) -> None:
    """Have the parser print a script with our options as well, where it can print one."""
    torchs = parser._option_string_actions.get(SPELLINGS[0])
    if torchs is None:
        return
    # In its place in the parser, with its choices: only what it does is ours.
    torchs.__class__ = _Print


class _Print(argparse.Action):
    """Print the script and exit, as torch's action of this name does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401 - argparse's
        option_string: str | None = None,
    ) -> None:
        try:
            shtab = importlib.import_module("shtab")
        except ImportError:
            parser.exit(
                1,
                f"{option_string} requires the 'shtab' package: pip install shtab, or write `securerunctl setup "
                "completion bash`, which does without\n",
            )
        for option in OPTIONS:
            if option.flag not in parser._option_string_actions:
                _add(parser, option, shtab.FILE)
        called = PurePath(sys.argv[0]).name
        parser.prog = called if called in _COMMANDS else _COMMANDS[0]
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _add(parser: argparse.ArgumentParser, option: Option, files: object) -> None:
    if option.is_flag:
        parser.add_argument(option.flag, *option.reversals[:1], action="store_true", help=option.summary)
        return
    added = parser.add_argument(
        option.flag, metavar=option.metavar, choices=option.choices or None, help=option.summary
    )
    if option.flag in _FILES:
        vars(added)["complete"] = files
