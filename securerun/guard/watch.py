"""What the guard does from the moment that a job is guarded until its last process has gone.

One loop, woken by what happens (an order, the launcher's end, the cgroup getting empty, a logged drop) and by the
chores that have to look from time to time.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Protocol

from securerun.errors import PrivilegeError
from securerun.guard import reserved, run_directory
from securerun.guard.documents import ProtocolError
from securerun.guard.ending import Ending
from securerun.guard.exposure import open_exposure
from securerun.guard.lease import Lease
from securerun.guard.notices import EXPECTED, Log, Notices, Send, Speech
from securerun.guard.parting import give_back, part
from securerun.guard.protocol import Message, Peers, Refused, Release, Released
from securerun.guard.share import MOST_OF_LOCK, Share
from securerun.guard.unanswered import open_unanswered
from securerun.guard.unasked import told
from securerun.linux.links import Links
from securerun.linux.nf_tables import Deletions

if TYPE_CHECKING:
    from securerun.guard.answers import Answers
    from securerun.guard.nodes import Nodes
    from securerun.guard.proof import Proof

_NOTICE_SECONDS = 1.0
# A list of peers takes the host's lock and up to 100,000 changes: of those that come meanwhile the newest counts.
_PEERS_SECONDS = 1.0
# Messages of megabytes without end, or one by its bytes, are heard by root's processor.
_HEARD_AT_ONCE_SECONDS, _MOST_CPU = 1.0, 0.2
# What a launcher may have said before it ended, and be heard of.
_LAST_MESSAGES = 16
_MOST_COMPLAINTS = 64
# For a launcher that was told to end its job: torchrun first ends its workers.
_GIVING_UP_SECONDS = 10.0
# Rules that are deleted from nf_tables are heard of at once; from legacy tables they are not.
_LOOK_FOR_CHAINS_SECONDS = 5.0
_HEARD_CHAINS_SECONDS = 60.0
# Heard of at once, but where more happens than is kept for us.
_LOOK_FOR_INTERFACES_SECONDS = 1.0
# Whoever sets the list of reserved ports anew takes the job's off it.
_LOOK_FOR_PORTS_SECONDS = 5.0
# On a full disk a run's record is as old as the last one for which there was room.
_RECORD_SECONDS = 1.0
# A flush is many deletions, and another firewall's reload fills what it flushed.
_SETTLE_SECONDS = 0.05
_ENDING_SECONDS = 0.05
# Behind a shield an uncovered listener is an exception, and who is to be answered there tries again after a second; in
# scope `ports` each is open until it is seen.
_EXPOSURE_SECONDS = 1.0
_SOON_SECONDS = 0.05
# Where a shield may be switched off, a port is open from then until it is noticed and closed.
_PROOF_SECONDS = 0.05
# Launchers inside of the run that ask whether its guard lives are few.
_PRESENCE_SECONDS = 1.0
# A connection that goes nowhere is told of within seconds.
_UNANSWERED_SECONDS = 2.0
# A guard that was killed alone is replaced within that, and stands for its run again.
_SECOND_LOOK_SECONDS = 2.0
# How many nodes were seen is for people.
_NODES_SECONDS = 1.0
# What else there is to do, and whether a job of Slurm's has ended, which no descriptor tells.
_MORE_SECONDS = 1.0
# Without a pidfd (before kernel 5.3) or a cgroup, ends are seen by looking.
_LOOK_SECONDS = 0.05


class Orders(Protocol):
    """The launcher's messages."""

    descriptor: int
    """To be polled; whether there is something to read, `read` says."""
    ended: bool
    """Whether the launcher has closed its end."""

    def read(self) -> Message | None:
        """Read the next message; None when none is complete now. Raises ProtocolError for what is no message."""


@dataclass
class Chore:
    """Something to look after every `seconds`; `due` is when next, on the monotonic clock."""

    seconds: float
    do: Callable[[], None]
    due: float = 0.0


class Watch:
    """Looks after one lease: hears the launcher, does the chores, ends what a failed job leaves behind."""

    def __init__(
        self, lease: Lease, orders: Orders, send: Send, log: Log, more: Iterable[Callable[[], None]] = ()
    ) -> None:
        """Begin to listen. more: what is to be done every second besides."""
        self._lease = lease
        self._orders = orders
        self._send = send
        self._speech = Speech(lease.policy.run_id, send, log)
        self._notices = Notices(lease, send)
        self._ending: Ending | None = None
        self._released = False
        self._given_up = False
        self._has_more_to_hear = False
        self._newest_peers: Peers | None = None
        self._peers_may_change = 0.0
        self._complaints: set[str] = set()
        self._poller = select.poll()
        self._listen_to()
        seconds = _LOOK_FOR_CHAINS_SECONDS if self._deletions is None else _HEARD_CHAINS_SECONDS
        self._repair = Chore(seconds, self._repair_chains, time.monotonic() + seconds)
        reserving = Chore(_LOOK_FOR_PORTS_SECONDS, lease.keep_ports_reserved)
        # Only when there is something to change.
        self._peers = Chore(math.inf, self._change_peers, math.inf)
        # Only while what the launcher said has cost too much.
        self._hearing = Chore(math.inf, self._hear_again, math.inf)
        self._share = Share(_HEARD_AT_ONCE_SECONDS, _MOST_CPU)
        recording = Chore(_RECORD_SECONDS, lease.keep_recorded)
        self._chores = [self._peers, self._hearing, self._repair, reserving, recording]
        self._chores.append(Chore(_NOTICE_SECONDS, self._notices.look))
        self._proof = _open_proof(lease)
        self._proving = Chore(_PROOF_SECONDS if self._proof else math.inf, self._prove_again)
        self._chores.insert(0, self._proving)
        self._exposure = open_exposure(lease)
        self._closing = Chore(_pace(lease) if self._exposure else math.inf, self._close_exposed)
        # First of all, since it cannot wait for any of the others.
        self._chores.insert(0, self._closing)
        self._interfaces = Chore(_LOOK_FOR_INTERFACES_SECONDS, lease.follow_interfaces)
        if lease.shield is not None and lease.policy.interfaces:
            # Before the exposure's look: who has an interface's old number gets in until then.
            self._chores.insert(0, self._interfaces)
        self._removing = Chore(math.inf, self._remove_unrecorded, time.monotonic() + _SECOND_LOOK_SECONDS)
        if lease.unrecorded:
            self._chores.append(self._removing)
        self._unanswered = open_unanswered(lease)
        self._hanging = Chore(_UNANSWERED_SECONDS, self._tell_unanswered, time.monotonic() + _UNANSWERED_SECONDS)
        self._chores.append(self._hanging)
        self._nodes = _nodes_of(lease)
        if self._nodes is not None:
            self._chores.append(Chore(_NODES_SECONDS, self._count_nodes))
        if lease.presence is not None:
            self._chores.append(Chore(_PRESENCE_SECONDS, lease.presence.make_room))
        self._chores += [Chore(_MORE_SECONDS, work) for work in more]
        if lease.caller.pidfd is None or lease.cgroup is None:
            self._chores.append(Chore(_LOOK_SECONDS, lambda: None))

    def until_over(self) -> None:
        """Return when the job's last process has gone.

        In each turn: whether the launcher is there, the chores that are due, and a part of what others caused.
        """
        try:
            while not (self._released and self._is_over()):
                ready = {descriptor for descriptor, _ in self._poller.poll(self._milliseconds_to_wait())}
                if not self._released:
                    self._hear(ready)
                self._do_chores()
                self._take_in(ready)
                if self._ending is not None:
                    self._attempt(self._ending.go_on)
        finally:
            self._end_proof()

    def _listen_to(self) -> None:
        lease = self._lease
        self._poller.register(self._orders.descriptor, select.POLLIN)
        if lease.caller.pidfd is not None:
            self._poller.register(lease.caller.pidfd, select.POLLIN)
        if lease.cgroup is not None:
            self._poller.register(lease.cgroup.events, select.POLLPRI)
        if lease.drops is not None:
            self._poller.register(lease.drops.fileno(), select.POLLIN)
        self._deletions = _listen_for_deletions(lease)
        if self._deletions is not None:
            self._poller.register(self._deletions.fileno(), select.POLLIN)
        self._answers = _open_answers(lease)
        if self._answers is not None:
            self._poller.register(self._answers.fileno(), select.POLLIN)
        self._links = _listen_for_links(lease)
        if self._links is not None:
            self._poller.register(self._links.fileno(), select.POLLIN)

    def _take_in(self, ready: set[int]) -> None:
        """Read of what there is: who was dropped, whether rules were deleted, what happened to the job's cgroup."""
        drops, deletions, cgroup = self._lease.drops, self._deletions, self._lease.cgroup
        if cgroup is not None and cgroup.events in ready:
            self._attempt(cgroup.populated)  # until it has been read, poll(2) returns at once (kernfs_generic_poll)
        if drops is not None and drops.fileno() in ready:
            drops.read()
        if self._answers is not None and self._answers.fileno() in ready:
            self._attempt(self._end_answered)
        if self._links is not None and self._links.fileno() in ready:
            self._links.take_in()
            self._interfaces.due = 0.0
        if deletions is not None and deletions.fileno() in ready and deletions.heard():
            self._repair.due = min(self._repair.due, time.monotonic() + _SETTLE_SECONDS)

    def _close_exposed(self) -> None:
        """Close, by the port chains, listeners of the job that no layer covers."""
        if self._exposure is None:
            return
        self._tell_exposed(self._exposure.close())

    def _tell_exposed(self, words: Iterable[str]) -> None:
        """Say what was closed, or could not be; a job that insists on the shield is ended for that."""
        self._speech.say(*words)
        if self._exposure is None:
            return
        if self._exposure.left_open:
            port, why = min(self._exposure.left_open.items())
            self._give_up_if_insisted(f"port {port} is open to every host: {why}")

    def _prove_again(self) -> None:
        """Go on in scope `ports` when something has switched the shield off."""
        if self._proof is None:
            return
        why = self._proof.look()
        if why:
            self._lose_shield(why)
        elif not self._lease.closes_all and self._proof.is_threatened():
            self._lease.closes_all = True
            self._close_sooner()
            self._attempt(self._close_exposed)
            also = ", so nodes that are known by the key alone are turned away at ports that are not planned"
            self._speech.say(
                "net_cls or net_prio of cgroup version 1 is here now and may switch the shield off on this kernel"
                f"{also if self._lease.key is not None else ''}"
            )

    def _lose_shield(self, why: str) -> None:
        """Close first; the rest waits: for a launcher that does not read, a child's end, the host's lock."""
        of_key = self._lease.lose_shield(why)
        if of_key:
            self._attempt(self._lease.restore_chains)
        is_closed = self._lease.chains is not None and self._exposure is not None
        now = (
            "scope is ports now: each port of this job is closed by the port chains within 0.2 s of its appearing"
            if is_closed
            else "no port chains are set, so every port of this job is open to every host"
        )
        self._close_sooner()
        words = [f"the shield holds no more: {why}; {now}", *[of_key] * bool(of_key)]
        if self._exposure is not None:
            exposure = self._exposure
            self._attempt(lambda: words.extend(exposure.close()))
        self._tell_exposed(words)
        self._end_proof()
        if not is_closed:
            self._give_up_if_insisted(f"the shield holds no more, with no port chains set: {why}")
        self._attempt(self._lease.note_void)

    def _close_sooner(self) -> None:
        self._closing.seconds = _pace(self._lease) if self._exposure else math.inf
        self._closing.due = 0.0
        if self._exposure is not None:
            self._exposure.hurry()

    def _end_proof(self) -> None:
        proof, self._proof = self._proof, None
        self._proving.seconds = math.inf
        if proof is not None:
            self._attempt(proof.end)

    def _tell_unanswered(self) -> None:
        """Tell of the job's own connections to which nobody answers."""
        if self._unanswered is None or self._released:
            self._hanging.seconds = math.inf
            return
        self._speech.say(*self._unanswered.look())
        self._hanging.seconds = max(_UNANSWERED_SECONDS, self._unanswered.pause)

    def _end_answered(self) -> None:
        """End connections of the job that somebody answered who is no node of it."""
        if self._answers is not None:
            self._speech.say(*self._answers.take_in())

    def _count_nodes(self) -> None:
        """Count the nodes that were seen with the job's key; tell, and record, what is new."""
        if self._nodes is None or self._lease.key is None:
            return
        words = self._nodes.look()
        lease = self._lease
        if not self._released:
            # Slurm's daemons come by their addresses, and each of a job's guards would tell of the nodes.
            (self._speech.log if lease.order.slurm else self._speech.say)(*words)
        lease.unguarded = self._nodes.unguarded
        if lease.record.nodes_guarded != self._nodes.guarded:
            lease.write_unless_locked(nodes_guarded=self._nodes.guarded)

    def _give_up_if_insisted(self, reason: str) -> None:
        """End a job that is open where somebody insisted on the shield, or on a tag that nobody asks for any more."""
        lease = self._lease
        if lease.order.scope == "process":
            self._give_up(f"--scope process was asked for, and {reason}", "with --scope auto it would go on")
        elif lease.key_required and lease.void:
            fix = "with its nodes named by --peers, and --key auto, it would go on"
            self._give_up(f"nobody was to connect without a tag of its key, and {reason}", fix)

    def _give_up(self, why: str, fix: str) -> None:
        """Have the launcher end a job that insists on what it is without; kill it where the launcher does not."""
        if self._given_up or self._released:
            return
        self._given_up = True
        message = f"the job is ended, since {why}"
        self._speech.log(message)
        self._send(Refused(PrivilegeError.status, f"{message}; {fix}"))
        due = time.monotonic() + self._lease.order.grace + _GIVING_UP_SECONDS
        self._chores.append(Chore(_ENDING_SECONDS, self._lease.kill, due))

    def _repair_chains(self) -> None:
        """Put the port chains back if somebody flushed them away."""
        if self._lease.chains_stand():
            return
        self._lease.restore_chains()
        self._speech.say("somebody flushed the port chains away; they are back")

    def _hear(self, ready: set[int]) -> None:
        """Notice when the launcher is gone, and do the next thing that it says: one a turn, however many there are."""
        has_ended = self._lease.caller.pidfd in ready or self._lease.caller.has_ended()
        if self._hearing.due != math.inf and not has_ended:
            return
        before = time.process_time()
        message = self._last_word() if has_ended else self._read_order()
        self._has_more_to_hear = message is not None
        self._pause(self._share.pause_after(time.process_time() - before))
        if isinstance(message, Release):
            stays = self._part() if message.goes_on else ""
            self._attempt(self._remove_unrecorded)
            self._attempt(self._give_back)
            self._say_farewell(stays)
            self._release(message.failed)
        elif has_ended or self._orders.ended:
            # What is left of a job of Slurm's Slurm ends.
            self._release(failed=self._lease.order.slurm is None)
        elif isinstance(message, Peers):
            self._newest_peers = message
            self._peers.due = max(time.monotonic(), self._peers_may_change)

    def _pause(self, seconds: float) -> None:
        """Hear nothing more for a while; what is said meanwhile waits."""
        if seconds > 0 and self._hearing.due == math.inf:
            self._poller.unregister(self._orders.descriptor)
            self._has_more_to_hear = False
            self._hearing.due = time.monotonic() + seconds

    def _hear_again(self) -> None:
        if not self._released:
            self._poller.register(self._orders.descriptor, select.POLLIN)
            self._has_more_to_hear = True

    def _last_word(self) -> Message | None:
        """Return what a launcher said last that is gone: a job that it let go before is no failed one.

        Whoever still holds the pipe may go on without end, and is not heard for ever.
        """
        message = None
        for _ in range(_LAST_MESSAGES):
            message = self._read_order()
            if not isinstance(message, Peers):
                break
        return message

    def _part(self) -> str:
        """Let a launcher out that goes on; return why it stays, where it does."""
        try:
            return part(self._lease)
        except EXPECTED as error:
            return f"it cannot be let out ({error})"

    def _remove_unrecorded(self) -> None:
        """Remove what killed containers left, when a second look finds it left over still."""
        lease = self._lease
        runs, lease.unrecorded = lease.unrecorded, frozenset()
        if runs and lease.chains is not None:
            from securerun.guard import unrecorded  # few launches find any

            with run_directory.recording() as directory:
                lines = tuple(unrecorded.remove(directory, lease.chains.backend, runs))
                reserved.reserve(directory, lease.policy.run_id, lease.record.reserved)
            self._speech.log(*lines)

    def _give_back(self) -> None:
        """Leave nothing to be removed that the launcher's end, or a container's, might keep this guard from."""
        if give_back(self._lease):
            self._exposure = None
            self._closing.seconds = math.inf

    def _say_farewell(self, stays: str) -> None:
        denied = self._notices.denied()
        self._attempt(self._count_nodes)
        of_nodes = () if self._nodes is None else (self._nodes.guarded, self._nodes.unguarded)
        self._send(Released(denied.listed, denied.more, stays, *of_nodes))

    def _read_order(self) -> Message | None:
        """Read what the launcher says. After anything out of place nothing more from there is believed."""
        try:
            message = self._orders.read()
            if message is None or isinstance(message, (Peers, Release)):
                return message
            raise ProtocolError("it is not the time for such a message")
        except ProtocolError as error:
            self._speech.log(f"ended, since its launcher sent what it must not: {error}")
            self._orders.ended = True
            return None

    def _change_peers(self) -> None:
        """Let the networks in that the launcher named last; whatever is wrong with them, the old ones stay."""
        newest, self._newest_peers = self._newest_peers, None
        if newest is None:
            return
        began = time.monotonic()
        self._peers_may_change = began + _PEERS_SECONDS
        before = set(self._lease.left_out)
        try:
            self._lease.change_peers(newest.networks)
        finally:
            took = time.monotonic() - began
            self._peers_may_change = max(self._peers_may_change, began + took / MOST_OF_LOCK)
        self._speech.say(*told({port: why for port, why in self._lease.left_out.items() if port not in before}))
        self._speech.log(f"open to {len(newest.networks)} peer networks now")

    def _release(self, failed: bool) -> None:
        self._released = True
        if self._hearing.due == math.inf:
            self._poller.unregister(self._orders.descriptor)
        if self._lease.caller.pidfd is not None:
            self._poller.unregister(self._lease.caller.pidfd)
        self._notices.quiet = True
        if failed:
            self._ending = Ending(self._lease, self._speech.log)
            self._chores.append(Chore(_ENDING_SECONDS, lambda: None))
        self._attempt(lambda: self._lease.write(draining=True))

    def _milliseconds_to_wait(self) -> float:
        if self._has_more_to_hear and not self._released:
            return 0.0
        return max(0.0, min(chore.due for chore in self._chores) - time.monotonic()) * 1000

    def _do_chores(self) -> None:
        """Do the first chore that is due, and at most one of the others, which may have to wait for other guards."""
        first, *others = self._chores
        self._do(first)
        for chore in others:
            if self._do(chore):
                return

    def _do(self, chore: Chore) -> bool:
        """Do a chore if it is due; return whether it was."""
        if chore.due > time.monotonic():
            return False
        self._attempt(chore.do)
        chore.due = time.monotonic() + chore.seconds
        return True

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do it, and go on if it fails: a full disk or a table that cannot be read must not take the guard away."""
        try:
            work()
        except EXPECTED as error:
            self._complain(error)

    def _is_over(self) -> bool:
        """Return whether the job's last process has gone; not while that cannot be told, as without descriptors."""
        try:
            return self._lease.is_over()
        except EXPECTED as error:
            self._complain(error)
            return False

    def _complain(self, error: Exception) -> None:
        words = f"a part of the guard's work fails: {error}"
        if words not in self._complaints and len(self._complaints) < _MOST_COMPLAINTS:
            self._complaints.add(words)
            self._speech.say(words)


def _pace(lease: Lease) -> float:
    """Return how often to look for listeners that no layer covers."""
    return _EXPOSURE_SECONDS if lease.is_shielded and not lease.closes_all else _SOON_SECONDS


def _open_proof(lease: Lease) -> Proof | None:
    """Open what proves a shield again and again, where something may switch it off."""
    if not lease.may_void or lease.void:
        return None
    from securerun.guard.proof import Proof  # on few hosts

    return Proof(lease)


def _open_answers(lease: Lease) -> Answers | None:
    """Open what ends the job's connections to who is no node of it, where its shield goes by tags."""
    if lease.shield is None or lease.shield.tags is None:
        return None
    from securerun.guard.answers import open_answers

    return open_answers(lease)


def _nodes_of(lease: Lease) -> Nodes | None:
    """Return what counts the nodes of a job that has a key."""
    if lease.key is None:
        return None
    from securerun.guard.nodes import Nodes

    return Nodes(lease)


def _listen_for_links(lease: Lease) -> Links | None:
    """Listen where the shield goes by interfaces; where the kernel does not tell, they are looked at every second."""
    if lease.shield is None or not lease.policy.interfaces:
        return None
    try:
        return Links()
    except OSError:
        return None


def _listen_for_deletions(lease: Lease) -> Deletions | None:
    """Listen where rules tell of their deletion: those of nf_tables do, but an owned table is safe."""
    chains = lease.chains
    if chains is None or chains.backend == "legacy":
        return None
    if chains.backend == "nftables" and lease.shield is not None and not lease.may_void:
        return None
    table, chain = ("filter", "INPUT") if chains.backend == "iptables" else (chains.name, "close")
    try:
        return Deletions(table, chain, lease.policy.run_id)
    except OSError:
        return None
