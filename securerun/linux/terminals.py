"""How a process comes away from the terminals that it was started at (setsid(2), ioctl_tty(2))."""

from __future__ import annotations

import fcntl
import os

from securerun.linux import proc

_STANDARD_INPUT = 0
_KEPT_FLAGS = os.O_APPEND | os.O_NONBLOCK


def leave() -> None:
    """Go on in a session of its own, and with nothing that a terminal could be read by.

    Without a controlling terminal nobody types for others (TIOCSTI takes that terminal, or CAP_SYS_ADMIN), and
    somebody else's cannot become it: that takes CAP_SYS_ADMIN, or a descriptor that reads and a terminal that is
    nobody's (drivers/tty/tty_jobctl.c). Reading takes a descriptor only, and a shell's are all open for it: so standard
    input becomes /dev/null, and any other is opened anew, to write alone. Still a terminal: programs write to it a line
    at a time, and in colour. Raises OSError.
    """
    for descriptor in proc.own_descriptors():
        if os.isatty(descriptor):
            _replace(descriptor)
    os.setsid()


def _replace(descriptor: int) -> None:
    """Have a descriptor of a terminal's, which may be the only one of its kind that a program knows, read nothing."""
    new = _opened_anew(descriptor)
    os.dup2(new, descriptor, os.get_inheritable(descriptor))
    os.close(new)


def _opened_anew(descriptor: int) -> int:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if descriptor == _STANDARD_INPUT or flags & os.O_ACCMODE == os.O_RDONLY:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    writing = os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC | flags & _KEPT_FLAGS
    try:
        return os.open(proc.path_of_own_descriptor(descriptor), writing)
    except OSError:  # EIO: it has hung up
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
