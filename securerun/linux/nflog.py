"""Netfilter's log groups (nfnetlink_log): copies of the packets that a rule hands to a group, for whoever holds it.

With nobody there the kernel throws the copies away, so a rule that outlives its reader costs nothing.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from securerun.linux import netlink
from securerun.linux.netlink import attribute
from securerun.linux.nfnetlink import LOG, attributes_of, open_channel, request, type_of

# include/uapi/linux/netfilter/nfnetlink_log.h
_PACKET, _CONFIGURE = (type_of(LOG, message) for message in (0, 1))
_COMMAND, _MODE, _THRESHOLD = 1, 2, 5
# Attributes of a packet.
_PAYLOAD, _PREFIX = 9, 10
_BIND, _COPY_PACKET = 1, 2


class LogGroup:
    """One log group, held by this process; `copied` says how many bytes of each packet are wanted.

    Raises OSError when the group is somebody else's (EPERM) or the kernel has no nfnetlink_log.
    """

    def __init__(self, number: int, copied: int) -> None:
        self.number = number
        self._channel = open_channel()
        try:
            self._configure(attribute(_COMMAND, struct.pack("=B", _BIND)))
            self._configure(attribute(_MODE, struct.pack("!IBB", copied, _COPY_PACKET, 0)))
            self._configure(attribute(_THRESHOLD, struct.pack("!I", 1)))
        except OSError:
            self._channel.close()
            raise
        self._channel.stop_waiting()

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._channel.fileno()

    def packets(self, most: int, prefix: str = "") -> Iterator[bytes]:
        """Yield the first bytes of each packet logged since; never waits, and takes in at most so many datagrams.

        prefix: as for `packets_in`.
        """
        for _ in range(most):
            try:
                yield from packets_in(self._channel.receive(), prefix)
            except BlockingIOError:
                return
            except OSError:
                # ENOBUFS: the kernel dropped copies because they came faster than we read. Go on with what follows.
                continue

    def close(self) -> None:
        """Give the group back."""
        self._channel.close()

    def _configure(self, setting: bytes) -> None:
        self._channel.order(request(_CONFIGURE, socket.AF_UNSPEC, setting, netlink.ACKNOWLEDGE, resource=self.number))


def packets_in(data: bytes, prefix: str = "") -> Iterator[bytes]:
    """Yield the first bytes of each packet in a datagram from a log group. Raises OSError for what is not whole.

    prefix: only of those that a rule with this prefix logged, unless it is empty.
    """
    for kind, _, payload in netlink.messages(data):
        if kind != _PACKET:
            continue
        found = attributes_of(payload)
        if not prefix or found.get(_PREFIX, b"").rstrip(b"\0") == prefix.encode():
            yield found.get(_PAYLOAD, b"")
