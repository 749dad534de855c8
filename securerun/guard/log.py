"""What guards did, for the administrator: in the system log or, where there is none, in a file of root's."""

from __future__ import annotations

import contextlib
import os
import stat
import syslog
import time
from pathlib import Path

from securerun.guard.protocol import printable

SYSTEM_LOG = Path("/dev/log")
FILE = Path("/var/log/securerun.log")
_FILE_MODE = 0o640


def note(program: str, words: str) -> None:
    """One line. A host without any place for it still gets its guard: the words are lost then."""
    line = printable(words)
    if SYSTEM_LOG.exists():
        syslog.openlog(program, syslog.LOG_PID, syslog.LOG_AUTHPRIV)
        syslog.syslog(syslog.LOG_NOTICE, line)
        return
    with contextlib.suppress(OSError):
        _append(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {program}[{os.getpid()}]: {line}\n")


def _append(line: str) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(FILE, flags, _FILE_MODE)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, _FILE_MODE)  # open(2) takes the umask off
            os.write(descriptor, line.encode("utf-8", "replace"))
    finally:
        os.close(descriptor)
