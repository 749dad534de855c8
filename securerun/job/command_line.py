"""torchrun's command line with securerun's options beside its own: its parser, its namespace, its help.

Who launches by Python reads the line with `torch.distributed.run.get_args_parser()` and gives the namespace to its
`run`, as accelerate does. `securerun.run` has both, and between them the namespace carries securerun's options.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from securerun import console, options
from securerun.errors import UsageError
from securerun.job import completing, launchers, originals
from securerun.options import OPTIONS, Option, Value

# In a namespace, so that no `interface` or `ports` of another program's is taken for ours.
PREFIX = "securerun_"

_HELP = threading.Lock()


def get_args_parser() -> argparse.ArgumentParser:
    """Return torchrun's parser, which takes securerun's options too, by their exact names and before the script.

    They are no options of torch's parser: its abbreviations stay what they are, and who adds an option adds it to it.
    """
    parser: argparse.ArgumentParser = originals.call(originals.RUN, "get_args_parser")
    if _is_of_both(parser):  # torch's function is ours by now
        return parser
    parse, format_help = parser.parse_known_args, parser.format_help

    def parse_known_args(
        args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        taken, rest = _take(parser, list(sys.argv[1:] if args is None else args))
        if completing.is_asked_for(rest):
            completing.prepare(parser)
        found, unknown = parse(rest, namespace)
        for option in OPTIONS:
            if option.key in taken or not hasattr(found, PREFIX + option.key):
                setattr(found, PREFIX + option.key, taken.get(option.key))
        return found, unknown

    vars(parser).update(parse_known_args=parse_known_args, format_help=lambda: f"{format_help()}\n{_our_help()}")
    return parser


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    """Read a command line, as `torch.distributed.run.parse_args` does, with securerun's options in it."""
    return get_args_parser().parse_args(args)


def named(name: str) -> Any:  # noqa: ANN401 - what a module holds
    """Return what stands for a name of `torch.distributed.run`'s: ours, or torch's own. Raises AttributeError."""
    if name in _OURS:
        return _OURS[name]
    if name.startswith("_"):  # what Python, pickle and others ask any module for must not import torch
        raise AttributeError(f"module 'securerun.run' has no attribute {name!r}")
    return originals.attribute(originals.RUN, name)


def taken_from(namespace: argparse.Namespace) -> dict[str, Value]:
    """Return securerun's options in a namespace, by their key. Raises UsageError for what cannot be a value."""
    found = {option.key: _value(option, namespace) for option in OPTIONS}
    return {key: value for key, value in found.items() if value is not None}


@contextmanager
def followed_by_ours() -> Iterator[None]:
    """Have the help of whatever parser is asked for it in the block be followed by ours; nothing else is.

    Not what ends the parser as help does: a version, or what a shell is to read.
    """

    def format_help(parser: argparse.ArgumentParser) -> str:
        return torchs(parser) if _is_of_both(parser) else f"{torchs(parser)}\n{_our_help()}"

    with _HELP:
        torchs = argparse.ArgumentParser.format_help
        argparse.ArgumentParser.format_help = format_help  # type: ignore[method-assign, assignment]
        try:
            yield
        except BrokenPipeError as error:
            # The argparse of Python 3.11.2, Debian 12's, and of older ones lets it out; newer ones heed no reader.
            console.give_up(error)
        finally:
            argparse.ArgumentParser.format_help = torchs  # type: ignore[method-assign]


def _our_help() -> str:
    from securerun import help_text

    return help_text.written()


def _is_of_both(parser: argparse.ArgumentParser) -> bool:
    return "parse_known_args" in vars(parser)


def _take(parser: argparse.ArgumentParser, arguments: list[Any]) -> tuple[dict[str, Value], list[Any]]:
    """Take out securerun's options; what is wrong with them the parser says, as of its own."""
    # accelerate gives the script's arguments as one list among the words.
    words = list(takewhile(lambda argument: isinstance(argument, str), arguments))
    try:
        taken, rest = options.take(words, launchers.values_of(parser))
    except UsageError as error:
        parser.error(str(error))
    return taken, [*rest, *arguments[len(words) :]]


def _value(option: Option, namespace: argparse.Namespace) -> Value | None:
    value = getattr(namespace, PREFIX + option.key, None)
    if value is None or isinstance(value, bool if option.is_flag else str):
        return value
    right = "True or False" if option.is_flag else "a text, as in " + option.example
    raise UsageError(f"{PREFIX}{option.key} is {value!r} in the namespace; make it {right}")


_OURS = {function.__name__: function for function in (get_args_parser, parse_args)}
