"""Real training on two nodes that are named nowhere: torchrun itself behind two shields that go by tags."""

from __future__ import annotations

import sys
from dataclasses import replace

import jobs
import kernel
import pytest
from hosts import Network, finish
from probe import Probe
from tag_field import BY_TAG, shielded, tag_field

from securerun.firewall.policy import PortRange, Purpose

ENTER = "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write('0'); os.execv(sys.argv[2], sys.argv[2:])"
PLANNED = replace(BY_TAG, ports=(PortRange(jobs.PORT, jobs.PORT, Purpose.STATIC_STORE),))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_two_nodes_train_and_nobody_else_reaches_a_port(network: Network, kind: str) -> None:
    kernel.require(kernel.TAGS)
    node0, node1, stranger = network
    with tag_field(network) as field, shielded(field.job, PLANNED) as near, shielded(field.far, PLANNED) as far:
        # From the peer's host as from a stranger's: what is not in the job's cgroup has no tag.
        with Probe(stranger, node0) as outside, Probe(node1, node0) as beside:
            running = []
            for at, (node, cgroup) in enumerate(((node0, field.job), (node1, field.far))):
                launcher = [sys.executable, "-c", ENTER, str(cgroup.path), jobs.TORCHRUN]
                options = ["--nnodes", "2", "--nproc-per-node", "2", *jobs.rendezvous(kind, node, at, node0)]
                running.append(node.popen([*launcher, *options, str(jobs.TRAIN), "--groups", "3"]))
            done = [finish(each, timeout=120) for each in running]
        assert [each.returncode for each in done] == [0, 0], done
        assert jobs.last_loss(done[0].stdout) < 1
        for probe in (outside, beside):
            assert probe.reached == set() and len({port for _, port in probe.tried}) >= 5
        for held, other in ((near, node1), (far, node0)):
            assert held.tags is not None
            assert {str(address) for address in held.tags.seen().guarded} >= {other.ipv4}
            assert not list(held.tags.answers())
