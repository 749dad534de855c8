"""What starts for each task and each container loads what it needs and no more: a processor pays for each module.

Held by what is loaded and not by time, which the machine's other work has a say in; benchmarks/start.py has the times.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import task_prolog

from securerun.guard import program

# Each of these takes longer than what a task's prolog would use of it. (subprocess is ClusterShell's.)
NOT_FOR_A_PROLOG = {
    *("shutil", "secrets", "random", "sysconfig", "platform", "argparse", "encodings.idna"),
    *("securerun.guard.records", "securerun.job.elsewhere", "securerun.job.jsonstream", "securerun.protection.client"),
}
NOT_FOR_A_HOOK = {
    *NOT_FOR_A_PROLOG,
    "ClusterShell",
    "logging",
    "subprocess",
    "hashlib",
    "threading",
    "securerun.guard.protocol",
    "securerun.options",
}


def loaded_by(command: Sequence[str], **variables: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """The modules that a command of Python's loads until its end, and what it came to."""
    python, *words = command
    environment = {"PATH": os.defpath, **variables}
    done = subprocess.run(
        [python, "-X", "importtime", *words],
        env=environment,
        input="{}",
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, done


def test_task_prolog_loads_no_more_than_its_order_takes(root: None, tmp_path: Path) -> None:
    with task_prolog.environment(tmp_path) as variables:
        loaded, done = loaded_by(task_prolog.COMMAND, **variables)
    assert done.returncode == 0 and "export SECURERUN_RUN_ID=" in done.stdout, done
    assert sorted(loaded & NOT_FOR_A_PROLOG) == []


def test_hook_of_containers_loads_no_more_than_its_shield_takes() -> None:
    """Of a state that asks for nothing: what a shield takes is loaded before it is read."""
    loaded, done = loaded_by([sys.executable, *program.hook()[1:]])
    assert done.returncode == 78 and "no state of a container" in done.stderr, done
    assert "securerun.firewall.shield" in loaded
    assert not loaded & NOT_FOR_A_HOOK
