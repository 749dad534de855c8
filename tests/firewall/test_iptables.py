"""The port chains through iptables-restore, in a host's real tables."""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import replace

import pytest
from cgroups import inside
from checkout import GROUND
from hosts import Host, Network
from probe import reach

from securerun.firewall import iptables
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.dispatcher import Dispatcher, read_dispatcher
from securerun.firewall.policy import Policy, PortRange
from securerun.linux import ip_set

RUN, OTHER = "0123456789ab", "ba9876543210"
CHAINS = GROUND / "chains.py"


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
        ports = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))
        chains.install(Policy(RUN, ports, (ipaddress.IPv4Network("10.77.0.2/32"),)), None)
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
        assert ip_set.size(f"securerun-{RUN}-4") == 10_000
    assert node.snapshot()["iptables-save"].count("-j RETURN") == 1
    chains(node, "remove", RUN)
    assert node.snapshot() == before
    with inside(node):
        assert ip_set.size(f"securerun-{RUN}-4") is None


def test_no_iptables_is_one_reason_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iptables, "_DIRECTORIES", "/nowhere")
    with pytest.raises(PortChainsUnavailable, match="no iptables-restore in /nowhere"):
        iptables.families()
