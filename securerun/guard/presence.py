"""The guard's sign that it lives, for launchers inside of its run: an abstract socket to which anybody may connect.

It says nothing and hears nothing. That root holds it is the kernel's word to each who connects (SO_PEERCRED), and it
goes with the guard. Abstract names are of the network namespace, as rules are: by it whoever finds rules of a run that
no record here names, as of a container with a /run of its own, knows that they are not left over.
"""

from __future__ import annotations

import contextlib
import os
import socket

from securerun.guard.protocol import presence_of
from securerun.linux.sent_along import Parting

_WAITING = 16
_MORE_BYTES = 8
MORE_NAMES = "-[0-9a-f]{16}"
"""What such a second name has behind the first, as a pattern."""


class Presence:
    """Stands for a run while this process holds it.

    Made before anybody but the launcher knows the run's id. A guard that takes over from a dead one may find the name
    taken by anybody: those inside of the run do not believe that one, and it stands at a name that nobody can take.
    """

    def __init__(self, run_id: str) -> None:
        first = presence_of(run_id)
        self._end = _standing_at(first) or _standing_at(f"{first}-{os.urandom(_MORE_BYTES).hex()}")
        self._parting = Parting()

    def make_room(self) -> None:
        """Let those go that have connected, of whom there is room for a few: to be done from time to time.

        While none of those can be let go that came before, nobody is.
        """
        self._parting.close()
        if self._end is None or len(self._parting):
            return
        with contextlib.suppress(OSError):
            for _ in range(_WAITING + 1):
                self._parting.take(self._end.accept()[0])
        self._parting.close()

    def close(self) -> None:
        """Take the sign down."""
        if self._end is not None:
            self._end.close()


def _standing_at(name: str) -> socket.socket | None:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        end.bind(name)
        end.listen(_WAITING)
    except OSError:
        end.close()
        return None
    return end
