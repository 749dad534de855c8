"""The port chains through iptables-restore: the exact text, and what it does in a host's real tables."""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import replace

import pytest
from cgroups import inside
from checkout import GROUND
from hosts import Host, Network
from probe import reach

from securerun.firewall import ipset, iptables
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.iptables import Dispatcher, read_dispatcher, render_install, render_removal
from securerun.firewall.policy import Policy, PortRange
from securerun.linux.networks import Network as PeerNetwork
from securerun.linux.networks import collapse

RUN, OTHER = "0123456789ab", "ba9876543210"
EMPTY = Dispatcher(exists=False, rules=(), jumps=(), jumped_to_first=False)
CHAINS = GROUND / "chains.py"
PORTS = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))


def policy(*peers: str, run_id: str = RUN, interfaces: tuple[str, ...] = (), accept: bool = False) -> Policy:
    networks: list[PeerNetwork] = [ipaddress.ip_network(peer) for peer in peers]
    return Policy(run_id, PORTS, collapse(networks), interfaces, accept)


def test_first_run_makes_the_dispatcher_and_puts_passes_before_drops() -> None:
    assert render_install(policy("10.0.0.1", "10.0.1.0/24", "fd00::1"), 4, EMPTY) == (
        "*filter\n"
        ":SECURERUN - [0:0]\n"
        "-I INPUT 1 ! -i lo -p tcp -m tcp --tcp-flags SYN,ACK SYN -m comment --comment "
        '"securerun" -j SECURERUN\n'
        "-I SECURERUN 1 -s 10.0.1.0/24 -p tcp -m multiport --dports 29500,60000:60015 -m comment --comment "
        '"securerun 0123456789ab" -j RETURN\n'
        "-I SECURERUN 1 -s 10.0.0.1/32 -p tcp -m multiport --dports 29500,60000:60015 -m comment --comment "
        '"securerun 0123456789ab" -j RETURN\n'
        "-A SECURERUN -p tcp -m multiport --dports 29500,60000:60015 -m comment --comment "
        '"securerun 0123456789ab" -j DROP\n'
        "COMMIT\n"
    )


def test_other_family_gets_its_own_peers_and_the_same_drops() -> None:
    text = render_install(policy("10.0.0.1", "fd00::1"), 6, EMPTY)
    assert "-s fd00::1/128 " in text
    assert "10.0.0.1" not in text
    assert text.count("-j DROP") == 1


def test_existing_chain_is_never_declared_again() -> None:
    jump = '-A INPUT ! -i lo -p tcp -m comment --comment "securerun" -j SECURERUN'
    standing = Dispatcher(exists=True, rules=(), jumps=(jump,), jumped_to_first=True)
    text = render_install(policy("10.0.0.1"), 4, standing)
    assert ":SECURERUN" not in text
    assert "INPUT" not in text


def test_jump_that_is_no_longer_first_is_moved_up() -> None:
    jump = "-A INPUT -j SECURERUN"
    text = render_install(policy(), 4, Dispatcher(exists=True, rules=(), jumps=(jump, jump), jumped_to_first=False))
    lines = text.splitlines()
    assert lines[1:3] == ["-D INPUT -j SECURERUN"] * 2
    assert lines[3].startswith("-I INPUT 1 ")


def test_peers_come_in_through_the_named_interfaces_only() -> None:
    text = render_install(policy("10.0.0.1", interfaces=("eth0", "eth1")), 4, EMPTY)
    passes = [line for line in text.splitlines() if line.endswith("-j RETURN")]
    assert [line.split(" -i ")[1].split()[0] for line in passes] == ["eth1", "eth0"]


def test_peers_are_accepted_only_when_asked() -> None:
    assert "-j ACCEPT" not in render_install(policy("10.0.0.1"), 4, EMPTY)
    assert render_install(policy("10.0.0.1", accept=True), 4, EMPTY).count("-j ACCEPT") == 1


def test_more_ports_than_a_rule_holds_are_split_and_touching_ranges_joined() -> None:
    ports = tuple(PortRange(1000 + 10 * number, 1004 + 10 * number, "p") for number in range(8))
    text = render_install(Policy(RUN, (*ports, PortRange(1005, 1009, "p")), ()), 4, EMPTY)
    drops = [line.split("--dports ")[1].split()[0] for line in text.splitlines() if line.endswith("-j DROP")]
    assert drops == ["1000:1014,1020:1024,1030:1034,1040:1044,1050:1054,1060:1064,1070:1074"]
    many = tuple(PortRange(2 * number, 2 * number, "p") for number in range(1, 21))
    text = render_install(Policy(RUN, many, ()), 4, EMPTY)
    assert [line.split("--dports ")[1].split()[0].count(",") for line in text.splitlines() if "-j DROP" in line] == [
        14,
        4,
    ]


def test_dropped_packets_are_logged_before_they_are_dropped() -> None:
    lines = render_install(policy(), 4, EMPTY, log_group=77).splitlines()
    assert lines[-3].endswith("-j NFLOG --nflog-group 77")
    assert lines[-2].endswith("-j DROP")


SAVED = """\
*filter
:INPUT ACCEPT [0:0]
:SECURERUN - [0:0]
-A INPUT ! -i lo -p tcp -m comment --comment "securerun made this table" -j SECURERUN
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A SECURERUN -s 10.0.0.1/32 -m comment --comment "securerun ba9876543210" -j RETURN
-A SECURERUN -s 10.0.0.2/32 -m comment --comment "securerun 0123456789ab" -j RETURN
-A SECURERUN -m comment --comment "securerun 0123456789ab" -j DROP
-A SECURERUN -m comment --comment "securerun ba9876543210" -j DROP
COMMIT
"""


def test_removal_takes_out_one_run_and_leaves_the_other() -> None:
    found = read_dispatcher(SAVED)
    assert found.jumped_to_first
    assert found.made == "securerun made this table"
    assert render_removal(RUN, found) == (
        "*filter\n"
        '-D SECURERUN -s 10.0.0.2/32 -m comment --comment "securerun 0123456789ab" -j RETURN\n'
        '-D SECURERUN -m comment --comment "securerun 0123456789ab" -j DROP\n'
        "COMMIT\n"
    )


def test_removal_of_the_last_run_takes_the_dispatcher_too() -> None:
    alone = "\n".join(line for line in SAVED.splitlines() if OTHER not in line)
    assert render_removal(RUN, read_dispatcher(alone)).splitlines()[-3:] == ["-F SECURERUN", "-X SECURERUN", "COMMIT"]


def test_removal_of_a_run_that_is_not_there_changes_nothing() -> None:
    assert render_removal("f" * 12, read_dispatcher(SAVED)) == ""
    assert render_removal(RUN, read_dispatcher("")) == ""


@pytest.fixture
def node(network: Network) -> Host:
    return network["node0"]


def chains(node: Host, *words: str) -> str:
    """tests/chains.py in the host; its standard output."""
    done = node.run([sys.executable, CHAINS, *words])
    assert done.returncode == 0, done
    return done.stdout


def listener(node: Host, port: int) -> None:
    script = f"import socket, time; s = socket.create_server(('', {port}), family=socket.AF_INET6, dualstack_ipv6=True)"
    process = node.popen([sys.executable, "-c", f"{script}; print('up', flush=True); time.sleep(60)"])
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"


def test_everything_is_as_before_after_the_last_run_on_a_host_without_tables(node: Host) -> None:
    before = node.snapshot()
    chains(node, "install", RUN, "10.77.0.2")
    chains(node, "install", OTHER, "10.77.0.3")
    chains(node, "remove", RUN)
    assert "SECURERUN" in node.snapshot()["iptables-save"]
    chains(node, "remove", OTHER)
    assert node.snapshot() == before


def test_commands_whose_texts_do_not_say_where_they_are_kept_are_asked(
    node: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older iptables-save are; what is there because of us is known, and goes, all the same."""
    before = node.snapshot()

    def silent(saved: str) -> Dispatcher:
        found = read_dispatcher(saved)
        assert found.in_nftables
        return replace(found, in_nftables=False)

    monkeypatch.setattr(iptables, "read_dispatcher", silent)
    with inside(node):
        chains = iptables.IptablesChains(RUN)
        chains.install(policy("10.77.0.2"), None)
        assert node.snapshot() != before
        chains.remove()
    assert node.snapshot() == before


def test_a_table_that_was_there_before_stays_however_empty(node: Host) -> None:
    node.run(["nft", "add table ip filter"], check=True)
    before = node.snapshot()
    chains(node, "install", RUN, "10.77.0.2")
    chains(node, "remove", RUN)
    assert node.snapshot() == before
    node.run(["iptables", "-P", "INPUT", "ACCEPT"], check=True)
    with_chain = node.snapshot()
    chains(node, "install", RUN, "10.77.0.2")
    chains(node, "remove", RUN)
    assert node.snapshot() == with_chain


def test_rules_that_others_add_meanwhile_stay(node: Host) -> None:
    chains(node, "install", RUN, "10.77.0.2")
    node.run(["iptables", "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "DROP"], check=True)
    chains(node, "remove", RUN)
    after = node.snapshot()["iptables-save"]
    assert "--dport 9" in after
    assert "SECURERUN" not in after


def test_a_policy_that_was_set_meanwhile_keeps_its_chain(node: Host) -> None:
    chains(node, "install", RUN, "10.77.0.2")
    node.run(["iptables", "-P", "INPUT", "DROP"], check=True)
    chains(node, "remove", RUN)
    assert ":INPUT DROP" in node.snapshot()["iptables-save"]


def test_flushed_rules_do_not_keep_a_run_from_being_removed(node: Host) -> None:
    before = node.snapshot()
    chains(node, "install", RUN, "10.77.0.2")
    node.run(["iptables", "-D", "SECURERUN", "1"], check=True)
    node.run(["ip6tables", "-F", "SECURERUN"], check=True)
    chains(node, "remove", RUN)
    chains(node, "remove", RUN)
    assert node.snapshot() == before


def test_a_rule_of_somebody_else_in_our_chain_refuses_the_install(node: Host) -> None:
    node.run(["iptables", "-N", "SECURERUN"], check=True)
    node.run(["iptables", "-A", "SECURERUN", "-j", "ACCEPT"], check=True)
    before = node.snapshot()
    assert "holds a rule that is not securerun's (-A SECURERUN -j ACCEPT)" in chains(node, "install", RUN, "10.77.0.2")
    assert node.snapshot() == before


def test_peers_of_each_run_pass_and_nobody_else_on_both_families(network: Network) -> None:
    node, peer, stranger = network
    listener(node, 29500)
    listener(node, 7000)
    closed, other = [(address, 29500) for address in node.addresses], [(address, 7000) for address in node.addresses]
    chains(node, "install", RUN, *peer.addresses)
    assert reach(peer, [*closed, *other]) == dict.fromkeys([*closed, *other], True)
    assert reach(stranger, [*closed, *other]) == {**dict.fromkeys(closed, False), **dict.fromkeys(other, True)}
    assert reach(node, closed) == dict.fromkeys(closed, True)
    chains(node, "install", OTHER, *stranger.addresses)
    assert reach(peer, closed) == reach(stranger, closed) == dict.fromkeys(closed, True)
    chains(node, "remove", RUN)
    assert reach(peer, closed) == dict.fromkeys(closed, False)
    chains(node, "remove", OTHER)
    assert reach(peer, closed) == dict.fromkeys(closed, True)


def test_pass_rules_open_nothing_that_the_host_closed_and_accept_does(network: Network) -> None:
    node, peer, _ = network
    listener(node, 29500)
    node.run(["iptables", "-P", "INPUT", "DROP"], check=True)
    target = (node.ipv4, 29500)
    chains(node, "install", RUN, peer.ipv4)
    assert reach(peer, [target]) == {target: False}
    chains(node, "remove", RUN)
    chains(node, "accept", RUN, peer.ipv4)
    node.run(["iptables", "-A", "INPUT", "-p", "tcp", "!", "--syn", "-j", "ACCEPT"], check=True)
    assert reach(peer, [target]) == {target: True}


def test_a_connection_from_a_source_port_in_the_closed_range_keeps_working(network: Network) -> None:
    node, peer, _ = network
    listener(peer, 5000)
    chains(node, "install", RUN)
    connect = f"import socket; socket.create_connection(('{peer.ipv4}', 5000), 3, ('', 60005)).close()"
    assert node.run([sys.executable, "-c", connect]).returncode == 0


def test_who_was_dropped_is_known_by_source_and_port(network: Network) -> None:
    node, _, stranger = network
    holder = node.popen([sys.executable, CHAINS, "hold", RUN], stdin=-1)
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    reach(stranger, [(node.ipv4, 60007), (node.ipv6, 29500)])
    holder.stdin.close()
    denied = {tuple(line.split()[:2]) for line in holder.stdout.read().splitlines()}
    assert denied == {(stranger.ipv4, "60007"), (stranger.ipv6, "29500")}


def test_ten_thousand_peers_are_installed_and_removed_whole(node: Host) -> None:
    before = node.snapshot()
    peers = [f"10.{index >> 8 & 255}.{index & 255}.{index % 120 * 2 + 1}" for index in range(10_000)]
    chains(node, "install", RUN, *peers)
    with inside(node):
        assert ipset.size(f"securerun-{RUN}-4") == 10_000
    assert node.snapshot()["iptables-save"].count("-j RETURN") == 1
    chains(node, "remove", RUN)
    assert node.snapshot() == before
    with inside(node):
        assert ipset.size(f"securerun-{RUN}-4") is None


def test_no_iptables_is_one_reason_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iptables, "_DIRECTORIES", "/nowhere")
    with pytest.raises(PortChainsUnavailable, match="no iptables-restore in /nowhere"):
        iptables.families()
