"""`--peers subnet`: the networks of an interface, and of which one."""

from __future__ import annotations

from collections.abc import Iterable

from securerun.errors import PolicyError
from securerun.host import interfaces
from securerun.job import resolver
from securerun.job.job import Job
from securerun.job.resolver import Resolver
from securerun.linux.networks import Network, is_address
from securerun.options import Options


def networks_of(options: Options, job: Job, place: str, resolve: Resolver) -> tuple[Network, ...]:
    """Return the networks of the chosen interfaces, else of the one towards the endpoint, else of the only one."""
    wanted = interfaces.require(interfaces.parse(options.interface), options.interface_source)
    wanted = wanted or _interface_to(job, resolve) or interfaces.with_networks()
    if not options.interface and len(wanted) > 1:
        raise PolicyError(
            f"{place}: subnet of which interface? This host has {', '.join(wanted)}; write --interface {wanted[0]} too"
        )
    networks = interfaces.networks_of(wanted) or interfaces.networks_of(_seen_as(wanted))
    if not networks:
        raise PolicyError(
            f"{place}: {', '.join(wanted) or 'this host'} is on no network with other hosts, so subnet is nobody; "
            "write the nodes themselves, as in --peers node1,node2"
        )
    if any(network.prefixlen == 0 for network in networks):
        raise PolicyError(f"{place}: the network of {', '.join(wanted)} is every host; write `any` if you mean that")
    return networks


def _seen_as(wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the bridges, bonds and teams that interfaces are members of: these have their addresses."""
    try:
        return tuple(interfaces.seen_as(name)[0] for name in wanted)
    except OSError:
        return ()


def _interface_to(job: Job, resolve: Resolver) -> tuple[str, ...]:
    if job.meeting_point is None or job.meets_on_loopback:
        return ()
    host = job.meeting_point.host
    found = (host,) if is_address(host) else resolver.ask((host,), resolve)[host]
    name = interfaces.towards(found) if isinstance(found, tuple) else None
    return (name,) if name else ()
