"""Where the job meets, and whether the peers that are known can be those that come there.

A peer that comes by another network, or by the other IP version, has an address that nobody named. Clients with both
versions try IPv6 first: where port chains answer with a reset they go on to IPv4 at once, and where nothing answers
they wait, for longer than the job does.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Sequence

from securerun.guard.protocol import MAXIMUM_TOWARDS
from securerun.host import interfaces
from securerun.job import resolver
from securerun.job.job import C10D, ETCD, ETCD_V2, Endpoint, Job
from securerun.job.resolver import Resolver
from securerun.linux.networks import Network, is_address
from securerun.options import Options
from securerun.text import some

_SHOWN = 2
# Here the agent of the first node names a store for the workers, and the endpoint is for the agents alone.
_NAMED_BY_AGENT = {C10D, ETCD, ETCD_V2}
# torch asks for the same name a moment later, and waits for as long as it takes.
_SECONDS = 2.0


def warnings(
    job: Job, options: Options, peers: Sequence[Network], resolve: Resolver = resolver.addresses_of
) -> Iterator[str]:
    """Yield what the user should know of the addresses where the job meets, on the host that has them."""
    if not peers:
        return
    yield from _of_endpoint(job, options, peers, resolve)
    if job.backend in _NAMED_BY_AGENT and job.max_nodes != 1:
        yield from _of_workers_store(job, peers, resolve)


def addresses(job: Job, resolve: Resolver = resolver.addresses_of) -> tuple[Network, ...]:
    """Return the addresses where the job meets, the first few where a name has many; none where they are not told."""
    endpoint = job.meeting_point
    if endpoint is None or endpoint.is_loopback:
        return ()
    found = _addresses(endpoint.host, resolve)[:MAXIMUM_TOWARDS]
    return tuple(ipaddress.ip_network(address) for address in found if "%" not in address)


def _of_endpoint(job: Job, options: Options, peers: Sequence[Network], resolve: Resolver) -> Iterator[str]:
    endpoint = job.meeting_point
    if endpoint is None or endpoint.is_loopback or (job.first_node_listens and job.node_rank > 0):
        return
    found = _addresses(endpoint.host, resolve)
    own = [address for address in found if interfaces.may_bind(address)]
    if own and len(own) == len(found):
        yield from _of_networks(f"the job meets at {endpoint}", own, peers, "give the rendezvous an address on theirs")
    yield from _of_versions(str(endpoint), found, own, peers, has_chains=options.firewall != "off")


def _of_workers_store(job: Job, peers: Sequence[Network], resolve: Resolver) -> Iterator[str]:
    """Warn of the address that the first node's agent tells all others for the store of the workers.

    RendezvousStoreInfo.build in torch/distributed/elastic/rendezvous/api.py; clients try all that the name stands for.
    """
    host = job.local_address or socket.gethostname()
    endpoint = job.meeting_point
    found = () if endpoint is not None and endpoint.host == host else _addresses(host, resolve)
    if not found or not all(map(interfaces.may_bind, found)) or any(Endpoint(one, None).is_loopback for one in found):
        return
    subject = f"if this node becomes the first, the workers meet at {host}"
    otherwise = "say --local-addr with this host's address on theirs"
    said = tuple(_of_networks(subject, found, peers, otherwise))
    yield from said
    own_versions = {6 if ":" in address else 4 for address in found}
    if not said and own_versions.isdisjoint(peer.version for peer in peers):
        (other,) = own_versions
        yield (
            f"{subject}, and no peer has an IPv{other} address: whoever connects there is turned away; name the peers' "
            f"IPv{other} addresses too, or write their names"
        )


def _of_networks(subject: str, own: Sequence[str], peers: Sequence[Network], otherwise: str) -> Iterator[str]:
    """Warn of a meeting point whose addresses are all on networks of this host where no peer is."""
    from securerun.job.reach import Reach

    try:
        reach = Reach(peers)
        problem = reach.elsewhere(tuple(filter(None, map(reach.holder, own))))
    except OSError:  # the routes cannot be told
        return
    if problem:
        yield f"{subject}: {problem}; {problem.mended(otherwise)}"


def _of_versions(
    endpoint: str, found: Sequence[str], own: Sequence[str], peers: Sequence[Network], *, has_chains: bool
) -> Iterator[str]:
    """Warn of an address of an IP version that no peer has one of."""
    versions = {peer.version for peer in peers}
    if len(versions) != 1:
        return
    other = 6 if versions == {4} else 4
    others = [address for address in own if (":" in address) == (other == 6)]
    advice = f"name the peers' IPv{other} addresses too, or write their names"
    if others and len(others) == len(found):
        yield (
            f"the job meets at {endpoint}, and no peer has an IPv{other} address: whoever connects there is turned "
            f"away; {advice}"
        )
    elif others and not has_chains:
        yield (
            f"the job meets at {endpoint}, which is {some(others, _SHOWN)} as well, and no peer has an IPv{other} "
            f"address: a node that tries IPv{other} first waits there, since without port chains (--firewall off) "
            f"nothing answers it; leave --firewall off out, or {advice}"
        )


def _addresses(host: str, resolve: Resolver) -> tuple[str, ...]:
    if is_address(host):
        return (host,)
    outcome = resolver.ask((host,), resolve, _SECONDS)[host]
    return outcome if isinstance(outcome, tuple) else ()
