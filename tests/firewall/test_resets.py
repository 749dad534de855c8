"""Of an IP version that no peer has, opening packets are answered with a reset: clients take the other at once."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator

import kernel
import plans
import pytest
from hosts import Host, Network

from securerun.ctl.plan import render
from securerun.firewall import dispatcher, nftables
from securerun.firewall.policy import Policy, PortRange
from securerun.linux.networks import collapse

RUN, OTHER = "0123456789ab", "ba9876543210"
BACKENDS = ("iptables", kernel.OWNED_NFTABLES, "legacy")
CLOSED, OPEN = 29500, 29501
OPENED, REFUSED, SILENT = "opened", "refused", "silent"
EMPTY = dispatcher.Dispatcher(exists=False, rules=(), jumps=(), jumped_to_first=False)

LISTEN = """
import socket, sys
both = dict(family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
listeners = [socket.create_server(("::", int(port)), **both) for port in sys.argv[1:]]
print("listening", flush=True)
sys.stdin.read()
"""

# Installs a policy for each line of its input, and says who was denied at the end of it.
HOLD = """
import ipaddress, sys
from securerun.firewall import dispatcher, nftables
from securerun.firewall.backends import open_chains
from securerun.firewall.droplog import open_drop_log
from securerun.firewall.policy import Policy, PortRange
from securerun.linux.networks import collapse
backend, run_id, is_known = sys.argv[1:]
if is_known == "unknown":
    dispatcher.RESET, nftables.RESET = "NOBODYKNOWS", "reject with nobody knows"
ports = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))
chains, drops = open_chains(backend, run_id), open_drop_log(run_id)
for line in sys.stdin:
    chains.install(Policy(run_id, ports, collapse(map(ipaddress.ip_network, line.split()))), drops.group)
    print("silent" if chains.resets.missing else "stands", flush=True)
drops.read()
print([(str(denial.source), denial.port) for denial in drops.denied()], flush=True)
chains.remove()
"""

CONNECT = """
import json, socket, sys
found = []
for address, port in json.loads(sys.argv[1]):
    try:
        socket.create_connection((address, port), 0.4).close()
        found.append("opened")
    except ConnectionRefusedError:
        found.append("refused")
    except TimeoutError:
        found.append("silent")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def network(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "node1", "stranger") as hosts, running(hosts["node0"], LISTEN, str(CLOSED), str(OPEN)):
        yield hosts


@contextlib.contextmanager
def running(host: Host, program: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    process = host.popen([sys.executable, "-c", program, *words], stdin=subprocess.PIPE, stderr=None)
    assert process.stdin is not None and process.stdout is not None
    try:
        if program == LISTEN:
            assert process.stdout.readline() == "listening\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=30)


@contextlib.contextmanager
def held(network: Network, backend: str, *peers: str, run: str = RUN, known: str = "known") -> Iterator[Holder]:
    with running(network["node0"], HOLD, backend, run, known) as process:
        holder = Holder(process)
        assert holder.install(*peers) == ("stands" if known == "known" else "silent")
        yield holder


class Holder:
    """The port chains of one run on node0."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def install(self, *peers: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(peers) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def denied(self) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        return self._process.stdout.readline()


def heard(network: Network, origin: str, port: int = CLOSED) -> tuple[str, str]:
    """What a host hears from a port of node0 over IPv4 and IPv6."""
    targets = json.dumps([(address, port) for address in network["node0"].addresses])
    done = network[origin].run([sys.executable, "-c", CONNECT, targets], check=True)
    over4, over6 = json.loads(done.stdout)
    return over4, over6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_version_that_no_peer_has_is_answered_and_strangers_of_the_other_hear_nothing(
    network: Network, backend: str
) -> None:
    node1, stranger = network["node1"], network["stranger"]
    with held(network, backend, node1.ipv4) as chains:
        assert heard(network, "node1") == (OPENED, REFUSED)
        assert heard(network, "stranger") == (SILENT, REFUSED)
        assert heard(network, "stranger", OPEN) == heard(network, "node0") == (OPENED, OPENED)
        assert chains.install(node1.ipv6) == "stands"
        assert heard(network, "node1") == (REFUSED, OPENED)
        assert heard(network, "stranger") == (REFUSED, SILENT)
        denied = chains.denied()
    assert str((node1.ipv6, CLOSED)) in denied, "who is answered is turned away, and counted"
    assert str((stranger.ipv4, CLOSED)) in denied
    assert heard(network, "stranger") == (OPENED, OPENED)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_peers_and_with_peers_of_both_versions_strangers_hear_nothing(network: Network, backend: str) -> None:
    with held(network, backend) as chains:
        assert heard(network, "node1") == (SILENT, SILENT)
        chains.install(*network["node1"].addresses)
        assert heard(network, "node1") == (OPENED, OPENED)
        assert heard(network, "stranger") == (SILENT, SILENT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_the_kernel_has_no_resets_the_other_version_is_dropped_in_silence(network: Network, backend: str) -> None:
    with held(network, backend, network["node1"].ipv4, known="unknown"):
        assert heard(network, "node1") == (OPENED, SILENT)
        assert heard(network, "stranger") == (SILENT, SILENT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peers_of_another_run_with_the_same_ports_pass_by_the_reset_of_this_one(network: Network, backend: str) -> None:
    node1, stranger = network["node1"], network["stranger"]
    with held(network, backend, node1.ipv4), held(network, backend, *stranger.addresses, run=OTHER):
        assert heard(network, "stranger") == (OPENED, OPENED)
        assert heard(network, "node1") in {(OPENED, REFUSED), (OPENED, SILENT)}, "either run's rule may be the first"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_that_are_put_back_answer_as_before(network: Network, backend: str) -> None:
    node, peer = network["node0"], network["node1"].ipv4
    flushes = {
        "iptables": [["iptables", "-F"], ["ip6tables", "-F"]],
        "legacy": [["iptables-legacy", "-F"], ["ip6tables-legacy", "-F"]],
    }
    with held(network, backend, peer) as chains:
        # An nftables table that has an owner cannot be flushed.
        for flush in flushes.get(backend, []):
            node.run(flush, check=True)
        assert chains.install(peer) == "stands"
        assert heard(network, "node1") == (OPENED, REFUSED)
        assert heard(network, "stranger") == (SILENT, REFUSED)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_a_script_answers_as_a_run_does_or_drops_where_the_kernel_cannot(
    network: Network, backend: str, is_known: bool
) -> None:
    node, peer = network["node0"], network["node1"].ipv4
    text = render(plans.plan((peer,), firewall=backend), "sh")
    if not is_known:
        text = text.replace("tcp-reset", "nobody-knows").replace("with tcp reset", "with nobody knows")
    node.run(["sh", "-s", "up"], text_input=text, check=True)
    node.run(["sh", "-s", "up"], text_input=text, check=True)
    assert heard(network, "node1") == (OPENED, REFUSED if is_known else SILENT)
    assert heard(network, "stranger") == (SILENT, REFUSED if is_known else SILENT)
    node.run(["sh", "-s", "down"], text_input=text, check=True)
    assert heard(network, "stranger") == (OPENED, OPENED)


@pytest.mark.parametrize(
    ("peers", "answered"),
    [((), None), (("10.0.0.1",), 6), (("fd00::1",), 4), (("10.0.0.1", "fd00::1"), None), (("0.0.0.0/0",), 6)],
)
def test_one_version_is_answered_where_all_peers_are_of_the_other(peers: tuple[str, ...], answered: int | None) -> None:
    policy = Policy(RUN, (PortRange(CLOSED, CLOSED, "x"),), collapse(map(ipaddress.ip_network, peers)))
    assert policy.answered_version == answered
    for version in (4, 6):
        rules = dispatcher.render_install(policy, version, EMPTY)
        assert rules.count("-j REJECT --reject-with tcp-reset") == (version == answered)
        assert rules.count("-m limit --limit 100/sec ") == (version == answered)
        assert rules.count("-j DROP") == 1
    text = nftables.render(policy, None)
    assert text.count("counter reject with tcp reset") == (answered is not None)
    limited = "limit rate 100/second burst 100 packets counter reject"
    assert text.count(f"meta nfproto ipv{answered} {limited}") == (answered is not None)
    assert text.count("counter drop") == 1
