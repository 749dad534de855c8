"""How a launcher leaves its job when that is over and its process goes on, and what the host gets back before it ends.

A process that goes on (a notebook, or a script of several runs) goes back to the cgroup that it came from, alone: what
it started in the job stays there. What it still holds of the job's sockets stays behind the shield all the same, and
after the cgroup is gone: a socket is of the cgroup that it was made in, and the cgroup's programs last as long as its
sockets (kernel/bpf/cgroup.c, cgroup_bpf_get). Port chains end with the lease, so who listens where they alone close
stays in the job, and with it the lease.

In a container, what is the host's goes before the launcher hears that it may end: rules and reserved ports. Where the
first process ends with it, or is it, the kernel kills the guard before that has seen anything, and its record, in the
container's own /run, is gone. On a host the guard outlives its launcher, which need not wait for that.
"""

from __future__ import annotations

import time

from securerun.guard import reserved, run_directory
from securerun.guard.lease import Lease
from securerun.linux import proc, processes, sock_diag
from securerun.linux.cgroups import cgroup_of, relative
from securerun.linux.sock_diag import Listener
from securerun.text import some

_PORTS_NAMED = 4
# Of a listener's cgroup: before kernel 5.9 it is not told, and to the top of all (kernfs numbers from 1) falls what is
# made while net_cls or net_prio is in use, on some kernels (net_cgroups.py).
_UNTOLD = (None, 1)
# One may be missed in a look (sock_diag.py).
_LOOKS = 2
# The launcher waits for its answer; a guard that gets no turn does the same when the launcher has ended.
_TURN_SECONDS = 1.0
_AGAIN_SECONDS = 0.01


def part(lease: Lease) -> str:
    """Let the launcher out of the job; return why it stays, where it does.

    Raises SocketsUnavailable or CgroupUnavailable where that cannot be told, and it stays then too.
    """
    caller = lease.caller
    if caller.has_ended():
        return ""
    if not caller.is_unchanged():
        return "it became another user's"
    ports = sorted({listener.port for listener in _closed_by_the_lease_alone(lease)})
    if ports:
        return f"it still listens on port {some(ports, _PORTS_NAMED)}, which only that run closes to others"
    if lease.cgroup is not None:
        lease.cgroup.expel(caller)
        if relative(cgroup_of(caller.pid), lease.cgroup.path) is not None:
            return f"it cannot be moved out of the cgroup {lease.cgroup.path}"
    lease.forget_launcher()
    return ""


def give_back(lease: Lease) -> bool:
    """In a container, remove a job's rules and reserved ports where only its launcher is left, and needs none of them.

    Return whether that was done.

    Raises PortChainsUnavailable, PrivilegeError, SocketsUnavailable or OSError; what was not removed goes later.
    """
    if processes.all_are_seen() or not lease.is_launcher_alone() or _closed_by_the_lease_alone(lease):
        return False
    deadline = time.monotonic() + _TURN_SECONDS
    while not _gave_back(lease):
        if time.monotonic() > deadline:
            return False
        time.sleep(_AGAIN_SECONDS)
    return True


def _gave_back(lease: Lease) -> bool:
    """Do it if no other guard has the host's lock."""
    with run_directory.recording_unless_locked() as directory:
        if directory is None:
            return False
        lease.remove_chains()
        reserved.give_back(directory, lease.policy.run_id)
        lease.write_to(directory, layers=lease.guarding.layers, reserved=())
    return True


def _closed_by_the_lease_alone(lease: Lease) -> set[Listener]:
    """Return the launcher's listeners that would be open once the lease has ended."""
    found = {listener for _ in range(_LOOKS) for listener in sock_diag.listeners()}
    holders = proc.sockets_of([lease.caller.pid], {listener.inode for listener in found})
    held = set(sock_diag.held(found, holders))
    if not lease.is_shielded or lease.may_void:
        return held
    # Of another cgroup is what it made before the job, or in an earlier one, whose shield it has.
    return {one for one in held if one.cgroup_id in _UNTOLD and not one.address.is_loopback}
