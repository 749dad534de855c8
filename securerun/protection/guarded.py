"""Protect this process and all that it starts: by a lease of its own, the one that it is in already, or by nothing.

Plan → lease → the job → release, and what is said on the way. Who starts the job in between is another's part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Callable

from securerun.console import say
from securerun.errors import PolicyError
from securerun.guard.protocol import Notice, Order
from securerun.job.renewal import Renewal
from securerun.linux import signals
from securerun.protection import client, enclosing
from securerun.protection.client import Guard
from securerun.protection.enclosing import Enclosing
from securerun.protection.events import Finished, Gone, Hear, Installed, Renewed, nobody
from securerun.text import printable

if TYPE_CHECKING:
    from securerun.firewall.policy import Policy
    from securerun.guard.protocol import Guarding
    from securerun.job.job import Job
    from securerun.job.peers import Peers
    from securerun.options import Options
    from securerun.protection.apart import Apart
    from securerun.protection.denials import KeyInForce
    from securerun.protection.plan import Plan

_COMMAND_SHOWN = 1000


@contextmanager
def protected(
    plan: Plan, guard: Guard | Apart | None, hear: Hear = nobody, *, may_leave_job: bool = False
) -> Iterator[None]:
    """Protect this process and all that it starts in the block, as the plan says; `guard` is one made early.

    may_leave_job: whether a block that ends well may have left the job running, as with nohup. One that raises is a job
    that failed. Raises PrivilegeError or PolicyError, with nothing installed, when the job cannot be guarded.
    """
    for warning in plan.peers.warnings if plan.task.is_first else ():
        say(warning)
    hear(plan)
    with _whitelisted(plan, may_leave_job) as change_whitelist, _layers(plan, guard, change_whitelist, hear):
        yield


def rely_on(run: Enclosing, asked: Options, job: Job) -> None:
    """Have the lease of the run that this process is in protect what is started here too, and say so.

    Raises PolicyError for who insists on more than that run has.
    """
    from securerun.job import tasks
    from securerun.protection import words

    if run.terms.get("public"):
        _require_apart(run, asked, job)
    without_effect = enclosing.without_effect(asked, run)
    if without_effect or tasks.of_environment(os.environ).is_first:
        for line in (words.relying(run.run_id, without_effect), *words.elsewhere(job)):
            say(line)


def require_same_peers(run: Enclosing, asked: Options, plan: Callable[[], Plan]) -> None:
    """Raise PolicyError where this process is in a run of its own, not over yet, that has other peers than the plan.

    Of two launches in two threads each is to have its own. What is launched within `securerun.guarded` has the peers
    that were given there, unless it names some.
    """
    peers = client.peers_in_force().get(run.run_id)
    is_launch = bool(run.terms)
    if peers is None or not (is_launch or asked.peers):
        return
    wanted = plan().policy.peers
    if not client.are_within(wanted, peers) or (is_launch and not client.are_within(peers, wanted)):
        raise PolicyError(client.in_the_way(run.run_id))


def _require_apart(run: Enclosing, asked: Options, job: Job) -> None:
    """Raise PolicyError where what this job's nodes alone may reach is a public port of the run that it is in."""
    from securerun.job import ports, public

    source = f"--public of run {run.run_id}"
    try:
        openings = public.openings(str(run.terms["public"]), source)
    except PolicyError:  # of a list that was too long, a digest is known
        return
    planned = ports.plan_ports(job, os.environ, asked.ports, asked.ports_source)
    public.within((each for each in planned if each.is_asked_for), openings, source)


def _layers(
    plan: Plan, guard: Guard | Apart | None, change_whitelist: Callable[[Peers], None], hear: Hear
) -> AbstractContextManager[None]:
    if plan.options.unprotected:
        return _unprotected(hear)
    return _guarded(guard or Guard(), plan, change_whitelist, hear)


@contextmanager
def _guarded(guard: Guard | Apart, plan: Plan, change_whitelist: Callable[[Peers], None], hear: Hear) -> Iterator[None]:
    """Have this process guarded; let the guard go when the job is over, and say who was turned away."""
    from securerun.protection import words

    asked = plan.options
    command = printable(" ".join(plan.job.command)[:_COMMAND_SHOWN])

    policy = plan.policy

    def change_peers(before: Peers, now: Peers) -> None:
        nonlocal policy
        policy = replace(policy, peers=now.networks)
        guard.change_peers(now.networks)
        change_whitelist(now)
        hear(Renewed(before, now))
        if plan.task.is_first:
            say(words.renewed(before, now))

    renewal = Renewal(plan.peers, change_peers, say)
    order = Order(plan.policy, asked.firewall, asked.scope, plan.grace, command, key=plan.key.order)
    guarding: Guarding | None = None

    def key() -> KeyInForce | None:
        return words.key_in_force(plan, guarding)

    guarding = guard.guard(order, _teller(lambda: policy, key, renewal, hear))
    plan = plan.without(guarding.left_out)
    policy = plan.policy
    hear(Installed(guarding, guard.way))
    terms_before = os.environ.get(enclosing.TERMS_VARIABLE)
    os.environ[enclosing.TERMS_VARIABLE] = enclosing.terms(
        plan.policy.run_id,
        asked,
        shield=guarding.has_shield,
        needs_guard=guarding.needs_guard,
        has_key=bool(guarding.fingerprint),
    )
    for line in words.start(plan, guarding, guard.way):
        say(line)
    failed = True
    try:
        with renewal:
            yield
        failed = False
    finally:
        # A second Ctrl-C would end the farewell in its middle: the guard needs none, but the user misses the summary.
        with signals.held_back():
            hear(Finished(failed))
            _say_farewell(guard, plan, policy, hear, guarding, failed=failed)
            if guard.has_parted:
                client.put_back(enclosing.TERMS_VARIABLE, terms_before)
        guard.require_kept()


@contextmanager
def _whitelisted(plan: Plan, may_leave_job: bool) -> Iterator[Callable[[Peers], None]]:
    """HCCL's own list, where it is asked for. Yields what takes the peers when their addresses change."""
    if not plan.whitelist:
        yield lambda _: None
        return
    from securerun.job import hccl_whitelist

    def change(now: Peers) -> None:
        try:
            made.change(hccl_whitelist.addresses_of(now.listed))
        except OSError as error:
            say(f"HCCL's list cannot be changed ({error}), so HCCL turns the new addresses away")

    with hccl_whitelist.whitelisted(plan.whitelist, os.environ, may_leave_job=may_leave_job) as made:
        say(f"HCCL accepts {len(plan.whitelist)} addresses by {made.path}; every node needs --hccl-whitelist")
        yield change


@contextmanager
def _unprotected(hear: Hear) -> Iterator[None]:
    """Warn before and after, so that it stands at both ends of a long log."""
    from securerun.protection import words

    say(words.unprotected())
    failed = True
    try:
        yield
        failed = False
    finally:
        hear(Finished(failed))
        say(words.unprotected())


def _teller(
    policy: Callable[[], Policy], key: Callable[[], KeyInForce | None], renewal: Renewal, hear: Hear
) -> Callable[[Notice], None]:
    """Return what takes the news from the guard, while the job runs."""
    from securerun.protection import words

    def tell(notice: Notice) -> None:
        hear(notice)
        for line in words.news(policy(), notice, key()):
            say(line)
        if notice.denied or notice.more:
            renewal.hurry()

    return tell


def _say_farewell(
    guard: Guard | Apart, plan: Plan, now: Policy, hear: Hear, guarding: Guarding, *, failed: bool
) -> None:
    """Let the guard go, and say who was turned away, where that anybody can have been."""
    from securerun.protection import words

    released = guard.release(failed)
    hear(released or Gone())
    denied, more = (released.denied, released.more) if released else (None, 0)
    if denied == () and not (plan.task.is_first and not guarding.is_apart):
        return
    for line in (
        *words.end(plan.policy, now, denied, more, words.key_in_force(plan, guarding)),
        *words.nodes(plan, released),
    ):
        say(line)
