"""securerunctl matrix: the communication matrix of a launch, or of a job that runs, with its addresses and ports."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Iterator, Sequence

from securerun.ctl.status import read_runs
from securerun.errors import PrivilegeError, SecurerunError, UsageError
from securerun.evidence import matrix, matrix_words
from securerun.evidence.matrix import Connection, Ends, Found
from securerun.evidence.matrix_words import Setting
from securerun.firewall.policy import Policy
from securerun.guard.protocol import mark_of
from securerun.guard.records import Record
from securerun.host import interfaces
from securerun.job.job import Job
from securerun.linux import capabilities, cgroups, packages, port_ranges, proc, sock_diag, user_namespaces
from securerun.linux.networks import Network, shown
from securerun.linux.processes import JobProcesses, Process
from securerun.linux.sock_diag import Listener, SocketsUnavailable


def print_matrix(arguments: Sequence[str], run_id: str | None, language: str, form: str) -> None:
    """Print the matrix of the launch with these arguments; without any, of a run of this host.

    run_id: which run; None for the only one. language: one of `matrix_words.LANGUAGES`; form: of `FORMATS`.
    Raises SecurerunError where the launch would be refused, and where there is no such run to look at.
    """
    if arguments and run_id is not None:
        raise UsageError("--run is for a job that runs, and the arguments are of another; write one of the two")
    connections = _of_launch(arguments) if arguments else _of_run(_find(run_id))
    found = matrix_words.rows(connections, _setting(), language)
    print(matrix_words.FORMATS[form](found, language), end="")


def _of_launch(arguments: Sequence[str]) -> list[Connection]:
    from securerun import run

    launch = run.plan(arguments)
    adds = launch.key.order is not None and not (launch.key.is_required and launch.policy.peers)
    ends = _ends(launch.policy, by_key=adds)
    store, here = _store(launch.job, ends)
    return matrix.planned(launch.job, launch.policy.ports, ends, store, here=here, public=launch.policy.public)


def _of_run(record: Record) -> list[Connection]:
    if record.is_apart:
        # Its listeners and addresses are in there, and its processes are seen from there as from here.
        user_namespaces.enter(record.launcher)
    if not record.stands_here:
        raise SecurerunError(
            f"run {record.run_id} is in another network namespace; look from there: "
            f"nsenter --target {record.launcher} --net securerunctl matrix --run {record.run_id}"
        )
    policy = record.policy
    found = list(_listeners(record))
    return matrix.running(
        policy.ports, _ends(policy, by_key=policy.admits_by_tag), found, policy.public, record.left_open
    )


def _find(run_id: str | None) -> Record:
    runs = [record for record in read_runs() if run_id in (None, record.run_id) and record.guard_lives]
    # Those of other network namespaces come into question where there is none in this one.
    found = [record for record in runs if record.stands_here or record.is_apart] or runs
    if len(found) == 1:
        return found[0]
    if run_id is not None:
        raise UsageError(f"--run {run_id}: there is no such run; see securerunctl status")
    if not found:
        raise UsageError("no job runs here; for a launch, write securerunctl matrix -- [OPTIONS] SCRIPT [ARGUMENTS]")
    raise UsageError(f"{len(found)} jobs run here; write --run and one of {', '.join(one.run_id for one in found)}")


def _listeners(record: Record) -> Iterator[Found]:
    """Yield what the processes of a run listen on, in the order of ports."""
    try:
        listeners = sock_diag.listeners()
    except SocketsUnavailable as error:
        raise SecurerunError(str(error)) from error
    processes = _processes(record)
    inodes = {listener.inode for listener in listeners}
    held, by_launcher = (set(proc.sockets_of(pids, inodes)) for pids in (processes, [record.launcher]))
    if not proc.may_be_looked_into(record.launcher):
        # A launcher is closed to its own user (linux/seclusion.py): what was made in the run's cgroup, and is held by
        # nobody who can be looked into, it holds.
        made = _made_in_cgroup(record, listeners)
        if made is None:
            advice = capabilities.run_as_root()
            raise PrivilegeError(f"the launcher of run {record.run_id} may not be looked into; {advice}")
        by_launcher = made - held
    for listener in sorted(listeners, key=lambda one: (one.port, str(one.address))):
        if listener.inode in held | by_launcher:
            yield Found(listener.address, listener.port, listener.inode in by_launcher)


def _made_in_cgroup(record: Record, listeners: Sequence[Listener]) -> set[int] | None:
    """Return the inodes of the listeners that were made in a run's cgroup; None where that cannot be told."""
    # By the inode of the cgroup sockets name it (sock_diag.cgroup_id).
    number = cgroups.inode_of(record.cgroup) if record.cgroup else None
    if number is None or (listeners and all(one.cgroup_id is None for one in listeners)):
        return None
    return {listener.inode for listener in listeners if listener.cgroup_id == number}


def _processes(record: Record) -> set[int]:
    launcher = Process(record.launcher, record.launcher_start)
    found = {process.pid for process in JobProcesses(mark_of(record.run_id), record.user, [launcher]).find()}
    if record.cgroup:
        with contextlib.suppress(OSError):
            found |= cgroups.processes_of(record.cgroup)
    return found


def _ends(policy: Policy, *, by_key: bool) -> Ends:
    """Return this node's addresses on the interfaces that peers come in through, and the peers.

    A list of nodes has this one too, which is no peer of its own. by_key: a tag of the job's key is enough to be one,
    so that where nobody is named they may be anywhere.
    """
    wanted = policy.interfaces or _towards(policy.peers) or interfaces.names()
    every = interfaces.addresses_of(interfaces.names())
    own = interfaces.addresses_of(wanted) or every or ("127.0.0.1",)
    peers = tuple(peer for peer in map(shown, policy.peers) if peer not in every)
    return Ends(own, peers or matrix.EVERY_HOST * by_key, by_key)


def _towards(peers: Iterable[Network]) -> tuple[str, ...]:
    """Return the interfaces that lead to the first peer of each family: one job meets on one network."""
    first = {network.version: str(network.network_address) for network in reversed(list(peers))}
    found = (interfaces.towards([address]) for address in first.values())
    return tuple(dict.fromkeys(name for name in found if name))


def _store(job: Job, ends: Ends) -> tuple[tuple[str, ...], bool]:
    """Return the addresses where the agents meet, and whether that is this node."""
    from securerun.job import resolver

    if job.endpoint is None:
        return ends.node, True
    if job.endpoint.is_loopback:
        return ("127.0.0.1",), True
    host = job.endpoint.host
    answer = resolver.ask((host,), resolver.addresses_of)[host]
    found = tuple(answer) if isinstance(answer, tuple) else (host,)
    own = interfaces.addresses_of(interfaces.names())
    if set(found).intersection(own):
        return found, True
    return found, job.has_one_store and job.node_rank == 0


def _setting() -> Setting:
    try:
        first, last = port_ranges.handed_out()
        ephemeral = f"{first}-{last}"
    except port_ranges.ReservationUnavailable:
        ephemeral = ""
    return Setting(socket.gethostname(), ephemeral, packages.version("torch") or "")
