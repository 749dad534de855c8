"""The main promise, end to end: real training on two hosts behind securerun; a stranger reaches no port of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import jobs
import kernel
import pytest
from hosts import Host, Network, eventually, finish_all
from probe import Probe, reach
from remains import nothing_left_behind
from torchless import needs_torch

_FOREIGN_RULES = (
    ("iptables", "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "DROP"),
    ("ip6tables", "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "DROP"),
    ("nft", "add table inet someone; add chain inet someone input { type filter hook input priority 5; }"),
    ("nft", "add rule inet someone input tcp dport 9 counter drop"),
)


def _peers(*nodes: Host) -> list[str]:
    return ["--peers", ",".join(address for node in nodes for address in node.addresses)]


def _ports(endpoints: set[tuple[str, int]]) -> set[int]:
    return {port for _, port in endpoints}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("static", "iptables"),
        ("c10d", "iptables"),
        pytest.param("static", "nftables", marks=kernel.needing(kernel.OWNED_TABLES)),
        ("c10d", "legacy"),
    ],
)
def test_stranger_cannot_reach_any_port_during_training(network: Network, kind: str, backend: str) -> None:
    node0, node1, stranger = network
    launcher = [jobs.SECURERUN, "--firewall", backend, *_peers(node0, node1)]
    for node in (node0, node1):
        for rule in _FOREIGN_RULES:
            node.run(rule, check=True)
    with (
        nothing_left_behind(node0, node1),
        Probe(stranger, node0) as at_node0,
        Probe(stranger, node1) as at_node1,
    ):
        started = jobs.start_on_both((node0, node1), kind, launcher=launcher)
        done = finish_all(started, timeout=120)
    assert [node.returncode for node in done] == [0, 0], done
    assert jobs.last_loss(done[0].stdout) < 0.35
    assert "all-reduce right in 4 groups" in done[0].stdout
    for probe in (at_node0, at_node1):
        assert probe.reached == set()
        # 2 workers a node, each with a port for each of 4 groups, and on node 0 the stores.
        assert len(_ports(probe.tried)) >= 8
    assert jobs.PORT in _ports(at_node0.tried)
    assert {address for address, _ in at_node0.tried} == set(node0.addresses)
    for node_done in done:
        assert "closed to all others by shield" in node_done.stderr
        assert f"closed to all others by {backend}" in node_done.stderr
        assert f"blocked {stranger.ipv4} → " in node_done.stderr


def test_torchrun_lets_the_stranger_in_where_securerun_does_not(network: Network) -> None:
    """The control: the same job and the same probe, without securerun."""
    node0, node1, stranger = network
    with Probe(stranger, node0) as probe:
        done = finish_all(jobs.start_on_both((node0, node1), "static", launcher=[jobs.TORCHRUN]), timeout=120)
    assert all("loss" in node.stdout or node.returncode == 0 for node in done), done
    assert jobs.PORT in _ports(probe.reached)


@needs_torch
def test_peers_reach_every_port_that_they_need(network: Network, tmp_path: Path) -> None:
    node0, node1, stranger = network
    script, go_on = _waiting_job(tmp_path)
    with nothing_left_behind(node0, node1):
        started = jobs.start_on_both(
            (node0, node1), "static", launcher=[jobs.SECURERUN, *_peers(node0, node1)], script=[script, str(tmp_path)]
        )
        _wait_for(tmp_path, "trained", 4)
        targets = node0.targets()
        assert len(_ports(targets)) >= 3
        from_peer, from_stranger = reach(node1, targets), reach(stranger, targets)
        from_itself = reach(node0, targets)
        go_on.touch()
        done = finish_all(started, timeout=60)
    assert from_peer == dict.fromkeys(targets, True)
    assert from_itself == dict.fromkeys(targets, True)
    assert from_stranger == dict.fromkeys(targets, False)
    assert [node.returncode for node in done] == [0, 0], done


@needs_torch
def test_rules_of_others_are_untouched_while_the_job_runs(network: Network, tmp_path: Path) -> None:
    node0, _, _ = network
    for rule in _FOREIGN_RULES:
        node0.run(rule, check=True)
    before = node0.snapshot()
    script, go_on = _waiting_job(tmp_path)
    with nothing_left_behind(node0):
        job = _one_node(node0, script, tmp_path)
        _wait_for(tmp_path, "trained", 2)
        during = node0.snapshot()
        go_on.touch()
        assert finish_all([job], timeout=60)[0].returncode == 0
    for tool in ("iptables-save", "ip6tables-save"):
        assert "SECURERUN" in during[tool]
        assert [line for line in during[tool].splitlines() if "SECURERUN" not in line] == before[tool].splitlines()
    assert "table inet someone" in during["nft"]


@needs_torch
def test_two_jobs_on_one_host_do_not_disturb_each_other(network: Network, tmp_path: Path) -> None:
    node0, node1, stranger = network
    first, second = tmp_path / "first", tmp_path / "second"
    with nothing_left_behind(node0):
        started: list[subprocess.Popen[str]] = []
        for place, peer in ((first, node1), (second, stranger)):
            place.mkdir()
            script, _ = _waiting_job(place)
            port = jobs.PORT + len(started)
            started.append(_one_node(node0, script, place, "--peers", peer.ipv4, "--master-port", str(port)))
        _wait_for(first, "trained", 2)
        _wait_for(second, "trained", 2)
        of_first, of_second = (node0.ipv4, jobs.PORT), (node0.ipv4, jobs.PORT + 1)
        assert reach(node1, [of_first, of_second]) == {of_first: True, of_second: False}
        assert reach(stranger, [of_first, of_second]) == {of_first: False, of_second: True}
        (first / "go on").touch()
        assert finish_all(started[:1], timeout=60)[0].returncode == 0
        assert reach(stranger, [of_second]) == {of_second: True}
        assert reach(node1, [of_second]) == {of_second: False}
        (second / "go on").touch()
        assert finish_all(started[1:], timeout=60)[0].returncode == 0


def test_what_outlives_a_job_that_ended_well_stays_closed_until_it_ends(network: Network, tmp_path: Path) -> None:
    node0, _, stranger = network
    leftover = tmp_path / "leftover.py"
    leftover.write_text(
        "import os, socket, subprocess, sys\n"
        "server = socket.create_server(('0.0.0.0', 7777))\n"
        "os.set_inheritable(server.fileno(), True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(4)'], close_fds=False,\n"
        "                 start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
    )
    with nothing_left_behind(node0):
        done = node0.run([jobs.SECURERUN, "--no-python", sys.executable, str(leftover)])
        assert done.returncode == 0, done
        assert reach(stranger, [(node0.ipv4, 7777)]) == {(node0.ipv4, 7777): False}
        assert reach(node0, [(node0.ipv4, 7777)]) == {(node0.ipv4, 7777): True}
        assert eventually(lambda: not node0.processes(), seconds=20)


def test_umask_is_0027_in_launcher_and_workers_and_stricter_ones_stay(network: Network, tmp_path: Path) -> None:
    node0, _, _ = network
    script = tmp_path / "umask.py"
    script.write_text("import os; print(f'umask {os.umask(0):04o}')")
    for inherited, expected in ((0o022, "0027"), (0o077, "0077"), (0, "0027")):
        done = node0.run([jobs.SECURERUN, str(script)], umask=inherited)
        assert f"umask {expected}" in done.stdout, done
        assert f"umask {expected}" in done.stderr, done


@needs_torch
def test_without_iptables_the_shield_closes_every_port_alone(network: Network, tmp_path: Path) -> None:
    node0, _, stranger = network
    with nothing_left_behind(node0), Probe(stranger, node0) as probe:
        script, go_on = _waiting_job(tmp_path)
        job = _one_node(node0, script, tmp_path, "--firewall", "off", "--master-port", str(jobs.PORT))
        _wait_for(tmp_path, "trained", 2)
        assert "SECURERUN" not in node0.snapshot()["iptables-save"]
        go_on.touch()
        assert finish_all([job], timeout=60)[0].returncode == 0
    assert probe.reached == set()
    assert probe.tried


def _one_node(node: Host, script: str, place: Path, *options: str) -> subprocess.Popen[str]:
    return node.popen([jobs.SECURERUN, *options, "--nproc-per-node", "2", script, str(place)])


def _waiting_job(place: Path) -> tuple[str, Path]:
    """A job that meets on gloo, says so by a file for each rank, and waits to be told to end."""
    script = place / "wait.py"
    script.write_text(
        "import pathlib, sys, time, torch, torch.distributed as dist\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "dist.init_process_group('gloo')\n"
        "dist.all_reduce(torch.ones(1))\n"
        "(place / f'trained {dist.get_rank()}').touch()\n"
        "while not (place / 'go on').exists():\n"
        "    time.sleep(0.05)\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    return str(script), place / "go on"


def _wait_for(place: Path, prefix: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while len([name for name in os.listdir(place) if name.startswith(prefix)]) < count:
        assert time.monotonic() < deadline, os.listdir(place)
        time.sleep(0.05)
