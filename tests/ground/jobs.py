"""Real jobs for tests: examples/train.py behind securerun or torchrun, on hosts of `hosts.Network`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence

from checkout import CHECKOUT, COMMANDS
from hosts import Host, eventually, is_alive

SECURERUN = str(COMMANDS / "securerun")
TORCHRUN = str(COMMANDS / "torchrun")
TRAIN = CHECKOUT / "examples/train.py"
PORT = 29500


def rendezvous(kind: str, node: Host, rank: int, master: Host) -> list[str]:
    """torchrun's options for one node of a two-node job."""
    if kind == "static":
        return ["--node-rank", str(rank), "--master-addr", master.ipv4, "--master-port", str(PORT)]
    # The host name of a namespace resolves to no address of it, so c10d has to be told who hosts the store.
    is_host = ["--rdzv-conf", "is_host=1"] if node is master else ["--rdzv-conf", "is_host=0"]
    local = ["--local-addr", node.ipv4]
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master.ipv4}:{PORT}", "--rdzv-id", "test", *is_host, *local]


def start_on_both(
    nodes: Sequence[Host],
    kind: str,
    *,
    launcher: Sequence[str],
    script: Sequence[str] = (str(TRAIN), "--groups", "3"),
    workers: int = 2,
    env: Mapping[str, str | None] | None = None,
) -> list[subprocess.Popen[str]]:
    """Start one job on all nodes; the first is the master."""
    return [
        node.popen(
            [
                *launcher,
                *("--nnodes", str(len(nodes)), "--nproc-per-node", str(workers)),
                *rendezvous(kind, node, rank, nodes[0]),
                *script,
            ],
            env=env,
        )
        for rank, node in enumerate(nodes)
    ]


def kill_with_guard(launcher: subprocess.Popen[str], guard: int) -> None:
    """SIGKILL a launcher and its guard; held still first, it cannot start another guard in between."""
    launcher.send_signal(signal.SIGSTOP)
    os.kill(guard, signal.SIGKILL)
    launcher.kill()
    launcher.wait()
    assert eventually(lambda: not is_alive(guard))


def last_loss(output: str) -> float:
    """The loss that rank 0 of examples/train.py printed last."""
    found = re.findall(r"^loss ([0-9.]+)$", output, re.MULTILINE)
    assert found, output
    return float(found[-1])
