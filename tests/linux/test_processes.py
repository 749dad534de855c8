"""The job's processes without a cgroup: who is found, who is not, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from checkout import CHECKOUT
from headless import HEADLESS
from hosts import eventually, is_alive
from process_table import name_of

from securerun.linux import proc, processes
from securerun.linux.processes import JobProcesses, Process

USER = os.getuid()
NOBODY = 65534
VARIABLE = "A_JOBS_OWN_ID"
# Generous: what is awaited takes milliseconds.
PATIENCE_SECONDS = 20.0
NEEDS_UNSHARE = pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")


class Job:
    """Processes started with one run's id, or on purpose without it; all are gone after the test."""

    def __init__(self) -> None:
        self.run_id = secrets.token_hex(6)
        self.variables = {"PATH": os.environ["PATH"], VARIABLE: self.run_id}
        self.mark = f"{VARIABLE}={self.run_id}"
        self._started: list[subprocess.Popen[str]] = []
        self.memory = JobProcesses(self.mark, USER)

    def start(self, argv: Sequence[str], *, env: dict[str, str] | None = None, user: int | None = None) -> int:
        """Start a process; it may say something first: see `line`."""
        env = self.variables if env is None else env
        process = subprocess.Popen(argv, env=env, user=user, stdout=subprocess.PIPE, text=True, cwd="/")
        self._started.append(process)
        return process.pid

    def shell(self, script: str, **how: dict[str, str]) -> int:
        return self.start(["sh", "-c", script], **how)  # type: ignore[arg-type]

    def python(self, script: str, **how: dict[str, str]) -> int:
        return self.start([sys.executable, "-ISc", script], **how)  # type: ignore[arg-type]

    def line(self) -> str:
        """The next line that the process started last says."""
        output = self._started[-1].stdout
        assert output is not None
        return output.readline().strip()

    def end(self, pid: int) -> None:
        """End one of the processes that were started, and see it gone."""
        (process,) = (one for one in self._started if one.pid == pid)
        process.kill()
        process.wait()

    def pids(self) -> set[int]:
        return {process.pid for process in self.find()}

    def find(self) -> frozenset[Process]:
        self.memory.find()
        return processes.marked(self.mark, USER)

    def close(self) -> None:
        started = {Process.of(process.pid) for process in self._started if process.poll() is None}
        left = processes.end_all(JobProcesses(self.mark, USER, started | self.memory.find()).find, 0)
        for process in self._started:
            process.kill()
            process.communicate()
        assert left == frozenset()


@pytest.fixture
def job() -> Iterator[Job]:
    with contextlib.closing(Job()) as made:
        yield made


@pytest.fixture(params=["pidfd", "pid"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to signal: with pidfds, and as before kernel 5.3."""
    if request.param == "pid":
        monkeypatch.delattr(os, "pidfd_open")
    return str(request.param)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def in_a_pid_namespace(script: str, *arguments: str) -> None:
    """Run a script as pid 1 of a namespace of its own, where nobody else takes a number."""
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        [*alone, sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Who is found


def test_a_process_with_the_runs_id_is_found_and_no_other(job: Job) -> None:
    sleep = ["sleep", "60"]
    pid = job.start(sleep)
    for near_miss in (
        {VARIABLE: f"{job.run_id}0"},
        {VARIABLE: job.run_id[:-1]},
        {f"X{VARIABLE}": job.run_id},
        {"A": f"{VARIABLE}={job.run_id}"},
        {},
    ):
        job.start(sleep, env=near_miss)
    assert job.find() == {Process.of(pid)}


def test_double_forked_and_in_a_session_of_its_own_is_found(job: Job) -> None:
    job.shell("setsid sh -c 'sleep 60 & echo $!' & wait")
    pid = int(job.line())
    assert eventually(lambda: parent_of(pid) not in job.pids()), "it still has its parent"
    assert os.getsid(pid) != os.getsid(0)
    assert pid in job.pids()


def test_descendants_that_cleared_their_environment_are_found_while_the_parent_lives(job: Job) -> None:
    parent = job.shell("env -i sh -c 'sleep 60 & echo $$ $!; wait' & wait")
    child, grandchild = map(int, job.line().split())
    assert eventually(lambda: {parent, child, grandchild} <= job.pids())


def test_what_was_seen_once_is_found_after_its_parent_has_ended(job: Job) -> None:
    parent = job.shell("env -i setsid sh -c 'echo $$; sleep 60 & wait' & wait")
    child = int(job.line())
    assert eventually(lambda: {process.pid for process in job.memory.find()} >= {parent, child})
    job.end(parent)
    assert eventually(lambda: parent_of(child) != parent)
    assert child not in job.pids()
    found = {process.pid for process in job.memory.find()}
    assert child in found
    assert parent not in found


def test_a_forked_child_of_the_launcher_shows_no_id_and_is_found_through_the_launcher(job: Job) -> None:
    """os.environ of a running process changes no byte of /proc/PID/environ, and fork copies what is there."""
    script = f"""
import os, time
os.environ["{VARIABLE}"] = "{job.run_id}"
child = os.fork()
if child: print(child, flush=True)
time.sleep(60)
"""
    launcher = job.python(script, env={})
    child = int(job.line())
    known = Process.of(launcher)
    assert job.pids() == set()
    found = processes.marked(job.mark, USER, known={known})
    assert found == {known, Process.of(child)}
    processes.end(found)


def test_a_known_process_whose_number_passed_to_another_is_not_found(job: Job) -> None:
    pid = job.start(["sleep", "60"], env={})
    now = Process.of(pid)
    assert processes.marked(job.mark, USER, known={Process(pid, now.start - 1)}) == frozenset()
    assert processes.marked(job.mark, USER, known={now}) == {now}


def test_a_process_that_waits_to_be_reaped_is_not_found(job: Job) -> None:
    pid = job.start(["true"])
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert job.pids() == set()


def test_a_process_whose_first_thread_has_exited_is_found(job: Job) -> None:
    pid = job.python(HEADLESS)
    assert job.line() == "ready"
    assert pid in job.pids()


def test_the_spared_are_not_found_nor_what_they_started(job: Job) -> None:
    guard = job.shell("env -i sleep 60 & echo $!; wait")
    helper = int(job.line())
    # Until it is sleep, which has no environment, the helper is a shell that was forked, and shows the mark itself.
    assert eventually(lambda: job.pids() == {guard, helper} and name_of(helper) == "sleep")
    assert processes.marked(job.mark, USER, spare={guard}) == frozenset()


def test_this_process_and_the_kernels_threads_are_never_found(job: Job) -> None:
    mine = Process.of(job.start(["sleep", "60"], env={}))
    # Inside a container there is no kernel thread to be seen.
    threads = [2] if Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() == "kthreadd\n" else []
    known = {Process.of(pid) for pid in (*threads, os.getpid())}
    assert processes.marked(job.mark, USER, known=known) == frozenset()
    assert processes.marked(job.mark, USER, known={*known, mine}) == {mine}


IN_A_CONTAINER = f"""
import os, time
from securerun.linux.processes import Process, marked
sleeper = os.fork()
if not sleeper:
    time.sleep(60)
guard = os.fork()
if not guard:
    launcher, child = Process.of(1), Process.of(sleeper)
    assert marked("NAME=" + "0" * 12, {USER}) == set()
    assert marked("NAME=" + "0" * 12, {USER}, known={{child}}) == {{child}}
    assert marked("NAME=" + "0" * 12, {USER}, known={{launcher}}) == {{launcher, child}}
    os._exit(0)
assert os.waitpid(guard, 0)[1] == 0
"""


@pytest.mark.usefixtures("root")
@NEEDS_UNSHARE
def test_init_is_found_where_it_is_the_launcher_alone() -> None:
    """In a container whose command is securerun the launcher is pid 1, and parent of all that lost theirs."""
    in_a_pid_namespace(IN_A_CONTAINER)


def test_who_is_none_of_the_jobs_is_looked_at_once_and_whoever_gets_its_number_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GROWN_SECONDS", 0.0)
    other = job.start(["sleep", "60"], env={})
    mine = job.start(["sleep", "60"])
    looked: list[int] = []
    read = proc.stat

    def stat(pid: proc.Pid) -> proc.Stat:
        assert isinstance(pid, int)
        looked.append(pid)
        return read(pid)

    time.sleep(0.1)
    memory = JobProcesses(job.mark, USER)
    assert {process.pid for process in memory.find()} == {mine}
    monkeypatch.setattr(proc, "stat", stat)
    assert {process.pid for process in memory.find()} == {mine}
    assert mine in looked and other not in looked
    numbers = proc.listed()
    monkeypatch.setattr(proc, "listed", lambda: {**numbers, other: numbers[other] + 1})
    assert {process.pid for process in memory.find()} == {mine}
    assert other in looked


@pytest.mark.parametrize("patient", [False, True])
def test_who_ended_since_it_was_seen_in_the_cgroup_is_none_of_the_living(job: Job, patient: bool) -> None:
    mine = job.start(["sleep", "60"])
    short = subprocess.Popen(["sleep", "60"])
    inside = {Process.of(short.pid)}
    memory = JobProcesses(job.mark, USER)
    assert {process.pid for process in memory.find(inside, patient=patient)} == {mine, short.pid}
    short.kill()
    short.wait()
    assert {process.pid for process in memory.find(inside, patient=patient)} == {mine}


def test_a_process_of_others_between_the_job_and_its_own_hides_nothing(job: Job) -> None:
    """Such as a service that sudo started in the job: what it starts as the job's user is found, however late."""
    assert JobProcesses(job.mark, NOBODY).find() == frozenset()
    memory = JobProcesses(job.mark, NOBODY)
    if USER != 0:
        pytest.skip("this needs root")
    script = f"""
import os, time
os.environ.clear()
child = os.fork()
if not child:
    time.sleep(3)
    if not os.fork():
        os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
        print(os.getpid(), flush=True)
    time.sleep(60)
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
print("ready", flush=True)
time.sleep(60)
"""
    parent = job.python(script)
    assert job.line() == "ready"
    known = {Process.of(parent)}
    for _ in range(3):
        assert {process.pid for process in memory.find(known)} == {parent}
        time.sleep(0.8)
    late = int(job.line())
    assert {process.pid for process in memory.find()} == {parent, late}


@pytest.mark.usefixtures("root")
def test_another_users_process_with_the_same_id_is_not_touched(job: Job) -> None:
    mine = job.start(["sleep", "60"])
    liar = job.start(["sleep", "60"], user=NOBODY)
    assert processes.end_all(job.find, 0) == frozenset()
    assert eventually(lambda: not is_alive(mine))  # killed, it shows no mark a moment before it has ended
    assert is_alive(liar)
    # Nor does a run of that user have to do with root's processes.
    again = job.start(["sleep", "60"])
    found = processes.marked(job.mark, NOBODY)
    assert found == {Process.of(liar)}
    assert Process.of(again) not in found


@pytest.mark.usefixtures("root")
def test_the_real_user_counts_not_the_effective_one(job: Job) -> None:
    script = f"import os, time; os.setresuid({NOBODY}, 0, 0); print('ready', flush=True); time.sleep(60)"
    pid = job.python(script)
    assert job.line() == "ready"
    assert job.pids() == set()
    assert processes.marked(job.mark, NOBODY) == {Process.of(pid)}


# As rootless podman has it: other users out here, and the user's own namespace; one of them in another below that.
IN_A_USER_NAMESPACE = f"""
import ctypes, os, time
unshare = ctypes.CDLL(None).unshare
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
unshare(0x10000000)
print("made", flush=True)
while not open("/proc/self/uid_map").read():
    time.sleep(0.01)
os.setresuid(0, 0, 0)
if not os.fork():
    os.setresuid(1, 1, 1)
    unshare(0x10000000)
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(0.5)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.usefixtures("root")
def test_who_is_ended_for_a_user_is_his_alone_or_in_a_namespace_of_his(job: Job) -> None:
    """Not what acts for another as well, as sudo does: it passes signals on."""
    users = {"his": (NOBODY,) * 3, "acting": (NOBODY, 0, 0), "formerly": (NOBODY, NOBODY, 0), "roots": (0, 0, 0)}
    found = {}
    for name, ids in users.items():
        found[name] = job.python(f"import os, time; os.setresuid{ids}; print('ready', flush=True); time.sleep(60)")
        assert job.line() == "ready"
    assert {name for name, pid in found.items() if processes.may_end(NOBODY, pid)} == {"his"}
    # Without privilege user id 0 is a user like others.
    assert {name for name, pid in found.items() if processes.may_end(0, pid)} == {"roots"}
    inside = job.python(IN_A_USER_NAMESPACE)
    assert job.line() == "made"
    Path(f"/proc/{inside}/uid_map").write_text("0 100000 2")
    deeper = int(job.line())
    assert int(job.line()) == inside
    assert proc.real_user(inside) == 100_000 and proc.real_user(deeper) == 100_001
    assert {user for user in (NOBODY, NOBODY - 1) if processes.may_end(user, inside)} == {NOBODY}
    assert {user for user in (NOBODY, NOBODY - 1) if processes.may_end(user, deeper)} == {NOBODY}
    assert not processes.may_end(NOBODY, 0x7FFFFFFF)


@pytest.mark.usefixtures("root")
def test_descendants_of_other_users_belong_to_a_job_of_root_alone(job: Job) -> None:
    script = f"""
import os, time
child = os.fork()
if not child:
    os.setuid({NOBODY})
    print(os.getpid(), flush=True)
time.sleep(60)
"""
    parent = job.python(script)
    child = int(job.line())
    assert job.pids() == {parent, child}
    # A user's job never reaches root's processes, not even one of its own descent.
    of_nobody = processes.marked(job.mark, NOBODY, known={Process.of(parent)})
    assert {process.pid for process in of_nobody} == {child}


# How they are signalled


def test_a_signal_reaches_the_process_and_no_later_one_of_its_number(job: Job, way: str) -> None:
    pid = job.start(["sleep", "60"])
    now = Process.of(pid)
    for other in (Process(pid, now.start - 1), Process(pid, now.start + 1)):
        assert not processes.signal(other, signal.SIGKILL)
    assert is_alive(pid)
    assert processes.signal(now, signal.SIGKILL)
    assert eventually(lambda: not is_alive(pid))


def test_a_process_that_is_gone_cannot_be_signalled(job: Job, way: str) -> None:
    pid = job.start(["sleep", "60"])
    gone = Process.of(pid)
    job.end(pid)
    assert not processes.signal(gone, signal.SIGKILL)
    assert processes.end({gone}, signal.SIGTERM) == 0


@pytest.mark.parametrize("pid", [-1, 0, 1])
def test_init_and_groups_are_never_signalled(pid: int, way: str) -> None:
    """Asked with signal 0, which does nothing but would be sent."""
    start = Process.of(1).start if pid == 1 else 0
    assert not processes.signal(Process(pid, start), 0)


@pytest.mark.parametrize("error", [PermissionError, OSError, BlockingIOError])
def test_where_pidfds_are_refused_the_pid_serves(
    job: Job, error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> int:
        raise error

    pid = job.start(["sleep", "60"])
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert processes.signal(Process.of(pid), signal.SIGKILL)
    assert eventually(lambda: not is_alive(pid))


REUSE = """
import os, signal, sys, time
from pathlib import Path
from securerun.linux import proc, processes
def sleeper():
    pid = os.fork()
    if not pid:
        time.sleep(60)
    return pid
if sys.argv[1] == "pid":
    del os.pidfd_open
old = sleeper()
seen = processes.Process.of(old)
os.kill(old, signal.SIGKILL)
os.waitpid(old, 0)
time.sleep(0.05)
Path("/proc/sys/kernel/ns_last_pid").write_text(str(old - 1))
new = sleeper()
assert new == old, "the number did not come again"
assert not processes.signal(seen, signal.SIGKILL)
time.sleep(0.05)
assert os.waitpid(new, os.WNOHANG) == (0, 0), "the later process was ended"
assert processes.signal(processes.Process.of(new), signal.SIGKILL)
"""


@pytest.mark.usefixtures("root")
@NEEDS_UNSHARE
@pytest.mark.skipif(not Path("/proc/sys/kernel/ns_last_pid").exists(), reason="no CONFIG_CHECKPOINT_RESTORE")
@pytest.mark.parametrize("how", ["pidfd", "pid"])
def test_a_number_that_really_came_again_is_not_signalled(how: str) -> None:
    in_a_pid_namespace(REUSE, how)


# How they are ended


def within(seconds: float, work: Callable[[], frozenset[Process]]) -> frozenset[Process]:
    began = time.monotonic()
    left = work()
    assert time.monotonic() - began < seconds
    return left


def test_who_ends_when_asked_is_not_killed(job: Job, tmp_path: Path) -> None:
    farewell = shlex.quote(str(tmp_path / "farewell"))
    job.shell(f"trap 'echo asked > {farewell}; exit' TERM; echo ready; while :; do sleep 0.01; done")
    assert job.line() == "ready"
    assert within(PATIENCE_SECONDS, lambda: processes.end_all(job.find, PATIENCE_SECONDS)) == frozenset()
    assert (tmp_path / "farewell").read_text() == "asked\n"


def test_a_stopped_process_is_continued_to_hear_that_it_is_asked(job: Job, tmp_path: Path) -> None:
    farewell = shlex.quote(str(tmp_path / "farewell"))
    pid = job.shell(f"trap 'echo asked > {farewell}; exit' TERM; echo ready; while :; do sleep 0.01; done")
    assert job.line() == "ready"
    os.kill(pid, signal.SIGSTOP)
    assert within(PATIENCE_SECONDS, lambda: processes.end_all(job.find, PATIENCE_SECONDS)) == frozenset()
    assert (tmp_path / "farewell").exists()


def test_who_ignores_the_request_lives_until_the_grace_is_over(job: Job) -> None:
    deaf = job.python(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    assert job.line() == "ready"
    willing = job.start(["sleep", "60"])
    alive: list[tuple[float, bool, bool]] = []
    began = time.monotonic()

    def find() -> frozenset[Process]:
        alive.append((time.monotonic() - began, is_alive(deaf), is_alive(willing)))
        return job.find()

    assert within(PATIENCE_SECONDS, lambda: processes.end_all(find, 0.5)) == frozenset()
    assert all(lives for at, lives, _ in alive if at < 0.5)
    assert any(not lives for at, _, lives in alive if at < 0.5)
    assert eventually(lambda: not is_alive(deaf))  # likewise


SAVES = """
import os, signal, subprocess, sys, time
def save(number, frame):
    sys.exit(subprocess.call(["sh", "-c", f"(sleep 0.5 && touch {sys.argv[1]}); wait"]))
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_process_starts_to_save_its_work_is_not_ended_within_the_grace(job: Job, tmp_path: Path) -> None:
    """Nor what that starts: a shell's trap that copies a checkpoint is many programs."""
    saved = tmp_path / "saved"
    job.start([sys.executable, "-ISc", SAVES, str(saved)])
    assert job.line() == "ready"
    willing = job.start(["sleep", "60"])
    assert within(PATIENCE_SECONDS, lambda: processes.end_all(job.find, PATIENCE_SECONDS)) == frozenset()
    assert saved.exists() and not is_alive(willing)


def test_who_was_not_seen_when_the_others_were_asked_is_asked_too(job: Job) -> None:
    """Of two looks the second finds what the first passed: as old as the others, and told of nothing."""
    first, second = (Process.of(job.start(["sleep", "60"])) for _ in range(2))
    time.sleep(0.05)
    looks = iter([{first}, {second}])

    def find() -> set[Process]:
        found = next(looks, {first, second})
        return {process for process in found if is_alive(process.pid)}

    assert within(PATIENCE_SECONDS, lambda: processes.end_all(find, PATIENCE_SECONDS)) == frozenset()


def test_without_grace_all_are_killed_at_once(job: Job) -> None:
    job.shell("trap '' TERM; echo ready; while :; do sleep 0.01; done")
    assert job.line() == "ready"
    assert within(PATIENCE_SECONDS, lambda: processes.end_all(job.find, 0)) == frozenset()
    assert job.pids() == set()


HOPPER = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(8):
    if not os.fork():
        os.setsid()
        while True:
            time.sleep(0.1)
            if os.fork():
                os._exit(0)
print("ready", flush=True)
"""


def test_processes_that_fork_and_end_all_the_time_are_ended(job: Job) -> None:
    job.python(HOPPER)
    assert job.line() == "ready"
    assert within(PATIENCE_SECONDS, lambda: processes.end_all(job.find, 0.3, PATIENCE_SECONDS)) == frozenset()
    time.sleep(0.3)
    assert job.pids() == set()


def test_a_process_in_the_middle_of_its_execve_is_known_by_what_it_is_started_with() -> None:
    """Popen returns when the kernel closes the descriptors of the old program; the environment comes a little later."""
    for _ in range(200):
        sleeper = subprocess.Popen(["/bin/sleep", "60"], env={"NAME": "value"})
        try:
            assert processes.started_with("NAME=value", [sleeper.pid]) == {sleeper.pid}
            assert processes.started_with("NAME=val", [sleeper.pid]) == set()
        finally:
            sleeper.kill()
            sleeper.wait()


def test_nobody_waits_for_a_process_that_was_started_with_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = job.python("import time; print('ready', flush=True); time.sleep(60)", env={})
    assert job.line() == "ready"
    waits: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", waits.append)
        assert processes.started_with("NAME=value", [pid]) == set()
    assert waits == []


RESPAWNER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def child():
    if not os.fork():
        os.execve("/bin/sleep", ["sleep", "60"], {})
for _ in range(20):
    child()
print("ready", flush=True)
while True:
    os.wait()
    child()
"""


def test_a_parent_that_replaces_its_children_is_ended_with_them_and_none_is_lost(job: Job) -> None:
    """The children cleared their environment: they are known by their parent alone, which is killed as well."""
    job.python(RESPAWNER)
    assert job.line() == "ready"
    seen: set[Process] = set()

    def find() -> frozenset[Process]:
        found = job.find()
        seen.update(found)
        return found

    assert within(PATIENCE_SECONDS, lambda: processes.end_all(find, 0.3)) == frozenset()
    assert len(seen) > 20
    assert not any(is_alive(process.pid) and Process.of(process.pid) == process for process in seen)


def test_what_cannot_be_ended_is_named_in_bounded_time(job: Job) -> None:
    pid = job.start(["sleep", "60"])
    beyond_reach = Process(pid, Process.of(pid).start + 1)
    left = within(PATIENCE_SECONDS, lambda: processes.end_all(lambda: {beyond_reach}, 0.1, 0.1))
    assert left == {beyond_reach}
    assert is_alive(pid)


def test_one_empty_look_is_not_believed(job: Job) -> None:
    """A process may fork a child whose number the look has passed, and end before the look comes to its own."""
    pid = job.start(["sleep", "60"])
    looks = 0

    def find() -> frozenset[Process]:
        nonlocal looks
        looks += 1
        return frozenset() if looks == 1 else job.find()

    assert processes.end_all(find, PATIENCE_SECONDS) == frozenset()
    assert not is_alive(pid)


def test_one_empty_look_after_the_killing_is_not_believed(job: Job) -> None:
    deaf = job.python(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    assert job.line() == "ready"
    late = job.start(["sleep", "60"])
    first, second = Process.of(deaf), Process.of(late)
    missed = False

    def find() -> frozenset[Process]:
        nonlocal missed
        if is_alive(deaf) and not _killed(deaf):
            return frozenset({first})
        if not missed:
            missed = True
            return frozenset()
        return frozenset({second}) if is_alive(late) else frozenset()

    assert processes.end_all(find, 0) == frozenset()
    assert not is_alive(late)


def _killed(pid: int) -> bool:
    """Whether SIGKILL waits for a process that has not got round to ending yet."""
    pending = re.findall(r"^S[hi][dg]Pnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending)


def test_where_nothing_is_found_nothing_is_awaited(job: Job) -> None:
    assert within(PATIENCE_SECONDS, lambda: processes.end_all(job.find, 10 * PATIENCE_SECONDS)) == frozenset()


@pytest.mark.parametrize(
    "look",
    [
        lambda process: proc.is_running(process.pid, process.start),
        lambda process: proc.exists(process.pid),
        processes.lives,
        lambda process: processes.marked("A=1", USER, known=[process]),
    ],
    ids=["is_running", "exists", "lives", "marked"],
)
def test_who_cannot_be_seen_for_want_of_descriptors_is_not_taken_for_ended(look: Callable[[Process], object]) -> None:
    """A run would be removed whose processes live, and its ports would be open."""
    parent = Process.of(os.getppid())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            look(parent)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert look(parent)


def test_who_ended_before_its_environment_was_there_is_of_no_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was counted as a process of whatever run was asked for, which then was not removed."""
    pid, shows = job.python("import time; time.sleep(600)", env={}), processes._shows

    def none_yet(variable: bytes, asked: int) -> bool | None:
        if asked != pid:
            return shows(variable, asked)
        monkeypatch.setattr(processes, "_shows", shows)
        job.end(pid)
        return None

    monkeypatch.setattr(processes, "_shows", none_yet)
    assert pid not in processes.claimants(job.mark, USER)
