"""A job that grows and shrinks while it runs: who joins it has its key, and no address of theirs was ever named."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from hosts import Host, Network, eventually, finish, finish_all
from key_homes import make_homes
from probe import Probe
from torchless import needs_torch

# Says RESTARTS.RANK.SIZE once its group has met, and adds ranks up until there is a file `over`, or somebody is gone.
GENERATION = """
import os, pathlib, sys, time, torch, torch.distributed as dist
place = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
over = torch.zeros(1)
dist.all_reduce(over)
(place / f"{os.environ['TORCHELASTIC_RESTART_COUNT']}.{rank}.{size}").touch()
while not over.item():
    time.sleep(0.05)
    over = torch.tensor([float(rank == 0 and (place / "over").exists())])
    dist.all_reduce(over)
dist.destroy_process_group()
"""
PATIENCE = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
# torchrun 2.13 cannot grow while the workers use its own store: both agents wait for MASTER_ADDR.
GROWS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def four(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "node1", "node2", "stranger") as network:
        yield network


def _give_other_address(node: Host, address: str, first: Host) -> None:
    """Let a node come to the first one from an address of a network that the first has none of."""
    network = f"{address.rpartition('.')[0]}.0/24"
    node.run(["ip", "addr", "add", f"{address}/24", "dev", "eth0"], check=True)
    node.run(["ip", "route", "replace", f"{first.ipv4}/32", "dev", "eth0", "src", address], check=True)
    first.run(["ip", "route", "add", network, "dev", "eth0"], check=True)


def _start(node: Host, home: Path, first: Host, script: Path, *, local: str) -> subprocess.Popen[str]:
    is_host = int(node is first)
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.ipv4}:{jobs.PORT}", "--rdzv-id", "grows"]
    return node.popen(
        [
            *(jobs.SECURERUN, "--nnodes", "1:2", "--max-restarts", "3", *meeting),
            *("--rdzv-conf", f"is_host={is_host},{PATIENCE}", "--local-addr", local, script, script.parent),
        ],
        env={"HOME": str(home), **GROWS},
    )


@needs_torch
def test_nodes_that_nobody_named_join_and_leave_and_nobody_else_comes_in(four: Network, tmp_path: Path) -> None:
    node0, node1, node2, stranger = four
    homes = make_homes(node0, tmp_path, 3)
    script = tmp_path / "generation.py"
    script.write_text(GENERATION)
    _give_other_address(node1, "10.90.1.5", node0)
    _give_other_address(node2, "10.90.2.5", node0)

    def came(pattern: str, count: int = 1) -> None:
        met = eventually(lambda: len(list(tmp_path.glob(pattern))) >= count, seconds=40)
        import time

        print(time.monotonic(), pattern, flush=True)
        assert met, [pattern, *(path.name for path in tmp_path.iterdir())]

    with Probe(stranger, node0) as outside, Probe(node1, node0) as beside_the_peer:
        first = _start(node0, homes[0], node0, script, local=node0.ipv4)
        came("0.0.1")
        second = _start(node1, homes[1], node0, script, local="10.90.1.5")
        came("0.[01].2", 2)
        second.send_signal(signal.SIGKILL)
        came("*.0.1", 2)
        for path in tmp_path.glob("*.[01].2"):
            path.unlink()
        third = _start(node2, homes[2], node0, script, local="10.90.2.5")
        came("*.[01].2", 2)
        (tmp_path / "over").touch()
        done = finish_all([first, third], timeout=60)
    finish(second, timeout=30)
    assert [each.returncode for each in done] == [0, 0], done
    assert outside.reached == beside_the_peer.reached == set()
    assert "2 of 2 nodes guarded" in done[0].stderr, done[0].stderr
