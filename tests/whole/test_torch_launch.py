"""`python -m securerun.launch` against `python -m torch.distributed.launch`, and torch's names in Python: guarded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Host, eventually, machine_snapshot

TORCHS = (sys.executable, "-m", "torch.distributed.launch")
OURS = (sys.executable, "-m", "securerun.launch")

# Writes what it is told.
WORKER = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE")
sys.stdout.write(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]) + "\\n")
sys.exit("--fail" in sys.argv)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return str(path)


def both(node: Host, arguments: list[str], tmp_path: Path) -> list[subprocess.CompletedProcess[str]]:
    """torch's module and ours with the same arguments, one after the other: older torches have one port for both."""
    return [
        node.run([*module, *arguments], env={"TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{index}.json")})
        for index, module in enumerate((TORCHS, OURS))
    ]


@pytest.mark.parametrize(
    ("options", "arguments", "seen"),
    [
        (["--nproc-per-node", "2"], ["a"], [["--local-rank=0", "a"], ["--local-rank=1", "a"]]),
        (["--use-env", "--nproc-per-node", "2"], ["--", "b"], [["b"], ["b"]]),
        (["--use_env", "--no-python", sys.executable], [], [[]]),
    ],
    ids=["local rank as an argument", "local rank in the environment", "no Python"],
)
def test_workers_are_told_what_torchs_own_module_tells_them(
    node: Host, script: str, tmp_path: Path, options: list[str], arguments: list[str], seen: list[list[str]]
) -> None:
    machine = machine_snapshot()
    theirs, ours = both(node, [*options, script, *arguments], tmp_path)
    assert (theirs.returncode, ours.returncode) == (0, 0), (theirs, ours)
    assert sorted(ours.stdout.splitlines()) == sorted(theirs.stdout.splitlines())
    assert sorted(json.loads(line)[0] for line in ours.stdout.splitlines()) == seen
    for done in (theirs, ours):
        assert "FutureWarning: The module torch.distributed.launch is deprecated" in done.stderr
    assert "every TCP port of this job closed to all others by shield" in ours.stderr
    assert eventually(lambda: machine_snapshot() == machine, seconds=2)


def test_failing_worker_looks_as_under_torchs_own_module(node: Host, script: str, tmp_path: Path) -> None:
    theirs, ours = both(node, [script, "--fail"], tmp_path)
    assert ours.returncode == theirs.returncode == 1
    assert ours.stdout == theirs.stdout
    assert "ChildFailedError" in ours.stderr
    # torchrun writes one for the launcher, torch.distributed.launch does not.
    assert [(tmp_path / f"{index}.json").exists() for index in range(2)] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--no-python", "script"], 2, "securerun: --no-python: "),
        (["--no-such-option", "3", "script"], 2, "unrecognized arguments: --no-such-option"),
        (["--launcher", "torch_npu_run", "script"], 2, "securerun: --launcher torch_npu_run: "),
        (["--nnodes", "2", "--master-addr", "10.77.0.1", "script"], 78, "securerun: 2 nodes meet at 10.77.0.1:29500"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_started(
    node: Host, arguments: list[str], status: int, words: str
) -> None:
    before, machine = node.snapshot(), machine_snapshot()
    done = node.run([*OURS, *arguments])
    assert done.returncode == status, done
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (node.snapshot(), machine_snapshot()) == (before, machine)


def test_help_has_torchs_options_its_own_and_ours(node: Host) -> None:
    done = node.run([*OURS, "--help"])
    assert done.returncode == 0
    for option in ("--use-env", "--nproc-per-node", "--peers"):
        assert option in done.stdout


# How programs that launch by Python come to securerun's.
PUT = """
import sys
import torch.distributed.launch, torch.distributed.run
import securerun.launch, securerun.run
if __name__ == "__main__":
    {put}
"""
IN_TORCHS_PLACE = {
    "torch's run": "torch.distributed.run.run = securerun.run.run; "
    "torch.distributed.run.run(torch.distributed.run.parse_args(sys.argv[1:]))",
    "torch's main": "torch.distributed.run.main = securerun.run.main; torch.distributed.run.main(sys.argv[1:])",
    "torch's launch": "torch.distributed.launch.main = securerun.launch.main; "
    "torch.distributed.launch.main(['--use-env', *sys.argv[1:]])",
    "a wrapper": "torch.distributed.run.run = lambda args: securerun.run.run(args); "
    "torch.distributed.run.run(securerun.run.parse_args(sys.argv[1:]))",
    "the module, for workers of its own": "sys.modules['torch.distributed.run'] = securerun.run; "
    "from torch.distributed.run import parse_args, run; "
    "run(parse_args(['--peers', '10.77.0.2', '--run-path', *sys.argv[1:]]))",
}


@pytest.mark.parametrize("how", IN_TORCHS_PLACE)
def test_ours_in_torchs_place_runs_the_job_guarded_and_does_not_call_itself(
    node: Host, script: str, tmp_path: Path, how: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PUT.format(put=IN_TORCHS_PLACE[how]))
    done = node.run([sys.executable, str(program), script, "a"], timeout=60)
    assert done.returncode == 0, done
    assert [json.loads(line)[0] for line in done.stdout.splitlines()] == [["a"]]
    assert done.stderr.count("every TCP port of this job closed to all others by shield") == 1
    assert "Traceback" not in done.stderr
    assert ("open to 10.77.0.2 (--peers)" in done.stderr) == (how == "the module, for workers of its own")


@pytest.mark.parametrize(
    ("attributes", "status", "words"),
    [
        ({"securerun_peers": "no.such.host.invalid"}, 78, "no.such.host.invalid"),
        ({"securerun_firewall": "ufw"}, 2, "ufw"),
        ({"securerun_peers": ["10.77.0.2"]}, 2, "securerun_peers"),
        ({"securerun_dry_run": True}, 0, ""),
    ],
    ids=["unknown peer", "no such firewall", "a list", "dry run"],
)
def test_namespace_that_cannot_be_guarded_is_one_line_and_starts_nothing(
    node: Host, script: str, attributes: dict[str, object], status: int, words: str
) -> None:
    call = (
        "import sys; from securerun.run import parse_args, run; "
        f"namespace = parse_args(['--nnodes=2', '--master-addr=10.77.0.1', '--peers=10.77.0.2', {script!r}]); "
        f"vars(namespace).update({attributes!r}); run(namespace)"
    )
    done = node.run([sys.executable, "-c", call])
    assert done.returncode == status, done
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert ("# shield" in done.stdout) == (status == 0)
