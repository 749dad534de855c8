"""The tree of exceptions in `securerun.errors` is the one that the code has, with the statuses that it says."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import NamedTuple

import securerun
from securerun import errors

_LINE = re.compile(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: {2,}(?P<rest>.+))?$", re.MULTILINE)
_MODULE = re.compile(r"[a-z_]+(\.[a-z_]+)+")


class Place(NamedTuple):
    """One line of the tree: an exception, below which it stands, and the module that has it."""

    name: str
    parent: str
    module: str


def described() -> Iterator[Place]:
    """The lines of the docstring, without those of Python's own exceptions."""
    way: list[str] = []
    for match in _LINE.finditer(errors.__doc__ or ""):
        depth = len(match["branch"]) // 4
        parent = way[depth - 1] if depth else ""
        way[depth:] = [match["name"]]
        if depth or hasattr(errors, match["name"]):
            rest = match["rest"] or ""
            module = f"securerun.{rest}" if _MODULE.fullmatch(rest) else errors.__name__
            yield Place(match["name"], parent, module)


def defined() -> Iterator[Place]:
    """The public exceptions of all modules."""
    for found in pkgutil.walk_packages(securerun.__path__, "securerun."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == found.name:
                if name.startswith("_"):
                    continue
                for base in value.__bases__:
                    is_root = base is Exception and found.name == errors.__name__
                    yield Place(name, "" if is_root else base.__name__, found.name)


def test_the_tree_is_the_one_of_the_code() -> None:
    lines = list(described())
    assert sorted(lines) == sorted(defined())


def test_the_statuses_are_those_of_the_code() -> None:
    said = {match["name"]: int(match["rest"]) for match in _LINE.finditer(errors.__doc__ or "") if _is_status(match)}
    assert said == {
        name: value.status
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SecurerunError) and value.status != 1
    }


def _is_status(match: re.Match[str]) -> bool:
    return (match["rest"] or "").isdecimal()
