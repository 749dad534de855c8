"""The lease: what one job holds on this host, acquired before the job starts and released after it ended.

Acquiring goes from what needs no clean-up to what does: the record, the cgroup, the shield on it, its proof, the
launcher's move, the port chains. Whatever fails, everything before it is undone, in the opposite order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from contextlib import ExitStack

from securerun.errors import PrivilegeError
from securerun.firewall import shield
from securerun.firewall.chains import PortChains, PortChainsUnavailable
from securerun.firewall.droplog import DropLog
from securerun.firewall.iptables import IptablesChains
from securerun.firewall.policy import Denial, Policy, merged
from securerun.firewall.shield import Shield, ShieldUnavailable
from securerun.guard import records
from securerun.guard.caller import Caller
from securerun.guard.cgroup import CgroupUnavailable, JobCgroup, make_job_cgroup
from securerun.guard.protocol import Guarding, Layer, Order
from securerun.guard.records import Record

_LOG_GROUPS_TRIED = 8
_LAST_LOG_GROUP = 65535


class Lease:
    """The layers of one job. Made by `acquire`, undone by `release`."""

    def __init__(self, policy: Policy, cgroup: JobCgroup, held: Shield) -> None:
        self.policy = policy
        self.cgroup = cgroup
        self.shield = held
        self.chains: PortChains | None = None
        self.drops: DropLog | None = None
        self.notes: tuple[str, ...] = ()

    @property
    def guarding(self) -> Guarding:
        """The layers that stand."""
        layers = [Layer("shield", f"{self.shield.name} filter on {self.cgroup.path}")]
        if self.chains is not None:
            layers.append(Layer(self.chains.backend, self.chains.name))
        return Guarding(tuple(layers), self.notes)

    def denied(self) -> tuple[Denial, ...]:
        """Who was turned away so far, by any layer."""
        if self.drops is None:
            return merged(self.shield.denied())
        self.drops.read()
        return merged(self.shield.denied(), self.drops.denied())

    def release(self) -> None:
        """Remove every layer. The job's last process must have gone.

        Raises PrivilegeError, CgroupUnavailable or PortChainsUnavailable for what could not be removed; then the record
        stays, and says what to look for.
        """
        self.shield.close()
        self.cgroup.remove()
        self.cgroup.close()
        _remove_chains(self)
        _remove_record(self.policy.run_id)
        if self.drops is not None:
            self.drops.close()


def acquire(order: Order, caller: Caller) -> Lease:
    """Install every layer that the order asks for around the caller, proven.

    Raises PrivilegeError, with nothing left behind, when the job could not be guarded.
    """
    record = _record(order, caller)
    with ExitStack() as undo:
        undo.callback(_remove_record, order.policy.run_id)
        _write(record)
        try:
            lease = _shielded(order.policy, caller, undo)
        except (CgroupUnavailable, ShieldUnavailable) as error:
            raise PrivilegeError(
                f"the job cannot be shielded: {error}. Run as root, or with CAP_BPF, CAP_NET_ADMIN and a writable "
                "cgroup file system; --unprotected starts it open to everyone"
            ) from error
        undo.callback(_remove_chains, lease)
        if order.firewall != "off" and order.policy.ports:
            _add_chains(lease, order)
        _write(dataclasses.replace(record, layers=lease.guarding.layers))
        undo.pop_all()
    return lease


def _shielded(policy: Policy, caller: Caller, undo: ExitStack) -> Lease:
    cgroup = make_job_cgroup(caller.pid, policy.run_id)
    undo.callback(cgroup.close)
    undo.callback(_remove_quietly, cgroup)
    shield.refuse_conflicts(cgroup.ancestors)
    held = Shield.attach(cgroup.descriptor, policy)
    undo.callback(held.close)
    if not shield.prove(cgroup.descriptor):
        raise ShieldUnavailable(
            "filters on a cgroup do not run on this host (before kernel 5.15 an active net_cls or net_prio cgroup, "
            "one container start with cgroup v1, switches them off until the next boot)"
        )
    undo.callback(cgroup.expel, caller.pid)
    cgroup.enter(caller.pid)
    return Lease(policy, cgroup, held)


def _add_chains(lease: Lease, order: Order) -> None:
    """Add the port chains. With `auto` a host without usable iptables keeps the shield alone, and hears why."""
    drops = _open_drop_log(order.policy.run_id)
    try:
        chains = IptablesChains(order.policy.run_id)
        with records.host_lock():
            _install(chains, order.policy, drops)
    except PortChainsUnavailable as error:
        if drops is not None:
            drops.close()
        if order.firewall != "auto":
            raise PrivilegeError(
                f"no port chains can be installed: {error}; mend that, or use --firewall auto; nothing was started"
            ) from error
        lease.notes = (f"no port chains ({error}); the shield closes every port by itself",)
        return
    lease.chains, lease.drops = chains, drops


def _install(chains: PortChains, policy: Policy, drops: DropLog | None) -> None:
    """Install with the log group, or without it on kernels that have no NFLOG target."""
    if drops is not None:
        with contextlib.suppress(PortChainsUnavailable):
            chains.install(policy, drops.group)
            return
    chains.install(policy, None)


def _open_drop_log(run_id: str) -> DropLog | None:
    """A log group of our own: the first free one of a few, since other programs hold groups too."""
    for attempt in range(_LOG_GROUPS_TRIED):
        with contextlib.suppress(OSError):
            return DropLog((int(run_id, 16) + attempt) % _LAST_LOG_GROUP + 1)
    return None


def _remove_chains(lease: Lease) -> None:
    if lease.chains is None:
        return
    with records.host_lock():
        lease.chains.remove()


def _write(record: Record) -> None:
    try:
        with records.host_lock() as directory:
            records.write(directory, record)
    except OSError as error:
        raise PrivilegeError(
            f"the run cannot be recorded in {records.DIRECTORY}: {error.strerror}; make room there, then try again"
        ) from error


def _remove_record(run_id: str) -> None:
    with records.host_lock() as directory:
        records.remove(directory, run_id)


def _remove_quietly(cgroup: JobCgroup) -> None:
    """Undo without hiding the error that made us undo."""
    with contextlib.suppress(CgroupUnavailable):
        cgroup.remove()


def _record(order: Order, caller: Caller) -> Record:
    guard = os.getpid()
    return Record(
        policy=order.policy,
        layers=(),
        launcher=caller.pid,
        launcher_start=caller.start,
        guard=guard,
        guard_start=records.start_time(guard),
        boot_id=records.boot_id(),
        user=caller.user,
        started=time.time(),
        command=order.command,
    )
