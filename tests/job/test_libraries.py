"""Variables of libraries that cannot be in use on this host: a line, where the library's own host would refuse."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import jobs
import pytest
from hosts import Host, Network

from securerun.errors import PolicyError
from securerun.host import interfaces
from securerun.job import entrance, libraries
from securerun.job.job import Endpoint, Job
from securerun.job.libraries import Library, Variables, may_be_in_use
from securerun.job.ports import plan_ports
from securerun.options import Options

JOB = Job("c10d", Endpoint("localhost", 0), 1, 1, 0, ("train.py",))
PEERS = [ipaddress.ip_network("10.77.0.2")]
STALE = {
    "NCCL_SOCKET_IFNAME": "ens17",
    "HCCL_IF_IP": "10.99.0.9",
    "HCCL_IF_BASE_PORT": "65530",
    "HCCL_HOST_SOCKET_PORT_RANGE": "60000-",
    "HCCL_SOCKET_FAMILY": "ipv4",
}


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev without an accelerator, and no CANN."""
    for name in ("null", "zero", "vga_arbiter", "nvme0"):
        (tmp_path / name).touch()
    monkeypatch.setattr(libraries, "_DEVICES", tmp_path)
    monkeypatch.setattr(libraries, "_CANN", tmp_path / "Ascend")
    return tmp_path


@pytest.mark.parametrize(
    ("device", "of"),
    [
        ("davinci0", Library.HCCL),
        ("davinci_manager", Library.HCCL),
        ("nvidia0", Library.NCCL),
        ("nvidiactl", Library.NCCL),
        ("nvidia-uvm", Library.NCCL),
        ("kfd", Library.NCCL),
        ("dxg", Library.NCCL),
    ],
)
def test_a_library_may_be_in_use_where_its_device_is(devices: Path, device: str, of: Library) -> None:
    assert [library for library in Library if may_be_in_use(library, {})] == [Library.GLOO]
    (devices / device).touch()
    assert {library for library in Library if may_be_in_use(library, {})} == {Library.GLOO, of}


@pytest.mark.parametrize("variable", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_hccl_may_be_in_use_where_cann_is(devices: Path, variable: str) -> None:
    assert not may_be_in_use(Library.HCCL, {variable: str(devices / "nowhere")})
    assert may_be_in_use(Library.HCCL, {variable: str(devices)})
    (devices / "Ascend").mkdir()
    assert may_be_in_use(Library.HCCL, {})
    assert not may_be_in_use(Library.NCCL, {variable: str(devices)})


def read(environment: dict[str, str], *, peers: bool = True) -> Variables:
    variables = Variables(environment)
    plan_ports(JOB, environment, None, variables=variables)
    list(entrance.warnings(environment, PEERS if peers else [], variables))
    entrance.entrance(Options(), environment, PEERS if peers else [], variables)
    return variables


@pytest.mark.parametrize("variable", STALE)
def test_what_no_library_reads_here_is_passed_over_with_one_line(devices: Path, variable: str) -> None:
    (line,) = read({variable: STALE[variable]}).warnings
    assert line.startswith(variable) and "\n" not in line
    assert f"{variable[:4]} cannot be in use here" in line


@pytest.mark.parametrize("variable", STALE)
def test_what_a_library_may_read_here_is_refused_as_ever(devices: Path, variable: str) -> None:
    (devices / ("nvidia0" if variable.startswith("NCCL") else "davinci0")).touch()
    with pytest.raises(PolicyError, match=f"^{variable}"):
        read({variable: STALE[variable]})


def test_gloo_is_everywhere(devices: Path) -> None:
    with pytest.raises(PolicyError, match="GLOO_SOCKET_IFNAME=ens17"):
        read({"GLOO_SOCKET_IFNAME": "ens17"})


def test_what_is_wrong_leaves_the_rest_as_it_is(devices: Path) -> None:
    way = interfaces.leading_to(PEERS)[0]
    environment = {"HCCL_IF_BASE_PORT": "65530", "NCCL_SOCKET_IFNAME": "ens17", "GLOO_SOCKET_IFNAME": way}
    assert [str(ports) for ports in plan_ports(JOB, environment, None)] == ["60000-60015"]
    assert entrance.entrance(Options(), environment, PEERS).reason.startswith("GLOO_SOCKET_IFNAME")
    environment = {"HCCL_IF_BASE_PORT": "7000", "HCCL_HOST_SOCKET_PORT_RANGE": "nonsense"}
    assert [str(ports) for ports in plan_ports(JOB, environment, None)] == ["7000-7015"]


def test_job_with_the_stale_variables_of_its_cluster_trains(network: Network, tmp_path: Path) -> None:
    node0, node1, _ = network
    script = tmp_path / "train.py"
    script.write_text(TRAIN)

    def start(node: Host, peer: Host, rank: int) -> list[str]:
        options = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", f"--master-addr={node0.ipv4}"]
        return [jobs.SECURERUN, f"--peers={peer.ipv4}", "--master-port=29500", *options, str(script)]

    running = [
        node.popen(start(node, peer, rank), env=STALE)
        for rank, (node, peer) in enumerate([(node0, node1), (node1, node0)])
    ]
    for process in running:
        out, err = process.communicate(timeout=90)
        assert (process.returncode, out) == (0, "3.0\n"), err
        for variable in STALE:
            assert len([line for line in err.splitlines() if line.startswith(f"securerun: {variable}")]) == 1, err


# Ranks 0 and 1 add up 1 and 2.
TRAIN = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
print(value.item())
dist.destroy_process_group()
"""
