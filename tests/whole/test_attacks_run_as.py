"""Attacks of a job that root started as another user (--run-as) on root's terminal, keys and environment.

The job is a program of alice's, which knows all of securerun. What started it is root's shell at a terminal.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable

import jobs
import pytest
from attacking import Ground, program
from checkout import CHECKOUT, COMMANDS
from hosts import eventually, finish, is_alive
from probe import reach
from process_table import fields_of, users_of
from terminals import Seat
from torchless import needs_torch

import securerun

EXEC = (str(COMMANDS / "securerunctl"), "exec", "--peers", "localhost", "--run-as", "alice", "--")
LAUNCH = (jobs.SECURERUN, "--run-as", "alice", "--no-python")
# Python callers have the same: root's program is the user's from the call on.
CALL = (
    *(sys.executable, "-I", "-c"),
    "import sys, securerun.run; securerun.run.main(sys.argv[1:]); print('caller goes on')",
    *LAUNCH[1:],
)
BOTH = pytest.mark.parametrize("command", [EXEC, LAUNCH, CALL], ids=["exec", "launch", "call"])

# Tries what a program can do with a terminal, through each descriptor that it has and by name, while root types.
AT_A_TERMINAL = """
import contextlib, errno, fcntl, os, select, sys, termios, time
for name in ("/dev/tty", "/proc/self/fd/1", "/proc/self/fd/2"):
    try:
        os.open(name, os.O_RDWR | os.O_NONBLOCK)
        print("opened", name)
    except OSError as error:
        pass
terminals = [number for number in range(64) if os.isatty(number)]
for number in terminals:
    for act, argument in ((termios.TIOCSTI, b"#"), (termios.TIOCSCTTY, 0), (termios.TIOCSCTTY, 1)):
        try:
            fcntl.ioctl(number, act, argument)
            print("did", hex(act), "through", number)
        except OSError as error:
            pass
print("standard input is", os.readlink("/proc/self/fd/0"))
print("tries", flush=True)
heard = b""
end = time.monotonic() + 3
while time.monotonic() < end:
    for number in (0, *terminals):
        with contextlib.suppress(OSError):
            os.set_blocking(number, False)
            piece = os.read(number, 1000)
            heard += piece
    time.sleep(0.01)
print("heard", heard, flush=True)
"""

# What the keys of a session are, and what is in /proc of the launchers above.
POSSESSIONS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
keyctl = {"x86_64": 250}.get(os.uname().machine, 219)
found = libc.syscall(keyctl, 10, -3, b"user", b"of root's", 0)
print("key", found if found > 0 else os.strerror(ctypes.get_errno()))
BEGINNINGS = (
    *("ROOTS_", "SSH_", "AWS_", "XDG_", "DBUS_", "KRB5", "SLURM_J", "HF_", "SUDO_", "WANDB", "http", "GITHUB"),
    *("DISPLAY", "MAIL", "OLDPWD", "SECURERUN_KEEP"),
)
KEPT = ("SLURM_CONF", "PYTHONPATH", "LC_TIME", "NCCL_DEBUG", "LD_LIBRARY_PATH")
own = {name for name in os.environ if name.startswith(BEGINNINGS)}
print("of root's", *sorted(own))
print("stays", *(os.environ.get(name) for name in KEPT))
print("home", os.environ["HOME"], os.environ["USER"], os.environ["LOGNAME"], os.environ["SHELL"])
parent = os.getppid()
while parent > 1:
    for name in ("environ", "mem", "fd", "fd/0", "maps"):
        try:
            file = f"/proc/{parent}/{name}"
            seen = os.listdir(file) if name == "fd" else open(file, "rb").read(100)
            print("saw", name, "of", open(f"/proc/{parent}/comm").read().strip())
        except OSError:
            pass
    text = open(f"/proc/{parent}/stat").read()
    parent = int(text.rpartition(")")[2].split()[1])
    if parent == int(os.environ["PET_STOP"]):
        break
"""
# Begins a session of keys with one in it, and goes on as another program.
WITH_A_KEY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
machine = os.uname().machine
keyctl, add_key = {"x86_64": (250, 248)}.get(machine, (219, 217))
assert libc.syscall(keyctl, 1, 0) > 0
# KEYCTL_SETPERM of the ring: whoever possesses it may do everything.
assert libc.syscall(add_key, b"user", b"of root's", b"secret", 6, -3) > 0
os.environ["PET_STOP"] = str(os.getppid())
os.execv(sys.argv[1], sys.argv[1:])
"""

# Ends at the end of its input or by a signal; the others are noted.
SIGNALS = """
import os, signal, sys
def note(number, frame):
    os.write(1, f"{signal.Signals(number).name}\\n".encode())
for name in sys.argv[1:]:
    signal.signal(signal.Signals[name], note)
os.write(1, b"ready\\n")
sys.stdin.read()
"""
NOTED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT")


def seated(ground: Ground, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Seat:
    """Root's shell at a terminal, with a command."""
    return Seat(ground.node, ground.machine.command(argv, env=env))


@BOTH
def test_job_of_another_user_neither_types_nor_reads_at_roots_terminal(ground: Ground, command: Sequence[str]) -> None:
    script = ground.machine.write("look.py", AT_A_TERMINAL, owner=ground.alice)
    line = shlex.join([*command, sys.executable, script])
    with seated(
        ground, ["bash", "--norc", "--noprofile", "-c", f"exec 7<>/dev/tty 8</dev/tty; {line}; echo over"]
    ) as seat:
        seat.show("tries\r\n")
        said = seat.before
        seat.type("a secret of root's\n")
        seat.show("over")
        said += seat.before
    assert "standard input is /dev/null" in said
    assert "opened" not in said and "did" not in said, said
    assert "heard b''" in said, said


@BOTH
def test_job_has_neither_keys_nor_tokens_nor_sessions_of_roots(ground: Ground, command: Sequence[str]) -> None:
    script = ground.machine.write("look.py", POSSESSIONS, owner=ground.alice)
    env = {
        "ROOTS_OWN": "x",
        "SSH_AUTH_SOCK": "/run/agent",
        "AWS_SECRET_ACCESS_KEY": "x",
        "XDG_SESSION_ID": "1",
        "XDG_RUNTIME_DIR": "/run/user/0",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/0/bus",
        "KRB5CCNAME": "FILE:/run/krb5cc_0",
        "SLURM_JWT": "x",
        "HF_TOKEN": "x",
        "HF_HOME": "/data/hf",
        "WANDB_API_KEY": "x",
        "GITHUB_TOKEN": "x",
        "SUDO_COMMAND": "x",
        "SUDO_UID": "6002",
        "http_proxy": "http://root:secret@proxy:3128",
        "https_proxy": "http://proxy:3128",
        "DISPLAY": ":0",
        "MAIL": "/var/mail/root",
        "OLDPWD": "/root",
        "SLURM_CONF": "/etc/slurm.conf",
        "PYTHONPATH": "/opt/modules",
        "LC_TIME": "C",
        "NCCL_DEBUG": "INFO",
        "LD_LIBRARY_PATH": "/opt/lib",
        "ROOTS_CHOICE": "x",
        "SECURERUN_KEEP_ENV": "ROOTS_CHOICE, WANDB_*",
    }
    words = [*program(WITH_A_KEY), *command, sys.executable, script]
    done = ground.machine.run(ground.node, words, env=env)
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert "key Required key not available" in lines, done
    assert "of root's HF_HOME ROOTS_CHOICE WANDB_API_KEY https_proxy" in lines, done
    assert "stays /etc/slurm.conf /opt/modules C INFO /opt/lib" in lines, done
    alice = ground.alice
    assert any(line.startswith(f"home {alice.home} alice alice /") for line in lines), done
    seen = [line for line in lines if line.startswith("saw")]
    # Of its own user's it sees what it is in; of a launcher that has been root, nothing.
    assert not [line for line in seen if " fd " not in line and "python" not in line], seen
    assert not [line for line in seen if "securerun" in line], seen


def test_environment_that_a_forked_worker_finds_in_its_memory_is_not_roots(ground: Ground) -> None:
    look = "print('shown', b'of-root' in open('/proc/self/environ', 'rb').read())"
    script = ground.machine.write("look.py", look, owner=ground.alice)
    for method in ("fork", "spawn"):
        words = [jobs.SECURERUN, "--run-as", "alice", "--run-path", "--start-method", method, script]
        done = ground.machine.run(ground.node, words, env={"AWS_SECRET_ACCESS_KEY": "of-root"})
        assert (done.returncode, done.stdout) == (0, "shown False\n"), done


@BOTH
def test_standard_input_that_is_no_terminal_stays(ground: Ground, command: Sequence[str]) -> None:
    words = [*command, "sh", "-c", "cat; test ! -t 0"]
    done = ground.machine.run(ground.node, words, text_input="a line\n")
    assert (done.returncode, done.stdout.partition("\n")[0]) == (0, "a line"), done


@pytest.mark.parametrize("end", ["exit 0", "exit 3", "kill -TERM $$", "kill -INT $$", "kill -KILL $$", "kill -SEGV $$"])
def test_it_ends_as_the_job_ends(ground: Ground, end: str) -> None:
    """As without another user."""
    script = ground.machine.write("end.sh", end, owner=ground.alice)
    for command in (EXEC, LAUNCH):
        without = [word for word in command if word not in ("--run-as", "alice")]
        found = [ground.machine.run(ground.node, [*words, "sh", script]) for words in (without, command)]
        assert found[0].returncode == found[1].returncode, found
        assert found[0].stdout == found[1].stdout == "", found


def test_error_files_are_the_jobs_users(ground: Ground) -> None:
    machine = ground.machine
    script = machine.write(
        "fail.py",
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main():\n    raise ValueError('of the worker')\nmain()\n",
        owner=ground.alice,
    )
    place = f"{ground.alice.home}/error.json"
    words = [jobs.SECURERUN, "--run-as", "alice", script]
    done = machine.run(ground.node, words, env={"TORCHELASTIC_ERROR_FILE": place})
    assert done.returncode == 1, done
    assert "of the worker" in machine.place(place).read_text()
    assert machine.place(place).stat().st_uid == ground.alice.uid


def noting(ground: Ground) -> subprocess.Popen[str]:
    job = ground.machine.popen(ground.node, [*EXEC, sys.executable, "-c", SIGNALS, *NOTED], stdin=subprocess.PIPE)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    return job


def test_signals_reach_the_job_once(ground: Ground) -> None:
    job = noting(ground)
    assert job.stdout is not None
    for send in (os.kill, os.killpg):
        for name in NOTED:
            send(job.pid, signal.Signals[name])
            assert job.stdout.readline() == f"{name}\n"
    done = finish(job, timeout=30)
    assert (done.returncode, done.stdout) == (0, ""), done


def test_keys_of_the_terminal_are_roots_to_press(ground: Ground) -> None:
    """Ctrl-C, Ctrl-\\ and Ctrl-Z reach the job by way of what waits at the terminal."""
    with seated(ground, ["bash", "--norc", "--noprofile", "-i"]) as seat:
        code = SIGNALS.replace("sys.stdin.read()", "import time\nwhile True: time.sleep(0.05)")
        script = ground.machine.write("note.py", code, owner=ground.alice)
        seat.type(shlex.join([*EXEC, sys.executable, script, "SIGINT", "SIGQUIT"]) + "\n")
        seat.show("ready")
        pid = next(
            pid for pid, words in ground.machine.processes().items() if words.startswith(f"{sys.executable} {script}")
        )
        seat.type("\x03")
        seat.show("SIGINT")
        seat.type("\x1c")
        seat.show("SIGQUIT")
        seat.type("\x1a")
        seat.show("Stopped")
        assert eventually(lambda: fields_of(pid)[0] == "T")
        seat.type("fg\n")
        assert eventually(lambda: fields_of(pid)[0] == "S")
        seat.type("\x03")
        seat.show("SIGINT")
        os.kill(pid, signal.SIGTERM)
        seat.show("nobody was turned away")
        seat.type("echo status $?; exit\n")
        seat.show(f"status {128 + signal.SIGTERM}")


@pytest.mark.parametrize("command", [EXEC, LAUNCH], ids=["exec", "launch"])
def test_interrupt_looks_to_the_shell_as_it_did(ground: Ground, command: Sequence[str]) -> None:
    without = [word for word in command if word not in ("--run-as", "alice")]
    ends = []
    for words in (without, command):
        with seated(
            ground, ["bash", "-c", f"{shlex.join([*words, 'sh', '-c', 'echo up; exec sleep 60'])}; echo ended by $?"]
        ) as seat:
            seat.show("up")
            seat.type("\x03")
            ends.append(seat.end())
            ends.append("ended by 1" in seat.shown)
    assert ends[:2] == ends[2:]


@needs_torch
@pytest.mark.parametrize("command", [EXEC, LAUNCH], ids=["exec", "launch"])
def test_whoever_kills_what_root_started_ends_the_job(ground: Ground, command: Sequence[str]) -> None:
    job = ground.machine.popen(ground.node, [*command, "sh", "-c", "echo up; sleep 600"])
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    of_alice = [pid for pid in ground.machine.processes() if users_of(pid)[:1] == [ground.alice.uid]]
    assert len(of_alice) > 1
    os.kill(job.pid, signal.SIGKILL)
    assert eventually(lambda: not any(map(is_alive, of_alice)), seconds=20)


def test_process_of_several_threads_becomes_nobody_else(ground: Ground) -> None:
    call = (
        "import threading, time, securerun.run\n"
        "threading.Thread(target=time.sleep, args=(2,)).start()\n"
        "securerun.run.main(['--run-as', 'alice', 'x.py'])"
    )
    done = ground.machine.run(ground.node, [sys.executable, "-I", "-c", call])
    assert done.returncode == 77, done
    assert "2 threads" in done.stderr and len(done.stderr.splitlines()) == 1


# What only a launcher may say to its guard


# A worker that looks into every process of its own user, for descriptors to write on, and says on each who may connect.
TAKER = """
import contextlib, ctypes, ipaddress, os, signal, socket, sys, time
from securerun.guard.protocol import Peers, encode

libc = ctypes.CDLL(None, use_errno=True)
message = encode(Peers((ipaddress.ip_network("10.77.0.0/16"),)))
listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)

def launchers():
    for name in filter(str.isdecimal, os.listdir("/proc")):
        pid = int(name)
        with contextlib.suppress(OSError):
            text = open(f"/proc/{pid}/status").read()
            users = text.partition("Uid:")[2].split()[:4]
            words = open(f"/proc/{pid}/cmdline").read()
            if pid != os.getpid() and users == [str(os.getuid())] * 4 and ("securerun" in words or "guarded" in words):
                yield pid

def taken(pid):
    with contextlib.suppress(OSError):
        held = os.pidfd_open(pid)
        for number in range(40):
            found = libc.syscall(438, held, number, 0)
            if found >= 0:
                yield found
    for number in range(40):
        with contextlib.suppress(OSError):
            yield os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY | os.O_NONBLOCK)
    for name in ("mem", "environ", "maps"):
        with contextlib.suppress(OSError):
            if open(f"/proc/{pid}/{name}", "rb").read(1):
                print("read", name, file=sys.stderr)
    if libc.ptrace(16, pid, 0, 0) == 0:
        print("attached", file=sys.stderr)
        os.waitpid(pid, 0x40000000)
        libc.ptrace(17, pid, 0, 0)

found, count = list(launchers()), 0
for pid in found:
    for descriptor in taken(pid):
        with contextlib.suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{descriptor}").partition(":")[0]
            if kind in ("pipe", "socket"):
                count += 1
                os.write(descriptor, message)
print(listener.getsockname()[1], len(found), count, flush=True)
signal.pause()
"""
IN_A_BLOCK = """
import os, sys, subprocess
from securerun import guarded, policy
with guarded(policy(peers="10.99.0.1")):  # guarded
    if sys.argv[1] == "fork":
        if os.fork() == 0:
            exec(open(sys.argv[2]).read())
        os.wait()
    else:
        subprocess.run([sys.executable, sys.argv[2]])
"""
LAUNCHES = {
    "exec": [*EXEC[:2], "--peers", "10.99.0.1", "--", sys.executable],
    "launch": [jobs.SECURERUN, "--peers", "10.99.0.1"],
    "launch by fork": [jobs.SECURERUN, "--peers", "10.99.0.1", "--run-path", "--start-method", "fork"],
    "block": [sys.executable, "-c", IN_A_BLOCK, "spawn"],
    "block and fork": [sys.executable, "-c", IN_A_BLOCK, "fork"],
}


@pytest.mark.parametrize("way", ["sudo", "socket", "run-as"])
@pytest.mark.parametrize("how", LAUNCHES)
def test_worker_cannot_say_for_its_launcher_who_may_connect(ground: Ground, how: str, way: str) -> None:
    if way == "socket":
        ground.machine.place("/etc/sudoers.d/securerun").unlink()
    words = [*LAUNCHES[how], ground.machine.write("taker.py", TAKER, owner=ground.alice)]
    if way == "run-as":
        if how.startswith("block"):
            pytest.skip("a block has no user of its own")
        words[words.index("--peers") : words.index("--peers")] = ["--run-as", "alice"]
    job = ground.popen(None if way == "run-as" else ground.alice, words)
    assert job.stdout is not None and job.stderr is not None
    line = job.stdout.readline()
    assert line, job.stderr.read()
    port, launchers, took = map(int, line.split())
    assert launchers >= 1
    time.sleep(0.5)  # what the guard is told it does at once
    target = (ground.node.ipv4, port)
    reached = reach(ground.stranger, [target])[target]
    os.kill(job.pid, signal.SIGTERM)
    done = finish(job, timeout=40)
    assert not reached and took == 0, done
    assert "attached" not in done.stderr and "read " not in done.stderr, done


def test_processes_of_the_job_can_be_looked_into_as_ever(ground: Ground) -> None:
    """Debuggers and profilers of the job's user work on workers, and workers leave cores."""
    look = "import ctypes; print('dumpable', ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    script = ground.machine.write("look.py", look, owner=ground.alice)
    by_fork = [jobs.SECURERUN, "--run-path", "--start-method", "fork"]
    for words in ([jobs.SECURERUN], by_fork, [*EXEC[:4], "--", sys.executable]):
        done = ground.machine.run(ground.node, [*words, script], user=ground.alice)
        assert (done.returncode, done.stdout) == (0, "dumpable 1\n"), done


# Whose code root runs on the way to another user


SPY = "import os\nopen('/run/spied', 'a').write(f'{__name__} {os.getuid()}\\n')\nraise ImportError(__name__)\n"
# All that a launch imports as root after its first line: the standard library's, securerun's own and torch.
PLANTED = ("argparse", "dataclasses", "pwd", "ctypes", "tomllib", "textwrap", "shutil", "subprocess", "json", "torch")
MODULES = pytest.mark.parametrize("module", ["securerun", "securerun.launch"])


@pytest.fixture
def spied(ground: Ground) -> Iterator[Callable[[], str]]:
    """What ran as whom of what is planted in alice's home."""
    place = ground.machine.place("/run/spied")
    for name in PLANTED:
        ground.machine.write(f"{name}.py", SPY, owner=ground.alice)
    place.touch()
    place.chmod(0o666)
    yield place.read_text
    place.unlink()


@MODULES
@pytest.mark.parametrize("where", ["home", "a directory that all may write", "below such a one", "by a link"])
def test_root_does_not_run_what_lies_in_a_directory_of_the_users(
    ground: Ground, spied: Callable[[], str], module: str, where: str
) -> None:
    node, machine, home = ground.node, ground.machine, ground.alice.home
    place = {"home": home, "by a link": "/run/link"}.get(where, "/run/open")
    machine.run(node, ["sh", "-c", f"mkdir -p /run/open/below; cp {home}/*.py /run/open; ln -sfn {home} /run/link"])
    machine.run(node, ["chmod", "777", "/run/open"])
    if where == "below such a one":
        place = "/run/open/below"
    words = [sys.executable, "-m", module, "--run-as", "alice", "x.py"]
    try:
        done = machine.run(node, words, cwd=place)
        by_variable = machine.run(node, words[:3] + words[5:], cwd=place, env={"SECURERUN_RUN_AS": "alice"})
        for one in (done, by_variable):
            assert (one.returncode, one.stdout) == (77, ""), one
            assert "use the command securerun" in one.stderr and len(one.stderr.splitlines()) == 1, one
        assert spied() == ""
    finally:
        machine.run(node, ["rm", "-rf", "/run/open", "/run/link"])


@pytest.mark.parametrize("command", [EXEC, LAUNCH], ids=["exec", "launch"])
def test_root_imports_nothing_from_where_the_user_may_write(ground: Ground, command: Sequence[str]) -> None:
    for path in (ground.alice.home, f"{ground.alice.home}/missing"):
        done = ground.machine.run(ground.node, [*command, "true"], env={"PYTHONPATH": f"/opt:{path}"})
        assert done.returncode == 77, done
        assert ground.alice.home in done.stderr and "PYTHONPATH" in done.stderr


def test_root_runs_no_installation_of_a_users(ground: Ground) -> None:
    machine, node, home = ground.machine, ground.node, ground.alice.home
    made = machine.run(node, [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", f"{home}/env"])
    assert made.returncode == 0, made
    call = f"import sys; sys.path.append({str(CHECKOUT)!r}); import securerun.run; securerun.run.main(sys.argv[1:])"
    words = [f"{home}/env/bin/python", "-c", call, "--run-as", "alice", "--no-python", "true"]
    env = {"PYTHONSAFEPATH": "1"}
    machine.run(node, ["chown", "-R", "alice", f"{home}/env"])
    done = machine.run(node, words, env=env)
    assert done.returncode == 77 and "only root writes" in done.stderr, done


# In a directory of root's all the same: by an `install` as another user, a chown of too much, or a umask of 000.
_IN_THE_PACKAGE = [
    "chown alice {}/__pycache__",
    "chown alice {}/run.py",
    "chmod o+w {}/linux/libc.py",
    "chmod o+w {}/job",
]


@pytest.mark.parametrize("spoil", _IN_THE_PACKAGE)
def test_root_runs_nothing_that_another_could_write_into_the_installation(ground: Ground, spoil: str) -> None:
    """Python runs what it compiled before in place of the source. Neither does setup print a rule for such a guard."""
    package = Path(securerun.__file__).parent
    machine, node = ground.machine, ground.node
    machine.run(node, ["sh", "-ec", f"mkdir -p {package}/__pycache__; {spoil.format(package)}"])
    try:
        done = machine.run(node, [*LAUNCH, "true"])
        assert done.returncode == 77 and "only root writes" in done.stderr, done
        rule = machine.run(node, [str(COMMANDS / "securerunctl"), "setup", "sudoers", "--user", "alice"])
        assert rule.returncode == 77 and rule.stdout == "" and "would run as root" in rule.stderr, rule
    finally:
        machine.run(node, ["sh", "-ec", f"chown -R root {package}; chmod -R go-w {package}"])
    assert machine.run(node, [*LAUNCH, "true"]).returncode == 0


@MODULES
def test_from_a_directory_of_roots_it_becomes_the_user(ground: Ground, module: str) -> None:
    script = ground.machine.write("/run/jobs/who.py", "import os, beside; print(os.getuid(), beside.__name__)")
    ground.machine.write("/run/jobs/beside.py", "")
    words = [sys.executable, "-m", module, "--run-as", "alice", script]
    done = ground.machine.run(ground.node, words, cwd="/run/jobs")
    assert (done.returncode, done.stdout) == (0, f"{ground.alice.uid} beside\n"), done


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is of Python 3.11")
def test_the_safe_ways_lead_from_a_directory_of_the_users(ground: Ground, spied: Callable[[], str]) -> None:
    script = ground.machine.write("/run/jobs/who.py", "import os; print(os.getuid())")
    for words in ([jobs.SECURERUN], [sys.executable, "-P", "-m", "securerun"]):
        done = ground.machine.run(ground.node, [*words, "--run-as", "alice", script], cwd=ground.alice.home)
        assert (done.returncode, done.stdout) == (0, f"{ground.alice.uid}\n"), done
    assert spied() == ""


def test_users_themselves_start_it_where_they_like(ground: Ground) -> None:
    script = ground.machine.write("who.py", "import os; print(os.getuid())", owner=ground.alice)
    words = [sys.executable, "-m", "securerun", "--run-as", "alice", script]
    done = ground.machine.run(ground.node, words, user=ground.alice)
    assert (done.returncode, done.stdout) == (0, f"{ground.alice.uid}\n"), done
