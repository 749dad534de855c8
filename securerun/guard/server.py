"""The guard: a small process that holds one job's lease, from an order on its standard input to the job's last process.

It answers to nothing but its standard input and the end of whoever started it, believes neither, and has no more
privilege than its work takes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, NoReturn

from securerun.errors import PolicyError, Powerless, PrivilegeError, SecurerunError
from securerun.firewall import backends
from securerun.firewall.policy import opened
from securerun.guard import inherited, limits, log, records, refusals
from securerun.guard.acquire import acquire, require_room
from securerun.guard.caller import ROOT, Caller, find_ancestor, find_peer, sudo_processes
from securerun.guard.cgroup import leave_shared_cgroups, require_left
from securerun.guard.channel import Channel
from securerun.guard.documents import MAXIMUM_BYTES, ProtocolError
from securerun.guard.lease import Lease
from securerun.guard.limits import SitePolicy
from securerun.guard.notices import EXPECTED, Send
from securerun.guard.program import KEY_ARGUMENT, NAME, SOCKET_ARGUMENT, WAITING_NAME, brings_key, reads_versions
from securerun.guard.protocol import (
    VERSIONS,
    Message,
    Order,
    Ready,
    Refused,
    Report,
    Run,
    Runs,
    decode,
    encode,
)
from securerun.guard.records import Brief
from securerun.guard.slurm_job import SlurmJob
from securerun.guard.waiting import Slot, TooManyWaiting
from securerun.guard.watch import Watch
from securerun.lines import LineBuffer
from securerun.linux import capabilities, net_cgroups, prctl, proc
from securerun.linux.cgroups import CgroupUnavailable
from securerun.linux.local_sockets import address_of_peer
from securerun.linux.processes import Process

if TYPE_CHECKING:
    from securerun.guard.unattended import Unattended

_INPUT, _OUTPUT = 0, 1
_FIRST_OTHER_DESCRIPTOR = 3
# The launcher imports torch before it orders; from a slow network file system that takes minutes.
_PATIENCE_SECONDS = 900.0
# An order once begun is there at once: 100,000 peers are five megabytes.
_ORDER_SECONDS = 30.0
_ANSWER_SECONDS = 2.0
# Whoever asks for reports without end has each, which reads the records of all runs, by root's processor.
_REPORTS_AT_ONCE = 16
_REPORT_PAUSE_SECONDS = 0.25
_MOST_CPU = 0.2
_NEEDED = frozenset(capabilities.FOR_GUARDING.values())
_NEEDED_TO_BEGIN = frozenset(capabilities.FOR_BEGINNING.values())


def main(arguments: Sequence[str]) -> int:
    """Serve one launcher. Return the exit status: 0 when the lease was released, else the refusal's."""
    # What 100,000 peers are made of stays: to look for garbage among it doubles the time until their job may start.
    gc.disable()
    inherited.discard(NAME)
    try:
        orders, answers = Orders(Channel(_INPUT, os.O_RDONLY)), Answers(Channel(_OUTPUT, os.O_WRONLY))
    except PrivilegeError as error:
        _log(f"refused: {error}")
        return error.status
    caller, order, by_socket = None, None, SOCKET_ARGUMENT in arguments
    address = address_of_peer(_INPUT) if by_socket else ""
    answers.to_any = by_socket and not reads_versions(address)
    try:
        _require_own_proc()
        caller = find_peer(_INPUT) if by_socket else find_ancestor()
        is_apart = by_socket and caller.enter_network()
        if not by_socket:
            caller.look_at_network()
            caller.attendants = _stand_apart(caller)
        inherited.require_unlimited()
        kept = _drop_privilege(caller)
        slot = _slot(caller)
        answers.send(Ready(os.getpid(), VERSIONS if by_socket else ()))
        backends.prepare()  # while the launcher imports torch
        net_cgroups.may_void_filters()  # likewise
        if KEY_ARGUMENT in arguments or brings_key(address):
            _load_for_key()
        order = orders.wait_for_order(lambda: _report(caller, answers))
        if order is None:
            slot.close()
            return 0
        # No launcher of the release before has an order with a key, whatever it says of itself.
        answers.to_any = answers.to_any and order.key is None
        lease = _acquire(order, caller, by_socket=by_socket, is_apart=is_apart)
        _drop_privilege_to_begin(kept)
        slot.close()
        _collect_garbage_from_now_on()
    except ProtocolError as error:
        not_understood = PolicyError(f"the guard did not understand its orders: {error}")
        return _refuse(not_understood, caller, answers, order)
    except SecurerunError as error:
        return _refuse(error, caller, answers, order)
    except Exception as error:  # whatever it is, the launcher gets an answer, and nothing stands
        defect = SecurerunError(f"a defect of securerun's, please report it: {_place(error)}")
        return _refuse(defect, caller, answers, order)
    return _hold(lease, orders, answers)


def _load_for_key() -> None:
    """Load what an order with a key takes, before it comes: some 8 ms that the job would wait for."""
    from securerun.guard import keyed  # few jobs have one

    keyed.prepare()


def _collect_garbage_from_now_on() -> None:
    """Look for garbage among what is made from here on: of what is there, nothing goes before the guard does."""
    gc.freeze()
    gc.enable()


def _require_own_proc() -> None:
    """Raise PrivilegeError where the proc file system is another pid namespace's: its numbers mean others here."""
    if not proc.is_of_this_pid_namespace():
        raise Powerless(
            "the proc file system here shows the processes of another pid namespace than the guard's; mount one of its "
            "own (`unshare --mount-proc` does), then try again"
        )


class Orders:
    """The launcher's messages, read as they come and never waited for behind the back of `poll`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pending = LineBuffer()
        self.descriptor = channel.descriptor
        self.ended = False

    def wait_for_order(self, report: Callable[[], None]) -> Order | None:
        """Return the order; None when the launcher thought better of it and closed its end. `report` is asked before.

        Raises ProtocolError for anything else, and PrivilegeError for a launcher that keeps the guard waiting.
        """
        deadline = patience = time.monotonic() + _PATIENCE_SECONDS
        pace = _Pace()
        while not self.ended:
            self._wait_until(deadline)
            began = bool(self._pending)
            message = self.read()
            if isinstance(message, Order):
                return message
            if isinstance(message, Report):
                report()  # and no new patience: to ask again and again would be to wait for ever
                pace.keep(patience)
            elif message is not None:
                raise ProtocolError("the first message is not an order")
            if not self._pending:
                deadline = patience
            elif not began:
                deadline = min(time.monotonic(), patience) + _ORDER_SECONDS
        return None

    def read(self) -> Message | None:
        """Read the next message, if what is there completes one; `ended` says that no other can follow.

        Raises ProtocolError for what is no message.
        """
        if not self._pending.has_line():
            chunk = self._channel.read()
            self.ended = chunk == b""
            self._pending.add(chunk or b"")
        line = self._pending.take()
        if line is None and len(self._pending) > MAXIMUM_BYTES:
            raise ProtocolError(f"a message of more than {MAXIMUM_BYTES} bytes")
        return None if line is None else decode(line)

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        # Who always has something to say is not waited for either.
        if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
            raise PrivilegeError("the launcher kept its guard waiting for an order for too long; start the job again")


class _Pace:
    """How often a launcher without an order is answered: a few times at once, then so seldom that it costs little."""

    def __init__(self) -> None:
        self._answered = 0
        self._spent = time.process_time()

    def keep(self, deadline: float) -> None:
        """Wait before the next report, though not beyond the deadline: what is said meanwhile waits, unread."""
        self._answered += 1
        spent = time.process_time() - self._spent
        if self._answered >= _REPORTS_AT_ONCE:
            pause = max(_REPORT_PAUSE_SECONDS, spent / _MOST_CPU)
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        self._spent = time.process_time()


def _stand_apart(caller: Caller) -> tuple[Process, ...]:
    """Go on in a child that nobody ends together with the launcher or with sudo; return who waits for it, if anybody.

    Started directly it is a child of init's: whoever ends a launcher with all its descendants (Slurm's linuxproc) ends
    no guard. sudo ends when its command does, and may pass on what is said, so that has to stay; and it kills its
    command, by SIGKILL too, when its user sends it SIGALRM (terminate_command, sudo 1.9). So its command only waits.
    """
    if os.getppid() == caller.pid:
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        return ()
    waiting = _held((os.getpid(), *sudo_processes()))
    child = os.fork()
    if child != 0:
        _wait_for(child)
    os.setsid()
    return waiting


def _held(pids: Sequence[int]) -> tuple[Process, ...]:
    """Return which processes these are; they wait for this one, and so have their numbers still."""
    try:
        return tuple(Process.of(pid) for pid in pids)
    except OSError as error:
        raise PrivilegeError("the sudo that started the guard has ended") from error


def _wait_for(guard: int) -> NoReturn:
    """Be what sudo waits for, and hold nothing that tells the launcher whether its guard lives."""
    prctl.set_name(WAITING_NAME)
    os.closerange(_INPUT, _FIRST_OTHER_DESCRIPTOR)
    with contextlib.suppress(OSError):
        capabilities.keep_only(())
    _, status = os.waitpid(guard, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _drop_privilege(caller: Caller) -> frozenset[int]:
    """Keep what the work takes, and what its beginning does; of what root in a container has been left, keep all.

    Return what is to be kept for good.

    Without SYS_PTRACE a process sees into others of its user only as far as they have no more capabilities than it has
    (ptrace(2)), and a guard of user id 0 is to see the sockets of its job. Root's also loads the modules of legacy
    iptables; nobody else gets modules loaded by name.
    """
    held = capabilities.effective()
    if caller.user == ROOT and capabilities.SYS_PTRACE not in held:
        kept = _NEEDED | held
    else:
        kept = _NEEDED | ({capabilities.SYS_MODULE} if caller.is_root else set())
    try:
        capabilities.keep_only(kept, _NEEDED_TO_BEGIN)
    except OSError as error:
        raise PrivilegeError(f"the guard cannot give up privilege that it does not need: {error.strerror}") from error
    return frozenset(kept)


def _drop_privilege_to_begin(kept: frozenset[int]) -> None:
    """Give up what only the beginning took. Whatever stands in the way of that, the job is guarded."""
    with contextlib.suppress(OSError):
        capabilities.keep_only(kept)


def _slot(caller: Caller) -> ExitStack:
    """Take one of the few places that its user has for guards without a run; root has as many as root likes.

    Raises PrivilegeError where there is none. A guard that is not root's is charged to its own user anyway.
    """
    held = ExitStack()
    if not caller.is_root and os.geteuid() == ROOT:
        held.callback(Slot(caller.account, in_container=bool(caller.container)).give_back)
    return held


def _report(caller: Caller, answers: Answers) -> None:
    """Tell the caller of their own runs, and of nobody else's. Reads, and takes no lock that others wait for."""
    caller.identify_again()
    own = [brief for brief in records.read_briefs_of_host() if _is_own(brief, caller)]
    found = [record for brief in own if (record := brief.whole()) is not None]
    answers.send(Runs(len(found)))
    for record in found:
        # In a container nobody sees whether the processes live whose numbers are in it.
        answers.send(Run({**record.document(), "guard_lives": record.guard_lives}))


def _is_own(brief: Brief, caller: Caller) -> bool:
    """Return whether a run is the caller's; that of their job of Slurm's is, which root's Prolog ordered."""
    of_prolog = brief.slurm_job and brief.root and brief.user == caller.user != ROOT and not caller.container
    return brief.owner == caller.owner or bool(of_prolog)


def _read_site_policy(caller: Caller) -> SitePolicy:
    """Read what the site permits; root needs no permission, and is served where the file cannot be read too."""
    if caller.is_root:
        return SitePolicy()
    permitted, ignored = limits.read_site_policy()
    if ignored:
        _log(ignored)
    return permitted


def _acquire(order: Order, caller: Caller, *, by_socket: bool, is_apart: bool) -> Lease:
    """Validate first, act after. is_apart: whether the job is in the own network of a container."""
    caller.identify_again()
    permitted = _read_site_policy(caller)
    if caller.container:
        caller.require_same_container()
        limits.require_containers(permitted)
    if is_apart:
        order = limits.for_own_network(permitted, order)
    order, notes = limits.narrowed(permitted, order, caller)
    limits.require_permitted(permitted, order, caller)
    caller.require_same_network()
    if order.slurm is not None:
        if caller.container:
            raise PolicyError("a job of Slurm's is the host's own, and this one asks from within a container")
        from securerun.guard import slurm_served  # few hosts are Slurm's

        waiting, caller = caller.attendants, slurm_served.whom(order.slurm, caller, by_socket=by_socket)
        caller.attendants = waiting
    if not by_socket:
        # Whom a cgroup is delegated to could freeze a guard that holds the host's lock, or keep it from memory, so out
        # of all of them before that; but not before the order is found good: until then a flood of guards is charged
        # to whoever starts them.
        require_room(order, caller, permitted)
        # sudo too: it waits for its command, and a replaced guard's would be waited for in the job's cgroup.
        leave_shared_cgroups(caller.attendants)
        if not caller.is_root:
            _require_left()
    if order.slurm is not None and order.slurm.is_whole:
        from securerun.guard import replaced

        order, caller = replaced.go_on_in_a_child(order, order.slurm)
    return acquire(order, caller, permitted, notes)


def _require_left() -> None:
    try:
        require_left()
    except CgroupUnavailable as error:
        raise PrivilegeError(str(error)) from error


def _hold(lease: Lease, orders: Orders, answers: Answers) -> int:
    """Keep the lease until the job's last process has gone, then release it."""
    run = f"run {lease.policy.run_id}"

    def noted(words: str) -> None:
        _log(words, _fields_of(lease))

    try:
        _look_after(lease, orders, answers, noted)
    except Exception as error:  # a defect of ours must not leave what nobody looks after
        noted(f"{run}: a defect of securerun's: {_place(error)}")
        if not lease.caller.has_ended():
            return 1  # the launcher starts another guard, or what waits for a whole job's does, and that takes over
        with contextlib.suppress(*EXPECTED):
            lease.kill()
    try:
        lease.release()
    except EXPECTED as error:
        noted(f"{run}: not all of it could be removed, the next run tries again: {error}")
        return 1
    noted(f"{run}: released")
    return 0


def _look_after(lease: Lease, orders: Orders, answers: Answers, noted: Callable[[str], None]) -> None:
    """Tell what stands, and return when the job's last process has gone."""
    run, caller = f"run {lease.policy.run_id}", lease.caller
    answers.send(lease.guarding)
    send: Send = answers.send
    of_slurm = None
    if lease.order.slurm is not None:
        of_slurm = _unattended(lease, lease.order.slurm, noted)
        send = of_slurm.send
    layers = ", ".join(layer.backend for layer in lease.guarding.layers)
    ports = ", ".join(map(str, lease.order.policy.ports)) or "none"
    public = f"; public {opened(lease.policy.public)}" if lease.policy.public else ""
    noted(
        f"{run} of user {caller.user}, process {caller.pid}{_place_of(caller)}: guarding by {layers}; "
        f"ports {ports}; {len(lease.policy.peers)} peer networks{public}"
    )
    for note in lease.notes if of_slurm is not None else ():
        noted(f"{run}: {note}")  # a launcher would say it
    Watch(lease, of_slurm or orders, send, noted, () if of_slurm is None else (of_slurm.look,)).until_over()


def _fields_of(lease: Lease) -> log.Fields:
    """Return by what the lines about a run can be found in the journal. Peers change."""
    return {
        "RUN_ID": [lease.policy.run_id],
        "USER": [str(lease.caller.user)],
        "PEERS": [str(peer) for peer in islice(lease.policy.peers, log.MOST_VALUES)],
    }


def _unattended(lease: Lease, job: SlurmJob, write: Callable[[str], None]) -> Unattended:
    """Hear nobody from now on: whoever ordered has their answer, and may go on as they like."""
    from securerun.guard.unattended import Unattended

    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in (_INPUT, _OUTPUT):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return Unattended(lease, job, write)


def _place_of(caller: Caller) -> str:
    return f" in container {caller.container}" if caller.container else ""


def _place(error: Exception) -> str:
    """Return what went wrong and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} (line {frames[-1].lineno} of {frames[-1].filename})"


class Answers:
    """What the guard says to its launcher, which may be gone, or stopped, or a trick: nobody waits for it long.

    to_any: whether that may be a launcher of the release before.
    """

    def __init__(self, channel: Channel) -> None:
        self.to_any = False
        self._channel = channel
        self._unsent = memoryview(b"")

    def send(self, message: Message) -> None:
        """Say it, whole or not at all; while an earlier message is stuck, this one is dropped."""
        self._write(0.0 if self._unsent else _ANSWER_SECONDS)
        if not self._unsent:
            self._unsent = memoryview(encode(message, to_any=self.to_any))
            self._write(_ANSWER_SECONDS)

    def _write(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while self._unsent and self._has_room(deadline):
                self._unsent = self._unsent[self._channel.write(self._unsent) :]

    def _has_room(self, deadline: float) -> bool:
        return bool(select.select([], [self._channel.descriptor], [], max(0.0, deadline - time.monotonic()))[1])


def _refuse(reason: SecurerunError, caller: Caller | None, answers: Answers, order: Order | None) -> int:
    has_key = order is not None and order.key is not None
    whom = "somebody" if caller is None else f"user {caller.user}, process {caller.pid}{_place_of(caller)}"
    # The answer first: where no file may grow (ulimit -f 0), writing the log is what fails.
    later = isinstance(reason, TooManyWaiting)
    # Said to nobody whose securerun may be of another version.
    another = isinstance(reason, Powerless) and (caller is None or caller.is_direct)
    answers.send(Refused(reason.status, str(reason), later=later, knows_keys=has_key, another_may=another))
    words = f"refused to {whom}: {reason}"
    of_caller = {} if caller is None else {"USER": [str(caller.user)]}
    of_run = {} if order is None else {"RUN_ID": [order.policy.run_id]}
    account = refusals.SOMEBODY if caller is None else caller.account
    for line in [words] if caller is not None and caller.is_root else refusals.lines(account, words):
        _log(line, {**of_run, **of_caller})
    return reason.status


def _log(words: str, fields: log.Fields | None = None) -> None:
    log.note(NAME, words, fields or {})
