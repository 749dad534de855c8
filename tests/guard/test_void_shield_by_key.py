"""A shield that ceases to hold in the middle of a job that has a key: nobody is asked for a tag any more.

Who only adds by the key goes on by addresses; who insists on a tag lets nobody in, or is ended where that cannot be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import kernel
import pytest
from checkout import COMMANDS
from holding import HOLDER, Held
from hosts import RECORDS, Host, Network, eventually, finish
from net_cls import UNTOLD, doubted, hierarchy, is_proven_again, switch_all_off
from patience import patient
from ways_in import SECRET, by_address, by_key

CTL = str(COMMANDS / "securerunctl")
PORT = 7001
OPTIONS = ("--key", SECRET.hex(), "--ports", str(PORT), "--listen", str(PORT))
LET_ON = "--tcp-option 254"


@pytest.fixture(autouse=True)
def _tags(root: None) -> None:
    kernel.require(kernel.TAGS)


def recorded(run_id: str) -> dict[str, object]:
    document: dict[str, object] = json.loads((RECORDS / f"{run_id}.json").read_text())
    return document


def rules(node: Host) -> str:
    return node.run(["iptables-save"], check=True).stdout


@pytest.mark.parametrize("required", [False, True], ids=["adds", "insists"])
def test_port_chains_let_no_option_on_any_more_and_who_insists_on_a_tag_lets_nobody_in(
    network: Network, required: bool
) -> None:
    node, peer, stranger = network
    options = (*OPTIONS, "--peers", peer.ipv4, "--firewall", "iptables", *["--require-key"] * required)
    with doubted(node, *options) as holder:
        assert eventually(lambda: is_proven_again(holder.run_id))
        assert by_key(peer, node, PORT) and by_address(peer, node, PORT) is not required
        assert by_key(stranger, node, PORT) is not required
        assert LET_ON in rules(node)
        switch_all_off(holder.run_id)
        assert eventually(lambda: LET_ON not in rules(node), seconds=2)
        said = holder.hear_of("nobody is asked for a tag of the job's key any more")["news"]
        assert ("nobody else may connect" if required else "by addresses alone") in said
        assert by_address(peer, node, PORT) is not required
        assert not by_key(stranger, node, PORT) and not by_address(stranger, node, PORT)
        assert eventually(lambda: recorded(holder.run_id).get("key") in (None, ""))
        # Nobody is let in later either: not by other peers, nor by the guard that comes next.
        holder.say(stranger.ipv4)
        if required:
            assert "no shield that asks" in holder.hear_of("a part of the guard's work fails")["news"]
        else:
            assert eventually(lambda: by_address(stranger, node, PORT), seconds=3)
            holder.say(peer.ipv4)
        os.kill(int(str(recorded(holder.run_id)["guard"])), signal.SIGKILL)
        holder.hear_of("another has taken over")
        assert LET_ON not in rules(node)
        assert not by_key(stranger, node, PORT) and by_address(peer, node, PORT) is not required


def test_where_no_chains_can_close_it_a_job_that_insists_on_a_tag_is_ended(network: Network, tmp_path: Path) -> None:
    node = network["node0"]
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("0123456789abcdef" * 4)
    script = "import time; print('ready', flush=True); time.sleep(60)"
    command = [CTL, "exec", "--firewall", "off", "--key", str(key), "--", sys.executable, "-c", script]
    job = node.popen([*UNTOLD, *command], env={"MASTER_ADDR": "node0", "NNODES": "2"})
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    (record,) = RECORDS.glob("*.json")
    assert eventually(lambda: is_proven_again(record.stem))
    switch_all_off(record.stem)
    done = finish(job, timeout=patient(20))
    assert done.returncode == 77, done
    assert "nobody was to connect without a tag of its key, and the shield holds no more" in done.stderr
    assert "Traceback" not in done.stderr


def test_where_something_may_switch_the_shield_off_no_key_is_claimed(network: Network, tmp_path: Path) -> None:
    """The port chains close each port of such a job from the start: a tag would lead to a shield that may be none."""
    node, peer, _ = network
    with hierarchy(tmp_path / "v1"):
        with doubted(node, *OPTIONS, "--peers", peer.ipv4) as holder:
            said = " ".join(holder.start["notes"])
            assert "no key (net_cls or net_prio of cgroup version 1 is here" in said and "addresses alone" in said
            assert by_address(peer, node, PORT) and LET_ON not in rules(node)
        launcher = [*UNTOLD, sys.executable, str(HOLDER), *OPTIONS, "--require-key"]
        refused = Held(node.popen(launcher, stdin=subprocess.PIPE))
        assert "nobody can be asked for its tag here: net_cls or net_prio" in refused.start["refused"]
        with suppress(BrokenPipeError):
            finish(refused.process)
