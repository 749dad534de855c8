"""docs/launchers.md: each line there starts a real job by a real launcher, and a stranger reaches no port of it."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout import CHECKOUT, COMMANDS
from hosts import Host, Network, eventually
from lacking import Lacking
from pages import DIRECTORY, Block, Stage, blocks_of
from probe import Probe
from users import PrivateMachine

pytestmark = pytest.mark.slow

LAUNCHERS = Path(sys.prefix) / "launchers"
PAGE = blocks_of(CHECKOUT / "docs/launchers.md")
BLOCKS = [block for block in PAGE if block.language == "sh"]
(CLUSTER,) = (block.text for block in PAGE if block.text.startswith("export RAY_AUTH_MODE"))
# What is many in the page, and one a node here.
FEWER = (
    ("--nproc-per-node 8", "--nproc-per-node 1"),
    ("--num_processes 16", "--num_processes 2"),
    ("--devices 8", "--devices 1"),
    ("-j 1x8", "-j 1x2"),
    ("ray start", "ray start --num-cpus 1 --object-store-memory 80000000"),
    ("--head", "--head --include-dashboard=false"),
)

# What a worker does that was told its rank: it adds ranks up, and stays until the stranger has tried its ports.
MEET = """
import sys, time, torch, torch.distributed as dist

def meet():
    workers = dist.get_world_size()
    for group in [None, dist.new_group()]:
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=group)
        assert total.item() == sum(range(workers)), total
    time.sleep(1)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{workers} workers, all-reduce right", flush=True)
"""
TRAIN = f"{MEET}\ndist.init_process_group('gloo')\nmeet()\ndist.destroy_process_group()\n"
# Lightning's Trainer starts this script again for its second worker of the node.
TRAINER = f"""{MEET}
import pytorch_lightning as lightning
from torch.utils.data import DataLoader

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, _):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_end(self):
        meet()

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = lightning.Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy="ddp", max_epochs=1, **quiet)
trainer.fit(Model(), DataLoader(torch.ones(8, 1), batch_size=2))
"""
# ray shows what its workers print when it comes to it, and at the end of the driver not at all: the driver prints it.
RAY = """
import contextlib, io, os, socket, ray

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
class Worker:
    def address(self):
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]
    def train(self, rank, address, port):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT=str(port))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(TRAIN, {})
        return os.getpid(), said.getvalue()

ray.init(ALONE)
workers = [Worker.remote(), Worker.remote()]
address, port = ray.get(workers[0].address.remote())
pids, said = zip(*ray.get([worker.train.remote(rank, address, port) for rank, worker in enumerate(workers)]))
assert len(set(pids)) == 2
print(*said)
ray.shutdown()
""".replace("TRAIN,", f"{TRAIN!r},")
# Whoever has no token of the cluster's is turned away by ray itself, although they come from inside of the job.
RAY_WITH_TOKEN = """
import subprocess, sys, time
join = "import ray; ray.init('auto')"
""" + RAY.replace(
    "workers = [Worker.remote(), Worker.remote()]",
    """
while len([node for node in ray.nodes() if node["Alive"]]) < 2:
    time.sleep(0.5)
without = subprocess.Popen([sys.executable, "-c", join], env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
                           stderr=subprocess.PIPE, text=True)
assert any("InvalidAuthToken" in line for line in without.stderr), "nobody asked for the token"
without.kill()
workers = [Worker.remote(), Worker.remote()]
""",
).replace("ALONE", "'auto'")
RAY_ALONE = RAY.replace("ALONE", "num_cpus=2, include_dashboard=False, object_store_memory=80_000_000")
SPAWN = f"""{MEET}
import os

def work(local, node):
    dist.init_process_group("gloo", rank=node, world_size=2)
    meet()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(int(os.environ["NODE_RANK"]),), nprocs=1)
"""
# In the shape of Megatron's scripts, and of llamafactory-cli's call.
PRETRAIN = """\
export DISTRIBUTED_ARGS="--nproc_per_node 1 --nnodes 2 --node_rank $NODE_RANK --master_addr node0 --master_port 6000"
torchrun $DISTRIBUTED_ARGS train.py
python -c 'import os, subprocess
words = "torchrun {} train.py".format(os.environ["DISTRIBUTED_ARGS"]).split()
subprocess.run(words, check=True)'
"""


@dataclass(frozen=True)
class Case:
    """What the page's train.py is behind a launcher. ports: how many of a node the stranger tries at least.

    by_key: the user has a key, in a home that both nodes have.
    """

    train: str = TRAIN
    nodes: int = 2
    workers: int = 2
    ports: int = 2
    by_key: bool = False
    seconds: float = 100


# Where they go with the private machine; and nobody is told that ray runs here.
RAYS_FILES = f"export RAY_TMPDIR={DIRECTORY}/ray$NODE_RANK RAY_USAGE_STATS_ENABLED=0\n"
# By a word of the block.
CASES = {
    "python -m securerun": Case(),
    "which torchrun": Case(),
    "bash pretrain.sh": Case(),
    "accelerate launch": Case(),
    "bash cluster.sh": Case(RAY_WITH_TOKEN, by_key=True, seconds=200),
    "NODE_RANK=": Case(TRAINER, workers=4, ports=4),
    "fabric run": Case(),
    "torchx run": Case(nodes=1),
    "deepspeed": Case(),
    "--peers localhost -- python": Case(RAY_ALONE, nodes=1),
    "exec --peers node0,node1 -- python": Case(SPAWN),
}


def case_of(block: Block) -> Case:
    return next(case for word, case in CASES.items() if word in block.text)


@pytest.fixture(scope="module")
def stage(root_and_tools: None) -> Iterator[Stage]:
    if not (LAUNCHERS / ".filled-with").exists():
        raise Lacking("the launchers are missing; scripts/setup.sh test installs them")
    with Network("node0", "node1", "stranger") as network, PrivateMachine() as machine:
        names = machine.place("/etc/hosts").read_text()
        for node in network:
            names += f"{node.ipv4} {node.name}\n"
            # ray asks by which address it would go there, and sends nothing.
            subprocess.run(["ip", "-n", node.namespace, "route", "add", "8.8.8.8", "dev", "eth0"], check=True)
        machine.write(f"{DIRECTORY}/hostfile.txt", "node0 slots=1\nnode1 slots=1\n")
        machine.write(f"{DIRECTORY}/pretrain.sh", PRETRAIN)
        machine.write(f"{DIRECTORY}/cluster.sh", _with_fewer(CLUSTER))
        machine.write("/etc/hosts", names)
        yield Stage(machine, tuple(network), (LAUNCHERS / "bin", COMMANDS))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.sub(r"\W+", " ", block.commands[-1])[:60])
def test_stranger_cannot_reach_any_port_of_what_the_page_has_written(stage: Stage, block: Block) -> None:
    case = case_of(block)
    stage.machine.write(f"{DIRECTORY}/train.py", case.train)
    node0, node1, stranger = stage.nodes
    with (
        _users_key(stage) if case.by_key else contextlib.nullcontext(),
        Probe(stranger, node0) as at_node0,
        Probe(stranger, node1) as at_node1,
    ):
        said = stage.run(*(_on_node(block, rank) for rank in range(case.nodes)), timeout=case.seconds)
        assert eventually(lambda: not [*_jobs(node0), *_jobs(node1)], seconds=30)
    assert f"{case.workers} workers, all-reduce right" in said[0], "\n".join(said)
    for words, probe in zip(said, (at_node0, at_node1)):
        assert "every TCP port of this job closed to all others by shield" in words
        assert probe.reached == set()
        assert len({port for _, port in probe.tried}) >= case.ports, probe.tried


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("run", "accelerate.commands.accelerate_cli import main; main() launch --multi_gpu --num_processes 2"),
        ("main", "lightning_fabric.cli import _main; _main() run --devices 2"),
    ],
    ids=["accelerate", "fabric"],
)
def test_stranger_cannot_reach_a_job_of_a_launcher_that_gets_securerun_in_torchs_place(
    stage: Stage, name: str, command: str
) -> None:
    module, _, options = command.partition("() ")
    program = (
        f"import torch.distributed.run as theirs, securerun.run as ours; theirs.{name} = ours.{name}\nfrom {module}()"
    )
    stage.machine.write(f"{DIRECTORY}/train.py", TRAIN)
    node, _, stranger = stage.nodes
    with Probe(stranger, node) as probe:
        (said,) = stage.run(f"python -c {shlex.quote(program)} {options} train.py")
    assert "2 workers, all-reduce right" in said
    assert "every TCP port of this job closed to all others by shield" in said
    assert probe.reached == set()
    assert len({port for _, port in probe.tried}) >= 4, probe.tried


def _jobs(node: Host) -> list[int]:
    """What is left of a job on a node, its guard too."""
    return [pid for pid, command in node.processes().items() if "probe.py" not in command]


@contextlib.contextmanager
def _users_key(stage: Stage) -> Iterator[None]:
    stage.run("securerunctl setup key")
    yield
    stage.run("rm ~/.config/securerun/key")


def _on_node(block: Block, rank: int) -> str:
    script = _with_fewer("\n".join(block.commands).replace("NODE_RANK=$NODE_RANK", f"NODE_RANK={rank}"))
    if rank and "cluster.sh" in script:
        # ray's own daemons hear of no SIGTERM once they are alone.
        script = f"export SECURERUN_GRACE=1\n! {script}"
    return f"export NODE_RANK={rank}\n{RAYS_FILES}{script}"


def _with_fewer(script: str) -> str:
    for many, one in FEWER:
        script = script.replace(many, one)
    return script
