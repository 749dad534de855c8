"""A router between the hosts of `hosts.Network` and one of them, which is on a network of its own: 10.88.0.2."""

from __future__ import annotations

from hosts import Host
from second_network import batch

ROUTER_THERE = "10.88.0.1"


def put_behind(router: Host, far: Host, *others: Host, network: str = "10.88.0") -> None:
    """Move a host to a network that is reached by way of `router` alone; `Host.ipv4` is its address there.

    One that comes to it, or that it goes to, meets the router's netfilter. IPv6 leads nowhere from there.
    """
    batch(
        far.namespace,
        f"addr del {far.ipv4}/24 dev eth0",
        f"addr del {far.ipv6}/64 dev eth0",
        f"addr add {network}.2/24 dev eth0",
        f"route add default via {network}.1",
    )
    batch(router.namespace, f"addr add {network}.1/24 dev eth0")
    # It is one cable after all: nobody is to be told of a shorter way.
    forward = "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0"
    router.run(forward.split(), check=True)
    for other in others:
        batch(other.namespace, f"route add {network}.0/24 via {router.ipv4}")
    far.ipv4 = f"{network}.2"


def renumber(network: str, *hosts: Host) -> None:
    """Give hosts addresses of another network, in place of their own; `Host.ipv4` is the new one."""
    for host in hosts:
        address = f"{network}.{host.ipv4.rpartition('.')[2]}"
        batch(host.namespace, f"addr del {host.ipv4}/24 dev eth0", f"addr add {address}/24 dev eth0")
        host.ipv4 = address


def translate(host: Host, chain: str, rule: str) -> None:
    """Add a rule of translation: of targets in OUTPUT and PREROUTING, of sources in POSTROUTING."""
    host.run(["iptables", "-t", "nat", "-A", chain, *rule.split()], check=True)


def strip_tags(router: Host, source: str = "0.0.0.0/0") -> None:
    """Take option 254 out of what passes, as some firewalls do with options that they do not know."""
    rule = f"-s {source} -p tcp -j TCPOPTSTRIP --strip-options 254"
    router.run(["iptables", "-t", "mangle", "-A", "FORWARD", *rule.split()], check=True)
