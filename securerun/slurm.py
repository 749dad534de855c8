"""What Slurm starts before and after a job: TaskProlog, Prolog and Epilog, as `securerunctl setup slurm` prints them.

    task-prolog   as the job's user, before each task: asks the socket for a guard of its parent, which becomes the task
    prolog        as root, before anything of a job is on a node: makes the job's cgroup with the shield on it
    epilog        as root, when all of a job has gone from a node: lets the guard go
    peers         by a guard, while a job runs: which addresses its nodes have now

None of them stays. Whoever is in the job changes nothing, and what goes wrong keeps the task or the job from starting.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from securerun.errors import PolicyError, PrivilegeError, SecurerunError, UsageError
from securerun.guard.protocol import (
    RUN_ID_VARIABLE,
    SECRET_PATH_VARIABLE,
    Guarding,
    Message,
    Order,
    Peers,
    Ready,
    Refused,
    encode,
)
from securerun.guard.slurm_job import SlurmJob
from securerun.linux import packages
from securerun.text import printable

if TYPE_CHECKING:
    from securerun.linux.cgroups import Place
    from securerun.linux.networks import Network
    from securerun.options import Options
    from securerun.protection.plan import Plan
    from securerun.protection.ways import Connection, Way

_ANSWER_SECONDS = 120.0
# Of a user's tasks that start at once, some get their guards when the guards of others have theirs.
_BUSY_SECONDS = 120.0
_PAUSE_SECONDS = 0.1
# Of the epilog, which slurmd waits for.
_GONE_SECONDS, _LOOK_SECONDS = 10.0, 0.05
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
_HOLD = re.compile(r"securerun-[0-9a-f]{12}")
# What becomes of a node whose Prolog fails, in `sinfo --list-reasons`, is this, and not "Prolog error" alone.
_REASON_CHARACTERS = 250


def main(arguments: Sequence[str]) -> int:
    """Do what the first word says. Return the exit status: 0, or why nothing may start."""
    sys.path += map(str, packages.directories())  # begun without `site`, as a guard is
    what, rest = (arguments[0] if arguments else ""), arguments[1:]
    work = {"task-prolog": _task_prolog, "prolog": _prolog, "epilog": _epilog, "peers": _peers}.get(what)
    if work is None:
        print("securerun: Slurm starts this; see securerunctl setup slurm", file=sys.stderr)
        return UsageError.status
    try:
        work(rest)
    except (SecurerunError, OSError) as error:
        words = printable(str(error).replace("\n", "; "))
        # Of a task's prolog only what it prints is shown to anybody, and only such lines; slurmd logs the other's.
        print(f"print securerun: {words}" if what == "task-prolog" else f"securerun: {words}", flush=True)
        if what == "prolog":
            _drain(words)
        return error.status if isinstance(error, SecurerunError) else SecurerunError.status
    return 0


# --- TaskProlog -------------------------------------------------------------------------------------------------------


def _task_prolog(_arguments: Sequence[str]) -> None:
    """Have the parent of this process guarded, and tell the task which run it is in. Raises SecurerunError."""
    from securerun import options

    asked = options.resolve({}, os.environ)
    if asked.unprotected:
        print("print securerun: SECURERUN_UNPROTECTED: every TCP port of this task is open to every host")
        return
    # A network of the task's own is for a securerun in it to make.
    asked = asked if asked.scope != "namespace" else replace(asked, scope="auto")
    number = _job_number(os.environ)
    connection = _connected()
    plan = _planned(asked, f"task of job {number} of Slurm's")
    # Slurm shows no tag: beside a key that is insisted on it would not come in, but the nodes would have to be named.
    plan = plan if plan.key.is_required else _with(plan, _controllers())
    # Of a heterogeneous job, whose parts have lists of their own, each is another job to Slurm.
    renews = plan.peers.source == "Slurm (SLURM_JOB_NODELIST)"
    order = _order(plan, asked.scope, SlurmJob(number, plan.task.is_first, renews))
    guarding = _guarded(order, connection)
    for name, value in _told(plan, asked, guarding):
        print(f"export {name}={value}")


def _told(plan: Plan, asked: Options, guarding: Guarding) -> Iterator[tuple[str, str]]:
    """Yield the variables by which a securerun in the task knows that it is in a run."""
    from securerun.protection import enclosing

    yield RUN_ID_VARIABLE, plan.policy.run_id
    terms = enclosing.terms(
        plan.policy.run_id,
        asked,
        shield=guarding.has_shield,
        needs_guard=guarding.needs_guard,
        has_key=bool(guarding.fingerprint),
    )
    yield enclosing.TERMS_VARIABLE, terms
    if guarding.secret_path:
        yield SECRET_PATH_VARIABLE, guarding.secret_path


def _connected() -> Connection:
    """Return a guard that systemd's socket starts; it comes up while this process plans.

    sudo would be a descendant of the task, and Slurm would end it. Raises PrivilegeError.
    """
    from securerun.protection import ways

    try:
        return _way(ways.BY_SYSTEMD).open()
    except OSError as error:
        raise PrivilegeError(
            f"this task cannot be guarded, so it is not started: {error.strerror or error}; "
            "have an administrator do what `securerunctl setup slurm` says"
        ) from error


def _guarded(order: Order, connection: Connection) -> Guarding:
    """Return what the guard made of an order, or the next one where it has no place. Raises SecurerunError."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        answer = _answer(connection, order)
        if not (isinstance(answer, Refused) and answer.later and time.monotonic() < deadline):
            return _understood(answer)
        # Each of many at another moment.
        time.sleep(_PAUSE_SECONDS * (1 + os.urandom(1)[0] / 64))
        connection = _connected()


def _way(name: str) -> Way:
    from securerun.protection import ways

    return next(way for way in ways.ways() if way.name == name)


def _answer(connection: Connection, order: Order) -> Message | None:
    answer = connection.receive(_ANSWER_SECONDS)
    if isinstance(answer, Ready):
        answer = connection.receive(_ANSWER_SECONDS) if connection.send(order) else None
    connection.close()
    return answer


def _understood(answer: Message | None) -> Guarding:
    if isinstance(answer, Guarding):
        return answer
    if isinstance(answer, Refused):
        raise _Refusal(answer)
    raise PrivilegeError("the guard ended without an answer; its log on this node says why")


class _Refusal(SecurerunError):
    """The guard's own, with its status."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.status = refused.status


# --- Prolog and Epilog ------------------------------------------------------------------------------------------------


def _prolog(arguments: Sequence[str]) -> None:
    """Have all of a job on this node guarded before it is there. Raises SecurerunError."""
    from securerun import options
    from securerun.protection import ways

    taken, rest = options.take(arguments, lambda _: None)
    if rest or not taken.keys() <= {"peers", "ports", "public", "interface"}:
        raise UsageError("the prolog takes --peers, --ports, --public and --interface")
    more = str(taken.pop("peers", ""))
    number, user = _job_number(os.environ), _number("SLURM_JOB_UID")
    asked = replace(options.resolve(taken, {}), peers=None, key="off", scope="process")
    plan = _with(_planned(asked, f"job {number} of Slurm's"), (*_controllers(), *_networks(more)))
    order = _order(plan, "process", SlurmJob(number, True, True, user, _cgroup_of_job(number), more))
    connection = _way(ways.DIRECTLY).open()
    try:
        _understood(_answer_of(connection, order))
    finally:
        connection.close()


def _answer_of(connection: Connection, order: Order) -> Message | None:
    """Return what a guard of this process' own says, which has its last words elsewhere if it cannot even begin."""
    answer = connection.receive(_ANSWER_SECONDS)
    if not isinstance(answer, Ready):
        if answer is None:
            raise PrivilegeError(f"no guard can be had: {connection.last_words()}")
        return answer
    connection.reap()
    return connection.receive(_ANSWER_SECONDS) if connection.send(order) else None


def _epilog(_arguments: Sequence[str]) -> None:
    """Let go of the job's cgroup, and wait a while until its guard has gone too. Raises PolicyError or OSError."""
    from securerun.guard import records
    from securerun.linux import cgroups

    number = _job_number(os.environ)
    try:
        place = next(cgroups.places_of(_cgroup_of_job(number)), None)
    except PrivilegeError:  # nor had the prolog any
        return
    runs = _let_go(place, f"job_{number}") if place is not None else []
    deadline = time.monotonic() + _GONE_SECONDS
    while time.monotonic() < deadline and any(Path(records.DIRECTORY, f"{run}.json").exists() for run in runs):
        time.sleep(_LOOK_SECONDS)


def _let_go(place: Place, name: str) -> list[str]:
    """Remove what holds the cgroup of a job, and that if it is empty; return the runs that held it. Raises OSError."""
    from securerun.linux import cgroups

    runs = []
    with contextlib.suppress(FileNotFoundError):
        descriptors = place.open(with_last=True)
        try:
            for hold in filter(_HOLD.fullmatch, cgroups.children(descriptors[-1])):
                os.rmdir(hold, dir_fd=descriptors[-1])
                runs.append(hold.partition("-")[2])
            with contextlib.suppress(OSError):  # Slurm's last step is not gone yet, and removes it
                os.rmdir(name, dir_fd=descriptors[-2])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
    return runs


def _cgroup_of_job(number: int) -> str:
    """Return where Slurm makes a job's cgroup (cgroup_v2.c: below the slice of its scope).

    Raises PrivilegeError where Slurm has no such place.
    """
    from securerun.linux import cgroups, proc

    node = os.environ.get("SLURMD_NODENAME", "")
    names = [*([f"{node}_slurmstepd.scope"] if re.fullmatch(r"[A-Za-z0-9._-]+", node) else []), "slurmstepd.scope"]
    # Where slurmd is itself, if systemd has no part in it; else where it has systemd make the scope.
    own = Path(cgroups.cgroup_of(os.getpid()))
    init = Path(cgroups.cgroup_of(proc.INIT)).parent
    slices = (Path("/system.slice"), init / "system.slice", *(Path("/", name) for name in cgroups.slices()))
    scopes = [place / name for place in slices for name in names]
    scopes = [*(place for place in (own, *own.parents) if place.name in names), *scopes]
    for scope in scopes:
        if cgroups.inode_of(str(scope)) is not None:
            return str(scope / f"job_{number}")
    raise PrivilegeError(
        f"Slurm has no cgroup of version 2 on this node ({' or '.join(names)}), so a job cannot be closed before it is "
        "there: set CgroupPlugin=cgroup/v2 and ProctrackType=proctrack/cgroup, or use the TaskProlog in place of the "
        "Prolog"
    )


def _drain(words: str) -> None:
    """Have Slurm say why the node is drained, before it says "Prolog error"."""
    import subprocess

    from securerun.linux import slurm

    scontrol, node = slurm.find_scontrol(), os.environ.get("SLURMD_NODENAME", "")
    if scontrol is None or not node:
        return
    reason = f"Reason=securerun: {words[:_REASON_CHARACTERS]}"
    command = [scontrol, "update", f"NodeName={node}", "State=DRAIN", reason]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(  # noqa: S603 - root's own program, and words of ours
            command,
            env=slurm.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )


# --- Who may connect --------------------------------------------------------------------------------------------------


def _peers(arguments: Sequence[str]) -> None:
    """Print the peers that a job has now, as a launcher says them. Raises SecurerunError."""
    from securerun import options
    from securerun.job import slurm_jobs

    number, user, *more = arguments
    taken, _ = options.take(more, lambda _: None)
    nodes = slurm_jobs.nodes_of(int(number), int(user), os.environ)
    os.environ["SLURM_JOB_NODELIST"] = nodes
    asked = replace(options.resolve({}, {}), peers=None, key="off")
    plan = _with(_planned(asked, "peers"), (*_controllers(), *_networks(str(taken.get("peers", "")))))
    sys.stdout.write(encode(Peers(plan.policy.peers)).decode())


def _planned(asked: Options, command: str) -> Plan:
    from securerun.host import umask
    from securerun.job import environment
    from securerun.protection import plan

    job = replace(environment.describe_job(os.environ, ()), command=(command,))
    found = plan.understand(job, asked, umask.current())
    if asked.interface is not None:
        return found
    # Slurm's daemons may come through another interface than the job's own traffic (GLOO_SOCKET_IFNAME).
    return replace(found, policy=replace(found.policy, interfaces=()))


def _controllers() -> Sequence[Network]:
    """Return Slurm's controllers: one tells srun of its job, in a batch script for instance."""
    from securerun.job import slurm_jobs

    return slurm_jobs.controllers(os.environ)


def _networks(peers: str) -> Sequence[Network]:
    """Return the networks of a list of peers. One that has no address now is left out: a job does not wait for it."""
    if not peers:
        return ()
    from securerun.job import environment, folded
    from securerun.job.peers import find_peers
    from securerun.options import Options

    nobody = environment.describe_job({}, ())
    found: list[Network] = []
    for word in folded.words(peers):
        try:
            found += find_peers(Options(peers=word), nobody, environment={}).networks
        except PolicyError as error:
            print(f"securerun: left out: {error}", file=sys.stderr)
    return found


def _with(plan: Plan, more: Sequence[Network]) -> Plan:
    from securerun.linux.networks import collapse

    return replace(plan, policy=replace(plan.policy, peers=collapse((*plan.policy.peers, *more))))


def _order(plan: Plan, scope: str, slurm: SlurmJob) -> Order:
    command = printable(" ".join(plan.job.command))
    return Order(plan.policy, plan.options.firewall, scope, plan.grace, command, key=plan.key.order, slurm=slurm)


def _job_number(environment: Mapping[str, str]) -> int:
    text = environment.get("SLURM_JOB_ID", "")
    if not _NUMBER.fullmatch(text):
        raise PolicyError("SLURM_JOB_ID is no number of a job; it is Slurm that starts this")
    return int(text)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise PolicyError(f"{variable} is no number; it is Slurm that starts this")
    return int(text)
