"""Lists of peers in launches: what opens a job and what does not, and what cannot work is refused before it hangs."""

from __future__ import annotations

import time
from pathlib import Path

import jobs
import pytest
from hosts import Network, finish_all, hear
from probe import Probe, reach
from torchless import needs_torch

pytestmark = pytest.mark.slow


def _static(nodes: int, rank: int, address: str) -> list[str]:
    meeting = ["--node-rank", str(rank), "--master-addr", address, "--master-port", str(jobs.PORT)]
    return ["--nnodes", str(nodes), "--nproc-per-node", "1", *meeting]


@needs_torch
def test_a_list_that_a_shell_exports_opens_no_job_of_one_node(network: Network, tmp_path: Path) -> None:
    """README's `export SECURERUN_PEERS=@hostfile.txt` before a job of one node; --peers opens it."""
    node0, node1, _ = network
    (tmp_path / "hostfile.txt").write_text(f"{node0.ipv4}\n{node1.ipv4}\n")
    script = tmp_path / "wait.py"
    script.write_text("import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\n")
    one_node = ["--master-port", str(jobs.PORT), str(script)]
    env = {"SECURERUN_PEERS": f"@{tmp_path}/hostfile.txt"}
    for options, is_open in (([], False), (["--peers", node1.ipv4], True)):
        done = tmp_path / f"done {is_open}"
        job = node0.popen([jobs.SECURERUN, *options, *one_node, str(done)], env=env)
        targets = [(node0.ipv4, jobs.PORT)]
        deadline = time.monotonic() + 30
        while not reach(node0, targets)[targets[0]]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert reach(node1, targets) == {targets[0]: is_open}
        done.touch()
        (ended,) = finish_all([job], timeout=60)
        assert ended.returncode == 0, ended
        said = "--peers" if is_open else "job of one node, which SECURERUN_PEERS does not open; --peers does"
        assert f"({said})" in ended.stderr, ended


def test_two_agents_on_one_host_train_where_the_list_is_localhost(network: Network) -> None:
    """By an address of the host's own as well as by the loopback; nobody else gets in."""
    node0, _, stranger = network
    with Probe(stranger, node0) as probe:
        launcher = [jobs.SECURERUN, "--peers", "localhost"]
        started = [node0.popen([*launcher, *_static(2, rank, node0.ipv4), str(jobs.TRAIN)]) for rank in (0, 1)]
        done = finish_all(started, timeout=120)
    assert [one.returncode for one in done] == [0, 0], done
    assert jobs.last_loss(done[0].stdout) < 0.35
    assert probe.tried
    assert probe.reached == set()
    assert all("open to no other host (--peers localhost)" in one.stderr for one in done), done


def test_a_launch_whose_list_names_this_host_alone_is_refused_before_it_hangs(network: Network) -> None:
    node0, _, _ = network
    for address in node0.addresses:
        done = node0.run([jobs.SECURERUN, "--peers", address, *_static(2, 0, address), str(jobs.TRAIN)], timeout=30)
        assert done.returncode == 78, done
        assert "--peers names this host alone, and the job has 2 nodes" in done.stderr, done


def test_nodes_train_that_a_folded_list_and_grid_engine_s_file_name(network: Network, tmp_path: Path) -> None:
    node0, node1, stranger = network
    number = node0.ipv4.rpartition(".")[0]
    (tmp_path / "pe_hostfile").write_text(
        "".join(f"{node.ipv4} 8 all.q@{node.ipv4} UNDEFINED\n" for node in (node0, node1))
    )
    named: tuple[tuple[list[str], dict[str, str]], ...]
    named = (["--peers", f"{number}.[1-2]"], {}), ([], {"PE_HOSTFILE": str(tmp_path / "pe_hostfile")})
    with Probe(stranger, node0) as probe:
        started = [
            node.popen([jobs.SECURERUN, *options, *_static(2, rank, node0.ipv4), str(jobs.TRAIN)], env=env)
            for rank, (node, (options, env)) in enumerate(zip((node0, node1), named))
        ]
        done = finish_all(started, timeout=120)
    assert [one.returncode for one in done] == [0, 0], done
    assert probe.reached == set()
    assert f"open to {node0.ipv4}, {node1.ipv4} (--peers)" in done[0].stderr
    assert f"open to {node0.ipv4}, {node1.ipv4} (Grid Engine (PE_HOSTFILE))" in done[1].stderr


@needs_torch
def test_the_pods_of_a_kubeflow_trainjob_train_though_one_comes_late(network: Network, tmp_path: Path) -> None:
    """The name service of each pod is a hosts file; the first is started before the other has its address."""
    node0, node1, stranger = network
    table = tmp_path / "hosts"
    first = f"127.0.0.1 localhost\n{node0.ipv4} llm-node-0-0.llm\n{node0.ipv4} llm\n"
    table.write_text(first)
    pod = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(table)]
    command = [*pod, jobs.SECURERUN, "--nproc-per-node", "1", str(jobs.TRAIN)]
    trainjob = {
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "PET_NNODES": "2",
        "PET_MASTER_ADDR": "llm-node-0-0.llm",
        "PET_MASTER_PORT": "29400",
    }
    with Probe(stranger, node0) as probe:
        started = [node0.popen(command, env={**trainjob, "PET_NODE_RANK": "0"})]
        waits = "llm has the addresses of 1 pod so far, and the job has 2 nodes; asking again"
        assert waits in hear(started[0], waits)
        with table.open("a") as file:
            file.write(f"{node1.ipv4} llm\n")
        started.append(node1.popen(command, env={**trainjob, "PET_NODE_RANK": "1"}))
        done = finish_all(started, timeout=120)
    assert [one.returncode for one in done] == [0, 0], done
    assert probe.reached == set()
    for one in done:
        assert f"open to {node0.ipv4}, {node1.ipv4} (Kubeflow Trainer (PET_MASTER_ADDR))" in one.stderr, done
