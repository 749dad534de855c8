"""Hosts with addresses of both IP versions, whose peers are named by those of one: training goes on at once."""

from __future__ import annotations

import re
from pathlib import Path

import jobs
import pytest
from hosts import Host, Network, finish_all
from remains import nothing_left_behind

# One all-reduce in a group of its own, and no time for a connection that is given up after its SYN went out often.
SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total, group=dist.new_group())
assert total.item() == 2
dist.destroy_process_group()
"""


def _named(command: list[str], table: Path) -> list[str]:
    """A command for which node0 and node1 have A and AAAA records."""
    return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(table), *command]


@pytest.mark.parametrize("backend", ["iptables", "nftables", "legacy"])
def test_node_that_tries_the_address_which_no_peer_has_trains_all_the_same(
    network: Network, tmp_path: Path, backend: str
) -> None:
    nodes: tuple[Host, Host] = (network["node0"], network["node1"])
    table, script = tmp_path / "hosts", tmp_path / "train.py"
    table.write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {node.name}\n" for node in nodes for address in node.addresses)
    )
    script.write_text(SCRIPT)
    known = ["--firewall", backend, "--peers", ",".join(node.ipv4 for node in nodes)]
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "node0", "--master-port", str(jobs.PORT)]
    with nothing_left_behind(*nodes):
        started = [
            node.popen(_named([jobs.SECURERUN, *known, *meeting, "--node-rank", str(rank), str(script)], table))
            for rank, node in enumerate(nodes)
        ]
        done = finish_all(started, timeout=60)
    assert [node.returncode for node in done] == [0, 0], done
    turned_away = re.findall(r"blocked (\S+) → (\d+)", done[0].stderr)
    assert (nodes[1].ipv6, str(jobs.PORT)) in turned_away, "IPv6 was tried, and turned away"
