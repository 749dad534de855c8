"""The guard's sign that it lives, for launchers inside of its run: an abstract socket to which anybody may connect.

It says nothing and hears nothing. That root holds it is the kernel's word to each who connects (SO_PEERCRED), and it
goes with the guard.
"""

from __future__ import annotations

import contextlib
import socket

from securerun.guard.protocol import presence_of

_WAITING = 16


class Presence:
    """Stands for a run while this process holds it; where another has the name there is none, and none is believed."""

    def __init__(self, run_id: str) -> None:
        self._end: socket.socket | None = None
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            end.bind(presence_of(run_id))
            end.listen(_WAITING)
        except OSError:
            end.close()
            return
        self._end = end

    def make_room(self) -> None:
        """Let those go that have connected, of whom there is room for a few: to be done from time to time."""
        if self._end is None:
            return
        with contextlib.suppress(OSError):
            for _ in range(_WAITING + 1):
                self._end.accept()[0].close()

    def close(self) -> None:
        """Take the sign down."""
        if self._end is not None:
            self._end.close()
