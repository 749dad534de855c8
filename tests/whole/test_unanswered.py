"""The node that is locked out says so itself, within seconds of its connections going nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, finish, hear, kill_group
from patience import patient
from torchless import needs_torch

PORT, OTHER, WEB = 29500, 40000, 443
LOCKED_OUT = "10.77.0.99"

# Connects from one address to one host, each port in a socket of its own, and waits.
CONNECT = """
import select, socket, sys
source, target, *ports = sys.argv[1:]
kept = []
for port in ports:
    kept.append(socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET))
    kept[-1].bind((source, 0))
    kept[-1].setblocking(False)
    kept[-1].connect_ex((target, int(port)))
sys.stdin.read()
"""
REFUSED = """
import select, socket, sys
while not select.select([sys.stdin], [], [], 0.05)[0]:
    with socket.socket() as one:
        one.connect_ex((sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture
def nodes(network: Network) -> Iterator[tuple[Host, Host]]:
    """node0, which answers node1's first address alone, and node1, which has another."""
    node0, node1, _ = network
    node1.run(["ip", "addr", "add", f"{LOCKED_OUT}/24", "dev", "eth0"], check=True)
    for tool, known in (("iptables", node1.ipv4), ("ip6tables", node1.ipv6)):
        node0.run([tool, "-A", "INPUT", "-p", "tcp", "--syn", "!", "-s", known, "-j", "DROP"], check=True)
    yield node0, node1


def guarded(node: Host, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    run = [str(COMMANDS / "securerunctl"), "exec", "--peers", "10.77.0.1", "--ports", str(PORT), *options]
    return node.popen([*run, "--", sys.executable, "-c", *command], stdin=subprocess.PIPE)


def said_after(job: subprocess.Popen[str], seconds: float) -> list[str]:
    """The lines about hosts that do not answer, after so many seconds."""
    time.sleep(patient(seconds))
    return [line for line in finish(job, text_input="").stderr.splitlines() if "no answer" in line]


def said_once(job: subprocess.Popen[str]) -> str:
    """The line about a host that does not answer; there is no other in the three seconds after it."""
    said = hear(job, "no answer")
    (line,) = [line for line in said.splitlines() if "no answer" in line] + said_after(job, 3)
    return line


@pytest.mark.parametrize("scope", ["process", "ports"])
def test_connection_that_nobody_answers_is_told_once_with_the_address_that_the_other_side_needs(
    nodes: tuple[Host, Host], scope: str
) -> None:
    node0, node1 = nodes
    ports = map(str, (PORT, OTHER, OTHER + 1, WEB))
    job = guarded(node1, CONNECT, LOCKED_OUT, node0.ipv4, *ports, options=("--scope", scope))
    line = said_once(job)
    found = re.search(rf"no answer from {node0.ipv4}:\d+ for (\d+) s: that host may be down", line)
    assert found and 3 <= int(found[1]) <= patient(6), line
    assert f"by the address {LOCKED_OUT}: name that there with --peers" in line


def test_what_is_refused_or_answered_or_none_of_the_job_or_none_of_its_ports_is_not_told(
    nodes: tuple[Host, Host],
) -> None:
    node0, node1 = nodes
    others = node1.popen([sys.executable, "-c", CONNECT, LOCKED_OUT, node0.ipv4, str(OTHER)], stdin=subprocess.PIPE)
    web = guarded(node1, CONNECT, LOCKED_OUT, node0.ipv4, str(WEB))
    refused = guarded(node1, REFUSED, node0.ipv4, str(OTHER), options=("--ports", str(OTHER)))
    assert said_after(web, 7) == said_after(refused, 0) == []
    finish(others, text_input="")


def test_ipv6_is_written_so_that_the_port_stands_apart(nodes: tuple[Host, Host]) -> None:
    node0, node1 = nodes
    node1.run(["ip", "addr", "add", "fd77::99/64", "dev", "eth0", "nodad"], check=True)
    line = said_once(guarded(node1, CONNECT, "fd77::99", node0.ipv6, str(PORT)))
    assert f"no answer from [{node0.ipv6}]:{PORT} for " in line
    assert "by the address fd77::99: " in line


def test_task_that_another_exec_keeps_out_hears_of_the_loopback(network: Network) -> None:
    node = network["node0"]
    listen = f"import socket, sys; s = socket.create_server(('127.0.0.1', {PORT})); sys.stdin.read()"
    first = guarded(node, listen, options=("--loopback", "job"))
    assert eventually(lambda: f":{PORT}" in node.run(["ss", "-tln"]).stdout)
    job = guarded(node, CONNECT, "127.0.0.1", "127.0.0.1", str(PORT), options=("--ports", str(OTHER)))
    line = said_once(job)
    assert f"no answer from 127.0.0.1:{PORT} for " in line
    assert "--loopback any" in line
    finish(first, text_input="")


@needs_torch
def test_torchrun_node_that_is_locked_out_says_so_at_its_rendezvous(network: Network) -> None:
    node0, node1, _ = network
    started = [
        node.popen(
            [
                *(jobs.SECURERUN, "--peers", peers, "--nnodes", "2", "--nproc-per-node", "1"),
                *(*jobs.rendezvous("static", node, rank, node0), str(jobs.TRAIN)),
            ]
        )
        for rank, (node, peers) in enumerate(((node0, f"{node0.ipv4},{LOCKED_OUT}"), (node1, "10.77.0.0/24")))
    ]
    said = hear(started[1], "no answer")
    (line,) = [line for line in said.splitlines() if "no answer" in line]
    assert f"no answer from {node0.ipv4}:{jobs.PORT}" in line
    assert f"by the address {node1.ipv4}: name that there with --peers" in line
    for job in started:
        kill_group(job)
