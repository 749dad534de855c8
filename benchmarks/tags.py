"""What it costs a job that its nodes know each other by a key: connect(), data, strangers, and its launch.

Runs as root. A node opens connections to hosts in turns: to one without a shield, to one more as a control, to one
whose shield goes by the node's address, and to one that asks for tags. Then the program that judges tags on data
packets, beside an empty one, by the kernel's own account; what a launch takes for it, in the guard: the programs, the
proof, and the key; and a flood of SYNs with wrong tags, while the node goes on connecting.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from findings import Finding, finding, progress, run

# After findings, which makes the tests' modules known.
from cgroups import Cgroup, enter, inside, new_cgroup, socket_made_in  # isort: skip
from connect import Target, listen, measure_flood, measure_round
from guard import lease_seconds
from hosts import Host, Network, cgroup2_mount
from traffic import Counted, compare_runs, run_times

from securerun.firewall import tag, tag_proof
from securerun.firewall.job_key import JobKey
from securerun.firewall.policy import Admission, Policy, PortRange, Purpose
from securerun.firewall.shield import Shield
from securerun.linux.assembler import R0, assemble, calculate, leave
from securerun.linux.bpf import AttachFlags, AttachType, Program
from securerun.linux.networks import collapse

GOAL_RATIO, GOAL_MILLISECONDS = 1.05, 10.0
FLOOD_SECONDS = 10.0
KEY = JobKey(bytes(range(16)), bytes(range(16, 32)), "01234567")
PORT = 29500
PORTS = (PortRange(PORT, PORT, Purpose.STATIC_STORE),)
RUN = "0123456789ab"
BY_TAG = Policy(RUN, PORTS, (), admission=Admission.TAG, tagged=tag.WHERE_NODES_ARE)
TARGETS = ("none", "control", "address", "tag")


def by_address(peer: Host) -> Policy:
    return Policy(RUN, PORTS, collapse([ipaddress.ip_network(peer.ipv4)]))


def hung(cgroup: Cgroup, policy: Policy, stack: ExitStack) -> Shield:
    """A shield on a cgroup, until the stack ends."""
    made = Shield.attach(cgroup.descriptor, policy, KEY if policy.has_tags else None)
    stack.callback(made.close)
    stack.callback(made.detach)
    return made


@contextmanager
def entered(cgroup: Cgroup) -> Iterator[None]:
    """This process in a cgroup, where sockets that it makes write tags."""
    mount = cgroup2_mount()
    assert mount is not None
    here = Path("/proc/self/cgroup").read_text().split("0::")[1].splitlines()[0].lstrip("/")
    cgroup.enter()
    try:
        yield
    finally:
        enter(mount / here)


# --- connections --------------------------------------------------------------------------------------


def make_targets(network: Network, stack: ExitStack) -> Iterator[Target]:
    policies = {"address": by_address(network["peer"]), "tag": BY_TAG}
    for name in TARGETS:
        cgroup = stack.enter_context(new_cgroup())
        with inside(network[f"to-{name}"]):
            if name in policies:
                hung(cgroup, policies[name], stack)
            listener = stack.enter_context(socket_made_in(cgroup, listen))
        yield Target(name, 0, network[f"to-{name}"], listener)


def measure_connects(peer: Host, node: Cgroup, targets: list[Target], rounds: int) -> Iterator[Finding]:
    found: dict[str, list[float]] = {target.layer: [] for target in targets}
    words = {
        "none": "no shield, and no tag",
        "control": "the same again",
        "address": "a shield that goes by the address, and no tag",
        "tag": "a shield that asks for a tag, which is written and judged",
    }
    with ExitStack() as plain:
        elsewhere = plain.enter_context(new_cgroup())
        for number in range(rounds + 1):
            turn = number % len(targets)
            for target in targets[turn:] + targets[:turn]:
                with entered(node if target.layer == "tag" else elsewhere):
                    measured = measure_round(peer, target).connect
                if number:  # once unmeasured: neighbours and routes are known from then on
                    found[target.layer].append(measured)
    none: Finding | None = None
    for name, samples in found.items():
        goal = GOAL_RATIO if name == "tag" else None
        current = finding(f"tags.connect.{name}", f"connect(), {words[name]}", "us", samples, against=none, goal=goal)
        none = none or current
        yield current


# --- data ---------------------------------------------------------------------------------------------


def make_counted(name: str, host: Host, peer: Host, node: Cgroup, stack: ExitStack) -> Counted:
    """A program on a cgroup of its own, and a connection of the node's to a socket in it."""
    cgroup = stack.enter_context(new_cgroup())
    if name == "tag":
        program = hung(cgroup, BY_TAG, stack)._program
    else:
        program = stack.enter_context(Program.load("empty", assemble((calculate(R0, "=", 1), leave()), {})))
        program.attach(cgroup.descriptor, AttachType.CGROUP_INET_INGRESS, AttachFlags.ALLOW_MULTI)
    with inside(host):
        listener = socket_made_in(cgroup, lambda: socket.create_server(("", 0)))

    def connecting() -> socket.socket:
        with inside(peer):
            return socket.create_connection((host.ipv4, listener.getsockname()[1]))

    with listener:
        sender = stack.enter_context(socket_made_in(node, connecting))
        receiver = stack.enter_context(listener.accept()[0])
    return Counted(name, program, sender, receiver)


def measure_data(host: Host, peer: Host, node: Cgroup, *, quick: bool) -> Iterator[Finding]:
    words = {"empty": "an empty program", "equal": "another empty program", "tag": "the program that judges tags"}
    with ExitStack() as stack, run_times():
        counted = [make_counted(name, host, peer, node, stack) for name in words]
        yield from compare_runs("tags", words, counted, quick=quick)


# --- a launch -----------------------------------------------------------------------------------------


def measure_programs(peer: Host, rounds: int) -> Iterator[Finding]:
    """What a shield by tags takes above one by addresses: its own hanging up, and the proof that tags work."""
    found: dict[str, list[float]] = {"address": [], "tag": [], "proof": []}
    with inside(peer), new_cgroup() as cgroup:
        for _ in range(rounds):
            for name, policy in (("address", by_address(peer)), ("tag", BY_TAG)):
                with ExitStack() as stack:
                    begin = time.perf_counter()
                    hung(cgroup, policy, stack)
                    found[name].append(1000 * (time.perf_counter() - begin))
            begin = time.perf_counter()
            tag_proof.require_tags(cgroup.descriptor)
            found["proof"].append(1000 * (time.perf_counter() - begin))
    yield finding("tags.launch.address", "hanging up a shield that goes by addresses", "ms", found["address"])
    yield finding("tags.launch.tag", "hanging up a shield that goes by tags", "ms", found["tag"])
    yield finding("tags.launch.proof", "the proof that tags work", "ms", found["proof"])
    more = [tags + proof - plain for tags, proof, plain in zip(found["tag"], found["proof"], found["address"])]
    what = "programs and proof of tags, above a shield that goes by addresses"
    yield finding("tags.launch.more", what, "ms", more, goal=GOAL_MILLISECONDS)


def measure_leases(host: Host, peer: Host, rounds: int) -> Iterator[Finding]:
    """A whole order, with a key and without, in turns: what is loaded and derived for it is in there too."""
    found: dict[str, list[float]] = {"none": [], "key": []}
    with inside(host):
        for _ in range(rounds):
            for name, key in (("none", ""), ("key", KEY_OF_ORDER)):
                found[name].append(1000 * lease_seconds(host, peer.ipv4, secrets.token_hex(6), key))
    none = finding("tags.lease.none", "from the order to the answer, without a key", "ms", found["none"])
    yield none
    yield finding("tags.lease.key", "from the order to the answer, with a key", "ms", found["key"], against=none)


KEY_OF_ORDER = bytes(range(32)).hex()


def measure(options: argparse.Namespace) -> Iterator[Finding]:
    quick = options.quick
    with Network("peer", *(f"to-{name}" for name in TARGETS), "stranger") as network, ExitStack() as stack:
        peer = network["peer"]
        node = stack.enter_context(new_cgroup())
        hung(node, BY_TAG, stack)
        targets = list(make_targets(network, stack))
        yield from measure_connects(peer, node, targets, 10 if quick else 400)
        yield from measure_data(network["to-none"], peer, node, quick=quick)
        yield from measure_programs(peer, 3 if quick else 40)
        yield from measure_leases(network["to-none"], peer, 1 if quick else 15)
        tagged = targets[-1]
        progress("a flood of wrong tags:")
        seconds = 0.3 if quick else FLOOD_SECONDS
        of_node = partial(entered, node)
        yield from measure_flood(network, peer, tagged, seconds, prefix="tags", wrong=True, as_peer=of_node)


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root")
    run("tags", __doc__, measure)


if __name__ == "__main__":
    main()
