"""What guards did, for the administrator: in the journal, the system log or, where there is neither, a file of root's.

systemd's journal is told in its own protocol, with fields that can be searched: `journalctl RUN_ID=5292ff20269a`.
Nobody is waited for: a reader that is stuck has its line told to the next place.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from securerun.text import printable

JOURNAL = "/run/systemd/journal/socket"
SYSTEM_LOG = "/dev/log"
FILE = Path("/var/log/securerun.log")
Fields = Mapping[str, Sequence[str]]
_NO_FIELDS: Fields = {}
_FILE_MODE = 0o640
_LINE_BYTES = 500
# A value is short, and a run may have 100,000 peers.
MOST_VALUES = 64
_VALUE_BYTES = 64
# RFC 5424, 6.2.1: facility authpriv, severity notice
_FACILITY, _SEVERITY = 10, 5
_PRIORITY = _FACILITY << 3 | _SEVERITY
_STANDARD_ERROR = 2


def note(program: str, words: str, fields: Fields = _NO_FIELDS) -> None:
    """Log one line, cut where it is long. A host without any place for it still gets its guard: the words are lost.

    fields: of the journal alone, with each of their values; the first MOST_VALUES of a field.
    """
    said, length = printable(words[:_LINE_BYTES]), len(words)
    with contextlib.suppress(OSError):
        _send(JOURNAL, _entry(program, _shortened(said, length), fields))
        return
    line = _shortened(f"{program}[{os.getpid()}]: {said}", length)
    with contextlib.suppress(OSError):
        _send(SYSTEM_LOG, f"<{_PRIORITY}>{time.strftime('%b %e %H:%M:%S')} {line}".encode("utf-8", "replace"))
        return
    dated = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n".encode("utf-8", "replace")
    with contextlib.suppress(OSError):
        _append(dated)
        return
    with contextlib.suppress(OSError):
        _print(dated)


def _shortened(line: str, length: int) -> str:
    """Cut a line that callers may make long: they choose many of the words."""
    data = line.encode("utf-8", "replace")
    if len(data) <= _LINE_BYTES and length <= _LINE_BYTES:
        return data.decode("utf-8", "replace")
    return f"{data[: _LINE_BYTES - 40].decode('utf-8', 'ignore')}... (of {length} characters)"


def _entry(program: str, words: str, fields: Fields) -> bytes:
    """Write an entry of the journal (systemd's JOURNAL_NATIVE_PROTOCOL); what is printable breaks no line."""
    lines = [
        f"MESSAGE={words}",
        f"PRIORITY={_SEVERITY}",
        f"SYSLOG_FACILITY={_FACILITY}",
        f"SYSLOG_IDENTIFIER={program}",
        f"SYSLOG_PID={os.getpid()}",
        *_values(fields),
    ]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _values(fields: Fields) -> Iterator[str]:
    for name, values in fields.items():
        for value in islice(values, MOST_VALUES):
            yield f"{name}={printable(value[:_VALUE_BYTES])}"


def _send(place: str, data: bytes) -> None:
    """Send a datagram, without waiting for a reader that is stuck, as syslog(3) would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as end:
        end.connect(place)
        end.send(data)


def _append(line: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(FILE, flags, _FILE_MODE)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, _FILE_MODE)  # open(2) takes the umask off
            os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _print(line: bytes) -> None:
    """Print a line where there is room for it: a pipe that has any takes this much at once (pipe(7), PIPE_BUF)."""
    poller = select.poll()
    poller.register(_STANDARD_ERROR, select.POLLOUT)
    if poller.poll(0) == [(_STANDARD_ERROR, select.POLLOUT)]:
        os.write(_STANDARD_ERROR, line)
