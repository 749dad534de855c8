"""Attacks of an ordinary user by what he orders: orders that a guard takes, and that harm nobody all the same."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import plans
import pytest
from attacking import Ground, program
from cgroups import inside
from conversation import SOCKET, WAYS, Conversation, guards, log_of, order
from holding import Held, held
from hosts import Host, Network, eventually, is_alive
from probe import reach
from users import RECORDS, User

from securerun.ctl.plan import render
from securerun.firewall.droplog import DropLog
from securerun.firewall.script import lasting_id
from securerun.linux.networks import Network as PeerNetwork
from securerun.linux.networks import collapse

# 256 ports of which no two touch, 32 peers a family, 64 interfaces: what a guard takes of each.
_ODD_PORTS = range(20001, 20513, 2)
_MOST_INTERFACES = 64


def rules_of(host: Host) -> list[int]:
    """How many rules there are of ours, a family."""
    texts = [host.run([f"{tool}-save"], check=True).stdout for tool in ("iptables", "ip6tables")]
    return [text.count("-A SECURERUN ") for text in texts]


def scattered(*others: str) -> list[str]:
    """As many peers as stand in a rule each, of which no two can be joined, and these."""
    every = [*(f"10.9.{number}.1" for number in range(31)), *(f"fd99::{number:x}:1" for number in range(31)), *others]
    return [str(network) for network in collapse(map(ipaddress.ip_network, every))]


@contextlib.contextmanager
def listening(host: Host, *ports: int) -> Iterator[list[tuple[str, int]]]:
    """Something listens on these ports of a host; yields where to connect to."""
    with contextlib.ExitStack() as open_ones:
        with inside(host):
            for port in ports:
                open_ones.enter_context(socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True))
        yield [(address, port) for address in host.addresses for port in ports]


# --- how many rules ---


@pytest.mark.parametrize(
    "interfaces",
    [["eth0"] * _MOST_INTERFACES, ["eth0", *(f"eth{number}" for number in range(1, _MOST_INTERFACES))], []],
    ids=["doubled", "many", "none"],
)
def test_no_order_makes_more_than_a_few_rules(ground: Ground, interfaces: Sequence[str]) -> None:
    """And the few do what the many did: peers come in through the interfaces, and nobody else does."""
    peers = scattered(*ground.peer.addresses)
    talk = ground.talk(ground.alice, "socket")
    talk.say(order(ports=list(_ODD_PORTS), peers=peers, interfaces=list(interfaces), scope="ports"))
    verdict = talk.hear_verdict()
    assert "guarding" in verdict, verdict
    assert max(rules_of(ground.node)) <= 72
    with listening(ground.node, 20001, 20511) as targets:
        assert reach(ground.peer, targets) == dict.fromkeys(targets, True)
        assert reach(ground.stranger, targets) == dict.fromkeys(targets, False)
    talk.release()


# --- what an administrator closed ---


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
@pytest.mark.parametrize("chosen", ["of his own", "the script's"])
def test_a_run_does_not_open_what_an_administrators_script_closes(
    ground: Ground, tmp_path: Path, backend: str, chosen: str
) -> None:
    """Not by naming its ports and other peers, and not by taking the id under which the script's rules stand."""
    plan = plans.plan(ground.peer.addresses, firewall=backend)
    script = tmp_path / "ports.sh"
    script.write_text(render(plan, "sh"))
    run_id = None if chosen == "of his own" else lasting_id(plan.policy)
    # By whose backend all runs of the host go.
    roots = Conversation(ground.machine, ground.node, None, "direct")
    roots.say(order(ports=[7000], scope="ports", firewall=backend))
    assert "guarding" in roots.hear_verdict()
    asked = order(run_id=run_id, ports=[29500, (60000, 60015)], peers=[ground.stranger.ipv4], scope="ports")
    assert ground.node.run(["sh", script, "up"]).returncode == 0
    try:
        rules = ground.node.snapshot()
        for way in WAYS:
            talk = ground.talk(ground.alice, way)
            talk.say(asked)
            assert [layer["backend"] for layer in talk.hear_verdict()["guarding"]["layers"]] == [backend]
            with listening(ground.node, 60000) as targets:
                assert reach(ground.stranger, targets) == dict.fromkeys(targets, False)
            talk.release()
            assert eventually(lambda: ground.node.snapshot() == rules)
            with listening(ground.node, 60000) as targets:
                assert reach(ground.peer, targets) == dict.fromkeys(targets, True)
                assert reach(ground.stranger, targets) == dict.fromkeys(targets, False)
    finally:
        assert ground.node.run(["sh", script, "down"]).returncode == 0
    roots.release()


# --- whom it names ---


def all_but_one_of_each(world: str, length: int) -> list[str]:
    """The whole world but one address of each network of a length, so that no two halves of one can be joined."""
    networks: list[PeerNetwork] = []
    for network in ipaddress.ip_network(world).subnets(new_prefix=length):
        networks += network.address_exclude(ipaddress.ip_network(network.network_address))  # type: ignore[arg-type]
    return [str(each) for each in collapse(networks)]


_FULL4, _FULL6 = ["10.0.0.0/8"], ["fc00::/16"]
_TOO_MANY = {
    "all but 128 addresses": all_but_one_of_each("0.0.0.0/0", 7),
    "two of the widest": ["10.0.0.0/8", "12.0.0.0/8"],
    "one more than the widest": [*_FULL4, "11.0.0.0/32"],
    "halves of many": [f"{first}.0.0.0/9" for first in range(1, 200)],
    "two of the widest of IPv6": ["fc00::/16", "fe00::/16"],
    "one more of IPv6": [*_FULL6, "fd00::/128"],
    "halves of many of IPv6": [f"fc{number:02x}::/17" for number in range(1, 200)],
}


@pytest.mark.parametrize("kind", _TOO_MANY)
def test_no_sum_of_networks_is_the_whole_world(ground: Ground, kind: str) -> None:
    """Neither in the order nor, later, in a message that changes the peers."""
    peers = _TOO_MANY[kind]
    assert "in sum" in ground.refusal(ground.alice, order(peers=peers))
    talk = ground.talk(ground.alice, "socket")
    talk.say(order(peers=[*_FULL4, *_FULL6]))
    assert "guarding" in talk.hear_verdict()
    talk.say({"peers": {"networks": peers}})
    assert "in sum" in str(talk.hear()["notice"])
    talk.release()


# --- as whom it is given ---

# User id 0 without a capability, as a container's root has it with the socket mounted: what follows is run so.
_CONTAINERS_ROOT = 'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- "$@"'
_ROOTS = {
    "a container's root by the socket": ("socket", _CONTAINERS_ROOT),
    "root by the socket": ("socket", ":"),
    "root by sudo": ("sudo", ":"),
}


@pytest.mark.parametrize("way", [*WAYS, "direct"])
def test_nobody_leaves_rules_that_are_not_found_by_an_id_that_is_no_runs(ground: Ground, way: str) -> None:
    talk = Conversation(ground.machine, ground.node, None if way == "direct" else ground.alice, way)
    talk.say(order(run_id="0" * 12))
    assert "is no run's id" in talk.hear_verdict()["refused"]["message"]
    talk.hang_up()


_REFUSED = {
    "--accept": {"accept": True},
    "may not be named": {"ports": [22]},
    "more than the 256": {"ports": [(20000, 20256)]},
    "in sum": {"peers": ["10.0.0.0/7"]},
}


@pytest.mark.parametrize("whom", _ROOTS)
def test_user_id_0_alone_is_not_root(ground: Ground, whom: str) -> None:
    """Nor is who takes a way that is for others: they are under the site's limits, as everybody is there."""
    way, before = _ROOTS[whom]

    def talk() -> Conversation:
        return Conversation(ground.machine, ground.node, None, way, before=before)

    for words, asked in _REFUSED.items():
        refused = talk()
        refused.say(order(**asked))  # type: ignore[arg-type]
        assert words in str(refused.hear_verdict().get("refused")), asked
        refused.hang_up()
    ground.machine.configure("runs_per_user = 1\nusers = [0]\n")
    served = talk()
    served.say(order())
    assert "guarding" in served.hear_verdict()
    one_too_many = talk()
    one_too_many.say(order(ports=[29600]))
    assert "which allows 1" in str(one_too_many.hear_verdict().get("refused"))
    one_too_many.hang_up()
    served.release()


def test_user_id_0_alone_does_not_see_or_disturb_what_is_roots(ground: Ground) -> None:
    roots = Conversation(ground.machine, ground.node, None, "direct")
    roots.say(order(ports=[22, 29500], peers=[ground.peer.ipv4], scope="ports"))
    assert "guarding" in roots.hear_verdict()
    talk = Conversation(ground.machine, ground.node, None, "socket", before=_CONTAINERS_ROOT)
    talk.say({"report": {}})
    assert talk.hear()["ready"]
    assert talk.hear() == {"runs": {"count": 0}}
    talk.say(order(ports=[29500], peers=[ground.stranger.ipv4]))
    assert "no shield" in str(talk.hear_verdict().get("refused"))
    talk.hang_up()
    with listening(ground.node, 29700):
        talk = Conversation(ground.machine, ground.node, None, "socket", before=_CONTAINERS_ROOT)
        talk.say(order(ports=[29700]))
        assert "in use by user 0" in str(talk.hear_verdict().get("refused"))
        talk.hang_up()
    roots.release()


def test_root_itself_is_not_limited(ground: Ground) -> None:
    """With the bounding set of a container that was given what a guard needs, too."""
    given = "exec setpriv --bounding-set=-all,+net_admin,+sys_admin,+bpf,+dac_override,+sys_ptrace,+kill,+setpcap -- "
    for before in (":", f'{given} "$@"'):
        talk = Conversation(ground.machine, ground.node, None, "direct", before=before)
        talk.say(order(ports=[22], accept=True, peers=["0.0.0.0/0"]))
        assert "guarding" in talk.hear_verdict()
        talk.release()


# Takes on a user id that is subordinate to its user's (subuid(5)), as newuidmap gives them, and speaks for itself.
_UNDER_ANOTHER_NUMBER = """
import ctypes, os, socket, sys
assert ctypes.CDLL(None).unshare(0x10000000) == 0
print("unshared", flush=True)
number = int(sys.stdin.readline())
os.setresgid(number, number, number)
os.setresuid(number, number, number)
end = socket.socket(socket.AF_UNIX)
end.connect(sys.argv[1])
guard = end.makefile("rwb")
guard.write(sys.stdin.readline().encode())
guard.flush()
for line in guard:
    print(line.decode(), end="", flush=True)
"""


_SUBORDINATE = 1_000_000


@contextlib.contextmanager
def under_another_number(ground: Ground, number: int, maker: User | None) -> Iterator[dict[str, Any]]:
    """What a guard answers to an order of a process of that number in a user namespace of its maker's."""
    argv = program(_UNDER_ANOTHER_NUMBER, SOCKET)
    process = ground.popen(maker, argv, stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "unshared\n", process.stderr.read()
    user = maker.uid if maker else 0
    for file in ("uid_map", "gid_map"):
        Path(f"/proc/{process.pid}/{file}").write_text(f"0 {user} 1\n1 {_SUBORDINATE} 65536\n")
    process.stdin.write(f"{number}\n{json.dumps(order())}\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    yield json.loads(process.stdout.readline()) if "ready" in answer else answer
    process.kill()
    process.wait()


def test_subordinate_numbers_of_a_user_are_no_other_users(ground: Ground) -> None:
    """Of 65,536 users each would have as many runs and waiting guards as one has, and other limits (guard.toml)."""
    for number in (1, 2):
        with under_another_number(ground, number, ground.alice) as answer:
            assert f"user namespace of user {ground.alice.uid}" in str(answer.get("refused"))
    assert eventually(lambda: log_of(ground.machine).count("refused to") == 2)  # the answer comes before the log


def test_containers_own_numbers_are_served(ground: Ground) -> None:
    """A user namespace that root made has the numbers that root gave it; and of a user's own the number is theirs."""
    with under_another_number(ground, 1, None) as answer:
        assert "guarding" in answer
    with under_another_number(ground, 0, ground.alice) as answer:
        assert "guarding" in answer


# --- which id it gives its run ---

_WITH_A_RUN_DIRECTORY_OF_ITS_OWN = """
mkdir -p /run/securerun
exec unshare --mount sh -ec 'mount -t tmpfs -o mode=700 tmpfs /run/securerun; exec "$@"' sh "$@"
"""


@pytest.mark.parametrize("backend", ["iptables", "nftables", "legacy"])
def test_no_order_names_a_run_that_another_run_directory_has(ground: Ground, backend: str) -> None:
    """As a container has one of its own, and the host's network. Its id can be read in the names of cgroups."""
    if backend == "legacy" and importlib.util.find_spec("iptc") is None:
        pytest.skip("python-iptables is not installed")
    order_of_it = order(ports=[29500], peers=[ground.peer.ipv4], scope="ports", firewall=backend)
    run_id = order_of_it["order"]["policy"]["run_id"]
    containers = Conversation(ground.machine, ground.node, None, "direct", before=_WITH_A_RUN_DIRECTORY_OF_ITS_OWN)
    containers.say(order_of_it)
    assert "guarding" in containers.hear_verdict()
    standing = ground.node.snapshot()
    ours = Conversation(ground.machine, ground.node, None, "direct")
    ours.say(order(run_id=run_id, ports=[29600], peers=[ground.stranger.ipv4], scope="ports", firewall=backend))
    assert f"a run with the id {run_id} exists already" in str(ours.hear_verdict().get("refused"))
    ours.hang_up()
    assert eventually(lambda: ground.node.snapshot() == standing, seconds=5)
    if backend == "iptables":
        refused = order(run_id=run_id, ports=[29600], peers=[ground.stranger.ipv4], scope="ports", firewall=backend)
        assert "exists already" in ground.refusal(ground.alice, refused)
        assert eventually(lambda: ground.node.snapshot() == standing, seconds=5)
    containers.release()
    assert eventually(lambda: not guards(ground.machine))
    ground.node.run(["sysctl", "-qw", "net.ipv4.ip_local_reserved_ports="], check=True)


# --- which log group it takes ---


@pytest.mark.parametrize("taken", [False, True], ids=["free", "the host's"])
def test_no_order_names_the_log_group_that_its_guard_hears(ground: Ground, taken: bool) -> None:
    """It followed from the run id: who chose that heard what the host's firewall logs to it, and kept ulogd out."""
    group = 7
    run_id = f"{group - 1:012x}"
    logging = ["-I", "INPUT", "-p", "tcp", "--dport", "7777", "-j", "NFLOG", "--nflog-group", str(group)]
    ground.node.run(["iptables", *logging], check=True)
    try:
        with inside(ground.node):
            ulogd = DropLog(group) if taken else None
            talk = ground.talk(ground.alice, "socket")
            talk.say(order(run_id=run_id, ports=[29500], peers=[ground.peer.ipv4]))
            assert "guarding" in talk.hear_verdict()
            (heard,) = set(re.findall(r"--nflog-group (\d+)", ground.node.run(["iptables-save"]).stdout)) - {str(group)}
            assert int(heard) >= 32768
            ulogd = ulogd or DropLog(group)
        # What the host's rules log, be it to the very group, is nothing that the guard tells a user.
        for number in (str(group), heard):
            ground.node.run(["iptables", "-I", "INPUT", *logging[2:-1], number], check=True)
        targets = [(ground.node.ipv4, 7777), (ground.node.ipv4, 29500)]
        assert reach(ground.stranger, targets) == dict.fromkeys(targets, False)
        ulogd.read()
        assert ground.stranger.ipv4 in {str(denial.source) for denial in ulogd.denied()}
        ulogd.close()
        talk.say({"release": {"failed": False}})
        while "released" not in (answer := talk.hear()):
            assert answer
        talk.hang_up()
        assert {denial["port"] for denial in answer["released"]["denied"]} == {29500}
    finally:
        assert eventually(lambda: not ground.machine.runs())
        ground.node.run(["nft", "delete", "table", "ip", "filter"], check=True)


def test_the_log_group_is_another_each_time(ground: Ground) -> None:
    heard = set()
    for _ in range(3):
        talk = ground.talk(ground.alice, "socket")
        talk.say(order(run_id="0123456789ab"))
        assert "guarding" in talk.hear_verdict()
        heard |= set(re.findall(r"--nflog-group (\d+)", ground.node.run(["iptables-save"]).stdout))
        talk.release()
        assert eventually(lambda: not ground.machine.runs())
    assert len(heard) > 1


# --- through which interface ---

_PEER = "10.88.0.2"


def wire(near: Host, far: Host, name: str, *, index: int) -> None:
    """Make a wire between two hosts, with the addresses of a peer's network on it."""
    pair = f"link add {name} index {index} type veth peer name {name} netns {far.namespace}"
    for host, words in (
        (near, pair),
        (near, f"addr add 10.88.0.1/24 dev {name}"),
        (near, f"link set {name} up"),
        (far, f"addr add {_PEER}/24 dev {name}"),
        (far, f"link set {name} up"),
    ):
        host.run(["ip", *words.split()], check=True)


@pytest.mark.parametrize("how", ["made anew", "renamed", "while the guard is replaced"])
def test_who_gets_the_number_of_an_interface_gets_not_in_and_who_has_its_name_does(network: Network, how: str) -> None:
    """A reset of ib0, a driver's reload: the number passes on, and peers come in through another."""
    node, peer, stranger = network
    wire(node, peer, "ib0", index=700)
    with held(node, "--peers", f"{_PEER},fd88::2", "--interface", "ib0", "--listen", "7001") as holder:
        target = ("10.88.0.1", 7001)
        assert reach(peer, [target])[target]
        if how == "while the guard is replaced":
            guard = guard_of(holder)
            os.kill(guard, signal.SIGSTOP)
        node.run(["ip", "link", "set", "ib0", "down"], check=True)
        node.run(["ip", *("link set ib0 name ib9" if how == "renamed" else "link delete ib0").split()], check=True)
        if how != "renamed":
            wire(node, stranger, "evil", index=700)
        else:
            # The stranger's wire is the old one by another name.
            node.run(["ip", "link", "set", "ib9", "up"], check=True)
        if how == "while the guard is replaced":
            os.kill(guard, signal.SIGKILL)
            assert eventually(lambda: guard_of(holder) not in (guard, 0))
        time.sleep(0.2)
        origin = peer if how == "renamed" else stranger
        assert not any(reach(origin, [target])[target] for _ in range(5))
        node.run(["ip", "link", "delete", "ib9" if how == "renamed" else "evil"], check=True)
        wire(node, peer, "ib0", index=701)
        assert eventually(lambda: reach(peer, [target])[target], seconds=5)
    node.run(["ip", "link", "delete", "ib0"], check=True)


def guard_of(holder: Held) -> int:
    """The pid of the guard that a lease has now; 0 while there is none."""
    with contextlib.suppress(OSError, ValueError):
        guard = json.loads((Path(RECORDS) / f"{holder.run_id}.json").read_text())["guard"]
        return int(guard) if is_alive(guard) else 0
    return 0
