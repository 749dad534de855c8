"""Proxies that the environment names on this host itself: `http_proxy=http://localhost:3128`, as a tunnel gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SUFFIX = "_proxy"
_EXCEPTIONS = "no_proxy"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Where a proxy without a port listens, by its scheme (curl(1) takes 1080 for all).
_PORTS = {"http": 80, "https": 443}
_DEFAULT_PORT = 1080
_MOST = 16
# What names of this host's own there are, by which `localhost` often goes too (hosts(5)). Nobody else is asked: a name
# server that does not answer would be waited for.
_HOSTS = Path("/etc/hosts")
_MOST_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Proxy:
    """One proxy: the variable that names it, its host, and its port.

    address: that of the host where /etc/hosts tells it; the host itself otherwise.
    """

    variable: str
    host: str
    port: int
    address: str

    @property
    def on_loopback(self) -> bool:
        """Whether it is where a forwarded port is: at 127.0.0.1 or ::1."""
        return not _LOOPBACK.isdisjoint({self.host.lower(), self.address})


def named(environment: Mapping[str, str], hosts: Path = _HOSTS) -> tuple[Proxy, ...]:
    """Return the proxies of all `*_proxy` variables, each host and port once; what is no address is passed over."""
    found: dict[tuple[str, int], Proxy] = {}
    for variable in sorted(environment):
        if variable.lower().endswith(_SUFFIX) and variable.lower() != _EXCEPTIONS and environment[variable].strip():
            proxy = _proxy(variable, environment[variable].strip(), hosts)
            if proxy is not None:
                found.setdefault((proxy.host, proxy.port), proxy)
    return tuple(found.values())[:_MOST]


def _proxy(variable: str, text: str, hosts: Path) -> Proxy | None:
    from urllib.parse import urlsplit  # few have a proxy

    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host:
        return None
    return Proxy(variable, host, port or _PORTS.get(parts.scheme, _DEFAULT_PORT), _address(host, hosts))


def _address(host: str, hosts: Path) -> str:
    """Return the address that the file has for a name, the first as programs take it; the name itself for none."""
    try:
        with hosts.open("rb") as file:
            lines = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return host
    for line in lines:
        address, *names = line.partition("#")[0].split() or [""]
        if host.lower() in (name.lower() for name in names):
            return address
    return host
