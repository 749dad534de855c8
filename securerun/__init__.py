"""torchrun, with the job's network closed to everyone but the job.

    from securerun import guarded, policy

    with guarded(policy(peers="node0,node1")):
        train()

`guarded` is the same lease as a context manager. `job_secret()` is what all nodes of a job that has a key have in
common, for whatever its programs have to prove to each other. Importing this package starts nothing and loads nothing:
workers that are spawned import the launcher's script again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from securerun.protection.job_secret import job_secret
    from securerun.protection.own_process import guarded
    from securerun.protection.plan import policy

__all__ = ["guarded", "job_secret", "policy"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module holds
    if name == "guarded":
        from securerun.protection.own_process import guarded

        return guarded
    if name == "job_secret":
        from securerun.protection.job_secret import job_secret

        return job_secret
    if name == "policy":
        from securerun.protection.plan import policy

        return policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
