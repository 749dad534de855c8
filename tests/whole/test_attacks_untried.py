"""Attacks by means of what is rarely there, and what goes wrong around securerun.

A real systemd as process 1, other namespaces, full disks, records and settings of somebody with a grudge.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout import COMMANDS
from holding import HOLDER, Held, held
from hosts import RECORDS, Host, Network, eventually, finish
from init_system import InitSystem, is_possible
from probe import reach
from users import PrivateMachine, User

# --- a real systemd as process 1 ---


@dataclass(frozen=True)
class Booted:
    """A machine that systemd has started, where alice may have guards."""

    system: InitSystem
    machine: PrivateMachine
    node: Host
    stranger: Host
    alice: User

    def job(self, *options: str) -> Held:
        command = [sys.executable, str(HOLDER), "--listen", "7001", *options]
        held = Held(self.system.popen(command, user=self.alice, stdin=subprocess.PIPE))
        assert held.start.get("guarding") == ["shield", "iptables"], held.start
        return held

    def stranger_gets_in(self) -> bool:
        return any(reach(self.stranger, [(address, 7001) for address in self.node.addresses]).values())

    def is_clean(self) -> bool:
        return self.machine.records() is None and not any(self.system.cgroup.rglob("securerun-*"))


@pytest.fixture(scope="module")
def booted(root_and_tools: None) -> Iterator[Booted]:
    if not is_possible():
        if "CI" in os.environ:
            raise RuntimeError("there is no systemd here; scripts/setup.sh test installs it")
        pytest.skip("there is no systemd here")
    with Network("node0", "stranger") as network, PrivateMachine() as machine:
        alice = machine.add_user("alice", groups=["securerun"])
        node, stranger = network
        with InitSystem(machine, node) as system:
            yield Booted(system, machine, node, stranger, alice)


def test_under_systemd_a_job_is_guarded_by_the_units_that_setup_prints(booted: Booted) -> None:
    rules = booted.node.snapshot()
    job = booted.job()
    assert len(booted.system.guards()) == 1
    assert not booted.stranger_gets_in()
    job.let_go()
    assert eventually(booted.is_clean, seconds=2)
    assert booted.node.snapshot() == rules
    assert eventually(lambda: not booted.system.guards(), seconds=2)


@pytest.mark.parametrize(
    "words",
    [
        ["kill", "--signal=KILL", "{guard}"],
        ["stop", "--no-block", "{guard}"],
        ["stop", "securerun.socket"],
        ["restart", "securerun.socket"],
        ["daemon-reload"],
        ["daemon-reexec"],
    ],
    ids=" ".join,
)
def test_what_an_administrator_does_to_the_units_opens_no_job(booted: Booted, words: list[str]) -> None:
    system, job = booted.system, booted.job()
    (guard,) = system.guards()
    system.systemctl(*(word.format(guard=guard) for word in words))
    assert not booted.stranger_gets_in()
    assert eventually(lambda: len(system.guards()) == 1)
    system.systemctl("start", "--no-block", "securerun.socket")
    job.let_go()
    assert eventually(booted.is_clean, seconds=2)


def test_a_job_that_is_a_unit_goes_with_it_and_its_guard_cleans_up(booted: Booted) -> None:
    environment = "".join(f'Environment="{name}={value}"\n' for name, value in booted.alice.environment.items())
    booted.system.add_unit(
        "job.service",
        f"[Service]\nUser=alice\n{environment}StandardOutput=file:/run/job\n"
        f"ExecStart=/bin/sh -c 'sleep 600 | exec {sys.executable} {HOLDER} --listen 7001'\n",
    )
    booted.system.systemctl("start", "job.service")
    said = booted.machine.place("/run/job")
    assert eventually(lambda: said.exists() and said.read_text().endswith("\n")), "the job says nothing"
    assert json.loads(said.read_text())["guarding"] == ["shield", "iptables"]
    assert not booted.stranger_gets_in()
    booted.system.systemctl("stop", "job.service")
    assert eventually(booted.is_clean, seconds=2)
    assert eventually(lambda: not booted.system.guards(), seconds=2)


# --- `securerunctl clean`, again and again ---


def test_clean_takes_nothing_from_a_run_that_is_being_acquired(network: Network) -> None:
    node, stranger = network["node0"], network["stranger"]
    script = 'until [ -e "$1" ]; do "$0" clean || exit; done'
    with tempfile.TemporaryDirectory() as place:
        end = Path(place, "end")
        cleaner = node.popen(["sh", "-c", script, COMMANDS / "securerunctl", end])
        for backend in ("iptables", "nftables"):
            for scope in ("auto", "ports"):
                with held(node, "--scope", scope, "--firewall", backend, "--listen", "60000") as holder:
                    assert backend in holder.start["guarding"]
                    assert RECORDS.joinpath(f"{holder.run_id}.json").exists()
                    assert not any(reach(stranger, [(address, 60000) for address in node.addresses]).values())
        end.touch()
        done = finish(cleaner)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"nothing to remove"}, done.stdout


# --- a /run of another boot ---


def test_a_record_of_another_boot_goes_and_nothing_else_does(network: Network) -> None:
    """Its pids may be anybody's by now, and so may the number of its network namespace."""
    node = network["node0"]
    with held(node, "--listen", "60000") as holder:
        place = RECORDS / f"{holder.run_id}.json"
        old = json.loads(place.read_text())
        old["policy"]["run_id"] = "0123456789ab"
        old["cgroup"] = "/securerun-0123456789ab"
        old["boot_id"] = "00000000-0000-0000-0000-000000000000"
        stale = RECORDS / "0123456789ab.json"
        stale.write_text(json.dumps(old))
        rules, live = node.snapshot(), place.read_text()
        done = node.run([COMMANDS / "securerunctl", "clean"])
        assert done.returncode == 0 and "removed what was left of run 0123456789ab" in done.stdout, done
        assert not stale.exists() and place.read_text() == live
        assert node.snapshot() == rules
