"""securerunctl exec: any command under a lease, and to everyone else as if it had been started without it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import (
    RECORDS,
    Host,
    Network,
    eventually,
    finish,
    finish_all,
    is_alive,
    kill_group,
    machine_snapshot,
)
from probe import Probe, reach
from process_table import fields_of
from terminals import Seat
from users import GUARD, PrivateMachine

from securerun.job.environment import describe_job
from securerun.job.job import UNKNOWN_NODES, Endpoint, Job

EXEC = (str(COMMANDS / "securerunctl"), "exec")
ALONE = (*EXEC, "--peers", "localhost")

# A launch script in the shape of MindSpeed-LLM's: it knows nothing of securerun.
SCRIPT = """
export GLOO_SOCKET_IFNAME=eth0
MASTER_ADDR={master}
MASTER_PORT={port}
NNODES=2
{torchrun} --nproc_per_node 2 --nnodes $NNODES --node_rank $1 --master_addr $MASTER_ADDR --master_port $MASTER_PORT \\
    {train} --groups 3 | tee {log}$1
exit ${{PIPESTATUS[0]}}
"""

# Writes the name of each signal that it gets, until the end of its input; the last three end it as they always do.
SIGNALS = """
import os, signal, sys
def note(number, frame):
    os.write(1, f"{signal.Signals(number).name}\\n".encode())
for name in sys.argv[1:]:
    signal.signal(signal.Signals[name], note)
os.write(1, b"ready\\n")
sys.stdin.read()
"""
NOTED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT", "SIGPIPE")

# Listens on a port of its own choice, says so, and waits to be ended.
LISTENER = """
import signal, socket
listener = socket.create_server(("::", {port}), family=socket.AF_INET6, dualstack_ipv6=True)
print(listener.getsockname()[1], flush=True)
signal.pause()
"""

# What a process can see of who started it, and how.
TRACES = """
grep -E '^SigBlk|^(Uid|Gid|Groups):' /proc/self/status
# Without 32 and 33, of which glibc says in what it spawns what it likes (sysdeps/unix/sysv/linux/spawni.c).
sed -n 's/^SigIgn:.//p' /proc/self/status | { read mask; printf '%x\\n' $((0x$mask & ~0x180000000)); }
ls -l /proc/self/fd | grep -c ' -> '
pwd; echo "$0" "$@"; ulimit -a
ps -o sid= $$
"""


@contextlib.contextmanager
def nothing_left(*hosts: Host) -> Iterator[None]:
    """Whatever the block does, the hosts and the machine are soon as they were before."""
    before, machine = [host.snapshot() for host in hosts], machine_snapshot()
    yield
    eventually(lambda: ([host.snapshot() for host in hosts], machine_snapshot()) == (before, machine), seconds=2)
    assert machine_snapshot() == machine
    assert [host.snapshot() for host in hosts] == before


def spoken(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("securerun: ")]


@contextlib.contextmanager
def noting(node: Host) -> Iterator[subprocess.Popen[str]]:
    """A command that notes its signals; it is ready for them."""
    job = node.popen([*ALONE, "--", sys.executable, "-c", SIGNALS, *NOTED], stdin=subprocess.PIPE)
    try:
        assert heard(job) == "ready"
        yield job
    finally:
        kill_group(job)


def heard(job: subprocess.Popen[str]) -> str:
    assert job.stdout is not None
    return job.stdout.readline().strip()


def ended(job: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """The end of its input, and what it wrote until its end."""
    return finish(job, timeout=30, text_input="")


def group_of(job: subprocess.Popen[str], node: Host) -> Iterator[int]:
    for pid in node.processes():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == job.pid:
                yield pid


def state_of(pid: int) -> str:
    """R, S, T and the others of proc(5)."""
    return fields_of(pid)[0]


# The promise


def test_stranger_cannot_reach_any_port_of_a_script_that_calls_torchrun_itself(
    network: Network, tmp_path: Path
) -> None:
    node0, node1, stranger = network
    script = tmp_path / "pretrain.sh"
    script.write_text(
        SCRIPT.format(master=node0.ipv4, port=jobs.PORT, torchrun=jobs.TORCHRUN, train=jobs.TRAIN, log=tmp_path / "log")
    )
    command = [*EXEC, "--peers", f"{node0.ipv4},{node1.ipv4}", "--", "bash", str(script)]
    with nothing_left(node0, node1), Probe(stranger, node0) as at_node0, Probe(stranger, node1) as at_node1:
        started = [node.popen([*command, str(rank)]) for rank, node in enumerate((node0, node1))]
        done = finish_all(started, timeout=180)
    assert [one.returncode for one in done] == [0, 0], done
    assert "all-reduce right in 4 groups" in done[0].stdout
    assert (tmp_path / "log0").read_text() == done[0].stdout
    for probe in (at_node0, at_node1):
        assert probe.reached == set()
        # 2 workers a node, each with a port for each of 4 groups, and on node 0 the stores.
        assert len({port for _, port in probe.tried}) >= 8
    assert jobs.PORT in {port for _, port in at_node0.tried}
    assert f"blocked {stranger.ipv4} → " in done[0].stderr


def test_peers_reach_every_port_and_ports_of_the_plan_are_closed_before_anything_listens(network: Network) -> None:
    node, peer, stranger = network
    # Of both IP versions: else what listens at a random port is in the rules too, for the one that no peer has.
    peers = ["--peers", ",".join(peer.addresses)]
    command = [*EXEC, *peers, "--ports", "7000", "--", sys.executable, "-c", LISTENER.format(port=0)]
    with nothing_left(node):
        job = node.popen(command, env={"MASTER_PORT": "6000"})
        target = (node.ipv4, int(heard(job)))
        assert reach(peer, [target]) == {target: True}
        assert reach(stranger, [target]) == {target: False}
        rules = node.snapshot()["iptables-save"]
        assert re.search(r"--dports 6000,7000,60000:60015 .* -j DROP", rules), rules
        os.kill(job.pid, signal.SIGTERM)
        assert finish(job).returncode == -signal.SIGTERM


# One lease


def test_securerun_inside_takes_no_second_lease(node: Host, tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(
        "import os, pathlib\n"
        f"print(len(list(pathlib.Path({str(RECORDS)!r}).glob('*.json'))))\n"
        "print(pathlib.Path('/proc/self/cgroup').read_text().count('securerun-'))\n"
        "print(oct(os.umask(0o777)))\n"
    )
    with nothing_left(node):
        done = node.run(
            [
                *ALONE,
                "--grace",
                "3",
                "--",
                jobs.SECURERUN,
                "--umask",
                "0077",
                "--grace",
                "3",
                "--ports",
                "7",
                str(script),
            ]
        )
    assert (done.returncode, done.stdout) == (0, "1\n1\n0o77\n"), done
    line = next(line for line in spoken(done.stderr) if "guards this process already" in line)
    assert "no second lease" in line
    # What differs from the lease has no effect, and that is said; what is the lease's own, too, is not worth a word.
    assert "--ports has no effect" in line
    assert "--grace" not in line


@pytest.mark.parametrize(
    ("outer", "inner", "status", "words"),
    [
        ([], ["--loopback", "job"], 78, "--loopback job: run "),
        (["--scope", "ports"], ["--scope", "process"], 78, "--scope process: run "),
        ([], ["--scope", "process"], 0, "no second lease is taken\n"),
        (["--loopback", "job"], ["--loopback", "job"], 0, "no second lease is taken\n"),
        ([], ["--peers", "10.77.0.9", "--unprotected"], 0, "--peers, --unprotected have no effect here"),
    ],
)
def test_launch_inside_of_a_run_hears_what_it_cannot_have(
    node: Host, outer: list[str], inner: list[str], status: int, words: str
) -> None:
    done = node.run([*ALONE, *outer, "--", *EXEC, *inner, "--", "echo", "ran"])
    assert (done.returncode, done.stdout) == (status, "" if status else "ran\n"), done
    assert words in done.stderr


def test_long_list_of_peers_does_not_keep_the_command_from_starting(node: Host) -> None:
    """One text of the environment may be as long as one argument: a list that just fits is not to stand there twice."""
    peers = ",".join(f"10.{number >> 8}.{number & 255}.7" for number in range(10500))
    done = node.run([*EXEC, "--peers", peers, "--", *EXEC, "--peers", peers, "--", "echo", "ran"])
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert "no second lease is taken\n" in done.stderr


def test_a_copied_environment_is_no_lease(network: Network, tmp_path: Path) -> None:
    """As sbatch, ssh and docker copy it; whoever believed it would run open to everyone."""
    node, _, stranger = network
    with nothing_left(node):
        run = node.popen([*ALONE, "--", "sh", "-c", "env | grep ^SECURERUN_; cat"], stdin=subprocess.PIPE)
        copied = dict(heard(run).split("=", 1) for _ in range(2))
        assert set(copied) == {"SECURERUN_RUN_ID", "SECURERUN_LEASE"}
        outside = node.popen([*ALONE, "--", sys.executable, "-c", LISTENER.format(port=0)], env=copied)
        target = (node.ipv4, int(heard(outside)))
        assert reach(stranger, [target]) == {target: False}
        os.kill(outside.pid, signal.SIGTERM)
        words = finish(outside).stderr
        ended(run)
    assert "every TCP port of this job closed to all others by shield" in words
    assert "already" not in words


def test_without_a_cgroup_a_live_record_is_the_proof(node: Host, tmp_path: Path) -> None:
    """In a container with a read-only cgroup file system, where the guard knows the job by its environment."""
    script = (
        'mount -t tmpfs -o ro none /sys/fs/cgroup; "$@"; while ls /run/securerun; do sleep 0.1; done > /dev/null 2>&1'
    )
    container = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script, "sh"]
    without_shield = ["setpriv", "--bounding-set=-sys_admin,-bpf"]
    nested = [*ALONE, "--", *ALONE, "--", "echo", "ran"]
    stale = ["env", "SECURERUN_RUN_ID=0123456789ab", *ALONE, "--", "echo", "ran"]
    for command, leases in ((nested, 1), (stale, 1)):
        with nothing_left(node):
            done = node.run([*container, *without_shield, *command])
        assert done.stdout == "ran\n", done
        assert done.stderr.count("closed to all others by iptables") == leases
        assert ("no second lease" in done.stderr) == (command is nested)


@pytest.mark.parametrize(("scope", "leases"), [("ports", 2), ("auto", 1)])
def test_in_another_network_only_a_shield_is_a_lease(node: Host, scope: str, leases: int) -> None:
    """Port chains are those of one network namespace; a shield is where the process is."""
    inner = [*ALONE, "--scope", scope, "--", "echo", "ran"]
    with nothing_left(node):
        done = node.run([*ALONE, "--scope", scope, "--", "unshare", "--net", *inner])
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert done.stderr.count("TCP ports 60000-60015 closed to all others by iptables") == leases


# Ends, and what is left


def test_what_a_command_leaves_running_stays_guarded_until_its_end(network: Network) -> None:
    """nohup, or `msrun --join=False`: the command is over, the job is not."""
    node, peer, stranger = network
    script = f"nohup {sys.executable} -c '{LISTENER.format(port=7000)}' > /dev/null 2>&1 < /dev/null & echo $!"
    with nothing_left(node):
        done = node.run([*EXEC, "--peers", peer.ipv4, "--", "sh", "-c", script])
        assert done.returncode == 0, done
        assert "left 1 process running, guarded until the last of them ends" in done.stderr
        pid, target = int(done.stdout), (node.ipv4, 7000)
        assert eventually(lambda: reach(peer, [target])[target])
        assert reach(stranger, [target]) == {target: False}
        (record,) = RECORDS.glob("*.json")
        assert json.loads(record.read_text())["draining"] is True
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("how", ["status", "signal", "killed launcher"])
def test_what_a_failed_command_leaves_running_is_ended(node: Host, tmp_path: Path, how: str) -> None:
    asked = tmp_path / "asked"
    leftover = f"trap 'touch {asked}; exit' TERM; echo up; while :; do sleep 0.1; done"
    end = {"status": "exit 3", "signal": "kill -KILL $$", "killed launcher": "sleep 60"}[how]
    with nothing_left(node):
        job = node.popen(
            [*ALONE, "--", "sh", "-c", f'(setsid sh -c "{leftover}") 2> /dev/null & read go; {end}'], stdin=-1
        )
        assert heard(job) == "up"
        if how == "killed launcher":
            os.kill(job.pid, signal.SIGKILL)
        done = finish(job, timeout=30, text_input="go\n")
        assert done.returncode == {"status": 3, "signal": -signal.SIGKILL, "killed launcher": -signal.SIGKILL}[how]
        assert how == "killed launcher" or "to be ended, since it failed" in done.stderr
        assert eventually(lambda: not node.processes())
    assert asked.exists()


def test_what_a_leftover_starts_to_save_its_work_may_take_the_grace(node: Host, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    leftover = f"trap 'sleep 1 && touch {saved}; exit' TERM; echo up; while :; do sleep 0.1; done"
    with nothing_left(node):
        job = node.popen(
            [*ALONE, "--", "sh", "-c", f'(setsid sh -c "{leftover}") 2> /dev/null & read go; exit 3'], stdin=-1
        )
        assert heard(job) == "up"
        assert finish(job, timeout=30, text_input="go\n").returncode == 3
        assert eventually(lambda: not node.processes())
    assert saved.exists()


def test_output_can_be_piped_while_leftovers_of_the_command_live_on(node: Host) -> None:
    script = "sleep 60 > /dev/null 2>&1 < /dev/null & echo $!"
    with nothing_left(node):
        pid = int(node.run([*ALONE, "--", "sh", "-c", script], timeout=30).stdout)
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", ["exit 0", "exit 3", "kill -TERM $$", "kill -INT $$", "kill -KILL $$", "kill -SEGV $$"])
def test_it_ends_as_the_command_ends(node: Host, end: str) -> None:
    plain = node.run(["sh", "-c", end])
    done = node.run([*ALONE, "--", "sh", "-c", end])
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout), done


# As if it were not there


@pytest.mark.parametrize("started", [[], ["nohup"], ["env", "--block-signal=TERM", "--ignore-signal=INT"]])
def test_command_sees_nothing_of_whoever_started_it(node: Host, tmp_path: Path, started: list[str]) -> None:
    script = tmp_path / "traces.sh"
    script.write_text(TRACES)
    with (tmp_path / "input").open("w+") as stdin:
        plain, guarded = (
            finish(node.popen([*started, *before, "sh", str(script), "a b", "--", "-c"], stdin=stdin, cwd=tmp_path))
            for before in ([], [*ALONE, "--"])
        )
    sessions = [done.stdout.splitlines()[-1] for done in (plain, guarded)]
    assert plain.stdout.splitlines()[:-1] == guarded.stdout.splitlines()[:-1]
    assert len(set(sessions)) == 2, "both were started in a session of their own"
    assert guarded.returncode == 0


def test_standard_input_and_open_files_pass_through(node: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from a file\n")
    command = [*ALONE, "--", "sh", "-c", "cat; cat <&3; echo error >&2"]
    done = node.run(
        ["sh", "-c", 'exec 3< "$0"; exec "$@"', str(tmp_path / "file"), *command], text_input="typed\n" * 20000
    )
    assert (done.returncode, done.stdout) == (0, "typed\n" * 20000 + "from a file\n"), done
    assert done.stderr.splitlines().count("error") == 1


def test_job_goes_on_when_nobody_listens_to_what_is_said(node: Host) -> None:
    with nothing_left(node):
        job = node.popen([*ALONE, "--", "sh", "-c", "echo ran; exit 5"])
        assert job.stderr is not None
        job.stderr.close()
        job.stderr = None
        done = finish(job, timeout=30)
    assert (done.returncode, done.stdout) == (5, "ran\n"), done


def test_guard_that_is_killed_is_replaced_while_the_command_runs(node: Host) -> None:
    with nothing_left(node):
        job = node.popen([*ALONE, "--", "sh", "-c", "echo up; cat"], stdin=subprocess.PIPE)
        assert heard(job) == "up"
        (killed,) = guards()
        os.kill(killed, signal.SIGKILL)
        assert eventually(lambda: bool(guards() - {killed}))
        done = finish(job, timeout=30, text_input="through\n")
    assert (done.returncode, done.stdout) == (0, "through\n"), done
    assert "the guard died; another has taken over" in done.stderr


def guards() -> set[int]:
    """The guards in this machine's records whose layers stand."""
    found = [json.loads(path.read_text()) for path in RECORDS.glob("*.json")]
    return {record["guard"] for record in found if record["layers"]}


def test_signals_sent_to_it_reach_the_command_once(node: Host) -> None:
    """Sent to it alone, to its group at once, and to all of the group one after the other, as batch systems do."""
    with noting(node) as job:
        for send in (_to_it, _to_its_group, _to_each):
            for name in NOTED:
                send(job, node, signal.Signals[name])
                assert heard(job) == name
        done = ended(job)
    assert (done.returncode, done.stdout) == (0, ""), done


def _to_it(job: subprocess.Popen[str], _node: Host, number: int) -> None:
    os.kill(job.pid, number)


def _to_its_group(job: subprocess.Popen[str], _node: Host, number: int) -> None:
    os.killpg(job.pid, number)


def _to_each(job: subprocess.Popen[str], node: Host, number: int) -> None:
    for pid in list(group_of(job, node)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def test_signals_sent_early_reach_the_command_too(node: Host) -> None:
    job = node.popen([*ALONE, "--", "sh", "-c", "trap 'echo told; exit 4' TERM; while :; do sleep 0.1; done"])
    assert eventually(lambda: any(command.startswith("sh -c trap") for command in node.processes().values()))
    os.kill(job.pid, signal.SIGTERM)
    assert finish(job, timeout=30).returncode in (4, -signal.SIGTERM)


def test_interrupt_from_the_keyboard_reaches_the_command_once(node: Host) -> None:
    with nothing_left(node), Seat(node, [*ALONE, "--", sys.executable, "-c", SIGNALS, *NOTED]) as terminal:
        terminal.show("ready")
        terminal.type("\x03")
        terminal.show("SIGINT")
        terminal.type("\x1c")
        terminal.show("SIGQUIT")
        terminal.type("\x04")
        assert terminal.end() == 0
        assert "SIG" not in terminal.shown


def test_command_that_an_interrupt_ends_looks_interrupted_to_the_shell(node: Host) -> None:
    """bash ends a loop when its command died of an interrupt, and not when it ended by itself."""
    loop = f"for i in 1 2 3; do {' '.join(ALONE)} -- sh -c 'echo up; sleep 60'; done; echo not reached"
    with nothing_left(node), Seat(node, ["bash", "-c", loop]) as terminal:
        terminal.show("up")
        # Before that the shell's child is the shell still, which takes the interrupt for its own and then waits.
        assert eventually(lambda: "sleep 60" in node.processes().values())
        terminal.type("\x03")
        assert terminal.end() == -signal.SIGINT
        assert "not reached" not in terminal.shown


def test_command_is_stopped_and_continued_by_the_shell(node: Host) -> None:
    with nothing_left(node), Seat(node, ["bash", "--norc", "--noprofile", "-i"]) as terminal:
        terminal.type(f"{' '.join(ALONE)} -- cat\n")
        terminal.show("`securerun --run-as USER`\r\n")
        terminal.type("a line\n")
        terminal.show("a line\r\na line")
        (cat,) = (pid for pid, command in node.processes().items() if command == "cat")
        terminal.type("\x1a")
        terminal.show("Stopped")
        assert state_of(cat) == "T"
        terminal.type("fg\n")
        assert eventually(lambda: state_of(cat) == "S")
        terminal.type("another line\n")
        terminal.show("another line\r\nanother line")
        terminal.type("\x04")
        terminal.show("nobody was turned away")
        terminal.type("echo status $?; exit\n")
        terminal.show("status 0")
        assert terminal.end() == 0


def test_torch_is_not_imported(node: Host) -> None:
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print({'torch', 'numpy', 'rich.console'} & set(sys.modules)))\n"
        "from securerun.ctl.app import main\n"
        "main()\n"
    )
    done = node.run([sys.executable, "-c", program, *ALONE[1:], "--", "true"])
    assert (done.returncode, done.stdout) == (0, "set()\n"), done


# What it understands, and what it refuses


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "words"),
    [
        ([], {}, 2, "there is no command"),
        (["--"], {}, 2, "there is no command"),
        (["--nproc-per-node", "2", "--", "true"], {}, 2, "'--nproc-per-node'"),
        (["--launcher", "torchrun", "--", "true"], {}, 2, "--launcher"),
        (["--peers"], {}, 2, "--peers node1,node2"),
        (["--firewall", "ufw", "--", "true"], {}, 2, "ufw"),
        (["--", "true"], {}, 78, "export SECURERUN_PEERS=@hostfile.txt"),
        (["--", "true"], {"WORLD_SIZE": "1", "RANK": "0"}, 78, "an unknown number of nodes"),
        (["--", "true"], {"NNODES": "2", "MASTER_ADDR": "10.77.0.1"}, 78, "2 nodes meet at 10.77.0.1"),
        (
            ["--peers", "localhost", "--", "true"],
            {"NNODES": "2", "MASTER_ADDR": "10.77.0.99"},
            78,
            "names this host alone",
        ),
        (["--peers", "10.77.0.1/24", "--", "true"], {}, 78, "10.77.0.0/24"),
        (["--peers", "node0,", "node1", "true"], {}, 2, "--peers node0,: the list ends in a comma, and 'node1'"),
        (["--peers", "localhost", "--ports", "70000", "--", "true"], {}, 78, "70000"),
        (["--peers", "localhost", "--umask", "0022", "--", "true"], {}, 78, "0022"),
        (["--peers", "localhost", "--run-as", "no-such-user", "--", "true"], {}, 2, "no-such-user"),
        (["--peers", "localhost", "--", "no-such-command"], {}, 127, "no-such-command: no such command in PATH"),
        (["--peers", "localhost", "--", "/no/such/command"], {}, 127, "/no/such/command: no such file"),
        (["--peers", "localhost", "--", "/dev/null"], {}, 126, "chmod +x"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_mistakes_get_one_line_and_nothing_is_started(
    node: Host, arguments: list[str], variables: dict[str, str], status: int, words: str
) -> None:
    with nothing_left(node):
        done = node.run([*EXEC, *arguments], env=variables)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert [words in line for line in done.stderr.splitlines()] == [True], done.stderr
    assert done.stderr.startswith("securerun: ")


@pytest.mark.parametrize(
    ("first_line", "status", "words"), [("", 126, "has no #! line"), ("#!/no/such/shell\n", 127, "the interpreter")]
)
def test_script_that_cannot_be_run_has_a_shells_status(
    node: Host, tmp_path: Path, first_line: str, status: int, words: str
) -> None:
    script = tmp_path / "script"
    script.write_text(f"{first_line}echo ran\n")
    script.chmod(0o755)
    with nothing_left(node):
        for before in (ALONE, (*ALONE, "--", *EXEC)):
            done = node.run([*before, "--", str(script)])
            assert (done.returncode, done.stdout) == (status, ""), done
            assert any(words in line for line in spoken(done.stderr)), done
            assert "Traceback" not in done.stderr


def test_plan_says_what_is_known_and_what_is_not(node: Host) -> None:
    plan = node.run([*EXEC, "--dry-run", "--peers", "10.77.0.2", "bash", "pretrain.sh"]).stdout
    assert "rendezvous   left to the command; an unknown number of nodes\n" in plan
    assert "command      bash pretrain.sh\n" in plan
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": "6000"}
    done = node.run([*EXEC, "--dry-run", "bash", "pretrain.sh"], env=variables)
    assert "rendezvous   env at localhost:6000; an unknown number of nodes\n" in done.stdout
    assert "6000         rendezvous endpoint\n" in done.stdout
    assert "named by loopback rendezvous endpoint\n" in done.stdout
    assert "no other host may connect" in done.stderr


def test_help_tells_how_and_has_every_option_that_counts(node: Host) -> None:
    done = node.run([*EXEC, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("exec [OPTIONS] -- COMMAND", "--peers LIST", "--grace SECONDS", "before the command", "deepspeed"):
        assert words in done.stdout
    assert "--launcher" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "exec " in node.run([EXEC[0], "--help"]).stdout


def test_unprotected_warns_at_both_ends(node: Host) -> None:
    done = node.run([*EXEC, "--unprotected", "--", "sh", "-c", "umask; exit 3"])
    assert (done.returncode, done.stdout) == (3, "0027\n"), done
    assert done.stderr.count("every TCP port of this job is open to every host") == 2


NOTHING = Job("left to the command", None, UNKNOWN_NODES, UNKNOWN_NODES, 0, ("bash",))
AT_NODE0 = {"MASTER_ADDR": "node0", "MASTER_PORT": "6000"}


@pytest.mark.parametrize(
    ("variables", "described"),
    [
        ({}, NOTHING),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "8"}, NOTHING),
        ({"NNODES": "two", "NODE_RANK": "first", "MASTER_ADDR": " "}, NOTHING),
        ({"PET_RDZV_ENDPOINT": "zk://a/b", "PET_RDZV_BACKEND": "zk"}, NOTHING),
        ({"PET_RDZV_ENDPOINT": "node0:99999"}, NOTHING),
        ({**AT_NODE0, "NNODES": "4", "NODE_RANK": "3"}, Job("env", Endpoint("node0", 6000), 4, 4, 3, ("bash",))),
        ({**AT_NODE0, "NNODES": "4", "PET_NNODES": "1:2"}, Job("env", Endpoint("node0", 6000), 1, 2, 0, ("bash",))),
        ({**AT_NODE0, "PET_MASTER_PORT": "7"}, Job("env", Endpoint("node0", 7), 0, 0, 0, ("bash",))),
        ({"MASTER_ADDR": "[fd00::1]"}, Job("env", Endpoint("fd00::1", None), 0, 0, 0, ("bash",))),
        (
            {**AT_NODE0, "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "node1"},
            Job("c10d", Endpoint("node1", 29400), 0, 0, 0, ("bash",)),
        ),
        (
            {"PET_RDZV_BACKEND": "etcd-v2", "PET_RDZV_ENDPOINT": "[fd00::1]:2379", "PET_NNODES": "2"},
            Job("etcd-v2", Endpoint("fd00::1", 2379), 2, 2, 0, ("bash",)),
        ),
    ],
)
def test_only_what_is_certain_of_the_environment_counts(variables: Mapping[str, str], described: Job) -> None:
    # Its known ports are those of the next test.
    assert replace(describe_job(variables, ["bash"]), known_ports=()) == described


@pytest.mark.parametrize(
    ("variables", "ports"),
    [
        ({}, []),
        ({"MASTER_PORT": "6000"}, [6000]),
        ({"MASTER_PORT": "6000", "PET_MASTER_PORT": "6001"}, [6001]),
        ({"MASTER_PORT": "tcp://10.96.0.7:2222"}, []),
        ({"MASTER_PORT": "0"}, []),
        ({"MASTER_PORT": "65536"}, []),
    ],
)
def test_master_port_is_planned_wherever_it_is(variables: Mapping[str, str], ports: list[int]) -> None:
    assert [port.first for port in describe_job(variables, ()).known_ports] == ports


# Ordinary users, and Python


GUARDED = """
import socket, sys
from securerun import guarded, policy

with guarded(policy(peers=["{peer}"], ports=[7000, "7100-7101"])) as guarding:
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    print(listener.getsockname()[1], *(layer.backend for layer in guarding.layers), flush=True)
    sys.stdin.read()
"""


def test_python_callers_have_the_same_lease_also_as_ordinary_users(network: Network) -> None:
    node, peer, stranger = network
    with PrivateMachine() as machine:
        alice = machine.add_user("alice")
        machine.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
        program = GUARDED.format(peer=peer.ipv4)
        for user in (None, alice):
            job = machine.popen(node, [sys.executable, "-c", program], user=user, stdin=subprocess.PIPE)
            port, *layers = heard(job).split()
            assert layers[0] == "shield"
            target = (node.ipv4, int(port))
            assert reach(peer, [target]) == {target: True}
            assert reach(stranger, [target]) == {target: False}
            assert ended(job).returncode == 0
            assert eventually(lambda: not machine.records())


LEFT_OUT = """
import sys
from securerun import guarded, policy

made = policy(peers="localhost", **eval(sys.argv[1]))
with guarded(made, **eval(sys.argv[2])) as guarding:
    print(made.close_loopback, *(layer.backend for layer in guarding.layers), bool(guarding.fingerprint))
"""


@pytest.mark.parametrize(
    ("variables", "given", "made"),
    [
        ({}, ({}, {}), "False shield iptables False"),
        ({"LOOPBACK": "job", "FIREWALL": "off"}, ({}, {}), "True shield False"),
        (
            {"LOOPBACK": "job", "FIREWALL": "off"},
            ({"loopback": "any"}, {"firewall": "iptables"}),
            "False shield iptables",
        ),
        ({"SCOPE": "ports"}, ({}, {}), "False iptables False"),
        ({"SCOPE": "namespace"}, ({}, {}), "SECURERUN_SCOPE namespace: a program that runs stays in its network"),
        ({"KEY": "/none/at/all"}, ({}, {}), "SECURERUN_KEY: there is no file /none/at/all"),
        ({"KEY": "/none/at/all"}, ({"key": "off"}, {"key": "off"}), "False shield iptables False"),
        ({"GRACE": "soon"}, ({}, {}), "SECURERUN_GRACE: 'soon' is no number of seconds"),
    ],
)
def test_what_python_callers_leave_out_comes_from_the_environment(
    network: Network, variables: Mapping[str, str], given: tuple[dict[str, str], dict[str, str]], made: str
) -> None:
    env = {f"SECURERUN_{name}": text for name, text in variables.items()}
    done = network["node0"].run([sys.executable, "-c", LEFT_OUT, *map(repr, given)], env=env)
    assert made in done.stdout + done.stderr, done


def test_users_have_any_command_guarded_and_root_can_become_one(network: Network) -> None:
    node = network["node0"]
    with PrivateMachine() as machine:
        alice = machine.add_user("alice")
        look = [*ALONE, "--", "sh", "-c", "id -un; echo $HOME"]
        refused = machine.run(node, look, user=alice)
        assert (refused.returncode, refused.stdout) == (77, ""), refused
        assert "securerunctl setup sudoers" in refused.stderr
        became = machine.run(node, [*ALONE, "--run-as", "alice", *look[len(ALONE) :]])
        assert (became.returncode, became.stdout) == (0, f"alice\n{alice.home}\n"), became
        machine.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
        nested = machine.run(node, [*ALONE, "--", *look], user=alice)
        assert (nested.returncode, nested.stdout) == (0, f"alice\n{alice.home}\n"), nested
        assert nested.stderr.count("closed to all others by shield") == 1
        assert "no second lease" in nested.stderr
        assert eventually(lambda: not machine.records())
