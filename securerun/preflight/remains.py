"""What an old run left on this host: records of dead runs, and workers whose launcher is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator

from securerun.finding import Finding
from securerun.guard import records
from securerun.linux import proc
from securerun.preflight.scene import Scene

# torch/distributed/elastic/agent/server/local_elastic_agent.py gives it to every worker.
_WORKERS_VARIABLE = b"TORCHELASTIC_RUN_ID="
_NAMED = 8


def dead_runs(scene: Scene) -> Iterator[Finding]:
    """Yield runs whose guard and launcher were both killed. The next guard of any run removes what they left."""
    for record in records.read_host():
        if record.is_abandoned:
            yield Finding(
                "remains",
                f"run {record.run_id} was killed together with its guard",
                "its rules, cgroup or record are still here until another run, or you, remove them",
                "securerunctl clean",
            )


def orphans(scene: Scene) -> Iterator[Finding]:
    """Workers of this user's that init has taken over, as they are when their launcher was killed."""
    for pid in _orphans()[:_NAMED]:
        yield Finding(
            "remains",
            f"process {pid} ({_command(pid)}) is a worker whose launcher is gone",
            "it may hold accelerators, memory and ports that the job wants",
            f"kill {pid}",
        )


CHECKS = (dead_runs, orphans)


def _orphans() -> list[int]:
    children = proc.children(proc.INIT)
    # In a container the first process may be a launcher itself, and its workers are no orphans.
    if b"python" in proc.arguments(proc.INIT)[0]:
        return []
    ours = os.getuid()
    return [pid for pid in children if _is_of(ours, pid) and _is_worker(pid)]


def _is_of(user: int, pid: int) -> bool:
    try:
        return proc.owner(pid) == user
    except OSError:
        return False


def _is_worker(pid: int) -> bool:
    return any(entry.startswith(_WORKERS_VARIABLE) for entry in proc.environment(pid).split(b"\0"))


def _command(pid: int) -> str:
    try:
        words = proc.arguments(pid)
    except OSError:
        return "gone"
    return os.fsdecode(b" ".join(words[:3])).strip()
