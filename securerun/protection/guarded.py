"""What a launch is protected by, whatever it starts: a lease of its own, the lease that it is in already, or nothing.

Job → policy → lease → the job → release, and what is said on the way. Who starts the job in between is another's part.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable

from securerun.console import say
from securerun.firewall.policy import Policy, PortRange
from securerun.guard.protocol import Notice, Order
from securerun.host import interfaces
from securerun.job.renewal import Renewal
from securerun.linux import signals
from securerun.protection import enclosing
from securerun.protection.client import Guard
from securerun.protection.enclosing import Enclosing
from securerun.protection.events import Finished, Gone, Hear, Installed, Renewed, nobody
from securerun.text import printable

if TYPE_CHECKING:
    from securerun.job.entrance import Entrance
    from securerun.job.job import Job
    from securerun.job.peers import Peers
    from securerun.options import Options

_COMMAND_SHOWN = 1000


@dataclass(frozen=True)
class Launch:
    """One launch, understood: the job, what the user asked of securerun, and the policy of both.

    whitelist: the addresses that HCCL itself is to accept; empty where it is not asked to.
    umask: the one in force. grace: seconds between SIGTERM and SIGKILL for what a failed job leaves behind.
    """

    job: Job
    options: Options
    peers: Peers
    entrance: Entrance
    policy: Policy
    whitelist: tuple[str, ...]
    umask: int
    grace: float


def understand(job: Job, asked: Options, umask: int, known: Iterable[PortRange] = (), ranks: int = 0) -> Launch:
    """Job → policy. Any doubt is an error here, before anything was started.

    known: ports that the job is known to listen on, beside those that the job, HCCL and the user name.
    ranks: how many this node has, as far as that is known.
    Raises PolicyError or UsageError.
    """
    from securerun import options
    from securerun.job import entrance, peers, ports

    interfaces.require(interfaces.parse(asked.interface), asked.interface_source)
    grace = options.seconds(asked.grace, asked.grace_source)
    planned = ports.plan_ports(job, os.environ, asked.ports, asked.ports_source, known)
    # Last, since it may wait for names; nothing that is wrong is to be found after that.
    found = _everyone() if asked.unprotected and not asked.hccl_whitelist else peers.find_peers(asked, job, tell=say)
    if found.ports:
        planned = ports.plan_ports(job, os.environ, asked.ports, asked.ports_source, (*known, *found.ports))
    found = replace(found, warnings=(*found.warnings, *entrance.warnings(os.environ, found.networks)))
    way_in = entrance.entrance(asked, os.environ, found.networks)
    policy = Policy(
        secrets.token_hex(6),
        planned,
        found.networks,
        way_in.names,
        asked.accept,
        close_loopback=asked.loopback == "job",
    )
    return Launch(job, asked, found, way_in, policy, _whitelist(job, asked, found, ranks), umask, grace)


def policy(
    peers: str | Iterable[str] | None = None,
    ports: str | Iterable[int | str] | None = None,
    interface: str | Iterable[str] | None = None,
    *,
    loopback: str = "any",
    accept: bool = False,
) -> Policy:
    """The policy of a job that this process begins by itself, for `securerun.guarded`.

    The arguments are those of the command line, or lists of them: peers=["node0", "10.0.0.0/24"], ports=[7000]. What
    is not given comes from the environment, the batch system and the site file, as for `securerunctl exec`.
    Raises PolicyError or UsageError, in one line, for what cannot be right, and where the peers are not known.
    """
    from securerun import options
    from securerun.job import environment

    given = {"peers": peers, "ports": ports, "interface": interface}
    taken: dict[str, options.Value] = {name: _listed(value) for name, value in given.items() if value is not None}
    taken["loopback"] = loopback
    if accept:
        taken["accept"] = True
    job = environment.describe_job(os.environ, sys.argv)
    asked = options.resolve(taken, os.environ)
    return understand(job, asked, 0, environment.known_ports(os.environ)).policy


def print_plan(launch: Launch) -> None:
    """Print all that a launch would do, on standard output."""
    from securerun.guard import cgroup
    from securerun.protection import ways, words

    for warning in launch.peers.warnings:
        say(warning)
    obstacles = {way.name: way.obstacle for way in ways.ways()}
    origin = words.origin(obstacles, may_leave=cgroup.may_leave_shared_cgroups())
    plan = words.plan(launch.job, launch.policy, launch.peers, launch.entrance, launch.options, launch.umask, origin)
    print(plan, end="")
    if launch.whitelist:
        from securerun.job import hccl_whitelist

        print(f"\n# {hccl_whitelist.FILE}\n{hccl_whitelist.content(launch.whitelist)}")


@contextmanager
def reported(asked: Options, command: Sequence[str], began: float) -> Iterator[Hear]:
    """Write a report of the block, if one is asked for, from what is told to the function that is yielded.

    began: when the launcher started, in seconds since the epoch.
    Raises UsageError, before the block, for a report that could not be written.
    """
    if asked.report is None or asked.dry_run:
        yield nobody
        return
    from securerun.evidence import report

    with report.kept(asked.report, asked.report_source, command, began) as journal:
        yield journal.hear


@contextmanager
def protected(
    launch: Launch, guard: Guard | None, hear: Hear = nobody, *, may_leave_job: bool = False
) -> Iterator[None]:
    """Protect this process and all that it starts in the block, as the launch asks; `guard` is one made early.

    may_leave_job: whether a block that ends well may have left the job running, as with nohup. One that raises is a job
    that failed. Raises PrivilegeError or PolicyError, with nothing installed, when the job cannot be guarded.
    """
    for warning in launch.peers.warnings:
        say(warning)
    hear(launch)
    with _whitelisted(launch, may_leave_job) as change_whitelist, _layers(launch, guard, change_whitelist, hear):
        yield


def rely_on(run: Enclosing, asked: Options) -> None:
    """Have the lease of the run that this process is in protect a launch too, and say so.

    Raises PolicyError for a launch that insists on more than that run has.
    """
    from securerun.protection import words

    say(words.relying(run.run_id, enclosing.without_effect(asked, run)))


def _layers(
    launch: Launch, guard: Guard | None, change_whitelist: Callable[[Peers], None], hear: Hear
) -> AbstractContextManager[None]:
    if launch.options.unprotected:
        return _unprotected(hear)
    return _guarded(guard or Guard(), launch, change_whitelist, hear)


def forbid_code_in_weights(asked: Options) -> None:
    """Have workers load weights alone, where --weights-only asks for it. Raises PolicyError."""
    if asked.weights_only:
        from securerun.job import weights

        weights.forbid_code(os.environ)


@contextmanager
def _guarded(guard: Guard, launch: Launch, change_whitelist: Callable[[Peers], None], hear: Hear) -> Iterator[None]:
    """Have this process guarded; let the guard go when the job is over, and say who was turned away."""
    from securerun.protection import words

    policy, asked = launch.policy, launch.options
    command = printable(" ".join(launch.job.command)[:_COMMAND_SHOWN])

    def change_peers(before: Peers, now: Peers) -> None:
        guard.change_peers(now.networks)
        change_whitelist(now)
        hear(Renewed(before, now))
        say(words.renewed(before, now))

    renewal = Renewal(launch.peers, change_peers)
    order = Order(policy, asked.firewall, asked.scope, launch.grace, command)
    guarding = guard.guard(order, _teller(renewal, hear))
    hear(Installed(guarding, guard.way))
    shield = guarding.has_shield
    os.environ[enclosing.TERMS_VARIABLE] = enclosing.terms(asked, shield=shield)
    for line in words.start(policy, launch.peers, launch.entrance, guarding, launch.umask, guard.way):
        say(line)
    failed = True
    try:
        with renewal:
            yield
        failed = False
    finally:
        # A second Ctrl-C would end the farewell in its middle: the guard needs none, but the user misses the summary.
        with signals.held_back():
            hear(Finished(failed))
            _say_farewell(guard, policy, failed, hear)


def _whitelist(job: Job, asked: Options, found: Peers, ranks: int) -> tuple[str, ...]:
    if not asked.hccl_whitelist:
        return ()
    from securerun.job import hccl_whitelist

    return hccl_whitelist.addresses_of(found.listed, job.max_nodes, ranks)


@contextmanager
def _whitelisted(launch: Launch, may_leave_job: bool) -> Iterator[Callable[[Peers], None]]:
    """HCCL's own list, where it is asked for. Yields what takes the peers when their addresses change."""
    if not launch.whitelist:
        yield lambda _: None
        return
    from securerun.job import hccl_whitelist

    def change(now: Peers) -> None:
        try:
            made.change(hccl_whitelist.addresses_of(now.listed))
        except OSError as error:
            say(f"HCCL's list cannot be changed ({error}), so HCCL turns the new addresses away")

    with hccl_whitelist.whitelisted(launch.whitelist, os.environ, may_leave_job=may_leave_job) as made:
        say(f"HCCL accepts {len(launch.whitelist)} addresses by {made.path}; every node needs --hccl-whitelist")
        yield change


@contextmanager
def _unprotected(hear: Hear) -> Iterator[None]:
    """Warn before and after, so that it stands at both ends of a long log."""
    from securerun.protection import words

    say(words.unprotected())
    failed = True
    try:
        yield
        failed = False
    finally:
        hear(Finished(failed))
        say(words.unprotected())


def _everyone() -> Peers:
    from securerun.job.peers import EVERY_HOST, Peers

    return Peers(EVERY_HOST, "--unprotected")


def _listed(value: str | Iterable[int | str]) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value))


def _teller(renewal: Renewal, hear: Hear) -> Callable[[Notice], None]:
    """What takes the news from the guard, while the job runs."""
    from securerun.protection import words

    def tell(notice: Notice) -> None:
        hear(notice)
        for line in words.news(notice):
            say(line)
        if notice.denied:
            renewal.hurry()

    return tell


def _say_farewell(guard: Guard, policy: Policy, failed: bool, hear: Hear) -> None:
    from securerun.protection import words

    released = guard.release(failed)
    hear(released or Gone())
    for line in words.end(policy, released.denied if released else None):
        say(line)
