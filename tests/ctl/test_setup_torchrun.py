"""securerunctl setup torchrun: a command by torchrun's name that is securerun, and that nobody else can change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host, Network, environment, finish, finish_all, kill_group
from probe import Probe
from process_table import name_of

from securerun.ctl import torchrun

SETUP = (str(COMMANDS / "securerunctl"), "setup", "torchrun")
SYSTEM = "/usr/bin:/bin:/usr/sbin:/sbin"

# In the shape of Megatron's: it knows nothing of securerun, and calls torchrun by its name.
SCRIPT = """
DISTRIBUTED_ARGS=(--nproc_per_node 1 --nnodes 2 --node_rank $NODE_RANK --master_addr {master} --master_port {port})
torchrun ${{DISTRIBUTED_ARGS[@]}} {train} --groups 3
"""
# Writes what it is told, and ends as it is told.
WORKER = """
import json, os, sys
here = {"TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "SECURERUN_RUN_ID", "SECURERUN_LEASE"}
print(json.dumps([sys.argv[1:], {name: value for name, value in os.environ.items() if name not in here}]))
sys.exit(int(sys.argv[1]))
"""


def made(directory: Path | str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """`securerunctl setup torchrun DIRECTORY`, run to its end; never a traceback."""
    done = subprocess.run(
        [*SETUP, str(directory)], env=environment(variables), capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done
    return done


def first_in_path(place: Path) -> dict[str, str]:
    """torch's own torchrun is the next one."""
    return {"PATH": f"{place}:{COMMANDS}:{SYSTEM}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with our torchrun in it, of a name that a shell would cut."""
    directory = tmp_path_factory.mktemp("setup") / "our commands"
    done = made(directory)
    assert done.returncode == 0, done
    return directory


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def test_stranger_cannot_reach_any_port_of_a_script_that_calls_torchrun_by_name(
    network: Network, place: Path, tmp_path: Path
) -> None:
    node0, node1, stranger = network
    script = tmp_path / "pretrain.sh"
    script.write_text(SCRIPT.format(master=node0.ipv4, port=jobs.PORT, train=jobs.TRAIN))
    variables = {**first_in_path(place), "SECURERUN_PEERS": f"{node0.ipv4},{node1.ipv4}"}
    with Probe(stranger, node0) as at_node0, Probe(stranger, node1) as at_node1:
        started = [
            node.popen(["bash", script], env={**variables, "NODE_RANK": str(rank)})
            for rank, node in enumerate((node0, node1))
        ]
        done = finish_all(started, timeout=180)
    assert [one.returncode for one in done] == [0, 0], done
    assert "2 workers, all-reduce right in 4 groups" in done[0].stdout
    for probe, one in ((at_node0, done[0]), (at_node1, done[1])):
        assert "every TCP port of this job closed to all others by shield" in one.stderr
        assert probe.reached == set()
        assert len({port for _, port in probe.tried}) >= 4


@pytest.mark.slow
def test_what_is_printed_puts_it_first_in_path(place: Path) -> None:
    """It is found, and is not looked for, in an environment that nobody activated."""
    script = 'eval "$("$0" setup torchrun "$1")" && command -v torchrun && "$0" setup torchrun "$1"'
    done = subprocess.run(
        ["sh", "-c", script, SETUP[0], place],
        env=environment({"PATH": SYSTEM}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{place}/torchrun\n"), done
    assert done.stderr.count(f"{place}/torchrun is made anew; it is securerun, run by {sys.executable}") == 2
    assert "in this PATH it is torchrun already" in done.stderr


@pytest.mark.slow
def test_help_is_torchruns_with_ours_behind(place: Path) -> None:
    done = subprocess.run([place / "torchrun", "--help"], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: torchrun ")
    assert "--peers" in done.stdout


@pytest.mark.parametrize("status", ["0", "3"])
def test_workers_and_whoever_waits_see_what_torchrun_gives_them(
    node: Host, place: Path, worker: Path, status: str
) -> None:
    """Variables too that no shell has a name for: one in between would drop them."""
    odd = ["env", "BASH_FUNC_module%%=() { :; }", "a.b=1"]
    arguments = ["--nproc-per-node", "1", "--master-port", "29511", str(worker), status, "--peers"]
    path = first_in_path(place)
    ours, theirs = (
        node.run([*odd, command, *arguments], env=path) for command in ("torchrun", str(COMMANDS / "torchrun"))
    )
    assert ours.returncode == theirs.returncode, (ours, theirs)
    assert (ours.returncode == 0) == (status == "0")
    assert ours.stdout == theirs.stdout
    assert '"a.b": "1"' in ours.stdout and "BASH_FUNC_module%%" in ours.stdout


def test_whoever_ends_torchrun_by_its_name_finds_it(node: Host, place: Path, tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text("import time; print('up', flush=True); time.sleep(60)")
    job = node.popen(["torchrun", str(script)], env=first_in_path(place))
    try:
        assert job.stdout is not None and job.stdout.readline() == "up\n"
        assert name_of(job.pid) in ("torchrun", "pt_elastic")  # newer torches give it one of their own
        assert f"{place}/torchrun {script}" in node.processes()[job.pid]
    finally:
        kill_group(job)
        finish(job)


def test_inside_of_a_run_it_takes_no_second_lease(node: Host, place: Path, script: str) -> None:
    command = [str(COMMANDS / "securerunctl"), "exec", "--peers", "localhost", "--", "torchrun", script]
    done = node.run(command, env=first_in_path(place))
    assert (done.returncode, done.stdout) == (0, "ran with\n"), done
    assert "no second lease is taken" in done.stderr


@pytest.mark.parametrize("call", [["sh", "-c", "torchrun x"], [sys.executable, "-c", "{}"], ["env", "torchrun", "x"]])
def test_torchs_own_torchrun_is_not_run_when_the_interpreter_is_gone(
    node: Host, place: Path, tmp_path: Path, call: list[str]
) -> None:
    """Whoever looks through PATH by execvp(3) goes on to the next one where the first line names nothing."""
    gone, open_to_all = tmp_path / "gone", tmp_path / "next"
    for directory, text in (
        (gone, (place / "torchrun").read_text().replace(sys.executable, "/no/such/python")),
        (open_to_all, "#!/bin/sh\necho open to all\n"),
    ):
        directory.mkdir()
        (directory / "torchrun").write_text(text)
        (directory / "torchrun").chmod(0o755)
    program = "import subprocess, sys; sys.exit(subprocess.run(['torchrun', 'x']).returncode)"
    words = [word.replace("{}", program) for word in call]
    done = node.run(words, env={"PATH": f"{gone}:{open_to_all}:{SYSTEM}"})
    assert (done.returncode, done.stdout) == (127, ""), done
    assert "/no/such/python" in done.stderr


@pytest.mark.slow
def test_without_securerun_it_says_so_in_a_line(place: Path) -> None:
    """As when it was installed in another environment, or is run by another interpreter."""
    done = subprocess.run(
        [sys.executable, "-S", place / "torchrun", "x"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(r"torchrun: \S+ has no module \w+; install securerun there with pip, or .*\n", done.stderr)


@pytest.mark.slow
def test_nothing_that_lies_beside_it_is_imported(place: Path) -> None:
    for name in ("securerun.py", "torch.py", "typing_extensions.py"):
        (place / name).write_text("raise SystemExit('imported from beside')")
    try:
        done = subprocess.run(
            [place / "torchrun", "-h"], env=environment(), capture_output=True, text=True, check=False
        )
    finally:
        for module in place.glob("*.py"):
            module.unlink()
    assert done.returncode == 0, done


@pytest.mark.slow
def test_it_is_for_all_to_run_and_for_one_to_change(tmp_path: Path) -> None:
    directory = tmp_path / "commands"
    old = os.umask(0o077)
    try:
        assert made(directory).returncode == 0
        first = (directory / "torchrun").stat()
        assert made(f"{tmp_path}/./commands/").returncode == 0
    finally:
        os.umask(old)
    assert [path.name for path in directory.iterdir()] == ["torchrun"]
    assert (directory.stat().st_mode & 0o777, (directory / "torchrun").stat().st_mode & 0o777) == (0o755, 0o755)
    assert (directory / "torchrun").stat().st_ino != first.st_ino  # whoever runs the old one goes on running it


def _a_file(path: Path) -> None:
    path.write_text("#!/bin/sh\n# torchrun\n")


def _a_link(path: Path) -> None:
    (path.parent / "target").write_text("of somebody\n")
    path.symlink_to(path.parent / "target")


@pytest.mark.parametrize("lay", [_a_file, _a_link, Path.mkdir, os.mkfifo], ids=["file", "link", "directory", "fifo"])
def test_a_torchrun_of_others_is_left_alone(tmp_path: Path, lay: Callable[[Path], object]) -> None:
    lay(tmp_path / "torchrun")
    before = _listing(tmp_path)
    done = made(tmp_path)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr == (
        f"securerunctl: {tmp_path}/torchrun is there already and is none of securerun's; name another directory, and "
        "have that one first in PATH\n"
    )
    assert _listing(tmp_path) == before


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.chmod(0o775), "/a/b can be written by others (mode 775)"),
        (lambda path: path.parent.chmod(0o757), "/a can be written by others (mode 757)"),
        (lambda path: os.chown(path, 12345, -1), "/a/b belongs to user 12345"),
        (lambda path: path.rename(path.parent / "c").parent.chmod(0o777), "/a can be written by others (mode 777)"),
        (lambda path: os.chown(path.rename(path.parent / "c").parent, 12345, -1), "/a belongs to user 12345"),
    ],
)
def test_where_others_could_swap_it_nothing_is_made(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    directory = tmp_path / "a/b"
    directory.mkdir(parents=True)
    change(directory)
    done = made(directory)
    assert (done.returncode, done.stdout) == (77, ""), done
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
    assert _listing(directory) == []


@pytest.mark.parametrize(
    ("directory", "words"),
    [
        ("", "cannot stand in PATH"),
        ("{}/a:b", "without a colon"),
        ("{}/a\nb", "a\\nb' cannot stand in PATH"),
        ("{}/file", "/file is no directory"),
        ("{}/dangling", "/dangling is no directory"),
        ("{}/no/such", "mkdir -p {}/no/such, then this again"),
    ],
)
def test_a_place_where_it_cannot_be_is_refused_in_a_line(tmp_path: Path, directory: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    done = made(directory.format(tmp_path))
    assert (done.returncode, done.stdout) == (2, ""), done
    assert words.format(tmp_path) in done.stderr and len(done.stderr.splitlines()) == 1


def test_one_that_would_not_run_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import sys; sys.exit('no torch for you')")
    directory = tmp_path / "commands"
    done = made(directory, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (78, ""), done
    assert done.stderr == (
        f"securerunctl: a torchrun in {directory} would not run: no torch for you; nothing is made there\n"
    )
    assert not directory.exists()


@pytest.mark.usefixtures("root")
def test_one_that_would_not_run_leaves_the_one_that_stood(tmp_path: Path) -> None:
    """On a file system where nothing may be run, which is asked of it."""
    (tmp_path / "torchrun").write_text(f"#!/usr/bin/env old\n{torchrun._MARK}\n")
    script = 'mount -t tmpfs -o noexec none "$1"; cp "$2" "$1"; "$0" setup torchrun "$1"; end=$?; ls -A "$1"; exit $end'
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, SETUP[0], mounted, tmp_path / "torchrun"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (78, "torchrun\n"), done
    assert "Permission denied; is it mounted noexec?" in done.stderr


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ("ro", "", "Read-only file system"),
        ("ro", "/new", "Read-only file system"),
        ("size=4k", "", "No space left on device"),
    ],
)
def test_where_nothing_can_be_written_that_is_said_of_the_directory(
    tmp_path: Path, options: str, name: str, reason: str
) -> None:
    script = 'mount -t tmpfs -o "$2" none "$1"; echo full 2> /dev/null > "$1/x"; exec "$0" setup torchrun "$1$3"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, SETUP[0], tmp_path, options, name],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (78, ""), done
    assert done.stderr == (
        f"securerunctl: no torchrun can be written in {tmp_path}{name}: {reason}; name a directory that takes files of "
        "yours; nothing is changed here\n"
    )


def test_what_a_killed_setup_wrote_goes_with_the_next_one(tmp_path: Path) -> None:
    """And nothing else does: not of one that is at work, not of others."""
    text = f"#!/usr/bin/env old\n{torchrun._MARK}\n"
    for name, content, age in ((".torchrun-old", text, 3600), (".torchrun-now", text, 0), (".torchrun-rc", "x", 3600)):
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert made(tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"torchrun", ".torchrun-now", ".torchrun-rc"}


def test_only_of_a_file_system_that_forbids_it_noexec_is_asked(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 8; exec "$0" setup torchrun "$1"', SETUP[0], tmp_path / "new"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78 and "Too many open files" in done.stderr, done
    assert "noexec" not in done.stderr


def _listing(directory: Path) -> Sequence[tuple[str, int, int]]:
    if not directory.exists():
        return []
    return sorted((path.name, path.lstat().st_mode, path.lstat().st_ino) for path in directory.iterdir())
