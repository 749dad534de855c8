"""Two fresh hosts, a key made on one and copied to the other, and no other word: the job trains, for nobody else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, finish_all, hear, terminate_all
from key_homes import make_homes
from probe import Probe
from remains import nothing_left_behind
from torchless import needs_torch

CTL = str(COMMANDS / "securerunctl")


@pytest.fixture
def homes(node: Host, tmp_path: Path) -> tuple[Path, ...]:
    return make_homes(node, tmp_path)


def start(
    nodes: Sequence[Host], homes: Sequence[Path], *options: Sequence[str], groups: int = 3
) -> list[subprocess.Popen[str]]:
    """`securerun --nnodes 2 --node-rank R --master-addr ADDRESS train.py` on both, with what each has beside."""
    given = options or ((), ())
    script = (str(jobs.TRAIN), "--groups", str(groups))
    return [
        node.popen(
            [jobs.SECURERUN, *more, "--nnodes", "2", *jobs.rendezvous("static", node, rank, nodes[0]), *script],
            env={"HOME": str(home)},
        )
        for rank, (node, home, more) in enumerate(zip(nodes, homes, given))
    ]


def test_a_key_that_was_copied_is_all_that_it_takes_and_nobody_else_comes_in(
    network: Network, homes: tuple[Path, ...], tmp_path: Path
) -> None:
    node0, node1, stranger = network
    reports = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    options = [("--loopback", "job", "--report", str(report)) for report in reports]
    with (
        nothing_left_behind(node0, node1),
        Probe(stranger, node0) as outside,
        Probe(node1, node0) as beside_the_peer,
        Probe(node0, node0) as on_this_host,
    ):
        done = finish_all(start((node0, node1), homes, *options), timeout=120)
    assert [each.returncode for each in done] == [0, 0], done
    assert jobs.last_loss(done[0].stdout) < 1
    for probe in (outside, beside_the_peer, on_this_host):
        assert probe.reached == set() and len({port for _, port in probe.tried}) >= 3
    for each, report in zip(done, reports):
        assert "open to whoever has the job's key" in each.stderr
        assert each.stderr.count("2 of 2 nodes guarded") >= 1, each.stderr
        assert json.loads(report.read_text())["nodes"] == {"guarded": 2, "of": 2, "unguarded": []}


def test_nodes_with_different_keys_both_say_so_within_seconds(network: Network, homes: tuple[Path, ...]) -> None:
    node0, node1, _ = network
    (homes[1] / ".config/securerun/key").write_text("another key of thirty-two bytes and a few more\n")
    started = start((node0, node1), homes)
    # Node 0 stays until node 1 has said it: who has ended answers that nobody listens.
    blocked, unanswered = f"blocked {node1.ipv4} → {jobs.PORT}", f"no answer from {node0.ipv4}:{jobs.PORT}"
    said = [hear(each, words) for each, words in zip(started, (blocked, unanswered))]
    terminate_all(started)
    fingerprints = [line.partition(": key ")[2][:8] for text in said for line in text.splitlines() if ": key " in line]
    assert len(set(fingerprints)) == 2, said
    # Whoever opens hears nothing, and whoever listens turns away; each of them has to think of its key.
    assert blocked in said[0] and f"(fingerprint {fingerprints[0]})" in said[0], said[0]
    assert unanswered in said[1] and f"(fingerprint {fingerprints[1]})" in said[1], said[1]


def test_a_node_that_is_named_may_be_without_securerun(network: Network, homes: tuple[Path, ...]) -> None:
    node0, node1, _ = network
    script = (str(jobs.TRAIN), "--groups", "1")
    peers = ("--peers", ",".join(address for node in (node0, node1) for address in node.addresses))
    near = node0.popen(
        [jobs.SECURERUN, *peers, "--nnodes", "2", *jobs.rendezvous("static", node0, 0, node0), *script],
        env={"HOME": str(homes[0])},
    )
    far = node1.popen([jobs.TORCHRUN, "--nnodes", "2", *jobs.rendezvous("static", node1, 1, node0), *script])
    done = finish_all([near, far], timeout=120)
    assert [each.returncode for each in done] == [0, 0], done
    assert "1 of 2 nodes guarded" in done[0].stderr
    assert f"peer {node1.ipv4} is let in by its address alone" in done[0].stderr


def test_where_a_tag_is_insisted_on_a_node_without_one_is_told_of_and_comes_in_nowhere(
    network: Network, homes: tuple[Path, ...]
) -> None:
    node0, node1, _ = network
    script = (str(jobs.TRAIN), "--groups", "1")
    peers = ("--peers", ",".join(address for node in (node0, node1) for address in node.addresses))
    options = (*peers, "--key", "require")
    # The node that listens is plain: its answers have no tag, and node 1 hears of that and ends.
    far = node0.popen([jobs.TORCHRUN, "--nnodes", "2", *jobs.rendezvous("static", node0, 0, node0), *script])
    near = node1.popen(
        [jobs.SECURERUN, *options, "--nnodes", "2", *jobs.rendezvous("static", node1, 1, node0), *script],
        env={"HOME": str(homes[1])},
    )
    words = f"{node0.ipv4}:{jobs.PORT} answered without the tag of this job's key"
    said = hear(near, words)
    terminate_all([near, far])
    assert words in said, said


def test_a_plain_node_that_comes_where_a_tag_is_insisted_on_is_turned_away_with_that_reason(
    network: Network, homes: tuple[Path, ...]
) -> None:
    node0, node1, _ = network
    script = (str(jobs.TRAIN), "--groups", "1")
    options = ("--peers", f"{node0.ipv4},{node1.ipv4}", "--key", "require")
    near = node0.popen(
        [jobs.SECURERUN, *options, "--nnodes", "2", *jobs.rendezvous("static", node0, 0, node0), *script],
        env={"HOME": str(homes[0])},
    )
    far = node1.popen([jobs.TORCHRUN, "--nnodes", "2", *jobs.rendezvous("static", node1, 1, node0), *script])
    words = f"blocked {node1.ipv4} → {jobs.PORT}"
    said = hear(near, words)
    terminate_all([near, far])
    (line, *_) = (line for line in said.splitlines() if words in line)
    assert "did not show the tag of this job's key" in line and "--key auto" in line, said


@needs_torch
def test_a_guard_that_takes_over_has_the_key_again(network: Network, homes: tuple[Path, ...], tmp_path: Path) -> None:
    node0, node1, stranger = network
    with Probe(stranger, node0) as outside, Probe(node1, node0) as beside_the_peer:
        started = start((node0, node1), homes, groups=40)
        for node in (node0, node1):
            # Of a guard that dies over its order nobody hears but the next.
            assert eventually(lambda: _has_workers(node), seconds=20)  # noqa: B023 - at once
            (guard,) = _guards_in(node)
            os.kill(guard, signal.SIGKILL)
        done = finish_all(started, timeout=120)
    assert [each.returncode for each in done] == [0, 0], done
    for probe in (outside, beside_the_peer):
        assert probe.reached == set()
    for each in done:
        assert "taken over" in each.stderr and "2 of 2 nodes guarded" in each.stderr, each.stderr


def _has_workers(node: Host) -> bool:
    """Whether a worker runs there, and not its launcher alone."""
    return any(str(jobs.TRAIN) in words and "--nnodes" not in words for words in node.processes().values())


def _guards_in(node: Host) -> list[int]:
    """The guards of the runs of a host, by their records."""
    found = [json.loads(path.read_text()) for path in Path("/run/securerun").glob("*.json")]
    return [run["guard"] for run in found if run["network"] == Path(f"/run/netns/{node.namespace}").stat().st_ino]


# Node 0 listens, and node 1 connects; what each is told ends on standard output.
MEETING = """
import os, socket, sys, time
rank, address = int(os.environ["RANK"]), ("10.77.0.1", 29500)
def meet():
    if rank == 0:
        with socket.create_server(("", 29500)) as store:
            store.settimeout(40)
            print(store.accept()[1][0], flush=True)
            return
    deadline = time.monotonic() + 40
    while True:
        try:
            socket.create_connection(address, 2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
"""
AROUND = """
from securerun import guarded, policy
wanted = policy(ports=[29500], key="auto")
with guarded(wanted, key="auto") as guarding:
    meet()
"""


@pytest.mark.parametrize("way", ["exec", "guarded"])
def test_other_commands_and_python_callers_are_nodes_by_their_key_as_well(
    network: Network, homes: tuple[Path, ...], way: str
) -> None:
    node0, node1, stranger = network
    program = [sys.executable, "-c", MEETING + (AROUND if way == "guarded" else "meet()")]
    command = program if way == "guarded" else [CTL, "exec", "--", *program]
    with Probe(stranger, node0) as outside, Probe(node1, node0) as beside_the_peer:
        started = [
            node.popen(
                command,
                env={
                    "HOME": str(home),
                    "MASTER_ADDR": node0.ipv4,
                    "MASTER_PORT": "29500",
                    "NNODES": "2",
                    "RANK": str(rank),
                },
            )
            for rank, (node, home) in enumerate(zip((node0, node1), homes))
        ]
        done = finish_all(started, timeout=60)
    assert [each.returncode for each in done] == [0, 0], done
    assert node1.ipv4 in done[0].stdout
    assert outside.reached == beside_the_peer.reached == set()


def test_an_interface_that_is_named_is_where_tags_have_to_come_through(
    network: Network, homes: tuple[Path, ...]
) -> None:
    """Node 0 lets nobody in but through a link that leads nowhere: node 1 has the key, and stays outside."""
    node0, node1, _ = network
    node0.run(["ip", "link", "add", "ib0", "type", "veth", "peer", "name", "nowhere"], check=True)
    node0.run(["ip", "addr", "add", "10.78.0.1/24", "dev", "ib0"], check=True)
    node0.run(["ip", "link", "set", "ib0", "up"], check=True)
    try:
        started = start((node0, node1), homes, ("--interface", "ib0"), ())
        words = f"blocked {node1.ipv4} → {jobs.PORT}"
        said = hear(started[0], words)
        terminate_all(started)
    finally:
        node0.run(["ip", "link", "del", "ib0"], check=True)
    assert words in said and "through ib0" in said, said


def test_a_host_that_can_have_no_tags_says_so_and_what_insists_on_them_is_refused(
    network: Network, homes: tuple[Path, ...]
) -> None:
    node0, _, _ = network
    launch = [CTL, "exec", "--scope", "ports", "--peers", "10.77.0.2"]
    env = {"HOME": str(homes[0]), "MASTER_ADDR": "10.77.0.1", "NNODES": "2"}
    added = node0.run([*launch, "--", "true"], env=env)
    assert added.returncode == 0, added
    assert "no key (only the shield can ask for a tag" in added.stderr
    insisting = node0.run([*launch, "--key", "require", "--", "true"], env=env)
    assert insisting.returncode == 78 and "only the shield can ask for a tag" in insisting.stderr, insisting
