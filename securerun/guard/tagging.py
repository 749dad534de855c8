"""What becomes of a policy where the job has a key: who shows a tag comes in, and tags are written where nodes can be.

Loaded where a job has a key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from securerun.firewall import tag
from securerun.firewall.policy import Admission, Policy
from securerun.linux.addresses import own_networks
from securerun.linux.networks import Network, collapse


def by_key(policy: Policy, *, required: bool) -> Policy:
    """Return the policy of a job that has a key. Raises OSError where the kernel does not tell this host's networks.

    required: nobody comes in without a tag; where there are peers, nobody who is none of them either. Else a tag only
    adds to who comes in by address.
    """
    admission = Admission.EITHER
    if required:
        admission = Admission.BOTH if policy.peers else Admission.TAG
    return replace(policy, admission=admission, tagged=networks_of(policy.peers, close_loopback=policy.close_loopback))


def networks_of(peers: Iterable[Network], *, close_loopback: bool) -> tuple[Network, ...]:
    """Return the networks towards which a job with these peers writes tags. Raises OSError.

    Over an open loopback nobody is asked for a tag.
    """
    loopback = tag.LOOPBACK if close_loopback else ()
    return collapse((*tag.WHERE_NODES_ARE, *own_networks(), *loopback, *peers))
