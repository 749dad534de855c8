"""How long it takes until nothing is left: a launcher is killed with SIGKILL in the middle of its job.

Runs as root, in a network namespace of its own. Two workers listen, one of them deaf to SIGTERM, and one has a child in
a session of its own. Without a grace period (--grace 0), and for comparison what torchrun leaves running.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from findings import Finding, finding, progress, run

# After findings, which makes the tests' modules known.
from hosts import Host, Network, eventually, machine_snapshot  # isort: skip
from jobs import SECURERUN, TORCHRUN

GOAL_SECONDS = 2.0
KILLS = 7
# torchrun's workers are looked for this long; they stay.
PATIENCE_SECONDS = 3.0
WORKER = """
import os, signal, socket, subprocess, time
listener = socket.create_server(("", 0))
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "60"], start_new_session=True)
os.write(1, b"up\\n")  # in one piece, beside the other's
time.sleep(60)
"""


def kill(host: Host, launcher: list[str], script: Path) -> tuple[float, int]:
    """Seconds from SIGKILL until nothing of the job is left, and how many of its processes are left after that."""
    rules, state = host.snapshot(), machine_snapshot()
    words = ["--nnodes=1", "--nproc-per-node=2", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port=29500"]
    job = host.popen([*launcher, *words, str(script)])
    assert job.stdout is not None
    if [job.stdout.readline() for _ in range(2)] != ["up\n"] * 2:
        raise SystemExit(f"the job did not start: {job.communicate()}")
    begin = time.perf_counter()
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    patience = PATIENCE_SECONDS if launcher[0] == TORCHRUN else 10.0
    eventually(lambda: machine_snapshot() == state and not host.processes(), seconds=patience)
    seconds = time.perf_counter() - begin
    left = host.processes()
    if host.snapshot() != rules:
        raise SystemExit(f"rules were left: {host.snapshot()}")
    for pid in left:  # in a namespace of ours
        os.kill(pid, signal.SIGKILL)
    if not eventually(lambda: not host.processes(), seconds=10):
        raise SystemExit(f"what was left cannot be ended: {host.processes()}")
    job.communicate()
    return seconds, len(left)


def measure(options: argparse.Namespace) -> Iterator[Finding]:
    with Network("alone") as network, tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "worker.py"
        script.write_text(WORKER)
        host = network["alone"]
        ended = []
        for number in range(1 if options.quick else KILLS):
            ended.append(kill(host, [SECURERUN, "--grace", "0"], script))
            progress(f"kill {number + 1}: {ended[-1]}")
        _, left = kill(host, [TORCHRUN], script)
    what = "from SIGKILL of the launcher until every process, rule, cgroup and record of the job is gone"
    yield finding("ending.securerun", what, "s", [seconds for seconds, _ in ended], goal=GOAL_SECONDS)
    words = f"processes left {PATIENCE_SECONDS:g} s after SIGKILL of the launcher"
    yield finding("ending.securerun.left", f"securerun: {words}", "processes", [left for _, left in ended], goal=0)
    yield finding("ending.torchrun.left", f"torchrun: {words}", "processes", [left])


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("ending", __doc__, measure)


if __name__ == "__main__":
    main()
