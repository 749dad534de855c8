"""securerunctl exec with a command that has others start things: what is not guarded is never called closed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host

EXEC = (str(COMMANDS / "securerunctl"), "exec")
ALONE = (*EXEC, "--peers", "localhost", "--preflight", "off")
NOT_GUARDED = (
    "what srun starts is not guarded: slurmstepd starts it; write srun … securerunctl exec -- COMMAND, or "
    "srun … securerun in place of torchrun"
)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment with a srun, which needs no Slurm."""
    client = tmp_path / "srun"
    client.write_text('#!/bin/sh\nexec "$@"\n')
    client.chmod(0o755)
    yield {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_start_line_never_calls_closed_what_slurm_starts(node: Host, slurm: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    done = node.run([*ALONE, "--report", str(report), "--", "srun", "echo", "ran"], env=slurm)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert "every TCP port of this job" not in done.stderr
    assert "every TCP port of the command's own processes closed to all others by shield" in done.stderr
    assert done.stderr.count(NOT_GUARDED) == 1
    made = json.loads(report.read_text())
    assert made["launch"]["not_guarded"] == [NOT_GUARDED]
    assert ("notice", NOT_GUARDED) in {(event["kind"], event["text"]) for event in made["timeline"]}


def test_plan_says_what_is_not_guarded(node: Host, slurm: dict[str, str]) -> None:
    done = node.run([*ALONE, "--dry-run", "--", "bash", "-c", "srun torchrun train.py"], env=slurm)
    assert f"not guarded  {NOT_GUARDED}\n" in done.stdout, done


def test_launch_inside_of_a_run_says_it_too(node: Host, slurm: dict[str, str]) -> None:
    done = node.run([*ALONE, "--", *ALONE, "--", "srun", "echo", "ran"], env=slurm)
    assert "no second lease is taken\n" in done.stderr
    assert done.stderr.count(NOT_GUARDED) == 1


def test_securerun_says_it_of_workers_that_are_commands(node: Host, slurm: dict[str, str]) -> None:
    done = node.run([jobs.SECURERUN, "--dry-run", "--no-python", "srun", "python", "train.py"], env=slurm)
    assert f"not guarded  {NOT_GUARDED}\n" in done.stdout, done
    done = node.run([jobs.SECURERUN, "--dry-run", "srun", "python", "train.py"], env=slurm)
    assert "not guarded" not in done.stdout


def test_html_report_is_not_headed_guarded(node: Host, slurm: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "run.html"
    node.run([*ALONE, "--report", str(report), "--", "srun", "true"], env=slurm)
    assert "guarded in part" in report.read_text()
    assert NOT_GUARDED in report.read_text()
