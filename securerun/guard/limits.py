"""What ordinary users may ask of a guard on this host: /etc/securerun/guard.toml, and limits where it is silent.

Root is not limited. Everybody else must not get from the guard what harms another user or the host: its port chains
close ports for the whole host, and pass a run's peers for all runs.
"""

from __future__ import annotations

import dataclasses
import grp
import importlib
import ipaddress
import pwd
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from securerun import site_file
from securerun.errors import PolicyError, PrivilegeError
from securerun.firewall import backends
from securerun.firewall.policy import LAST_PORT, Opening, Policy, PortRange, covers, joined, require_ports
from securerun.guard.caller import Caller
from securerun.guard.program import LIMITS_FILE
from securerun.guard.protocol import Order
from securerun.linux import packages, port_ranges, trust
from securerun.linux.networks import EVERY_HOST, Network, common, listed

# Peers of more addresses than such a network has are half the world rather than the nodes of a job; and 3,200 networks,
# none of them wider, are all of IPv4 but 128 addresses.
_WIDEST = {4: 8, 6: 16}
_BITS = {4: 32, 6: 128}


@dataclass(frozen=True)
class SitePolicy:
    """What ordinary users may ask for.

    users: ids of those who may have a guard; groups: ids whose members may. Both None: whoever the way to the guard
    lets through (sudoers, the socket's mode). ports: first and last TCP ports that may be named; ports_per_run: how
    many of them. ports_found_per_run: how many more may be closed that the job opens while it runs.
    peers: the networks that named peers must lie in; None: any, but in sum no
    more addresses than a /8 or /16 (IPv6) has.
    peers_per_run: how many networks, after those that make up one have been joined.
    public: the networks that public ports may be for; None: those of `peers`, and every host where that is None too.
    accept: whether peers may be let past the host's own rules. runs_per_user: how many runs at once.
    site_key: whether jobs may have a key that is made of what only root reads (securerun.guard.keys).
    containers: whether jobs in containers may have a guard; None: unless `users` or `groups` says who may, since a
    container's root takes on any number. container_chains: whether port chains may be installed in a container's own
    network. runs_per_container: how many runs at once, whoever's; runs_in_containers: of all of them together.
    """

    users: frozenset[int] | None = None
    groups: frozenset[int] | None = None
    ports: tuple[tuple[int, int], ...] = ((1024, LAST_PORT),)
    ports_per_run: int = 256
    ports_found_per_run: int = 4096
    peers_per_run: int = 4096
    peers: tuple[Network, ...] | None = None
    public: tuple[Network, ...] | None = None
    accept: bool = False
    runs_per_user: int = 32
    site_key: bool = True
    containers: bool | None = None
    container_chains: bool = False
    runs_per_container: int = 32
    runs_in_containers: int = 256


def read_site_policy(path: Path = LIMITS_FILE) -> tuple[SitePolicy, str]:
    """Read the site's policy, and why its file was ignored or "": one that others than root can change is none.

    Raises PrivilegeError for a file of root's that cannot be understood: then nobody but root is served.
    """
    try:
        weakness = trust.weak_point(path)
        if weakness is not None:
            return SitePolicy(), f"{path} is ignored: {weakness}"
        text = site_file.content(path).decode()
    except (FileNotFoundError, NotADirectoryError):
        return SitePolicy(), ""
    except (OSError, ValueError) as error:
        raise PrivilegeError(_unreadable(path, str(error))) from error
    try:
        return _understood(_toml(text)), ""
    except (ValueError, PolicyError, RecursionError) as error:
        raise PrivilegeError(_unreadable(path, str(error))) from error


def require_permitted(site: SitePolicy, order: Order, caller: Caller) -> None:
    """Raise PrivilegeError or PolicyError for what this caller may not ask for.

    What nobody asked for is left out instead (`unasked_beyond`).
    """
    if order.policy.run_id == backends.NO_RUN:
        raise PolicyError(
            f"{order.policy.run_id} is no run's id: what such a one leaves would not be found; take another"
        )
    if caller.is_root:
        return
    if not caller.container:  # its root takes on any user id
        _require_user(site, caller)
    policy = order.policy.without(unasked_beyond(site, order.policy, caller))
    named: tuple[PortRange | Opening, ...] = (*policy.ports, *policy.public)
    for port in named:
        if not any(first <= port.first and port.last <= last for first, last in site.ports):
            allowed = ", ".join(f"{first}-{last}" for first, last in site.ports)
            raise PolicyError(
                f"port {port} may not be named by user {caller.user}; this host allows {allowed} ({LIMITS_FILE})"
            )
    count = _count_of_ports(policy)
    if count > site.ports_per_run:
        raise PolicyError(
            f"{count} ports are more than the {site.ports_per_run} that a run may name here ({LIMITS_FILE})"
        )
    require_permitted_peers(site, policy, caller)
    _require_permitted_openings(site, policy)
    if policy.accept and not site.accept:
        raise PolicyError(f"--accept is root's, or the site's (accept = true in {LIMITS_FILE}); leave it out")


def require_containers(site: SitePolicy) -> None:
    """Raise PrivilegeError where no job in a container may have a guard."""
    permitted = site.containers
    if permitted is None:
        permitted = site.users is None and site.groups is None
    if not permitted:
        raise PrivilegeError(
            "jobs in containers may not have a guard on this host, since a user id in a container is nobody's own; its "
            f"administrator allows them by containers = true in {LIMITS_FILE}"
        )


def for_own_network(site: SitePolicy, order: Order) -> Order:
    """Return an order for a container's own network, whose tables are not the host's: the shield alone.

    Whoever has CAP_NET_ADMIN in the container writes those, and root's iptables would read them.
    Raises PolicyError for an order that names its port chains.
    """
    if site.container_chains or order.firewall == "off":
        return order
    if order.firewall != "auto":
        raise PolicyError(
            f"--firewall {order.firewall}: no port chains are installed in a container's own network; leave it out, or "
            f"have the host's administrator allow them (container_chains = true in {LIMITS_FILE})"
        )
    return dataclasses.replace(order, firewall="off")


def narrowed(site: SitePolicy, order: Order, caller: Caller) -> tuple[Order, tuple[str, ...]]:
    """Return the order of who takes over a run, without peers that the site lets this caller name no more; and that.

    The job runs: to refuse it would leave it without a guard, and open to them.
    """
    if caller.is_root or site.peers is None or not order.adopt:
        return order, ()
    allowed = common(order.policy.peers, site.peers)
    if allowed == order.policy.peers:
        return order, ()
    still = listed(allowed) or "no host"
    word = f"of the peers {still} may still connect, by what this host allows now ({LIMITS_FILE})"
    return dataclasses.replace(order, policy=dataclasses.replace(order.policy, peers=allowed)), (word,)


def unasked_beyond(site: SitePolicy, policy: Policy, caller: Caller) -> dict[int, str]:
    """Return the ports that nobody asked for and this caller may not have in a plan, and why."""
    if caller.is_root:
        return {}
    allowed = joined(site.ports)
    unasked = port_ranges.numbers(policy.unasked_ports())
    why = f"user {caller.user} may not name it, {LIMITS_FILE}"
    found = {port: why for port in unasked if not covers(allowed, port)}
    if _count_of_ports(policy.without(found)) > site.ports_per_run:
        why = f"a run may name {site.ports_per_run} ports, {LIMITS_FILE}"
        found = {**dict.fromkeys(unasked, why), **found}
    return found


def require_permitted_peers(site: SitePolicy, policy: Policy, caller: Caller) -> None:
    """Raise PolicyError for a network that the site does not let this caller name a peer."""
    if caller.is_root:
        return
    if len(policy.peers) > site.peers_per_run:
        raise PolicyError(
            f"{len(policy.peers)} networks are more than the {site.peers_per_run} that a run may name here; name "
            f"larger ones, or ask your administrator (peers_per_run in {LIMITS_FILE})"
        )
    if site.peers is None:
        _require_few_addresses(policy)
        return
    for network in policy.peers:
        if not _is_within(network, site.peers):
            allowed = ", ".join(map(str, site.peers))
            raise PolicyError(f"{network} may not be named a peer; this host allows {allowed} ({LIMITS_FILE})")


def _require_permitted_openings(site: SitePolicy, policy: Policy) -> None:
    """Raise PolicyError for a public port that the site does not let ordinary users have.

    What is public is no more open than without securerun. But where the site says who a job may be open to, that holds
    for all of its ports.
    """
    allowed, key = (site.peers, "peers") if site.public is None else (site.public, "public")
    if allowed is None:
        return
    for opening in policy.public:
        for network in opening.networks or EVERY_HOST:
            if not _is_within(network, allowed):
                whom = "every host" if opening.is_for_all else str(network)
                listed = ", ".join(map(str, allowed)) or "no public port"
                raise PolicyError(
                    f"port {opening} may not be public to {whom}; this host allows {listed} ({key} in {LIMITS_FILE})"
                )


def _require_few_addresses(policy: Policy) -> None:
    """Raise PolicyError for peers that have, in sum, more addresses of a family than the widest network."""
    for version, widest in _WIDEST.items():
        peers = policy.peers_of(version)
        if sum(network.num_addresses for network in peers) > 2 ** (_BITS[version] - widest):
            largest = min(peers, key=lambda network: network.prefixlen)
            raise PolicyError(
                f"{len(peers)} networks such as {largest} have more addresses in sum than a /{widest} of IPv{version}; "
                f"name the job's nodes, or ask your administrator to allow it (peers in {LIMITS_FILE})"
            )


def _count_of_ports(policy: Policy) -> int:
    # Public ports are reserved as planned ones are.
    return sum(last - first + 1 for first, last in (*policy.joined_ports(), *policy.ports_for_all()))


def _require_user(site: SitePolicy, caller: Caller) -> None:
    if site.users is None and site.groups is None:
        return
    if caller.user in (site.users or ()) or caller.groups & (site.groups or frozenset()):
        return
    raise PrivilegeError(
        f"user {caller.user} may not have a job guarded on this host ({LIMITS_FILE}); ask its administrator"
    )


def _is_within(network: Network, allowed: Iterable[Network]) -> bool:
    return any(
        network.version == site.version and network.subnet_of(site)  # type: ignore[arg-type]
        for site in allowed
    )


def _unreadable(path: Path, why: str) -> str:
    return f"this host's limits for users cannot be read, so only root is served: {path}: {why}; tell its administrator"


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    # The guard's interpreter is started without `site`, so packages are not on its path; last, they hide nothing.
    sys.path += map(str, packages.directories())
    try:
        tomli = importlib.import_module("tomli")
    except ImportError as error:
        raise ValueError("before Python 3.11 it takes the package tomli (python3-tomli)") from error
    document: dict[str, Any] = tomli.loads(text)
    return document


def _understood(document: Mapping[str, Any]) -> SitePolicy:
    unknown = document.keys() - _READERS.keys()
    if unknown:
        raise ValueError(f"there is no key {min(unknown)!r}; the keys are {', '.join(_READERS)}")
    return SitePolicy(**{key: _READERS[key](key, value) for key, value in document.items()})


def _words(key: str, value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, (str, int)) for item in items):
        raise ValueError(f'{key} is no list of texts; write {key} = ["..."]')
    return [str(item) for item in items]


def _users(key: str, value: object) -> frozenset[int]:
    return frozenset(int(word) if word.isdecimal() else _user_id(word) for word in _words(key, value))


def _groups(key: str, value: object) -> frozenset[int]:
    return frozenset(int(word) if word.isdecimal() else _group_id(word) for word in _words(key, value))


def _user_id(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise ValueError(f"users: there is no user {name!r}") from error


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ValueError(f"groups: there is no group {name!r}") from error


def _ports(key: str, value: object) -> tuple[tuple[int, int], ...]:
    ranges = []
    for word in _words(key, value):
        first, _, last = word.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ValueError(f'{key}: {word!r} is no port or range; write {key} = ["1024-65535"]')
        ends = int(first), int(last or first)
        require_ports(*ends)
        ranges.append(ends)
    return tuple(ranges)


def _networks(key: str, value: object) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(word) for word in _words(key, value))


def _public(key: str, value: object) -> tuple[Network, ...]:
    """Return the networks of public ports: all of them for true, none for false."""
    if isinstance(value, bool):
        return EVERY_HOST if value else ()
    return _networks(key, value)


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} is neither true nor false")
    return value


def _site_key(key: str, value: object) -> bool:
    if value not in ("auto", "off"):
        raise ValueError(f'{key} is neither "auto" nor "off"; write {key} = "off", or leave it out')
    return value == "auto"


def _count(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is no whole number")
    return value


_READERS: dict[str, Callable[[str, object], Any]] = {
    "users": _users,
    "groups": _groups,
    "ports": _ports,
    "ports_per_run": _count,
    "ports_found_per_run": _count,
    "peers": _networks,
    "peers_per_run": _count,
    "public": _public,
    "accept": _flag,
    "runs_per_user": _count,
    "site_key": _site_key,
    "containers": _flag,
    "container_chains": _flag,
    "runs_per_container": _count,
    "runs_in_containers": _count,
}
