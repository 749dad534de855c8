"""Two spirals, told apart by a small network that is trained with DistributedDataParallel on gloo (CPU).

    torchrun  --nproc-per-node 2 examples/train.py
    securerun --nproc-per-node 2 examples/train.py --epochs 60 --checkpoint spirals.pt

Each worker sees its own share of the points. Rank 0 prints the loss of all workers as it falls, checks that
an all-reduce adds up, and saves a checkpoint. With the same seed and number of workers the result is the same.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

POINTS = 1024  # of each worker
TURNS = 1.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=256, help="points a worker and step (default: 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, default=0, help="extra process groups; gloo opens a port for each")
    parser.add_argument("--checkpoint", type=Path, help="where rank 0 saves the trained model")
    return parser.parse_args()


def two_spirals(points: int) -> tuple[Tensor, Tensor]:
    """Points on two spirals wound into each other, and which of the two each is on."""
    label = torch.arange(points) % 2
    radius = torch.rand(points).sqrt()
    angle = TURNS * 2 * math.pi * radius + math.pi * label
    place = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
    return place + 0.01 * torch.randn(points, 2), label.float()


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(start_dim=0)
    )


def check_all_reduce(groups: int) -> None:
    """Every worker adds its rank, in the default group and in each extra one, and must get the sum of all."""
    expected = sum(range(dist.get_world_size()))
    for group in [None, *(dist.new_group() for _ in range(groups))]:
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=group)
        if total.item() != expected:
            raise RuntimeError(f"all-reduce gave {total.item()}, expected {expected}")


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, points: Tensor, labels: Tensor, batch: int
) -> float:
    """One pass over this worker's points; returns the mean loss over all workers."""
    losses = torch.zeros(())
    order = torch.randperm(len(points)).split(batch)
    for chosen in order:
        loss = nn.functional.binary_cross_entropy_with_logits(model(points[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.detach()
    dist.all_reduce(losses)
    mean: float = losses.item() / (len(order) * dist.get_world_size())
    return mean


def train(options: argparse.Namespace) -> None:
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(options.seed)  # the same points and first weights everywhere
    points, labels = (share.chunk(workers)[rank] for share in two_spirals(POINTS * workers))
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    torch.manual_seed(options.seed + rank)  # but each worker's own order
    loss = math.nan
    for epoch in range(1, options.epochs + 1):
        loss = train_epoch(model, optimizer, points, labels, options.batch)
        if rank == 0 and (epoch == 1 or epoch % 10 == 0):
            print(f"epoch {epoch} loss {loss:.4f}", flush=True)
    if rank == 0:
        if options.checkpoint:
            torch.save({"model": model.module.state_dict(), "loss": loss}, options.checkpoint)
        print(f"loss {loss:.4f}", flush=True)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)  # the workers share the cores
    dist.init_process_group("gloo")
    try:
        check_all_reduce(options.groups)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} workers, all-reduce right in {1 + options.groups} groups", flush=True)
        train(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
