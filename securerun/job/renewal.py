"""The peers of a running job, asked for again: a pod comes back with another address, a host file grows.

Names are asked for at a slow pace, so that neither a name service nor 10,000 nodes that ask it notice, and at once when
somebody was turned away: that may be a node which came back. Host files are read again at the same times.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable

from securerun.errors import PolicyError
from securerun.linux import signals

if TYPE_CHECKING:
    from securerun.job.growing import Growing, HostFile
    from securerun.job.peers import Peers

# The shortest is the pause after somebody was turned away. It doubles until it is the longest.
LEAST_SECONDS, MOST_SECONDS = 5.0, 60.0
# However many nodes ask for however many names, none asks more often than for one name a second on the average.
_SECONDS_A_NAME = 1.0
# After a file was found changed, until it is read once more: whoever writes it may be in the middle of a line.
_SETTLING_SECONDS = 1.0
_SECONDS_A_NAME_IN_A_HURRY = 0.01


def pace(names: int) -> tuple[float, float]:
    """Return the shortest and the longest pause, in seconds, between two times that so many names are asked for."""
    return max(LEAST_SECONDS, names * _SECONDS_A_NAME_IN_A_HURRY), max(MOST_SECONDS, names * _SECONDS_A_NAME)


class Renewal:
    """Peers whose names are asked for, and whose host files are read, again and again in a `with` block.

    change: takes the peers of before and of now whenever their addresses are others.
    tell: takes a line where a file is no host file any more.
    """

    def __init__(
        self, found: Peers, change: Callable[[Peers, Peers], None], tell: Callable[[str], None] = lambda words: None
    ) -> None:
        self._found, self._change, self._tell = found, change, tell
        self._least, self._most = pace(len(found.named))
        self._asked, self._pause = time.monotonic(), self._most
        self._state = threading.Condition()
        self._is_ended = False

    def hurry(self) -> None:
        """Ask as soon as may be: somebody was turned away who may be a peer with a new address."""
        with self._state:
            self._pause = self._least
            self._state.notify()

    def __enter__(self) -> Renewal:
        """Begin to ask, in a thread."""
        if self._found.named or self._found.files:
            signals.start_deaf_thread(self._ask_again_and_again, "securerun-names")
        return self

    def __exit__(self, *_: object) -> None:
        """Ask no more, and change nothing from now on."""
        with self._state:
            self._is_ended = True
            self._state.notify()

    def _ask_again_and_again(self) -> None:
        from securerun.job import peers
        from securerun.job.growing import Growing

        files = Growing(self._tell_while_it_runs)
        while self._wait():
            listed = self._look(files)
            try:
                now = peers.again(peers.with_files(self._found, listed))
            except PolicyError as error:
                files.complain(str(error))
                continue
            with self._state:
                if not self._is_ended and set(now.listed) != set(self._found.listed):
                    self._change(self._found, now)
            self._found = now
            self._least, self._most = pace(len(now.named))

    def _look(self, files: Growing) -> tuple[HostFile, ...]:
        """Return the host files as they are now; one that has changed is looked at twice."""
        listed = files.look(self._found.files)
        if files.is_unsettled and self._sleep(_SETTLING_SECONDS):
            listed = files.look(self._found.files)
        if files.is_unsettled:
            self.hurry()
        return listed

    def _sleep(self, seconds: float) -> bool:
        """Wait for so long; False at the end."""
        with self._state:
            self._state.wait_for(lambda: self._is_ended, seconds)
            return not self._is_ended

    def _tell_while_it_runs(self, words: str) -> None:
        with self._state:
            if not self._is_ended:
                self._tell(words)

    def _wait(self) -> bool:
        """Wait until it is time to ask; False at the end."""
        with self._state:
            while not self._is_ended:
                left = self._asked + self._pause - time.monotonic()
                if left <= 0:
                    self._asked, self._pause = time.monotonic(), min(2 * self._pause, self._most)
                    return True
                self._state.wait(left)
        return False
