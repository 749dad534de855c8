"""The two ways into a job that has a key: a tag that its key made, and an address that its peers name."""

from __future__ import annotations

from cgroups import new_cgroup
from dialing import attempt
from hosts import Host
from probe import reach
from tag_field import shielded, within

from securerun.firewall.job_key import JobSecret

SECRET = bytes(range(32))


def by_key(origin: Host, target: Host, port: int) -> bool:
    """Whether a node of the job that has the key gets in from a host."""
    with new_cgroup() as there, shielded(there, key=JobSecret(SECRET).key()):
        return within(there, origin, lambda: attempt(target.ipv4, port)) == "connected"


def by_address(origin: Host, target: Host, port: int) -> bool:
    """Whether anybody at all gets in from a host."""
    return all(reach(origin, [(target.ipv4, port)]).values())
