"""What `scripts/test.sh --fast` chooses: what anybody can run anywhere, and much of it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from checkout import CHECKOUT

FEWEST = 1000
# Its tests look at systems that are made otherwise, by mounts.
ALL_GROUND = {"preflight"}
# What these of the ground's make or enter takes root, or a namespace.
NEED_ROOT = {
    "cgroups": {"inside", "leave_for_a_new_network", "new_cgroup"},
    "containers": {"container"},
    "holding": {"held", "hold_as"},
    "hosts": {"Network", "require_root_and_tools"},
    "namespaces": {"namespaces"},
    "programs": {"programs", "result_of"},
    "shield_field": {"field_of"},
    "sandbox": {"IN_NAMESPACE", "apart"},
    "users": {"PrivateMachine"},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chosen() -> list[str]:
    """The tests, as pytest names them."""
    words = [str(CHECKOUT / "scripts/test.sh"), "--fast", "--collect-only", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_they_are_many_and_of_every_wing(chosen: list[str]) -> None:
    assert len(chosen) > FEWEST
    wings = {path.name for path in (CHECKOUT / "securerun").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert wings - ALL_GROUND <= {test.split("/")[1] for test in chosen}


def test_none_of_them_uses_what_needs_root(chosen: list[str]) -> None:
    functions = {tuple(test.partition("[")[0].split("::")) for test in chosen}
    wrong = {f"{path}::{name}": found for path, name in functions if (found := _privileged(CHECKOUT / path, name))}
    assert not wrong


def _privileged(path: Path, function: str) -> set[str]:
    """What a function uses that needs root, itself or by way of fixtures and other functions of its module."""
    imported = {
        alias.name
        for node in _tree(path).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if alias.name in NEED_ROOT.get(getattr(node, "module", alias.name), ())
    }
    return imported & _reached(path, function)


def _reached(path: Path, function: str) -> set[str]:
    definitions = _definitions(path)
    found: set[str] = set()
    new = {function}
    while new:
        found |= new
        new = {name for each in new & definitions.keys() for name in definitions[each]} - found
    return found


@cache
def _definitions(path: Path) -> dict[str, set[str]]:
    """What the functions and classes of a module are called, with the names that stand in each."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: set(_names(node)) for node in _tree(path).body if isinstance(node, kinds)}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _names(definition: ast.AST) -> Iterator[str]:
    for node in ast.walk(definition):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
