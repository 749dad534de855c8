"""The plan of one job: what was understood of it, and the policy that follows. Data, and how it is made."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Callable

from securerun.console import say
from securerun.firewall.policy import Opening, Policy, PortRange
from securerun.host import interfaces

if TYPE_CHECKING:
    from securerun.guard.protocol import KeyOrder
    from securerun.job.entrance import Entrance
    from securerun.job.job import Job
    from securerun.job.key import Key
    from securerun.job.peers import Peers
    from securerun.job.tasks import Task
    from securerun.options import Options, Value


def _no_key() -> Key:
    from securerun.job.key import Key

    return Key()


@dataclass(frozen=True)
class Plan:
    """What is to be done for one job: the job, what the user asked of securerun, and the policy of both.

    whitelist: the addresses that HCCL itself is to accept; empty where it is not asked to.
    key: what the nodes know each other by, as far as this side knows.
    umask: the one in force. grace: seconds between SIGTERM and SIGKILL for what a failed job leaves behind.
    task: which of the node's tasks this launcher is; what all of them would say alike only the first one says.
    """

    job: Job
    options: Options
    peers: Peers
    entrance: Entrance
    policy: Policy
    whitelist: tuple[str, ...]
    umask: int
    grace: float
    task: Task
    key: Key = field(default_factory=_no_key)

    @property
    def goes_by_key(self) -> bool:
        """Whether a tag of the job's key is the only way in."""
        return self.key.is_required and not self.policy.peers

    @property
    def nodes(self) -> int:
        """How many nodes the job has, for people; 0 where nothing says so."""
        return self.key.order.nodes if self.key.order is not None else self.job.max_nodes

    @cached_property
    def policy_by_key(self) -> Policy:
        """The policy as a guard makes it that has the key, to be shown."""
        order = self.key.order
        if order is None:
            return self.policy
        from securerun.firewall import tagging
        from securerun.linux import addresses

        try:
            own = addresses.own().networks
        except OSError:  # which the guard will say
            return self.policy
        return tagging.by_key(
            self.policy, own, required=order.required, towards=order.towards, through_any=order.through_any
        )

    def without(self, ranges: Iterable[tuple[int, int]]) -> Plan:
        """Return the plan as it is in force, without ports that nobody asked for and the guard has left out."""
        ports = {port for first, last in ranges for port in range(first, last + 1)}
        return replace(self, policy=self.policy.without(ports))


def understand(job: Job, asked: Options, umask: int) -> Plan:
    """Make a job's policy. Any doubt is an error here, before anything was started.

    Raises PolicyError or UsageError.
    """
    from securerun import options
    from securerun.job import entrance, key, meeting, ports, tasks, untold
    from securerun.job.libraries import Variables

    interfaces.require(interfaces.parse(asked.interface), asked.interface_source)
    grace = options.seconds(asked.grace, asked.grace_source)
    variables = Variables(os.environ)
    public = _Public(asked)
    planned = public.within(ports.plan_ports(job, os.environ, asked.ports, asked.ports_source, variables=variables))
    task = tasks.of_environment(os.environ)
    tell = say if task.is_first else _keep_quiet
    # Last, since it may wait for names; nothing that is wrong is to be found after that.
    of_job = key.Key() if asked.unprotected else key.find(asked, job, os.environ)
    doubts = (of_job.doubt,) if of_job.doubt else ()
    found, of_job = _who_comes(asked, job, of_job, tell)
    if of_job.order is not None:
        of_job = of_job.met_at(meeting.addresses(job))
    if found.ports:
        known = found.ports
        planned = public.within(ports.plan_ports(job, os.environ, asked.ports, asked.ports_source, known, variables))
    warnings = tuple(entrance.warnings(os.environ, found.networks, variables))
    way_in = entrance.entrance(asked, os.environ, found.listed or found.networks, variables)
    if of_job.is_required and not found.networks and asked.interface is None:
        way_in = replace(way_in, reason="whoever has the job's key")
    if asked.interface is None:
        of_job = of_job.through_any()
    listed = found.listed or found.networks
    of_addresses = (*meeting.warnings(job, asked, listed), *untold.warnings(job, os.environ, listed))
    found = replace(
        found, warnings=(*doubts, *found.warnings, *warnings, *way_in.warnings, *of_addresses, *variables.warnings)
    )
    policy = Policy(
        run_id=os.urandom(6).hex(),
        ports=planned,
        peers=found.networks,
        interfaces=way_in.names,
        accept=asked.accept,
        close_loopback=asked.loopback == "job",
        public=public.openings,
    )
    return Plan(
        job=job,
        options=asked,
        peers=found,
        entrance=way_in,
        policy=policy,
        whitelist=_whitelist(job, asked, found),
        umask=umask,
        grace=grace,
        task=task,
        key=of_job,
    )


def _who_comes(asked: Options, job: Job, of_job: Key, tell: Callable[[str], None]) -> tuple[Peers, Key]:
    """Return who may come to a job that has this key, and what becomes of the key.

    Where nobody names the other nodes, its tag is the only way in; and where a tag is insisted on, who a batch system
    or a rank table names is of no account: others are on their hosts as well. Where it is known that no other host has
    a part in the job, or none is to come (`--peers localhost`), a key would let one in, and there is none.
    Raises PolicyError as `find_peers` does.
    """
    from securerun.job import peers
    from securerun.job.key import Key

    if asked.unprotected and not asked.hccl_whitelist:
        return _everyone(), of_job
    by_key = peers.Peers((), "whoever has the job's key")
    if of_job.is_required and asked.peers is None and not asked.hccl_whitelist:
        return by_key, of_job
    try:
        found = peers.find_peers(asked, job, tell=tell)
        return found, of_job if found.networks else Key()
    except peers.Unnamed as error:
        # What the command has others start is in no cgroup of ours, and shows no tag.
        if of_job.order is None or asked.hccl_whitelist or job.elsewhere:
            if of_job.doubt:
                raise peers.Unnamed(f"{error}; {of_job.doubt}") from error
            raise
        return by_key, of_job.required()


def policy(
    peers: str | Iterable[str] | None = None,
    ports: str | Iterable[int | str] | None = None,
    interface: str | Iterable[str] | None = None,
    *,
    public: str | Iterable[int | str] | None = None,
    loopback: str | None = None,
    accept: bool = False,
    key: str | None = None,
) -> Policy:
    """Make the policy of a job that this process begins by itself, for `securerun.guarded`.

    The arguments are those of the command line, or lists of them: peers=["node0", "10.0.0.0/24"], ports=[7000],
    public=["8080=10.0.0.0/8", 9100]. What is not given comes from the environment, the batch system and the site file,
    as for `securerunctl exec`; but a key is off where none of them says another. key: as for --key; give `guarded` the
    same.
    Raises PolicyError or UsageError, in one line, for what cannot be right, and where the peers are not known.
    """
    from securerun.job import environment

    given = {"peers": peers, "ports": ports, "interface": interface}
    lists = {name: _listed(value) for name, value in given.items() if value is not None}
    if public is not None:
        lists["public"] = _listed(public, ";")
    asked = asked_by_program(**lists, loopback=loopback, key=key, accept=accept or None)
    job = environment.describe_job(os.environ, sys.argv)
    return understand(job, asked, umask=0).policy


def asked_by_program(**given: Value | None) -> Options:
    """Return the options of a run that this process begins by itself: as for `securerunctl exec`, but without a key.

    given: by their keys; what is None comes from the environment or the site file, and a key from there is one.
    Raises UsageError for a value that an option does not take.
    """
    from securerun import options

    asked = options.resolve({key: value for key, value in given.items() if value is not None}, os.environ)
    return asked if "key" in asked.origins else replace(asked, key="off")


def key_order(asked: Options) -> KeyOrder | None:
    """Return what a guard is told of the key of a job that this process begins by itself; None for no key.

    Raises PolicyError or UsageError.
    """
    if asked.key == "off":
        return None
    from securerun.job import environment, meeting
    from securerun.job.key import find

    job = environment.describe_job(os.environ, sys.argv)
    found = find(asked, job, os.environ)
    return None if found.order is None else found.met_at(meeting.addresses(job)).order


def _whitelist(job: Job, asked: Options, found: Peers) -> tuple[str, ...]:
    if not asked.hccl_whitelist:
        return ()
    from securerun.job import hccl_whitelist

    return hccl_whitelist.addresses_of(found.listed, job.max_nodes, job.ranks)


class _Public:
    """The public ports that the user asked for, which few do. Raises PolicyError for what cannot be right."""

    def __init__(self, asked: Options) -> None:
        self.openings: tuple[Opening, ...] = ()
        self._source = asked.public_source
        if asked.public is not None:
            from securerun.job import public

            self.openings = public.openings(asked.public, asked.public_source)

    def within(self, planned: tuple[PortRange, ...]) -> tuple[PortRange, ...]:
        """Return a port plan with them. Raises PolicyError where one is a port of the job's own."""
        if not self.openings:
            return planned
        from securerun.job import public

        return public.within(planned, self.openings, self._source)


def _keep_quiet(_: str) -> None:
    """Leave it to the first task of this node to say."""


def _everyone() -> Peers:
    from securerun.job.peers import EVERY_HOST, Peers

    return Peers(EVERY_HOST, "--unprotected")


def _listed(value: str | Iterable[int | str], separator: str = ",") -> str:
    return value if isinstance(value, str) else separator.join(map(str, value))
