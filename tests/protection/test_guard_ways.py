"""The ways of a launcher to a guard: its own privilege, sudo, systemd's socket. The users, sudo and socket are real."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jobs
import pytest
from cgroups import end_all
from conversation import SOCKET, WAYS, Conversation, guards, log_of, nothing_left, order, permit, socket_unit
from holding import Held, hold_as
from hosts import Host, Network, eventually, finish, finish_all, is_alive
from probe import Probe, reach
from process_table import users_of
from torchless import needs_torch
from users import FIRST_USER, GUARD, RECORDS, PrivateMachine, User, delegated_cgroup

_STARTED = {
    "sudo": "guard started by sudo",
    "socket": f"guard started by the socket {SOCKET}",
    "run-as": "guard started directly",
}
_IDENTITY = """
import grp, os, pwd
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().split("\\n") if ":" in line)
print("ids", os.getresuid(), os.getresgid(), sorted(os.getgroups()))
print("capabilities", {status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")})
print("no new privileges", status["NoNewPrivs"].strip())
print("home", os.environ["HOME"], os.environ["USER"], os.environ.get("SUDO_UID"))
open("made by the job", "w").close()
"""


@pytest.fixture
def machine(network: Network) -> Iterator[PrivateMachine]:
    with PrivateMachine() as private:
        yield private


@pytest.fixture
def alice(machine: PrivateMachine) -> User:
    return machine.add_user("alice", groups=("training",))


@pytest.fixture
def node(network: Network) -> Host:
    return network["node0"]


@contextlib.contextmanager
def opened(way: str, machine: PrivateMachine, host: Host, *users: User) -> Iterator[None]:
    """The one way by which users of a machine can have a guard in the block."""
    with contextlib.ExitStack() as stack:
        if way == "sudo":
            permit(machine, *users)
        elif way == "socket":
            stack.enter_context(socket_unit(machine, host))
        yield
        machine.place("/etc/sudoers.d/securerun").unlink(missing_ok=True)


def launch(way: str, user: User, *arguments: str) -> tuple[list[str], User | None]:
    """securerun for a job of a user's, and whom to start it as: root names him where root starts it."""
    if way == "run-as":
        return [jobs.SECURERUN, "--run-as", user.name, *arguments], None
    return [jobs.SECURERUN, *arguments], user


def hold(machine: PrivateMachine, host: Host, user: User, *options: str) -> Held:
    """A job that is under guard by both layers and listens."""
    holder = hold_as(user, machine, host, *options)
    assert holder.start["guarding"] == ["shield", "iptables"]
    return holder


@pytest.mark.parametrize("way", ["sudo", "socket", "run-as"])
def test_stranger_cannot_reach_any_port_of_a_job_of_ordinary_users_on_two_hosts(network: Network, way: str) -> None:
    node0, node1, stranger = network
    peers = ",".join(address for node in (node0, node1) for address in node.addresses)
    with contextlib.ExitStack() as stack:
        started, users, machines = [], [], []
        probes = [stack.enter_context(Probe(stranger, node)) for node in (node0, node1)]
        # All of it before the first job: what is the machine's is looked at for each.
        for node in (node0, node1):
            machine = stack.enter_context(PrivateMachine())
            user = machine.add_user("alice")
            stack.enter_context(opened(way, machine, node, user))
            stack.enter_context(nothing_left(machine, node))
            users.append(user)
            machines.append(machine)
        for rank, (node, machine, user) in enumerate(zip((node0, node1), machines, users)):
            rendezvous = jobs.rendezvous("static", node, rank, node0)
            options = ["--peers", peers, "--nnodes", "2", "--nproc-per-node", "2", *rendezvous]
            command, starter = launch(way, user, *options, str(jobs.TRAIN), "--groups", "3")
            started.append(machine.popen(node, command, user=starter))
        workers: set[tuple[int, ...]] = set()
        while any(job.poll() is None for job in started):
            found = [pid for m in machines for pid, said in m.processes().items() if _is_worker(said)]
            workers |= {tuple(users_of(pid)) for pid in found}
            time.sleep(0.2)
        done = finish_all(started, timeout=60)
    assert [node_done.returncode for node_done in done] == [0, 0], done
    assert jobs.last_loss(done[0].stdout) < 0.35
    assert workers - {()} == {(users[0].uid,) * 4}
    for probe in probes:
        assert probe.reached == set()
        assert len({port for _, port in probe.tried}) >= 8
    for node_done in done:
        assert _STARTED[way] in node_done.stderr
        assert "closed to all others by shield" in node_done.stderr
        assert "closed to all others by iptables" in node_done.stderr
        assert f"blocked {stranger.ipv4} → " in node_done.stderr
        assert "running as root" not in node_done.stderr


def test_ways_are_tried_in_order_and_the_one_that_was_used_is_said(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    script = machine.write("script.py", "print('ran')", owner=alice)
    with opened("socket", machine, node), nothing_left(machine, node):
        by_socket = machine.run(node, [jobs.SECURERUN, script], user=alice)
        with opened("sudo", machine, node, alice):
            by_sudo = machine.run(node, [jobs.SECURERUN, script], user=alice)
            directly = machine.run(node, [jobs.SECURERUN, script])
    for done, words in ((by_socket, f"by the socket {SOCKET}"), (by_sudo, "by sudo"), (directly, "directly")):
        assert (done.returncode, done.stdout) == (0, "ran\n"), done
        assert f"guard started {words}" in done.stderr
    assert directly.stderr.count("running as root") == 1
    assert "running as root" not in by_sudo.stderr + by_socket.stderr


@pytest.mark.parametrize("hindrance", ["nothing is permitted", "sudo wants a password", "the socket is others'"])
def test_without_any_way_the_status_is_77_and_the_three_ways_are_said(
    machine: PrivateMachine, node: Host, alice: User, hindrance: str
) -> None:
    script = machine.write("script.py", "print('ran')", owner=alice)
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_left(machine, node))
        if hindrance == "sudo wants a password":
            machine.allow_sudo(f"alice ALL=(root) {GUARD}")
        if hindrance == "the socket is others'":
            stack.enter_context(socket_unit(machine, node))
            machine.place(SOCKET).chmod(0o660)
        done = machine.run(node, [jobs.SECURERUN, script], user=alice)
    assert (done.returncode, done.stdout) == (77, ""), done
    lines = done.stderr.splitlines()
    assert all(line.startswith("securerun: ") for line in lines) and len(lines) <= 6, lines
    for words in ("--run-as", "securerunctl setup sudoers", "securerunctl setup systemd", "alice"):
        assert words in done.stderr
    plan = machine.run(node, [jobs.SECURERUN, "--dry-run", script], user=alice)
    assert plan.returncode == 0 and "60000-60015" in plan.stdout


@pytest.mark.parametrize("named", ["alice", pytest.param(str(FIRST_USER), id="by number")])
def test_run_as_makes_the_job_that_users_for_good(machine: PrivateMachine, node: Host, alice: User, named: str) -> None:
    script = machine.write("script.py", _IDENTITY, owner=alice)
    with nothing_left(machine, node):
        done = machine.run(
            node,
            [jobs.SECURERUN, "--run-as", named, "--no-python", sys.executable, script],
            env={"SUDO_UID": "6002", "SUDO_USER": "bob"},
            cwd=alice.home,
        )
    assert done.returncode == 0, done
    ids = (alice.uid,) * 3
    training = int(machine.run(node, ["getent", "group", "training"]).stdout.split(":")[2])
    assert f"ids {ids} {ids} {sorted([alice.gid, training])}\n" in done.stdout
    assert f"capabilities {{'{'0' * 16}'}}\n" in done.stdout
    assert "no new privileges 1\n" in done.stdout
    assert f"home {alice.home} alice None\n" in done.stdout
    made = machine.place(f"{alice.home}/made by the job").stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o777) == (alice.uid, alice.gid, 0o640)
    assert "running as root" not in done.stderr


def test_torch_is_not_imported_as_root_under_run_as(machine: PrivateMachine, node: Host, alice: User) -> None:
    spy = machine.write("/run/spy/torch/__init__.py", "import os; os._exit(100 if os.getuid() == 0 else 42)")
    env = {"PYTHONPATH": str(Path(spy).parent.parent)}
    with nothing_left(machine, node):
        assert machine.run(node, [jobs.SECURERUN, "x.py"], env=env).returncode == 100
        assert machine.run(node, [jobs.SECURERUN, "--run-as", "alice", "x.py"], env=env).returncode == 42
        env["SECURERUN_RUN_AS"] = "alice"
        assert machine.run(node, [jobs.SECURERUN, "x.py"], env=env).returncode == 42


@pytest.mark.parametrize(
    ("named", "starter", "status", "words"),
    [
        ("nobody-of-that-name", "root", 2, "nobody-of-that-name"),
        ("root", "root", 2, "root"),
        ("0", "root", 2, "root"),
        ("4294967296", "root", 2, "4294967296"),
        ("bob", "alice", 77, "bob"),
        ("alice", "alice", 0, ""),
    ],
)
def test_run_as_takes_ordinary_users_and_only_from_root(
    machine: PrivateMachine, node: Host, alice: User, named: str, starter: str, status: int, words: str
) -> None:
    machine.add_user("bob")
    script = machine.write("script.py", "print('ran')", owner=alice)
    with opened("sudo", machine, node, alice), nothing_left(machine, node):
        user = alice if starter == "alice" else None
        done = machine.run(node, [jobs.SECURERUN, "--run-as", named, script], user=user)
    assert (done.returncode, done.stdout) == (status, "ran\n" if status == 0 else ""), done
    assert words in done.stderr and "Traceback" not in done.stderr
    assert status == 0 or len(done.stderr.splitlines()) == 1


def test_site_policy_holds_for_the_user_that_root_names(machine: PrivateMachine, node: Host, alice: User) -> None:
    machine.configure('ports = ["40000-65535"]\n')
    script = machine.write("script.py", "print('ran')", owner=alice)
    options = ["--master-port", "29500", script]
    with nothing_left(machine, node):
        refused = machine.run(node, [jobs.SECURERUN, "--run-as", "alice", *options])
        assert (refused.returncode, refused.stdout) == (78, ""), refused
        assert f"29500 may not be named by user {alice.uid}" in refused.stderr
        assert machine.run(node, [jobs.SECURERUN, *options]).stdout == "ran\n"


def with_capabilities(user: User, capabilities: str, *command: str) -> list[str]:
    """As an ordinary user, with ambient capabilities (capabilities(7)) as systemd or a container gives them."""
    identity = [f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
    return ["setpriv", *identity, f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}", *command]


def test_ordinary_user_with_the_capabilities_is_guarded_directly(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    """Beside the two that the layers take, DAC_OVERRIDE for /run and for cgroups that are not hers."""
    script = machine.write("script.py", "import os; print('ran as', os.getuid())", owner=alice)
    capabilities = "+net_admin,+bpf,+dac_override"
    with nothing_left(machine, node):
        done = machine.run(node, with_capabilities(alice, capabilities, str(jobs.SECURERUN), str(script)))
        refused = machine.run(node, with_capabilities(alice, "+net_admin,+bpf", str(jobs.SECURERUN), str(script)))
    assert (done.returncode, done.stdout) == (0, f"ran as {alice.uid}\n"), done
    assert "guard started directly" in done.stderr
    assert "closed to all others by shield" in done.stderr
    assert (refused.returncode, refused.stdout) == (77, ""), refused
    assert "/run/securerun: Permission denied" in refused.stderr


def test_ordinary_user_with_two_capabilities_needs_a_place_for_records_and_a_cgroup_of_his_own(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    script = machine.write("script.py", "import os; print('ran as', os.getuid())", owner=alice)
    place = machine.place(RECORDS)
    place.mkdir(mode=0o700)
    os.chown(place, alice.uid, alice.gid)
    command = with_capabilities(alice, "+net_admin,+bpf", str(jobs.SECURERUN), str(script))
    with delegated_cgroup(alice) as cgroup:
        done = machine.run(node, command, cgroup=cgroup)
        assert (done.returncode, done.stdout) == (0, f"ran as {alice.uid}\n"), done
        assert "guard started directly" in done.stderr
        assert "closed to all others by shield" in done.stderr
        assert eventually(lambda: not list(place.iterdir()))
    place.rmdir()


def test_root_that_came_by_sudo_is_root(machine: PrivateMachine, node: Host, alice: User) -> None:
    machine.allow_sudo("alice ALL=(root) NOPASSWD: ALL")
    script = machine.write("script.py", "import os; print('ran as', os.getuid())", owner=alice)
    with nothing_left(machine, node):
        done = machine.run(node, ["sudo", "-n", jobs.SECURERUN, script], user=alice)
    assert (done.returncode, done.stdout) == (0, "ran as 0\n"), done
    assert "guard started directly" in done.stderr


def test_job_at_a_terminal_is_guarded_by_sudo_and_ends_by_control_c(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    """With a terminal sudo runs its command behind one of its own (use_pty)."""
    machine.allow_sudo(f'Defaults use_pty\nalice ALL=(root) NOPASSWD:NOSETENV: {GUARD} ""')
    script = machine.write("script.py", "import time; print('ready', flush=True); time.sleep(60)", owner=alice)
    at_terminal = ["script", "--quiet", "--return", "--command", shlex.join([jobs.SECURERUN, script]), "/dev/null"]
    with nothing_left(machine, node):
        job = machine.popen(node, at_terminal, user=alice, stdin=subprocess.PIPE)
        assert job.stdout is not None and job.stdin is not None
        said = ""
        while "ready" not in said:
            line = job.stdout.readline()
            assert line, said
            said += line
        assert "guard started by sudo" in said
        assert len(guards(machine)) == 1
        job.stdin.write("\x03")
        job.stdin.flush()
        done = finish(job, timeout=30)
        # The launcher's own status is 1; the shell that `script` starts it from was interrupted as well.
        assert done.returncode in (1, 130), done
        assert "nobody was turned away" in done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_guard_that_is_killed_is_replaced_the_same_way(
    machine: PrivateMachine, network: Network, alice: User, way: str
) -> None:
    node, peer, stranger = network
    with opened(way, machine, node, alice), nothing_left(machine, node), Probe(stranger, node) as probe:
        job = hold(machine, node, alice, "--peers", peer.ipv4)
        assert eventually(lambda: bool(probe.tried))
        (first,) = guards(machine)
        os.kill(first, signal.SIGKILL)
        job.hear_of("another has taken over")
        (second,) = guards(machine)
        assert second != first
        assert reach(peer, [(node.ipv4, 60000)]) == {(node.ipv4, 60000): True}
        job.let_go()
    assert probe.reached == set()


@needs_torch
@pytest.mark.parametrize("way", WAYS)
def test_guard_ends_what_a_killed_launcher_of_a_user_leaves_behind(
    machine: PrivateMachine, node: Host, alice: User, way: str
) -> None:
    leave = (
        "import os, subprocess, sys\n"
        "subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "subprocess.Popen(['sh', '-c', 'trap \\'\\' TERM; while :; do sleep 1; done'], start_new_session=True)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    script = machine.write("leave.py", leave, owner=alice)
    with opened(way, machine, node, alice), nothing_left(machine, node):
        command = [jobs.SECURERUN, "--grace", "0.5", "--no-python", sys.executable, script]
        job = machine.popen(node, command, user=alice, stdin=subprocess.PIPE)
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        left = [pid for pid, said in machine.processes().items() if said == "sleep 600"]
        job.kill()
        job.wait()
        assert eventually(lambda: not any(is_alive(pid) for pid in left) and machine.records() is None, seconds=5)
        assert eventually(lambda: not [said for said in machine.processes().values() if "trap" in said])


@pytest.mark.parametrize("failed", [False, True], ids=["ended well", "failed"])
@pytest.mark.parametrize("way", WAYS)
def test_guard_of_a_job_without_a_cgroup_goes_with_the_jobs_last_process(
    machine: PrivateMachine, node: Host, alice: User, way: str, failed: bool
) -> None:
    """What started it is no part of the job: sudo descends from the launcher, and lives as long as its guard."""
    with opened(way, machine, node, alice), nothing_left(machine, node), delegated_cgroup(alice) as own:
        (own.path / "cgroup.max.descendants").write_text("0")
        job = hold_as(alice, machine, node, "--listen", "7001", cgroup=own)
        assert job.start["guarding"] == ["iptables"]
        (guard,) = guards(machine)
        if failed:
            job.process.kill()
        else:
            job.let_go()
        assert eventually(lambda: not is_alive(guard), seconds=5), machine.processes()
        said = log_of(machine)
        assert f"run {job.run_id}: released" in said, said


@pytest.mark.parametrize("way", [*WAYS, "run-as"])
def test_guard_outlives_the_batch_systems_kill_by_cgroup_and_cleans_up(
    machine: PrivateMachine, network: Network, alice: User, way: str
) -> None:
    node, _, stranger = network
    script = machine.write("wait.py", "import sys, time; print('ready', flush=True); time.sleep(600)", owner=alice)
    with (
        opened(way, machine, node, alice),
        nothing_left(machine, node),
        delegated_cgroup(alice) as cgroup,
        Probe(stranger, node) as probe,
    ):
        command, starter = launch(way, alice, script)
        plan = machine.run(node, [*command[:-1], "--dry-run", script], user=starter, cgroup=cgroup)
        assert "it cannot leave this cgroup" not in plan.stdout
        job = machine.popen(node, command, user=starter, cgroup=cgroup)
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        (guard,) = guards(machine)
        end_all(cgroup.path)
        assert job.wait(timeout=10) == -signal.SIGKILL
        assert eventually(lambda: not is_alive(guard), seconds=5)
    assert log_of(machine).count(": released") == 1
    assert probe.reached == set()


_SITES: list[tuple[str, dict[str, object], str]] = [
    ("", {}, ""),
    ('users = ["alice"]', {}, ""),
    (f"users = [{FIRST_USER}]", {}, ""),
    ('users = "alice"', {}, ""),
    ("users = []", {}, "may not have a job guarded"),
    ('users = ["bob"]', {}, "may not have a job guarded"),
    ('users = ["bob"]\ngroups = ["training"]', {}, ""),
    ('groups = ["daemon"]', {}, "may not have a job guarded"),
    ('ports = ["22", "29500-29600"]', {"ports": [22, (29500, 29600)]}, ""),
    ('ports = ["29500-29600"]', {"ports": [(29500, 29601)]}, "may not be named"),
    ("ports = []", {}, "may not be named"),
    ("ports_per_run = 2", {"ports": [(29500, 29501)]}, ""),
    ("ports_per_run = 2", {"ports": [(29500, 29502)]}, "more than the 2"),
    ('peers = ["10.0.0.0/8", "fd00::/8"]', {"peers": ["10.77.0.0/16", "fd77::/64"]}, ""),
    ('peers = ["10.0.0.0/8"]', {"peers": ["10.77.0.2/32", "11.0.0.1/32"]}, "11.0.0.1/32 may not be named a peer"),
    ('peers = ["10.0.0.0/8"]', {"peers": ["fd77::2/128"]}, "may not be named a peer"),
    ('peers = ["0.0.0.0/0"]', {"peers": ["0.0.0.0/1"]}, ""),
    ("accept = true", {"accept": True, "peers": ["10.77.0.2/32"]}, ""),
    ("accept = false", {"accept": True}, "--accept"),
    ("runs_per_user = 0", {}, "which allows 0"),
    ("runs_per_user = -1", {}, "only root is served"),
    ("allow = true", {}, "only root is served"),
    ("ports = [", {}, "only root is served"),
    ('ports = ["ssh"]', {}, "only root is served"),
    ('users = ["nobody-of-that-name"]', {}, "only root is served"),
    ('peers = ["10.0.0.1/8"]', {}, "only root is served"),
    ("accept = 1", {}, "only root is served"),
    ("\x00", {}, "only root is served"),
]


def test_site_policy_says_what_users_may_ask_for_and_root_is_not_limited(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    machine.add_user("bob")
    permit(machine, alice)
    with nothing_left(machine, node):
        for text, asked, words in _SITES:
            machine.configure(f"{text}\n")
            talk = Conversation(machine, node, alice, "sudo")
            talk.say(order(**asked))  # type: ignore[arg-type]
            verdict = talk.hear_verdict()
            talk.hang_up()
            assert words in str(verdict.get("refused")) if words else "guarding" in verdict, (text, verdict)
            assert eventually(lambda: not guards(machine))
        talk = Conversation(machine, node, None, "direct")
        talk.say(order(ports=[22]))
        assert "guarding" in talk.hear_verdict()
        talk.release()


def test_every_install_refusal_and_release_is_in_the_system_log(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    permit(machine, alice)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(machine.place("/dev/log")))
        machine.place("/dev/log").chmod(0o666)
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(_heard(log)), daemon=True)
        reader.start()
        said = _one_run_and_one_refusal(machine, node, alice)
        log.shutdown(socket.SHUT_RD)
        reader.join(timeout=10)
    ours = [line for line in lines if "securerun-guard[" in line]
    assert [words for words in said if not any(words in line for line in ours)] == [], ours
    assert not machine.place("/var/log/securerun.log").exists()


def test_where_there_is_no_system_log_a_file_that_others_cannot_read_takes_its_place(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    permit(machine, alice)
    said = _one_run_and_one_refusal(machine, node, alice)
    assert [words for words in said if words not in log_of(machine)] == [], log_of(machine)
    status = machine.place("/var/log/securerun.log").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o640)


def _heard(log: socket.socket) -> Iterator[str]:
    """What comes until reading is shut down."""
    while line := log.recv(65536):
        yield line.decode()


def _one_run_and_one_refusal(machine: PrivateMachine, node: Host, user: User) -> Sequence[str]:
    """What an administrator must find afterwards."""
    with nothing_left(machine, node):
        run = Conversation(machine, node, user, "sudo")
        run.say(order(run_id="0123456789ab"))
        assert "guarding" in run.hear_verdict()
        refused = Conversation(machine, node, user, "sudo")
        refused.say(order(ports=[22]))
        assert "refused" in refused.hear_verdict()
        refused.hang_up()
        run.release()
    return (
        f"run 0123456789ab of user {user.uid}, process {run.pid}: guarding",
        "run 0123456789ab: released",
        f"refused to user {user.uid}, process {refused.pid}: port 22",
    )


def test_what_setup_prints_is_what_sudo_and_systemd_take(machine: PrivateMachine, node: Host, alice: User) -> None:
    control = str(Path(jobs.SECURERUN).with_name("securerunctl"))
    script = machine.write("script.py", "print('ran')", owner=alice)
    with nothing_left(machine, node):
        machine.allow_sudo(machine.run(node, [control, "setup", "sudoers", "--user", "alice"]).stdout)
        by_sudo = machine.run(node, [jobs.SECURERUN, script], user=alice)
        machine.allow_sudo(machine.run(node, [control, "setup", "sudoers", "--group", "training"]).stdout)
        by_group = machine.run(node, [jobs.SECURERUN, script], user=alice)
        machine.allow_sudo("# nobody")
        units = machine.run(node, [control, "setup", "systemd", "--group", "training"]).stdout
        # The first is the guard's; metrics have one too.
        started = next(line.partition("=")[2] for line in units.split("\n") if line.startswith("ExecStart="))
        assert f"ListenStream={SOCKET}\n" in units and "Accept=yes\n" in units
        assert started == f"{GUARD} --socket"  # what socket_unit has
        with socket_unit(machine, node):
            machine.run(node, ["chgrp", "training", SOCKET])
            machine.place(SOCKET).chmod(0o660)
            by_socket = machine.run(node, [jobs.SECURERUN, script], user=alice)
            bob = machine.add_user("bob")
            assert machine.run(node, [jobs.SECURERUN, script], user=bob).returncode == 77
    for done, words in ((by_sudo, "by sudo"), (by_group, "by sudo"), (by_socket, f"by the socket {SOCKET}")):
        assert (done.returncode, done.stdout) == (0, "ran\n"), done
        assert f"guard started {words}" in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_user_sees_his_own_runs_and_no_others(machine: PrivateMachine, node: Host, alice: User, way: str) -> None:
    bob = machine.add_user("bob")
    control = str(Path(jobs.SECURERUN).with_name("securerunctl"))
    with opened(way, machine, node, alice, bob), nothing_left(machine, node):
        jobs_of = {user: hold(machine, node, user, "--listen", port) for user, port in ((alice, "7001"), (bob, "7002"))}
        for user, job in jobs_of.items():
            done = machine.run(node, [control, "status", "--json"], user=user)
            runs = json.loads(done.stdout)["runs"]
            assert [(run["pid"], run["user"]) for run in runs] == [(job.process.pid, user.name)], done
        assert len(json.loads(machine.run(node, [control, "status", "--json"]).stdout)["runs"]) == 2
        assert len(machine.runs()) == 2
        for job in jobs_of.values():
            job.let_go()
    assert not machine.place(RECORDS).exists()


def _is_worker(command: str) -> bool:
    """The launcher's own command has the name of the script too, and begins as root's."""
    return command.endswith(f"{jobs.TRAIN} --groups 3") and "--peers" not in command
