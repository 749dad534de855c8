"""Threads beside the job: daemons that take no signal."""

from __future__ import annotations

import signal
import threading
from typing import Callable


def start(target: Callable[[], None], name: str) -> None:
    """Run `target` in a daemon thread. Signals stay the main thread's: one that it holds back waits for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        threading.Thread(target=target, name=name, daemon=True).start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
