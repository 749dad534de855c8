"""The job, as torch itself would run it: held against torch's own launcher, version by version."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch.distributed.run as torchrun
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from securerun.errors import UsageError
from securerun.job.job import C10D_PORT, Endpoint, Job
from securerun.job.launchers import choose, describe_job, parser_of_all, values_of

LOCAL = Endpoint("localhost", 0)

CASES: list[tuple[list[str], str, Endpoint | None, int, int]] = [
    ([], "c10d", LOCAL, 1, 1),
    (["--standalone", "--nnodes", "2", "--rdzv-endpoint", "node0:1"], "c10d", LOCAL, 2, 2),
    (["--master-port", "6000"], "static", Endpoint("127.0.0.1", 6000), 1, 1),
    (["--master-port", "0"], "static", Endpoint("127.0.0.1", 0), 1, 1),
    (["--nnodes", "2", "--master-addr", "node0"], "static", Endpoint("node0", 29500), 2, 2),
    (["--nnodes", "2", "--master_addr=[fd00::1]", "--master_port=6000"], "static", Endpoint("fd00::1", 6000), 2, 2),
    (["--nnodes", "2", "--rdzv-endpoint", "node0:6001"], "static", Endpoint("node0", 6001), 2, 2),
    (["--rdzv-backend", "c10d"], "c10d", Endpoint("localhost", 29400), 1, 1),
    (["--nnodes=1:4", "--rdzv-backend=c10d", "--rdzv-endpoint=node0"], "c10d", Endpoint("node0", 29400), 1, 4),
    (["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=[fd00::1]"], "c10d", Endpoint("fd00::1", 29400), 2, 2),
    (["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=[fd00::1]:7"], "c10d", Endpoint("fd00::1", 7), 2, 2),
    (["--rdzv-backend=c10d", "--rdzv-conf=store_type=File", "--rdzv-endpoint=/shared/store"], "c10d", None, 1, 1),
    (["--nnodes=2", "--rdzv-backend=etcd-v2", "--rdzv-endpoint=etcd0"], "etcd-v2", Endpoint("etcd0", 2379), 2, 2),
    (["--nnodes=2", "--rdzv-backend=etcd", "--rdzv-endpoint=etcd0:1"], "etcd", Endpoint("etcd0", 1), 2, 2),
    (["--nnodes=2", "--rdzv-backend=plugin", "--rdzv-endpoint=node0:5"], "plugin", Endpoint("node0", 5), 2, 2),
    (["--nnodes=2", "--rdzv-backend=plugin", "--rdzv-endpoint=zk://a/b"], "plugin", None, 2, 2),
    (["--nnodes=2", "--rdzv-backend=plugin"], "plugin", None, 2, 2),
    (["--rdzv-backend=parallel", "--master-port=6000"], "parallel", Endpoint("127.0.0.1", 6000), 1, 1),
    (
        ["--rdzv-backend=parallel", "--rdzv-endpoint=node0:7", "--master-addr=node1", "--master-port=6"],
        "parallel",
        Endpoint("node1", 6),
        1,
        1,
    ),
    (["--standalone", "--rdzv-backend=parallel", "--master-port=6000"], "c10d", LOCAL, 1, 1),
]


def job(*arguments: str) -> Job:
    return describe_job(torchrun.get_args_parser().parse_args([*arguments, "train.py"]))


@pytest.mark.parametrize(("arguments", "backend", "endpoint", "least", "most"), CASES)
def test_describe_job(arguments: list[str], backend: str, endpoint: Endpoint | None, least: int, most: int) -> None:
    described = job(*arguments)
    assert (described.backend, described.endpoint) == (backend, endpoint)
    assert (described.min_nodes, described.max_nodes) == (least, most)


@pytest.mark.parametrize("arguments", [case[0] for case in CASES if case[1] in {"static", "c10d"} and case[2]])
def test_torch_itself_would_meet_there(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed.run.run, real, up to the point where it starts the agent with its configuration."""
    configured: list[Any] = []

    def elastic_launch(config: Any, entrypoint: Any) -> Any:  # noqa: ANN401
        configured.append(config)
        return lambda *_: None

    monkeypatch.setattr(torchrun, "elastic_launch", elastic_launch)
    described = job(*arguments)
    torchrun.run(torchrun.get_args_parser().parse_args([*arguments, "train.py"]))
    (config,) = configured
    assert described.backend == config.rdzv_backend
    assert described.endpoint == Endpoint(*parse_rendezvous_endpoint(config.rdzv_endpoint, 29400))
    assert (described.min_nodes, described.max_nodes) == (config.min_nodes, config.max_nodes)


def test_the_default_port_of_c10d_is_that_of_the_installed_torch() -> None:
    assert C10D_PORT == c10d_rendezvous_backend.DEFAULT_PORT


def test_pet_variables_count_and_world_size_and_rank_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "3")
    monkeypatch.setenv("PET_MASTER_ADDR", "node0")
    monkeypatch.setenv("PET_MASTER_PORT", "6000")
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("MASTER_ADDR", "service.example")
    assert job() == Job("static", Endpoint("node0", 6000), 3, 3, 0, ("train.py",))


def namespace(**changes: object) -> argparse.Namespace:
    """As the parser of torch 2.1 to 2.11 leaves it: the master port has a default."""
    defaults: dict[str, object] = {
        "nnodes": "1:1",
        "standalone": False,
        "rdzv_backend": "static",
        "rdzv_endpoint": "",
        "rdzv_conf": "",
        "node_rank": 0,
        "master_addr": "127.0.0.1",
        "master_port": 29500,
        "module": False,
        "training_script": "train.py",
        "training_script_args": [],
        "log_dir": None,
    }
    return argparse.Namespace(**{**defaults, **changes})


def test_one_node_is_static_on_29500_before_torch_2_12() -> None:
    assert describe_job(namespace()) == Job("static", Endpoint("127.0.0.1", 29500), 1, 1, 0, ("train.py",))


def test_the_command_is_what_the_user_launches() -> None:
    command = describe_job(namespace(module=True, training_script="a.b", training_script_args=["--x", "1"])).command
    assert command == ("-m", "a.b", "--x", "1")


def test_an_etcd_server_is_no_port_of_the_job() -> None:
    assert job("--nnodes=2", "--rdzv-backend=etcd", "--rdzv-endpoint=etcd0:1").meeting_point is None
    assert job("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:1").meeting_point == Endpoint("node0", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nnodes", "two"], ["--nnodes 'two'", "write --nnodes 2"]),
        (["--nnodes", "1:2:3"], ["'1:2:3'"]),
        (["--nnodes", ""], ["--nnodes ''"]),
        (["--nnodes", "0"], ["'0'", "at least one"]),
        (["--nnodes", "4:2"], ["'4:2'", "smaller number first"]),
        (["--master-port", "70000"], ["127.0.0.1:70000", "65536"]),
        (["--master-port", "-5"], ["127.0.0.1:-5"]),
        (["--rdzv-endpoint", "node0"], ["'node0' has no port", "node0:29500"]),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:port"], ["'node0:port'"]),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "no de:1"], ["'no de:1'"]),
        (["--rdzv-backend", "etcd", "--rdzv-endpoint", "http://etcd0:70000"], ["http://etcd0:70000"]),
    ],
)
def test_what_torch_would_raise_about_is_said_in_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        job(*arguments)
    assert error.value.status == 2
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104
        ("fd00::1", False),
        ("localhost.example", False),
        ("node0", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Endpoint(host, 1).is_loopback is loopback


def test_an_endpoint_is_printed_as_torch_reads_it() -> None:
    assert str(Endpoint("fd00::1", 29400)) == "[fd00::1]:29400"
    assert str(Endpoint("node0", 0)) == "node0"


@pytest.mark.parametrize(
    ("token", "count"),
    [
        ("--nnodes", 1),
        ("--nnodes=2", 0),
        ("--nno", 1),
        ("--nproc", 1),  # both spellings of one option: torch's parser decides whether that is ambiguous
        ("--standalone", 0),
        ("--stand", 0),
        ("--no-p", 0),
        ("-m", 0),
        ("-r", 1),
        ("-r3", 0),
        ("-mr", 1),
        ("-mr3", 0),
        ("-h", 0),
        ("--bogus", 0),
        ("-x", 0),
        ("train.py", None),
        ("-", None),
        ("", None),
        ("-1", None),
        ("-1.5", None),
        ("--not an option", None),
    ],
)
def test_values_of_torchs_own_options(token: str, count: int | None) -> None:
    assert values_of(torchrun.get_args_parser())(token) == count


def test_an_option_may_take_several_values() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pair", nargs=2)
    assert values_of(parser)("--pair") == 2


@pytest.mark.parametrize(
    ("arguments", "environment", "name"),
    [
        ([], {}, "torchrun"),
        (["--rdzv-backend", "c10d"], {}, "torchrun"),
        (["--rdzv-backend", "parallel"], {}, "torch_npu_run"),
        (["--rdzv_backend=parallel", "--nnodes=2"], {}, "torch_npu_run"),
        (["--rdzv-b=parallel"], {}, "torch_npu_run"),
        (["--enable_tiered_parallel_tcpstore=true"], {}, "torch_npu_run"),
        (["--enable_tiered_parallel_tcpstore", "false"], {}, "torch_npu_run"),
        (["--enable_tiered", "true"], {}, "torch_npu_run"),
        ([], {"PET_RDZV_BACKEND": "parallel"}, "torch_npu_run"),
        (["--rdzv-backend", "c10d"], {"PET_RDZV_BACKEND": "parallel"}, "torchrun"),
        ([], {"PET_ENABLE_TIERED_PARALLEL_TCPSTORE": "True"}, "torch_npu_run"),
        ([], {"PET_ENABLE_TIERED_PARALLEL_TCPSTORE": "false"}, "torchrun"),
        (["--no-such-option", "--rdzv-backend=parallel"], {}, "torch_npu_run"),
        # Not the launcher's: after the script, or to be answered by torchrun.
        (["train.py", "--rdzv-backend", "parallel"], {}, "torchrun"),
        (["-m", "train", "--enable_tiered_parallel_tcpstore=true"], {}, "torchrun"),
        (["--help"], {}, "torchrun"),
        (["--rdzv-backend=parallel", "--master-port=many"], {}, "torchrun"),
    ],
)
def test_auto_is_torch_npu_run_where_something_of_it_is_asked_for(
    arguments: list[str],
    environment: dict[str, str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    arguments = [*arguments, "train.py"]
    assert choose("auto", parser_of_all(), arguments).name == name
    assert choose("torchrun", parser_of_all(), arguments).name == "torchrun"
    assert choose("torch_npu_run", parser_of_all(), arguments).name == "torch_npu_run"
    assert capfd.readouterr() == ("", "")


def test_values_of_the_options_of_every_launcher() -> None:
    arity = values_of(parser_of_all())
    assert arity("--enable_tiered_parallel_tcpstore") == 1
    assert arity("--enable_tiered_parallel_tcpstore=true") == 0
    assert arity("--nnodes") == 1


def test_torchruns_command_line_stays_as_it_is() -> None:
    command = choose("torchrun", parser_of_all(), []).parse(["--nnodes", "2", "train.py", "--", "b"])
    assert command.arguments == ("--nnodes", "2", "train.py", "--", "b")
    assert command.namespace == torchrun.get_args_parser().parse_args(list(command.arguments))


def test_torchrun_does_not_know_the_options_of_torch_npu_run(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        choose("torchrun", parser_of_all(), []).parse(["--enable_tiered_parallel_tcpstore=true", "train.py"])
    assert error.value.code == 2
    assert "--enable_tiered_parallel_tcpstore" in capfd.readouterr().err
