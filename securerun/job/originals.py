"""torch's own launcher, also where somebody has put securerun in its place.

    torch.distributed.run.run = securerun.run.run
    torch.distributed.launch.main = securerun.launch.main
    sys.modules["torch.distributed.run"] = securerun.run

What is called by torch's names then is ours, and would call itself without end. So whatever securerun takes from these
modules it takes from here: what stands there now, and what torch itself has where that is ours or leads back to us.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import threading
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any, Callable

from securerun.errors import UsageError

RUN, LAUNCH = "torch.distributed.run", "torch.distributed.launch"

_OURS = "securerun"


class _Calls(threading.local):
    """Which functions of torch's this thread is calling. The process belongs to it: a forked child calls none."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, str, str]] = []


_calls = _Calls()


def call(module: str, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - a function of torch's
    """Call torch's function of this name; torch's own where ours was put in its place, or it leads back here."""
    this = (os.getpid(), module, name)
    function = own(module, name) if this in _calls.begun else _standing(module, name)
    _calls.begun.append(this)
    try:
        return function(*arguments)
    finally:
        _calls.begun.remove(this)


def is_calling(module: str, name: str) -> bool:
    """Whether this thread is in the middle of `call`ing it."""
    return (os.getpid(), module, name) in _calls.begun


def attribute(module: str, name: str) -> Any:  # noqa: ANN401 - what a module holds
    """Return what a module of torch's has by a name. Raises AttributeError where it has none."""
    return getattr(_module(module), name)


def own(module: str, name: str) -> Callable[..., Any]:
    """Return torch's function of this name, whatever stands there now."""
    standing = _module(module)
    function: Callable[..., Any] = getattr(standing, name)
    return function if _is_defined_in(function, standing) else getattr(_made_anew(module), name)


def _standing(module: str, name: str) -> Callable[..., Any]:
    """Return what stands there: somebody else's too, who may have a reason, but not ours."""
    function: Callable[..., Any] = getattr(_module(module), name)
    return own(module, name) if _is_ours(function) else function


def _module(name: str) -> ModuleType:
    """Return torch's module of this name. Raises ModuleNotFoundError where it is not installed."""
    module = sys.modules.get(name) or importlib.import_module(name)
    return _made_anew(name) if _is_ours_by_name(module.__name__) else module


@functools.cache
def _made_anew(name: str) -> ModuleType:
    """Make the module again from its file, for what was replaced in the one that everybody has.

    All that is torch's own there still is taken from that one: functions that start workers are sent to them by name.
    """
    package, _, last = name.rpartition(".")
    spec = PathFinder.find_spec(name, importlib.import_module(package).__path__)
    if spec is None or spec.loader is None:
        raise UsageError(f"{name} was replaced, and its file is not found; leave {last} as torch has it")
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    known = sys.modules.get(name)
    if known is not None and not _is_ours_by_name(known.__name__):
        kept = {each: value for each, value in vars(known).items() if _is_defined_in(value, known)}
        vars(made).update(kept)
    return made


def _is_defined_in(function: object, module: ModuleType) -> bool:
    """Whether it is a function of the module's own file, decorated or not."""
    if not callable(function):
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and code.co_filename == getattr(module, "__file__", None)


def _is_ours(function: object) -> bool:
    return _is_ours_by_name(getattr(function, "__module__", None) or "")


def _is_ours_by_name(name: str) -> bool:
    return name.partition(".")[0] == _OURS
