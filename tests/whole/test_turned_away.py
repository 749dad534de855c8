"""What a real run says of who it turned away: the rule that did, in the notice, at the end, in status and report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, finish

PORT = 29500

# Listens until it is told to end, and says where.
LISTEN = f"""
import socket, sys, time
from pathlib import Path
listener = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
place = Path(sys.argv[1])
(place / "listening").touch()
while not (place / "end").exists():
    time.sleep(0.05)
"""

KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.3)"


def knock(origin: Host, target: str) -> None:
    assert origin.run([sys.executable, "-c", KNOCK, target, str(PORT)]).returncode != 0


@pytest.mark.parametrize("scope", ["process", "ports"])
def test_peer_by_another_interface_is_told_of_interfaces_wherever_it_is_told(
    network: Network, tmp_path: Path, scope: str
) -> None:
    node, peer, stranger = network
    for words in ("link add ib0 type bridge", "link set ib0 up", "addr add 10.81.0.1/24 dev ib0"):
        node.run(["ip", *words.split()], check=True)
    peers = ",".join((*peer.addresses, "10.81.0.2"))
    options = ["--peers", peers, "--interface", "ib0", "--ports", str(PORT), "--scope", scope]
    report = tmp_path / "report.json"
    job = started(node, tmp_path, *options, "--report", str(report))
    knock(peer, node.ipv4)
    knock(stranger, node.ipv4)
    assert eventually(lambda: f"{peer.ipv4} → {PORT}" in status(node))
    assert f"{peer.ipv4} → {PORT}, packets: 1; a peer's address, through another interface" in status(node)
    said = ended(job, tmp_path)
    for line in notice_and_summary(said, peer.ipv4):
        assert "did not come in through ib0" in line and "--interface" in line and "--peers" not in line
    notice, summary = notice_and_summary(said, stranger.ipv4)
    assert "if it is a node of this job, add it with --peers" in notice
    assert "--peers" not in summary
    assert "if one of the others is a node of this job, add it with --peers" in said
    timeline = json.loads(report.read_text())["timeline"]
    assert any(peer.ipv4 in event["text"] and "--interface" in event["text"] for event in timeline)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "own"])
def test_process_of_this_host_is_told_of_the_loopback(network: Network, tmp_path: Path, address: str) -> None:
    node = network["node0"]
    job = started(node, tmp_path, "--peers", "10.77.0.0/24", "--loopback", "job", "--ports", str(PORT))
    target = node.ipv6 if address == "own" else address
    knock(node, target)
    assert eventually(lambda: "a process of this host that is none of the job's (--loopback job)" in status(node))
    for line in notice_and_summary(ended(job, tmp_path), target):
        assert "--loopback any" in line and "--peers" not in line


def started(node: Host, place: Path, *options: str) -> subprocess.Popen[str]:
    """A command behind securerun that listens."""
    command = [str(COMMANDS / "securerunctl"), "exec", *options, "--", sys.executable, "-c", LISTEN, str(place)]
    job = node.popen(command)
    assert eventually(lambda: (place / "listening").exists() or job.poll() is not None)
    return job


def status(node: Host) -> str:
    return node.run([str(COMMANDS / "securerunctl"), "status"]).stdout


def ended(job: subprocess.Popen[str], place: Path) -> str:
    """What securerun said, after the job has been told to end."""
    (place / "end").touch()
    done = finish(job)
    assert done.returncode == 0, done
    return done.stderr


def notice_and_summary(said: str, source: str) -> list[str]:
    lines = [line for line in said.splitlines() if f"blocked {source} → {PORT}" in line]
    assert len(lines) == 2, said
    return lines
