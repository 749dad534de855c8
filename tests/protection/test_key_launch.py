"""Launches with a key: what people read, what the job gets, and that nobody reads the key itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import COMMANDS
from hosts import Host, environment

from securerun.firewall import job_key

EXEC = (str(COMMANDS / "securerunctl"), "exec")
SOURCE = "0123456789abcdef" * 4
# What the job of a launch finds, as JSON.
JOB = """
import json, os, sys
from pathlib import Path
from securerun import job_secret
path = os.environ["SECURERUN_JOB_SECRET_PATH"]
me, launcher = os.getpid(), os.getppid()
seen = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for pid in (me, launcher) for name in ("environ", "cmdline"))
records = b"".join(path.read_bytes() for path in Path("/run/securerun").glob("*.json"))
print(json.dumps({"secret": job_secret().decode(), "file": Path(path).read_text(), "path": path,
                  "seen": (seen + records).decode("latin-1")}))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place = tmp_path / ".config/securerun"
    place.mkdir(parents=True)
    (place / "key").write_text(SOURCE + "\n")
    (place / "key").chmod(0o600)
    return tmp_path


def launch(node: Host, home: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"HOME": str(home), "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NNODES": "2", **variables}
    return node.run([*EXEC, *options, "--", "python", "-c", JOB], env=env)


def said(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nodes_that_nobody_named_are_known_by_the_key(node: Host, home: Path) -> None:
    report = home / "run.json"
    done = launch(node, home, "--report", str(report))
    found = said(done)
    (key_line,) = (line for line in done.stderr.splitlines() if ": key " in line)
    fingerprint = key_line.partition(": key ")[2].partition(" ")[0]
    assert "open to whoever has the job's key" in done.stderr and f"{home}/.config/securerun/key" in key_line
    assert "1 of 2 nodes guarded" in done.stderr
    document = json.loads(report.read_text())
    assert document["key"]["fingerprint"] == fingerprint and document["key"]["required"] is True
    assert document["nodes"] == {"guarded": 1, "of": 2, "unguarded": []}
    # Another rank of the same job has the same secret, and no other job has.
    assert found["secret"] == found["file"] == said(launch(node, home, NODE_RANK="1"))["secret"]
    assert found["secret"] != said(launch(node, home, MASTER_PORT="29501"))["secret"]
    assert not Path(found["path"]).exists()


def test_the_key_is_in_nothing_that_anybody_reads(node: Host, home: Path) -> None:
    report = home / "run.html"
    done = launch(node, home, "--report", str(report))
    found = said(done)
    derived = job_key.derive(SOURCE.encode(), job_key.OF_USER, bytes(32))  # as a form; the right one is not at hand
    assert len(derived.reveal().hex()) == len(found["secret"]) == 64
    for text in (done.stderr, report.read_text(), found["seen"]):
        assert SOURCE[:16] not in text and found["secret"] not in text


def test_peers_that_are_named_are_let_in_as_well_unless_a_tag_is_insisted_on(node: Host, home: Path) -> None:
    added = launch(node, home, "--peers", "10.77.0.2")
    assert "open to 10.77.0.2 (--peers)" in added.stderr and "may connect as well" in added.stderr
    both = launch(node, home, "--peers", "10.77.0.2", "--key", "require")
    assert "of the peers, those may connect who prove that they have it" in both.stderr


@pytest.mark.parametrize("asked", [(), ("--key", "require")], ids=["by-itself", "insisted-on"])
def test_a_job_of_this_host_alone_is_not_opened_by_a_key(node: Host, home: Path, asked: tuple[str, ...]) -> None:
    done = node.run([*EXEC, "--peers", "localhost", *asked, "--", "true"], env={"HOME": str(home)})
    assert done.returncode == 0 and "open to no other host" in done.stderr and ": key " not in done.stderr


def test_without_a_key_nothing_is_said_of_one_and_nobody_comes_in_unnamed(node: Host, tmp_path: Path) -> None:
    done = launch(node, tmp_path)
    assert done.returncode == 78 and "securerunctl setup key" in done.stderr
    done = node.run([*EXEC, "--peers", "10.77.0.2", "--", "true"], env={"HOME": str(tmp_path)})
    assert done.returncode == 0 and "key" not in done.stderr
    done = node.run([*EXEC, "--key", "off", "--peers", "10.77.0.2", "--", "true"], env={"HOME": str(tmp_path)})
    assert done.returncode == 0 and "key" not in done.stderr


def test_a_bad_key_starts_nothing(node: Host, home: Path) -> None:
    (home / ".config/securerun/key").chmod(0o640)
    done = launch(node, home, "--peers", "10.77.0.2")
    assert done.returncode == 78 and done.stdout == "" and "chmod go-rwx" in done.stderr
    assert done.stderr.count("\n") == 1
    assert said_of(launch(node, home, "--peers", "10.77.0.2", "--key", "off")) == 1, "job_secret() raises there"


def said_of(done: subprocess.CompletedProcess[str]) -> int:
    assert "KeyError" in done.stderr or "SECURERUN_JOB_SECRET_PATH" in done.stderr
    return done.returncode


def test_the_plan_tells_the_key_before_anything_is_started(home: Path) -> None:
    env = environment({"HOME": str(home), "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NNODES": "2"})
    done = subprocess.run([*EXEC, "--dry-run", "--", "true"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert f", of {home}/.config/securerun/key" in done.stdout and "whoever has the job's key" in done.stdout
    assert SOURCE[:16] not in done.stdout + done.stderr
    assert "who connects shows: tag, of the job's key" in done.stdout and "--tcp-option 254" in done.stdout
    (home / ".config/securerun/key").unlink()
    done = subprocess.run([*EXEC, "--dry-run", "--", "true"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 78


def test_ranks_that_others_start_show_no_tag_so_their_nodes_have_to_be_named(node: Host, home: Path) -> None:
    mpirun = home / "mpirun"
    mpirun.write_text("#!/bin/sh\n")
    mpirun.chmod(0o755)
    env = {"HOME": str(home), "MASTER_ADDR": "10.77.0.1", "NNODES": "2", "PATH": f"{home}:{os.environ['PATH']}"}
    done = node.run([*EXEC, "--", "mpirun", "--host", "node0,node1", "true"], env=env)
    assert done.returncode == 78 and "--peers" in done.stderr, done


def test_the_matrix_says_who_comes_in_by_the_key(node: Host, home: Path) -> None:
    matrix = [str(COMMANDS / "securerunctl"), "matrix", "--", "--nnodes", "2", "--node-rank", "0"]
    job = ["--master-addr", "10.77.0.1", "--master-port", "29500", "train.py"]
    alone = node.run([*matrix, *job], env={"HOME": str(home)})
    assert alone.returncode == 0, alone
    assert "only those connect who show the tag of the job's key" in alone.stdout and "any host" not in alone.stdout
    added = node.run([*matrix, "--peers", "10.77.0.2", *job], env={"HOME": str(home)})
    assert "only the peers connect; and whoever shows the tag of the job's key" in added.stdout, added
    off = node.run([*matrix, "--peers", "10.77.0.2", "--key", "off", *job], env={"HOME": str(home)})
    assert off.returncode == 0 and "tag of the job's key" not in off.stdout


CALLER = """
import os
from securerun import guarded, job_secret, policy
wanted = policy(ports=[29500], key="auto")
with guarded(wanted, firewall="off", key="auto") as guarding:
    print(guarding.fingerprint, len(job_secret()), len(wanted.peers))
print(os.environ.get("SECURERUN_JOB_SECRET_PATH"))
"""


def test_a_python_caller_has_a_key_by_asking_for_it(node: Host, home: Path) -> None:
    env = {"HOME": str(home), "MASTER_ADDR": "node0", "NNODES": "2"}
    done = node.run([sys.executable, "-c", CALLER], env=env)
    assert done.returncode == 0, done
    first, second = done.stdout.splitlines()
    assert len(first.split()[0]) == 8 and first.split()[1:] == ["64", "0"] and second == "None"
    without = node.run([sys.executable, "-c", CALLER.replace(', key="auto"', "")], env=env)
    assert "nothing says which hosts they are" in without.stderr


def test_a_key_that_cannot_be_looked_for_is_told_of(node: Host, home: Path) -> None:
    (home / ".config/securerun/key").unlink()
    (home / ".config").rename(home / "away")
    (home / ".config").symlink_to(".config")  # as root, to whom nothing else is closed
    alone = launch(node, home)
    assert alone.returncode == 78 and "nothing says which hosts" in alone.stderr, alone
    assert f"{home}/.config/securerun/key cannot be looked for" in alone.stderr
    named = node.run(
        [*EXEC, "--peers", "10.77.0.2", "--", "true"], env={"HOME": str(home), "MASTER_ADDR": "node0", "NNODES": "2"}
    )
    assert named.returncode == 0 and f"{home}/.config/securerun/key cannot be looked for" in named.stderr, named


def test_what_the_key_is_for_stands_beside_it_since_two_nodes_may_differ_in_that(node: Host, home: Path) -> None:
    done = launch(node, home, PET_RDZV_ID="run 7")
    assert "it is for --rdzv-id run 7, and port 29500, which have to be the same there too" in done.stderr, done
