"""securerunctl plan: each form is the real thing, loaded in hosts of their own, and closes what securerun closes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kernel
import plans
import pytest
from checkout import COMMANDS
from hosts import Host, Network, finish
from lacking import needed
from probe import reach

from securerun.ctl.plan import render
from securerun.errors import PolicyError
from securerun.firewall.policy import PortRange
from securerun.firewall.script import lasting_id
from securerun.protection.plan import Plan

SECURERUNCTL = str(COMMANDS / "securerunctl")
SHELLCHECK = COMMANDS / "shellcheck"
BACKENDS = ("iptables", "nftables", "legacy")
PLANNED = (29500, 60000, 60007, 60015)
# Not in the plan: what a rule for ports must leave alone.
OTHER = 60016

LISTEN = """
import socket, sys
# Nobody accepts what the tests of a whole file connect.
both = dict(family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
listeners = [socket.create_server(("::", int(port)), **both) for port in sys.argv[1:]]
print("listening", flush=True)
sys.stdin.read()
"""

# Loads a text as libnftables is given it by the guard, and owns the table until the end of input.
OWN = """
import sys
from securerun.firewall.libnftables import Nftables
owner = Nftables()
owner.run(open(sys.argv[1]).read())
print("loaded", flush=True)
sys.stdin.read()
"""


# The port chains of a run, from the moment that it says so until the end of its input.
HOLD = """
import ipaddress, sys
from securerun.firewall.backends import open_chains
from securerun.firewall.policy import Policy, PortRange
from securerun.linux.networks import collapse
backend, run_id, *peers = sys.argv[1:]
ports = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))
chains = open_chains(backend, run_id)
chains.install(Policy(run_id, ports, collapse(map(ipaddress.ip_network, peers))), None)
print("stands", flush=True)
sys.stdin.read()
chains.remove()
"""


@contextlib.contextmanager
def listening_network() -> Iterator[Network]:
    """Two nodes and a stranger; on node0 something listens on every planned port, and on another."""
    with Network("node0", "node1", "stranger") as hosts:
        listener = start(hosts["node0"], LISTEN, *map(str, (*PLANNED, OTHER)))
        yield hosts
        finish(listener, text_input="")


@pytest.fixture(scope="module")
def one_network(root_and_tools: None) -> Iterator[Network]:
    with listening_network() as network:
        yield network


@pytest.fixture
def network(one_network: Network) -> Iterator[Network]:
    """The network of this file, without a rule before the test and after it."""
    yield one_network
    one_network["node0"].run(["nft", "flush", "ruleset"], check=True)


@pytest.fixture(scope="module")
def legacy_network(root_and_tools: None) -> Iterator[Network]:
    """One for legacy tables: they stay registered, and iptables warns of them ever after."""
    with listening_network() as network:
        yield network


def start(host: Host, program: str, *words: str) -> subprocess.Popen[str]:
    """A program that has said that it is ready, and ends with its input."""
    process = host.popen([sys.executable, "-c", program, *words], stdin=subprocess.PIPE, stderr=None)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def reached(network: Network, origin: str) -> set[int]:
    """The ports of node0 that a host can connect to, each over both families or over none."""
    node = network["node0"]
    targets = [(address, port) for address in node.addresses for port in (*PLANNED, OTHER)]
    found = reach(network[origin], targets)
    by_port = {port: {found[address, port] for address in node.addresses} for port in (*PLANNED, OTHER)}
    assert all(len(answers) == 1 for answers in by_port.values()), found
    return {port for port, answers in by_port.items() if answers == {True}}


def assert_closed(network: Network) -> None:
    """As under securerun: a peer connects to every port, a stranger to no planned one."""
    assert reached(network, "stranger") == {OTHER}
    assert reached(network, "node1") == {*PLANNED, OTHER}


def assert_open(network: Network) -> None:
    assert reached(network, "stranger") == {*PLANNED, OTHER}


class Script:
    """A script as an administrator has it: a file, run by sh in a host."""

    def __init__(self, host: Host, path: Path, plan: Plan) -> None:
        path.write_text(render(plan, "sh"))
        self.host, self.path = host, path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.host.run(["sh", self.path, *words])

    def up(self) -> None:
        done = self.run("up")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done

    def down(self) -> None:
        done = self.run("down")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done


class Run:
    """Port chains of a run of securerun, held by a process as a guard holds them."""

    def __init__(self, host: Host, backend: str, *peers: str, run_id: str = plans.RUN) -> None:
        self._host = host
        self._words = (backend, run_id, *peers)
        self._holder: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        self._holder = start(self._host, HOLD, *self._words)

    def end(self) -> None:
        if self._holder is not None and self._holder.poll() is None:
            assert finish(self._holder, text_input="").returncode == 0


def snapshot(host: Host, backend: str) -> dict[str, str]:
    if backend == "legacy":  # a legacy table shows only after somebody has used it
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            host.run([tool, "-S"], check=True)
    return host.snapshot(legacy=backend == "legacy")


@pytest.mark.usefixtures("root_and_tools")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_script_closes_what_securerun_closes_and_leaves_the_host_as_it_was(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    network: Network = request.getfixturevalue("legacy_network" if backend == "legacy" else "network")
    node = network["node0"]
    before = snapshot(node, backend)
    assert_open(network)
    script = Script(node, tmp_path / "ports.sh", plans.plan(firewall=backend))
    script.up()
    assert_closed(network)
    once = snapshot(node, backend)
    script.up()
    assert snapshot(node, backend) == once
    assert_closed(network)
    script.down()
    assert snapshot(node, backend) == before
    assert_open(network)
    script.down()
    assert snapshot(node, backend) == before


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_a_later_script_for_the_same_ports_takes_the_place_of_the_first(
    network: Network, tmp_path: Path, backend: str
) -> None:
    node = network["node0"]
    before = node.snapshot()
    first = Script(node, tmp_path / "first.sh", plans.plan(firewall=backend))
    later = Script(node, tmp_path / "later.sh", plans.plan((), firewall=backend))
    first.up()
    later.up()
    assert reached(network, "node1") == reached(network, "stranger") == {OTHER}
    first.down()
    assert node.snapshot() == before


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_scripts_of_two_jobs_with_other_peers_and_a_common_port_agree(
    network: Network, tmp_path: Path, backend: str
) -> None:
    node = network["node0"]
    before = node.snapshot()
    ours = Script(node, tmp_path / "ours.sh", plans.plan(firewall=backend))
    ports = (PortRange(60000, 60015, "HCCL"), PortRange(7000, 7000, "master port"))
    theirs = Script(node, tmp_path / "theirs.sh", plans.plan(network["stranger"].addresses, ports, firewall=backend))
    ours.up()
    theirs.up()
    assert reached(network, "node1") == {*PLANNED, OTHER}
    assert reached(network, "stranger") == {*PLANNED, OTHER} - {29500}
    ours.down()
    assert reached(network, "node1") == {29500, OTHER}
    theirs.down()
    assert node.snapshot() == before


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES])
@pytest.mark.parametrize("first", ["script", "run"])
@pytest.mark.parametrize("first_to_end", ["script", "run"])
def test_a_run_lets_nobody_in_whom_a_script_keeps_out_whichever_comes_or_ends_first(
    network: Network, tmp_path: Path, backend: str, first: str, first_to_end: str
) -> None:
    """Who is a peer of both is let in, and the last of the two leaves the host as it was before both."""
    node, peer, stranger = network
    before = node.snapshot()
    both = (*peer.addresses, "10.77.0.9", "fd77::9")
    script = Script(node, tmp_path / "ports.sh", plans.plan(firewall=backend))
    # Whose id is the script's own would take its rules away if they were of one kind.
    theirs = Run(node, backend, *stranger.addresses, run_id=lasting_id(plans.plan().policy))
    for run in (Run(node, backend, *both), theirs):
        names: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "script": (script.up, script.down),
            "run": (run.begin, run.end),
        }
        with contextlib.ExitStack() as ending:
            ending.callback(run.end)
            for name in sorted(names, key=lambda name: name != first):
                names[name][0]()
            assert reached(network, "stranger") == {OTHER}
            script.up()
            assert reached(network, "node1") == ({*PLANNED, OTHER} if run is not theirs else {OTHER})
            names.pop(first_to_end)[1]()
            if first_to_end == "run":
                assert_closed(network)
            else:
                assert reached(network, "stranger") == ({*PLANNED, OTHER} if run is theirs else {OTHER})
            (last,) = names.values()
            last[1]()
            assert node.snapshot() == before


def test_the_rules_of_others_stay_and_the_jump_comes_first_again(network: Network, tmp_path: Path) -> None:
    node = network["node0"]
    for tool in ("iptables", "ip6tables"):
        node.run([tool, "-A", "INPUT", "-p", "udp", "--dport", "53", "-j", "DROP"], check=True)
    before = node.snapshot()
    script = Script(node, tmp_path / "ports.sh", plans.plan())
    script.up()
    for tool in ("iptables", "ip6tables"):  # somebody opens everything, above our jump
        node.run([tool, "-I", "INPUT", "1", "-p", "tcp", "-j", "ACCEPT"], check=True)
    assert_open(network)
    script.up()
    assert_closed(network)
    for tool in ("iptables", "ip6tables"):
        node.run([tool, "-D", "INPUT", "-p", "tcp", "-j", "ACCEPT"], check=True)
    script.down()
    assert node.snapshot() == before


def test_an_interface_and_accept_reach_the_rules(network: Network, tmp_path: Path) -> None:
    node = network["node0"]
    before = node.snapshot()
    wrong = Script(node, tmp_path / "lo.sh", plans.plan(interfaces=("lo",)))
    wrong.up()
    assert reached(network, "node1") == {OTHER}
    right = Script(node, tmp_path / "eth0.sh", plans.plan(interfaces=("lo", "eth0"), accept=True))
    right.up()
    assert_closed(network)
    assert "-j ACCEPT" in node.run(["iptables", "-S", "SECURERUN-LASTING"]).stdout
    right.down()
    assert node.snapshot() == before


def test_a_script_says_what_is_wrong(network: Network, tmp_path: Path) -> None:
    script = Script(network["node0"], tmp_path / "ports.sh", plans.plan())
    for words in ((), ("start",), ("",)):
        done = script.run(*words)
        assert (done.returncode, "usage: " in done.stderr) == (2, True), done
    done = network["node0"].run(["sh", "-s", "up"], user="nobody", text_input=script.path.read_text())
    assert done.returncode == 1, done
    assert "only root" in done.stderr
    assert "\n" not in done.stderr.strip()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("peers", [plans.PEERS, ()])
def test_scripts_are_what_shellcheck_takes_for_plain_posix_shell(
    tmp_path: Path, backend: str, peers: tuple[str, ...]
) -> None:
    path = tmp_path / "ports.sh"
    path.write_text(render(plans.plan(peers, firewall=backend), "sh"))
    done = subprocess.run([needed(SHELLCHECK), "--shell=sh", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_no_command_line_gets_out_of_the_comment_that_it_stands_in() -> None:
    hostile = "x\n touch /tmp/owned\r\u2028id\x1b[2J`id`$(id)\nEND"
    plain = render(plans.plan(), "sh").splitlines()
    told = render(plans.with_command(plans.plan(), hostile), "sh").splitlines()
    assert [line for line in told if line not in plain] == [line for line in told if line.startswith("# command ")]
    assert len(told) == len(plain)


def test_the_iptables_form_is_what_the_tools_load(network: Network) -> None:
    node = network["node0"]
    texts = render(plans.plan(), "iptables").split("# ip6tables-restore")
    for tool, text in zip(("iptables-restore", "ip6tables-restore"), (texts[0], f"#{texts[1]}")):
        node.run([tool, "--noflush"], text_input=text, check=True)
    assert_closed(network)


@kernel.needing(kernel.OWNED_TABLES)
def test_the_nft_form_is_what_libnftables_loads(network: Network, tmp_path: Path) -> None:
    node = network["node0"]
    before = node.snapshot()
    path = tmp_path / "plan.nft"
    path.write_text(render(plans.plan(), "nft"))
    owner = start(node, OWN, str(path))
    assert_closed(network)
    finish(owner, text_input="")
    assert node.snapshot() == before


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        ("nft", {"accept": True}, "--accept"),
        ("sh", {"accept": True, "firewall": "nftables"}, "--accept"),
        ("sh", {"firewall": "off"}, "--firewall off"),
        ("sh", {"ports": ()}, "--ports"),
    ],
)
def test_a_form_that_a_plan_does_not_have_is_refused(form: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError) as refusal:
        render(plans.plan(**options), form)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_json_has_the_policy_and_where_each_part_of_it_comes_from() -> None:
    made = plans.plan(loopback="job", origins={"peers": "--peers", "loopback": "SECURERUN_LOOPBACK"})
    document = json.loads(render(made, "json"))
    assert document["policy"] == {
        "run_id": plans.RUN,
        "ports": [
            {"first": 29500, "last": 29500, "purpose": "master port (static rendezvous)"},
            {"first": 60000, "last": 60015, "purpose": "HCCL"},
        ],
        "peers": ["10.77.0.2/32", "fd77::2/128"],
        "interfaces": [],
        "accept": False,
        "close_loopback": True,
        "public": [],
    }
    assert document["command"] == list(plans.COMMAND)
    assert document["rendezvous"]["endpoint"] == "10.77.0.1:29500"
    assert document["peers"] == {"source": "--peers", "names": {}, "warnings": []}
    assert document["options"]["peers"] == {"value": "10.77.0.2,fd77::2", "origin": "--peers"}
    assert document["options"]["loopback"] == {"value": "job", "origin": "SECURERUN_LOOPBACK"}
    assert document["options"]["umask"] == {"value": "0027", "origin": "default"}


def test_the_command_reads_a_launch_and_takes_nothing_of_the_script(tmp_path: Path) -> None:
    meeting = ["--nnodes=2", "--node-rank=1", "--master-addr=10.77.0.2", "--master-port=7001"]
    arguments = ["--peers", "10.77.0.2", *meeting, "train.py", "--format", "none"]
    environment = {"PATH": "/usr/bin:/bin", "SECURERUN_GRACE": "3"}
    done = subprocess.run(
        [SECURERUNCTL, "plan", "--format", "json", *arguments], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    document = json.loads(done.stdout)
    assert document["command"] == ["train.py", "--format", "none"]
    assert document["options"]["grace"] == {"value": "3", "origin": "SECURERUN_GRACE"}
    assert document["options"]["peers"] == {"value": "10.77.0.2", "origin": "--peers"}
    assert document["policy"]["ports"][0]["first"] == 7001


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--format", "pdf", "--", "train.py"], 2, "pdf"),
        (["--format", "sh", "--", "--peers", "10.77.0.0.1", "train.py"], 78, "10.77.0.0.1"),
        (["--format", "json", "--", "--peers", "node0,", "node1", "train.py"], 2, "ends in a comma, and 'node1'"),
    ],
)
def test_a_plan_of_nothing_right_is_refused_in_words(arguments: list[str], status: int, words: str) -> None:
    done = subprocess.run([SECURERUNCTL, "plan", *arguments], capture_output=True, text=True)
    assert done.returncode == status, done
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
