"""What a process hands down to what it forks and executes, set-user-id programs too, beside what Python has calls for.

The list goes by prctl(2), execve(2), fork(2) and copy_process() of kernel/fork.c. Not on it is what execve(2) resets
(parent's death signal and dumpable of set-id programs, shadow stacks, tagged addresses, system call dispatch, timers of
timer_create(2), locked memory), and what cannot be taken back by whom it was given to: no_new_privs, seccomp filters
and Landlock, with which there is no set-id program, and PR_SET_MDWE, under which all of a guard works.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct

from securerun.linux import libc, proc

# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h: sched_setattr, ioprio_set,
# set_mempolicy
_CALL_NUMBERS = {
    "x86_64": (314, 251, 238),
    "aarch64": (274, 30, 237),
    "riscv64": (274, 30, 237),
    "loongarch64": (274, 30, 237),
}
# include/uapi/linux/prctl.h
_SET_PDEATHSIG = 1
_SET_DUMPABLE = 4
_SET_TSC, _TSC_ENABLE = 26, 1
_SET_SECUREBITS = 28
_SET_TIMERSLACK = 29
_MCE_KILL, _MCE_KILL_CLEAR = 33, 0
_SET_CHILD_SUBREAPER = 36
_SET_THP_DISABLE = 41
_SET_SPECULATION_CTRL = 53
_SPEC_STORE_BYPASS, _SPEC_INDIRECT_BRANCH, _SPEC_L1D_FLUSH = 0, 1, 2
_SPEC_ENABLE, _SPEC_DISABLE = 1 << 1, 1 << 2
_SET_IO_FLUSHER = 57
_SCHED_CORE = 62
_SCHED_CORE_GET, _SCHED_CORE_CREATE, _SCHED_CORE_SHARE_FROM = 0, 1, 3
_SET_MEMORY_MERGE = 67
_SET_PTRACER = 0x59616D61
# In this order: where the time stamp counter may not be read, the next look at a clock is a SIGSEGV. A slack of 0 would
# be "the default", and that is the slack of whoever forked us. Flushing the cache is what L1D_FLUSH enables.
_OF_PRCTL = (
    (_SET_TSC, _TSC_ENABLE, 0),
    (_SET_TIMERSLACK, 1, 0),
    (_SET_PDEATHSIG, 0, 0),
    (_SET_CHILD_SUBREAPER, 0, 0),
    (_SET_SECUREBITS, 0, 0),
    (_SET_THP_DISABLE, 0, 0),
    (_MCE_KILL, _MCE_KILL_CLEAR, 0),
    (_SET_IO_FLUSHER, 0, 0),
    (_SET_MEMORY_MERGE, 0, 0),
    (_SET_PTRACER, 0, 0),
    (_SET_SPECULATION_CTRL, _SPEC_STORE_BYPASS, _SPEC_ENABLE),
    (_SET_SPECULATION_CTRL, _SPEC_INDIRECT_BRANCH, _SPEC_ENABLE),
    (_SET_SPECULATION_CTRL, _SPEC_L1D_FLUSH, _SPEC_DISABLE),
)
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period; since 5.3 util_min and util_max. A
# runtime of an ordinary process is its slice (6.12). The flags say that there are clamps; -1 takes them away (5.11).
_ATTRIBUTES = struct.pack("=IIQiIQQQII", 56, os.SCHED_OTHER, 0x20 | 0x40, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF)
_ATTRIBUTES_OF_OLD = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, 0, 0, 0, 0, 0)
_IOPRIO_WHO_PROCESS = 1
_KEYCTL_JOIN_SESSION_KEYRING, _KEYCTL_SET_REQKEY_KEYRING = 1, 14
_CLONE_SYSVSEM = 0x00040000


def reset() -> None:
    """Give this process what a fresh one of init's has; where something may not be reset, pass over it."""
    for option, argument, further in _OF_PRCTL:
        _control(option, argument, further)
    _reset_scheduling()
    _leave_keyrings()
    # To leave a real-time policy restores the slack of whoever forked us (__setscheduler_params, 6.9).
    _control(_SET_TIMERSLACK, 1, 0)
    libc.library.personality(ctypes.c_ulong(0))
    libc.library.unshare(_CLONE_SYSVSEM)
    _leave_core_group()


def hide_memory() -> None:
    """Have nobody without privilege look into this process, and no core written of it, to a pipe either (core(5))."""
    _control(_SET_DUMPABLE, 0, 0)


def _reset_scheduling() -> None:
    numbers = _CALL_NUMBERS.get(os.uname().machine)
    if numbers is None:
        return
    set_scheduling, set_io_priority, set_memory_policy = numbers
    if _call(set_scheduling, 0, _ATTRIBUTES, 0) != 0:
        _call(set_scheduling, 0, _ATTRIBUTES_OF_OLD, 0)
    _call(set_io_priority, _IOPRIO_WHO_PROCESS, 0, 0)
    _call(set_memory_policy, 0, None, 0)


def _leave_keyrings() -> None:
    for operation in (_KEYCTL_JOIN_SESSION_KEYRING, _KEYCTL_SET_REQKEY_KEYRING):
        with contextlib.suppress(OSError):
            libc.keyctl(operation, 0)


def _leave_core_group() -> None:
    """Share a core with whoever init shares it with, or with nobody: a caller's group would be run beside the caller's.

    A cookie cannot be given up, only taken from another process (core-scheduling.rst).
    """
    if _in_core_group():
        _control(_SCHED_CORE, _SCHED_CORE_SHARE_FROM, proc.INIT)
    if _in_core_group():
        _control(_SCHED_CORE, _SCHED_CORE_CREATE, 0)


def _in_core_group() -> bool:
    cookie = ctypes.c_ulong(0)
    got = libc.library.prctl(_SCHED_CORE, _SCHED_CORE_GET, 0, 0, ctypes.byref(cookie))
    return bool(got == 0 and cookie.value != 0)


def _control(option: int, argument: int, further: int) -> None:
    # Through `...` of C an int is passed by halves on some machines.
    longs = [ctypes.c_ulong(value) for value in (argument, further, 0, 0)]
    libc.library.prctl(option, *longs)


def _call(number: int, *arguments: int | bytes | None) -> int:
    longs = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(libc.library.syscall(ctypes.c_long(number), *longs))
