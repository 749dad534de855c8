"""Attacks on what a guard does to processes and to runs over their lives: whom it moves, ends, believes and reaps.

Each is an ordinary user's, on the machine of `attacking`, unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attacking import Ground, cgroup_of, pid_taken, program
from cgroups import inside
from checkout import CHECKOUT, COMMANDS
from conversation import WAYS, Conversation, guards, log_of, order
from hosts import cgroup2_mount, eventually, is_alive
from memory_shown import SHOWS_A_GIGABYTE
from probe import reach
from process_table import name_of, status_of
from users import GUARD, RECORDS, delegated_cgroup

# flock(2) in /proc/PID/syscall (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
_FLOCK = {"x86_64": "73", "aarch64": "32"}[platform.machine()]

# --- whom it moves ---


class HostLock:
    """The lock that guards wait for, held as by other guards that work slowly."""

    def __init__(self, ground: Ground) -> None:
        self._place = ground.machine.place(RECORDS)
        self._place.mkdir(mode=0o700, exist_ok=True)
        self._held = self._locked()

    def pass_by(self, guard: int) -> None:
        """Let a guard that waits have it once, and hold it again before the guard is back."""
        assert eventually(lambda: waits_for_a_lock(guard))
        # The kernel's queue is in order: who stands in it behind the guard has it before the guard's next turn.
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(self._locked_before_others)
            assert eventually(lambda: waits_for_a_lock(os.getpid()))
            os.close(self._held)
            self._held = again.result(timeout=20)
        assert eventually(lambda: waits_for_a_lock(guard))

    def release(self) -> None:
        """Let go of it, and of the directory if no guard has put anything there."""
        with contextlib.suppress(OSError):
            self._place.rmdir()
        os.close(self._held)

    def _locked_before_others(self) -> int:
        with contextlib.suppress(OSError):  # for this thread, which is to be awake sooner than the guard is back
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        return self._locked()

    def _locked(self) -> int:
        descriptor = os.open(self._place, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor


def waits_for_a_lock(pid: int) -> bool:
    """Whether a thread of a process waits in the kernel's queue for an flock.

    Not by /proc/locks, which on 5.10 tells of those who wait for who has it, and not of those behind these.
    """
    tasks = Path(f"/proc/{pid}/task").glob("*/syscall")
    return any(task.read_text().split()[0] == _FLOCK for task in tasks)


def kill_both(ground: Ground, talk: Conversation, guard: int) -> None:
    """SIGKILL a launcher and its guard; held still first, that does not see to what the launcher leaves."""
    os.kill(guard, signal.SIGSTOP)
    for pid in (talk.pid, guard):
        os.kill(pid, signal.SIGKILL)
    talk.process.wait()
    talk.hang_up()
    assert eventually(lambda: not guards(ground.machine))


@pytest.mark.parametrize("new", ["alice", "root"])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_pid_that_is_used_again_while_the_guard_waits_for_the_lock_is_not_moved(
    ground: Ground, way: str, turn: int, new: str
) -> None:
    """Neither into the job's cgroup nor out of it: in a cgroup of the user's it could be frozen, and killed."""
    user = {"alice": ground.alice.uid, "root": 0}[new]
    with delegated_cgroup(ground.alice) as own, contextlib.ExitStack() as taken:
        talk = ground.talk(ground.alice, way, apart=True, cgroup=own)
        assert talk.hear()["ready"]
        (guard,) = guards(ground.machine)
        lock = HostLock(ground)
        talk.say(order())
        for _ in range(turn):
            lock.pass_by(guard)
        assert eventually(lambda: waits_for_a_lock(guard))
        talk.process.kill()
        talk.process.wait()
        taken.enter_context(pid_taken(ground, talk.pid, user))
        lock.release()
        verdict = talk.hear_verdict()
        talk.hang_up()
        assert "ended before" in verdict["refused"]["message"], verdict


# --- whom it ends ---


def _running(ground: Ground, *commands: str) -> list[int]:
    return [pid for pid, command in ground.machine.processes().items() if command in commands]


@contextlib.contextmanager
def failed_job(ground: Ground, way: str, commands: str) -> Iterator[None]:
    """A job that starts these shell commands under guard, and fails."""
    ground.machine.allow_sudo(f'{ground.alice.name} ALL=(root) NOPASSWD:NOSETENV: {GUARD} "", /bin/sleep 600')
    talk = ground.talk(
        ground.alice, way, apart=True, env={"BECOME": f"{commands}\nread now < go; exit 1"}, cwd=ground.alice.home
    )
    talk.say(order(grace=0.5))
    assert "guarding" in talk.hear_verdict()
    go = ground.machine.place(f"{ground.alice.home}/go")
    os.mkfifo(go)
    go.chmod(0o666)
    os.kill(talk.pid, signal.SIGUSR1)
    assert eventually(lambda: len(_running(ground, "/bin/sleep 600")) == 1)
    go.write_text("now\n")
    talk.process.wait(timeout=10)
    yield
    talk.hang_up()


@pytest.mark.parametrize("way", WAYS)
def test_process_of_roots_in_a_failed_job_is_not_ended_for_its_user(ground: Ground, way: str) -> None:
    """Nor asked to, nor is sudo, which started it; the layers stay until it ends by itself, and the log says so."""
    commands = "sudo -n /bin/sleep 600 & sleep 601 & setsid sleep 601 & (trap '' TERM; sleep 602; sleep 602) &"
    with failed_job(ground, way, commands):
        assert eventually(lambda: "left alone" in log_of(ground.machine), seconds=10), log_of(ground.machine)
        assert not _running(ground, "sleep 601", "sleep 602")
        (roots,) = _running(ground, "/bin/sleep 600")
        assert "securerun-" in cgroup_of(roots)
        (line,) = [line for line in log_of(ground.machine).splitlines() if "left alone" in line]
        assert str(roots) in line
        assert len(guards(ground.machine)) == 1
        assert not eventually(lambda: not _running(ground, "/bin/sleep 600"), seconds=1.5)
        assert log_of(ground.machine).count("left alone") == 1
        os.kill(roots, signal.SIGKILL)
        assert eventually(lambda: not guards(ground.machine))


# Forks and ends all the time: each is gone before anybody who has seen it can do something.
_COMET = "import os\nwhile True:\n    if os.fork(): os._exit(0)"


def test_processes_that_are_faster_than_the_look_are_ended_and_roots_beside_them_is_not(ground: Ground) -> None:
    comet = shlex.join(program(_COMET))
    with failed_job(ground, "sudo", f"sudo -n /bin/sleep 600 & {comet} & {comet} &"):
        assert eventually(lambda: "left alone" in log_of(ground.machine), seconds=20), log_of(ground.machine)
        assert not [command for command in ground.machine.processes().values() if "os.fork()" in command]
        (roots,) = _running(ground, "/bin/sleep 600")
        assert status_of(roots)["State"].startswith("S")
        os.kill(roots, signal.SIGKILL)


# --- whom it reaps ---

_SERVER = """
import socket, time
with socket.create_server(("", 29500)) as server:
    time.sleep(600)
"""


@pytest.mark.parametrize("environment", ["with its id", "wiped"])
@pytest.mark.parametrize("cgroup", ["none", "another"])
def test_run_whose_launcher_and_guard_are_killed_is_not_reaped_while_its_workers_live(
    ground: Ground, cgroup: str, environment: str
) -> None:
    """By the next run of anybody, where no cgroup tells that they live; it goes when they have ended."""
    worker = shlex.join(["env", "-i", *program(_SERVER)] if environment == "wiped" else program(_SERVER))
    target = (ground.node.ipv4, 29500)
    document = order(scope="ports")
    run_id = document["order"]["policy"]["run_id"]
    with delegated_cgroup(ground.alice) as own:
        if cgroup == "none":
            (own.path / "cgroup.max.descendants").write_text("0")
        talk = ground.talk(
            ground.alice,
            "socket",
            apart=True,
            cgroup=own,
            env={"SECURERUN_RUN_ID": run_id, "BECOME": f"{worker} & wait"},
        )
        talk.say(document)
        assert "guarding" in talk.hear_verdict()
        os.kill(talk.pid, signal.SIGUSR1)
        assert eventually(lambda: reach(ground.node, [target]) == {target: True})
        found = [pid for pid, command in ground.machine.processes().items() if "create_server" in command]
        (server,) = [pid for pid in found if name_of(pid) != "sh"]
        if cgroup == "another":
            (own.path / "cgroup.procs").write_text(str(server))
        (guard,) = guards(ground.machine)
        kill_both(ground, talk, guard)
        for _ in range(2):
            ground.guarded(ground.bob, "socket", ports=[29600]).release()
            assert reach(ground.stranger, [target]) == {target: False}
        assert f"{run_id}.json" in ground.machine.runs()
        cleaned = ground.machine.run(ground.node, [str(COMMANDS / "securerunctl"), "clean"])
        assert cleaned.returncode == 1 and "has no guard, but" in cleaned.stderr, cleaned
        assert reach(ground.stranger, [target]) == {target: False}
        os.kill(server, signal.SIGKILL)
        assert eventually(lambda: not is_alive(server))
        ground.guarded(ground.bob, "socket", ports=[29600]).release()


# What the owner of the directory above may do: the job leaves its cgroup, and another gets its name and a process.
_SWAP = """
echo "$1" > "${0%/*}/cgroup.procs" && rmdir "$0" && mkdir "$0" && echo $$ > "$0/cgroup.procs" && exec sleep 607
"""


def test_user_who_puts_another_cgroup_in_the_place_of_the_jobs_keeps_no_guard_from_its_end(ground: Ground) -> None:
    """Its rules, reserved ports and record would be there for good, as often as he likes."""
    document = order()
    with delegated_cgroup(ground.alice) as own:
        talk = ground.talk(ground.alice, "socket", cgroup=own)
        talk.say(document)
        assert "guarding" in talk.hear_verdict()
        place = own.path / f"securerun-{document['order']['policy']['run_id']}"
        stays = ground.popen(ground.alice, ["sh", "-c", _SWAP, str(place), str(talk.pid)], cgroup=own)
        assert eventually(lambda: name_of(stays.pid) == "sleep"), stays.communicate()
        assert cgroup_of(stays.pid).endswith(place.name)
        talk.release()
        assert eventually(lambda: not guards(ground.machine))
        left, said, where = ground.machine.records(), log_of(ground.machine), cgroup_of(stays.pid)
        ground.guarded(ground.bob, "socket").release()
        assert left is None
        assert "released" in said and "not all of it" not in said
        assert where.endswith(place.name)


def test_cgroup_that_cannot_be_removed_keeps_no_rules_in_place(ground: Ground) -> None:
    """Its record stays, by which the next run removes it."""
    before, mount = ground.node.snapshot(), str(cgroup2_mount())
    talk = ground.guarded(ground.alice, "sudo")
    assert ground.machine.run(ground.node, ["mount", "-o", "remount,bind,ro", mount]).returncode == 0
    try:
        talk.release()
        assert eventually(lambda: not guards(ground.machine), seconds=10)
    finally:
        assert ground.machine.run(ground.node, ["mount", "-o", "remount,bind,rw", mount]).returncode == 0
    said, found, runs = log_of(ground.machine), ground.node.snapshot(), ground.machine.runs()
    ground.guarded(ground.bob, "socket").release()
    assert "not all of it could be removed" in said
    assert {**found, "reserved ports": ""} == {**before, "reserved ports": ""}
    assert len(runs) == 1


@pytest.mark.parametrize("way", WAYS)
def test_run_without_a_guard_counts_towards_its_users_limit_while_it_has_processes(ground: Ground, way: str) -> None:
    """Nobody may remove what closes its ports, and that takes as much of the host as any run's."""
    ground.machine.configure("runs_per_user = 1\n")
    document = order()
    mark = {"SECURERUN_RUN_ID": document["order"]["policy"]["run_id"]}
    with delegated_cgroup(ground.alice) as own:
        talk = ground.talk(ground.alice, "socket", apart=True, cgroup=own)
        talk.say(document)
        assert "guarding" in talk.hear_verdict()
        (guard,) = guards(ground.machine)
        claims = ground.machine.popen(ground.node, ["sleep", "608"], user=ground.alice, env=mark)
        assert eventually(lambda: name_of(claims.pid) == "sleep")
        kill_both(ground, talk, guard)
        assert "which allows 1" in ground.refusal(ground.alice, order(ports=[29600]), way)
        ground.guarded(ground.bob, way, ports=[29600]).release()
        claims.kill()
        claims.wait()
        ground.guarded(ground.alice, way, ports=[29600]).release()


# --- who looks after it ---


@pytest.mark.slow
def test_job_whose_guards_are_killed_without_end_has_a_guard_again(ground: Ground) -> None:
    """After the first few at once there is one from time to time: it ends and removes what a killed launcher left."""
    held = ground.holder(ground.alice)
    for killed in range(6):
        assert not killed or held.hear_of("taken over")
        assert eventually(lambda: len(guards(ground.machine)) == 1, seconds=20)
        (guard,) = guards(ground.machine)
        os.kill(guard, signal.SIGKILL)
    assert held.hear_of("another guard is tried every")
    assert held.hear_of("taken over")
    assert ground.machine.runs() == {f"{held.run_id}.json"}
    held.process.kill()
    held.process.wait()


# A forkserver from before the lease, and a helper of another kind; each starts a server when it is told to.
_FORKSERVER = """
import json, os, socket, sys, threading, time
sys.path[:0] = sys.argv[1:]
from securerun.firewall.policy import Policy, PortRange
from securerun.protection.own_process import guarded

def helper(port, telling):
    before = socket.create_server(("", port))
    sys.stdin.read(1) if telling is None else os.read(telling, 1)
    if not os.fork():
        after = socket.create_server(("", port + 1))
        time.sleep(600)
    time.sleep(600)

def fork(port):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        helper(port, reading)
    return child, writing

def from_a_thread():
    found.append(fork(31102))

found = [fork(31100)]
thread = threading.Thread(target=from_a_thread)
thread.start()
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
thread.join()
with guarded(Policy("0123456789ab", (PortRange(29500, 29500, "test"),), ())) as guarding:
    for _, writing in found:
        os.write(writing, b"!")
    print(json.dumps({"children": [child for child, _ in found], "notes": guarding.notes}), flush=True)
    sys.stdin.read()
"""


def test_what_the_caller_started_before_is_guarded_with_all_that_it_starts(ground: Ground) -> None:
    """Python callers have a forkserver, or helpers, by then; their listeners from before are found."""
    caller = ground.popen(ground.alice, [sys.executable, "-c", _FORKSERVER, str(CHECKOUT)], stdin=subprocess.PIPE)
    assert caller.stdout is not None and caller.stdin is not None
    told = json.loads(caller.stdout.readline())
    assert len(told["children"]) == 2 and told["notes"] == []
    after = [(ground.node.ipv4, port) for port in (31101, 31103)]
    assert eventually(lambda: reach(ground.node, after) == dict.fromkeys(after, True))
    assert reach(ground.stranger, after) == dict.fromkeys(after, False)
    for child in told["children"]:
        assert "securerun-0123456789ab" in cgroup_of(child)
    before = [(ground.node.ipv4, port) for port in (31100, 31102)]
    assert eventually(lambda: reach(ground.stranger, before) == dict.fromkeys(before, False), seconds=5)
    caller.kill()
    caller.wait()


@pytest.mark.parametrize("why", ["before the move", "after the move"])
def test_what_the_caller_started_before_goes_back_when_the_job_is_not_guarded(ground: Ground, why: str) -> None:
    """A port of the system's is refused at once; which backend a host uses first, when all else stands."""
    changed, words = {
        "before the move": (("(29500, 29500,", "(22, 22,"), "port 22"),
        "after the move": (("()))", '()), firewall="nftables")'), "for root to say"),
    }[why]
    script = _FORKSERVER.replace(*changed).replace(
        "with guarded", "print(*(child for child, _ in found), flush=True)\nsys.stdin.readline()\nwith guarded"
    )
    caller = ground.popen(ground.alice, [sys.executable, "-c", script, str(CHECKOUT)], stdin=subprocess.PIPE)
    assert caller.stdout is not None and caller.stdin is not None
    children = [int(child) for child in caller.stdout.readline().split()]
    places = [cgroup_of(child) for child in children]
    caller.stdin.write("go\n")
    caller.stdin.flush()
    assert caller.wait(timeout=20) != 0
    now = [cgroup_of(child) for child in children]
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert now == places
    assert words in caller.communicate(timeout=20)[1]


# --- whom it looks for ---

# Leaves the job's cgroup, as systemd, PAM and podman have it done, and then listens; or ends as soon as it is there.
_STRAY = """
import ctypes, os, socket, sys, time
how, place, *ports = sys.argv[1:]
if "orphan" in how and os.fork():
    os._exit(0)
if "wiped" in how:
    time.sleep(2.5)  # seen once where it was
with open(place + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
if "orphan" in how and os.fork():
    os._exit(0)
servers = [socket.create_server(("", int(port))) for port in ports]
time.sleep(600)
"""


@contextlib.contextmanager
def stray(ground: Ground, how: str, *, failed: bool, scope: str = "auto") -> Iterator[tuple[str, int]]:
    """A job that is over but for one process, which left its cgroup and listens on the planned port and another."""
    document = order(scope=scope, grace=0.5)
    run_id = document["order"]["policy"]["run_id"]
    with delegated_cgroup(ground.alice) as own:
        other = own.path / "other"
        other.mkdir()
        for path in (other, other / "cgroup.procs"):
            os.chown(path, ground.alice.uid, ground.alice.gid)
        argv = program(_STRAY, how, str(other), "29500", "31999")
        command = shlex.join(["env", "-i", *argv] if "wiped" in how else argv)
        go = ground.machine.place(f"{ground.alice.home}/go")
        os.mkfifo(go)
        go.chmod(0o666)
        become = f"export SECURERUN_RUN_ID={run_id}; {command} & read now < {ground.alice.home}/go"
        talk = ground.talk(ground.alice, "sudo", cgroup=own, apart=True, env={"BECOME": become})
        talk.say(document)
        assert "guarding" in talk.hear_verdict()
        os.kill(talk.pid, signal.SIGUSR1)
        targets = [(ground.node.ipv4, 29500), (ground.node.ipv4, 31999)]
        assert eventually(lambda: reach(ground.node, targets) == dict.fromkeys(targets, True), seconds=15)
        time.sleep(2.0)
        assert reach(ground.stranger, targets) == dict.fromkeys(targets, False)
        if not failed:
            talk.say({"release": {"failed": False}})
            while "released" not in talk.hear():
                pass
        go.write_text("now\n")
        talk.process.wait(timeout=10)
        (pid,) = [int(pid) for pid in (other / "cgroup.procs").read_text().split()]
        talk.hang_up()
        yield run_id, pid
        assert eventually(lambda: not is_alive(pid) and ground.machine.records() is None, seconds=5)


@pytest.mark.parametrize("scope", ["auto", "ports"])
@pytest.mark.parametrize("how", ["child", "orphan", "child, wiped"])
def test_process_that_left_the_cgroup_is_guarded_until_it_ends(ground: Ground, how: str, scope: str) -> None:
    """By descent, by the run's id, or because it was seen in there."""
    targets = [(ground.node.ipv4, 29500), (ground.node.ipv4, 31999)]
    with stray(ground, how, failed=False, scope=scope) as (run_id, pid):
        assert not eventually(lambda: f"{run_id}.json" not in (ground.machine.runs()), seconds=3)
        assert reach(ground.stranger, targets) == dict.fromkeys(targets, False)
        os.kill(pid, signal.SIGKILL)


def test_process_that_left_the_cgroup_is_ended_with_a_failed_job(ground: Ground) -> None:
    with stray(ground, "child", failed=True) as (_, pid):
        assert eventually(lambda: not is_alive(pid), seconds=5)


def test_process_that_only_carries_the_runs_id_is_not_ended_with_a_failed_job(ground: Ground) -> None:
    """sbatch and ssh copy it to where no part of the job is: it keeps the run until it ends, and is left alone."""
    document = order(grace=0.5)
    run_id = document["order"]["policy"]["run_id"]
    other = ground.machine.popen(ground.node, ["sleep", "606"], user=ground.alice, env={"SECURERUN_RUN_ID": run_id})
    talk = ground.talk(ground.alice, "socket", apart=True)
    talk.say(document)
    assert "guarding" in talk.hear_verdict()
    talk.process.kill()
    talk.process.wait()
    assert eventually(lambda: "left alone" in log_of(ground.machine), seconds=5)
    assert is_alive(other.pid)
    other.kill()
    other.wait()
    talk.hang_up()


# --- what it reads of them ---


@pytest.mark.parametrize("gigabyte", ["alice", "bob"])
def test_processes_that_show_a_gigabyte_do_not_grow_in_the_guard(ground: Ground, gigabyte: str) -> None:
    """Where a job has no cgroup its processes are told by their environment, of which the user says where it is."""
    user = {"alice": ground.alice, "bob": ground.bob}[gigabyte]
    script = f"{SHOWS_A_GIGABYTE}\nprint('ready', flush=True)\nimport time\ntime.sleep(600)"
    showing = [ground.popen(user, program(script)) for _ in range(4)]
    for process in showing:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip("this kernel lets no process say where its environment is")
    with_them = memory_of_a_guard_without_cgroup(ground)
    for process in showing:
        process.kill()
        process.communicate()
    assert with_them < 60_000
    # Of another user nothing is read at all.
    if gigabyte == "bob":
        assert with_them - memory_of_a_guard_without_cgroup(ground) < 3_000


def memory_of_a_guard_without_cgroup(ground: Ground) -> int:
    """How many kilobytes the guard of a job of Alice's had at most that looks for its processes everywhere."""
    document = order(scope="ports")
    run_id = document["order"]["policy"]["run_id"]
    with delegated_cgroup(ground.alice) as own:
        (own.path / "cgroup.max.descendants").write_text("0")
        talk = ground.talk(ground.alice, "socket", cgroup=own, env={"SECURERUN_RUN_ID": run_id})
        talk.say(document)
        assert "guarding" in talk.hear_verdict()
        (guard,) = guards(ground.machine)
        time.sleep(1.0)
        peak = int(status_of(guard)["VmHWM"].split()[0])
        talk.release()
    assert eventually(lambda: not guards(ground.machine))
    return peak


# --- whom a launcher inside of a run believes ---

_ASK = """
import os, sys
sys.path.append(sys.argv[1])
from securerun.protection import enclosing
print(enclosing.find(os.environ), flush=True)
"""
_SQUAT = """
import socket, sys, time
with socket.socket(socket.AF_UNIX) as end:
    end.bind("\\0securerun-" + sys.argv[1])
    end.listen()
    time.sleep(600)
"""


@pytest.mark.parametrize("name", ["free", "taken by the user"])
@pytest.mark.parametrize("terms", ["none", "of another run"])
def test_launcher_inside_of_a_run_whose_guard_is_dead_does_not_believe_itself_guarded(
    ground: Ground, terms: str, name: str
) -> None:
    """In scope `ports` its new ports would be open: it takes a lease of its own."""
    document = order(scope="ports")
    run_id = document["order"]["policy"]["run_id"]
    other = {"SECURERUN_LEASE": json.dumps({"run": "0123456789ab", "shield": True})} if terms != "none" else {}
    home, ask = ground.alice.home, shlex.join(program(_ASK, str(CHECKOUT)))
    squat = shlex.join(program(_SQUAT, run_id)) if name != "free" else "sleep 605"
    steps = f"{ask} > {home}/first; read killed < {home}/go; {squat} & sleep 0.5; {ask} > {home}/second; kill $!"
    os.mkfifo(go := ground.machine.place(f"{home}/go"))
    go.chmod(0o666)
    talk = ground.talk(
        ground.alice, "socket", apart=True, env={"SECURERUN_RUN_ID": run_id, "BECOME": f"{steps}; exit 0", **other}
    )
    talk.say(document)
    assert "guarding" in talk.hear_verdict()
    os.kill(talk.pid, signal.SIGUSR1)
    first, second = (ground.machine.place(f"{home}/{which}") for which in ("first", "second"))
    assert eventually(lambda: first.exists() and f"run_id='{run_id}'" in first.read_text(), seconds=10)
    (guard,) = guards(ground.machine)
    os.kill(guard, signal.SIGKILL)
    assert eventually(lambda: not guards(ground.machine))
    go.write_text("killed\n")
    talk.process.wait(timeout=20)
    talk.hang_up()
    assert second.read_text() == "None\n"
    ground.guarded(ground.bob, "socket", ports=[29600]).release()


def test_guard_is_believed_to_live_however_often_it_is_asked(ground: Ground) -> None:
    """Whoever connects and goes, or stays, takes the place of others for a moment only."""
    talk = ground.guarded(ground.alice, "socket")
    (record,) = ground.machine.runs()
    address = f"\0securerun-{record.partition('.')[0]}"

    def connects() -> bool:
        with inside(ground.node), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as end:
            return end.connect_ex(address) == 0

    for _ in range(3):
        while connects():
            pass
        assert eventually(connects, seconds=5)
    talk.release()
