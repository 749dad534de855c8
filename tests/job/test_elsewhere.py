"""What a command has others start: found in it, behind wrappers, in what a shell is given, and in the one script."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

import pytest

from securerun.job import elsewhere


def found(command: str) -> list[str]:
    return [str(one) for one in elsewhere.of_command(shlex.split(command))]


@pytest.mark.parametrize(
    ("command", "client"),
    [
        ("srun -N2 --ntasks-per-node=1 torchrun train.py", "srun"),
        ("/opt/slurm/bin/srun python train.py", "srun"),
        ("env -u FOO A=b srun python train.py", "srun"),
        ("env -S srun torchrun train.py", "srun"),
        ("env -S 'srun torchrun train.py'", "srun"),
        ("env '-Ssrun torchrun train.py'", "srun"),
        ("su - alice -c 'cd run && srun torchrun train.py'", "srun"),
        ("script -qc 'srun torchrun train.py' log", "srun"),
        ("parallel -j2 ssh {} torchrun train.py ::: node0 node1", "ssh"),
        ("find hosts -type f -exec ssh -F {} node torchrun train.py ;", "ssh"),
        ("bash -c 'trap \"ssh node1 torchrun train.py\" EXIT; sleep 1'", "ssh"),
        ("bash -c '$(which srun) -N2 torchrun train.py'", "srun"),
        ("bash -c '`command -v srun` -N2 torchrun train.py'", "srun"),
        ("nohup nice -n 10 srun torchrun train.py", "srun"),
        ("timeout --signal TERM 10m stdbuf -oL mpirun -np 16 python train.py", "mpirun"),
        ("numactl --cpunodebind=0 --membind 0 srun torchrun train.py", "srun"),
        ("salloc -N 2 srun torchrun train.py", "srun"),
        ("mpiexec.hydra -n 2 python train.py", "mpiexec.hydra"),
        ("prterun -n 2 python train.py", "prterun"),
        ("horovodrun -np 4 python train.py", "horovodrun"),
        ("pdsh -w node[0-1] torchrun train.py", "pdsh"),
        ("clush -a torchrun train.py", "clush"),
        ("parallel-ssh -h hosts torchrun train.py", "parallel-ssh"),
        ("ssh node1 torchrun train.py", "ssh"),
        ("ray job submit -- python train.py", "ray"),
        ("torchx run -s slurm dist.ddp -j 2x8 --script train.py", "torchx"),
        ("docker --context here run --rm image torchrun train.py", "docker"),
        ("podman exec box torchrun train.py", "podman"),
        ("docker compose up", "docker"),
        ("kubectl -n train exec pod -- torchrun train.py", "kubectl"),
        ("flux run -N2 torchrun train.py", "flux"),
        ("jsrun -n 2 torchrun train.py", "jsrun"),
        ("aprun -n 2 torchrun train.py", "aprun"),
        ("systemd-run --user torchrun train.py", "systemd-run"),
        ("sbatch job.sh", "sbatch"),
        ("bsub -n 2 torchrun train.py", "bsub"),
        ("qsub job.sh", "qsub"),
        ("deepspeed --hostfile hosts train.py", "deepspeed"),
        ("accelerate launch --deepspeed_hostfile=hosts train.py", "accelerate"),
        ("bash -c 'srun torchrun train.py'", "srun"),
        ("bash -lc 'cd /work && exec srun torchrun train.py | tee log'", "srun"),
        ("sh -ec 'for host in a b; do ssh $host torchrun train.py & done; wait'", "ssh"),
        ("bash -c 'if true; then\n  CUDA_VISIBLE_DEVICES=0 mpirun python train.py\nfi'", "mpirun"),
        ("bash -c 'LAUNCHER=\"srun torchrun\"; $LAUNCHER train.py; securerun other.py'", "srun"),
        ("bash -c 'srun \\\n torchrun train.py\nsecurerun other.py'", "srun"),
        ("srun --job-name securerun torchrun train.py", "srun"),
        ("sudo -u git srun torchrun train.py", "srun"),
        ("bash -c 'timeout 10m numactl -m 0 srun torchrun train.py'", "srun"),
        ("bash -c 'bash -c \"srun torchrun train.py\"'", "srun"),
        ("bash -c 'set -- srun torchrun train.py; exec \"$@\"'", "srun"),
        ("bash -c 'run=(srun -N 2 torchrun); \"${run[@]}\" train.py'", "srun"),
        ("bash -c 'export RUN=\"srun -N 2\"; $RUN torchrun train.py'", "srun"),
        ("bash -c 'echo \"$(ssh node1 hostname)\"'", "ssh"),
        ("bash -c 'if ! srun torchrun train.py; then exit 1; fi'", "srun"),
        ("bash -c '(srun torchrun train.py) &'", "srun"),
        ("bash -c 'main() { srun torchrun train.py; }; main'", "srun"),
        ("bash -c 'echo \\# srun; srun torchrun train.py # a comment'", "srun"),
        ("bash -c 'bash <<END\nsrun torchrun train.py\nEND'", "srun"),
    ],
)
def test_what_others_start_for_a_command_is_found(command: str, client: str) -> None:
    assert found(command) == [client]


@pytest.mark.parametrize(
    "command",
    [
        "torchrun train.py --launcher srun ssh",
        "python srun",
        "find . -name srun",
        "bash -c 'trap - EXIT; SRUN=$(which srun); torchrun train.py'",
        "env -S 'torchrun train.py --launcher srun'",
        "bash -c 'torchrun train.py --hosts ssh'",
        "bash -c 'echo run it with srun; torchrun train.py'",
        "bash -c '# srun torchrun train.py\ntorchrun train.py'",
        "docker ps",
        "bash -c 'case $1 in\n srun) torchrun train.py;;\n ssh|pdsh) exit 1;;\nesac'",
        "bash -c 'srun() { torchrun \"$@\"; }'",
        "bash -c 'LAUNCHER=srun; torchrun train.py'",
        "bash -c 'command -v srun > /dev/null; which srun; torchrun train.py'",
        "bash -c 'cat <<-END\n\tssh node1 by hand\n\tEND\ntorchrun train.py'",
        "bash -c 'cat <<< \"ssh node1\"; torchrun train.py'",
        "bash -c 'echo \"it is; srun here\"; torchrun train.py'",
        "bash -c 'srun securerun train.py & wait'",
        "docker images",
        "kubectl get pods",
        "ray start --head --block",
        "systemd-run --user --scope torchrun train.py",
        "torchx run -s local_cwd dist.ddp -j 1x8 --script train.py",
        "torchx run --scheduler=local_cwd dist.ddp -j 1x8 --script train.py",
        "deepspeed train.py",
        "deepspeed --hostfile hosts --no_ssh --node_rank 0 train.py",
        "accelerate launch train.py",
        "apptainer exec image.sif torchrun train.py",
        "unshare -Ur torchrun train.py",
        # These say it themselves, or take a lease where they run.
        "srun securerun train.py",
        "srun -l /opt/bin/securerunctl exec -- python train.py",
        "srun bash -c 'exec securerun --node-rank $SLURM_NODEID train.py'",
        "ssh node1 'cd /work; securerun train.py'",
        "bash -c 'srun bash -c \"\nexec securerun train.py\"'",
        "securerun --no-python srun torchrun train.py",
        "no-such-command",
        "",
    ],
)
def test_nothing_is_said_of_what_is_started_here_or_guarded_there(command: str) -> None:
    assert found(command) == []


def test_the_one_script_that_is_named_is_looked_into(tmp_path: Path) -> None:
    script = tmp_path / "pretrain.sh"
    script.write_text("#!/usr/bin/env bash\nset -e\n# mpirun was here\nsrun \\\n  torchrun train.py\nssh node1 date\n")
    script.chmod(0o755)
    expected = ["srun (in pretrain.sh)", "ssh (in pretrain.sh)"]
    for command in (f"{script}", f"bash {script} 0", f"bash -eu -o pipefail {script}", f"nohup {script}"):
        assert found(command) == expected
    script.write_text("#!/usr/bin/python3\nimport this\nsrun = 1\n")
    assert found(str(script)) == []


def test_examples_of_this_house_are_guarded_where_they_run() -> None:
    place = Path(__file__).parents[2] / "examples"
    for script in ("slurm/job.sh", "two_nodes/job.sh"):
        assert found(f"bash {place / script}") == []


def test_a_pipe_in_the_place_of_a_script_is_neither_waited_for_nor_emptied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert found(f"bash {tmp_path / 'fifo'}") == []
    reading, writing = os.pipe()
    os.write(writing, b"srun torchrun\n")
    assert found(f"bash /dev/fd/{reading}") == []
    assert os.read(reading, 100) == b"srun torchrun\n"
    os.close(reading)
    os.close(writing)


def test_a_huge_script_and_wrappers_without_end_cost_nothing(tmp_path: Path) -> None:
    script = tmp_path / "huge.sh"
    for text in (
        "A=" * 30_000 + "\n" + ";time " * 20_000,
        "$(" * 40_000,
        "'" * 65_535,
        "<<A\n" * 20_000,
        "((" * 32_000,
    ):
        script.write_text(text + "\nsrun torchrun\n")
        began = time.process_time()
        found(f"bash {script}")
        assert time.process_time() - began < 2, text[:10]
    assert found("env " * 10_000 + "srun") == []
    script.write_text("\n".join(f"{name} run x" for name in ("srun", "ssh", "docker", "mpirun", "qsub", "pdsh")))
    assert len(found(f"bash {script}")) == 4


def test_page_lists_all_that_is_looked_for() -> None:
    page = (Path(__file__).parents[2] / "docs/exec.md").read_text()
    table = page.partition("## What others start")[2].partition("These are looked for")[0]
    words = set(re.findall(r"[\w.-]+", table))
    assert {*elsewhere._CLIENTS, *elsewhere._WITH_OPTIONS} <= words
