"""guard.toml changes while a job runs, and its guard dies: the next one lets in whom both allow, and nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import kernel
import pytest
from attacking import Ground
from checkout import COMMANDS
from holding import Held
from hosts import Host, cgroup2_mount, eventually, finish
from ways_in import SECRET, by_address, by_key

from securerun.linux.bpf import AttachType, attached

PORT = 7100
HELD = ("--ports", str(PORT), "--listen", str(PORT))
BY_KEY = (*HELD, "--key", SECRET.hex())
SITE_KEY, SITE, OTHER_SITE = "/etc/securerun/site.key", "0123456789abcdef" * 4, "fedcba9876543210" * 4
MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NNODES": "2"}


def record(ground: Ground, run_id: str = "*") -> dict[str, Any]:
    (path,) = ground.machine.place("/run/securerun").glob(f"{run_id}.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def kill_guard(ground: Ground) -> None:
    os.kill(int(record(ground)["guard"]), signal.SIGKILL)


def judges(ground: Ground) -> int:
    """How many shields hang on the job's cgroup."""
    mount = cgroup2_mount()
    assert mount is not None
    place = os.open(mount / str(record(ground)["cgroup"]).lstrip("/"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        return len(attached(place, AttachType.CGROUP_INET_INGRESS).program_ids)
    finally:
        os.close(place)


def allowing(*hosts: Host) -> str:
    return f"peers = {json.dumps([f'{host.ipv4}/32' for host in hosts])}"


@contextlib.contextmanager
def rules_changed(ground: Ground, before: str, after: str, *options: str) -> Iterator[tuple[Held, str]]:
    """A job of alice's whose guard died, and what the next one said."""
    ground.machine.configure(before)
    holder = ground.holder(ground.alice, *options)
    ground.machine.configure(after)
    kill_guard(ground)
    said = holder.hear_of("another has taken over")["news"]
    yield holder, said
    holder.let_go()


def of_notes(holder: Held, words: str) -> str:
    return str(holder.hear_of(words)["news"])


@pytest.mark.parametrize("named", [True, False], ids=["named", "nobody-named"])
def test_a_tag_counts_from_the_networks_that_the_site_allows_by_now(ground: Ground, named: bool) -> None:
    kernel.require(kernel.TAGS)
    node, peer, stranger = ground.node, ground.peer, ground.stranger
    options = ("--peers", f"{peer.ipv4},{stranger.ipv4}") if named else ("--require-key",)
    with rules_changed(ground, "", allowing(peer), *BY_KEY, *options) as (holder, _):
        of_notes(holder, f"tags count from {peer.ipv4} alone")
        assert judges(ground) == 1
        assert by_key(peer, node, PORT) and not by_key(stranger, node, PORT)
        assert by_address(peer, node, PORT) is named and not by_address(stranger, node, PORT)
        assert record(ground)["policy"]["tags_from"] == [f"{peer.ipv4}/32"]
        # One that takes over from that one has nothing to do.
        kill_guard(ground)
        holder.hear_of("another has taken over")
        assert by_key(peer, node, PORT) and not by_key(stranger, node, PORT)


def test_what_the_site_allows_by_now_and_did_not_is_for_runs_that_begin_now(ground: Ground) -> None:
    kernel.require(kernel.TAGS)
    node, peer, stranger = ground.node, ground.peer, ground.stranger
    with rules_changed(ground, allowing(peer), allowing(peer, stranger), *BY_KEY, "--require-key"):
        assert by_key(peer, node, PORT) and not by_key(stranger, node, PORT)
        assert record(ground)["policy"]["tags_from"] == [f"{peer.ipv4}/32"]


@pytest.mark.parametrize("required", [True, False], ids=["insists", "adds"])
def test_a_site_that_allows_no_peers_by_now_has_them_all_kept_out(ground: Ground, required: bool) -> None:
    kernel.require(kernel.TAGS)
    options = ("--require-key",) if required else ("--peers", ground.peer.ipv4)
    with rules_changed(ground, "", "peers = []", *BY_KEY, *options) as (holder, _):
        of_notes(holder, "asks nobody for a tag")
        for host in (ground.peer, ground.stranger):
            assert not by_key(host, ground.node, PORT) and not by_address(host, ground.node, PORT)
        assert not record(ground).get("key")


def test_both_go_on_being_asked_for_where_no_peer_is_left(ground: Ground) -> None:
    kernel.require(kernel.TAGS)
    options = ("--require-key", "--peers", ground.peer.ipv4)
    with rules_changed(ground, "", allowing(ground.stranger), *BY_KEY, *options):
        for host in (ground.peer, ground.stranger):
            assert not by_key(host, ground.node, PORT) and not by_address(host, ground.node, PORT)


def test_peers_that_may_be_named_no_more_are_kept_out_and_the_job_has_its_guard(ground: Ground) -> None:
    node, peer, stranger = ground.node, ground.peer, ground.stranger
    both = ("--peers", f"{peer.ipv4},{stranger.ipv4}")
    with rules_changed(ground, "", allowing(peer), *HELD, *both) as (holder, _):
        assert f"{peer.ipv4} may still connect" in of_notes(holder, "may still connect")
        assert by_address(peer, node, PORT) and not by_address(stranger, node, PORT)
        assert record(ground)["policy"]["peers"] == [f"{peer.ipv4}/32"]


JOB = "import sys; print('ready', flush=True); sys.stdin.read()"


@contextlib.contextmanager
def by_site_key(ground: Ground, *options: str) -> Iterator[subprocess.Popen[str]]:
    kernel.require(kernel.TAGS)
    ground.machine.write(SITE_KEY, SITE, mode=0o400)
    command = [str(COMMANDS / "securerunctl"), "exec", *options, "--", sys.executable, "-c", JOB]
    job = ground.machine.popen(ground.node, command, user=ground.alice, env=MEETING, stdin=subprocess.PIPE)
    assert job.stdout is not None and job.stdout.readline() == "ready\n", finish(job)
    yield job
    finish(job, text_input="")


def taken_over(ground: Ground, guard: int) -> bool:
    found = record(ground)
    return bool(found["guard"] != guard and found["guard_restarts"] == 1 and judges(ground) == 1)


def test_the_sites_key_that_is_switched_off_lets_nobody_in_any_more(ground: Ground) -> None:
    with by_site_key(ground, "--key", "require"):
        before = record(ground)
        ground.machine.configure('site_key = "off"')
        kill_guard(ground)
        assert eventually(lambda: taken_over(ground, before["guard"]), seconds=10)
        assert eventually(lambda: not record(ground).get("key"), seconds=5)
        after = record(ground)["policy"]
        assert before["policy"]["admission"] == "tag" and after.get("admission", "address") == "address"
        assert after["peers"] == []


def test_another_key_of_the_sites_is_for_jobs_that_begin_now(ground: Ground) -> None:
    """What stands, and what the other nodes have, is of the one before; and so is the secret of the job's programs."""
    with by_site_key(ground):
        before = record(ground)
        place = ground.machine.place(f"/run/securerun-jobs/{before['policy']['run_id']}/secret")
        kept = place.read_text()
        ground.machine.write(SITE_KEY, OTHER_SITE, mode=0o400)
        kill_guard(ground)
        assert eventually(lambda: taken_over(ground, before["guard"]), seconds=10)
        assert record(ground)["key"] == before["key"] and place.read_text() == kept
