"""What a process gets from whoever started it and a guard must not keep.

sudo passes on resource limits, scheduling, the working directory, ignored signals and the signal mask: whoever may
start a guard could otherwise starve it, or have it end by itself, as soon as it has something to clean up.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal

from securerun.errors import PrivilegeError
from securerun.linux import prctl, proc

_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_UNLIMITED = (
    resource.RLIMIT_CPU,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
    resource.RLIMIT_MEMLOCK,
    resource.RLIMIT_NPROC,
    resource.RLIMIT_RTTIME,
    resource.RLIMIT_SIGPENDING,
    resource.RLIMIT_MSGQUEUE,
)
# What makes the kernel end the guard, or fail its writes and its memory, with the option of the shell's ulimit.
_FATAL = {
    resource.RLIMIT_CPU: "-t",
    resource.RLIMIT_FSIZE: "-f",
    resource.RLIMIT_AS: "-v",
    resource.RLIMIT_DATA: "-d",
}
_OPEN_FILES = 4096
_STACK_BYTES = 8 * 1024 * 1024
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
# The standard streams stay: they are how the launcher is spoken to.
_FIRST_OTHER_DESCRIPTOR = 3
_MOST_DESCRIPTORS = 65536


def discard(name: str) -> None:
    """Cut what ties this process to whoever started it, and give it a name of its own that no `pkill python` means.

    Does what is permitted and passes over the rest: a guard in a container may not raise its limits.
    """
    prctl.set_name(name)
    os.closerange(_FIRST_OTHER_DESCRIPTOR, _MOST_DESCRIPTORS)
    with contextlib.suppress(PermissionError):
        os.setsid()  # refused to a process group leader, which has its own session already or is run by hand
    _discard_signals()
    _discard_limits()
    _discard_scheduling()
    os.umask(0o077)
    os.chdir("/")


def require_unlimited() -> None:
    """Raise PrivilegeError for a limit that could not be lifted and would end the guard before its work is done."""
    for limit, option in _FATAL.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            raise PrivilegeError(
                f"a hard limit of {soft} (ulimit {option}) lies on the guard too, and it may not lift it here; start "
                "the job without that limit, or give the container CAP_SYS_RESOURCE"
            )


def _discard_signals() -> None:
    for number in sorted(signal.valid_signals()):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN if number in _DEAF_TO else signal.SIG_DFL)
    # A launcher that has gone, and a file that may not grow, are told by the error of the write.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for timer in _TIMERS:  # an alarm goes on across execve(2)
        signal.setitimer(timer, 0)


def _discard_limits() -> None:
    for limit in _UNLIMITED:
        _limit(limit, resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES)
    _limit(resource.RLIMIT_STACK, _STACK_BYTES, resource.RLIM_INFINITY)
    # The memory of a guard holds the peers of a job: not for a core file in somebody's directory.
    _limit(resource.RLIMIT_CORE, 0, 0)


def _limit(limit: int, soft: int, hard: int) -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(limit, (soft, hard))


def _discard_scheduling() -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    # An inherited 1000 would make the guard the first to go when memory is short.
    with contextlib.suppress(OSError):
        proc.set_own_out_of_memory_adjustment(0)
