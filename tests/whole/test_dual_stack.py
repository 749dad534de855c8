"""Hosts with addresses of both IP versions, whose peers are named by those of one: training goes on at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jobs
import kernel
import pytest
from checkout import COMMANDS, GROUND
from hosts import Host, Network, eventually, finish, finish_all
from remains import nothing_left_behind

from securerun.firewall.policy import Purpose

# One all-reduce in a group of its own, and no time for a connection that is given up after its SYN went out often.
SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total, group=dist.new_group())
assert total.item() == 2
dist.destroy_process_group()
"""


def _as(node: Host, command: list[str], table: Path) -> list[str]:
    """A command on a host of this name, for which node0 and node1 have A and AAAA records."""
    script = f'hostname {node.name} && mount --bind "$0" /etc/hosts && exec "$@"'
    return ["unshare", "--mount", "--uts", "sh", "-c", script, str(table), *command]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("static", "iptables"),
        pytest.param("static", "nftables", marks=kernel.needing(kernel.OWNED_TABLES)),
        ("static", "legacy"),
        ("c10d", "iptables"),
        pytest.param("c10d", "nftables", marks=kernel.needing(kernel.OWNED_TABLES)),
    ],
)
def test_node_that_tries_the_address_which_no_peer_has_trains_all_the_same(
    network: Network, tmp_path: Path, kind: str, backend: str
) -> None:
    """With c10d also at the workers' store, whose port is chosen at random."""
    nodes: tuple[Host, Host] = (network["node0"], network["node1"])
    table, script = tmp_path / "hosts", tmp_path / "train.py"
    table.write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {node.name}\n" for node in nodes for address in node.addresses)
    )
    script.write_text(SCRIPT)
    known = ["--firewall", backend, "--peers", ",".join(node.ipv4 for node in nodes)]
    meeting = {
        "static": ("--master-addr", "node0", "--master-port", str(jobs.PORT), "--node-rank"),
        "c10d": ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"node0:{jobs.PORT}", "--rdzv-id"),
    }[kind]
    with nothing_left_behind(*nodes):
        started = []
        for rank, node in enumerate(nodes):
            last = str(rank) if kind == "static" else "test"
            command = [jobs.SECURERUN, *known, "--nnodes", "2", "--nproc-per-node", "1", *meeting, last, str(script)]
            started.append(node.popen(_as(node, command, table)))
        done = finish_all(started, timeout=60)
    assert [node.returncode for node in done] == [0, 0], done
    turned_away = re.findall(r"blocked (\S+) → (\d+)", done[0].stderr)
    assert (nodes[1].ipv6, str(jobs.PORT)) in turned_away, "IPv6 was tried, and turned away"


LISTEN = """
import socket, sys
kept = [socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                             dualstack_ipv6=address == "::")
        for address, port in (("::", 41000), ("127.0.0.1", 41001), ("::1", 41002), ("0.0.0.0", 41003))]
sys.stdin.read()
"""


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES])
def test_store_at_a_random_port_answers_the_version_that_no_peer_has_and_stays_behind_the_shield(
    network: Network, backend: str
) -> None:
    node, peer, stranger = network
    options = ["--peers", peer.ipv4, "--ports", str(jobs.PORT), "--firewall", backend, "--scope", "process"]
    command = [str(COMMANDS / "securerunctl"), "exec", *options, "--", sys.executable, "-c", LISTEN]
    with nothing_left_behind(node):
        job = node.popen(command, stdin=subprocess.PIPE)
        assert eventually(lambda: _heard(peer, node.ipv4, 41000) == "connected", seconds=20)
        assert eventually(lambda: _heard(peer, node.ipv6, 41000) == "refused", seconds=5)
        assert _heard(stranger, node.ipv6, 41000) == "refused"
        assert _heard(stranger, node.ipv4, 41000) == "timeout"
        assert _heard(node, node.ipv6, 41000) == _heard(node, "::1", 41000) == "connected"
        (run,) = json.loads(node.run([str(COMMANDS / "securerunctl"), "status", "--json"]).stdout)["runs"]
        found = [port["first"] for port in run["ports"] if port["purpose"] == Purpose.OPENED_MEANWHILE]
        done = finish(job, text_input="")
    assert found == [41000], "what is on the loopback, or on IPv4 alone, needs no answer"
    assert done.returncode == 0, done
    assert "port 41000 is" not in done.stderr


def test_host_without_a_global_ipv6_address_answers_nobody_over_it(network: Network) -> None:
    node, peer, _ = network
    with nothing_left_behind(node):
        node.run(["ip", "-6", "address", "flush", "dev", "eth0", "scope", "global"], check=True)
        options = ["--peers", peer.ipv4, "--scope", "process"]
        job = node.popen(
            [str(COMMANDS / "securerunctl"), "exec", *options, "--", sys.executable, "-c", LISTEN],
            stdin=subprocess.PIPE,
        )
        assert eventually(lambda: _heard(peer, node.ipv4, 41000) == "connected", seconds=20)
        time.sleep(1.5)  # the guard looks once a second
        (run,) = json.loads(node.run([str(COMMANDS / "securerunctl"), "status", "--json"]).stdout)["runs"]
        assert Purpose.OPENED_MEANWHILE not in [port["purpose"] for port in run["ports"]]
        assert finish(job, text_input="").returncode == 0


def _heard(origin: Host, address: str, port: int) -> str:
    program = "import asyncio, sys, probe\nprint(asyncio.run(probe.connect((sys.argv[1], int(sys.argv[2])), 0.4)))"
    return origin.run(
        [sys.executable, "-c", program, address, str(port)], env={"PYTHONPATH": str(GROUND)}
    ).stdout.strip()
