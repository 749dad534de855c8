"""A plan as data, for tests that need no torch: two nodes of `hosts.Network`, or whatever else is asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from securerun.firewall.policy import Policy, PortRange
from securerun.job.entrance import Entrance
from securerun.job.job import Endpoint, Job
from securerun.job.peers import Peers
from securerun.job.tasks import Task
from securerun.linux.networks import collapse
from securerun.options import Options
from securerun.protection.plan import Plan

RUN = "0123456789ab"
PORTS = (PortRange(29500, 29500, "master port (static rendezvous)"), PortRange(60000, 60015, "HCCL"))
PEERS = ("10.77.0.2", "fd77::2")
COMMAND = ("train.py", "--lr", "0.1")


def plan(
    peers: Sequence[str] = PEERS,
    ports: tuple[PortRange, ...] = PORTS,
    job: Job | None = None,
    interfaces: tuple[str, ...] = (),
    task: Task = Task(),  # noqa: B008 - it cannot be changed
    **options: Any,  # noqa: ANN401 - whatever the option holds
) -> Plan:
    """The plan of node 0, with these options of securerun's."""
    networks = collapse(ipaddress.ip_network(peer) for peer in peers)
    asked = Options(peers=",".join(peers), **options)
    policy = Policy(RUN, ports, networks, interfaces, asked.accept, close_loopback=asked.loopback == "job")
    nodes = Job("static", Endpoint("10.77.0.1", 29500), 2, 2, 0, COMMAND)
    found, entrance = Peers(networks, "--peers"), Entrance(interfaces, "--interface")
    return Plan(
        job=job or nodes,
        options=asked,
        peers=found,
        entrance=entrance,
        policy=policy,
        whitelist=(),
        umask=0o027,
        grace=10.0,
        task=task,
    )


def with_command(made: Plan, *command: str) -> Plan:
    """The same plan of another command."""
    return replace(made, job=replace(made.job, command=command))
