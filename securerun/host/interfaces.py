"""The network interfaces of this host, and the networks that they are on."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence

from securerun.errors import PolicyError
from securerun.linux.networks import Address, Network, collapse

ANY = "any"


def parse(text: str | None) -> tuple[str, ...]:
    """Return the names in a list with commas, each once, in order; none for the word `any`."""
    words = (text or "").replace(",", " ").split()
    return () if words == [ANY] else tuple(dict.fromkeys(words))


def names() -> tuple[str, ...]:
    """Return the interfaces of this host (of this network namespace), in the kernel's order."""
    return tuple(name for _, name in socket.if_nameindex())


def require(wanted: Sequence[str], source: str = "--interface") -> tuple[str, ...]:
    """Return the names, if this host has all of these interfaces.

    Raises PolicyError that lists those that exist.
    """
    present = names()
    for name in wanted:
        if name not in present:
            raise PolicyError(f"{source}: there is no interface {name!r} here; write one of {', '.join(present)}")
    return tuple(wanted)


def networks_of(wanted: Iterable[str]) -> tuple[Network, ...]:
    """Return the networks that these interfaces are on, collapsed.

    Without link-local networks (169.254.0.0/16, fe80::/10): every host on the cable is on those, whatever network it
    belongs to. Without networks of a single address: they hold no other host.
    """
    by_interface = _networks()
    return collapse(network for name in wanted for network in by_interface.get(name, ()))


def addresses_of(wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the addresses of these interfaces, IPv4 before IPv6; without the loopback's and link-local ones."""
    by_interface = _addresses()
    found = (address for name in wanted for address, _ in by_interface.get(name, ()))
    usable = {address for address in found if not (address.is_loopback or address.is_link_local)}
    return tuple(str(address) for address in sorted(usable, key=lambda one: (one.version, int(one))))


def with_networks() -> tuple[str, ...]:
    """Return the interfaces that `networks_of` knows a network of, in the kernel's order; never the loopback."""
    by_interface = _networks()
    return tuple(name for name in names() if by_interface.get(name))


def leading_to(networks: Iterable[Network]) -> tuple[str, ...]:
    """Return the interfaces that lead to any host of these networks, by this host's routes, in the kernel's order.

    Where the hosts' own routes are the same, which is what networks are made for, their packets come in through these
    and no others. Raises OSError where the kernel does not tell its routes.
    """
    from securerun.linux.routes import Routes  # few launches ask

    devices = Routes().devices_to(networks)
    return tuple(name for index, name in socket.if_nameindex() if index in devices)


def seen_as(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the interface that a firewall and sockets see the packets of this one on, and those that lie on that.

    The first is `name` itself, or the bridge, bond, team or VRF that it is a member of; the others are VLANs and their
    like.
    Raises OSError where the kernel does not tell.
    """
    from securerun.linux.stacked import Stacked  # few launches ask

    stacked = Stacked()
    by_index = dict(socket.if_nameindex())
    index = stacked.seen_as(socket.if_nametoindex(name))
    return by_index.get(index, name), tuple(by_index[one] for one in stacked.on_top(index) if one in by_index)


def labelled(label: str) -> tuple[str, str] | None:
    """Return the interface and the address that a label such as eth0:1 is of; None where no address has it."""
    import psutil  # 30 ms, and few launches ask

    entries = psutil.net_if_addrs().get(label, ()) if ":" in label else ()
    found = next((entry.address for entry in entries if entry.family == socket.AF_INET), None)
    return (label.partition(":")[0], found) if found else None


def with_address(address: str) -> str | None:
    """Return the interface that has this address, the loopback included; None if none has."""
    wanted = ipaddress.ip_address(address)
    return next((name for name, own in _addresses().items() if any(wanted == one for one, _ in own)), None)


def own_addresses() -> tuple[str, ...]:
    """All addresses of this host but link-local ones, each once, in the interfaces' order."""
    found = (address for own in _addresses().values() for address, _ in own if not address.is_link_local)
    return tuple(dict.fromkeys(map(str, found)))


def has(address: Address) -> bool:
    """Return whether an interface of this host has this address, link-local ones and the loopback's included."""
    return any(address == one for own in _addresses().values() for one, _ in own)


def may_bind(address: str) -> bool:
    """Return whether the kernel has a socket listen at this address: at each of this host's own, and few others."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


def towards(addresses: Iterable[str]) -> str | None:
    """Return the interface by whose address this host reaches the first of these addresses that it has a route to.

    For an address of this host's own, the interface that has it. None where the way is the loopback, or there is none.
    """
    for address in addresses:
        local = source_towards(address)
        if local is not None:
            return _interface_of(local)
    return None


def source_towards(remote: str) -> str | None:
    """Return the address of its own by which this host reaches another; None where it has no route there."""
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    # Connecting a datagram socket asks the routing table and sends nothing.
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((remote, 9))
        return str(probe.getsockname()[0]).partition("%")[0]
    return None


def _interface_of(address: str) -> str | None:
    for name, addresses in _addresses().items():
        if any(own == ipaddress.ip_address(address) and not own.is_loopback for own, _ in addresses):
            return name
    return None


def _networks() -> dict[str, list[Network]]:
    found: dict[str, list[Network]] = {}
    for name, addresses in _addresses().items():
        own = [network for _, network in addresses]
        found[name] = [
            network
            for network in own
            if not (network.is_loopback or network.is_link_local or network.prefixlen == network.max_prefixlen)
        ]
    return found


def _addresses() -> dict[str, list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, Network]]]:
    """Each interface's addresses, with the networks that they are in."""
    import psutil  # 30 ms, and few launches ask

    found: dict[str, list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, Network]]] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6) or not entry.netmask:
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            prefix = bin(int(ipaddress.ip_address(entry.netmask))).count("1")
            network = ipaddress.ip_network((address, prefix), strict=False)
            # getifaddrs(3) has an address's label for its name (eth0:1); no interface has a colon in its own.
            found.setdefault(name.partition(":")[0], []).append((address, network))
    return found
