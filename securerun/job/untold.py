"""What gloo, NCCL and HCCL take where no variable tells them: an address of this host by which it may be no peer.

gloo takes the first address of the host's own name that it can bind (torch, ProcessGroupGloo::createDefaultDevice);
NCCL the first interface whose name begins with ib, else the first that is not docker, lo or virbr (ncclFindInterfaces
in src/misc/socket.cc); HCCL the first by name that is not docker or lo (HCCL_SOCKET_IFNAME in the CANN environment
variable reference). Nobody knows here which of them a job uses, so it is said before the start, and nothing is refused.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence

from securerun.host import interfaces
from securerun.job import entrance, libraries, resolver
from securerun.job.job import Job
from securerun.job.libraries import Library
from securerun.job.reach import Reach
from securerun.job.resolver import Resolver
from securerun.linux.networks import Address, Network, shown

# torch asks for the same name a moment later, and waits for as long as it takes.
_SECONDS = 2.0
_EVERY_VERSION = {4, 6}


def warnings(
    job: Job, environment: Mapping[str, str], peers: Sequence[Network], resolve: Resolver = resolver.addresses_of
) -> Iterator[str]:
    """Yield a line for each library that takes by itself what peers would turn away."""
    if not peers or job.max_nodes == 1 or {peer.version for peer in peers if not peer.prefixlen} == _EVERY_VERSION:
        return
    try:
        reach = Reach(peers)
        yield from _of_gloo(environment, peers, reach, resolve)
        yield from _of_interfaces(environment, reach)
    except OSError:  # the routes cannot be told
        return


def _of_gloo(
    environment: Mapping[str, str], peers: Sequence[Network], reach: Reach, resolve: Resolver
) -> Iterator[str]:
    told = environment.get(entrance.GLOO, "").strip()
    for address in _of_labels(told) if told else _of_own_name(resolve):
        reason = "" if address.is_loopback else _turned_away(address, reach.holder(str(address)), peers, reach)
        if not reason:
            continue
        if told:
            yield f"{entrance.GLOO}={told} has gloo take {address}: {reason}"
            continue
        yield (
            f"{entrance.GLOO} is not set, so gloo, if the job uses it, takes the address of this host's name, "
            f"{address}: {reason}"
        )


def _of_labels(told: str) -> Iterator[Address]:
    """Yield the addresses that gloo is told by their labels; what it takes of an interface is looked at there."""
    for word in told.split(","):
        found = interfaces.labelled(word.strip())
        if found:
            yield ipaddress.ip_address(found[1])


def _turned_away(address: Address, name: str | None, peers: Sequence[Network], reach: Reach) -> str:
    """Return why peers would turn this host away that connects from an address, and what mends it; "" if none would."""
    if name is None or any(peer.version == address.version and address in peer for peer in peers):
        return ""
    problem = reach.elsewhere((name,))
    if problem:
        return f"{problem}; {problem.mended(f'`export {entrance.GLOO}={problem.through[0]}`')}"
    if all(peer.version != address.version for peer in peers):
        # Of an interface gloo takes the IPv4 address, if it has one.
        otherwise = f", or `export {entrance.GLOO}={name}`" if address.version == 6 else ""
        return (
            f"no peer has an IPv{address.version} address, so its connections are turned away; name the peers' "
            f"IPv{address.version} addresses too, or write their names{otherwise}"
        )
    known = next((peer for peer in reach.own if peer.version == address.version), None)
    if known is None:
        return ""
    return (
        f"the peers have this host by {shown(known)} alone, and a host with the same list turns its connections away; "
        f"name {address} there as well"
    )


def _of_own_name(resolve: Resolver) -> Iterator[Address]:
    name = socket.gethostname()
    outcome = resolver.ask((name,), resolve, _SECONDS)[name]
    found = [text for text in outcome if interfaces.may_bind(text)] if isinstance(outcome, tuple) else []
    yield from (ipaddress.ip_address(text.partition("%")[0]) for text in found[:1])


def _of_interfaces(environment: Mapping[str, str], reach: Reach) -> Iterator[str]:
    """Warn of the interfaces that NCCL and HCCL take by themselves, where one of them may be in use."""
    told = {
        Library.NCCL: (entrance.NCCL, "NCCL_COMM_ID"),
        Library.HCCL: (entrance.HCCL, entrance.ADDRESS, "RANK_TABLE_FILE", "RANK_TABLE_PATH"),
    }
    # getifaddrs(3), which both go by, has all IPv4 addresses before the first IPv6 one.
    usable = reach.with_ipv4
    for library, variables in told.items():
        if any(environment.get(variable, "").strip() for variable in variables):
            continue
        if not libraries.may_be_in_use(library, environment):
            continue
        name = _first_of_nccl(usable) if library is Library.NCCL else _first_of_hccl(usable)
        problem = reach.elsewhere((name,)) if name else None
        if problem:
            advice = problem.mended(f"`export {variables[0]}={problem.through[0]}`")
            yield f"{variables[0]} is not set, so {library}, if the job uses it, takes {name}: {problem}; {advice}"


def _first_of_nccl(usable: Sequence[str]) -> str | None:
    over_infiniband = [name for name in usable if name.startswith("ib")]
    others = [name for name in usable if not name.startswith(("docker", "lo", "virbr"))]
    return next(iter((*over_infiniband, *others)), None)


def _first_of_hccl(usable: Sequence[str]) -> str | None:
    return min((name for name in usable if not name.startswith(("docker", "lo"))), default=None)
