"""What guards did, for the administrator: in the system log or, where there is none, in a file of root's."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from pathlib import Path

from securerun.text import printable

SYSTEM_LOG = "/dev/log"
FILE = Path("/var/log/securerun.log")
_FILE_MODE = 0o640
_LINE_BYTES = 500
_PRIORITY = 10 << 3 | 5  # RFC 5424, 6.2.1: facility authpriv, severity notice


def note(program: str, words: str) -> None:
    """Log one line, cut where it is long. A host without any place for it still gets its guard: the words are lost."""
    line = _shortened(f"{program}[{os.getpid()}]: {printable(words[:_LINE_BYTES])}", len(words))
    with contextlib.suppress(OSError):
        _send(line)
        return
    with contextlib.suppress(OSError):
        _append(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")


def _shortened(line: str, length: int) -> str:
    """Cut a line that callers may make long: they choose many of the words."""
    data = line.encode("utf-8", "replace")
    if len(data) <= _LINE_BYTES and length <= _LINE_BYTES:
        return data.decode("utf-8", "replace")
    return f"{data[: _LINE_BYTES - 40].decode('utf-8', 'ignore')}... (of {length} characters)"


def _send(line: str) -> None:
    """Send a line to the system log, without waiting for a reader that is stuck, as syslog(3) would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as end:
        end.connect(SYSTEM_LOG)
        end.send(f"<{_PRIORITY}>{time.strftime('%b %e %H:%M:%S')} {line}".encode("utf-8", "replace"))


def _append(line: str) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(FILE, flags, _FILE_MODE)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, _FILE_MODE)  # open(2) takes the umask off
            os.write(descriptor, line.encode("utf-8", "replace"))
    finally:
        os.close(descriptor)
