"""One of two ranks of benchmarks/traffic.py, which talks to it: one order a line, one answer a line.

rank.py RANK MASTER CGROUP        joins the cgroup, then imports torch and meets the other rank over gloo

reduce BYTES TIMES                all-reduces a tensor; answers the seconds of one
send MEBIBYTES, receive MEBIBYTES one plain TCP connection between the two; answers the seconds
"""

from __future__ import annotations

import os
import socket
import sys
import time

PORT, BULK_PORT = 29500, 29501
MEBIBYTE = 1 << 20


def main(rank: int, master: str, cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w", buffering=1) as members:  # noqa: PTH123 - one write
        members.write("0")
    if str(os.getpid()) not in open(f"{cgroup}/cgroup.procs").read().split():  # noqa: PTH123, SIM115
        raise SystemExit("this rank is not in its cgroup")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://{master}:{PORT}", rank=rank, world_size=2)
    bulk = _bulk_connection(rank, master)
    buffer = bytearray(MEBIBYTE)
    print("ready", flush=True)
    for line in sys.stdin:
        order, *numbers = line.split()
        if order == "reduce":
            tensor = torch.ones(int(numbers[0]) // 4)
            distributed.barrier()
            begin = time.perf_counter()
            for _ in range(int(numbers[1])):
                distributed.all_reduce(tensor)
            seconds = (time.perf_counter() - begin) / int(numbers[1])
        else:
            distributed.barrier()
            begin = time.perf_counter()
            _move(bulk, buffer, order, int(numbers[0]))
            seconds = time.perf_counter() - begin
        print(seconds, flush=True)
    distributed.destroy_process_group()


def _move(bulk: socket.socket, buffer: bytearray, order: str, mebibytes: int) -> None:
    """The receiver's last byte goes back, so that both are done when all of it has arrived."""
    if order == "send":
        for _ in range(mebibytes):
            bulk.sendall(buffer)
        bulk.recv(1)
        return
    missing = mebibytes * MEBIBYTE
    while missing:
        missing -= bulk.recv_into(buffer, min(missing, MEBIBYTE))
    bulk.sendall(b"!")


def _bulk_connection(rank: int, master: str) -> socket.socket:
    from torch import distributed

    if rank == 0:
        with socket.create_server(("", BULK_PORT)) as listener:
            distributed.barrier()
            return listener.accept()[0]
    distributed.barrier()
    return socket.create_connection((master, BULK_PORT))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
