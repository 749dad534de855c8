"""Slurm's controllers, as slurm.conf names them, and a job's nodes, as scontrol does."""

from __future__ import annotations

from pathlib import Path

import pytest

from securerun.errors import PolicyError
from securerun.job import batch, slurm_jobs

JOB = "JobId={number} JobName=x UserId={user}(1000) GroupId=g(1000) JobState=RUNNING NodeList={nodes} BatchHost=cn1"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SlurmctldHost=ctl(10.1.0.9)\n", ["10.1.0.9/32"]),
        ("  slurmctldhost = 10.1.0.9 \nSlurmctldHost=b(fd00::9)", ["10.1.0.9/32", "fd00::9/128"]),
        ("ControlMachine=ctl\nControlAddr=10.1.0.9\nBackupAddr=10.1.0.8", ["10.1.0.8/31"]),
        ("#SlurmctldHost=ctl(10.1.0.9)\nSlurmctldPort=6817\nSlurmctldParameters=x", []),
        ("SlurmctldHost=localhost(127.0.0.1)\n", []),
        ("SlurmctldHost=nowhere.invalid\n", []),
        ("", []),
    ],
)
def test_controllers_are_those_of_slurm_conf(tmp_path: Path, text: str, found: list[str]) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(text)
    assert [str(network) for network in slurm_jobs.controllers({"SLURM_CONF": str(conf)})] == found


def test_controllers_are_found_in_what_is_included_and_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("Include more.conf\n")
    (tmp_path / "more.conf").write_text("include slurm.conf\nSlurmctldHost=ctl(10.1.0.9)\n")
    found = slurm_jobs.controllers({"SLURM_CONF": str(tmp_path / "slurm.conf")})
    assert [str(network) for network in found] == ["10.1.0.9/32"]


def test_without_a_configuration_there_are_no_controllers(tmp_path: Path) -> None:
    assert slurm_jobs.controllers({"SLURM_CONF": str(tmp_path / "none")}) == ()


@pytest.mark.parametrize(
    ("lines", "nodes"),
    [
        ([JOB.format(number=7, user="alice", nodes="cn[1-2]")], "cn[1-2]"),
        (
            [JOB.format(number=7, user="a", nodes="cn1"), JOB.format(number=8, user="a", nodes="gpu[1-2]")],
            "cn1,gpu[1-2]",
        ),
    ],
)
def test_nodes_are_those_that_slurm_says_the_users_job_has(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], nodes: str
) -> None:
    """Of a heterogeneous job all parts are shown."""
    monkeypatch.setattr(batch, "ask_scontrol", lambda *_: "\n".join(lines))
    assert slurm_jobs.nodes_of(7, 1000, {}) == nodes


@pytest.mark.parametrize("user", [1000, 1001])
def test_job_of_another_user_or_without_nodes_has_none(monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    nodes = "(null)" if user == 1000 else "cn1"
    monkeypatch.setattr(batch, "ask_scontrol", lambda *_: JOB.format(number=7, user="alice", nodes=nodes))
    with pytest.raises(PolicyError, match="knows no job 7 of user"):
        slurm_jobs.nodes_of(7, user, {})
