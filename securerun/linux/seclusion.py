"""Have no other process of the same user look into this one and take what it holds (proc(5), prctl(2): dumpable).

Not by ptrace(2), /proc/PID/fd, /proc/PID/mem or pidfd_getfd(2): each takes CAP_SYS_PTRACE then. So this process is
none that can be debugged, or that leaves a core. What it executes is as ever (execve(2)), and so is what it forks, once
that has let go of what was not for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Callable

from securerun.linux import prctl

_LetGo = Callable[[], None]
_to_let_go: list[_LetGo] = []
_is_secluded = False
_is_registered = False
# Held by whoever forks meanwhile.
_forking = threading.RLock()


def begin() -> None:
    """Have nobody look into this process from here on. To be said again after a change of user."""
    global _is_secluded
    _register()
    _is_secluded = _is_secluded or prctl.is_dumpable()
    prctl.set_dumpable(False)


def end() -> None:
    """Have this process looked into as before: what it held that was not for others is gone."""
    global _is_secluded
    if _is_secluded:
        _is_secluded = False
        prctl.set_dumpable(True)


def let_go_in_children(let_go: _LetGo) -> None:
    """Have this called in each process that is forked, not executed, by this one: before anybody may look into that."""
    _register()
    _to_let_go.append(let_go)


@contextlib.contextmanager
def without_forks() -> Iterator[None]:
    """Have no other thread fork in the block: its child would keep what is being made, and does not know of yet.

    Also the pipe by which Popen hears that its program was executed: it would wait for the child's end.
    """
    _register()
    with _forking:
        yield


def _register() -> None:
    """Once: what is registered cannot be taken back, and what is called last lets others look."""
    global _is_registered
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_begin_as_child)


def _begin_as_child() -> None:
    global _is_secluded
    _forking.release()
    for let_go in _to_let_go:
        let_go()
    if _is_secluded:
        _is_secluded = False
        prctl.set_dumpable(True)
