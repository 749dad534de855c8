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


def by_key(
    policy: Policy,
    *,
    required: bool,
    towards: Iterable[Network] = (),
    through_any: bool = False,
    within: Iterable[Network] = (),
) -> Policy:
    """Return the policy of a job that has a key. Raises OSError where the kernel does not tell this host's networks.

    required: nobody comes in without a tag; where there are peers, nobody who is none of them either. Else a tag only
    adds to who comes in by address. towards: where the job meets, beside where nodes can be. through_any: the
    policy's interfaces are for addresses alone.
    within: the networks that the site lets peers be in; a tag counts from these alone. Peers are in them already.
    """
    admission = Admission.EITHER
    if required:
        admission = Admission.BOTH if policy.peers else Admission.TAG
    return replace(
        policy,
        admission=admission,
        tagged=networks_of((*policy.peers, *towards), close_loopback=policy.close_loopback),
        tags_through_any=through_any,
        tags_from=collapse(within) if admission.is_by_tag_alone else (),
    )


def by_address(policy: Policy, peers: tuple[Network, ...]) -> Policy:
    """Return the policy of a job that has no key after all, and these peers."""
    return replace(policy, admission=Admission.ADDRESS, peers=peers, tagged=(), tags_through_any=False, tags_from=())


def networks_of(networks: Iterable[Network], *, close_loopback: bool) -> tuple[Network, ...]:
    """Return the networks towards which a job writes tags whose peers, and where it meets, these are. Raises OSError.

    Over an open loopback nobody is asked for a tag.
    """
    loopback = tag.LOOPBACK if close_loopback else ()
    return collapse((*tag.WHERE_NODES_ARE, *own_networks(), *loopback, *networks))
