"""Network interfaces that come, go, or get another name or number, as the kernel tells of them (rtnetlink(7))."""

from __future__ import annotations

from securerun.linux import netlink
from securerun.linux.netlink import Channel

# include/uapi/linux/rtnetlink.h: RTNLGRP_LINK
_EVENTS = 1
# Of a flood, so that whoever reads has other duties in between.
_READ_AT_ONCE = 64


class Links:
    """Hears that something happened to an interface of this network namespace; what it was, is asked elsewhere.

    Raises OSError where the kernel does not permit listening.
    """

    def __init__(self) -> None:
        self._channel = Channel(netlink.ROUTE, _EVENTS)
        self._channel.stop_waiting()

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._channel.fileno()

    def take_in(self) -> None:
        """Read away what happened since, or a part of it; never waits."""
        for _ in range(_READ_AT_ONCE):
            try:
                self._channel.receive()
            except BlockingIOError:
                return
            except OSError:
                continue  # ENOBUFS: more happened than was kept for us

    def close(self) -> None:
        """Stop listening."""
        self._channel.close()
