"""Where the shield is tried: hosts, and on one of them a cgroup that is the job's and one that is not."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
from cgroups import Cgroup, new_cgroup
from hosts import Host, Network
from patience import patient

from securerun.linux.bpf import AttachType

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
INGRESS, EGRESS = AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS

# Nothing on these wires takes a millisecond; a machine that is busy with other tests may.
PATIENCE_SECONDS = patient(0.5)


@dataclass(frozen=True)
class ShieldField:
    """The hosts, the job's cgroup, and one that is not the job's."""

    host: Host
    peer: Host
    stranger: Host
    job: Cgroup
    elsewhere: Cgroup


Field = TypeVar("Field", bound=ShieldField)


@contextlib.contextmanager
def field_of(kind: type[Field], network: Network) -> Iterator[Field]:
    """A field of this kind; its host is node0, its peer node1."""
    with new_cgroup() as job, new_cgroup() as elsewhere:
        yield kind(network["node0"], network["node1"], network["stranger"], job, elsewhere)


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port
