"""How long a whole launch takes with securerun and with torchrun: one node, two workers that do nothing.

Runs as root, in a network namespace of its own, in pairs whose order alternates (AB BA), so that what changes on
the machine meanwhile meets both. Prints one JSON text; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hosts import Host, Network, eventually

GOAL = 0.90
BIN = Path(sys.executable).parent
WORKER = "import os; print('worker', os.environ['RANK'])\n"
RENDEZVOUS = {
    "static": ["--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port=29500"],
    # c10d waits for a random time of up to 0.3 s: its ratio needs 30 pairs or more to settle.
    "c10d": ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29400", "--rdzv-id=launch"],
}


class Pair(NamedTuple):
    torchrun: float
    securerun: float


def launch(host: Host, launcher: str, arguments: list[str]) -> float:
    """Seconds from the start of `launcher` until it has ended and its output is closed."""
    begin = time.perf_counter()
    done = host.run([BIN / launcher, *arguments], timeout=120)
    seconds = time.perf_counter() - begin
    if done.returncode != 0 or done.stdout.count("worker") != 2:
        raise SystemExit(f"{launcher} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    # The guard tidies up after the launcher has ended; the next launch shall not pay for that.
    if not eventually(lambda: not host.processes(), seconds=10):
        raise SystemExit(f"{launcher} left processes behind: {host.processes()}")
    return seconds


def measure(host: Host, arguments: list[str], pairs: int) -> list[Pair]:
    for launcher in Pair._fields:  # once unmeasured, so that files are cached for both
        launch(host, launcher, arguments)
    measured = []
    for number in range(pairs):
        order = Pair._fields if number % 2 == 0 else Pair._fields[::-1]
        measured.append(Pair(**{launcher: launch(host, launcher, arguments) for launcher in order}))
        print(f"pair {number + 1} of {pairs}: {measured[-1]}", file=sys.stderr)
    return measured


def summary(seconds: list[float]) -> dict[str, object]:
    return {
        "median": round(statistics.median(seconds), 4),
        "least": round(min(seconds), 4),
        "most": round(max(seconds), 4),
        "seconds": [round(one, 4) for one in seconds],
    }


def row(rendezvous: str, pairs: list[Pair]) -> dict[str, object]:
    torchrun, securerun = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(securerun) / statistics.median(torchrun)
    ratios = sorted(pair.securerun / pair.torchrun for pair in pairs)
    return {
        "rendezvous": rendezvous,
        "pairs": len(pairs),
        "torchrun": summary(torchrun),
        "securerun": summary(securerun),
        "ratio_of_medians": round(ratio, 4),
        "ratios_of_pairs": {
            "median": round(statistics.median(ratios), 4),
            "least": round(ratios[0], 4),
            "most": round(ratios[-1], 4),
        },
        "goal": GOAL,
        "goal_met": ratio <= GOAL,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="launches of each launcher (default: 20)")
    parser.add_argument(
        "--rendezvous", choices=RENDEZVOUS, action="append", help="only this one (default: all, one after the other)"
    )
    options = parser.parse_args()
    if not 1 <= options.pairs <= 1000:
        parser.error("--pairs must be between 1 and 1000")
    return options


def main() -> None:
    options = parse_arguments()
    with Network("alone") as network, tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "worker.py"
        script.write_text(WORKER)
        rows = [
            row(name, measure(network["alone"], [*RENDEZVOUS[name], "--nproc-per-node=2", str(script)], options.pairs))
            for name in options.rendezvous or RENDEZVOUS
        ]
    machine = {"cpus": os.cpu_count(), "kernel": os.uname().release, "python": sys.version.split()[0]}
    print(json.dumps({"launch": rows, "torch": version("torch"), **machine}, indent=2))


if __name__ == "__main__":
    main()
