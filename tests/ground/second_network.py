"""A second network between the hosts of `hosts.Network`: ib0, with 10.81.0.N and fd81::N, beside eth0."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hosts import Argument, Host, Network

NAME = "ib0"


def address(host: Host) -> str:
    """Its IPv4 address there."""
    return f"10.81.0.{host.ipv4.rpartition('.')[2]}"


def address6(host: Host) -> str:
    """Its IPv6 address there."""
    return f"fd81::{host.ipv6.rpartition(':')[2]}"


def there(host: Host) -> Host:
    """The same host, known by its addresses there."""
    other = copy.copy(host)
    other.ipv4, other.ipv6 = address(host), address6(host)
    return other


def connect(network: Network) -> None:
    """Put each host of a network on the second one too."""
    bridge, *_ = network.namespaces
    batch(bridge, "link add br1 type bridge", "link set br1 up")
    for host in network:
        batch(
            bridge,
            f"link add {host.name}i type veth peer name {NAME} netns {host.namespace}",
            f"link set {host.name}i master br1 up",
        )
        batch(
            host.namespace,
            f"addr add {address(host)}/24 dev {NAME}",
            f"addr add {address6(host)}/64 dev {NAME} nodad",
            f"link set {NAME} up",
        )


def batch(namespace: str, *lines: str) -> None:
    """Run `ip` in a namespace, once for all lines."""
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], check=True, text=True, input="\n".join(lines) + "\n")


def with_hosts_file(path: Path, records: Mapping[str, Sequence[str]], argv: Sequence[Argument]) -> list[Argument]:
    """`argv` where a hosts file names these hosts, beside the loopback."""
    lines = [f"{one} {name}\n" for name, addresses in records.items() for one in addresses]
    path.write_text("127.0.0.1 localhost\n" + "".join(lines))
    return ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', path, *argv]
