"""A child that is forked and stays this program, spoken with over a socket, until it is killed or nobody listens."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from typing import Callable, NoReturn


def fork(live: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """Have a child do this with its end of a conversation, and nothing else; return its pid, and this process' end.

    Raises OSError where there can be no child.
    """
    near, far = socket.socketpair()
    # Held here too, `far` would hide the child's death: a batch system kills all of a cgroup, such a child included.
    with far, ExitStack() as undo:
        undo.callback(near.close)
        pid = os.fork()
        if not pid:
            near.close()
            _live(live, far)
        undo.pop_all()
    return pid, near


def _live(live: Callable[[socket.socket], None], far: socket.socket) -> NoReturn:
    try:
        # The handlers are the parent's, and not for this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        live(far)
    finally:
        os._exit(0)
