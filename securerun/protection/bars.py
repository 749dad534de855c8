"""Why a job cannot have a network of its own here, with the setting, and the command that changes it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from securerun.linux import capabilities, forked, own_network, proc, user_namespaces

_SWITCH = Path("/proc/sys/kernel/unprivileged_userns_clone")  # Debian's and Ubuntu's own
_APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")  # Ubuntu 23.10 and newer
_LIMITS = (Path("/proc/sys/user/max_user_namespaces"), Path("/proc/sys/user/max_net_namespaces"))
_ANSWER = struct.Struct("=i")
_FILTERED = b"2"  # proc(5), Seccomp: SECCOMP_MODE_FILTER


@dataclass(frozen=True)
class Bar:
    """What is in the way. what: the setting and how it is, or what is missing. fix: the command that helps."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} ({self.fix})"


def known() -> Bar | None:
    """Return what is known to bar this process from a network of its own, without trying; None for nothing."""
    if proc.own_threads() > 1:
        what = f"this process has {proc.own_threads()} threads, and only one of a single thread can have one"
        return Bar(what, "call the command securerun")
    if os.geteuid() != 0 and _number(_SWITCH) == 0:
        return Bar("kernel.unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1")
    for limit in _LIMITS:
        if _number(limit) == 0:
            return Bar(f"user.{limit.name} is 0", f"sysctl -w user.{limit.name}=10000")
    # These let a user namespace be begun, and refuse what is needed there; so that is not found out by this process.
    return _refused_to_child() if _may_begin_in_vain() else None


def _may_begin_in_vain() -> bool:
    """Return whether a user namespace may come to be that nothing can be done in: where AppArmor is asked, or for root.

    Who lacks CAP_SETFCAP maps no user id 0 into one (Linux 5.12, db2e718a4798): as root of few capabilities does.
    """
    if os.geteuid() != 0:
        return _number(_APPARMOR) == 1
    return capabilities.SETFCAP not in capabilities.effective()


def told_by(error: OSError) -> Bar:
    """Return what bars this process, once the kernel has refused."""
    return known() or _explained(error)


def _explained(error: OSError) -> Bar:
    if error.errno in {errno.ENOSPC, errno.EUSERS}:
        what = "user.max_user_namespaces or user.max_net_namespaces is used up"
        return Bar(what, "sysctl -w user.max_user_namespaces=10000 user.max_net_namespaces=10000")
    if error.errno == errno.EINVAL:
        return Bar("this kernel has no user namespaces (CONFIG_USER_NS)", "use a kernel that has")
    if _number(_APPARMOR) == 1:
        setting = "kernel.apparmor_restrict_unprivileged_userns"
        return Bar(f"{setting} is 1", f"sysctl -w {setting}=0, or an AppArmor profile with `userns,` for this Python")
    if os.geteuid() == 0 and capabilities.SETFCAP not in capabilities.effective():
        return Bar("root without CAP_SETFCAP may map no user id 0 there", "start it as an ordinary user")
    if proc.status(proc.SELF).words("Seccomp") == [_FILTERED]:
        what = "a seccomp filter, as containers have one, forbids user namespaces"
        return Bar(what, "docker run --security-opt seccomp=unconfined")
    return Bar(f"the kernel refuses a user namespace ({error.strerror}), as it does in a chroot", "start it outside")


def tried() -> Bar | None:
    """Return what bars this process, found out by a child of it that tries and ends; None for nothing."""
    return known() or _refused_to_child()


def _refused_to_child() -> Bar | None:
    child, near = forked.fork(_try)
    with near:
        answer = near.recv(_ANSWER.size)
    with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored, the kernel reaps
        os.waitpid(child, 0)
    (refused,) = _ANSWER.unpack(answer) if len(answer) == _ANSWER.size else (errno.EPERM,)
    return _explained(OSError(refused, os.strerror(refused))) if refused else None


def _try(far: socket.socket) -> None:
    refused = 0
    try:
        user_namespaces.begin(mounts=False)
        own_network.bring_up({}, ())
    except OSError as error:
        refused = error.errno or errno.EPERM
    far.sendall(_ANSWER.pack(refused))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
