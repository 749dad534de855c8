"""The interfaces that the libraries of a job use, as HCCL, gloo and NCCL are told by their variables.

They are the default of `--interface`, with what it takes that no right job is cut off by it. A library's variable says
which address that library takes, not which way packets come: HCCL may be told eth1 while the store is reached through
eth0, and an interface that only has the address (a dummy, on hosts with routed addresses) sees no packet at all. But
whoever connects is a peer, by its address, and its packets come in where this host's routes to it go out. So peers may
come in through all that the variables name and all that leads to a peer, and through nothing else: not from the
containers' bridges, not from the site's other networks. Where the routes cannot be told, any interface is right.
What leads to no peer at all is refused (`reach`): the peers' connections would come from addresses that nobody named.
What a variable has wrong is refused where its library may be in use on this host (`libraries`), elsewhere passed over.

HCCL: HCCL_IF_IP, HCCL_SOCKET_IFNAME and HCCL_SOCKET_FAMILY in the CANN environment variable reference (8.0 to 8.5).
gloo: GLOO_SOCKET_IFNAME, whole names, or labels of addresses (torch, ProcessGroupGloo). NCCL: NCCL_SOCKET_IFNAME in
NCCL's user guide; a port after a name says nothing of sockets (parseStringList in src/misc/utils.cc).
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from securerun.errors import PolicyError
from securerun.firewall.policy import Policy
from securerun.guard.documents import MAXIMUM_INTERFACES
from securerun.host import interfaces
from securerun.job.libraries import Library, Variables
from securerun.job.reach import Reach
from securerun.linux.networks import Network
from securerun.options import Options
from securerun.text import some

ADDRESS = "HCCL_IF_IP"
FAMILY = "HCCL_SOCKET_FAMILY"
HCCL, GLOO, NCCL = "HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"

_LIBRARIES = {ADDRESS: Library.HCCL, HCCL: Library.HCCL, GLOO: Library.GLOO, NCCL: Library.NCCL}
_VERSIONS = {"AF_INET": 4, "AF_INET6": 6}
_LISTED = 12


@dataclass(frozen=True)
class Entrance:
    """The interfaces that peers come in through. names: none means any. reason: who says so, in words.

    warnings: what the user should know about them.
    """

    names: tuple[str, ...]
    reason: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.names) or interfaces.ANY} ({self.reason})"


def entrance(
    options: Options, environment: Mapping[str, str], peers: Sequence[Network], variables: Variables | None = None
) -> Entrance:
    """Return where these peers may come in: what the user says, else what the variables name and what leads to a peer.

    A job without peers may have variables for another host: gloo and HCCL may not be used in it.
    variables: hears of those that are passed over.
    Raises PolicyError for an interface that this host does not have, and for a variable that cannot be read.
    """
    if options.interface is not None:
        return _of_option(options, environment, peers)
    if not peers:
        return Entrance((), "no peer is to come in")
    variables = variables or Variables(environment)
    found = dict(_named(environment, variables))
    if not found:
        return Entrance((), "no --interface, and no variable names one")
    return _of_variables(found, environment, peers, variables)


def _of_option(options: Options, environment: Mapping[str, str], peers: Sequence[Network]) -> Entrance:
    """Return what --interface names, each as its packets are seen: those of a bridge's port are the bridge's."""
    source = options.interface_source
    wanted = interfaces.require(interfaces.parse(options.interface), source)
    try:
        reach = Reach(peers)
        found = {name: _seen_as(name, reach) for name in wanted}
        names = tuple(dict.fromkeys(name for group in found.values() for name in group))
        readable = _readable(environment)
        _refuse_elsewhere(readable, environment, reach, Variables(environment))
        warnings = (*_of_gloo(readable, reach), *_closed_to(readable, names))
        missed = reach.misses(names) if names else None
    except OSError:  # the routes cannot be told
        return Entrance(wanted, source)
    if missed:
        otherwise = f"write --interface {','.join(missed.through)} in its place"
        raise PolicyError(f"{source} {options.interface}: {missed}; {missed.mended(otherwise)}")
    notes = [f"{name} is below {_listed(group)}" for name, group in found.items() if group != (name,)]
    return Entrance(names, "; ".join((source, *notes)), warnings)


def _seen_as(name: str, reach: Reach) -> tuple[str, ...]:
    """Return where the packets of an interface are seen: it, what it is a member of, or what lies on that to peers."""
    seen, on_top = interfaces.seen_as(name)
    leading = reach.leading
    upper = () if seen in leading else tuple(one for one in on_top if one in leading)
    return upper or (seen,)


def _of_variables(
    found: Mapping[str, tuple[str, ...]],
    environment: Mapping[str, str],
    peers: Sequence[Network],
    variables: Variables,
) -> Entrance:
    """Return the interfaces that the variables name, and those that lead to a peer."""
    names = tuple(dict.fromkeys(name for group in found.values() for name in group))
    source = ", ".join(found)
    try:
        reach = Reach(peers)
        leading = reach.leading
        _refuse_elsewhere(found, environment, reach, variables)
        warnings = tuple(_of_gloo(found, reach))
    except OSError as error:
        return Entrance((), f"{source} names {_listed(names)}, and the routes cannot be told: {error}")
    more = tuple(name for name in leading if name not in names)
    if not _fit_a_policy((*names, *more)):
        return Entrance((), f"{source} and the routes name more than a firewall can be told", warnings)
    reason = f"{source}; {_listed(more)} on the way to peers" if more else source
    return Entrance((*names, *more), reason, warnings)


def _of_gloo(found: Mapping[str, tuple[str, ...]], reach: Reach) -> Iterator[str]:
    """Warn of gloo's IPv4 address where peers are known by others: it has one for all, and falls back to no other."""
    for name in found.get(GLOO, ()):
        if reach.lacks_ipv4(name):
            yield (
                f"{GLOO}: gloo takes the IPv4 address of {name}, and peers there are named by IPv6 addresses alone: "
                "its connections are turned away; name their IPv4 addresses too, or write their names"
            )


def _closed_to(found: Mapping[str, tuple[str, ...]], names: Sequence[str]) -> Iterator[str]:
    """Warn of gloo on an interface that --interface leaves out."""
    missing = [name for name in found.get(GLOO, ()) if names and interfaces.seen_as(name)[0] not in names]
    if missing:
        yield (
            f"{GLOO} names {_listed(missing)}, and --interface lets peers in through {_listed(names)} alone: gloo's "
            f"connections through {_listed(missing)} are turned away; write --interface {','.join((*names, *missing))}"
        )


def _refuse_elsewhere(
    found: Mapping[str, tuple[str, ...]], environment: Mapping[str, str], reach: Reach, variables: Variables
) -> None:
    """Refuse interfaces of libraries that are on a network where no peer is named. Raises PolicyError and OSError.

    gloo connects through each of its interfaces, HCCL and NCCL through one of theirs.
    """
    for variable, names in found.items():
        groups = [[name] for name in names] if variable == GLOO else [names]
        for problem in filter(None, map(reach.elsewhere, groups)):
            with variables.of(_LIBRARIES[variable]):
                raise PolicyError(
                    f"{variable}={environment[variable].strip()}: {problem}; {problem.mended(f'unset {variable}')}"
                )


def _readable(environment: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return what the variables name that can be read; of what --interface overrides nothing else is an error."""
    found: dict[str, tuple[str, ...]] = {}
    for variable in _LIBRARIES:
        if not (variable == HCCL and ADDRESS in found):
            with contextlib.suppress(PolicyError):
                found |= _named({variable: environment.get(variable, "")}, Variables(environment))
    return found


def warnings(
    environment: Mapping[str, str], peers: Sequence[Network], variables: Variables | None = None
) -> Iterator[str]:
    """Yield what the user should know about HCCL's variables and who the peers are.

    variables: hears of those that are passed over. Raises PolicyError for a variable that HCCL would refuse.
    """
    version, source = None, ""
    with (variables or Variables(environment)).of(Library.HCCL):
        version, source = _version(environment)
    if peers and version is not None and not any(network.version == version for network in peers):
        yield (
            f"{source} has HCCL use IPv{version}, and no peer has such an address: its connections are turned away; "
            f"name the peers' IPv{version} addresses too, or unset {source.partition('=')[0]}"
        )


def _named(environment: Mapping[str, str], variables: Variables) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each variable that is set, and the interfaces of this host that it names."""
    here = interfaces.names()
    address, pattern = environment.get(ADDRESS, "").strip(), environment.get(HCCL, "").strip()
    with variables.of(Library.HCCL):
        if address:  # "HCCL_IF_IP > HCCL_SOCKET_IFNAME"
            yield ADDRESS, (_holder(address),)
        elif pattern:
            yield HCCL, _matching(HCCL, pattern, here)
    text = environment.get(GLOO, "").strip()
    if text:
        yield GLOO, _all_of(GLOO, text, here)
    pattern = environment.get(NCCL, "").strip()
    if pattern:
        with variables.of(Library.NCCL):
            yield NCCL, _matching(NCCL, re.sub(r":[0-9]+(?=\s*(?:,|$))", "", pattern), here)


def _matching(variable: str, pattern: str, here: Sequence[str]) -> tuple[str, ...]:
    """`eth,ib`: names that begin so; `=eth0,ib0`: these names; `^` before it: all others."""
    rest = pattern.removeprefix("^")
    excluding = rest != pattern
    words = _words(rest.removeprefix("="))
    exact = rest.startswith("=")
    if not words:
        raise PolicyError(f"{variable}={pattern} names no interface; {_advice(variable, here)}")
    matching = [any(name == word if exact else name.startswith(word) for word in words) for name in here]
    found = tuple(name for name, matches in zip(here, matching) if matches != excluding)
    if not found:
        what = "leaves no interface of this host" if excluding else "matches no interface of this host"
        raise PolicyError(f"{variable}={pattern} {what}; {_advice(variable, here)}")
    return found


def _all_of(variable: str, text: str, here: Sequence[str]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys((interfaces.labelled(word) or (word,))[0] for word in _words(text)))
    missing = [word for word in words if word not in here]
    if missing or not words:
        raise PolicyError(
            f"{variable}={text}: there is no interface {(missing or [text])[0]!r} here; {_advice(variable, here)}"
        )
    return words


def _holder(text: str) -> str:
    """Return the interface that has HCCL's address."""
    address = _address(text)
    name = interfaces.with_address(str(address))
    if name is None:
        raise PolicyError(f"{ADDRESS}={text}: no interface of this host has that address; see `ip addr`, or unset it")
    return name


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    with contextlib.suppress(ValueError):
        # HCCL takes an interface's name after the address, with either version.
        return ipaddress.ip_address(text.partition("%")[0])
    raise PolicyError(f"{ADDRESS}={text} is no IP address; write export {ADDRESS}=10.0.0.1, or unset it")


def _version(environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Return the IP version that HCCL is told to use, if it is told, and by what."""
    family, address = environment.get(FAMILY, "").strip(), environment.get(ADDRESS, "").strip()
    if family and family not in _VERSIONS:
        raise PolicyError(f"{FAMILY}={family} is no address family of HCCL's; write AF_INET or AF_INET6, or unset it")
    if address:
        return _address(address).version, f"{ADDRESS}={address}"
    return _VERSIONS.get(family), f"{FAMILY}={family}"


def _fit_a_policy(names: Sequence[str]) -> bool:
    """Return whether a policy can hold these names, and a guard be told of them."""
    try:
        Policy("0" * 12, (), (), tuple(names))
    except PolicyError:
        return False
    return len(names) <= MAXIMUM_INTERFACES


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _advice(variable: str, here: Sequence[str]) -> str:
    return f"this host has {_listed(here)}; correct or unset {variable}, or say --interface NAMES (`any` for all)"


def _listed(names: Sequence[str]) -> str:
    return some(names, _LISTED)
