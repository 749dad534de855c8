"""The way out of a network of a job's own: pasta, or slirp4netns where only that is there. None of them leads in.

Both run as the user, take what leaves from a device of the job's network, and open its connections as their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from securerun.linux import trust
from securerun.linux.networks import Address
from securerun.linux.own_network import Own
from securerun.protection.bars import Bar
from securerun.protection.keeper import TARGET

PASTA, SLIRP = "pasta", "slirp4netns"
FIX = "apt-get install passt"
TUNNEL = Path("/dev/net/tun")
_SYSTEM_DIRECTORIES = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")
# What pasta has stand for this host's first name server; of a network that is on no host's way (RFC 3927).
_NAME_SERVER_OF_PASTA = "169.254.1.1"
# slirp4netns(1): of the network that it makes up.
_NAME_SERVER_OF_SLIRP = "10.0.2.3"
# A name that no interface of a host has: those are there as well.
_DEVICE_OF_SLIRP = "securerun-out"


@dataclass(frozen=True)
class Origin:
    """Whose addresses the job's network gets, where default routes do not tell: an interface, and gateways to name.

    own: which of its addresses of IPv4, where it has several. pasta before 2023-05 knows the first alone, and without
    a route where the gateway is not of that one's network.
    """

    interface: str
    gateways: tuple[Address, ...]
    own: Own | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """What pasta is told of it."""
        own = ("--address", str(self.own.address), "--netmask", str(self.own.network.prefixlen)) if self.own else ()
        gateways = (word for one in self.gateways for word in ("--gateway", str(one)))
        return ("--interface", self.interface, *own, *gateways)


@dataclass(frozen=True)
class WayOut:
    """A program that carries packets out. name: what it is called; program: where it is."""

    name: str
    program: str

    @property
    def copies_addresses(self) -> bool:
        """Whether the job's network gets the addresses of this host's own, on an interface of the same name."""
        return self.name == PASTA

    @property
    def forwards_ports(self) -> bool:
        """Whether a port of the job's loopback can lead to the same port of this host's."""
        return self.name == PASTA

    @property
    def name_server(self) -> str:
        """The address, within the job's network, of a name server that this host asks."""
        return _NAME_SERVER_OF_PASTA if self.name == PASTA else _NAME_SERVER_OF_SLIRP

    def command(self, origin: Origin | None, ports: Sequence[int]) -> list[str]:
        """Return the command line, with the word TARGET for the process whose network it is for.

        ports: those of the job's loopback that lead to this host's.
        """
        if self.name == SLIRP:
            options = ("--configure", "--mtu=65520", "--disable-host-loopback", "--enable-ipv6")
            return [self.program, *options, TARGET, _DEVICE_OF_SLIRP]
        return [
            self.program,
            # It ends with its keeper: what a job leaves that ended well may need it when that process has gone.
            *("--foreground", "--quiet", "--no-netns-quit", "--config-net"),
            # Or what is sent to the gateway's address comes to this host's loopback.
            "--no-map-gw",
            *("--tcp-ports", "none", "--udp-ports", "none"),
            *("--tcp-ns", ",".join(map(str, ports)) or "none", "--udp-ns", "none"),
            *("--dns-forward", _NAME_SERVER_OF_PASTA),
            *(origin.options if origin else ()),
            # Started as root it would become nobody, who may not look into root's processes.
            *(("--runas", "0:0") if os.geteuid() == 0 else ()),
            TARGET,
        ]


def find() -> WayOut | None:
    """Return the way out that this host has; None where it has none.

    The system's own comes first; one that a user has put into PATH is one that nobody else can have put there.
    """
    return next(
        (WayOut(name, str(path)) for name in (PASTA, SLIRP) for path in _programs(name) if _is_trusted(path)), None
    )


def bar() -> Bar | None:
    """Return why there is no way out; None where there is one."""
    if find() is None:
        others = next((path for name in (PASTA, SLIRP) for path in _programs(name)), None)
        if others is not None:
            return Bar(f"{others} is not taken, since {_weak_point(others)}", FIX)
        return Bar(f"neither {PASTA} nor {SLIRP} is installed", FIX)
    if not TUNNEL.exists():
        return Bar(f"there is no {TUNNEL}", f"modprobe tun (a container is given it by --device {TUNNEL})")
    if not os.access(TUNNEL, os.R_OK | os.W_OK):
        return Bar(f"{TUNNEL} may not be opened by this user", f"chmod 666 {TUNNEL}")
    return None


def _programs(name: str) -> Iterator[Path]:
    """Yield the programs of this name. As they are linked: pasta looks for its other builds beside its link."""
    for directory in (*_SYSTEM_DIRECTORIES, *os.get_exec_path()):
        path = Path(directory, name)
        if path.is_absolute() and path.is_file() and os.access(path, os.X_OK):
            yield path


def _is_trusted(path: Path) -> bool:
    return not _weak_point(path)


def _weak_point(path: Path) -> str:
    """Return who else than root and this user has a say in a program; "" for nobody."""
    try:
        return str(trust.weak_point(path, {*trust.roots(), os.geteuid()}) or "")
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})"
