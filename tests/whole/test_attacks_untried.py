"""Attacks by means of what is rarely there, and what goes wrong around securerun.

A real systemd as process 1, other namespaces, full disks, records and settings of somebody with a grudge.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import kernel
import pytest
from attacking import Ground
from checkout import COMMANDS
from conversation import order
from holding import HOLDER, Held, held
from hosts import RECORDS, Host, Network, eventually, finish
from init_system import InitSystem, is_possible
from lacking import Lacking
from probe import reach
from users import CONFIGURATION, PrivateMachine, User

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
        raise Lacking("there is no systemd here; scripts/setup.sh test installs it")
    with Network("node0", "stranger") as network, PrivateMachine() as machine:
        alice = machine.add_user("alice", groups=["securerun"])
        node, stranger = network
        with InitSystem(machine, node) as system:
            yield Booted(system, machine, node, stranger, alice)


def test_under_systemd_a_job_is_guarded_by_the_units_that_setup_prints(booted: Booted) -> None:
    rules = booted.node.snapshot()
    job = booted.job()
    (guard,) = booted.system.guards()
    assert not booted.stranger_gets_in()
    show = ("show", "--property=Slice,MemoryMax,TasksMax")
    assert "Slice=securerun.slice\n" in booted.system.systemctl(*show, guard), "all guards have a limit together"
    together = booted.system.systemctl(*show, "securerun.slice").splitlines()
    assert {"MemoryMax=6442450944", "TasksMax=1024"} <= set(together), together
    job.let_go()
    assert eventually(booted.is_clean, seconds=2)
    assert booted.node.snapshot() == rules
    assert eventually(lambda: not booted.system.guards(), seconds=2)


def test_start_line_names_systemd_where_that_is_what_listens(booted: Booted) -> None:
    done = booted.system.run(
        [COMMANDS / "securerunctl", "exec", "--peers", "10.0.0.9", "--", "true"], user=booted.alice
    )
    assert done.returncode == 0 and "guard started by systemd" in done.stderr, done


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
    node.snapshot(legacy=True)
    script = 'until [ -e "$1" ]; do "$0" clean || exit; done'
    with tempfile.TemporaryDirectory() as place:
        end = Path(place, "end")
        cleaner = node.popen(["sh", "-c", script, COMMANDS / "securerunctl", end])
        owned = not kernel.lack_of(kernel.OWNED_TABLES)
        for backend in ("iptables", "nftables", "legacy"):
            for scope in ("auto", "ports") if owned or backend != "nftables" else ("ports",):
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


# --- /run is full ---


@pytest.fixture
def small_run() -> Iterator[int]:
    """A process in whose mount namespace /run is a small file system."""
    script = "mount -t tmpfs -o size=64k,mode=755 tmpfs /run; echo; exec cat"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["unshare", "--mount", "sh", "-ec", script], text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "\n"
        yield process.pid
        process.stdin.close()


def fill(process: int) -> None:
    with Path(f"/proc/{process}/root/run/fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@contextlib.contextmanager
def held_in(process: int, node: Host, *options: str) -> Iterator[Held]:
    """A lease held in the mount namespace of a process."""
    inside = ["nsenter", f"--mount=/proc/{process}/ns/mnt", "--wd=/"]
    holder = Held(node.popen([*inside, sys.executable, HOLDER, *options], stdin=subprocess.PIPE))
    yield holder
    holder.let_go()


def guard_of(process: int, run_id: str) -> int:
    guard: int = json.loads(Path(f"/proc/{process}/root/run/securerun/{run_id}.json").read_text())["guard"]
    return guard


@pytest.mark.parametrize("backend", ["iptables", "nftables", "legacy"])
def test_stranger_gets_in_nowhere_when_run_is_full(network: Network, small_run: int, backend: str) -> None:
    """Ports that are opened and peers that go while nothing can be recorded, and a guard that dies."""
    node, peer, stranger = network
    if backend == "legacy":
        for command in ("iptables-legacy", "ip6tables-legacy"):
            node.run([command, "-S"], check=True)  # an empty table stays, as after any look at it
    rules = node.snapshot(legacy=backend == "legacy")
    options = ("--scope", "ports", "--firewall", backend, "--listen", "60000", "--peers", peer.ipv4)
    with held_in(small_run, node, *options) as holder:
        assert holder.start["guarding"] == [backend]
        fill(small_run)
        holder.say("listen 7001")
        holder.hear_of("the run cannot be recorded")
        assert reach(stranger, [(node.ipv4, 7001), (node.ipv6, 7001)]) == {
            (node.ipv4, 7001): False,
            (node.ipv6, 7001): False,
        }
        assert reach(peer, [(node.ipv4, 7001)])[node.ipv4, 7001]
        holder.say("10.77.0.99")
        assert eventually(lambda: not reach(peer, [(node.ipv4, 60000)])[node.ipv4, 60000], seconds=5)
        os.kill(guard_of(small_run, holder.run_id), signal.SIGKILL)
        holder.hear_of("another has taken over")
        holder.say("listen 7002")
        assert eventually(lambda: not reach(stranger, [(node.ipv4, 7002)])[node.ipv4, 7002], seconds=2)
        assert not reach(stranger, [(node.ipv4, 7001)])[node.ipv4, 7001]
        assert not reach(peer, [(node.ipv4, 60000)])[node.ipv4, 60000]
    place = Path(f"/proc/{small_run}/root/run/securerun")
    assert eventually(lambda: not place.exists() and node.snapshot(legacy=backend == "legacy") == rules, seconds=2)


def test_nothing_is_left_of_a_launch_when_run_is_full(network: Network, small_run: int) -> None:
    node = network["node0"]
    rules = node.snapshot()
    fill(small_run)
    inside = ["nsenter", f"--mount=/proc/{small_run}/ns/mnt", "--wd=/"]
    done = node.run([*inside, sys.executable, HOLDER])
    assert "cannot be recorded in /run/securerun: No space left on device; make room there" in done.stdout, done
    assert not Path(f"/proc/{small_run}/root/run/securerun").exists()
    assert node.snapshot() == rules


# --- other namespaces ---

# The host's /run and network, and a process of its own as number 1; a clock since boot that is another.
IN_OTHER_PIDS = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
AT_ANOTHER_TIME = ["unshare", "--time", "--boottime", "5000", "--fork", "--kill-child"]
# As in a container: scope `ports`, and no cgroup by which its processes are known.
WITHOUT_CGROUP = 'mount -t tmpfs -o ro none /sys/fs/cgroup; exec setpriv --bounding-set=-sys_admin,-bpf "$@"'


@pytest.mark.parametrize("elsewhere", [IN_OTHER_PIDS, AT_ANOTHER_TIME], ids=["pids", "time"])
def test_a_live_run_is_left_alone_from_another_namespace_that_shares_run(
    network: Network, elsewhere: list[str]
) -> None:
    node = network["node0"]
    before = node.snapshot()
    # On no port of the plan: those would tell that the run is alive.
    command = ["unshare", "--mount", "sh", "-ec", WITHOUT_CGROUP, "sh", sys.executable, str(HOLDER), "--listen", "7001"]
    holder = Held(node.popen(command, stdin=subprocess.PIPE))
    assert holder.start["guarding"] == ["iptables"]
    record = RECORDS / f"{holder.run_id}.json"
    assert eventually(lambda: "7001" in str(node.snapshot()))
    rules = node.snapshot()
    cleaner = [*elsewhere, str(COMMANDS / "securerunctl"), "clean"]
    done = node.run(cleaner)
    assert done.returncode == 0 and done.stdout == "nothing to remove\n", done
    assert record.exists() and node.snapshot() == rules
    for pid in (holder.process.pid, json.loads(record.read_text())["guard"]):
        os.kill(pid, signal.SIGKILL)
    holder.process.wait()
    assert f"removed what was left of run {holder.run_id}" in node.run(cleaner).stdout
    assert not record.exists() and node.snapshot() == before


def test_a_run_in_a_container_that_is_gone_is_cleaned_up_after_in_the_next_with_the_same_run(network: Network) -> None:
    """docker restart: the number 1 of before, and of its pid namespace, means nobody any more."""
    node = network["node0"]
    before = node.snapshot()
    script = '"$@" & wait'
    holder = Held(node.popen([*IN_OTHER_PIDS, "sh", "-c", script, "sh", sys.executable, HOLDER], stdin=subprocess.PIPE))
    holder.process.kill()
    holder.process.wait()
    assert (RECORDS / f"{holder.run_id}.json").exists() and node.snapshot() != before
    done = node.run([*IN_OTHER_PIDS, COMMANDS / "securerunctl", "clean"])
    assert f"removed what was left of run {holder.run_id}" in done.stdout, done
    assert node.snapshot() == before


def test_a_guard_that_sees_the_processes_of_another_pid_namespace_refuses(network: Network) -> None:
    """Whom it looks at in /proc is not whom it would move and kill."""
    node = network["node0"]
    rules = node.snapshot()
    done = node.run(["unshare", "--pid", "--fork", "--kill-child", sys.executable, HOLDER])
    assert "shows the processes of another pid namespace" in done.stdout, done
    assert node.snapshot() == rules


# --- records and settings of somebody with a grudge ---

DEEP = "[" * 200_000 + "]" * 200_000
HOSTILE: dict[str, str | dict[str, object]] = {
    "nothing": "",
    "null": "null",
    "deep": DEEP,
    "digits": '{"launcher": ' + "9" * 1_000_000 + "}",
    "zeros": "\0" * 1_000_000,
    "not a number": {"started": float("nan")},
    "never": {"started": float("inf")},
    "no process": {"launcher": -1, "guard": 10**300},
    "no user": {"user": 2**70},
    "no cgroup": {"cgroup": "/\ud800/securerun-{run_id}"},
    "long cgroup": {"cgroup": "/" + "a/" * 50_000 + "securerun-{run_id}"},
    "another cgroup": {"cgroup": "/../../{run_id}"},
    "ports": {"reserved": [[1.5, float("nan")]]},
    "layers": {"layers": [[[[]]]]},
}


def test_records_that_are_none_keep_nobody_from_a_guard(network: Network) -> None:
    """Root alone can write them: a crash, a bug or another version may have."""
    node = network["node0"]
    with held(node) as holder:
        record = json.loads((RECORDS / f"{holder.run_id}.json").read_text())
        ledger = next(RECORDS.glob("reserved-*.ledger")).name
    RECORDS.mkdir(mode=0o700)
    try:
        for number, content in enumerate(HOSTILE.values()):
            run_id = f"{number:012x}"
            if isinstance(content, dict):
                changed = {**record, "policy": {**record["policy"], "run_id": run_id}, **content}
                content = json.dumps(changed).replace("{run_id}", run_id)
            (RECORDS / f"{run_id}.json").write_text(content)
        for name in ("aaaaaaaaaaaa.json", ".aaaaaaaaaaab.json.partial"):
            os.mkfifo(RECORDS / name)
        (RECORDS / "aaaaaaaaaaac.json").symlink_to("/dev/zero")
        (RECORDS / "aaaaaaaaaaad.json").mkdir()
        for unreadable in (DEEP, "null", '{"boot_id": 1, "ports": []}'):
            (RECORDS / ledger).write_text(unreadable)
            for words in (["status"], ["status", "--json"], ["clean", "--dry-run"]):
                done = node.run([COMMANDS / "securerunctl", *words], timeout=20)
                assert done.returncode == 0 and "Traceback" not in done.stderr, done
            holder = Held(node.popen([sys.executable, HOLDER], stdin=subprocess.PIPE))
            assert "shield" in holder.start.get("guarding", ()), holder.start
            holder.let_go()
            assert eventually((lambda run: lambda: not (RECORDS / f"{run}.json").exists())(holder.run_id))
    finally:
        shutil.rmtree(RECORDS)


@pytest.mark.parametrize("kind", ["pipe", "device", "too long", "too deep", "no text"])
def test_limits_that_cannot_be_read_keep_no_guard_waiting(ground: Ground, kind: str) -> None:
    """Root's own file, or what stands in its place: only root is served then, and everybody else is told."""
    texts = {"too long": "# " + "a" * 2_000_000, "too deep": f"ports = {DEEP}\n", "no text": "ports = [1]\0"}
    ground.machine.configure(texts.get(kind, ""))
    place = ground.machine.place(CONFIGURATION)
    if kind in ("pipe", "device"):
        place.unlink()
        os.mknod(place, (stat.S_IFIFO if kind == "pipe" else stat.S_IFCHR) | 0o644, os.makedev(1, 5))
    assert "limits for users cannot be read" in ground.refusal(ground.alice, order())
