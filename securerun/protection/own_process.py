"""A run of the process that asks for it: its lease, from Python."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from securerun.errors import PolicyError, UsageError
from securerun.firewall.policy import NAMESPACE, Layer, Policy
from securerun.guard.protocol import Guarding, Order
from securerun.protection import client, enclosing

_APART = "securerunctl exec --scope namespace -- python PROGRAM"
# Why such a program gets no network of its own, and what gives it one.
A_PROGRAM_STAYS = (
    "in a network of its own: a program that goes on after the job stays in the one that it is in",
    _APART,
)


@contextlib.contextmanager
def guarded(
    policy: Policy,
    *,
    firewall: str | None = None,
    scope: str | None = None,
    grace: float | None = None,
    command: str = "",
    tell: client.Tell = lambda _: None,
    key: str | None = None,
) -> Iterator[Guarding]:
    """Hold a lease on this process, and on all that it starts, for a policy (`securerun.policy` makes one).

    It lasts beyond the block: until the last process that was started in it has ended. This one is out of it then, and
    what it made in the block stays behind the shield. Where that cannot be, as without a shield while it still listens,
    it stays in, and the next lease is refused.

    grace: seconds between SIGTERM and SIGKILL for what is left when the block raises or this process is killed. key: as
    for --key; where the policy has no peers, and there is a key, its tag is the only way in. What is not given comes
    from the environment and the site file, as for `securerunctl exec`; a key is off where neither says another.
    In a run that is in a network of its own that is relied on: nobody can connect.
    Raises PrivilegeError, with nothing installed, when the job cannot be guarded, PolicyError in a process that is
    in a run of its own which has other peers, and UsageError for a network of this process' own: a program that runs
    stays in the one that it is in.
    """
    around = enclosing.in_own_network(os.environ)
    if around:
        if policy.peers or policy.public:
            raise PolicyError(
                f"run {around} is in a network of its own, to which nobody can connect: neither can peers"
            )
        yield Guarding((Layer(NAMESPACE, f"of run {around}"),), ())
        return
    from securerun import options
    from securerun.protection import plan

    asked = plan.asked_by_program(firewall=firewall, scope=scope, key=key)
    if grace is None:
        grace = options.seconds(asked.grace, asked.grace_source)
    if asked.scope == NAMESPACE:
        raise UsageError(
            f"{asked.scope_source} {NAMESPACE}: a program that runs stays in its network; start it with {_APART}"
        )
    client.require_parted()
    client.require_peers_of_others(policy.peers)
    of_job = plan.key_order(asked)
    guard = client.Guard()
    guard.note(*A_PROGRAM_STAYS)
    guarding = guard.guard(Order(policy, asked.firewall, asked.scope, grace, command, key=of_job), tell)
    failed = True
    try:
        yield guarding
        failed = False
    finally:
        guard.release(failed)
        guard.require_kept()
