"""What the layers cost the data of a job: nanoseconds a packet in the shield, and seconds of bulk data and all-reduce.

Runs as root. First the shield's program on data packets, beside an empty program and another empty one, by the kernel's
own account of a program's runs (BPF_ENABLE_STATS, which ends with its descriptor, and changes no sysctl). Then two
ranks on two hosts, around which each layer is put and taken away again in turns, beside none and, as a control, none.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import os
import socket
import statistics
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

from findings import Finding, finding, progress, run

# After findings, which makes the tests' modules known.
from cgroups import Cgroup, inside, new_cgroup, socket_made_in  # isort: skip
from hosts import Host, Network
from layers import addresses

from securerun.firewall.backends import open_chains
from securerun.firewall.policy import Policy, PortRange
from securerun.firewall.shield import Shield
from securerun.linux import bpf, libc
from securerun.linux.assembler import R0, assemble, calculate, leave
from securerun.linux.bpf import AttachFlags, AttachType, Program
from securerun.linux.networks import collapse

GOAL_NANOSECONDS = 5.0
PORT = 29500
PORTS = (PortRange(PORT, PORT, "master port"), PortRange(60000, 60015, "HCCL"))
LAYERS = ("none", "control", "shield", "iptables", "nftables", "legacy")
PEERS = 10_000
RUN = "0123456789ab"
MEBIBYTE = 1 << 20
# Bytes, and how many all-reduces one measurement is.
REDUCED = {"1 KB": (1 << 10, 300), "1 MB": (1 << 20, 20), "64 MB": (64 << 20, 1)}
BULK_MEBIBYTES = 256
_ENABLE_STATS = 32
_RANK = Path(__file__).resolve().parent / "rank.py"
_RANK_SECONDS = 120.0


def policy() -> Policy:
    ours = ipaddress.IPv4Network("10.77.0.0/24")
    return Policy(RUN, PORTS, collapse([ours, *addresses(PEERS, "random")]))


# --- the shield's program -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A program and, behind it, a connection that data comes in through."""

    name: str
    program: Program
    sender: socket.socket
    receiver: socket.socket

    def nanoseconds_a_run(self, mebibytes: int) -> float:
        """Over the runs that so much data makes."""
        time_before, runs_before = runs_of(self.program)
        exchange(self.sender, self.receiver, mebibytes)
        time_after, runs_after = runs_of(self.program)
        return (time_after - time_before) / (runs_after - runs_before)


def runs_of(program: Program) -> tuple[int, int]:
    """Nanoseconds that a program ran, and how often (struct bpf_prog_info: run_time_ns, run_cnt)."""
    nanoseconds, count = struct.unpack_from("=192xQQ", bpf._information(program.fileno(), bytes(208)))
    return nanoseconds, count


@contextmanager
def run_times() -> Iterator[None]:
    """While the block runs, the kernel notes how long programs run."""
    attributes = ctypes.create_string_buffer(256)
    number = bpf._system_call_number(os.uname().machine)
    descriptor = libc.library.syscall(
        ctypes.c_long(number), ctypes.c_int(_ENABLE_STATS), attributes, ctypes.c_uint(256)
    )
    if descriptor < 0:
        raise SystemExit("this kernel keeps no account of programs' runs (BPF_ENABLE_STATS, Linux 5.8)")
    try:
        yield
    finally:
        os.close(descriptor)


def exchange(sender: socket.socket, receiver: socket.socket, mebibytes: int) -> None:
    room = bytearray(MEBIBYTE)
    sending = threading.Thread(target=send, args=(sender, mebibytes))
    sending.start()
    missing = mebibytes * MEBIBYTE
    while missing:
        missing -= receiver.recv_into(room, min(missing, MEBIBYTE))
    sending.join()


def send(sender: socket.socket, mebibytes: int) -> None:
    data = bytes(MEBIBYTE)
    for _ in range(mebibytes):
        sender.sendall(data)


def make_counted(name: str, node: Host, peer: Host, stack: ExitStack) -> Counted:
    cgroup = stack.enter_context(new_cgroup())
    with inside(node):
        if name == "shield":
            shield = Shield.attach(cgroup.descriptor, policy())
            stack.callback(shield.close)
            program = shield._program
        else:
            program = stack.enter_context(Program.load("empty", assemble((calculate(R0, "=", 1), leave()), {})))
            program.attach(cgroup.descriptor, AttachType.CGROUP_INET_INGRESS, AttachFlags.ALLOW_MULTI)
        listener = socket_made_in(cgroup, lambda: socket.create_server(("", 0)))
    with listener, inside(peer):
        sender = stack.enter_context(socket.create_connection((node.ipv4, listener.getsockname()[1])))
        receiver = stack.enter_context(listener.accept()[0])
    return Counted(name, program, sender, receiver)


def measure_program(node: Host, peer: Host, *, quick: bool) -> Iterator[Finding]:
    words = {"empty": "an empty program", "equal": "another empty program", "shield": "the shield"}
    with ExitStack() as stack, run_times():
        counted = [make_counted(name, node, peer, stack) for name in words]
        yield from compare_runs("traffic", words, counted, quick=quick)


def compare_runs(
    prefix: str, words: Mapping[str, str], counted: Sequence[Counted], *, quick: bool
) -> Iterator[Finding]:
    """Measure programs on data packets, in turns: what each takes, and what above the first, which is empty.

    words: what each is, by its name; the goal is the last one's.
    """
    found: dict[str, list[float]] = {one.name: [] for one in counted}
    for number in range(4 if quick else 40):
        turn = number % len(counted)
        for one in (*counted[turn:], *counted[:turn]):
            found[one.name].append(one.nanoseconds_a_run(16 if quick else 64))
    for name, samples in found.items():
        yield finding(f"{prefix}.run.{name}", f"{words[name]}: one run on a data packet, as counted", "ns", samples)
    empty, *others = found
    for name in others:
        above = [sample - before for sample, before in zip(found[name], found[empty])]
        what = f"{words[name]}: above an empty program, a data packet"
        yield finding(
            f"{prefix}.above.{name}", what, "ns", above, goal=GOAL_NANOSECONDS if name == others[-1] else None
        )


# --- a job's data ---------------------------------------------------------------------------------------


class Ranks:
    """Two ranks, each on a host and in a cgroup of its own."""

    def __init__(self, hosts: tuple[Host, Host], cgroups: tuple[Cgroup, Cgroup]) -> None:
        self._processes: list[Popen[str]] = [
            host.popen([sys.executable, _RANK, str(number), hosts[0].ipv4, cgroup.path], stdin=PIPE, stderr=None)
            for number, (host, cgroup) in enumerate(zip(hosts, cgroups))
        ]
        self._heard()

    def ask(self, first: str, second: str) -> float:
        """Give each rank its order; the seconds of the slower one."""
        for process, order in zip(self._processes, (first, second)):
            print(order, file=process.stdin, flush=True)
        return max(map(float, self._heard()))

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=_RANK_SECONDS)

    def _heard(self) -> list[str]:
        lines = [process.stdout.readline() for process in self._processes if process.stdout is not None]
        if not all(lines):
            raise SystemExit("a rank ended")
        return lines


@contextmanager
def around(layer: str, hosts: tuple[Host, Host], cgroups: tuple[Cgroup, Cgroup]) -> Iterator[None]:
    """The layer on both hosts, for the length of the block."""
    with ExitStack() as stack:
        for host, cgroup in zip(hosts, cgroups):
            if layer == "shield":
                shield = Shield.attach(cgroup.descriptor, policy())
                stack.callback(shield.close)
                stack.callback(shield.detach)
            elif layer not in ("none", "control"):
                with inside(host):
                    chains = open_chains(layer, RUN)
                    chains.install(policy(), None)
                stack.callback(_remove, host, chains)
        yield


def _remove(host: Host, chains: object) -> None:
    with inside(host):
        chains.remove()  # type: ignore[attr-defined]


def measure_data(hosts: tuple[Host, Host], *, quick: bool) -> Iterator[Finding]:
    found: dict[str, dict[str, list[float]]] = {layer: {} for layer in LAYERS}
    with new_cgroup() as first, new_cgroup() as second:
        ranks = Ranks(hosts, (first, second))
        _measure_layer(ranks, {})  # once unmeasured
        for number in range(2 if quick else 36):
            turn = number % len(LAYERS)
            for layer in LAYERS[turn:] + LAYERS[:turn]:
                with around(layer, hosts, (first, second)):
                    _measure_layer(ranks, found[layer])
            progress(f"round {number + 1}")
        ranks.end()
    for kind in found["none"]:
        none = finding(f"traffic.{kind}.none", f"{kind}, no layer", "ms", found["none"][kind])
        yield none
        spread = _upper_end(found["control"][kind], found["none"][kind])
        for layer in LAYERS[1:]:
            words = f"{kind}, {'no layer again' if layer == 'control' else f'through {layer} with {PEERS} peers'}"
            goal = None if layer == "control" else spread
            yield finding(f"traffic.{kind}.{layer}", words, "ms", found[layer][kind], against=none, goal=goal)


def _measure_layer(ranks: Ranks, found: dict[str, list[float]]) -> None:
    seconds = {
        f"all-reduce {size}": ranks.ask(*[f"reduce {bytes_} {times}"] * 2) for size, (bytes_, times) in REDUCED.items()
    }
    seconds[f"bulk {BULK_MEBIBYTES} MB"] = ranks.ask(f"receive {BULK_MEBIBYTES}", f"send {BULK_MEBIBYTES}")
    for kind, taken in seconds.items():
        found.setdefault(kind, []).append(1000 * taken)


def _upper_end(control: list[float], none: list[float]) -> float:
    """How far up the control, which is the same as none, lies in nine rounds of ten."""
    ratios = [one / other for one, other in zip(control, none)]
    return round(max(1.0, statistics.quantiles(ratios, n=10, method="inclusive")[-1]), 4)


def measure(options: argparse.Namespace) -> Iterator[Finding]:
    with Network("node0", "node1") as network:
        node0, node1 = network
        yield from measure_program(node0, node1, quick=options.quick)
        yield from measure_data((node0, node1), quick=options.quick)


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("traffic", __doc__, measure)


if __name__ == "__main__":
    main()
