"""The plan of one job: what was understood of it, and the policy that follows. Data, and how it is made."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from securerun.console import say
from securerun.firewall.policy import Opening, Policy, PortRange
from securerun.host import interfaces

if TYPE_CHECKING:
    from securerun.job.entrance import Entrance
    from securerun.job.job import Job
    from securerun.job.peers import Peers
    from securerun.job.tasks import Task
    from securerun.options import Options


@dataclass(frozen=True)
class Plan:
    """What is to be done for one job: the job, what the user asked of securerun, and the policy of both.

    whitelist: the addresses that HCCL itself is to accept; empty where it is not asked to.
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

    def without(self, ranges: Iterable[tuple[int, int]]) -> Plan:
        """Return the plan as it is in force, without ports that nobody asked for and the guard has left out."""
        ports = {port for first, last in ranges for port in range(first, last + 1)}
        return replace(self, policy=self.policy.without(ports))


def understand(job: Job, asked: Options, umask: int) -> Plan:
    """Make a job's policy. Any doubt is an error here, before anything was started.

    Raises PolicyError or UsageError.
    """
    from securerun import options
    from securerun.job import entrance, meeting, peers, ports, tasks, untold
    from securerun.job.libraries import Variables

    interfaces.require(interfaces.parse(asked.interface), asked.interface_source)
    grace = options.seconds(asked.grace, asked.grace_source)
    variables = Variables(os.environ)
    public = _Public(asked)
    planned = public.within(ports.plan_ports(job, os.environ, asked.ports, asked.ports_source, variables=variables))
    task = tasks.of_environment(os.environ)
    tell = say if task.is_first else _keep_quiet
    # Last, since it may wait for names; nothing that is wrong is to be found after that.
    found = _everyone() if asked.unprotected and not asked.hccl_whitelist else peers.find_peers(asked, job, tell=tell)
    if found.ports:
        known = found.ports
        planned = public.within(ports.plan_ports(job, os.environ, asked.ports, asked.ports_source, known, variables))
    warnings = tuple(entrance.warnings(os.environ, found.networks, variables))
    way_in = entrance.entrance(asked, os.environ, found.listed or found.networks, variables)
    listed = found.listed or found.networks
    of_addresses = (*meeting.warnings(job, asked, listed), *untold.warnings(job, os.environ, listed))
    found = replace(found, warnings=(*found.warnings, *warnings, *way_in.warnings, *of_addresses, *variables.warnings))
    policy = Policy(
        run_id=secrets.token_hex(6),
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
    )


def policy(
    peers: str | Iterable[str] | None = None,
    ports: str | Iterable[int | str] | None = None,
    interface: str | Iterable[str] | None = None,
    *,
    public: str | Iterable[int | str] | None = None,
    loopback: str = "any",
    accept: bool = False,
) -> Policy:
    """Make the policy of a job that this process begins by itself, for `securerun.guarded`.

    The arguments are those of the command line, or lists of them: peers=["node0", "10.0.0.0/24"], ports=[7000],
    public=["8080=10.0.0.0/8", 9100]. What is not given comes from the environment, the batch system and the site file,
    as for `securerunctl exec`.
    Raises PolicyError or UsageError, in one line, for what cannot be right, and where the peers are not known.
    """
    from securerun import options
    from securerun.job import environment

    given = {"peers": peers, "ports": ports, "interface": interface}
    taken: dict[str, options.Value] = {name: _listed(value) for name, value in given.items() if value is not None}
    taken["loopback"] = loopback
    if public is not None:
        taken["public"] = _listed(public, ";")
    if accept:
        taken["accept"] = True
    job = environment.describe_job(os.environ, sys.argv)
    asked = options.resolve(taken, os.environ)
    return understand(job, asked, umask=0).policy


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
