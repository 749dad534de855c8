"""Another firewall on this host that would turn the job's peers away: firewalld, ufw, or rules that somebody wrote.

The port chains close and never open: peers are handed to the host's own rules, and those may refuse them.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from securerun.finding import Finding
from securerun.host import interfaces
from securerun.linux import port_ranges, proc
from securerun.linux.networks import Address, Network
from securerun.preflight.scene import Scene
from securerun.text import some

if TYPE_CHECKING:
    from securerun.preflight.rules import InputChain, Packet

_FIREWALLD = Path("/run/firewalld.pid")
_UFW = Path("/etc/ufw/ufw.conf")
_PEERS_TRIED = 16
_PORTS_TRIED = 16
# A network wider than these is no list of nodes; whom of it the host's rules let in says nothing.
_WIDEST = {4: 8, 6: 16}


def turned_away(scene: Scene) -> Iterator[Finding]:
    """Peers that a firewall of this host's own certainly turns away, by name of the firewall and the first of them."""
    readable = scene.rules is not None and scene.rules.readable
    chains = scene.rules.chains() if scene.rules else ()
    packets = [*_packets(scene)] if chains or not readable else []
    for chain in chains:
        refused: list[Packet] = []
        # What somebody else's tool printed has yet another shape: nothing is known of these rules then.
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            refused += [packet for packet in packets if chain.turns_away(packet)]
        if refused:
            yield _finding(chain, refused)
    if packets and not readable:
        yield from _unreadable(packets[0].source)


CHECKS = (turned_away,)


def _packets(scene: Scene) -> Iterator[Packet]:
    """Yield what peers would send first, to some ports of the plan and to one of those that are chosen at random."""
    from securerun.preflight.rules import Packet

    numbers = [planned.first for planned in scene.ports[:_PORTS_TRIED]] + [_random_port()]
    tried = 0
    for network in scene.peers:
        source = _other_host_of(network)
        if source is None or network.prefixlen < _WIDEST[network.version]:
            continue
        interface = _interface_to(network, scene)
        yield from (Packet(source, number, interface) for number in numbers)
        tried += 1
        if tried >= _PEERS_TRIED:
            return


def _interface_to(network: Network, scene: Scene) -> str | None:
    """Return where a peer's packets come in, if there is no doubt about it."""
    names = scene.interfaces
    if not names:
        with contextlib.suppress(OSError):
            names = interfaces.leading_to([network])
    return names[0] if len(names) == 1 else None


def _other_host_of(network: Network) -> Address | None:
    """Return a host of a network that is not this one; None where it holds no other."""
    hosts = [network.network_address] if network.num_addresses == 1 else [network[1], network[-2]]
    return next((host for host in hosts if not _is_own(host)), None)


def _random_port() -> int:
    """Return a port from the middle of those that gloo, NCCL and torch get from the kernel."""
    return sum(port_ranges.handed_out()) // 2


def _is_own(address: Address) -> bool:
    """Return whether this host has the address: its packets come over the loopback."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def _finding(chain: InputChain, refused: list[Packet]) -> Finding:
    sources = list(dict.fromkeys(packet.source for packet in refused))
    numbers = sorted({packet.port for packet in refused if packet.source == sources[0]})
    listed = ", ".join(map(str, numbers))
    manager = _manager()
    where = f"chain {chain.name} of {chain.tool} (table {chain.table})"
    return Finding(
        "firewall",
        f"{manager + ', ' if manager else ''}{where} turns {some(sources, 1)} away from TCP ports {listed}",
        "securerun hands peers to the host's own rules, and opens nothing that those close",
        _opening(manager, chain, sources[0]),
    )


def _opening(manager: str, chain: InputChain, source: Address) -> str:
    if manager == "firewalld":
        return f"firewall-cmd --zone=trusted --add-source={source}"
    if manager == "ufw":
        return f"ufw allow proto tcp from {source}"
    if chain.tool == "nft":
        family = "ip" if source.version == 4 else "ip6"
        return f"nft insert rule {chain.table} {chain.name} {family} saddr {source} meta l4proto tcp accept"
    return f"{chain.tool} -I INPUT -s {source} -p tcp -j ACCEPT"


def _manager() -> str:
    """Return the program that keeps this host's rules, if one of the two does: its own command has to open them."""
    if _is_running_firewalld():
        return "firewalld"
    return "ufw" if _is_enabled_ufw() else ""


def _unreadable(source: Address) -> Iterator[Finding]:
    manager = _manager()
    if manager:
        yield Finding(
            "firewall",
            f"{manager} is active and may turn {source} away, which only root can tell",
            "securerun hands peers to the host's own rules, and opens nothing that those close",
            "sudo firewall-cmd --list-all" if manager == "firewalld" else "sudo ufw status",
        )


def _is_running_firewalld() -> bool:
    try:
        pid = int(_FIREWALLD.read_text(encoding="ascii"))
        return proc.name(pid).startswith("firewalld")
    except (OSError, ValueError):
        return False


def _is_enabled_ufw() -> bool:
    try:
        lines = _UFW.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip().lower() == "enabled=yes" for line in lines)
