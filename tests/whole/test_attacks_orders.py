"""Attacks of an ordinary user by what he orders: orders that a guard takes, and that harm nobody all the same."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import pytest
from attacking import Ground
from cgroups import inside
from conversation import order
from hosts import Host
from probe import reach

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
    targets = [(address, port) for address in ground.node.addresses for port in (20001, 20511)]
    with inside(ground.node):
        listeners = [
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True) for port in (20001, 20511)
        ]
    try:
        assert reach(ground.peer, targets) == dict.fromkeys(targets, True)
        assert reach(ground.stranger, targets) == dict.fromkeys(targets, False)
    finally:
        for listener in listeners:
            listener.close()
    talk.release()
