"""securerunctl plan: what a launch would install, for people, for programs, and as a script to apply by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

from securerun import run
from securerun.console import say
from securerun.errors import PolicyError
from securerun.protection.plan import Plan


def print_plan(arguments: Sequence[str], form: str) -> None:
    """Print the plan of the launch with these arguments of securerun's command line, in one of `app.PlanFormat`.

    Raises SecurerunError where the launch would be refused, and PolicyError for a plan that has no such form.
    """
    if form == "table":
        run.main(["--dry-run", *arguments])
        return
    plan = run.plan(arguments)
    for warning in plan.peers.warnings:
        say(warning)
    print(render(plan, form), end="")


def render(plan: Plan, form: str) -> str:
    """Return the plan in one of the forms that are not for people. Raises PolicyError for one that it does not have."""
    from securerun.evidence import documents
    from securerun.firewall import nftables, script
    from securerun.protection import words

    if form == "json":
        return json.dumps(documents.of_plan(plan), indent=2) + "\n"
    if form == "iptables":
        return words.iptables_rules(plan.policy)
    if form == "sh":
        return script.render(plan.policy, plan.options.firewall, words.about(plan))
    if plan.policy.accept:
        raise PolicyError(nftables.NO_ACCEPT)
    return words.nftables_rules(plan.policy)
