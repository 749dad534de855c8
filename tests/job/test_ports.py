"""The port plan: which ports a job is known to listen on, and what for."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from securerun.errors import PolicyError
from securerun.firewall.policy import PortRange, Purpose
from securerun.job.job import Endpoint, Job
from securerun.job.ports import plan_ports, ranges

HCCL = PortRange(60000, 60015, "HCCL (default range)")


def job(backend: str = "c10d", host: str = "localhost", port: int | None = 0) -> Job:
    return Job(backend, Endpoint(host, port), 1, 1, 0, ("train.py",))


RANDOM = job()


@pytest.mark.parametrize(
    ("planned_for", "expected"),
    [
        (RANDOM, []),
        (job(port=None), []),
        (job(port=29400), [PortRange(29400, 29400, "rendezvous store (c10d)")]),
        (job(host="node7", port=29400), [PortRange(29400, 29400, "rendezvous store (c10d)")]),
        (job("static", "127.0.0.1", 29500), [PortRange(29500, 29500, "master port (static rendezvous)")]),
        (job("static", "127.0.0.1", 0), []),
        (job("parallel", "node0", 29500), [PortRange(29500, 29500, "parallel store (torch_npu_run)")]),
        (job("plugin", "node0", 5000), [PortRange(5000, 5000, "rendezvous endpoint")]),
        (job("etcd", "etcd0", 2379), []),
        (job("etcd-v2", "localhost", 2379), []),
        (Job("c10d", None, 2, 2, 0, ()), []),
    ],
)
def test_the_endpoint_is_planned_wherever_its_port_is_known(planned_for: Job, expected: list[PortRange]) -> None:
    assert plan_ports(planned_for, {}, None) == (*expected, HCCL)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["60000-60015"]),
        ({"HCCL_IF_BASE_PORT": ""}, ["60000-60015"]),
        ({"HCCL_IF_BASE_PORT": "1024"}, ["1024-1039"]),
        ({"HCCL_IF_BASE_PORT": " 48890 "}, ["48890-48905"]),
        ({"HCCL_IF_BASE_PORT": "65520"}, ["65520-65535"]),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "60000-60050"}, ["60000-60050"]),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "60000,60050-60100, 1"}, ["1", "60000", "60050-60100"]),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "7000 - 7005"}, ["7000-7005"]),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, []),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": " "}, ["60000-60015"]),
        ({"HCCL_IF_BASE_PORT": "50000", "HCCL_HOST_SOCKET_PORT_RANGE": "7000"}, ["7000"]),
        ({"HCCL_IF_BASE_PORT": "50000", "HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, []),
    ],
)
def test_hccl_as_its_documentation_says(environment: dict[str, str], expected: list[str]) -> None:
    plan = plan_ports(RANDOM, environment, None)
    assert [str(ports) for ports in plan] == expected
    named = any(text.strip() for text in environment.values())
    assert {ports.purpose for ports in plan} <= {"HCCL" if named else "HCCL (default range)"}


@pytest.mark.parametrize(
    ("file", "text", "last"),
    [
        ("{arch}-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\n", 60031),
        ("{arch}-linux/ascend_toolkit_install.info", "version=8.2.RC1\ninnerversion=V100R001C83\n", 60015),
        ("{arch}-linux/ascend_toolkit_install.info", "version=8.10.0\n", 60031),
        ("{arch}-linux/ascend_nnae_install.info", "version=9.0.0\n", 60031),
        ("ascend_toolkit_install.info", "version=8.5.0\n", 60031),
        ("version.info", "Version=8.3.0.1.200\n", 60031),
        ("compiler/version.info", "Version=7.7.T9.0.B057\n", 60015),
        ("compiler/version.info", "Version=unknown\n", 60015),
        ("compiler/version.info", "\0\0\0", 60015),
        ("version.info", "Version=8.3", 60031),
        ("somewhere/else.info", "version=8.3\n", 60015),
    ],
)
def test_hccl_takes_32_ports_from_cann_8_3(tmp_path: Path, file: str, text: str, last: int) -> None:
    path = tmp_path / file.format(arch=platform.machine())
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert plan_ports(RANDOM, {"ASCEND_HOME_PATH": str(tmp_path)}, None) == (
        PortRange(60000, last, "HCCL (default range)"),
    )


def test_32_ports_from_the_last_base_end_at_the_last_port(tmp_path: Path) -> None:
    (tmp_path / "version.info").write_text("Version=8.3\n")
    environment = {"ASCEND_HOME_PATH": str(tmp_path), "HCCL_IF_BASE_PORT": "65520"}
    assert plan_ports(RANDOM, environment, None) == (PortRange(65520, 65535, "HCCL"),)


def test_an_ascend_home_that_is_not_there_is_no_news() -> None:
    assert plan_ports(RANDOM, {"ASCEND_HOME_PATH": "/nonexistent"}, None) == (HCCL,)


def test_added_ports_are_sorted_in_and_identical_ranges_stand_once() -> None:
    plan = plan_ports(job(port=29400), {}, "29400, 60000-60015 8000-8010,7000")
    assert plan == (
        PortRange(7000, 7000, "added with --ports"),
        PortRange(8000, 8010, "added with --ports"),
        PortRange(29400, 29400, "rendezvous store (c10d)"),
        PortRange(60000, 60015, "added with --ports"),
    )


def test_the_default_range_by_name_is_asked_for() -> None:
    for environment in ({"HCCL_IF_BASE_PORT": "60000"}, {"HCCL_HOST_SOCKET_PORT_RANGE": "60000-60015"}):
        assert plan_ports(RANDOM, environment, None) == (PortRange(60000, 60015, "HCCL"),)


def test_what_a_rank_table_knows_is_sorted_in() -> None:
    known = ranges([16666, 16665, 16700, 60000, 16666], Purpose.RANK_TABLE)
    assert [str(ports) for ports in known] == ["16665-16666", "16700", "60000"]
    plan = plan_ports(job(port=29400), {"HCCL_HOST_SOCKET_PORT_RANGE": "60000"}, "16700", known=known)
    assert [(str(ports), ports.purpose) for ports in plan] == [
        ("16665-16666", "HCCL (rank table)"),
        ("16700", "added with --ports"),
        ("29400", "rendezvous store (c10d)"),
        ("60000", "HCCL"),
    ]


def test_no_ports_are_no_ranges_and_every_port_is_one() -> None:
    assert ranges([], Purpose.RANK_TABLE) == ()
    assert ranges(range(1, 65536), Purpose.ADDED) == (PortRange(1, 65535, Purpose.ADDED),)
    with pytest.raises(PolicyError, match="65536"):
        ranges([65536], Purpose.RANK_TABLE)


@pytest.mark.parametrize(
    ("environment", "extra", "words"),
    [
        ({"HCCL_IF_BASE_PORT": "1023"}, None, ["HCCL_IF_BASE_PORT=1023", "1024-65520", "60000"]),
        ({"HCCL_IF_BASE_PORT": "65521"}, None, ["HCCL_IF_BASE_PORT=65521", "1024-65520"]),
        ({"HCCL_IF_BASE_PORT": "-1"}, None, ["HCCL_IF_BASE_PORT=-1"]),
        ({"HCCL_IF_BASE_PORT": "6e4"}, None, ["HCCL_IF_BASE_PORT=6e4"]),
        ({"HCCL_IF_BASE_PORT": "60_000"}, None, ["HCCL_IF_BASE_PORT=60_000"]),
        ({"HCCL_IF_BASE_PORT": "\u0665\u0660\u0660\u0660\u0660"}, None, ["HCCL_IF_BASE_PORT="]),
        ({"HCCL_IF_BASE_PORT": "x", "HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, None, ["HCCL_IF_BASE_PORT=x"]),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "60050-60000"}, None, ["HCCL_HOST_SOCKET_PORT_RANGE", "write 60000-60050"]),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "0-5"}, None, ["HCCL_HOST_SOCKET_PORT_RANGE", "0-5", "1-65535"]),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "60000,auto"}, None, ["HCCL_HOST_SOCKET_PORT_RANGE", "'auto'"]),
        ({}, "70000", ["--ports", "70000", "1-65535"]),
        ({}, "0", ["--ports", "0", "1-65535"]),
        ({}, "8010-8000", ["--ports", "8010-8000 is crossed", "write 8000-8010"]),
        ({}, "8000-", ["--ports", "'8000-'", "7000,8000-8010"]),
        ({}, "http", ["--ports", "'http'"]),
        ({}, "-5", ["--ports", "'-5'"]),
        ({}, "8000-8010-8020", ["--ports", "'8000-8010-8020'"]),
        ({}, "99999999999999999999", ["--ports", "99999999999999999999"]),
        ({}, " , ", ["--ports", "names no port"]),
    ],
)
def test_a_wrong_port_is_named_with_what_to_write(
    environment: dict[str, str], extra: str | None, words: list[str]
) -> None:
    with pytest.raises(PolicyError) as error:  # where CANN is: HCCL may be in use
        plan_ports(RANDOM, {"ASCEND_HOME_PATH": "/", **environment}, extra)
    assert error.value.status == 78
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_wrong_port_is_named_with_the_place_it_came_from() -> None:
    with pytest.raises(PolicyError, match=r"^SECURERUN_PORTS: "):
        plan_ports(RANDOM, {}, "70000", "SECURERUN_PORTS")
