"""A hook of container engines: hang a shield on a container's cgroup before its process starts (OCI, createRuntime).

What is in the image need not know of it. Nobody stays behind: the kernel keeps the shield as long as the cgroup. There
is no run, so nothing is counted or told, and nothing lasts. What cannot be understood keeps the container from
starting.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
from collections.abc import Sequence

from securerun.errors import PolicyError, PrivilegeError, SecurerunError
from securerun.firewall import selftest, shield
from securerun.firewall.policy import Opening, Policy
from securerun.firewall.refusals import ShieldUnavailable
from securerun.linux import cgroups, proc
from securerun.linux.cgroups import CgroupUnavailable, relative
from securerun.linux.networks import Network, collapse, within

PEERS, PUBLIC = "securerun.peers", "securerun.public"
_NO_RUN = "0" * 12
# An engine's states are some kilobytes, and annotations may be long.
_MOST_BYTES = 1 << 20
_MOST_PEERS = 4096
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)


def main(_: Sequence[str]) -> int:
    """Hang the shield that the state on standard input asks for. Return the exit status; the engine shows the words."""
    try:
        pid, policy = understood(os.fdopen(0, "rb", closefd=False).read(_MOST_BYTES + 1))
        hang(pid, policy)
    except (SecurerunError, CgroupUnavailable, ShieldUnavailable, OSError) as error:
        print(f"securerun: the container cannot be shielded: {error}", file=sys.stderr)
        return getattr(error, "status", PrivilegeError.status)
    return 0


def understood(text: bytes) -> tuple[int, Policy]:
    """Return a container's first process, and who may connect to it. Raises PolicyError for what is not understood.

    text: the state that the runtime specification has for hooks.
    """
    if len(text) > _MOST_BYTES:
        raise PolicyError(f"the container's state has more than {_MOST_BYTES} bytes")
    try:
        state = json.loads(text)
        pid, annotations = state["pid"], state.get("annotations") or {}
        peers, public = annotations.get(PEERS), annotations.get(PUBLIC, "")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PolicyError("standard input has no state of a container; a container engine starts this") from error
    if type(pid) is not int or pid <= 1:
        raise PolicyError("the container's state names no process; the hook is one of createRuntime")
    if not isinstance(peers, str) or not isinstance(public, str):
        raise PolicyError(f"the container has no annotation {PEERS}")
    return pid, Policy(_NO_RUN, (), _networks(peers), public=_openings(public))


def hang(pid: int, policy: Policy) -> None:
    """Hang a shield on the cgroup of a container, proven. Raises CgroupUnavailable, ShieldUnavailable or OSError."""
    ended = f"process {pid} has ended, or was moved, before it was behind its shield"
    try:
        start = proc.start_time(pid)
    except proc.GONE as error:
        raise CgroupUnavailable(ended) from error
    try:
        path = _hang(pid, policy)
    except OSError as error:
        if proc.is_running(pid, start):
            raise
        raise CgroupUnavailable(ended) from error
    if not proc.is_running(pid, start) or cgroups.cgroup_of(pid) != path:
        raise CgroupUnavailable(ended)


def _hang(pid: int, policy: Policy) -> str:
    """Hang a shield on the cgroup of a process, and return which that is."""
    path = cgroups.cgroup_once_mounted(pid)
    if relative(cgroups.cgroup_of(os.getpid()), path) is not None:
        raise CgroupUnavailable(f"process {pid} is in {path}, which is no container's own cgroup")
    place = next(cgroups.places_of(path), None)
    if place is None:
        raise CgroupUnavailable("no cgroup v2 file system is mounted here, and none may be mounted")
    *ancestors, cgroup = place.open(with_last=True)
    shield.refuse_conflicts(ancestors)
    # Nothing of it is closed: the descriptors go with this process, and the kernel keeps what is hung up.
    shield.Shield.attach(cgroup, policy)
    selftest.require_proof(cgroup, pid)
    return path


def _networks(text: str) -> tuple[Network, ...]:
    """Return the peers of an annotation: addresses and networks, with commas between; nobody for an empty one."""
    words = text.replace(",", " ").split()
    if len(words) > _MOST_PEERS:
        raise PolicyError(f"annotation {PEERS} has more than {_MOST_PEERS} networks")
    return collapse(map(_network, words))


def _network(word: str) -> Network:
    try:
        network = ipaddress.ip_network(word, strict=False)
    except ValueError as error:
        raise PolicyError(
            f"annotation {PEERS}: {word[:60]!r} is neither an address nor a network; names are not looked up here"
        ) from error
    address = word.partition("/")[0]
    # A scope id is refused with all others.
    if "%" not in word and network.network_address != ipaddress.ip_address(address):
        raise PolicyError(f"annotation {PEERS}: {within(word, address, network)}")
    return network


def _openings(text: str) -> tuple[Opening, ...]:
    """Return the ports of an annotation that are for every host. Raises PolicyError."""
    found = []
    for word in text.replace(",", " ").split():
        ports = _PORTS.fullmatch(word)
        if ports is None:
            raise PolicyError(f"annotation {PUBLIC}: {word[:60]!r} is no port or range; write 8080 or 9000-9010")
        found.append(Opening(int(ports[1]), int(ports[2] or ports[1])))
    return tuple(sorted(found, key=lambda one: one.first))
