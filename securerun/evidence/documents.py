"""A launch as JSON's own types, for programs and for reports: what was asked, from where, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from securerun.guard.documents import policy_document
from securerun.options import OPTIONS, Options
from securerun.protection import words
from securerun.protection.plan import Plan

_DEFAULT = "default"


def of_plan(plan: Plan) -> dict[str, Any]:
    """Return what would run, the policy, and where each part of it comes from. Every field is always there.

    `not_guarded` has a line for each program of the command that has others start things.
    `policy` is as the guard gets it; `entrance` says why peers come in through its interfaces. `peers` says who named
    them and what each host name stands for; `key` what the nodes know each other by, where the launcher knows it (a
    fingerprint, and never the key), and is null without; `hccl_whitelist` what HCCL is given. `options` has the value
    of each option of securerun's and its origin: a flag, a variable, a file, or `default`.
    """
    job = plan.job
    return {
        "command": list(job.command),
        "not_guarded": list(words.elsewhere(job)),
        "rendezvous": {
            "backend": job.backend,
            "endpoint": str(job.endpoint) if job.endpoint else None,
            "min_nodes": job.min_nodes or None,
            "max_nodes": job.max_nodes or None,
            "node_rank": job.node_rank,
        },
        "policy": {"public": [], **policy_document(plan.policy)},
        "peers": {
            "source": plan.peers.source,
            "names": {name: [str(network) for network in found] for name, found in plan.peers.named.items()},
            "warnings": list(plan.peers.warnings),
        },
        "key": _key(plan),
        "entrance": plan.entrance.reason,
        "hccl_whitelist": list(plan.whitelist),
        "umask": f"{plan.umask:04o}",
        "grace": plan.grace,
        "options": dict(_options(plan.options)),
    }


def _key(plan: Plan) -> dict[str, Any] | None:
    key = plan.key
    if key.order is None:
        return None
    return {"fingerprint": key.fingerprint or None, "source": key.source or None, "required": key.is_required}


def _options(asked: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    for option in OPTIONS:
        value = getattr(asked, option.key)
        yield option.key, {"value": value, "origin": asked.origins.get(option.key, _DEFAULT)}
