"""One end of a pipe or socket, from which nothing is ever waited for, whoever else holds the other end or this one.

A pipe's flags belong to all who hold that end, and so does what is in it: between poll(2) and read(2) somebody else
may take it, or the O_NONBLOCK away. So a pipe is opened once more, for a description of our own (open(2)), and a
socket is asked each time not to wait.
"""

from __future__ import annotations

import os
import socket
import stat

from securerun.errors import PrivilegeError
from securerun.guard.documents import ProtocolError
from securerun.linux import proc, sent_along

_READ_BYTES = 65536


class Channel:
    """A standard stream of this process, by `access` os.O_RDONLY or os.O_WRONLY.

    Raises PrivilegeError for what is neither pipe nor socket, and for one whose other end is closed already.
    """

    def __init__(self, descriptor: int, access: int) -> None:
        self._socket: socket.socket | None = None
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISSOCK(mode):
                self._socket = socket.socket(fileno=os.dup(descriptor))
                self.descriptor = self._socket.fileno()
                sent_along.take_none(self._socket)
                return
            if not stat.S_ISFIFO(mode):
                raise PrivilegeError("a guard takes its orders from a pipe or a socket; it is securerun that starts it")
            self.descriptor = os.open(proc.path_of_own_descriptor(descriptor), access | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise PrivilegeError(f"the launcher has closed its end: {error.strerror}") from error

    def read(self) -> bytes | None:
        """Read what is there; b"" when the other end is closed, None when there is nothing now.

        Raises OSError, and ProtocolError where descriptors were sent along: then nothing more is to be read.
        """
        try:
            if self._socket is not None:
                return sent_along.receive(self._socket, _READ_BYTES, socket.MSG_DONTWAIT)
            return os.read(self.descriptor, _READ_BYTES)
        except BlockingIOError:
            return None
        except sent_along.DescriptorsSent as error:
            raise ProtocolError(str(error)) from error
        except ConnectionError:
            return b""

    def write(self, data: bytes | memoryview) -> int:
        """Write as much as there is room for and return how much. Raises OSError when nobody is there to read."""
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            return os.write(self.descriptor, data)
        except BlockingIOError:
            return 0
