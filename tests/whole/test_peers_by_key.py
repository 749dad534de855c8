"""Peers that change while a job with a key runs: both ways in stay in force, and tags go to where its nodes are now."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kernel
import packets
import pytest
from cgroups import new_cgroup
from checkout import COMMANDS
from dialing import attempt
from holding import held
from hosts import RECORDS, Host, Network, eventually, finish
from probe import reach
from tag_field import has_tag, segments_in, shielded, wire, within

from securerun.firewall.job_key import JobSecret

EXEC = (str(COMMANDS / "securerunctl"), "exec")
PORT = 7000
# Listens, and opens a connection to each address and port that is read.
JOB = f"""
import socket, sys
listener = socket.create_server(("", {PORT}))
print("listening", flush=True)
for line in sys.stdin:
    address, port = line.split()
    opened = socket.socket()
    opened.setblocking(False)
    opened.connect_ex((address, int(port)))
    print("opened", flush=True)
"""
# Ends with 0 if it gets in.
CALLER = f"import socket; socket.create_connection((sys.argv[1], {PORT}), 3)"
# Of a network where no node can be, but by name.
FAR_AWAY = "203.0.113.7"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    kernel.require(kernel.TAGS)
    key = tmp_path / "home/.config/securerun/key"
    key.parent.mkdir(parents=True)
    key.touch(0o600)
    key.write_text("0123456789abcdef" * 4)
    return tmp_path / "home"


def launched(node: Host, home: Path, program: str, *options: str, argument: str = "") -> subprocess.Popen[str]:
    env = {"HOME": str(home), "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NNODES": "2"}
    command = [*EXEC, *options, "--", sys.executable, "-c", f"import sys\n{program}", argument]
    return node.popen(command, env=env, stdin=subprocess.PIPE)


@contextlib.contextmanager
def running(node: Host, home: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    job = launched(node, home, JOB, *options)
    try:
        assert job.stdout is not None and job.stdout.readline() == "listening\n", finish(job)
        yield job
    finally:
        job.kill()
        finish(job)


def gets_in_by_key(origin: Host, target: Host, home: Path) -> bool:
    return finish(launched(origin, home, CALLER, "--peers", "10.77.0.99", argument=target.ipv4)).returncode == 0


def gets_in_by_address(origin: Host, target: Host) -> bool:
    return all(reach(origin, [(target.ipv4, PORT)]).values())


def opens_with_tag(job: subprocess.Popen[str], node: Host, address: str) -> bool:
    """Whether what the job sends to an address carries the option."""
    assert job.stdin is not None and job.stdout is not None
    with wire(node) as endpoint:
        job.stdin.write(f"{address} 9\n")
        job.stdin.flush()
        assert job.stdout.readline() == "opened\n"
        frames = packets.frames_in(endpoint, 0.5)
    syns = [one for one in segments_in(frames) if one[13] & 0x3F == 0x02 and one[2:4] == (9).to_bytes(2, "big")]
    assert syns, frames
    return any(map(has_tag, syns))


def tagged_in_record() -> set[str]:
    # That of a caller that has ended goes in a moment.
    assert eventually(lambda: len(list(RECORDS.glob("*.json"))) == 1)
    (record,) = RECORDS.glob("*.json")
    return set(json.loads(record.read_text())["policy"]["tagged"])


def test_who_is_added_to_the_file_comes_in_and_gets_tags_and_who_has_the_key_comes_in_all_along(
    network: Network, home: Path, tmp_path: Path
) -> None:
    node, peer, stranger = network
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{node.ipv4}\n")
    node.run(["ip", "route", "add", f"{FAR_AWAY}/32", "via", peer.ipv4], check=True)
    try:
        with running(node, home, "--peers", f"@{hosts}", "--ports", str(PORT)) as job:
            assert gets_in_by_key(peer, node, home)
            assert not gets_in_by_address(peer, node)
            assert not opens_with_tag(job, node, FAR_AWAY)
            hosts.write_text(f"{node.ipv4}\n{peer.ipv4}\n{FAR_AWAY}\n")
            assert eventually(lambda: gets_in_by_address(peer, node), seconds=30)
            assert gets_in_by_key(peer, node, home)
            assert opens_with_tag(job, node, FAR_AWAY) and f"{FAR_AWAY}/32" in tagged_in_record()
            assert not gets_in_by_address(stranger, node)
    finally:
        node.run(["ip", "route", "del", f"{FAR_AWAY}/32"], check=True)


@pytest.mark.parametrize("required", [False, True])
def test_who_is_taken_from_the_list_comes_in_by_the_key_unless_both_are_asked_for(
    network: Network, required: bool
) -> None:
    kernel.require(kernel.TAGS)
    node, peer, stranger = network
    secret = bytes(range(32))
    options = ["--key", secret.hex(), "--ports", str(PORT), "--listen", str(PORT), *["--require-key"] * required]
    with (
        held(node, *options, "--peers", f"{peer.ipv4},{FAR_AWAY}") as holder,
        new_cgroup() as far,
        shielded(far, key=JobSecret(secret).key()),
    ):

        def by_key() -> bool:
            return within(far, peer, lambda: attempt(node.ipv4, PORT)) == "connected"

        assert by_key() and gets_in_by_address(peer, node) is not required
        assert f"{FAR_AWAY}/32" in tagged_in_record()
        holder.say(stranger.ipv4)
        assert eventually(lambda: f"{FAR_AWAY}/32" not in tagged_in_record())
        assert by_key() is not required and not gets_in_by_address(peer, node)
        assert gets_in_by_address(stranger, node) is not required
        holder.say(peer.ipv4)
        assert eventually(by_key)
        # Both are asked for still: nobody left is no list.
        if required:
            holder.say("")
            assert "there are no peers" in holder.hear_of("a part of the guard's work fails")["news"]
            assert by_key()
