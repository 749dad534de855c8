"""What becomes of a policy where the job has a key: who shows a tag comes in, and tags are written where nodes can be.

Loaded where a job has a key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from securerun.errors import PolicyError
from securerun.firewall import tag
from securerun.firewall.policy import Admission, Policy
from securerun.linux.networks import Network, collapse


def by_key(
    policy: Policy,
    own: Iterable[Network],
    *,
    required: bool,
    towards: Iterable[Network] = (),
    through_any: bool = False,
    within: Iterable[Network] = (),
) -> Policy:
    """Return the policy of a job that has a key, on a host that is in these networks.

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
        tagged=networks_of((*policy.peers, *towards), own, close_loopback=policy.close_loopback),
        tags_through_any=through_any,
        tags_from=collapse(within) if admission.is_by_tag_alone else (),
    )


def by_address(policy: Policy, peers: tuple[Network, ...]) -> Policy:
    """Return the policy of a job that has no key after all, and these peers."""
    return replace(policy, admission=Admission.ADDRESS, peers=peers, tagged=(), tags_through_any=False, tags_from=())


def with_peers(
    policy: Policy, peers: tuple[Network, ...], own: Iterable[Network], towards: Iterable[Network]
) -> Policy:
    """Return the policy of a job that has a key with other peers, on a host that is in these networks.

    Raises PolicyError where none are left and each is to show an address too, and where a tag is the only way in.
    """
    if peers and policy.admission is Admission.TAG:
        raise PolicyError("the only way in to this run is a tag of its key, so nobody can be named a peer of it")
    tagged = networks_of((*peers, *towards), own, close_loopback=policy.close_loopback)
    return replace(policy, peers=peers, tagged=tagged)


def networks_of(networks: Iterable[Network], own: Iterable[Network], *, close_loopback: bool) -> tuple[Network, ...]:
    """Return the networks towards which a job writes tags whose peers, and where it meets, these are.

    own: those of this host. Over an open loopback nobody is asked for a tag.
    """
    loopback = tag.LOOPBACK if close_loopback else ()
    return collapse((*tag.WHERE_NODES_ARE, *own, *loopback, *networks))
