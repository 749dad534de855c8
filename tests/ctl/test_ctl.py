"""securerunctl status and clean: real leases in hosts of their own, real deaths, and what others put into /run."""

from __future__ import annotations

import contextlib
import fcntl
import io
import ipaddress
import json
import os
import pty
import pwd
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel
import probe
import pytest
from checkout import COMMANDS
from hosts import RECORDS, Host, Network, cgroup2_mount, environment, eventually, finish, is_alive, machine_snapshot
from jobs import kill_with_guard
from process_table import fields_of

from securerun.ctl import app
from securerun.firewall.policy import Denial, Layer, Policy, PortRange
from securerun.guard import cleaning, run_directory
from securerun.guard.records import Record
from securerun.linux import proc, processes

SECURERUNCTL = str(COMMANDS / "securerunctl")
RUN = "0123456789ab"
PORT = 29500
COMMAND = "train.py --name 'a b'"
BACKENDS = ("iptables", "nftables", "legacy")
BESIDE_A_SHIELD = ("iptables", kernel.OWNED_NFTABLES, "legacy")
NOBODY = 65534

# A lease for a job of one listener; on `leave` it starts a process that outlives it, at its end of input it is over.
JOB = """
import ipaddress, json, socket, subprocess, sys
from securerun import guarded
from securerun.firewall.policy import Policy, PortRange

run_id, port, firewall, peers, command = sys.argv[1:]
policy = Policy(
    run_id,
    (PortRange(int(port), int(port), "master port"), PortRange(60000, 60015, "HCCL")),
    tuple(ipaddress.ip_network(peer) for peer in peers.split(",")),
    ("eth0",),
)
with guarded(policy, firewall=firewall, command=command):
    listener = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    print("guarded", flush=True)
    for line in sys.stdin:
        null = subprocess.DEVNULL
        child = subprocess.Popen(["sleep", "60"], stdin=null, stdout=null, stderr=null, start_new_session=True)
        print(child.pid, flush=True)
"""

RUN_FIELDS: dict[str, Any] = {
    "run_id": str,
    "pid": int,
    "guard_pid": int,
    "user": str,
    "started": str,
    "command": str,
    "state": str,
    "layers": list,
    "void": (str, type(None)),
    "key": (dict, type(None)),
    "nodes_guarded": (int, type(None)),
    "nodes": (int, type(None)),
    "slurm_job": (int, type(None)),
    "ports": list,
    "peers": list,
    "public": list,
    "interface": (str, type(None)),
    "denied": list,
}
ENTRY_FIELDS = {
    "layers": {"backend": str, "name": str},
    "ports": {"first": int, "last": int, "purpose": str},
    "denied": {"source": str, "port": int, "packets": int},
}


class Job:
    """A light job under a lease in a host."""

    def __init__(self, node: Host, firewall: str, run_id: str = RUN, port: int = PORT) -> None:
        arguments = [run_id, str(port), firewall, "10.77.0.2/32,fd77::2/128", COMMAND]
        self.process = node.popen([sys.executable, "-c", JOB, *arguments], stdin=subprocess.PIPE, stderr=None)
        assert self.read() == "guarded"

    @property
    def pid(self) -> int:
        return self.process.pid

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave_a_process(self) -> int:
        """Start a process that outlives the job; its pid."""
        assert self.process.stdin is not None
        print("leave", file=self.process.stdin, flush=True)
        return int(self.read())

    def end(self) -> None:
        """The good end: end of input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0


def ctl(*arguments: str, host: Host | None = None) -> subprocess.CompletedProcess[str]:
    """securerunctl, run to its end; never a traceback."""
    done = finish(start(*arguments), timeout=60) if host is None else host.run([SECURERUNCTL, *arguments])
    assert "Traceback" not in done.stderr, done
    return done


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SECURERUNCTL, *arguments],
        env=environment(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def runs() -> list[dict[str, Any]]:
    """The runs as `status --json` prints them, after a look at every field."""
    done = ctl("status", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    document = json.loads(done.stdout)
    assert list(document) == ["runs"]
    for run in document["runs"]:
        check_run(run)
    found: list[dict[str, Any]] = document["runs"]
    return found


def check_run(run: dict[str, Any]) -> None:
    """The run has the fields of the design's schema and no others, each of its type."""
    assert run.keys() == RUN_FIELDS.keys()
    for name, kind in RUN_FIELDS.items():
        assert isinstance(run[name], kind), (name, run[name])
    for name, fields in ENTRY_FIELDS.items():
        for entry in run[name]:
            assert {field: type(value) for field, value in entry.items()} == fields
    assert run["state"] in ("guarding", "draining", "stale")
    assert all(layer["backend"] in ("shield", *BACKENDS) for layer in run["layers"])
    assert datetime.fromisoformat(run["started"]).tzinfo is not None
    for peer in run["peers"]:
        ipaddress.ip_network(peer)


def snapshot(node: Host, legacy: bool) -> dict[str, str]:
    """The host's rules. A legacy table shows in a listing only after somebody has used it, so it is used here."""
    if legacy:
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            node.run([tool, "-S"], check=True)
    return node.snapshot(legacy=legacy)


def the_run() -> dict[str, Any]:
    (run,) = runs()
    return run


@pytest.fixture
def planted(root: None) -> Iterator[int]:
    """A descriptor of /run/securerun, for tests that put things there themselves."""
    RECORDS.mkdir(mode=0o700)
    directory = os.open(RECORDS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)
        shutil.rmtree(RECORDS, ignore_errors=True)


def record(run_id: str = RUN, **changes: Any) -> Record:  # noqa: ANN401 - whatever the field holds
    """The record of a run whose launcher and guard are this live process."""
    policy = Policy(run_id, (PortRange(PORT, PORT, "master port"),), ())
    mine, start = os.getpid(), proc.start_time(os.getpid())
    whole = Record(
        policy=policy,
        layers=(),
        launcher=mine,
        launcher_start=start,
        guard=mine,
        guard_start=start,
        boot_id=proc.boot_id(),
        network=proc.namespace("net"),
        processes=proc.namespace("pid"),
        user=0,
        started=time.time(),
        command=COMMAND,
    )
    return replace(whole, **changes)


def dead(run_id: str = RUN, **changes: Any) -> Record:  # noqa: ANN401
    """The record of a run whose launcher's and guard's numbers have passed to another process: this one."""
    late = proc.start_time(os.getpid()) + 1
    return record(run_id, **{"launcher_start": late, "guard_start": late, **changes})


# --- real runs


@pytest.mark.parametrize("backend", BESIDE_A_SHIELD)
def test_a_run_is_shown_from_its_start_to_its_end(network: Network, backend: str) -> None:
    node, peer, stranger = network
    legacy = backend == "legacy"
    before, machine = snapshot(node, legacy), machine_snapshot()
    job = Job(node, backend)
    run = the_run()
    assert (run["run_id"], run["pid"], run["user"], run["state"]) == (RUN, job.pid, "root", "guarding")
    assert (run["command"], run["interface"], run["denied"]) == (COMMAND, "eth0", [])
    assert run["peers"] == ["10.77.0.2/32", "fd77::2/128"]
    assert run["ports"] == [
        {"first": PORT, "last": PORT, "purpose": "master port"},
        {"first": 60000, "last": 60015, "purpose": "HCCL"},
    ]
    assert [layer["backend"] for layer in run["layers"]] == ["shield", backend]
    assert is_alive(run["guard_pid"])
    assert abs(datetime.fromisoformat(run["started"]).timestamp() - time.time()) < 30

    targets = {(address, PORT) for address in node.addresses}
    assert all(probe.reach(peer, targets).values())
    assert not any(probe.reach(stranger, targets).values())

    def denied() -> set[tuple[str, int]]:
        return {(denial["source"], denial["port"]) for denial in the_run()["denied"] if denial["packets"] >= 1}

    assert eventually(lambda: denied() == {(address, PORT) for address in stranger.addresses}), the_run()
    table = ctl("status").stdout
    for words in (RUN, "guarding", COMMAND, backend, "29500 master port", f"{stranger.ipv4} → {PORT}", "through eth0"):
        assert words in table

    left = job.leave_a_process()
    job.end()
    assert eventually(lambda: the_run()["state"] == "draining")
    os.kill(left, signal.SIGKILL)
    assert eventually(lambda: not runs(), seconds=5)
    assert ctl("status").stdout == "no runs on this host\n"
    assert snapshot(node, legacy) == before
    assert machine_snapshot() == machine


@pytest.mark.parametrize("backend", BESIDE_A_SHIELD)
def test_what_a_double_kill_leaves_is_shown_and_cleaned(network: Network, backend: str) -> None:
    node = network["node0"]
    legacy = backend == "legacy"
    before, machine = snapshot(node, legacy), machine_snapshot()
    job = Job(node, backend)
    guarding = the_run()
    assert guarding["pid"] == job.pid
    kill_with_guard(job.process, guarding["guard_pid"])

    assert the_run() == {**guarding, "state": "stale"}
    assert "securerunctl clean" in ctl("status").stdout
    left, left_on_machine = snapshot(node, legacy), machine_snapshot()
    assert left_on_machine != machine

    would = ctl("clean", "--dry-run", host=node)
    assert (would.returncode, would.stderr) == (0, ""), would
    assert RUN in would.stdout
    assert COMMAND in would.stdout
    assert "reserved ports" in would.stdout
    assert left["reserved ports"] != before["reserved ports"]
    rules = {tool: text for tool, text in left.items() if tool != "reserved ports"}
    assert (f"rules in {backend}" in would.stdout) == (not rules.items() <= before.items())
    assert (snapshot(node, legacy), machine_snapshot()) == (left, left_on_machine)

    done = ctl("clean", host=node)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout == would.stdout.replace("would remove what is left", "removed what was left")
    assert snapshot(node, legacy) == before
    assert machine_snapshot() == machine
    assert ctl("clean", host=node).stdout == "nothing to remove\n"


def test_clean_takes_the_dead_run_and_leaves_the_live_one(network: Network) -> None:
    node, peer, stranger = network
    lives = Job(node, "iptables", "ba9876543210", port=29600)
    before, machine = node.snapshot(), machine_snapshot()
    dies = Job(node, "iptables")
    kill_with_guard(dies.process, next(run["guard_pid"] for run in runs() if run["run_id"] == RUN))
    assert {run["run_id"]: run["state"] for run in runs()} == {RUN: "stale", "ba9876543210": "guarding"}

    done = ctl("clean", host=node)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1), done
    assert RUN in done.stdout
    assert (node.snapshot(), machine_snapshot()) == (before, machine)
    assert ctl("clean", host=node).stdout == "nothing to remove\n"
    assert (node.snapshot(), machine_snapshot()) == (before, machine)
    assert the_run()["state"] == "guarding"
    assert all(probe.reach(peer, {(node.ipv4, 29600)}).values())
    assert not any(probe.reach(stranger, {(node.ipv4, 29600)}).values())
    lives.end()


def test_processes_without_a_guard_keep_their_shield(network: Network) -> None:
    node = network["node0"]
    before, machine = node.snapshot(), machine_snapshot()
    job = Job(node, "iptables")
    left = job.leave_a_process()
    kill_with_guard(job.process, the_run()["guard_pid"])
    stands, stands_on_machine = node.snapshot(), machine_snapshot()
    for arguments in (["clean", "--dry-run"], ["clean"]):
        done = ctl(*arguments, host=node)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert RUN in done.stderr
        assert str(left) in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert (node.snapshot(), machine_snapshot()) == (stands, stands_on_machine)
        assert is_alive(left)
    os.kill(left, signal.SIGKILL)
    assert eventually(lambda: not is_alive(left))
    assert ctl("clean", host=node).returncode == 0
    assert (node.snapshot(), machine_snapshot()) == (before, machine)


def test_rules_of_another_network_namespace_are_named_and_kept(network: Network) -> None:
    node = network["node0"]
    machine = machine_snapshot()
    job = Job(node, "iptables")
    kill_with_guard(job.process, the_run()["guard_pid"])
    stands = node.snapshot(), machine_snapshot()
    done = ctl("clean")
    assert (done.returncode, done.stdout) == (1, ""), done
    assert "network namespace" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (node.snapshot(), machine_snapshot()) == stands
    assert ctl("clean", host=node).returncode == 0
    assert machine_snapshot() == machine


def test_what_cannot_be_removed_is_said_and_stays(network: Network) -> None:
    node = network["node0"]
    job = Job(node, "iptables")
    kill_with_guard(job.process, the_run()["guard_pid"])
    stands = node.snapshot(), machine_snapshot()
    without_privilege = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
    done = node.run([*without_privilege, SECURERUNCTL, "clean"])
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith(f"securerunctl: what is left of run {RUN} ")
    assert len(done.stderr.splitlines()) == 1
    assert (node.snapshot(), machine_snapshot()) == stands
    assert ctl("clean", host=node).returncode == 0


# --- records that the tests write


def test_a_host_without_runs_stays_without_a_directory() -> None:
    assert ctl("status").stdout == "no runs on this host\n"
    assert runs() == []
    assert ctl("clean").stdout == ctl("clean", "--dry-run").stdout == "nothing to remove\n"
    assert not RECORDS.exists()


def test_an_empty_directory_goes_but_not_in_a_dry_run(planted: int) -> None:
    assert ctl("clean", "--dry-run").returncode == 0
    assert RECORDS.exists()
    assert ctl("clean").returncode == 0
    assert not RECORDS.exists()


def test_foreign_files_are_named_and_left(planted: int, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(dead("cccccccccccc").document()))
    (RECORDS / "directory").mkdir()
    (RECORDS / "aaaaaaaaaaaa.json").mkdir()
    (RECORDS / "bbbbbbbbbbbb.json").write_text(json.dumps(dead("bbbbbbbbbbbb").document())[:-40])
    (RECORDS / "cccccccccccc.json").symlink_to(elsewhere)
    (RECORDS / "dddddddddddd.json").write_text(json.dumps(dead("cccccccccccc").document()))
    (RECORDS / "eeeeeeeeeeee.json").write_bytes(b"\xff\x00")
    (RECORDS / "notes.txt").write_text("of somebody else")
    left = sorted(machine_snapshot().records or ())
    assert runs() == []
    for arguments in (["clean", "--dry-run"], ["clean"]):
        done = ctl(*arguments)
        assert (done.returncode, done.stdout) == (0, "nothing to remove\n"), done
        assert [line.split()[3] for line in done.stderr.splitlines()] == [str(RECORDS / name) for name in left]
        assert sorted(machine_snapshot().records or ()) == left
    assert elsewhere.exists()


STRANGE: dict[str, dict[str, Any]] = {
    "no policy": {"policy": None},
    "a list for a policy": {"policy": []},
    "no list of layers": {"layers": 1},
    "no layer": {"layers": [None]},
    "a text for a number": {"launcher": "1"},
    "a cgroup with a NUL": {"cgroup": "/a\0b"},
    "a cgroup of somebody else": {"cgroup": "/foreign"},
    "no time": {"started": None},
    "a field too few": {"user": ...},
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_records_are_left_and_said(planted: int, what: str) -> None:
    document = {**dead().document(), **STRANGE[what]}
    text = json.dumps({name: value for name, value in document.items() if value is not ...})
    check_left_alone(f"{RUN}.json", lambda path: path.write_text(text))


def test_a_record_nested_too_deep_is_left_and_said(planted: int) -> None:
    check_left_alone(f"{RUN}.json", lambda path: path.write_text(100_000 * "["))


def test_a_fifo_in_a_records_place_is_left_and_said(planted: int) -> None:
    check_left_alone(f"{RUN}.json", lambda path: os.mkfifo(path))


def test_a_directory_named_as_a_partial_record_harms_nobody(planted: int) -> None:
    (RECORDS / f".{RUN}.json.partial").mkdir()
    run_directory.write(planted, dead("aaaaaaaaaaaa"))
    for arguments in (["clean", "--dry-run"], ["clean"]):
        done = ctl(*arguments)
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == 1
        assert f".{RUN}.json.partial is no record" in done.stderr
    assert [path.name for path in RECORDS.iterdir()] == [f".{RUN}.json.partial"]


def check_left_alone(name: str, plant: Callable[[Path], object]) -> None:
    """What was planted is no run, is named by clean, and stays; so does an empty cgroup that it may speak of."""
    mount = cgroup2_mount()
    assert mount is not None
    foreign = mount / "foreign"
    foreign.mkdir()
    plant(RECORDS / name)
    try:
        assert runs() == []
        for arguments in (["clean", "--dry-run"], ["clean"]):
            done = ctl(*arguments)
            assert (done.returncode, done.stdout) == (0, "nothing to remove\n"), done
            assert str(RECORDS / name) in done.stderr
            assert os.path.lexists(RECORDS / name)
            assert foreign.exists()
    finally:
        with contextlib.suppress(FileNotFoundError):
            foreign.rmdir()


def test_records_of_the_dead_go_and_of_the_living_stay(planted: int) -> None:
    other_boot = "00000000-0000-0000-0000-000000000000"
    run_directory.write(planted, record("aaaaaaaaaaaa"))
    run_directory.write(planted, record("bbbbbbbbbbbb", launcher_start=1, launcher=1, draining=True))
    run_directory.write(planted, record("cccccccccccc", guard_start=proc.start_time(os.getpid()) + 1))
    run_directory.write(planted, dead("dddddddddddd"))
    run_directory.write(planted, record("eeeeeeeeeeee", boot_id=other_boot, layers=(Layer("iptables", "SECURERUN"),)))
    (RECORDS / ".ffffffffffff.json.partial").write_text("{")
    states = {run["run_id"][0]: run["state"] for run in runs()}
    assert states == {"a": "guarding", "b": "draining", "c": "stale", "d": "stale", "e": "stale"}

    would = ctl("clean", "--dry-run")
    assert (would.returncode, would.stderr) == (0, ""), would
    assert len(list(RECORDS.iterdir())) == 6
    done = ctl("clean")
    assert (done.returncode, done.stderr) == (0, ""), done
    for lines in (would.stdout.splitlines(), done.stdout.splitlines()):
        assert len(lines) == 3
        assert all(any(word in line for line in lines) for word in (".ffffffffffff", "dddddddddddd", "eeeeeeeeeeee"))
        assert not any("rules" in line for line in lines)
    assert sorted(path.name[0] for path in RECORDS.iterdir()) == ["a", "b", "c"]
    assert {run["run_id"][0] for run in runs()} == {"a", "b", "c"}


def test_clean_lets_others_launch_between_one_dead_run_and_the_next(
    planted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may take a while; and one that has a guard by its turn is none any more, nor one that somebody removed."""
    for run_id in ("aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc", "dddddddddddd"):
        run_directory.write(planted, dead(run_id))
    locked, lock = 0, run_directory.host_lock

    def counted() -> contextlib.AbstractContextManager[int]:
        nonlocal locked
        locked += 1
        if locked == 2:
            run_directory.write(planted, record("bbbbbbbbbbbb"))
            run_directory.remove(planted, "cccccccccccc")
        return lock()

    monkeypatch.setattr(run_directory, "host_lock", counted)
    monkeypatch.setattr(cleaning, "_LOCKED_SECONDS", 0.0)
    done = cleaning.clean(dry_run=False)
    assert [run.record.run_id[0] for run in done.abandoned] == ["a", "d"]
    assert locked == 1 + 4
    assert [path.name[0] for path in RECORDS.iterdir()] == ["b"]


def test_clean_asks_a_users_processes_for_no_longer_than_half_a_second_a_run(
    planted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for the host's lock meanwhile; what was not asked may be the run's, which stays, and that is said."""
    user, now, reads = 61_003, 0.0, 0
    read = proc.environment

    def slowly(pid: int) -> bytes:
        nonlocal now, reads
        now, reads = now + 0.2, reads + 1
        return read(pid)

    sleepers = [subprocess.Popen(["sleep", "600"], user=user, env={}) for _ in range(8)]
    try:
        for run_id in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
            run_directory.write(planted, dead(run_id, user=user))
        monkeypatch.setattr(proc, "environment", slowly)
        for module in (cleaning, processes):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
        done = cleaning.clean(dry_run=False)
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()
    assert reads == 2 * 3
    assert ["more processes than could be asked" in run.runs for run in done.abandoned] == [True, True]
    assert not any(run.is_dead for run in done.abandoned)
    assert {path.name[0] for path in RECORDS.iterdir()} == {"a", "b"}


def test_a_containers_pids_mean_nothing_out_here(planted: int) -> None:
    inside = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "60"])
    children = Path(f"/proc/{inside.pid}/task/{inside.pid}/children")
    assert eventually(lambda: children.read_text().strip() != "")
    namespace = Path(f"/proc/{children.read_text().strip()}/ns/pid").stat().st_ino
    run_directory.write(planted, dead(processes=namespace))
    assert the_run()["state"] == "guarding"
    assert ctl("clean").stdout == "nothing to remove\n"
    inside.kill()
    inside.wait()
    assert eventually(lambda: the_run()["state"] == "stale")
    assert RUN in ctl("clean").stdout
    assert not RECORDS.exists()


def test_user_of_a_container_is_not_named_as_the_hosts_user_of_that_number(planted: int) -> None:
    known = next(entry for entry in pwd.getpwall() if entry.pw_uid)
    run_directory.write(planted, dead("aaaaaaaaaaaa", user=known.pw_uid, container="/pods/one"))
    run_directory.write(planted, dead("bbbbbbbbbbbb", user=known.pw_uid))
    assert [run["user"] for run in runs()] == [str(known.pw_uid), known.pw_name]
    shown = ctl("status").stdout.splitlines()
    assert next(line.split()[2] for line in shown if line.startswith("aaaaaaaaaaaa")) == str(known.pw_uid)
    metrics = ctl("metrics").stdout
    assert f'run="aaaaaaaaaaaa",user="{known.pw_uid}"' in metrics
    assert f'run="bbbbbbbbbbbb",user="{known.pw_name}"' in metrics
    for options in (["--dry-run"], []):
        cleaned = ctl("clean", *options).stdout
        assert f"run aaaaaaaaaaaa of {known.pw_uid} in container /pods/one" in cleaned
        assert f"run bbbbbbbbbbbb of {known.pw_name} (" in cleaned


def test_what_a_user_wrote_cannot_steer_the_terminal(planted: int) -> None:
    command = "\x1b]0;gotcha\x07 \u202e\r\n" + os.fsdecode(b"\xff") + " ü [red]"
    run_directory.write(planted, record("aaaaaaaaaaaa", command=command, user=4_000_000_000, started=1e300))
    run_directory.write(planted, dead("bbbbbbbbbbbb", command=command, user=2**40, started=float("nan")))
    assert {run["command"] for run in runs()} == {command}
    assert [run["user"] for run in runs()] == ["4000000000", str(2**40)]
    for encoding in ("utf-8", "ascii"):
        for arguments in (["status"], ["clean", "--dry-run"]):
            done = finish(start(*arguments, PYTHONIOENCODING=encoding))
            assert (done.returncode, done.stderr) == (0, ""), done
            assert not set(done.stdout) & {"\x1b", "\x07", "\u202e", "\r"}
            assert "\\x1b]0;gotcha\\x07 \\u202e" in done.stdout
            assert ("ü" in done.stdout) == (encoding == "utf-8")


def test_long_lists_are_cut_in_the_table_and_whole_in_json(planted: int) -> None:
    peers = tuple(ipaddress.ip_network(f"10.0.{number}.1/32") for number in range(50))
    ports = tuple(PortRange(port, port, "worker") for port in range(1000, 1050))
    denied = tuple(Denial(ipaddress.ip_address(f"10.1.0.{number}"), 0, 1) for number in range(50))
    policy = Policy(RUN, ports, peers, ("eth0", "ib0"))
    run_directory.write(planted, record(policy=policy, denied=denied))
    run = the_run()
    assert (len(run["peers"]), len(run["ports"]), len(run["denied"])) == (50, 50, 50)
    assert run["interface"] == "eth0,ib0"
    table = ctl("status").stdout
    assert table.count("and 42 more") == 3
    assert "10.1.0.0 → a port that could not be read" in table


# --- terminals and watching


def test_the_table_fits_the_terminal(planted: int) -> None:
    run_directory.write(planted, record(command="train.py " + 50 * "漢字 "))
    for columns in (40, 80, 132):
        with on_terminal(columns, "status") as (process, read):
            assert process.wait(timeout=30) == 0
            lines = read().splitlines()
        assert lines[0].startswith("RUN ")
        assert all(len(line) + sum(character >= "⺀" for character in line) <= columns for line in lines)
        assert any("…" in line for line in lines)


def test_watching_a_terminal_ends_well_with_ctrl_c(planted: int) -> None:
    run_directory.write(planted, record())
    with on_terminal(80, "status", "--watch") as (process, read):
        assert eventually(lambda: RUN in read())
        run_directory.write(planted, record(draining=True))
        assert eventually(lambda: "draining" in read())
        run_directory.remove(planted, RUN)
        assert eventually(lambda: "no runs on this host" in read())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in read()


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_into_a_pipe_prints_every_second(planted: int, as_json: bool) -> None:
    run_directory.write(planted, record())
    process = start("status", "--watch", *["--json"] * as_json)
    assert process.stdout is not None
    times: list[float] = []
    while len(times) < 4:
        line = process.stdout.readline()
        if as_json:
            (run,) = json.loads(line)["runs"]
            check_run(run)
        if RUN in line:
            times.append(time.monotonic())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert 2.5 < times[-1] - times[0] < 15


def test_watching_takes_little_of_a_processor(planted: int) -> None:
    networks = tuple(ipaddress.ip_network(f"10.{number >> 8}.{number & 255}.1/32") for number in range(20_000))
    run_directory.write(planted, record(policy=Policy(RUN, (), networks)))
    process = start("status", "--watch")
    assert process.stdout is not None
    process.stdout.readline()
    before, began = cpu_seconds(process.pid), time.monotonic()
    time.sleep(5)
    assert (cpu_seconds(process.pid) - before) / (time.monotonic() - began) < 0.35
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_reader_that_has_enough_is_no_error(planted: int) -> None:
    run_directory.write(planted, record())
    process = start("status", "--watch")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=30)
    assert process.stderr.read() == ""
    process.stderr.close()


_PRINTING = (
    "status",
    "status --json",
    "status --watch",
    "metrics",
    "clean",
    "--help",
    "setup oci-hook",
    "audit --print-kinds",
)


@pytest.mark.parametrize(
    ("stream", "said"), [(">&-", "output is closed, so nothing"), ("> /dev/full", "No space left")]
)
@pytest.mark.parametrize("words", _PRINTING)
def test_what_cannot_be_printed_is_one_line_and_status_1(planted: int, words: str, stream: str, said: str) -> None:
    run_directory.write(planted, record())
    command = ["sh", "-c", f'exec "$@" {stream}', "sh", SECURERUNCTL, *words.split()]
    variables = {name: text for name, text in environment().items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=variables, check=False, timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and said in done.stderr, done
    assert done.stderr.startswith("securerunctl: ")


def test_command_under_exec_may_have_its_standard_output_closed(root: None) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", SECURERUNCTL, "exec", "--unprotected", "--", "true"]
    variables = environment({"GLOO_SOCKET_IFNAME": None})
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=variables, check=False, timeout=30)
    assert done.returncode == 0 and "closed" not in done.stderr, done


# --- privilege, and how light the commands are


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["clean"], ["clean", "--dry-run"]])
def test_without_permission_it_is_one_line_and_status_77(planted: int, arguments: list[str]) -> None:
    run_directory.write(planted, dead())
    status, words = as_nobody(*arguments)
    assert status == 77, words
    assert words.startswith("securerunctl: ")
    assert "run as root" in words
    assert words.count("\n") == 1
    assert list(RECORDS.iterdir()) == [RECORDS / f"{RUN}.json"]


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("arguments", [["status"], ["clean"]])
def test_something_else_in_the_directorys_place_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    RECORDS.symlink_to(tmp_path)
    try:
        done = ctl(*arguments)
    finally:
        RECORDS.unlink()
    assert done.returncode == 1, done
    assert done.stderr.startswith("securerunctl: /run/securerun ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["clean"], ["--help"]])
def test_commands_load_neither_torch_nor_psutil(planted: int, arguments: list[str]) -> None:
    run_directory.write(planted, dead())
    call = (
        "import sys\n"
        "from securerun.ctl import app\n"
        "try:\n    app.main()\n"
        "finally:\n    print('loaded', *({'torch', 'psutil', 'numpy'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stderr == "loaded\n"


def test_help_has_a_line_for_each_command() -> None:
    help_text = ctl("--help").stdout
    for words in ("plan     Print the plan", "status   Show the runs", "clean    Remove what dead runs left"):
        assert words in help_text.replace("\n", " "), help_text


# Each takes longer to import than all that these commands need.
SLOW = {"torch", "rich", "pydantic", "psutil"}


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["clean", "--help"], ["exec", "--help"], ["matrix"]])
def test_commands_that_need_no_torch_start_without_what_is_slow(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", SECURERUNCTL, *arguments], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & SLOW


def test_shells_can_complete_commands() -> None:
    ask = {"_SECURERUNCTL_COMPLETE": "complete_bash", "COMP_WORDS": "securerunctl sta", "COMP_CWORD": "1"}
    assert finish(start(**ask)).stdout.split() == ["status"]


def test_wrong_usage_is_status_2() -> None:
    assert ctl("clean", "--no-such-option").returncode == 2


@contextlib.contextmanager
def on_terminal(columns: int, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """securerunctl on a terminal of its own, and what reads all that it has printed so far."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = environment({"TERM": "xterm", "COLUMNS": None, "LINES": None})
    process = subprocess.Popen([SECURERUNCTL, *arguments], env=variables, stdin=slave, stdout=slave, stderr=slave)
    printed = b""

    def read() -> str:
        nonlocal printed
        while select.select([master], [], [], 0)[0]:
            printed += os.read(master, 65536)
        return printed.decode()

    try:
        yield process, read
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)


def as_nobody(*arguments: str) -> tuple[int, str]:
    """Status and standard error of securerunctl in a process that is nobody's.

    Forked, not started, after all modules were loaded: nobody may be unable to read the Python that runs the tests.
    """
    for rehearsal in (["status"], ["clean", "--dry-run"]):
        with contextlib.redirect_stdout(io.StringIO()):
            assert in_this_process(*rehearsal) == 0
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            sys.stderr = os.fdopen(writing, "w")
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            status = in_this_process(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as words:
        said = words.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def in_this_process(*arguments: str) -> int:
    """The exit status of securerunctl, called as a function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["securerunctl", *arguments])
        try:
            app.main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
    return 0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5), stat fields 14 and 15)."""
    fields = fields_of(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_no_option_stands_in_an_annotation() -> None:
    """In Python 3.9 typer does not see it where annotations are texts: `plan --format` was no option there."""
    read = [path for path in Path(app.__file__).parent.glob("*.py") if "Annotated[" in path.read_text()]
    assert read == []
