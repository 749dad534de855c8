"""What of a job its guard can see, without which scope `ports` closes nothing, and what a lease does not promise."""

from __future__ import annotations

from collections.abc import Iterator

from securerun.errors import Powerless, PrivilegeError
from securerun.guard.caller import Caller
from securerun.guard.lease import Lease
from securerun.linux.sock_diag import SocketDiagnosis, SocketsUnavailable


def _sees_listeners(caller: Caller) -> bool:
    try:
        require_of_listeners(caller)
    except PrivilegeError:
        return False
    return True


def require_of_listeners(caller: Caller) -> None:
    """Raise Powerless where it cannot be told on which ports the job listens: scope `ports` closes what it sees."""
    if not caller.can_be_looked_into():
        raise Powerless(
            "the job cannot be guarded: no shield, and without CAP_SYS_PTRACE no sight of what processes of user "
            f"{caller.user} listen on; a container takes --cap-add SYS_PTRACE with --run-as, or no --run-as"
        )
    try:
        SocketDiagnosis().close()
    except SocketsUnavailable as error:
        raise Powerless(
            f"the job cannot be guarded: no shield, and no sight of its ports ({error}); `modprobe tcp_diag inet_diag`"
        ) from error


def doubts(lease: Lease) -> Iterator[str]:
    """Yield what the shield does not do here, and what is done where something may switch it off while the job runs."""
    if lease.shield is not None and not lease.caller.can_be_looked_into():
        yield (
            f"without CAP_SYS_PTRACE no guard sees what processes of user {lease.caller.user} hold: a listener that "
            "was made outside of the job and handed to it would stay open"
        )
    if lease.void:
        yield f"the shield holds no more: {lease.void}"
    elif lease.closes_all:
        also = "so the port chains close each port of this job as well, within 0.2 s of its appearing"
        if lease.chains is None or not _sees_listeners(lease.caller):
            end = "ended" if lease.order.scope == "process" else "open"
            also = f"and no port chains can close its ports then: the job would be {end}, which is said"
        yield f"net_cls or net_prio of cgroup version 1 is here and may switch the shield off on this kernel, {also}"
