"""What a connection costs a peer: through each layer, with 1 and with 10,000 peers, against none; and under a flood.

Runs as root. One host opens connections to ten others in turns, one without a layer, one more as a control, the others
with one layer each; then a stranger floods each kind of layer with SYNs for some seconds, while a peer goes on.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from findings import Finding, finding, progress, run

# After findings, which makes the tests' modules known.
from cgroups import inside, new_cgroup, socket_made_in  # isort: skip
from hosts import Host, Network
from layers import addresses

from securerun.firewall.backends import open_chains
from securerun.firewall.policy import Policy, PortRange
from securerun.firewall.shield import Shield
from securerun.linux.networks import collapse

PORT = 29500
PORTS = (PortRange(PORT, PORT, "master port"), PortRange(60000, 60015, "HCCL"))
LAYERS = ("shield", "iptables", "nftables", "legacy")
MANY = 10_000
COUNTS = (1, MANY)
GOALS = {"shield": 1.03, "nftables": 1.03, "iptables": 1.10, "legacy": 1.10}
CONNECTS_A_ROUND = 50
LEAST_FLOOD = 100_000
FLOOD_SECONDS = 2.0
_FLOOD = Path(__file__).resolve().parent / "flood.py"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Target:
    """A host that listens on PORT behind one layer. layer: "none" where there is none."""

    layer: str
    peers: int
    host: Host
    listener: socket.socket

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.peers}" if self.layer in LAYERS else self.layer


@dataclass(frozen=True)
class Round:
    """Microseconds of one connect(), and of the whole life of a connection, as medians of a round."""

    connect: float
    life: float


def host_names() -> list[str]:
    return [f"{layer}{count}" for layer in LAYERS for count in COUNTS]


def policy_for(peer: Host, count: int, number: int) -> Policy:
    """The peer and, for many peers, others that it is not the first or the last of."""
    networks = [ipaddress.IPv4Network(peer.ipv4), *(addresses(count, "random") if count > 1 else [])]
    return Policy(f"{number:012x}", PORTS, collapse(networks))


def listen() -> socket.socket:
    return socket.create_server(("", PORT), backlog=4096)


def make_targets(network: Network, peer: Host, stack: ExitStack) -> Iterator[Target]:
    for name in ("none", "control"):
        with inside(network[name]):
            yield Target(name, 0, network[name], stack.enter_context(listen()))
    for number, (layer, count) in enumerate((layer, count) for layer in LAYERS for count in COUNTS):
        host = network[f"{layer}{count}"]
        policy = policy_for(peer, count, number)
        with inside(host):
            if layer == "shield":
                cgroup = stack.enter_context(new_cgroup())
                shield = Shield.attach(cgroup.descriptor, policy)
                stack.callback(shield.close)
                listener = socket_made_in(cgroup, listen)
            else:
                chains = open_chains(layer, policy.run_id)
                chains.install(policy, None)
                listener = listen()
        yield Target(layer, count, host, stack.enter_context(listener))


def measure_round(peer: Host, target: Target) -> Round:
    """Connections one after the other, each accepted and reset, so that none stays behind."""
    connects, lives = [], []
    address = (target.host.ipv4, PORT)
    with inside(peer):
        for _ in range(CONNECTS_A_ROUND):
            begin = time.perf_counter_ns()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                before = time.perf_counter_ns()
                client.connect(address)
                connects.append(time.perf_counter_ns() - before)
                target.listener.accept()[0].close()
            lives.append(time.perf_counter_ns() - begin)
    return Round(statistics.median(connects) / 1000, statistics.median(lives) / 1000)


def measure_latency(peer: Host, targets: list[Target], rounds: int) -> Iterator[Finding]:
    found: dict[str, list[Round]] = {target.name: [] for target in targets}
    for target in targets:
        measure_round(peer, target)  # once unmeasured: neighbours and routes are known from then on
    for number in range(rounds):
        turn = number % len(targets)
        for target in targets[turn:] + targets[:turn]:
            found[target.name].append(measure_round(peer, target))
    kinds = (("latency", "us", "connect() of a peer"), ("life", "us", "a whole connection of a peer's"))
    for kind, unit, words in kinds:
        none: Finding | None = None
        for target in targets:
            samples = [one.connect if kind == "latency" else one.life for one in found[target.name]]
            goal = GOALS.get(target.layer) if kind == "latency" else None
            what = f"{words}, {_through(target)}"
            current = finding(f"connect.{kind}.{target.name}", what, unit, samples, against=none, goal=goal)
            none = none or current
            yield current
            if kind == "life":
                rates = [1e6 / sample for sample in samples]
                yield finding(f"connect.rate.{target.name}", f"connects a second, {_through(target)}", "1/s", rates)


def _through(target: Target) -> str:
    if target.layer == "tag":
        return "through a shield that asks for tags"
    if target.layer not in LAYERS:
        return f"through no layer ({target.name})"
    return f"through {target.layer} with {target.peers} peer{'s' * (target.peers > 1)}"


def mac_of(host: Host) -> str:
    listed = json.loads(host.run(["ip", "-j", "link", "show", "eth0"], check=True).stdout)
    return str(listed[0]["address"])


def measure_flood(
    network: Network,
    peer: Host,
    target: Target,
    seconds: float,
    *,
    prefix: str = "connect",
    wrong: bool = False,
    as_peer: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Finding]:
    """A peer connects, and a stranger tries to, while another stranger floods the port.

    wrong: with wrong tags. as_peer: what this process is in while the peer connects.
    """
    stranger, is_closed = network["stranger"], target.layer != "none"
    command = [sys.executable, str(_FLOOD), "eth0", str(seconds), target.host.ipv4, mac_of(target.host), str(PORT)]
    command += ["tagged"] * wrong
    flood = stranger.popen(command)
    assert flood.stdout is not None
    if flood.stdout.readline() != "begin\n":
        raise SystemExit(f"the flood did not begin: {flood.stderr.read() if flood.stderr else ''}")
    latencies, failed, end = [], 0, time.perf_counter() + seconds
    with inside(stranger):
        attempt = socket.socket()
        attempt.setblocking(False)
        attempt.connect_ex((target.host.ipv4, PORT))
    with as_peer(), inside(peer):
        while time.perf_counter() < end:
            with socket.socket() as client:
                client.settimeout(1.0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                begin = time.perf_counter_ns()
                try:
                    client.connect((target.host.ipv4, PORT))
                    latencies.append((time.perf_counter_ns() - begin) / 1000)
                    target.listener.accept()[0].close()
                except OSError:
                    failed += 1
    sent, took = map(float, flood.stdout.readline().split())
    flood.wait(timeout=10)
    name = f"{prefix}.flood.{target.name}"
    with attempt:
        reached = float(_is_connected(attempt))
    goal = 0.0 if is_closed else None
    words = f"attempts of a stranger under it that came through, of 1, {_through(target)}"
    yield finding(f"{name}.reached", words, "connects", [reached], goal=goal)
    what = f"SYNs a second from invented sources{', with wrong tags' * wrong}, {_through(target)}"
    yield finding(f"{name}.rate", what, "1/s", [sent / took])
    what = f"until one such SYN was dropped, all of it on one processor, {_through(target)}"
    most = 1e6 / LEAST_FLOOD if is_closed else None
    yield finding(f"{name}.each", what, "us", [1e6 * took / sent], goal=most)
    share = 100 * failed / max(1, failed + len(latencies))
    yield finding(
        f"{name}.failed", f"connects of a peer that failed under it, {_through(target)}", "%", [share], goal=goal
    )
    if latencies:
        yield finding(f"{name}.latency", f"connect() of a peer under it, {_through(target)}", "us", latencies[:400])


def _is_connected(attempt: socket.socket) -> bool:
    try:
        attempt.getpeername()
    except OSError:
        return False
    return True


def measure(options: argparse.Namespace) -> Iterator[Finding]:
    names = ["peer", "none", "control", "stranger", *host_names()]
    with Network(*names) as network, ExitStack() as stack:
        peer = network["peer"]
        targets = list(make_targets(network, peer, stack))
        yield from measure_latency(peer, targets, 10 if options.quick else 200)
        flooded = [target for target in targets if target.peers == MANY or target.layer == "none"]
        for target in flooded:
            progress(f"flood, {_through(target)}:")
            yield from measure_flood(network, peer, target, 0.3 if options.quick else FLOOD_SECONDS)


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("connect", __doc__, measure)


if __name__ == "__main__":
    main()
