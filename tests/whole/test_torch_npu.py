"""torch_npu_run behind securerun: torch_npu's own launcher and store, on hosts without NPUs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import jobs
import npu
import pytest
from checkout import COMMANDS
from hosts import Host, Network, finish, kill_group, machine_snapshot
from key_homes import make_homes
from probe import Probe, reach
from remains import nothing_left_behind

CTL = str(COMMANDS / "securerunctl")
_TIERED = "--enable_tiered_parallel_tcpstore=true"
# torch_npu/csrc/distributed: the name of the abstract unix socket (unix(7)) on which an agent serves its workers.
_LOCAL_SOCKET = "@local_abstract_namespace"
_STORE = 29500
_FAREWELL_SECONDS = 15.0

Environment = Mapping[str, str]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """For processes that import torch_npu."""
    npu.require()
    stand_ins = tmp_path_factory.mktemp("cann")
    npu.build_stand_ins(stand_ins)
    return npu.environment(stand_ins)


@pytest.mark.parametrize("tiered", [(), (_TIERED,)], ids=["plain", "tiered"])
def test_stranger_cannot_reach_any_port_of_two_nodes_under_torch_npu_run(
    network: Network, environment: Environment, tmp_path: Path, tiered: tuple[str, ...]
) -> None:
    node0, node1, stranger = network
    with (
        nothing_left_behind(node0, node1),
        Probe(stranger, node0) as at_node0,
        Probe(stranger, node1) as at_node1,
    ):
        started = _start_on_both(
            network, (jobs.SECURERUN, "--peers", _addresses(node0, node1), *tiered), environment, tmp_path
        )
        _wait_for_training(started, tmp_path, 4)
        targets = {node: node.targets() for node in (node0, node1)}
        local_sockets = [_local_sockets(node) for node in (node0, node1)]
        from_peer = {**reach(node1, targets[node0]), **reach(node0, targets[node1])}
        (tmp_path / "go on").touch()
        done = _finish_both(started, tmp_path, 4)
    assert _ended_well(done), done
    assert jobs.last_loss(done[0].stdout) < 0.6
    assert (node0.ipv4, _STORE) in targets[node0]
    assert set(npu.HCCL_PORTS) <= {port for _, port in targets[node1]}
    assert from_peer == dict.fromkeys(targets[node0] | targets[node1], True)
    for probe in (at_node0, at_node1):
        assert probe.reached == set()
        # HCCL's ports, and of each of two workers a port for each of 4 groups.
        assert len({port for _, port in probe.tried}) >= len(npu.HCCL_PORTS) + 8
    assert _STORE in {port for _, port in at_node0.tried}
    assert [len(sockets) > 0 for sockets in local_sockets] == [bool(tiered)] * 2


@pytest.mark.parametrize("tiered", [(), (_TIERED,)], ids=["plain", "tiered"])
def test_two_nodes_that_nobody_named_train_by_their_key_and_nobody_else_reaches_hccls_ports(
    network: Network, environment: Environment, tmp_path: Path, tiered: tuple[str, ...]
) -> None:
    node0, node1, stranger = network
    homes = make_homes(node0, tmp_path)
    of_job = {"HOME": str(homes[1]), "MASTER_ADDR": node0.ipv4, "MASTER_PORT": str(_STORE), "NNODES": "2"}
    with (
        nothing_left_behind(node0, node1),
        Probe(stranger, node0) as outside,
        Probe(node1, node0) as beside_the_peer,
    ):
        started = [
            _start_on(node, rank, (jobs.SECURERUN, *tiered), {**environment, "HOME": str(home)}, network, tmp_path)
            for rank, (node, home) in enumerate(zip((node0, node1), homes))
        ]
        _wait_for_training(started, tmp_path, 2)
        targets = node0.targets()
        with_the_key = reach(node1, targets, around=(CTL, "exec", "--"), env=of_job)
        (tmp_path / "go on").touch()
        done = _finish_both(started, tmp_path, 2)
    assert _ended_well(done), done
    assert jobs.last_loss(done[0].stdout) < 0.6
    assert {_STORE, *npu.HCCL_PORTS} <= {port for _, port in targets}
    assert with_the_key == dict.fromkeys(targets, True)
    assert outside.reached == beside_the_peer.reached == set()
    assert {_STORE, *npu.HCCL_PORTS} <= {port for _, port in outside.tried}
    assert "2 of 2 nodes guarded" in done[0].stderr, done[0].stderr


def test_torch_npu_run_lets_the_stranger_in_where_securerun_does_not(
    network: Network, environment: Environment, tmp_path: Path
) -> None:
    """The control: the same job and the same probe, without securerun."""
    node0, _, stranger = network
    with Probe(stranger, node0) as probe:
        started = _start_on_both(network, (npu.TORCH_NPU_RUN,), environment, tmp_path, workers=1)
        _wait_for_training(started, tmp_path, 2)
        (tmp_path / "go on").touch()
        done = _finish_both(started, tmp_path, 2)
    assert _ended_well(done), done
    assert {_STORE, *npu.HCCL_PORTS} <= {port for _, port in probe.reached}


def test_one_node_meets_on_port_29500_if_no_port_is_given(
    network: Network, environment: Environment, tmp_path: Path
) -> None:
    """torch_npu_run itself fails here since torch 2.12: it would listen at 127.0.0.1:None."""
    node0, _, stranger = network
    with nothing_left_behind(node0), Probe(stranger, node0) as probe:
        started = _start(node0, (_TIERED, "--master-addr", node0.ipv4), environment, tmp_path)
        _wait_for_training([started], tmp_path, 2)
        listening, local_sockets = node0.listening(), _local_sockets(node0)
        (tmp_path / "go on").touch()
        done = finish(started, timeout=120)
    assert done.returncode == 0, done
    assert jobs.last_loss(done.stdout) < 0.6
    assert (node0.ipv4, _STORE) in listening
    assert local_sockets
    assert probe.reached == set()
    assert {_STORE, *npu.HCCL_PORTS} <= {port for _, port in probe.tried}
    assert "open to no other host" in done.stderr


def test_the_shield_alone_closes_hccls_ports_to_strangers_and_leaves_them_open_to_peers(
    network: Network, environment: Environment, tmp_path: Path
) -> None:
    node0, node1, stranger = network
    options = ("--launcher", "torch_npu_run", "--firewall", "off", "--peers", node1.ipv4)
    ports = [(node0.ipv4, port) for port in range(26000, 26016)]
    with nothing_left_behind(node0):
        started = _start(node0, options, {**environment, "HCCL_IF_BASE_PORT": "26000"}, tmp_path)
        _wait_for_training([started], tmp_path, 2)
        assert "SECURERUN" not in node0.snapshot()["iptables-save"]
        assert set(ports) <= node0.targets()
        assert not _local_sockets(node0)
        from_peer, from_stranger = reach(node1, ports), reach(stranger, ports)
        (tmp_path / "go on").touch()
        done = finish(started, timeout=120)
    assert done.returncode == 0, done
    assert from_peer == dict.fromkeys(ports, True)
    assert from_stranger == dict.fromkeys(ports, False)


def test_workers_find_the_environment_that_torch_npu_run_gives_them(
    node: Host, environment: Environment, tmp_path: Path
) -> None:
    script = tmp_path / "environment.py"
    script.write_text(
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
        "sys.exit(int(os.environ['TORCHELASTIC_RESTART_COUNT']) < 1)\n"
    )
    seen = {}
    for launcher in (npu.TORCH_NPU_RUN, jobs.SECURERUN):
        port = () if launcher == jobs.SECURERUN else ("--master-port", "29500")
        done = node.run(
            [
                launcher,
                "--rdzv-backend=parallel",
                *port,
                _TIERED,
                "--max-restarts=1",
                str(script),
                "--peers",
                "--",
                "x",
            ],
            env=environment,
        )
        assert done.returncode == 0, done
        seen[launcher] = [_without_what_is_random(line) for line in done.stdout.splitlines()]
    assert len(seen[jobs.SECURERUN]) == 2
    assert seen[jobs.SECURERUN] == seen[npu.TORCH_NPU_RUN]


def test_main_takes_a_command_line_for_torch_npu_run(node: Host, environment: Environment, script: str) -> None:
    """torch_npu parses sys.argv once more while the job runs; afterwards it is what it was."""
    arguments = ["--launcher", "torch_npu_run", "--master-port", "6000", script, "x"]
    call = f"import sys, securerun.run as run; run.main({arguments!r}); print(sys.argv)"
    done = node.run([sys.executable, "-c", call, "untouched"], env=environment)
    assert (done.returncode, done.stdout) == (0, "ran with x\n['-c', 'untouched']\n"), done


# Run where torch_npu is: each command line through torch_npu_run itself and through ours, up to where each would start
# its agent. Prints where the store would listen, what the workers would be told, and what ours says of it.
_COMPARE = """
import json, sys
import torch_npu.distributed.run as theirs
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import registry
from torch.distributed.elastic.rendezvous.api import RendezvousParameters
from torch.distributed.launcher import api
from securerun.job import launchers

def meeting(config):
    parameters = RendezvousParameters(config.rdzv_backend, config.rdzv_endpoint, config.run_id,
                                      config.min_nodes, config.max_nodes, **config.rdzv_configs)
    told = api._get_addr_and_port(parameters)
    if config.rdzv_backend != "parallel":
        return [config.rdzv_backend, config.rdzv_endpoint]
    handler = registry.get_rendezvous_handler(parameters)
    return ["parallel", handler.master_addr, handler.master_port, handler.rank, handler.world_size,
            handler.enable_tiered, told]

def configured(run):
    configs = []
    torchrun.elastic_launch = lambda config, entrypoint: lambda *_: configs.append(meeting(config))
    try:
        run()
    except BaseException as error:
        return repr(error)
    return configs[0]

def ours(arguments):
    parser = launchers.parser_of_all()
    command = launchers.choose("torch_npu_run", parser, arguments).parse(arguments)
    endpoint = launchers.describe_job(command.namespace).endpoint
    return [configured(command.run), [endpoint.host, endpoint.port]]

compared = []
for arguments in json.loads(sys.stdin.read()):
    arguments.append("train.py")
    sys.argv = ["torch_npu_run", *arguments]
    upstream = configured(theirs._main.__wrapped__)
    sys.argv = ["securerun", "--what=ever"]
    compared.append([upstream, *ours(arguments)])
print(json.dumps(compared))
"""

_WITH_PORT: dict[str, tuple[list[str], object]] = {
    "address": (["--master-addr", "node0", "--master-port", "6000"], ["node0", 6000]),
    "IPv6": (["--master_addr=[fd00::1]", "--master_port=6000"], ["fd00::1", 6000]),
    "two nodes": (["--nnodes=2", "--node-rank=1", "--master-addr=node0", "--master-port=6000"], ["node0", 6000]),
    "tiered": (["--master-port=6000", "--enable_tiered_parallel_tcpstore", "True"], ["127.0.0.1", 6000]),
    "another backend": (["--master-port=6000", "--rdzv-backend", "c10d"], ["127.0.0.1", 6000]),
    "another endpoint": (["--master-port=6000", "--rdzv-endpoint", "node0:7000"], ["127.0.0.1", 6000]),
    "standalone": (["--standalone"], ["localhost", 0]),
    "standalone, port": (["--standalone", "--master-port=6000", "--nnodes=2"], ["localhost", 0]),
}
_WITHOUT_PORT: dict[str, tuple[list[str], list[object]]] = {
    "nothing": ([], ["127.0.0.1", 29500]),
    "address": (["--nnodes=2", "--node-rank=1", "--master-addr=node0"], ["node0", 29500]),
    "endpoint": (["--nnodes=2", "--rdzv-endpoint=node0:7000"], ["node0", 7000]),
    "endpoint without a port": (["--nnodes=2", "--rdzv-endpoint=node0"], ["node0", 29500]),
    "endpoint, IPv6": (["--nnodes=2", "--rdzv-endpoint=[fd00::1]:7000"], ["fd00::1", 7000]),
    "endpoint and address": (["--master-addr=10.0.0.1", "--rdzv-endpoint=10.0.0.1:7000"], ["10.0.0.1", 7000]),
}


def _compare(environment: Environment, command_lines: list[list[str]]) -> list[list[object]]:
    done = subprocess.run(
        [sys.executable, "-c", _COMPARE],
        input=json.dumps(command_lines),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_with_a_port_everything_is_what_torch_npu_run_makes_of_it(environment: Environment) -> None:
    compared = _compare(environment, [arguments for arguments, _ in _WITH_PORT.values()])
    for (name, (_, expected)), (upstream, ours, described) in zip(_WITH_PORT.items(), compared):
        assert ours == upstream, name
        assert described == expected, name
        assert isinstance(ours, list), (name, ours)
        assert ours[0] == "c10d" or ours[1:3] == expected, name


@pytest.mark.slow
def test_without_a_port_the_store_is_where_the_workers_look_for_it(environment: Environment) -> None:
    compared = _compare(environment, [arguments for arguments, _ in _WITHOUT_PORT.values()])
    for (name, (_, expected)), (upstream, ours, described) in zip(_WITHOUT_PORT.items(), compared):
        assert "Error" in str(upstream), (name, upstream)  # or there would be nothing to add
        assert described == expected, name
        assert isinstance(ours, list), (name, ours)
        assert ours[1:3] == expected, name
        assert ours[-1] == expected, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PYTHONPATH": None}, ["no module torch_npu", "pip install 'torch-npu=="]),
        ({"LD_LIBRARY_PATH": None}, ["torch_npu cannot be imported", "lib", ".so", "source set_env.sh"]),
        ({"ASCEND_OPP_PATH": None}, ["(ASCEND_OPP_PATH environment variable is not set);", "source set_env.sh"]),
        (
            {"LD_LIBRARY_PATH": None, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"},
            ["torch cannot be imported", ".so", "source set_env.sh"],
        ),
    ],
    ids=["torch_npu", "CANN", "CANN's variables", "CANN, as torch is imported"],
)
def test_what_is_missing_is_said_in_one_line_and_nothing_is_started(
    node: Host, environment: Environment, script: str, changes: dict[str, str | None], words: list[str]
) -> None:
    before, machine = node.snapshot(), machine_snapshot()
    done = node.run([jobs.SECURERUN, "--launcher", "torch_npu_run", script], env={**environment, **changes})
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("securerun: ")
    for word in words:
        assert word in line
    assert node.snapshot() == before
    assert machine_snapshot() == machine


def test_help_shows_the_options_of_torch_npu_run_if_it_is_asked_for(node: Host, environment: Environment) -> None:
    done = node.run([jobs.SECURERUN, "--launcher", "torch_npu_run", "--help"], env=environment)
    assert done.returncode == 0, done
    for option in ("--enable_tiered_parallel_tcpstore", "--nproc-per-node", "--launcher", "SECURERUN_PEERS"):
        assert option in done.stdout


def test_wrong_options_are_refused_as_torch_npu_run_refuses_them(
    node: Host, environment: Environment, script: str
) -> None:
    arguments = ["--enable_tiered_parallel_tcpstore=true", "--no-such-option", script]
    theirs, ours = (
        node.run([launcher, *arguments], env=environment) for launcher in (npu.TORCH_NPU_RUN, jobs.SECURERUN)
    )
    assert ours.returncode == theirs.returncode == 2
    assert ours.stderr.splitlines()[-1] == theirs.stderr.splitlines()[-1].replace("torch_npu_run", "securerun")


def test_torchrun_never_loads_torch_npu(node: Host, environment: Environment, tmp_path: Path) -> None:
    """It takes time to import and needs CANN's libraries."""
    script = tmp_path / "script.py"
    script.write_text("import os; print(open(f'/proc/{os.getppid()}/maps').read())")
    done = node.run([jobs.SECURERUN, str(script)], env=environment)
    assert done.returncode == 0, done
    assert "libtorch_cpu" in done.stdout
    assert "torch_npu" not in done.stdout


def _start(node: Host, options: tuple[str, ...], environment: Environment, place: Path) -> subprocess.Popen[str]:
    command = [jobs.SECURERUN, *options, "--nproc-per-node", "2", npu.TRAIN, "--hccl", "--wait", str(place)]
    return node.popen(command, env=environment)


def _start_on_both(
    network: Network, launcher: tuple[str, ...], environment: Environment, place: Path, workers: int = 2
) -> list[subprocess.Popen[str]]:
    """The job of two nodes as torch_npu's documentation starts it."""
    node0, node1, _ = network
    return jobs.start_on_both(
        (node0, node1),
        "static",
        launcher=[*launcher, "--rdzv_backend=parallel"],
        script=[npu.TRAIN, "--hccl", "--wait", str(place)],
        workers=workers,
        env=environment,
    )


def _start_on(
    node: Host, rank: int, launcher: tuple[str, ...], environment: Environment, network: Network, place: Path
) -> subprocess.Popen[str]:
    """One node of such a job, with one worker."""
    meeting = jobs.rendezvous("static", node, rank, network["node0"])
    command = [*launcher, "--rdzv_backend=parallel", "--nnodes", "2", *meeting]
    return node.popen([*command, npu.TRAIN, "--hccl", "--wait", str(place)], env=environment)


def _finish_both(
    started: Sequence[subprocess.Popen[str]], place: Path, workers: int
) -> list[subprocess.CompletedProcess[str]]:
    """The ends of two nodes.

    Agents meet a last time at the store, and the one that has it may leave first. torch_npu's store lets the other wait
    then, about every fifth time, with and without securerun, for the 300 s of torch's exit_barrier_timeout, and deaf to
    all signals but SIGKILL. All of its work is done by then.
    """
    with ThreadPoolExecutor(len(started)) as readers:
        done = [readers.submit(finish, process, timeout=150) for process in started]
        done[0].result()
        is_late = wait(done, timeout=_FAREWELL_SECONDS).not_done
        if is_late and len(list(place.glob("done *"))) == workers:
            kill_group(started[1])
        return [node_done.result() for node_done in done]


def _ended_well(done: Sequence[subprocess.CompletedProcess[str]]) -> bool:
    first, second = done
    return first.returncode == 0 and second.returncode in {0, -signal.SIGKILL}


def _wait_for_training(started: list[subprocess.Popen[str]], place: Path, workers: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(place.glob("trained *"))) < workers:
        for process in started:
            if process.poll() is not None:
                pytest.fail(finish(process).stderr)
        assert time.monotonic() < deadline, os.listdir(place)
        time.sleep(0.05)


def _local_sockets(node: Host) -> list[str]:
    """The names of the abstract unix sockets of a host that are torch_npu's."""
    names = (line.split()[-1] for line in node.run(["cat", "/proc/net/unix"], check=True).stdout.splitlines())
    return [name for name in names if name.startswith(_LOCAL_SOCKET)]


def _addresses(*nodes: Host) -> str:
    return ",".join(address for node in nodes for address in node.addresses)


def _without_what_is_random(line: str) -> object:
    arguments, variables = json.loads(line)
    random = re.compile(r"SECURERUN_.*|_|.*_ERROR_FILE|PROXY_AGENT_PID_USE_LOCAL_SOCKET_PATH|TORCHELASTIC_RUN_ID")
    assert int(variables["PROXY_AGENT_PID_USE_LOCAL_SOCKET_PATH"]) > 0
    return arguments, {name: value for name, value in variables.items() if not random.fullmatch(name)}
