"""What Slurm's configuration says of its controllers, and its scontrol of a job's nodes: for its prologs and guards."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from securerun.errors import PolicyError
from securerun.job import batch, entries, resolver, slurm_conf
from securerun.linux.networks import Network, collapse, is_address

_MOST_CONTROLLERS = 16
_NODES = re.compile(r"\sNodeList=(\S+)")
_USER = re.compile(r"\sUserId=[^\s(]*\(([0-9]{1,10})\)")


def controllers(environment: Mapping[str, str]) -> tuple[Network, ...]:
    """Return the addresses of Slurm's controllers; none where its configuration does not name them.

    Read from the file, since a prolog that asks slurmctld itself, on each of 1,000 nodes, keeps it from its work.
    """
    words = list(dict.fromkeys(slurm_conf.controllers(environment)))[:_MOST_CONTROLLERS]
    outcomes = resolver.ask((word for word in words if not is_address(word)), resolver.addresses_of)
    found = [word for word in words if is_address(word)]
    for outcome in outcomes.values():
        found += outcome if isinstance(outcome, tuple) else ()
    return tuple(collapse(network for word in found for network in _usable(word)))


def _usable(address: str) -> Iterator[Network]:
    """Yield the network of an address that another host may have: a cluster of one node has its loopback there."""
    with contextlib.suppress(PolicyError):
        network = entries.literal(address, "slurm.conf")
        if network is not None:
            yield network


def nodes_of(number: int, user: int, environment: Mapping[str, str]) -> str:
    """Return the list of the nodes that a user's job has now. Raises PolicyError where Slurm knows no such job."""
    text = batch.ask_scontrol(("--oneliner", "show", "job", str(number)), environment)
    lines = [line for line in text.splitlines() if (owner := _USER.search(line)) and int(owner[1]) == user]
    lists = [found[1] for line in lines if (found := _NODES.search(line)) and found[1] != "(null)"]
    if not lists:
        raise PolicyError(f"Slurm knows no job {number} of user {user} with nodes")
    return ",".join(dict.fromkeys(lists))
