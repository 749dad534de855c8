"""A caller that hands something down: sets an attribute of its process by name, and then executes a program.

    handing_down.py "timer slack" -- /usr/bin/sudo ...

With the word `read` for the program it becomes a process that tells in JSON what it inherited, what is left of it once
it has discarded as a guard does, and nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_SCHED_SETATTR, _SCHED_GETATTR, _IOPRIO_SET, _IOPRIO_GET, _SET_MEMPOLICY, _GET_MEMPOLICY, _KEYCTL = (
    (314, 315, 251, 252, 238, 239, 250) if os.uname().machine == "x86_64" else (274, 275, 30, 31, 237, 236, 219)
)
_HUNDRED_SECONDS = 10**11
_IDLE, _BATCH, _RESET_ON_FORK = 5, 3, 1
_UNAME26_AND_STICKY_TIMEOUTS = 0x0020000 | 0x4000000
_ATTRIBUTES_SIZE = 48
_SESSION_KEYRING = -3
_FAR_DESCRIPTOR = 70_000


def prctl(option: int, *words: int) -> int:
    return int(_LIBC.prctl(option, *[ctypes.c_ulong(word) for word in (*words, 0, 0, 0, 0)[:4]]))


def call(number: int, *words: object) -> int:
    longs = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    return int(_LIBC.syscall(ctypes.c_long(number), *longs))


def _schedule(policy: int, *, flags: int = 0, nice: int = 0, runtime: int = 0) -> int:
    attributes = struct.pack("=IIQiIQQQ", _ATTRIBUTES_SIZE, policy, flags, nice, 0, runtime, 0, 0)
    return call(_SCHED_SETATTR, 0, attributes, 0)


def _set_slice() -> int:
    """Before Linux 6.12 an ordinary process has no slice, and what is asked for is passed over without a word."""
    wanted = 99_000_000
    refused = _schedule(os.SCHED_OTHER, runtime=wanted)
    if not refused and struct.unpack_from("=24xQ", bytes.fromhex(scheduling_of(0)))[0] != wanted:
        raise OSError("it was passed over")
    return refused


def _write(path: str, text: str) -> None:
    Path(path).write_text(text)


def _keep_one_processor() -> None:
    processors = os.sched_getaffinity(0)
    if len(processors) == 1:
        raise OSError("this machine has one processor")
    os.sched_setaffinity(0, {min(processors)})


def _keep_descriptor() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (80_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.dup2(0, _FAR_DESCRIPTOR, inheritable=True)


# What an ordinary user may set as well.
OF_ANYBODY: dict[str, Callable[[], Any]] = {
    "timer slack": lambda: prctl(29, _HUNDRED_SECONDS),
    "subreaper": lambda: prctl(36, 1),
    "huge pages": lambda: prctl(41, 1),
    "machine checks": lambda: prctl(33, 1, 1),
    "store bypass": lambda: prctl(53, 0, 4),
    "indirect branches": lambda: prctl(53, 1, 4),
    "writable code": lambda: prctl(65, 1),
    "core filter": lambda: _write("/proc/self/coredump_filter", "0x7f"),
    "personality": lambda: min(0, _LIBC.personality(ctypes.c_ulong(_UNAME26_AND_STICKY_TIMEOUTS))),
    "io priority": lambda: call(_IOPRIO_SET, 1, 0, 3 << 13),
    "memory policy": lambda: call(_SET_MEMPOLICY, 2, ctypes.byref(ctypes.c_ulong(1)), 64),
    "idle": lambda: _schedule(_IDLE),
    "batch": lambda: _schedule(_BATCH, nice=7),
    "reset on fork": lambda: _schedule(os.SCHED_OTHER, flags=_RESET_ON_FORK),
    "slice": _set_slice,
    "clamps": lambda: call(
        _SCHED_SETATTR, 0, struct.pack("=IIQiIQQQII", 56, os.SCHED_OTHER, 0x40, 0, 0, 0, 0, 0, 0, 1), 0
    ),
    "core group": lambda: prctl(62, 1, 0, 0),
    "niceness": lambda: min(0, os.nice(7)),
    "autogroup": lambda: _write("/proc/self/autogroup", "11"),
    "processors": _keep_one_processor,
    "memory shortage": lambda: _write("/proc/self/oom_score_adj", "777"),
    "keyring": lambda: min(0, call(_KEYCTL, 1, b"callers")),
    "keys": lambda: min(0, call(_KEYCTL, 14, 4)),
    "umask": lambda: min(0, os.umask(0)),
    "alarm": lambda: signal.setitimer(signal.ITIMER_REAL, 50) and None,
    "processor time": lambda: signal.setitimer(signal.ITIMER_PROF, 50) and None,
    "signal mask": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]) and None,
    "descriptor": _keep_descriptor,
}
# What root may set besides, or what sudo ends.
OF_ROOT: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "death signal of the parent": lambda: prctl(1, signal.SIGKILL),
    "securebits": lambda: prctl(28, 1 << 6),
    "flusher": lambda: prctl(57, 1),
    "merged memory": lambda: prctl(67, 1),
    "real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(3)),
}


def scheduling_of(pid: int) -> str:
    """All that sched_getattr(2) tells of a process; it needs no privilege."""
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_SIZE)
    assert call(_SCHED_GETATTR, pid, attributes, _ATTRIBUTES_SIZE, 0) == 0
    return attributes.raw.hex()


def io_priority_of(pid: int) -> int:
    return call(_IOPRIO_GET, 1, pid)


def own() -> dict[str, Any]:
    """All that this process has of it."""
    policy = ctypes.c_int(-1)
    call(_GET_MEMPOLICY, ctypes.byref(policy), None, 0, None, 0)
    death, reaper, clock = ctypes.c_int(-1), ctypes.c_int(-1), ctypes.c_int(-1)
    _LIBC.prctl(2, ctypes.byref(death))
    _LIBC.prctl(37, ctypes.byref(reaper))
    _LIBC.prctl(25, ctypes.byref(clock))
    keyring = ctypes.create_string_buffer(200)
    call(_KEYCTL, 6, _SESSION_KEYRING, keyring, 200)
    return {
        "timer slack": prctl(30),
        "death signal of the parent": death.value,
        "subreaper": reaper.value,
        "clock": clock.value,
        "securebits": prctl(27),
        "huge pages": prctl(42),
        "machine checks": prctl(34),
        "flusher": prctl(58),
        "merged memory": prctl(68),
        "speculation": [prctl(52, which) for which in range(3)],
        "core filter": Path("/proc/self/coredump_filter").read_text(),
        "personality": Path("/proc/self/personality").read_text(),
        "io priority": io_priority_of(0),
        "memory policy": policy.value,
        "scheduling": scheduling_of(0),
        "autogroup": Path("/proc/self/autogroup").read_text().partition(" ")[2],
        "processors": sorted(os.sched_getaffinity(0)),
        "memory shortage": Path("/proc/self/oom_score_adj").read_text(),
        "keyring": keyring.value.decode().rpartition(";")[2],
        "keys": call(_KEYCTL, 14, -1),
        "umask": Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0],
        "timers": [signal.getitimer(timer)[0] > 0 for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF)],
        "signal mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "descriptors": [name for name in os.listdir("/proc/self/fd") if int(name) > 10],
        "dumpable": prctl(3),
    }


def _tell() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from securerun.guard import inherited

    before = own()
    inherited.discard("securerun-test")
    print(json.dumps([before, own()]))


def main() -> None:
    what, _, *program = sys.argv[1:]
    if what == "inherited":
        _tell()
        return
    try:
        refused = {**OF_ANYBODY, **OF_ROOT}[what]()
    except (OSError, ValueError) as error:
        sys.exit(f"{what}: {error}")
    if refused:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")
    if program == ["read"]:
        program = [sys.executable, "-I", "-S", __file__, "inherited", "--"]
    os.execv(program[0], program)  # noqa: S606 - that is the point: what execve(2) leaves as it is


if __name__ == "__main__":
    main()
