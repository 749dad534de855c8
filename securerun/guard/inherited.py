"""What a process gets from whoever started it and a guard must not keep.

sudo passes on resource limits, scheduling, timer slack, the working directory, ignored signals, the signal mask and
more: whoever may start a guard could otherwise starve it, slow it down while it holds the lock that all others wait
for, or have it end by itself, as soon as it has something to clean up.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from types import FrameType

from securerun.errors import PrivilegeError
from securerun.linux import attributes, prctl, proc

# What terminals, batch systems and sudo send, the last whatever its user sends it.
_DEAF_TO = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
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
# With fewer a guard cannot run iptables any more when it has to clean up.
_FEWEST_OPEN_FILES = 256
_STACK_BYTES = 8 * 1024 * 1024
_CORE_FILTER = 0x33  # the kernel's own (core(5))
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
# The standard streams stay: they are how the launcher is spoken to.
_FIRST_OTHER_DESCRIPTOR = 3
# Beyond what limits on open files commonly are; what is left then is asked for one by one.
_MOST_DESCRIPTORS = 65536


def discard(name: str) -> None:
    """Cut what ties this process to whoever started it, and give it a name of its own that no `pkill python` means.

    Does what is permitted and passes over the rest: a guard in a container may not raise its limits.
    """
    open_missing_streams()
    attributes.reset()
    prctl.set_name(name)
    _discard_descriptors()
    _leave_session()
    _discard_signals()
    lift_limits()
    _discard_places()
    os.umask(0o077)
    os.chdir("/")
    attributes.hide_memory()  # last: what is in /proc/self belongs to nobody but root from now on


def open_missing_streams() -> None:
    """Have /dev/null in the place of each standard stream that is closed.

    The next file or socket would take that place, and be written to for standard error.
    """
    while (lowest := os.open(os.devnull, os.O_RDWR)) < _FIRST_OTHER_DESCRIPTOR:
        os.set_inheritable(lowest, True)
    os.close(lowest)


def require_unlimited() -> None:
    """Raise PrivilegeError for a limit that could not be lifted and would end the guard before its work is done."""
    for limit, option in _FATAL.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            raise _limited(soft, option)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _FEWEST_OPEN_FILES:
        raise _limited(files, "-n")


def _limited(limit: int, option: str) -> PrivilegeError:
    return PrivilegeError(
        f"a hard limit of {limit} (ulimit {option}) lies on the guard too, and it may not lift it here; start "
        "securerun without that limit, or give the container CAP_SYS_RESOURCE"
    )


def _discard_descriptors() -> None:
    os.closerange(_FIRST_OTHER_DESCRIPTOR, _MOST_DESCRIPTORS)
    for descriptor in proc.own_descriptors():
        if descriptor >= _MOST_DESCRIPTORS:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _leave_session() -> None:
    """Be in a session of our own, without a terminal, and so in another group of the scheduler's (sched(7), autogroup).

    A leader of a process group may not (setsid(2)), so it joins its parent's for a moment. Where that is refused too,
    it leads a session already.
    """
    with contextlib.suppress(OSError):
        os.setsid()
        return
    with contextlib.suppress(OSError):
        os.setpgid(0, os.getpgid(os.getppid()))
        os.setsid()


def _discard_signals() -> None:
    for number in sorted(signal.valid_signals()):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN if number in _DEAF_TO else signal.SIG_DFL)
    # A launcher that has gone, and a file that may not grow, are told by the error of the write.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    # sudo passes on what its user sends it, alarms too; those of our own have a handler while they are on.
    signal.signal(signal.SIGALRM, _pass_over)
    for timer in _TIMERS:  # an alarm goes on across execve(2)
        signal.setitimer(timer, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _pass_over(_number: int, _frame: FrameType | None) -> None:
    """Do nothing."""


def lift_limits() -> None:
    """Lift the limits on this process, and those on what it starts, as far as it may."""
    for limit in _UNLIMITED:
        _limit(limit, resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    _limit(resource.RLIMIT_NOFILE, most, most)  # where the next is refused
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES)
    _limit(resource.RLIMIT_STACK, _STACK_BYTES, resource.RLIM_INFINITY)
    # The memory of a guard holds the peers of a job: not for a core file in somebody's directory.
    _limit(resource.RLIMIT_CORE, 0, 0)


def _limit(limit: int, soft: int, hard: int) -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(limit, (soft, hard))


def _discard_places() -> None:
    """Run on every processor, in no order of the caller's, and be the first to go for nobody's sake."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    # An inherited 1000 would make the guard the first to go when memory is short.
    with contextlib.suppress(OSError):
        proc.set_own_out_of_memory_adjustment(0)
    with contextlib.suppress(OSError):
        proc.set_own_autogroup_nice(0)
    with contextlib.suppress(OSError):
        proc.set_own_core_filter(_CORE_FILTER)
