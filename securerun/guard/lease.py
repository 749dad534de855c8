"""The lease: what one job holds on this host. `securerun.guard.acquire` makes it before the job starts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from securerun.errors import PolicyError
from securerun.firewall.chains import Logging, PortChains, PortChainsUnavailable
from securerun.firewall.droplog import DropLog
from securerun.firewall.job_key import JobKey
from securerun.firewall.policy import (
    SHIELD,
    Admission,
    Denials,
    Layer,
    Policy,
    PortRange,
    Purpose,
    covers,
    joined,
    merged,
)
from securerun.firewall.shield import Shield
from securerun.guard import neighbours, records, reserved, run_directory, unasked
from securerun.guard.caller import Caller
from securerun.guard.cgroup import JobCgroup
from securerun.guard.containers import is_within
from securerun.guard.limits import SitePolicy, require_permitted_peers
from securerun.guard.presence import Presence
from securerun.guard.protocol import Guarding, Order, mark_of
from securerun.guard.records import MOST_RANGES_LEFT_OPEN, Record
from securerun.guard.share import Turn
from securerun.linux import proc, processes
from securerun.linux.cgroups import CgroupUnavailable, cgroup_of
from securerun.linux.networks import Network
from securerun.linux.processes import JobProcesses, Process

if TYPE_CHECKING:
    from securerun.linux.addresses import Own

NO_SHIELD_NO_TAG = "only the shield can ask for a tag, and there is none"
# The watch goes on in between.
_KILL_SECONDS = 0.2
# Whoever is there at two looks is read, so that a process is found within a second; some 30 us for each that is new.
_LOOK_ELSEWHERE_SECONDS = 0.5


class Lease:
    """The layers of one job and its record. Made by `acquire`, undone by `release`.

    cgroup: None where the job can have none. shield: None in scope `ports`. chains, drops: None without port chains.
    notes: what a person should know about layers that are missing, or promise less; lacking: of these, why a layer is
    missing. left_out: ports of the order that
    nobody asked for and that are not in its plan any more, with the reasons. has_parted: the launcher lives on, and is
    none of the job's any more. stands: the job runs behind what stands of the run, which its record names; until then a
    record that cannot be written is an error. found: the record of the guard that died, where this one took over.

    unrecorded: the runs whose rules of the same backend were found left over when this one began: of killed containers.

    key: whose tag lets in whoever shows it; None for a job that goes by addresses alone. key_required: whether nobody
    comes in without that tag; where there are peers nobody who is none of them either. key_towards: where tags are
    written as well as towards nodes. own: what is this host's own, as of when the key was made or peers last changed;
    None without a key. secret_path: the file with the secret of its frameworks, "" where there is none.
    unguarded: the first few addresses that answered at ports of the job's and have no key of it.

    may_void: net_cls and net_prio of cgroup version 1 may switch the shield off on this kernel; closes_all: they are
    there, so the port chains close what the shield does as well; proven_in: the launcher's cgroups of the two when the
    shield was proven; void: why it holds no more, "" while it does. turn: when the job's ports may next be changed.
    """

    def __init__(self, order: Order, caller: Caller, site: SitePolicy) -> None:
        """Raise PolicyError for an order that says itself what the guard makes of its key."""
        if order.policy.has_tags or order.policy.admission is not Admission.ADDRESS:
            raise PolicyError("an order has a key or none; who shows tags, and where, is not for it to say")
        self.order = order
        self.site = site
        self.policy: Policy = order.policy
        self.caller = caller
        self.cgroup: JobCgroup | None = None
        self.shield: Shield | None = None
        self.chains: PortChains | None = None
        self.drops: DropLog | None = None
        self.logging = Logging()
        self.notes: tuple[str, ...] = ()
        self.lacking: tuple[str, ...] = ()
        self.unrecorded: frozenset[str] = frozenset()
        self.left_out: dict[int, str] = {}
        self.key: JobKey | None = None
        self.key_required = False
        self.key_towards: tuple[Network, ...] = ()
        self.own: Own | None = None
        self.secret_path = ""
        self.unguarded: tuple[str, ...] = ()
        self.may_void = False
        self.closes_all = False
        self.proven_in: Mapping[str, str] = {}
        self.void = ""
        self.turn = Turn()
        self.record = first_record(order, caller)
        self.has_parted = False
        self.stands = False
        self.found: Record | None = None
        self._is_recorded = False
        self.presence: Presence | None = None
        self._held: int | None = None
        self._killed: frozenset[Process] = frozenset()
        self._strays: frozenset[Process] = frozenset()
        self._look_due = 0.0
        launcher = Process(caller.pid, caller.start)
        # Sudo descends from the launcher and lives as long as this guard: it is no part of the job.
        waiting = {process.pid for process in caller.attendants}
        self._job = JobProcesses(mark_of(order.policy.run_id), caller.user, [launcher], spare=waiting)

    @property
    def is_shielded(self) -> bool:
        """Whether there is a shield, and nothing is known to have switched it off."""
        return self.shield is not None and not self.void

    @property
    def guarding(self) -> Guarding:
        """The layers that stand."""
        layers = []
        if self.shield is not None and self.cgroup is not None and not self.void:
            layers.append(Layer(SHIELD, f"{self.shield.name} filter on {self.cgroup.path}"))
        if self.chains is not None:
            layers.append(Layer(self.chains.backend, self.chains.name))
        left_out = tuple(joined((port, port) for port in self.left_out))
        notes = (*self.notes, *unasked.told(self.left_out))
        fingerprint = self.key.fingerprint if self.key is not None else ""
        return Guarding(
            tuple(layers),
            notes,
            left_out,
            needs_guard=self.may_void,
            fingerprint=fingerprint,
            key_source=self.record.key_source,
            secret_path=self.secret_path,
        )

    def lacks(self, why: str) -> None:
        """Take note of a layer that is missing."""
        self.notes += (why,)
        self.lacking += (why,)

    def forget_key(self, why: str) -> None:
        """Go on without a key, since no tag can be had. Raises PolicyError where nobody is to come in without."""
        if self.key is None:
            return
        if self.key_required:
            raise PolicyError(
                f"the nodes of this job are to be known by a key, and nobody can be asked for its tag here: {why}; "
                "name them with --peers and write --key off; nothing was started"
            )
        from securerun.firewall import tagging

        self.key = None
        self.policy = tagging.by_address(self.policy, self.order.policy.peers)
        self.record = dataclasses.replace(self.record, policy=self.policy, key="", key_source="", nodes_guarded=0)
        self.notes += (f"no key ({why}): who may connect is told by addresses alone",)

    def denied(self) -> Denials:
        """Return who was turned away so far, by any layer."""
        counts = [] if self.shield is None else [self.shield.denied()]
        if self.drops is None:
            return merged(counts)
        self.drops.read()
        return merged([*counts, self.drops.denied()], self.drops.more)

    def found_ports(self) -> Iterator[int]:
        """Yield the ports that the port chains close beside the plan."""
        for port in self.policy.ports:
            if port.purpose == Purpose.OPENED_MEANWHILE:
                yield from range(port.first, port.last + 1)

    def leave_out(self, ports: Mapping[int, str]) -> dict[int, str]:
        """Take those of these ports out of the plan that nobody asked for; return them, with why. Installs nothing."""
        planned = self.order.policy.unasked_ports()
        gone = {port: why for port, why in ports.items() if covers(planned, port)}
        self.order = dataclasses.replace(self.order, policy=self.order.policy.without(gone))
        self.policy = self.policy.without(gone)
        self.record = dataclasses.replace(self.record, policy=self.policy)
        self.left_out.update(gone)
        return gone

    def give_way(self, listeners: Mapping[int, int]) -> dict[int, str]:
        """Open ports that nobody asked for to other users, who listen there by now; return them, and why.

        listeners: each such port, with its user. Raises PortChainsUnavailable, with all of them closed still, or
        PrivilegeError.
        """
        with run_directory.recording() as directory:
            found = unasked.of_listeners(self.record, records.read_briefs(directory), listeners)
            if found:
                self._install(self.policy.without(found))
                found = self.leave_out(found)
                self.write_to(directory, policy=self.policy)
        return found

    def make_unweakened(self) -> None:
        """Leave out what weakens a run without a shield. Raises PolicyError where that does not help."""
        with run_directory.recording() as directory:
            known = records.read_briefs(directory)
            if self.leave_out(unasked.weakening(self.record, known)):
                self._install(self.policy)
                self.write_to(directory, policy=self.policy)
            neighbours.require_unweakened(self.record, known)

    def close_found(self, ports: Collection[int]) -> dict[int, str]:
        """Have the port chains close these ports beside the planned ones, and no others.

        Return those of them that may not be closed, since that would harm another user's job, and why.
        Raises PortChainsUnavailable, with what was closed before closed still, or PrivilegeError.
        """
        with run_directory.recording() as directory, self.turn.counted():
            known = records.read_briefs(directory)
            self.turn.runs = neighbours.runs_of_owner(self.record, known)
            refused = neighbours.harmful_ports(self.record, ports, known)
            ranges = joined((port, port) for port in ports if port not in refused)
            found = (PortRange(first, last, Purpose.OPENED_MEANWHILE) for first, last in ranges)
            policy = dataclasses.replace(self.policy, ports=(*self.order.policy.ports, *found))
            # Recorded first, where there is room: a guard that takes over closes what is recorded, and what is not
            # would be open for a moment.
            self.write_to(directory, policy=policy)
            self._install(policy)
            self.policy = policy
        return refused

    def lose_shield(self, why: str) -> str:
        """Take note that the shield holds no more, so that nobody is asked for a tag; return what becomes of the key.

        The port chains hear of it by `restore_chains`, for they let on what has the option.
        """
        self.void = why
        if self.key is None:
            return ""
        self.policy, self.key = self.of_chains(self.policy), None
        self.record = dataclasses.replace(self.record, policy=self.policy, key="", key_source="")
        who = "nobody else may connect" if self.key_required else "who may connect is told by addresses alone"
        return (
            f"nobody is asked for a tag of the job's key any more: {who}; and what this node opens may carry no tag, "
            "so nodes that know it by its key alone turn it away"
        )

    def note_void(self) -> None:
        """Record that the shield holds no more, and do what a run without one does. It stays where it is.

        Sockets from before may be behind it still. Raises PrivilegeError, or PolicyError where another user's run lets
        its own peers to ports of this one.
        """
        self.write(layers=self.guarding.layers, void=self.void)
        self.make_unweakened()

    def note_open_ports(self, ports: Iterable[int]) -> None:
        """Record which ports are open to every host, as far as there is room. Raises PrivilegeError."""
        left_open = tuple(joined((port, port) for port in ports)[:MOST_RANGES_LEFT_OPEN])
        with run_directory.recording() as directory, self.turn.counted():
            self.turn.runs = neighbours.runs_of_owner(self.record, records.read_briefs(directory))
            self.write_to(directory, left_open=left_open)

    def change_peers(self, networks: tuple[Network, ...]) -> None:
        """Let these networks in from now on and no others; established connections stay.

        Raises PolicyError for networks that this caller may not name, ShieldUnavailable or PortChainsUnavailable when
        a layer cannot take them, and PrivilegeError when the host's lock is not to be had.
        """
        require_permitted_peers(self.site, dataclasses.replace(self.order.policy, peers=networks), self.caller)
        if self.key is not None:
            from securerun.linux import addresses

            self.own = addresses.own()
        policy = self._with_peers(networks)
        with run_directory.recording() as directory:
            known = records.read_briefs(directory)
            self.leave_out(unasked.harmful(dataclasses.replace(self.record, policy=policy), known))
            policy = self._with_peers(networks)
            neighbours.require_harmless_peers(dataclasses.replace(self.record, policy=policy), known)
        if self.shield is not None:
            self.shield.replace_peers(policy.peers)
            if self.shield.tags is not None and self.key is not None:
                self.shield.tags.replace_networks(policy.tagged)
        self.policy = policy
        self.write(policy=policy)
        self.restore_chains()

    def _with_peers(self, networks: tuple[Network, ...]) -> Policy:
        """Return the policy with other peers.

        Raises PolicyError where none are left and each is to show an address too, and where a tag is the only way in.
        """
        if self.key is None and self.key_required and networks:
            raise PolicyError("nobody may connect to this run without a tag, and there is no shield that asks for one")
        if self.key is None:
            return dataclasses.replace(self.policy, peers=networks)
        from securerun.firewall import tagging

        own = self.own.networks if self.own is not None else ()
        return tagging.with_peers(self.policy, networks, own, self.key_towards)

    def follow_interfaces(self) -> None:
        """Have the shield go by the interfaces that have the policy's names now. Raises ShieldUnavailable."""
        if self.shield is not None:
            self.shield.follow_interfaces(self.policy.interfaces)

    def hold(self) -> None:
        """Show that the run has its guard, to whoever does not see this process."""
        self._held = run_directory.hold(self.policy.run_id)
        self.presence = Presence(self.policy.run_id)

    def restore_chains(self) -> None:
        """Put the port chains in place again. Raises PortChainsUnavailable or PrivilegeError."""
        if self.chains is None:
            return
        with run_directory.host_lock():
            self._install(self.policy)

    def chains_stand(self) -> bool:
        """Return whether what was installed of port chains is still there. Raises PortChainsUnavailable."""
        return self.chains is None or not self.policy.ports or self.chains.stand()

    def keep_ports_reserved(self) -> None:
        """Reserve the job's ports again if somebody took them off the list. Raises PrivilegeError."""
        if reserved.are_reserved(self.record.reserved):
            return
        with run_directory.recording() as directory:
            reserved.reserve(directory, self.policy.run_id, self.record.reserved)

    def write(self, **changes: object) -> None:
        """Change the run's record as `write_to` does, under the host's lock. Raises PrivilegeError."""
        with run_directory.recording() as directory:
            self.write_to(directory, **changes)

    def write_to(self, directory: int, **changes: object) -> None:
        """Change the run's record.

        Where there is no room for it, what a run that stands needs is done all the same: the record that is there names
        its id, cgroup and layers, which is what a reaper goes by. `keep_recorded` tries again. Raises OSError for a run
        that does not stand yet.
        """
        self.record = dataclasses.replace(self.record, **changes)  # type: ignore[arg-type]
        self._is_recorded = False
        try:
            run_directory.write(directory, self.record)
            self._is_recorded = True
        except OSError:
            if not self.stands:
                raise

    def keep_recorded(self) -> None:
        """Write the record if it could not be written before. Raises PrivilegeError when it still cannot."""
        if self._is_recorded:
            return
        with run_directory.recording() as directory:
            run_directory.write(directory, self.record)
        self._is_recorded = True

    def write_unless_locked(self, **changes: object) -> bool:
        """Change the run's record, unless another holds the host's lock now; return whether it was changed.

        Raises PrivilegeError as `write` does.
        """
        with run_directory.recording_unless_locked() as directory:
            if directory is None:
                return False
            self.write_to(directory, **changes)
        return True

    def _install(self, policy: Policy) -> None:
        """Install the port chains for a policy, under the host's lock, or again for the policy of before."""
        if self.chains is None:
            return
        if not policy.ports:
            self.chains.remove()
            return
        group = self.drops.group if self.drops else None
        try:
            self.logging.install(self.chains, self.of_chains(policy), group)
        except PortChainsUnavailable:
            if policy is not self.policy:
                with contextlib.suppress(PortChainsUnavailable):
                    self.logging.install(self.chains, self.of_chains(self.policy), group)
            raise

    def of_chains(self, policy: Policy) -> Policy:
        """Return the policy as port chains are to have it: without a shield nobody judges a tag that they let on.

        Then who comes in by address does so still; where a tag was insisted on, nobody.
        """
        if self.is_shielded or not policy.has_tags:
            return policy
        from securerun.firewall import tagging

        return tagging.by_address(policy, () if self.key_required else policy.peers)

    def is_over(self) -> bool:
        """Return whether the launcher and all that came from it are gone."""
        if self.cgroup is not None:
            if self.cgroup.populated() or self._elsewhere():
                return False
            self._look_elsewhere(patient=False)
            return not self._elsewhere() and not self.cgroup.populated()
        # A look is no snapshot: a child may get a pid that the look has passed already, so look twice.
        return (self.has_parted or self.caller.has_ended()) and not self._find() and not self._find()

    def forget_launcher(self) -> None:
        """Have the launcher be none of the job's processes any more, nor what it starts from now on."""
        self.has_parted = True
        launcher = Process(self.caller.pid, self.caller.start)
        self._job.forget(launcher)
        self._strays -= {launcher}

    def is_launcher_alone(self) -> bool:
        """Return whether nothing of the job is left but its launcher, in its cgroup or out of the job by now."""
        launcher = Process(self.caller.pid, self.caller.start)
        if self.cgroup is None:
            return self._find() <= {launcher} and self._find() <= {launcher}
        self._look_elsewhere(patient=False)
        return self.processes() <= {launcher} and (self.has_parted or launcher in self.cgroup.members())

    def remove_chains(self) -> None:
        """Remove the port chains for good. Raises PortChainsUnavailable."""
        if self.chains is not None:
            self.chains.remove()
            self.chains = None

    def processes(self) -> frozenset[Process]:
        """Return what runs of the job: in its cgroup, and what is elsewhere by run id and descent.

        A process is moved out of its cgroup by systemd (`systemd-run --scope`, PAM), by podman, or by itself.
        """
        if self.cgroup is None:
            return self._find()
        return self.cgroup.members() | self._elsewhere()

    def _find(self, inside: Collection[Process] = (), *, patient: bool = False) -> frozenset[Process]:
        """Look for the job's processes everywhere. What waits for this guard is none, whoever started it."""
        return self._job.find(inside, self.caller.waiting(), patient=patient)

    @property
    def strays(self) -> frozenset[Process]:
        """The job's processes that were elsewhere than in its cgroup when that was last looked at."""
        return self._strays

    def _elsewhere(self) -> frozenset[Process]:
        """Return the job's processes that are not in its cgroup, as they were seen half a second ago at most."""
        if time.monotonic() >= self._look_due:
            self._look_elsewhere(patient=True)
        return frozenset(filter(processes.lives, self._strays))

    def _look_elsewhere(self, *, patient: bool) -> None:
        inside = frozenset() if self.cgroup is None else self.cgroup.members()
        found = self._find(inside, patient=patient)
        self._strays = frozenset(process for process in found - inside if not self._is_of_another_run(process.pid))
        self._look_due = time.monotonic() + _LOOK_ELSEWHERE_SECONDS

    def _is_of_another_run(self, pid: int) -> bool:
        """Return whether a process is in the cgroup of another run, whose guard looks after it.

        Or in another container, where somebody else may have the same user id, and show the mark.
        """
        if self.caller.container and not is_within(pid, self.caller.container):
            return True
        try:
            return records.run_of(cgroup_of(pid)) not in (None, self.policy.run_id)
        except CgroupUnavailable:
            return False

    def to_be_ended(self) -> frozenset[Process]:
        """Return what runs of the job and may be ended for its user: root's, started by sudo, may not (kill(2)).

        Nor is who merely carries the run's id, out of its cgroup: it is copied with the environment (sbatch, ssh).
        """
        found = self.processes()
        if self.cgroup is not None:
            found = (found - self._strays) | (found & self._job.kin)
        if self.caller.is_root:
            return found
        return frozenset(process for process in found if processes.may_end(self.caller.user, process.pid))

    def kill(self) -> None:
        """SIGKILL everything that is left of the job and may be ended for its user, as far as that is done in a moment.

        Not by `cgroup.kill` where somebody else's may be among it: that asks nobody's leave.
        """
        if self.cgroup is not None and self.caller.is_root:
            self.cgroup.kill()
        left = processes.kill_all(self.to_be_ended, _KILL_SECONDS)
        # What is left was born meanwhile, faster than one can look, or is stuck in the kernel, as it was the last time.
        if self.cgroup is not None and left - self._killed:
            with self.cgroup.frozen():
                left = self.to_be_ended()
                processes.end(left)
        self._killed = left

    def release(self) -> None:
        """Remove every layer. The job's last process must have gone.

        Raises PrivilegeError, CgroupUnavailable or PortChainsUnavailable for what could not be removed; then the record
        stays, and the next run or `securerunctl clean` tries again; so do chains of a cgroup that somebody is in.
        """
        if self.shield is not None:
            self.shield.close()
        cgroup_stays = None if self.cgroup is None else self.cgroup.end()
        with run_directory.host_lock() as directory:
            self.remove_chains()
            if cgroup_stays is None:
                remove_record(directory, self.policy.run_id)
        if self.drops is not None:
            self.drops.close()
        if self._held is not None:
            os.close(self._held)
        if cgroup_stays is not None:
            raise cgroup_stays


def remove_record(directory: int, run_id: str) -> None:
    """Give back the ports that the run reserved, and remove the record that names them.

    Raises ReservationUnavailable, with the record where it was.
    """
    reserved.give_back(directory, run_id)
    run_directory.remove(directory, run_id)


def first_record(order: Order, caller: Caller) -> Record:
    """Return what is recorded of a run before any of its layers stands."""
    guard = os.getpid()
    return Record(
        policy=order.policy,
        layers=(),
        launcher=caller.pid,
        launcher_start=caller.start,
        guard=guard,
        guard_start=proc.start_time(guard),
        boot_id=proc.boot_id(),
        network=proc.namespace("net"),
        processes=proc.namespace("pid"),
        times=proc.time_namespace(),
        user=caller.user,
        root=caller.is_root,
        slurm_job=0 if order.slurm is None else order.slurm.number,
        container=caller.container,
        started=time.time(),
        command=order.command,
    )
