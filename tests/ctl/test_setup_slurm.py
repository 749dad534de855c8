"""securerunctl setup slurm: scripts that begin with this installation alone, and say what they are for."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from securerun.ctl import setup_slurm
from securerun.errors import UsageError
from securerun.guard import program

PARTS = ("prolog", "epilog", "task-prolog")


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_slurm, "trusted_program", lambda: Path("/opt/securerun/bin/securerun-guard"))


@pytest.mark.parametrize("part", PARTS)
def test_script_is_one_that_a_shell_reads_and_runs_this_securerun(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_slurm.print_slurm(part)
    text = capsys.readouterr().out
    script = tmp_path / "script.sh"
    script.write_text(text)
    subprocess.run(["sh", "-n", script], check=True)
    command = shlex.split(text.partition("\nexec ")[2])
    assert command == program.of_slurm(part)
    done = subprocess.run(
        ["sh", script], env={"SLURM_JOB_ID": "no number"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78 and "SLURM_JOB_ID is no number" in done.stdout, done


def test_prolog_takes_who_else_may_connect(capsys: pytest.CaptureFixture[str]) -> None:
    setup_slurm.print_slurm("prolog", peers="login1,10.2.0.0/16", public="8888=10.0.0.0/8")
    assert capsys.readouterr().out.endswith(" prolog --peers login1,10.2.0.0/16 --public 8888=10.0.0.0/8\n")


def test_without_a_part_the_lines_of_slurm_conf_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    setup_slurm.print_slurm("")
    said = capsys.readouterr().out
    for line in (
        "PrologFlags=Alloc",
        "Prolog=/etc/slurm/securerun-prolog.sh",
        "TaskProlog=/etc/slurm/securerun-task-prolog.sh",
    ):
        assert f"\n{line}\n" in said


@pytest.mark.parametrize(
    ("part", "options", "words"),
    [
        ("prologue", {}, "there is no part 'prologue'"),
        ("epilog", {"peers": "login1"}, "--peers is for the prolog"),
        ("prolog", {"peers": "$(reboot)"}, "characters"),
        ("prolog", {"peers": "a\nreboot"}, "characters"),
    ],
)
def test_what_cannot_be_right_is_refused(part: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        setup_slurm.print_slurm(part, **options)
    assert words in str(refused.value)
