"""A launch as JSON's own types, for programs and for reports: what was asked, from where, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from securerun.guard.protocol import policy_document
from securerun.options import OPTIONS, Options
from securerun.protection.guarded import Launch

_DEFAULT = "default"


def of_launch(launch: Launch) -> dict[str, Any]:
    """What would run, the policy, and where each part of it comes from. Every field is always there.

    `policy` is as the guard gets it; `entrance` says why peers come in through its interfaces. `peers` says who named
    them and what each host name stands for, `hccl_whitelist` what HCCL is given. `options` has the value of each option
    of securerun's and its origin: a flag, a variable, a file, or `default`.
    """
    job = launch.job
    return {
        "command": list(job.command),
        "rendezvous": {
            "backend": job.backend,
            "endpoint": str(job.endpoint) if job.endpoint else None,
            "min_nodes": job.min_nodes or None,
            "max_nodes": job.max_nodes or None,
            "node_rank": job.node_rank,
        },
        "policy": policy_document(launch.policy),
        "peers": {
            "source": launch.peers.source,
            "names": {name: [str(network) for network in found] for name, found in launch.peers.named.items()},
            "warnings": list(launch.peers.warnings),
        },
        "entrance": launch.entrance.reason,
        "hccl_whitelist": list(launch.whitelist),
        "umask": f"{launch.umask:04o}",
        "grace": launch.grace,
        "options": dict(_options(launch.options)),
    }


def _options(asked: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    for option in OPTIONS:
        value = getattr(asked, option.key)
        yield option.key, {"value": value, "origin": asked.origins.get(option.key, _DEFAULT)}
