"""Why there can be no shield here: each refusal of the kernel's as a line for people and an obstacle for code."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from securerun.errors import Obstacle, Unavailable

LACK_OF_PRIVILEGE = (
    "not permitted; it takes CAP_BPF and CAP_NET_ADMIN (before Linux 5.8 CAP_SYS_ADMIN) "
    "in the initial user namespace: run as root there"
)
FORBIDDEN_ABOVE = (
    "not permitted; a program on a cgroup above forbids any below (systemd does that for IP accounting), "
    "or CAP_NET_ADMIN is missing"
)
CANNOT_OPEN = "not permitted; it takes CAP_SYS_ADMIN to open a program by its id"
_REASONS = {
    errno.ENOSYS: ("this kernel has no bpf system call", Obstacle.OLD_KERNEL),
    errno.EINVAL: ("this kernel cannot do it; it takes Linux 4.15 with CONFIG_CGROUP_BPF", Obstacle.OLD_KERNEL),
    errno.EBADF: ("the descriptor is not one of a directory in a cgroup v2 file system", Obstacle.NO_CGROUP),
    errno.ENODEV: ("the cgroup was removed", Obstacle.NO_CGROUP),
}


class ShieldUnavailable(Unavailable):
    """There can be no shield here, or none that is proven; the message is one line that says why."""


@contextlib.contextmanager
def explained(doing: str, not_permitted: str = LACK_OF_PRIVILEGE) -> Iterator[None]:
    """Turn the kernel's errors into ShieldUnavailable, each with its reason. not_permitted: what EPERM means here."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPERM:
            raise ShieldUnavailable(f"{doing}: {not_permitted}", Obstacle.NOT_PERMITTED) from error
        reason, obstacle = _REASONS.get(error.errno or 0, (error.strerror, Obstacle.OTHER))
        raise ShieldUnavailable(f"{doing}: {reason}", obstacle) from error
