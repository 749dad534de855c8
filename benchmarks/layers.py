"""How long a policy takes to the kernel and back: 1 to 100,000 peers, each layer and each backend.

Runs as root, in a network namespace of its own. Each measurement is a new process that has loaded what the guard has
loaded when its order comes, and no library of a backend. In turns with the commands that an administrator would use:
`nft -f` with the very text that securerun's backend renders, `iptables-restore` and a script with one rule a peer.
"""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

from findings import Finding, finding, progress, run

# After findings, which makes the tests' modules known.
from cgroups import in_child, inside, new_cgroup  # isort: skip
from hosts import Host, Network

from securerun.firewall import nftables
from securerun.firewall.backends import open_chains
from securerun.firewall.policy import Policy, PortRange
from securerun.firewall.shield import Shield
from securerun.linux.networks import collapse

GOAL_PEERS, GOAL_MILLISECONDS = 10_000, 60.0
# 100,000 may cost what ten times 10,000 cost; a little more is noise.
GOAL_GROWTH = 11.0
SIZES = (1, 100, 10_000, 100_000)
QUICK_SIZES = (1, 100, 10_000)
SHAPES = ("random", "contiguous")
# A rule a call takes longer with each rule that is there: 100 of them say enough.
MOST_CALLS = 100
MOST_RULES = 10_000
RUN = "0123456789ab"
PORTS = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))
LOG_GROUP = 4713
_COMMANDS = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}


@dataclass(frozen=True)
class Seconds:
    """One policy's way to the kernel, and back."""

    install: float
    remove: float


Work = Callable[[Policy], Seconds]


def addresses(count: int, shape: str) -> list[ipaddress.IPv4Network]:
    """As many IPv4 hosts, no two of them the same: anywhere in 10.0.0.0/8, or one after the other."""
    if shape == "contiguous":
        numbers = list(range(1, count + 1))
    else:
        numbers = random.Random(count).sample(range(1, 1 << 24), count)  # noqa: S311 - no secret
    return [ipaddress.IPv4Network((10 << 24) + number) for number in numbers]


def shield(policy: Policy) -> Seconds:
    with new_cgroup() as cgroup:
        start = time.perf_counter()
        made = Shield.attach(cgroup.descriptor, policy)
        installed = time.perf_counter()
        made.detach()
        made.close()
        end = time.perf_counter()
    return Seconds(installed - start, end - installed)


def chains(backend: str) -> Work:
    def work(policy: Policy) -> Seconds:
        start = time.perf_counter()
        made = open_chains(backend, policy.run_id)
        made.install(policy, LOG_GROUP)
        installed = time.perf_counter()
        made.remove()
        return Seconds(installed - start, time.perf_counter() - installed)

    return work


def nft_command(policy: Policy) -> Seconds:
    """The table goes with the command's socket, so there is no way back to measure."""
    text = nftables.render(policy, LOG_GROUP)
    start = time.perf_counter()
    _run(["nft", "-f", "-"], text)
    return Seconds(time.perf_counter() - start, 0.0)


def restore_command(policy: Policy) -> Seconds:
    """iptables-restore, a rule a peer, IPv4 alone."""
    passes = [f"-A SECURERUN -s {peer} -p tcp -m multiport --dports {_PORT_LIST} -j RETURN" for peer in policy.peers]
    lines = ["*filter", ":SECURERUN - [0:0]", "-A INPUT -p tcp --syn -j SECURERUN", *passes, _DROP, "COMMIT", ""]
    start = time.perf_counter()
    _run(["iptables-restore", "--noflush"], "\n".join(lines))
    installed = time.perf_counter()
    _run(["iptables-restore", "--noflush"], "*filter\n-F INPUT\n-F SECURERUN\n-X SECURERUN\nCOMMIT\n")
    return Seconds(installed - start, time.perf_counter() - installed)


def one_call_a_rule(policy: Policy) -> Seconds:
    """What scripts do: `iptables -A INPUT -s PEER ... -j ACCEPT` again and again, then the drop; and -D for each."""
    ports = ["-p", "tcp", "-m", "multiport", "--dports", _PORT_LIST]
    rules = [["INPUT", "-s", str(peer), *ports, "-j", "ACCEPT"] for peer in policy.peers]
    rules.append(["INPUT", *ports, "-j", "DROP"])
    start = time.perf_counter()
    for rule in rules:
        _run(["iptables", "-A", *rule])
    installed = time.perf_counter()
    for rule in rules:
        _run(["iptables", "-D", *rule])
    return Seconds(installed - start, time.perf_counter() - installed)


_PORT_LIST = "29500,60000:60015"
_DROP = f"-A SECURERUN -p tcp -m multiport --dports {_PORT_LIST} -j DROP"
LAYERS: dict[str, Work] = {
    "shield": shield,
    "iptables": chains("iptables"),
    "nftables": chains("nftables"),
    "legacy": chains("legacy"),
}
OTHERS: dict[str, Work] = {
    "nft -f": nft_command,
    "iptables-restore": restore_command,
    "one iptables call a rule": one_call_a_rule,
}
_MOST_PEERS = {"iptables-restore": MOST_RULES, "one iptables call a rule": MOST_CALLS}


def _run(command: list[str], text: str = "") -> None:
    subprocess.run(command, input=text, text=True, env=_COMMANDS, check=True, stdout=subprocess.DEVNULL)


def measure_one(host: Host, work: Work, policy: Policy) -> Seconds:
    """In a process of its own, in the host."""

    def as_a_guard() -> Seconds:
        gc.disable()  # until its job is guarded
        return work(policy)

    with inside(host):
        return in_child(as_a_guard)


def understand(networks: list[ipaddress.IPv4Network]) -> float:
    """Seconds from the list of networks to the policy: part of every launch, twice."""
    start = time.perf_counter()
    Policy(RUN, PORTS, collapse(networks))
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> Iterator[Finding]:
    sizes = QUICK_SIZES if options.quick else SIZES
    with Network("alone") as network:
        for shape in SHAPES:
            at_goal: dict[str, Finding] = {}
            for size in sizes:
                for found in measure_size(network["alone"], size, shape, rounds(size, quick=options.quick)):
                    yield found
                    _, layer, _, kind, count = found.name.split(".")
                    if layer not in LAYERS or kind != "install":
                        continue
                    if int(count) == GOAL_PEERS:
                        at_goal[layer] = found
                    elif int(count) == 10 * GOAL_PEERS:
                        what = (
                            f"{layer}, {shape} peers: installing ten times {GOAL_PEERS} peers against installing them"
                        )
                        name = f"layers.{layer}.{shape}.growth"
                        yield finding(name, what, "ms", found.samples, against=at_goal[layer], goal=GOAL_GROWTH)


def rounds(size: int, *, quick: bool) -> int:
    return 1 if quick else 5 if size > GOAL_PEERS else 9


def measure_size(host: Host, size: int, shape: str, count: int) -> Iterator[Finding]:
    networks = addresses(size, shape)
    policy = Policy(RUN, PORTS, collapse(networks))
    works = {name: work for name, work in {**LAYERS, **OTHERS}.items() if size <= _MOST_PEERS.get(name, size)}
    found: dict[str, list[Seconds]] = defaultdict(list)
    understood = []
    for number in range(count):
        understood.append(1000 * understand(networks))
        # Each first in its turn, so that what changes on the machine meanwhile meets all.
        names = list(works)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(measure_one(host, works[name], policy))
    progress(f"{size} {shape} peers in {len(policy.peers)} networks:")
    yield finding(f"layers.policy.{shape}.build.{size}", f"list of {size} {shape} peers to policy", "ms", understood)
    for name, seconds in found.items():
        goal = GOAL_MILLISECONDS if name in LAYERS and size == GOAL_PEERS and shape == "random" else None
        place = f"layers.{name}.{shape}"
        yield finding(
            f"{place}.install.{size}",
            f"{name}: policy with {size} {shape} peers to kernel",
            "ms",
            [1000 * one.install for one in seconds],
            goal=goal,
        )
        if name != "nft -f":
            removed = [1000 * one.remove for one in seconds]
            yield finding(f"{place}.remove.{size}", f"{name}: {size} {shape} peers out again", "ms", removed)


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("layers", __doc__, measure)


if __name__ == "__main__":
    main()
