"""The training of examples/train.py in a worker of torch_npu_run: torch_npu's store, and gloo in HCCL's place.

    torch_npu_run ... tests/ground/npu_train.py [--hccl] [--wait DIRECTORY]

With --hccl each worker has a child that listens on HCCL's ports. With --wait each worker says in DIRECTORY that it has
trained, goes on when there is a file `go on`, and says when it is done.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import train

GROUPS = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hccl", action="store_true")
    parser.add_argument("--wait", type=Path)
    return parser.parse_args()


@contextlib.contextmanager
def hccl() -> Iterator[None]:
    command = [sys.executable, str(Path(__file__).with_name("npu_hccl.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        yield


def wait(directory: Path) -> None:
    (directory / f"trained {dist.get_rank()}").touch()
    while not (directory / "go on").exists():
        time.sleep(0.05)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    importlib.import_module("torch_npu")
    # The default would ask the NPU for its kernels.
    torch.optim.Adam = functools.partial(torch.optim.Adam, foreach=False)
    # torch_npu meets at its own store; it wants to be told rank and size.
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    with hccl() if options.hccl else contextlib.nullcontext():
        train.check_all_reduce(GROUPS)
        train.train(argparse.Namespace(seed=0, epochs=20, batch=256, checkpoint=None))
        if options.wait:
            wait(options.wait)
        dist.barrier()
    rank = dist.get_rank()
    dist.destroy_process_group()
    if options.wait:
        (options.wait / f"done {rank}").touch()


if __name__ == "__main__":
    main()
