"""Where a command says that its job meets: a public port there would open the job's store to strangers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from checkout import COMMANDS

from securerun.job.stores import of_command

MINDSPEED = """#!/bin/bash
MASTER_ADDR=${MASTER_ADDR:-node0}
MASTER_PORT=${MASTER_PORT:-6100}
DISTRIBUTED_ARGS="--nproc_per_node 8 --nnodes 2 --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
torchrun $DISTRIBUTED_ARGS pretrain_gpt.py --port 8080 | tee log
"""


def ports(*command: str, **environment: str) -> list[int]:
    return [each.first for each in of_command(command, environment)]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("torchrun", "--master-port", "6000", "train.py", "--port", "8080"), [6000]),
        (("torchrun", "--master_port=6000", "train.py"), [6000]),
        (("python", "-m", "torch.distributed.run", "--rdzv-endpoint=[fd00::1]:6001", "train.py"), [6001]),
        (("torchrun", "--rdzv_endpoint", "node0:6001", "train.py"), [6001]),
        (("torchrun", "--rdzv-endpoint", "node0", "train.py"), [29400, 29500]),
        (("accelerate", "launch", "--main_process_port", "6002", "train.py"), [6002]),
        (("deepspeed", "train.py"), [29400, 29500]),
        (("env", "MASTER_PORT=6003", "python", "train.py"), [6003]),
        (("bash", "-c", "export MASTER_PORT=6004; exec torchrun train.py"), [6004]),
        (("sh", "-c", "cd run\ntorchrun train.py"), [29400, 29500]),
        (("python", "train.py", "--metrics-port", "9100"), []),
        (("bash", "-c", "export HCCL_IF_BASE_PORT=7000; python train.py"), [7000]),
        (("env", "HCCL_HOST_SOCKET_PORT_RANGE=7100-7110,7200", "python", "train.py"), [7100, 7200]),
        (("env", "HCCL_HOST_SOCKET_PORT_RANGE=auto", "HCCL_IF_BASE_PORT=", "python", "train.py"), []),
        (("torchrun", "--master-port", "0", "train.py", "--master-port", "99999"), [29400, 29500]),
        (("torchrun", "--master-port"), [29400, 29500]),
    ],
)
def test_stores_are_where_options_and_variables_of_launchers_say(command: tuple[str, ...], expected: list[int]) -> None:
    assert ports(*command) == expected


def test_a_script_says_it_too_and_other_files_say_nothing(tmp_path: Path) -> None:
    script, data = tmp_path / "pretrain.sh", tmp_path / "data"
    script.write_text(MINDSPEED)
    data.write_bytes(b"MASTER_PORT=6005\n" + b"\0" * 100_000)
    assert ports("bash", str(script)) == [6100]
    assert ports("cat", str(data)) == []


def test_torchs_own_ports_are_meant_only_where_nothing_says_another() -> None:
    assert ports("torchrun", "train.py", MASTER_PORT="6000") == []


def test_hccls_ports_are_all_that_any_cann_opens_there() -> None:
    (found,) = of_command(("env", "HCCL_IF_BASE_PORT=7000", "python", "train.py"), {})
    assert (found.first, found.last, str(found.purpose)) == (7000, 7031, "HCCL")


def test_exec_refuses_a_public_port_at_which_its_command_meets(tmp_path: Path) -> None:
    script = tmp_path / "pretrain.sh"
    script.write_text(MINDSPEED)
    for public, status in (("6100", 78), ("6090-6110=10.0.0.0/8", 78), ("8080", 0)):
        command = [str(COMMANDS / "securerunctl"), "exec", "--dry-run", "--peers", "10.77.0.2", "--public", public]
        done = subprocess.run([*command, "--", "bash", str(script)], capture_output=True, text=True)
        assert done.returncode == status, done
        assert status == 0 or "which only the job's nodes may reach (master port)" in done.stderr
