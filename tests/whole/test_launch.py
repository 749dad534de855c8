"""The command securerun as a person meets it: help, the plan, mistakes, failures, and torchrun's own behaviour."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host, eventually, finish, finish_all, machine_snapshot
from torchless import needs_torch

_TWO_NODES = ("--nnodes", "2", "--node-rank", "0", "--master-addr", "10.77.0.1", "--master-port", "29500")

# A process that may do nothing that a root's may; the tester's Python may lie where other users cannot look.
_WITHOUT_PRIVILEGE = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "words"),
    [
        (["--peers", "no.such.host.invalid", *_TWO_NODES], {}, 78, "no.such.host.invalid"),
        (["--peers", "0.0.0.0/0", *_TWO_NODES], {}, 78, "any"),
        (["--peers", "10.77.0.1/24", *_TWO_NODES], {}, 78, "10.77.0.0/24"),
        (["--ports", "70000"], {}, 78, "70000"),
        (["--ports", "9000-8000"], {}, 78, "9000-8000"),
        ([], {"HCCL_IF_BASE_PORT": "80", "ASCEND_HOME_PATH": "/"}, 78, "1024"),
        ([], {"HCCL_IF_BASE_PORT": "many", "ASCEND_HOME_PATH": "/"}, 78, "many"),
        (["--interface", "eth9"], {}, 78, "eth9"),
        (["--peers", "@/no/such/file", *_TWO_NODES], {}, 78, "/no/such/file"),
        (["--peers", "@/dev/null", *_TWO_NODES], {}, 78, "/dev/null"),
        (["--peers", f"@{sys.executable}", *_TWO_NODES], {}, 78, sys.executable),
        ([*_TWO_NODES], {}, 78, "--peers"),
        (["--umask", "0022"], {}, 78, "0022"),
        (["--umask", "soft"], {}, 78, "soft"),
        (["--firewall", "ufw"], {}, 2, "ufw"),
        ([], {"SECURERUN_ACCEPT": "perhaps"}, 2, "SECURERUN_ACCEPT"),
        (["--peers"], {}, 2, "--peers"),
        (["--no-such-option", "3"], {}, 2, "--no-such-option"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_mistakes_get_one_line_and_nothing_is_started(
    node: Host, script: str, arguments: list[str], environment: dict[str, str], status: int, words: str
) -> None:
    before, machine = node.snapshot(), machine_snapshot()
    done = node.run([jobs.SECURERUN, *arguments, *([] if arguments == ["--peers"] else [script])], env=environment)
    assert done.returncode == status, done
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "ran with" not in done.stdout
    spoken = [line for line in done.stderr.splitlines() if line.startswith("securerun: ")]
    # A name server that does not answer is waited for, and that is said.
    assert len([line for line in spoken if "asking again" not in line]) == 1, done.stderr
    assert node.snapshot() == before
    assert machine_snapshot() == machine


def test_plan_is_printed_whole_without_any_privilege(node: Host, script: str) -> None:
    done = node.run(
        [
            *_WITHOUT_PRIVILEGE,
            *(jobs.SECURERUN, "--dry-run", "--peers", "10.77.0.2,fd77::2", "--interface", "eth0"),
            *(*_TWO_NODES, script),
        ],
    )
    assert done.returncode == 0, done
    assert "ran with" not in done.stdout
    for words in (
        "29500        master port",
        "60000-60015  HCCL",
        "10.77.0.2/32",
        "named by --peers",
        "eth0",
        "0027",
        "process",
        "*filter\n:SECURERUN - [0:0]\n",
        "-s fd77::2/128 -i eth0 ",
        "# shield",
    ):
        assert words in done.stdout, words


def test_the_rules_of_the_plan_are_what_the_tool_accepts(node: Host, script: str) -> None:
    plan = node.run([jobs.SECURERUN, "--dry-run", "--peers", "10.77.0.2", *_TWO_NODES, script]).stdout
    text = plan[plan.index("*filter") : plan.index("COMMIT") + 7]
    done = node.run(["iptables-restore", "--noflush", "--test"], text_input=text)
    assert done.returncode == 0, done


def test_help_shows_torchs_options_and_ours(node: Host) -> None:
    done = node.run([jobs.SECURERUN, "--help"])
    assert done.returncode == 0
    for option in ("--nproc-per-node", "--rdzv-backend", "--peers", "--dry-run", "--unprotected", "SECURERUN_PEERS"):
        assert option in done.stdout


# Reads nothing, and says with which status its writer ended.
UNREAD = '"$@" | true; exit "${PIPESTATUS[0]}"'


def unread(node: Host, *command: str) -> subprocess.CompletedProcess[str]:
    """A command whose reader is gone before it has anything to say, as `head` is when it has its lines."""
    return node.run(["bash", "-c", UNREAD, "bash", *command])


def test_help_whose_reader_goes_away_ends_as_torchruns_does(node: Host) -> None:
    theirs, ours = (unread(node, command, "--help") for command in (jobs.TORCHRUN, jobs.SECURERUN))
    # Older Pythons let torchrun end with a traceback there.
    said = "" if "Traceback" in theirs.stderr else theirs.stderr
    assert (ours.returncode, ours.stderr) == (theirs.returncode, said)


@pytest.mark.parametrize(
    ("stream", "said"), [(">&-", "output is closed, so nothing"), ("> /dev/full", "No space left")]
)
def test_plan_that_cannot_be_printed_is_one_line_and_status_1(node: Host, script: str, stream: str, said: str) -> None:
    done = node.run(["sh", "-c", f'exec "$@" {stream}', "sh", jobs.SECURERUN, "--dry-run", script])
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done


@pytest.mark.parametrize(
    "command", ["securerun --dry-run", "securerunctl plan --", "securerunctl exec --dry-run --peers localhost -- bash"]
)
def test_plan_whose_reader_goes_away_ends_without_a_word_of_it(node: Host, script: str, command: str) -> None:
    name, *options = command.split()
    done = unread(node, str(COMMANDS / name), *options, script)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr


def test_everything_after_the_script_is_the_scripts(node: Host, script: str) -> None:
    done = node.run([jobs.SECURERUN, "--firewall", "off", script, "--help", "--peers", "x", "--", "--dry-run"])
    assert done.stdout == "ran with --help --peers x -- --dry-run\n", done


def test_no_privilege_is_status_77_with_what_to_do(node: Host, script: str) -> None:
    done = node.run([*_WITHOUT_PRIVILEGE, jobs.SECURERUN, script])
    assert done.returncode == 77, done
    for words in ("the host's guard in", "CAP_NET_ADMIN", "--unprotected", "in a network of its own: "):
        assert words in done.stderr, done
    assert "ran with" not in done.stdout


def test_unprotected_runs_anywhere_and_warns_at_both_ends(node: Host, script: str) -> None:
    done = node.run([*_WITHOUT_PRIVILEGE, jobs.SECURERUN, "--unprotected", script])
    assert (done.returncode, done.stdout) == (0, "ran with\n"), done
    assert done.stderr.count("every TCP port of this job is open to every host") == 2


def test_insisting_on_iptables_where_it_cannot_work_refuses(node: Host, script: str) -> None:
    node.run(["iptables", "-N", "SECURERUN"], check=True)
    node.run(["iptables", "-A", "SECURERUN", "-j", "ACCEPT"], check=True)
    try:
        refused = node.run([jobs.SECURERUN, "--firewall", "iptables", script])
        assert refused.returncode == 77, refused
        assert "not securerun's" in refused.stderr
        alone = node.run([jobs.SECURERUN, script])
        assert (alone.returncode, alone.stdout) == (0, "ran with\n"), alone
        assert "the shield closes every port by itself" in alone.stderr
    finally:
        node.run(["iptables", "-F", "SECURERUN"], check=True)
        node.run(["iptables", "-X", "SECURERUN"], check=True)


def test_failing_worker_looks_as_under_torchrun(node: Host, tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main():\n    raise RuntimeError('worker is broken')\nmain()\n"
    )
    seen = {}
    for name, launcher in (("torchrun", jobs.TORCHRUN), ("securerun", jobs.SECURERUN)):
        error_file = tmp_path / f"{name}.json"
        done = node.run([launcher, str(script)], env={"TORCHELASTIC_ERROR_FILE": str(error_file)})
        message = json.loads(error_file.read_text())["message"]
        assert "worker is broken" in done.stderr
        assert "ChildFailedError" in done.stderr
        seen[name] = (done.returncode, done.stdout, message["message"])
    assert seen["securerun"] == seen["torchrun"] == (1, "", "RuntimeError: worker is broken")


def test_restarts_are_torchruns(node: Host, tmp_path: Path) -> None:
    script = tmp_path / "second.py"
    script.write_text("import os, sys; sys.exit(int(os.environ['TORCHELASTIC_RESTART_COUNT']) < 1)")
    assert node.run([jobs.SECURERUN, "--max-restarts", "1", str(script)]).returncode == 0
    assert node.run([jobs.SECURERUN, "--max-restarts", "0", str(script)]).returncode == 1


@needs_torch
def test_interrupt_ends_the_job_and_leaves_nothing(node: Host, tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text("import time; print('sleeping', flush=True); time.sleep(60)")
    before, machine = node.snapshot(), machine_snapshot()
    job = node.popen([jobs.SECURERUN, str(script)])
    assert job.stdout is not None
    assert job.stdout.readline() == "sleeping\n"
    os.killpg(job.pid, signal.SIGINT)
    done = finish(job, timeout=30)
    assert done.returncode == 1, done
    assert "SignalException" in done.stderr
    eventually(lambda: (node.snapshot(), machine_snapshot()) == (before, machine), seconds=2)
    assert (node.snapshot(), machine_snapshot()) == (before, machine)


def test_output_can_be_piped_while_leftovers_of_the_job_live_on(node: Host, tmp_path: Path) -> None:
    """A guard that held the launcher's output would keep `| tee` waiting for the last leftover."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import subprocess\n"
        "null = subprocess.DEVNULL\n"
        "subprocess.Popen(['sleep', '8'], stdin=null, stdout=null, stderr=null, start_new_session=True)\n"
    )
    job = node.popen([jobs.SECURERUN, str(script)])
    finish_all([job], timeout=60)
    assert [command for command in node.processes().values() if command == "sleep 8"]
    assert eventually(lambda: not node.processes(), seconds=20)


def test_main_takes_what_torchs_main_takes(node: Host, script: str) -> None:
    call = f"import sys, securerun.run as run; run.main([{script!r}, 'x']); print(sys.argv)"
    done = node.run([sys.executable, "-c", call, "untouched"])
    assert (done.returncode, done.stdout) == (0, "ran with x\n['-c', 'untouched']\n"), done


def test_module_and_command_are_the_same(node: Host, script: str) -> None:
    done = node.run([sys.executable, "-m", "securerun", script, "a"])
    assert (done.returncode, done.stdout) == (0, "ran with a\n"), done


UNFINISHED = """
import atexit, ctypes, sys, threading, time
from securerun import ending
def late():
    time.sleep(0.2)
    print("thread")
atexit.register(print, "handler")
threading.Thread(target=late).start()
ctypes.CDLL(None).printf(b"C, ")
print("Python", end=", ")
ending.exit_quickly()
"""


def test_a_quick_end_leaves_nothing_undone() -> None:
    """What Python waits for, calls and writes out at every end; its own text and C's stand in buffers of their own."""
    done = subprocess.run([sys.executable, "-c", UNFINISHED], capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.replace("C, ", "").split()) == ["Python,", "handler", "thread"]
    assert "C, " in done.stdout


def test_a_quick_end_tells_of_output_that_went_nowhere_as_python_does() -> None:
    program = "{imports}; sys.stdin.readline(); print('lost'); {end}"
    ends = []
    for imports, end in (
        ("import sys", "sys.exit()"),
        ("import sys; from securerun import ending", "ending.exit_quickly()"),
    ):
        job = subprocess.Popen(
            [sys.executable, "-c", program.format(imports=imports, end=end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={},
        )
        assert job.stdin is not None and job.stdout is not None and job.stderr is not None
        job.stdout.close()
        job.stdin.write("\n")
        job.stdin.close()
        ends.append((job.stderr.read(), job.wait(timeout=30)))
        job.stderr.close()
    assert ends[0] == ends[1]
    assert ends[0][1] == 120
