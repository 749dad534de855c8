"""What a guard takes while a job runs and nothing happens: memory, and processor time over a minute.

Runs as root, in network namespaces of its own: one idle job with 1 peer and one with 10,000, side by side, with all
layers that securerun installs by itself. And how long such a job waits for its lease, from the order to the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

from findings import Finding, finding, run

# After findings, which makes the tests' modules known.
from hosts import RECORDS, Host, Network  # isort: skip

GOAL_MILLISECONDS_A_MINUTE = 300.0
GOAL_MEBIBYTES = {1: 32.0, 10_000: 64.0}
IDLE_SECONDS = 60.0
LEASES = 5
# The whole of an idle job: argv is how many peers, and where the benchmarks are.
# And of one that is given back at once, whose one peer is named, and whose secret of a key, or nothing.
LEASE = """
import ipaddress, sys, time
from securerun.firewall.job_key import JobSecret
from securerun.firewall.policy import Policy, PortRange, collapse
from securerun.guard.protocol import KeyOrder, Order
from securerun.protection.client import Guard
peers = collapse([ipaddress.ip_network(sys.argv[1])])
secret = bytes.fromhex(sys.argv[3])
key = KeyOrder(required=False, secret=JobSecret(secret)) if secret else None
policy = Policy(sys.argv[2], (PortRange(29500, 29500, "master port"),), peers)
guard = Guard(brings_key=bool(secret))
time.sleep(0.5)  # as importing torch takes longer than a guard needs to be ready
begin = time.perf_counter()
guarding = guard.guard(Order(policy, "auto", "auto", 0.0, "lease", key=key), lambda notice: None)
print(time.perf_counter() - begin, flush=True)
assert bool(guarding.fingerprint) == bool(secret), guarding
guard.release(False)
"""
JOB = """
import sys, time
sys.path.insert(0, sys.argv[2])
from layers import PORTS, RUN, addresses
from securerun.firewall.policy import Policy, collapse
from securerun.guard.protocol import Order
from securerun.protection.client import Guard
policy = Policy(sys.argv[3], PORTS, collapse(addresses(int(sys.argv[1]), "random")))
guard = Guard()
time.sleep(0.5)  # as importing torch takes longer than a guard needs to be ready
begin = time.perf_counter()
guard.guard(Order(policy, "auto", "auto", 0.0, "idle"), lambda notice: None)
print(time.perf_counter() - begin, flush=True)
sys.stdin.read()
guard.release(False)
"""


class Idle:
    """An idle job under a lease."""

    def __init__(self, network: Network, name: str, peers: int, run_id: str) -> None:
        command = [sys.executable, "-c", JOB, str(peers), str(Path(__file__).resolve().parent), run_id]
        self._process: Popen[str] = network[name].popen(command, stdin=PIPE)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the job did not start: {self._process.communicate()[1]}")
        self.lease_seconds = float(answer)
        self.guard = int(json.loads((RECORDS / f"{run_id}.json").read_text())["guard"])

    def processor_seconds(self) -> float:
        """What the guard has run so far (/proc/PID/schedstat, nanoseconds)."""
        return int(Path(f"/proc/{self.guard}/schedstat").read_text().split()[0]) / 1e9

    def mebibytes(self, kind: str) -> float:
        """Pss or Rss (/proc/PID/smaps_rollup, kB)."""
        text = Path(f"/proc/{self.guard}/smaps_rollup").read_text()
        found = re.search(rf"^{kind}: +([0-9]+) kB$", text, re.MULTILINE)
        assert found is not None
        return int(found.group(1)) / 1024

    def end(self) -> None:
        self._process.communicate("")
        if self._process.returncode != 0:
            raise SystemExit(f"the job ended with status {self._process.returncode}")


def lease_seconds(host: Host, peer: str, run_id: str, secret: str) -> float:
    """How long one order takes that is given back at once. secret: of the key that it has, in digits, or nothing."""
    done = host.run([sys.executable, "-c", LEASE, peer, run_id, secret], check=True)
    return float(done.stdout)


def measure(options: argparse.Namespace) -> Iterator[Finding]:
    seconds = 2.0 if options.quick else IDLE_SECONDS
    leases: dict[int, list[float]] = {count: [] for count in GOAL_MEBIBYTES}
    with Network(*(f"peers{count}" for count in GOAL_MEBIBYTES)) as network:
        for number in range(1 if options.quick else LEASES):
            jobs = {}
            for place, count in enumerate(GOAL_MEBIBYTES):
                jobs[count] = Idle(network, f"peers{count}", count, f"{16 * number + place:012x}")
                leases[count].append(1000 * jobs[count].lease_seconds)
            if number == 0:
                yield from measure_idle(jobs, seconds)
            for job in jobs.values():
                job.end()
    for count, samples in leases.items():
        yield finding(f"guard.lease.{count}", f"from the order to the answer, {count} peers", "ms", samples)


def measure_idle(jobs: dict[int, Idle], seconds: float) -> Iterator[Finding]:
    time.sleep(1.0)  # what happens once is over
    before = {count: job.processor_seconds() for count, job in jobs.items()}
    time.sleep(seconds)
    for count, job in jobs.items():
        words = f"guard of an idle job with {count} peer{'s' * (count > 1)}"
        used = (job.processor_seconds() - before[count]) * 1000 * 60 / seconds
        what = f"{words}: processor time of a minute, measured over {seconds:g} s"
        yield finding(f"guard.processor.{count}", what, "ms", [used], goal=GOAL_MILLISECONDS_A_MINUTE)
        what = f"{words}: memory of its own and its part of what is shared (PSS)"
        yield finding(f"guard.pss.{count}", what, "MiB", [job.mebibytes("Pss")], goal=GOAL_MEBIBYTES[count])
        yield finding(f"guard.rss.{count}", f"{words}: memory, all of it (RSS)", "MiB", [job.mebibytes("Rss")])


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("guard", __doc__, measure)


if __name__ == "__main__":
    main()
