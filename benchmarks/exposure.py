"""How many ports of a job a stranger can connect to: torchrun, torchrun behind a script for one port, securerun.

Runs as root. Two hosts made of network namespaces train with c10d rendezvous on port 29500, two workers each, and three
extra process groups; a third host tries every listening port of both ten times a second all the while, over IPv4 and
IPv6, and so does each node with the other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from findings import Finding, finding, progress, run

# After findings, which makes the tests' modules known.
from hosts import Host, Network, finish_all  # isort: skip
from jobs import PORT, SECURERUN, TORCHRUN, start_on_both
from probe import Probe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from quickstart import Counts, count

JOB_SECONDS = 120.0
WAYS = ("torchrun", "one-port script", "securerun")


def close_one_port(node: Host, peer: Host) -> None:
    """The well-known script: the master port for the peer, and for nobody else. It knows of IPv4 alone."""
    for rule in (["-s", peer.ipv4, "-j", "ACCEPT"], ["!", "-i", "lo", "-j", "DROP"]):
        node.run(["iptables", "-A", "INPUT", "-p", "tcp", "--dport", str(PORT), *rule], check=True)


def count_ports(way: str) -> tuple[tuple[Counts, Counts], tuple[Counts, Counts]]:
    """What the stranger, and what a peer, could connect to of all ports of both nodes, over IPv4 and over IPv6."""
    with Network("node0", "node1", "stranger") as network, ExitStack() as stack:
        node0, node1, stranger = network
        nodes = [node0, node1]
        if way == "one-port script":
            close_one_port(node0, node1)
            close_one_port(node1, node0)
        outside = [stack.enter_context(Probe(stranger, node)) for node in nodes]
        inside = [stack.enter_context(Probe(*pair)) for pair in ((node0, node1), (node1, node0))]
        environment = {"SECURERUN_PEERS": f"{node0.ipv4},{node1.ipv4},{node0.ipv6},{node1.ipv6}"}
        launcher = [SECURERUN if way == "securerun" else TORCHRUN]
        done = finish_all(start_on_both(nodes, "c10d", launcher=launcher, env=environment), timeout=JOB_SECONDS)
        for node, job in zip(nodes, done):
            if job.returncode != 0:
                raise SystemExit(f"{node.name} ended with status {job.returncode}:\n{job.stderr}")
        stack.close()
        return count(outside), count(inside)


def measure(_options: argparse.Namespace) -> Iterator[Finding]:
    for way in WAYS:
        progress(f"training with {way} ...")
        stranger, peer = count_ports(way)
        for whom, counts in (("stranger", stranger), ("peer", peer)):
            for family, each in zip(("IPv4", "IPv6"), counts):
                name = f"exposure.{way}.{whom}.{family}"
                what = f"{way}: {family} ports of both nodes that a {whom} could connect to"
                goal = 0 if (way, whom) == ("securerun", "stranger") else None
                yield finding(name, what, "ports", [each.reached], goal=goal)
                yield finding(
                    f"{name}.seen", f"{way}: {family} ports that both nodes listened on", "ports", [each.seen]
                )


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("exposure", __doc__, measure)


if __name__ == "__main__":
    main()
