"""How a job gets its lease, before it starts: each layer after the one that it stands on, and proven.

Acquiring goes from what needs no clean-up to what does: the record, the cgroup, the shield on it, its proof, the
launcher's move, the port chains. Whatever fails, everything before it is undone, in the opposite order. A guard
that takes over from a dead one goes the same way and keeps what it finds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import PurePosixPath

from securerun.errors import Obstacle, PolicyError, Powerless, PrivilegeError
from securerun.firewall import backends, selftest, shield
from securerun.firewall.chains import PortChains, PortChainsUnavailable, TooManyRules
from securerun.firewall.droplog import open_drop_log
from securerun.firewall.job_key import JobSecret
from securerun.firewall.policy import Layer, Policy, PortRange, Purpose
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.shield import Shield
from securerun.guard import neighbours, place, reaper, records, reserved, run_directory, sight, unasked
from securerun.guard.caller import Caller
from securerun.guard.cgroup import JobCgroup, open_job_cgroup
from securerun.guard.lease import NO_SHIELD_NO_TAG, Lease, first_record, remove_record
from securerun.guard.limits import SitePolicy, unasked_beyond
from securerun.guard.protocol import Order
from securerun.guard.records import Brief, Record
from securerun.linux import net_cgroups, port_ranges, proc, processes
from securerun.linux.cgroups import CgroupUnavailable, cgroup_of
from securerun.linux.port_ranges import ReservationUnavailable
from securerun.linux.processes import Process
from securerun.text import some

# Of looks for what the launcher started before; whoever forks faster than that is found later.
_ROUNDS = 8
_MOST_TAKEN_ALONG = 4096
_PIDS_NAMED = 8
_RUNS_NAMED = 4
_PORTS_NAMED = 8


def acquire(order: Order, caller: Caller, site: SitePolicy, notes: tuple[str, ...] = ()) -> Lease:
    """Install every layer that the order asks for around the caller, proven. notes: what people are to hear anyway.

    Raises PrivilegeError or PolicyError, with nothing left behind, when the job could not be guarded or may not be; and
    with what stands of a run left as it is, when that could not be taken over.
    """
    lease = Lease(order, caller, site)
    lease.notes = notes
    secret = _take_key(lease)
    lease.leave_out(unasked_beyond(site, order.policy, caller))
    undo = ExitStack()
    try:
        _begin(lease)
        undo.callback(_undo_record, order.policy.run_id)
        if not lease.stands:
            _require_public_reserved(order.policy)
        _add_shield(lease, undo)
        if lease.shield is None:
            lease.forget_key(NO_SHIELD_NO_TAG)
        if secret is not None:
            _hand_out(lease, secret)
        undo.callback(_remove_chains, lease)
        _add_chains(lease)
        if lease.shield is None and lease.chains is None:
            raise Powerless(
                f"the job cannot be guarded: {'; '.join(lease.lacking)}. It takes the host's own root, or "
                "CAP_NET_ADMIN, CAP_BPF or CAP_SYS_ADMIN, and a writable cgroup file system; --unprotected starts it "
                "open to everyone"
            )
        if lease.shield is None:
            sight.require_of_listeners(caller)
            lease.make_unweakened()
        lease.notes += tuple(sight.doubts(lease))
        lease.write(layers=lease.guarding.layers)
        if caller.has_ended() and not lease.stands:
            raise _ended(caller)
    except BaseException:
        # The job of a guard that died runs behind what stands: that stays, for the next that is to take over.
        if not lease.stands:
            undo.close()
        raise
    lease.stands = True
    return lease


def _take_key(lease: Lease) -> JobSecret | None:
    """Make the job's key, where the order has or asks for one; return what it is made of, which the order forgets.

    Raises PolicyError where there is none and nobody is to come in without.
    """
    if lease.order.key is None:
        return None
    from securerun.guard import keyed  # few jobs have one

    return keyed.take(lease, lease.order.key)


def _hand_out(lease: Lease, secret: JobSecret) -> None:
    from securerun.guard import keyed

    keyed.hand_out(lease, secret)


def _ended(caller: Caller) -> PrivilegeError:
    return PrivilegeError(f"the launcher, process {caller.pid}, ended before its job could be guarded")


def require_room(order: Order, caller: Caller, site: SitePolicy) -> None:
    """Look a first time, without the lock that `acquire` takes for the second. Raises PrivilegeError."""
    with contextlib.suppress(OSError):  # `acquire` says what is wrong with the records
        # Those without a guard may be dead, and `acquire` removes what is left of them before it counts the others.
        neighbours.require_room(first_record(order, caller), records.read_briefs_of_host(), site, guarded=True)


def _begin(lease: Lease) -> None:
    """Reap dead runs and record this one, under one lock. A record of our own run is a dead guard's: take it over."""
    with run_directory.recording() as directory:
        user, is_root, container = lease.caller.owner
        lease.notes += tuple(reaper.reap_all(directory, user, may_be_root=is_root, container=container))
        known = records.read_briefs(directory)
        own = next((brief.whole() for brief in known if brief.run_id == lease.policy.run_id), None)
        if own is not None:
            _take_over(lease, own)
        elif records.exists(directory, lease.policy.run_id):
            raise PrivilegeError(
                f"{records.DIRECTORY} has something in the place of the record of run {lease.policy.run_id}; remove it"
            )
        neighbours.require_room(lease.record, known, lease.site)
        lease.notes += tuple(islice(neighbours.closing_public(lease.record, known), _RUNS_NAMED))
        if lease.order.firewall != "off":
            if not lease.order.adopt:  # else what listens there may be the job itself
                lease.leave_out(unasked.in_the_way(lease.record, known))
            lease.leave_out(unasked.harmful(lease.record, known))
            _require_harmless(lease, known, _closed_already(own))
        lease.hold()
        _reserve_ports(lease, directory)


def _require_harmless(lease: Lease, known: Collection[Brief], standing: list[tuple[int, int]]) -> None:
    """Look at the other runs of this host; what only a key makes harmful goes without it, where it only adds.

    Raises PolicyError.
    """
    try:
        neighbours.require_harmless(lease.record, known, standing)
    except PolicyError as error:
        if lease.key is None or lease.key_required:
            raise
        lease.forget_key(str(error))
        neighbours.require_harmless(lease.record, known, standing)


def _reserve_ports(lease: Lease, directory: int) -> None:
    """Record the run and reserve its ports, the record first: a reaper goes by it. What cannot be reserved is noted."""
    policy = lease.order.policy
    # Ports for every host are not planned, and no port of gloo's or NCCL's is to become one by chance.
    public = (PortRange(first, last, Purpose.PUBLIC) for first, last in policy.ports_for_all())
    wanted = (*policy.ports, *public)
    try:
        choice = reserved.choose(directory, wanted, lease.policy.run_id)
        lease.write_to(directory, reserved=choice.reserved)
        reserved.reserve(directory, lease.policy.run_id, choice.reserved)
        lease.notes += tuple(_too_many(choice.left_out))
    except ReservationUnavailable as error:
        lease.write_to(directory, reserved=())
        lease.notes += (_unreserved(wanted, error),)


def _require_public_reserved(policy: Policy) -> None:
    """Raise PolicyError where a port that torch, gloo or NCCL gets at random could be a public one."""
    if not policy.public:
        return
    try:
        lacking = port_ranges.lacking((opening.first, opening.last) for opening in policy.public)
        first, last = port_ranges.handed_out()
    except ReservationUnavailable as error:
        raise PolicyError(f"nothing can be public here, since a random port of the job could be it: {error}") from error
    if lacking:
        listed = some([port_ranges.written_ranges((each,)) for each in lacking], _PORTS_NAMED)
        raise PolicyError(
            f"public port {listed} is not reserved, and is one that the kernel gives to anybody ({first}-{last}): a "
            "random port of gloo's or NCCL's could become public by chance; name ports outside of these, or have the "
            f"host's administrator add it to {port_ranges.NAME}"
        )


def _too_many(ports: tuple[PortRange, ...]) -> Iterator[str]:
    if ports:
        listed = ", ".join(map(str, ports))
        yield f"ports {listed} are not reserved: this host would have too few left for connections of its own"


def _unreserved(ports: tuple[PortRange, ...], error: ReservationUnavailable) -> str:
    listed = ",".join(map(str, ports))
    return (
        f"the planned ports are not reserved ({error}), so another program may be given one before the job has it; "
        f"have the host's administrator add {listed} to {port_ranges.NAME}"
    )


def _take_over(lease: Lease, found: Record) -> None:
    from securerun.guard import takeover  # few guards do

    takeover.take_over(lease, found)


def _closed_already(found: Record | None) -> list[tuple[int, int]]:
    """Return the ports that the chains of a dead guard close; none where it had no chains."""
    if found is None or not any(layer.backend in backends.NAMES for layer in found.layers):
        return []
    return found.policy.joined_ports()


def _add_shield(lease: Lease, undo: ExitStack) -> None:
    """Give the job its cgroup and the shield on it; in scope `auto` go on without them and say why.

    Raises PrivilegeError where the shield is insisted on, or is the only layer that can do what the policy asks.
    """
    try:
        _add_cgroup(lease, undo)
        if lease.order.scope != "ports":
            _hang_shield(lease, undo)
        _move_in(lease, undo)
    except (CgroupUnavailable, ShieldUnavailable) as error:
        if lease.order.scope == "process":
            raise Powerless(
                f"the job cannot be shielded: {error}; fix that, or use --scope auto; nothing was started"
            ) from error
        if lease.order.scope == "auto":
            lease.lacks(f"no shield ({error})")
        _forget_shield(lease, undo)
    if lease.shield is None and lease.policy.close_loopback:
        reason = "; ".join(lease.lacking) or "--scope ports leaves it out"
        raise Powerless(f"only the shield can close the loopback, and there is none: {reason}; use --loopback any")
    if lease.shield is not None and lease.shield.shortfall:
        lease.notes += (lease.shield.shortfall,)


def _add_cgroup(lease: Lease, undo: ExitStack) -> None:
    """Make the job's cgroup, or open what a dead guard made. Recorded first: a reaper finds no other way to it."""
    path = place.path_for(lease)
    if lease.caller.has_ended() and not lease.record.cgroup:  # then the path may be that of whoever has its number now
        raise _ended(lease.caller)
    lease.write(cgroup=path)
    lease.cgroup = place.make(lease, path)
    undo.callback(_remove_cgroup, lease)
    lease.cgroup.leave()


def _hang_shield(lease: Lease, undo: ExitStack) -> None:
    """Take over the shield of a dead guard, or hang and prove one of our own before anything is behind it."""
    cgroup = lease.cgroup
    if cgroup is None:
        return
    lease.may_void = net_cgroups.may_void_filters()
    lease.proven_in = _where(lease.caller)
    lease.closes_all = lease.may_void and bool(lease.proven_in)
    if lease.closes_all and not lease.stands:
        # The chains close each port then, also to who has a tag: it would be let on to a shield that may be none.
        lease.forget_key("net_cls or net_prio of cgroup version 1 is here and may switch the shield off on this kernel")
    if lease.record.is_bare and not lease.void:
        # Proven to be none when nothing was in the cgroup; now nothing can be proven, nor hung before the job is there.
        raise ShieldUnavailable("the guard before this one had none", Obstacle.NOTHING_THERE)
    if lease.order.adopt:
        with contextlib.suppress(ShieldUnavailable):
            lease.shield = shield.adopt(cgroup.descriptor)
            undo.callback(lease.shield.close)
            if lease.shield.tags is None:
                lease.forget_key("the guard before this one had none")
            _fit_shield(lease, cgroup)
            return
    if lease.key is not None:
        from securerun.guard import keyed

        keyed.try_tags(lease, cgroup)
    shield.refuse_conflicts(cgroup.ancestors, tags=lease.policy.close_loopback)
    if lease.policy.close_loopback and lease.key is None and not cgroup.populated():
        from securerun.firewall import tag_proof  # not every job goes by tags

        tag_proof.require_tags(cgroup.descriptor, lease.caller.pid)
    if lease.found is not None:
        _require_same_key(lease)
    lease.shield = Shield.attach(cgroup.descriptor, lease.policy, lease.key)
    undo.callback(lease.shield.close)
    # The self-test forbids all sending for its moment, so it comes before anything moves in.
    if not cgroup.populated() or cgroup.proving_ground != cgroup.descriptor:
        selftest.require_proof(cgroup.proving_ground, lease.caller.pid)


def _fit_shield(lease: Lease, cgroup: JobCgroup) -> None:
    from securerun.guard import takeover

    takeover.fit_shield(lease, cgroup.descriptor)


def _require_same_key(lease: Lease) -> None:
    from securerun.guard import takeover

    takeover.require_same_key(lease)


def _where(caller: Caller) -> net_cgroups.Memberships:
    """Return the launcher's cgroups of net_cls and net_prio, looked at before the proof: who moves then is noticed."""
    try:
        return net_cgroups.of(caller.pid)
    except OSError as error:
        raise _ended(caller) from error


def _move_in(lease: Lease, undo: ExitStack) -> None:
    cgroup, slurm = lease.cgroup, lease.order.slurm
    if cgroup is None or (slurm and slurm.is_whole):  # Slurm puts into it what it starts
        return
    home = cgroup_of(lease.caller.pid)
    if home == cgroup.path:
        return
    undo.callback(cgroup.expel, lease.caller)
    cgroup.enter(lease.caller)
    _take_along(lease, cgroup, home, undo)


def _take_along(lease: Lease, cgroup: JobCgroup, home: str, undo: ExitStack) -> None:
    """Move in what the launcher has started already, such as a forkserver: what that starts is the job's too.

    home: the launcher's cgroup until now. Who is elsewhere was put there by somebody, and stays, as does who is not the
    user's own; what these listen on is found later. But a run of this launcher's that it has parted from is no place to
    stay: what is forked there has the peers of that one. What forks meanwhile is found in the next round, and what is
    within has its children within.
    """
    seen: set[Process] = set()
    spare = {os.getpid(), *lease.caller.waiting()}
    homes: frozenset[str] = frozenset()
    for _ in range(_ROUNDS):
        new = processes.descendants(lease.caller.pid, spare) - seen
        if not new or len(seen) > _MOST_TAKEN_ALONG:
            break
        seen |= new
        homes = homes or frozenset({home, *_parted_from(lease, home)})
        for process in new:
            with contextlib.suppress(CgroupUnavailable, PrivilegeError):
                before = cgroup_of(process.pid)
                if before in homes:
                    whom = Relative(process, lease.caller.user)
                    undo.callback(_put_back, cgroup, whom, before)
                    cgroup.enter(whom)
    left = sorted(process.pid for process in seen - cgroup.members() if processes.lives(process))
    if left:
        named = " ".join(map(str, left[:_PIDS_NAMED])) + (" ..." if len(left) > _PIDS_NAMED else "")
        lease.notes += (
            f"processes that were started before stay outside of the job's cgroup ({named}): their ports are closed as "
            "they are found, within a second",
        )


def _parted_from(lease: Lease, home: str) -> Iterator[str]:
    """Yield the cgroups of the launcher's earlier runs: it can be in one of its own alone, and that would be its home.

    home: its cgroup, below which it had those as well.
    """
    caller = lease.caller
    with contextlib.suppress(OSError):
        for run in records.read_briefs_of_host():
            is_own = (run.launcher, run.launcher_start, run.user) == (caller.pid, caller.start, caller.user)
            is_earlier = is_own and run.run_id != lease.policy.run_id
            if is_earlier and run.cgroup and str(PurePosixPath(run.cgroup).parent) == home:
                yield run.cgroup


def _put_back(cgroup: JobCgroup, whom: Relative, before: str) -> None:
    """Move a process back to where it was; where that is an earlier run's cgroup and gone, to where that was made."""
    earlier = open_job_cgroup(before) if records.run_of(before) is not None else None
    if earlier is not None:
        with contextlib.suppress(CgroupUnavailable, PrivilegeError):
            earlier.enter(whom)
        earlier.close()
    cgroup.expel(whom)  # who is still there


class Relative:
    """A descendant of the launcher that is to be moved."""

    def __init__(self, process: Process, user: int) -> None:
        self.pid = process.pid
        self._process = process
        self._user = user

    def has_ended(self) -> bool:
        """Return whether it is gone, so that the number may be another's."""
        return not processes.lives(self._process)

    def is_unchanged(self) -> bool:
        """Return whether it lives, and is of the job's user alone."""
        try:
            users = set(proc.status(self.pid).users)
        except OSError:
            return False
        return users == {self._user} and not self.has_ended()


def _forget_shield(lease: Lease, undo: ExitStack) -> None:
    """Go on without a shield: the cgroup still tells what belongs to the job, if the launcher could move in."""
    if lease.shield is not None:
        lease.shield.detach()
        lease.shield.close()
        lease.shield = None
    lease.may_void = lease.closes_all = False
    try:
        _move_in(lease, undo)
    except CgroupUnavailable:
        _remove_cgroup(lease)


def _add_chains(lease: Lease) -> None:
    """Add the port chains; with `auto` a host that cannot have them keeps the shield alone, and hears why."""
    order = lease.order
    if order.firewall == "off" or not (order.policy.ports or lease.left_out or lease.shield is None or lease.may_void):
        return
    drops = open_drop_log(order.policy.run_id)
    try:
        with run_directory.host_lock() as directory:
            chains = _choose(order, lease.caller, directory)
            chains.begin(adopt=_layer(chains) in lease.record.layers, outlive=lease.shield is None or lease.may_void)
            lease.unrecorded = _left_over(directory, chains)
            lease.write_to(directory, layers=(*lease.guarding.layers, _layer(chains)))
            lease.chains = chains
            if lease.policy.ports:
                lease.logging.install(chains, lease.of_chains(lease.policy), drops.group if drops else None)
            else:  # none is to be closed yet, and what `begin` saw is old when one is
                chains.remove()
            lease.drops = drops
            lease.notes += tuple(_silent(chains, lease.policy))
    except PortChainsUnavailable as error:
        lease.chains = None
        if drops is not None:
            drops.close()
        if isinstance(error, TooManyRules) and (order.firewall != "auto" or lease.shield is None):
            raise PolicyError(f"no port chains are installed: {error}; nothing was started") from error
        if order.firewall != "auto":
            raise Powerless(
                f"no port chains can be installed: {error}; fix that, or use --firewall auto; nothing was started"
            ) from error
        alone = "; the shield closes every port by itself" if lease.shield else ""
        lease.lacks(f"no port chains ({error}){alone}")


def _left_over(directory: int, chains: PortChains) -> frozenset[str]:
    """Return the runs that have rules here, no record, and nobody who stands for them."""
    found = [run for run in chains.others if not records.exists(directory, run)]
    if not found:
        return frozenset()
    from securerun.guard import unrecorded  # few launches find any

    return frozenset(unrecorded.left_over(directory, found))


def _choose(order: Order, caller: Caller, directory: int) -> PortChains:
    """Open the backend that is ordered, or the best; but one backend a host: one's drop ignores another's pass."""
    in_use = records.layers_in(directory, proc.namespace("net")) & set(backends.NAMES)
    if order.firewall == "auto":
        if in_use:
            return backends.open_chains(sorted(in_use)[0], order.policy.run_id)
        return backends.open_best_chains(order.policy.run_id)
    if not caller.is_root and not in_use and order.firewall != backends.open_best_chains(order.policy.run_id).backend:
        raise PortChainsUnavailable("which backend a host uses first is for root to say")
    others = in_use - {order.firewall}
    if others:
        raise PortChainsUnavailable(
            f"other runs of this host use {', '.join(sorted(others))}, and the two would collide"
        )
    return backends.open_chains(order.firewall, order.policy.run_id)


def _layer(chains: PortChains) -> Layer:
    return Layer(chains.backend, chains.name)


def _silent(chains: PortChains, policy: Policy) -> Iterator[str]:
    if chains.resets.missing:
        modules = "nft_reject_inet" if chains.backend == "nftables" else "ipt_REJECT and ip6t_REJECT"
        yield (
            f"the port chains cannot answer with a reset here ({modules}), so a node that tries IPv"
            f"{policy.answered_version} first waits for a time-out; no peer is named by an address of it"
        )


def _remove_chains(lease: Lease) -> None:
    if lease.chains is None:
        return
    with run_directory.host_lock(), contextlib.suppress(PortChainsUnavailable):
        lease.chains.remove()


def _remove_cgroup(lease: Lease) -> None:
    """Undo without hiding the error that made us undo."""
    if lease.cgroup is None:
        return
    with contextlib.suppress(CgroupUnavailable):
        lease.cgroup.remove()
    lease.cgroup.close()
    lease.cgroup = None


def _undo_record(run_id: str) -> None:
    """Undo without hiding the error that made us undo; where that fails, the record stays, for a reaper."""
    with run_directory.host_lock() as directory, contextlib.suppress(ReservationUnavailable):
        remove_record(directory, run_id)
