"""Slurm's controllers, as slurm.conf names them, and a job's nodes, as scontrol does."""

from __future__ import annotations

from pathlib import Path

import pytest

from securerun.errors import PolicyError
from securerun.job import batch, slurm_conf, slurm_jobs

CONF = """\
# cn9 is gone: NodeName=cn9 NodeAddr=10.9.9.9
NodeName=DEFAULT CPUs=8 State=UNKNOWN
NodeName=cn[1-3] NodeAddr=10.1.0.[1-3] \\
    BcastAddr=10.2.0.[1-3] CPUs=8
nodename=login NodeHostname="login.site"   # its name
NodeName=plain
NodeName=cloud[1-2] NodeAddr=10.3.0.[1-2] State=CLOUD
NodeName=odd[1-2] NodeAddr=10.4.0.1
NodeName=DEFAULT State=FUTURE
NodeName=later NodeAddr=10.5.0.1
"""
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


@pytest.mark.parametrize(
    ("names", "ways"),
    [
        (["cn1", "cn3"], {"cn1": ("10.1.0.1", "10.2.0.1"), "cn3": ("10.1.0.3", "10.2.0.3")}),
        (["login", "plain"], {"login": ("login.site",), "plain": ()}),
        (["cloud1"], {}),
        (["odd1"], {}),
        (["later"], {}),
        (["cn9", "nobody", "DEFAULT"], {}),
    ],
)
def test_nodes_are_at_the_addresses_that_slurm_conf_has_and_moving_ones_nowhere(
    tmp_path: Path, names: list[str], ways: dict[str, tuple[str, ...]]
) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(CONF)
    assert slurm_conf.ways(names, {"SLURM_CONF": str(conf)}) == ways


@pytest.mark.parametrize(
    ("context", "nodes", "asks"),
    [
        ("prolog_slurmd", "cn[1-2]", False),
        ("prolog_task", "cn1,plain", False),
        ("prolog_task", "cn1,cloud1", True),
        ("", "cn[1-2]", True),
    ],
)
def test_a_prolog_does_not_ask_slurmctld_for_what_its_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: str, nodes: str, asks: bool
) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(CONF)
    asked: list[tuple[str, ...]] = []

    def ask(words: tuple[str, ...], _: object) -> str:
        asked.append(words)
        return ""

    monkeypatch.setattr(batch, "ask_scontrol", ask)
    environment = {"SLURM_CONF": str(conf), "SLURM_JOB_NODELIST": nodes, "SLURM_SCRIPT_CONTEXT": context}
    found = batch.allocation(environment, pytest.fail)
    assert found is not None and bool(asked) is asks
    if not asks:
        assert found.nodes[0].words == ("cn1", "10.1.0.1", "10.2.0.1")


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
