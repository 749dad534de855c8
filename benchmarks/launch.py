"""How long a whole launch takes with securerun and with torchrun, and where the time goes: workers that do nothing.

Runs as root, in network namespaces of its own: one node and two nodes, two workers each, with static rendezvous and
with c10d, everything installed that securerun installs by itself. In pairs whose order alternates (AB BA), so that what
changes on the machine meanwhile meets both. A launch lasts from its start until the output of every node is closed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from findings import Finding, finding, progress, run

# After findings, which makes the tests' modules known.
from checkout import COMMANDS  # isort: skip
from hosts import Host, Network, eventually, finish_all  # isort: skip
from jobs import rendezvous

LAUNCHERS = ("torchrun", "securerun")
GOALS = {"static": 0.80, "c10d": 0.85}
GOAL_APART = 0.85
# c10d waits for a random time of up to 0.3 s: its ratio needs 30 pairs or more to settle.
PAIRS = {1: 16, 2: 8}
BREAKDOWNS = 5
WORKERS = 2
WORKER = "import os; print('worker', os.environ['RANK'])\n"
_STEPS = Path(__file__).resolve().parent / "steps.py"
_SECONDS = 180.0


def options_of(kind: str, hosts: Sequence[Host], rank: int) -> list[str]:
    """torchrun's options for one node."""
    words = [f"--nnodes={len(hosts)}", f"--nproc-per-node={WORKERS}"]
    if len(hosts) > 1:
        return [*words, *rendezvous(kind, hosts[rank], rank, hosts[0])]
    if kind == "static":
        return [*words, "--node-rank=0", "--master-addr=127.0.0.1", "--master-port=29500"]
    return [*words, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29400", "--rdzv-id=launch"]


def launch(hosts: Sequence[Host], launcher: Sequence[object], kind: str, script: Path, *, apart: bool = False) -> float:
    """Seconds until the job has ended on every node and all output is closed. apart: in a network of its own."""
    peers = ",".join(host.ipv4 for host in hosts)
    environment = {"SECURERUN_PEERS": peers} if len(hosts) > 1 else {}
    if apart:
        environment["SECURERUN_SCOPE"] = "namespace"
    begin = time.perf_counter()
    jobs = [
        host.popen([*map(str, launcher), *options_of(kind, hosts, rank), str(script)], env=environment)
        for rank, host in enumerate(hosts)
    ]
    done = finish_all(jobs, timeout=_SECONDS)
    seconds = time.perf_counter() - begin
    for host, job in zip(hosts, done):
        _require_success(host, job)
    return seconds


def _require_success(host: Host, job: subprocess.CompletedProcess[str]) -> None:
    if job.returncode != 0 or job.stdout.count("worker") != WORKERS:
        raise SystemExit(f"{job.args} ended with status {job.returncode}:\n{job.stdout}{job.stderr}")
    # The guard tidies up after the launcher has ended; the next launch shall not pay for that.
    if not eventually(lambda: not host.processes(), seconds=10):
        raise SystemExit(f"{job.args} left processes behind: {host.processes()}")


def measure_pairs(
    hosts: Sequence[Host], kind: str, script: Path, pairs: int, *, apart: bool = False
) -> Iterator[Finding]:
    taken: dict[str, list[float]] = {launcher: [] for launcher in LAUNCHERS}
    for number in range(pairs):
        for launcher in LAUNCHERS if number % 2 == 0 else LAUNCHERS[::-1]:
            taken[launcher].append(launch(hosts, [COMMANDS / launcher], kind, script, apart=apart))
        progress(f"pair {number + 1} of {pairs}: {', '.join(f'{taken[each][-1]:.2f} s' for each in LAUNCHERS)}")
    place = f"launch.{len(hosts)}x{WORKERS}.{kind}{'.apart' * apart}"
    words = f"{len(hosts)} node{'s' * (len(hosts) > 1)} with {WORKERS} workers, {kind} rendezvous"
    plain = finding(f"{place}.torchrun", f"torchrun, {words}", "s", taken["torchrun"])
    yield plain
    how = "in a network of the job's own" if apart else "with everything installed"
    goal = GOAL_APART if apart else GOALS[kind]
    yield finding(f"{place}.securerun", f"securerun {how}, {words}", "s", taken["securerun"], against=plain, goal=goal)


def measure_steps(host: Host, script: Path, directory: Path, times: int) -> Iterator[Finding]:
    """Where the time goes, on one node with static rendezvous."""
    found: dict[str, dict[str, list[float]]] = {launcher: {} for launcher in LAUNCHERS}
    for _ in range(times):
        for launcher in LAUNCHERS:
            file = directory / "steps.json"
            begin = time.monotonic()
            seconds = launch([host], [sys.executable, _STEPS, launcher, file], "static", script)
            noted = json.loads(file.read_text())
            steps = {"start Python": noted["begin"] - begin, **noted["steps"]}
            steps["exit"] = begin + seconds - noted["end"]
            steps["all else"] = seconds - sum(steps.values())
            for step, taken in steps.items():
                found[launcher].setdefault(step, []).append(taken)
    for launcher, steps_found in found.items():
        for step, samples in steps_found.items():
            yield finding(f"launch.steps.{launcher}.{step}", f"{launcher}, 1 node, static: {step}", "s", samples)


def measure(options: argparse.Namespace) -> Iterator[Finding]:
    with Network("node0", "node1") as network, tempfile.TemporaryDirectory() as name:
        script = Path(name) / "worker.py"
        script.write_text(WORKER)
        nodes = list(network)
        for hosts in (nodes[:1], nodes):
            for kind in GOALS:
                if len(hosts) == 1 and kind == "static":
                    for launcher in LAUNCHERS:  # once unmeasured, so that files are cached for both
                        launch(hosts, [COMMANDS / launcher], kind, script)
                pairs = options.pairs or (1 if options.quick else PAIRS[len(hosts)])
                yield from measure_pairs(hosts, kind, script, pairs)
                if len(hosts) == 1:
                    yield from measure_pairs(hosts, kind, script, pairs, apart=True)
        yield from measure_steps(nodes[0], script, Path(name), 1 if options.quick else BREAKDOWNS)


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("launch", __doc__, measure, pairs=True)


if __name__ == "__main__":
    main()
