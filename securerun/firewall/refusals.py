"""Why there can be no shield here: each refusal of the kernel's as a line for people and an obstacle for code."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from securerun.errors import Obstacle, Unavailable
from securerun.linux import capabilities, proc

_LACK_OF_CAPABILITIES = (
    "not permitted; it takes CAP_NET_ADMIN and CAP_BPF (before Linux 5.8 CAP_SYS_ADMIN) in the host's own user "
    "namespace"
)
# containers/common, pkg/seccomp; moby/moby#43987, in 23.0.
_FORBIDDEN_BY_SECCOMP = (
    "not permitted; the capabilities for it are here, so a seccomp filter forbids bpf(2): podman's own and that of "
    "docker before 23 allow it with CAP_SYS_ADMIN alone; add that, or --security-opt seccomp=FILE"
)
FORBIDDEN_ABOVE = (
    "not permitted; a program on a cgroup above forbids any below (systemd does that for IP accounting), "
    "or CAP_NET_ADMIN is missing"
)
CANNOT_OPEN = "not permitted; it takes CAP_SYS_ADMIN to open a program by its id"
_SECCOMP_FILTER = b"2"  # include/uapi/linux/seccomp.h: SECCOMP_MODE_FILTER
_REASONS = {
    errno.ENOSYS: ("this kernel has no bpf system call", Obstacle.OLD_KERNEL),
    errno.EINVAL: ("this kernel cannot do it; it takes Linux 4.15 with CONFIG_CGROUP_BPF", Obstacle.OLD_KERNEL),
    errno.EBADF: ("the descriptor is not one of a directory in a cgroup v2 file system", Obstacle.NO_CGROUP),
    errno.ENODEV: ("the cgroup was removed", Obstacle.NO_CGROUP),
}


def lack_of_privilege() -> str:
    """Return what the kernel's EPERM means to who asks it for programs and maps, in words."""
    if proc.is_in_first_user_namespace():
        status = proc.status(proc.SELF)
        is_filtered = status.words("Seccomp") == [_SECCOMP_FILTER]
        if is_filtered and capabilities.suffice_for_guarding(status.bits("CapEff")):
            return _FORBIDDEN_BY_SECCOMP
        return _LACK_OF_CAPABILITIES
    return f"{_LACK_OF_CAPABILITIES}; root of this one has none: bring the host's guard in (securerunctl setup systemd)"


class ShieldUnavailable(Unavailable):
    """There can be no shield here, or none that is proven; the message is one line that says why."""


@contextlib.contextmanager
def explained(doing: str, not_permitted: str = "") -> Iterator[None]:
    """Turn the kernel's errors into ShieldUnavailable, each with its reason.

    not_permitted: what EPERM means here, by default a lack of privilege.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPERM:
            words = not_permitted or lack_of_privilege()
            raise ShieldUnavailable(f"{doing}: {words}", Obstacle.NOT_PERMITTED) from error
        reason, obstacle = _REASONS.get(error.errno or 0, (error.strerror, Obstacle.OTHER))
        raise ShieldUnavailable(f"{doing}: {reason}", obstacle) from error
