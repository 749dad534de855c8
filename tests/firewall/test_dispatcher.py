"""The text that iptables-restore is given, and what iptables-save's text is taken for."""

from __future__ import annotations

import ipaddress

from securerun.firewall.dispatcher import Dispatcher, read_dispatcher, render_install, render_removal
from securerun.firewall.policy import Policy, PortRange
from securerun.linux.networks import Network, collapse

RUN, OTHER = "0123456789ab", "ba9876543210"
EMPTY = Dispatcher(exists=False, rules=(), jumps=(), jumped_to_first=False)
PORTS = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))


def policy(*peers: str, interfaces: tuple[str, ...] = (), accept: bool = False) -> Policy:
    networks: list[Network] = [ipaddress.ip_network(peer) for peer in peers]
    return Policy(RUN, PORTS, collapse(networks), interfaces, accept)


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
    assert lines[-3].endswith('-j NFLOG --nflog-prefix "securerun 0123456789ab" --nflog-group 77')
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
