"""When signals are taken, and by which thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Callable

# What ends a process that a person, a terminal or a batch system wants to end.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def held_back(numbers: Collection[int] = _ENDING) -> Iterator[None]:
    """Have the signals that come to this thread in the block wait for its end; by default those that end a process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_deaf_thread(target: Callable[[], None], name: str) -> None:
    """Run `target` in a daemon thread that takes no signal: one that the main thread holds back waits for it."""
    with held_back(signal.valid_signals()):
        threading.Thread(target=target, name=name, daemon=True).start()
