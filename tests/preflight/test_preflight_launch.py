"""The preflight of real launches: what is said, what is refused, and that a healthy host hears nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, machine_snapshot
from users import GUARD, PrivateMachine

SECURERUNCTL = str(COMMANDS / "securerunctl")
ALONE = (SECURERUNCTL, "exec", "--peers", "localhost")
STRICT = ("--preflight", "strict")
_WORKER = (
    "import os; print('ran'); print({name: value for name, value in os.environ.items() if 'WEIGHTS_ONLY' in name})"
)


def findings(errors: str) -> list[str]:
    """The lines of the preflight's; an old run's remains may be those of tests that run at the same time."""
    lines = [line for line in errors.splitlines() if "; fix: `" in line]
    return [line for line in lines if "whose launcher is gone" not in line]


def spoken(errors: str) -> list[str]:
    """securerun's own lines; torch has some too."""
    return [line for line in errors.splitlines() if line.startswith("securerun: ")]


def test_each_finding_is_a_line_and_the_job_runs(node: Host, script: str) -> None:
    done = node.run([jobs.SECURERUN, "--ports", "7000", script], umask=0o022)
    assert (done.returncode, done.stdout) == (0, "ran with\n"), done
    (umask, root) = (line for line in findings(done.stderr) if "umask" in line or "root" in line)
    assert umask.startswith("securerun: the shell's umask is 0022: ") and umask.endswith("fix: `umask 0027`")
    assert root.startswith("securerun: running as root, and so is the job: ")
    # After the words on what is closed, which come first: a launch that is refused has one thing to mend.
    assert done.stderr.index("closed to all others by shield") < done.stderr.index(umask) < done.stderr.index(root)


@pytest.mark.parametrize("how", ["flag", "variable", "exec", "plan"])
def test_strict_refuses_with_78_and_starts_nothing(node: Host, script: str, how: str) -> None:
    before, machine = node.snapshot(), machine_snapshot()
    commands = {
        "flag": [jobs.SECURERUN, *STRICT, script],
        "variable": [jobs.SECURERUN, script],
        "exec": [*ALONE, *STRICT, "--", "echo", "ran"],
        "plan": [jobs.SECURERUN, *STRICT, "--dry-run", script],
    }
    env = {"SECURERUN_PREFLIGHT": "strict"} if how == "variable" else {}
    done = node.run(commands[how], env=env, umask=0o022)
    assert (done.returncode, done.stdout) == (78, ""), done
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert "the shell's umask is 0022" in lines[0] and "running as root" in lines[1]
    assert lines[-1].startswith("securerun: --preflight strict: ") and "so nothing was started" in lines[-1]
    assert (node.snapshot(), machine_snapshot()) == (before, machine)


@pytest.mark.parametrize("mode", ["warn", "strict"])
def test_report_has_what_was_found(node: Host, tmp_path: Path, mode: str) -> None:
    report = tmp_path / "report.json"
    done = node.run([*ALONE, "--preflight", mode, "--report", str(report), "--", "true"], umask=0o022)
    document = json.loads(report.read_text())
    assert document["status"] == done.returncode == (78 if mode == "strict" else 0)
    found = {finding["name"]: finding for finding in document["preflight"]}
    assert found["umask"]["mend"] == "umask 0027" and found["root"]["what"].startswith("running as root")


@pytest.mark.parametrize(
    ("options", "status"), [([], 0), (["--preflight", "warn"], 0), (["--preflight", "strict"], 78)]
)
def test_plan_looks_only_where_it_is_told_to(node: Host, script: str, options: list[str], status: int) -> None:
    done = node.run([SECURERUNCTL, "plan", "--", *options, script], umask=0o022)
    assert done.returncode == status, done
    assert ("the shell's umask is 0022" in done.stderr) == bool(options)


@pytest.mark.parametrize("command", [[jobs.SECURERUN], [*ALONE, "--", "echo"]], ids=["securerun", "exec"])
def test_off_looks_at_nothing(node: Host, script: str, command: list[str]) -> None:
    done = node.run([*command[:1], *command[1:4], "--preflight", "off", *command[4:], script], umask=0o000)
    assert done.returncode == 0 and done.stdout, done
    assert findings(done.stderr) == []


def test_wrong_mode_is_wrong_usage(node: Host, script: str) -> None:
    done = node.run([jobs.SECURERUN, "--preflight", "harsh", script])
    assert (done.returncode, done.stdout) == (2, "")
    assert "'harsh' is not one of warn, strict, off" in done.stderr


def test_launch_inside_of_a_run_says_nothing_again_unless_it_is_asked(node: Host, script: str) -> None:
    done = node.run([*ALONE, "--", jobs.SECURERUN, script], umask=0o022)
    assert (done.returncode, done.stdout) == (0, "ran with\n"), done
    assert done.stderr.count("running as root") == 1
    asked = node.run([*ALONE, "--preflight", "off", "--", jobs.SECURERUN, *STRICT, script], umask=0o022)
    assert (asked.returncode, asked.stdout) == (78, ""), asked
    assert asked.stderr.count("running as root") == 1


def test_peers_that_the_hosts_own_rules_turn_away_are_told_at_the_launch(node: Host, script: str) -> None:
    job = [*ALONE[:2], "--peers", "10.77.0.2", "--", "echo", "ran"]
    node.run(["iptables", "-P", "INPUT", "DROP"], check=True)
    try:
        done = node.run(job)
    finally:
        # A guard whose rules are flushed away while it removes them keeps its record for the next one.
        assert eventually(lambda: not node.processes())
        node.run(["nft", "flush", "ruleset"], check=True)
    (line,) = (line for line in findings(done.stderr) if "chain INPUT" in line)
    assert "turns 10.77.0.2 away" in line and "iptables -I INPUT -s 10.77.0.2 -p tcp -j ACCEPT" in line
    assert done.stdout == "ran\n"


@pytest.fixture
def machine(network: Network) -> Iterator[PrivateMachine]:
    with PrivateMachine() as machine:
        yield machine


def test_user_on_a_healthy_host_sees_no_line(network: Network, machine: PrivateMachine) -> None:
    node, alice = network["node0"], machine.add_user("alice")
    machine.allow_sudo(f"alice ALL=(root) NOPASSWD:NOSETENV: {GUARD}")
    machine.place(alice.home).chmod(0o750)
    script = machine.write("train.py", "print('ran')", owner=alice, mode=0o640)
    # As an administrator would have set it; the sandbox of the tester's may have another.
    aslr = "echo 2 > /run/aslr; mount --no-mtab --bind /run/aslr /proc/sys/kernel/randomize_va_space"
    assert machine.run(node, ["sh", "-c", aslr]).returncode == 0
    strict = ["sh", "-c", 'umask 027; exec "$@"', "sh", jobs.SECURERUN, "--preflight", "strict"]
    done = machine.run(node, [*strict, "--log-dir", "logs", script], user=alice)
    if "whose launcher is gone" in done.stderr:  # a worker of another test's, killed this moment
        done = machine.run(node, [*strict, "--log-dir", "logs", script], user=alice)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert [line for line in spoken(done.stderr) if not line.startswith("securerun: run ")] == []
    # What nobody asked for is no finding, though somebody has it.
    serve = "import socket, sys; s = socket.create_server(('', 60003)); print('listens', flush=True); sys.stdin.read()"
    other = node.popen([sys.executable, "-c", serve], stdin=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == "listens\n"
    done = machine.run(node, [*strict, script], user=alice)
    other.communicate(timeout=10)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    # One thing that is not as it should be is told, and it alone.
    machine.place(script).chmod(0o666)
    done = machine.run(node, [*strict, script], user=alice)
    assert (done.returncode, done.stdout) == (78, ""), done
    (line,) = findings(done.stderr)
    assert f"{script} can be written by others (mode 666)" in line and f"chmod go-w {script}" in line


# --- weights only ------------------------------------------------------------------------------------


class Malice:
    """What a hostile checkpoint holds: code."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._mark),)


_LOAD = """
import sys, torch
try:
    torch.load(sys.argv[1], weights_only=False)
except Exception as error:
    print(type(error).__name__)
print(torch.load(sys.argv[2])["weight"].tolist())
"""


@pytest.mark.parametrize("options", [[], ["--weights-only"]], ids=["without", "with"])
def test_checkpoint_that_holds_code_runs_it_in_no_worker_with_weights_only(
    node: Host, tmp_path: Path, options: list[str]
) -> None:
    import torch

    mark, script = tmp_path / "code has run", tmp_path / "load.py"
    evil, good = tmp_path / "evil.pt", tmp_path / "good.pt"
    script.write_text(_LOAD)
    evil.write_bytes(pickle.dumps(Malice(mark)))
    torch.save({"weight": torch.tensor([1.0, 2.0])}, good)
    done = node.run([jobs.SECURERUN, *options, str(script), str(evil), str(good)])
    assert done.returncode == 0, done
    assert mark.exists() == (not options)
    assert done.stdout.endswith("[1.0, 2.0]\n"), done
    assert ("UnpicklingError" in done.stdout) == bool(options)


def test_weights_only_reaches_what_exec_starts(node: Host) -> None:
    command = [*ALONE, "--weights-only", "--", sys.executable, "-c", _WORKER]
    assert node.run(command).stdout == "ran\n{'TORCH_FORCE_WEIGHTS_ONLY_LOAD': '1'}\n"
    assert node.run([*ALONE, "--", sys.executable, "-c", _WORKER]).stdout == "ran\n{}\n"


def test_weights_only_against_the_variable_that_lets_code_in_is_refused(node: Host, script: str) -> None:
    done = node.run([jobs.SECURERUN, "--weights-only", script], env={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    assert (done.returncode, done.stdout) == (78, ""), done
    assert len(done.stderr.splitlines()) == 1
    assert "unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in done.stderr


def test_logs_of_a_command_are_its_own_business(node: Host) -> None:
    done = node.run([*ALONE, "--no-seal-logs", "--", "true"])
    assert done.returncode == 2 and "--seal-logs" in done.stderr, done
