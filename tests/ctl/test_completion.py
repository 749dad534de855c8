"""Tab completes securerun's options and torchrun's, their values and files, in real shells, and starts nothing."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import COMMANDS
from hosts import environment
from lacking import needed
from torch.distributed.run import get_args_parser

from securerun.ctl.completion import SHELLS, print_completion
from securerun.errors import UsageError
from securerun.options import OPTIONS

SECURERUNCTL = str(COMMANDS / "securerunctl")
# Prints what bash would offer for the words in $@, the last of which is being written.
ASK_BASH = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _securerun; printf "%s\\n" "${COMPREPLY[@]}"'
PROMPT = "ready> "


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is printed for each shell, in a file."""
    directory = tmp_path_factory.mktemp("completion")
    found = {}
    for shell in SHELLS:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            print_completion(shell)
        found[shell] = directory / f"_securerun.{shell}"
        found[shell].write_text(output.getvalue())
    return found


def offered(scripts: dict[str, Path], *words: str) -> list[str]:
    """What bash offers for the last of the words behind `securerun`."""
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", ASK_BASH, str(scripts["bash"]), "securerun", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "", done
    return done.stdout.split()


def test_every_option_of_securerun_and_of_torchrun_is_offered(scripts: dict[str, Path]) -> None:
    of_torch = {spelling for action in get_args_parser()._actions for spelling in action.option_strings}
    with_dashes = {spelling for spelling in of_torch if "_" not in spelling}
    assert {option.flag for option in OPTIONS} | with_dashes <= set(offered(scripts, "-"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--fire"], ["--firewall"]),
        (["--nnodes", "2", "--rdzv-b"], ["--rdzv-backend"]),
        (["--firewall", ""], ["auto", "iptables", "nftables", "legacy", "off"]),
        (["--firewall", "l"], ["legacy"]),
        (["--firewall", "=", "n"], ["nftables"]),  # as bash cuts --firewall=n
        (["--loopback", "="], ["any", "job"]),
        (["--start-method", "fork"], ["fork", "forkserver"]),
        (["--rdzv-backend", "c"], ["c10d"]),
        (["--interface", "l"], ["lo"]),
        (["--run-as", "nobod"], ["nobody"]),
        (["--rdzv-endpoint", "node0", ":", "29400", "--scope", "pr"], ["process"]),
        (["--rdzv-conf", "is_host", "=", "1", "--dry"], ["--dry-run"]),
        (["--peers", "@", "hostfile", "--dry"], ["--dry-run"]),
        (["--dry-run", "--acc"], ["--accept"]),
    ],
)
def test_bash_offers(scripts: dict[str, Path], words: list[str], expected: list[str]) -> None:
    assert offered(scripts, *words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "--fire"],
        ["--nnodes", "2", "train.py", "--firewall", ""],
        ["--", "--fire"],
        ["--nnodes", ""],
        ["tra"],
    ],
)
def test_what_is_the_scripts_own_or_any_file_is_left_to_bash(scripts: dict[str, Path], words: list[str]) -> None:
    assert offered(scripts, *words) == []


def test_the_script_for_bash_has_no_fault_that_shellcheck_knows(scripts: dict[str, Path]) -> None:
    shellcheck = needed(COMMANDS / "shellcheck")
    done = subprocess.run([shellcheck, "--shell", "bash", scripts["bash"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("--firew\tnf\t", "--firewall[ =]nftables"),
        ("--firewall=leg\t", "--firewall=legacy"),
        ("--nnodes 2 --standal\ttrain_m\t--fire\t", r"--nnodes 2 --standalone train_me\.py --fire"),
    ],
)
def test_tab_in_a_real_shell(scripts: dict[str, Path], tmp_path: Path, shell: str, typed: str, completed: str) -> None:
    needed(shell)
    (tmp_path / "train_me.py").touch()
    (tmp_path / "trainings").touch()
    with terminal(shell, scripts[shell], tmp_path) as descriptor:
        os.write(descriptor, f"securerun {typed}\n".encode())
        _read_until(descriptor, rf"(?m)^got {completed} ?\r?$")


def test_securerunctl_is_completed_by_typer() -> None:
    variables = {"_SECURERUNCTL_COMPLETE": "complete_bash", "COMP_WORDS": "securerunctl st", "COMP_CWORD": "1"}
    done = subprocess.run([SECURERUNCTL], env=environment(variables), capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["status"], done


def test_another_shell_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^'fish' is no shell that is known here; write bash or zsh$"):
        print_completion("fish")


@contextlib.contextmanager
def terminal(shell: str, script: Path, directory: Path) -> Iterator[int]:
    """An interactive shell in `directory` on a terminal of its own, which has read the script."""
    start = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "--no-rcs", "-i"]}[shell]
    begin = {"bash": "", "zsh": f"autoload -Uz compinit; compinit -u -d {directory}/.dump; "}[shell]
    pid, descriptor = pty.fork()
    if not pid:
        os.chdir(directory)
        os.execvpe(start[0], start, environment({"TERM": "dumb", "HOME": str(directory)}))  # noqa: S606
    try:
        # In what is typed the prompt is cut in two, so that its echo is not taken for it.
        function = 'securerun() { echo got "$@"; }'
        os.write(descriptor, f"{begin}source {script}; {function}; PS1='ready''> '\n".encode())
        _read_until(descriptor, f"{PROMPT}$")
        yield descriptor
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(descriptor)


def _read_until(descriptor: int, pattern: str, seconds: float = 20) -> None:
    """Read what the terminal shows, without the codes that move the cursor, until the pattern is found in it."""
    shown = ""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, shown)) and time.monotonic() < end:
        if select.select([descriptor], [], [], 0.1)[0]:
            shown += os.read(descriptor, 65536).decode(errors="replace")
            shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x07|\r(?!\n)", "", shown)
    assert found, repr(shown)
