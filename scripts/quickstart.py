"""Two hosts train one model, a third tries to get at them: with torchrun, then with securerun.

Started by quickstart.sh. Prints what the stranger and what a peer could connect to, and checks what is promised.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests/ground"))

from hosts import Host, MachineState, Network, eventually, finish_all, machine_snapshot  # noqa: E402
from probe import Probe  # noqa: E402

BIN = Path(sys.executable).parent
TRAIN = CHECKOUT / "examples/train.py"
JOB = CHECKOUT / "examples/two_nodes/job.sh"
LEARNED = 0.1  # the loss begins at 0.69 and ends near 0.02

Argv = list[str]


@dataclass(frozen=True)
class Counts:
    """Of `seen` listening ports, a host could connect to `reached`."""

    reached: int
    seen: int

    def __str__(self) -> str:
        return f"{self.reached} of {self.seen}"


@dataclass(frozen=True)
class Outcome:
    """What one job came to. stranger and peer: counts for IPv4 and for IPv6, over both nodes."""

    stranger: tuple[Counts, Counts]
    peer: tuple[Counts, Counts]
    loss: float


def torchrun(node_rank: int) -> Argv:
    """What examples/two_nodes/job.sh runs, but with torchrun, which knows no peers."""
    where = ["--nnodes=2", f"--node-rank={node_rank}", "--master-addr=10.77.0.1", "--master-port=6000"]
    return [str(BIN / "torchrun"), *where, "--nproc-per-node=2", str(TRAIN), "--groups=3"]


def securerun(node_rank: int) -> Argv:
    return ["env", f"NODE_RANK={node_rank}", "bash", str(JOB)]


def run_job(network: Network, commands: list[Argv]) -> Outcome:
    """Run one command on each node, and let the stranger and the peers try every port meanwhile."""
    node0, node1, stranger = network
    with ExitStack() as stack:
        outside = [stack.enter_context(Probe(stranger, node)) for node in (node0, node1)]
        inside = [stack.enter_context(Probe(*pair)) for pair in ((node0, node1), (node1, node0))]
        path = f"{BIN}:{os.environ['PATH']}"
        jobs = [node.popen(argv, env={"PATH": path}) for node, argv in zip((node0, node1), commands)]
        done = finish_all(jobs, timeout=100)
    for node, job in zip((node0, node1), done):
        if job.returncode != 0:
            raise SystemExit(f"{node.name} ended with status {job.returncode}:\n{job.stderr}")
    return Outcome(count(outside), count(inside), last_loss(done))


def count(probes: Iterable[Probe]) -> tuple[Counts, Counts]:
    """What the probes reached of what they saw, for IPv4 and for IPv6."""
    seen = [address for probe in probes for address, _ in probe.seen]
    reached = [address for probe in probes for address, _ in probe.reached]
    ipv6 = Counts(sum(":" in address for address in reached), sum(":" in address for address in seen))
    return Counts(len(reached) - ipv6.reached, len(seen) - ipv6.seen), ipv6


def last_loss(nodes: list[subprocess.CompletedProcess[str]]) -> float:
    losses = re.findall(r"^loss ([0-9.]+)$", nodes[0].stdout, re.MULTILINE)
    if not losses:
        raise SystemExit(f"the training printed no loss:\n{nodes[0].stdout}")
    return float(losses[-1])


def state_of(hosts: Iterable[Host]) -> tuple[list[dict[str, str]], list[dict[int, str]], MachineState]:
    """Firewall rules and processes of the hosts, and control groups and records of the machine."""
    hosts = list(hosts)
    return [host.snapshot() for host in hosts], [host.processes() for host in hosts], machine_snapshot()


def print_table(outcomes: dict[str, Outcome]) -> None:
    line = "{:<11}{:>10}{:>10}   {:>10}{:>10}   {:>9}".format
    print()
    print("ports of both nodes that another host could connect to, while the job ran:")
    print(line("", "stranger", "", "peer", "", ""))
    print(line("", "IPv4", "IPv6", "IPv4", "IPv6", "last loss"))
    for name, outcome in outcomes.items():
        print(line(name, *map(str, (*outcome.stranger, *outcome.peer)), f"{outcome.loss:.4f}"))
    print()


def promises(outcomes: dict[str, Outcome], as_before: bool) -> dict[str, bool]:
    plain, secured = outcomes["torchrun"], outcomes["securerun"]
    return {
        "the stranger can see what is open: it reached ports of torchrun's job": all(
            counts.reached > 0 for counts in plain.stranger
        ),
        "with securerun the stranger reached nothing": all(
            counts.reached == 0 < counts.seen for counts in secured.stranger
        ),
        "with securerun the peers reached everything": all(
            counts.reached == counts.seen > 0 for counts in secured.peer
        ),
        "the model learned the same": secured.loss == plain.loss < LEARNED,
        "afterwards the hosts were as before": as_before,
    }


def main() -> int:
    outcomes = {}
    with Network("node0", "node1", "stranger") as network:
        before = state_of(network)
        for launcher in (torchrun, securerun):
            print(f"training on two hosts with {launcher.__name__} ...", flush=True)
            outcomes[launcher.__name__] = run_job(network, [launcher(0), launcher(1)])
        as_before = eventually(lambda: state_of(network) == before, seconds=5)
    print_table(outcomes)
    kept = promises(outcomes, as_before)
    for promise, is_kept in kept.items():
        print("yes" if is_kept else "NO ", promise)
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
