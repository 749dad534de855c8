"""The preflight of a launch: what can be begun early is, and the verdict comes before anything is started.

What is found is said only when the job is guarded: a launch that is refused has one thing to fix first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securerun.console import say
from securerun.errors import PolicyError
from securerun.finding import Finding
from securerun.preflight.scene import Scene
from securerun.protection.events import Checked, Hear, nobody
from securerun.text import count

if TYPE_CHECKING:
    from securerun.job.job import Job
    from securerun.options import Options
    from securerun.preflight.reading import Reading
    from securerun.protection.plan import Plan

WARN, STRICT, OFF = "warn", "strict", "off"


@dataclass(frozen=True)
class Early:
    """What is known, or under way, before torch has been imported.

    umask: the shell's. rules: the host's, being read; None where nothing is to be looked at, or it can wait.
    """

    umask: int
    rules: Reading | None = None


def begin(asked: Options, umask: int, *, reads_rules: bool) -> Early:
    """Begin what takes other programs: that overlaps the import of torch, and comes before --run-as takes effect."""
    if not reads_rules or _mode(asked) == OFF:
        return Early(umask)
    from securerun.preflight.reading import Reading

    return Early(umask, Reading())


def inspect(plan: Plan, early: Early, hear: Hear = nobody) -> tuple[Finding, ...]:
    """Look at the host and at what the plan says; `hear` is told of what was found.

    Raises PolicyError where --preflight strict finds anything.
    """
    mode = _mode(plan.options)
    if mode == OFF and plan.options.report is None:
        return ()
    from securerun.preflight.reading import Reading

    rules = early.rules or Reading()
    try:
        scene = Scene(
            umask=early.umask,
            environment=os.environ,
            command=plan.job.command,
            log_dir=plan.job.log_dir,
            # What nobody asked for is the guard's to leave out, and no reason for anything.
            ports=tuple(port for port in plan.policy.ports if port.is_asked_for),
            meeting_port=_shared_port(plan.job),
            siblings=plan.task.has_siblings,
            reserved=not plan.options.unprotected,
            peers=plan.policy.peers,
            interfaces=plan.policy.interfaces,
            rules=rules,
        )
        return _found(scene, mode, hear, _permissions(scene, plan.options))
    finally:
        rules.close()


def inspect_inner(job: Job, asked: Options, early: Early) -> tuple[Finding, ...]:
    """Do the same inside of a run, where only who asks for it is looked at: ports and peers are that run's."""
    mode = asked.preflight or OFF
    if mode == OFF:
        return ()
    scene = Scene(umask=early.umask, environment=os.environ, command=job.command, log_dir=job.log_dir, reserved=True)
    return _found(scene, mode)


def require_none(findings: Sequence[Finding]) -> None:
    """Raise PolicyError, with a line for each finding, where there is any."""
    if findings:
        found = count(len(findings), "finding")
        verdict = f"--preflight strict: {found}, so nothing was started; fix them, or use --preflight warn"
        raise PolicyError("\n".join([*map(str, findings), verdict]))


def tell(findings: Iterable[Finding]) -> None:
    """Say a line of each finding, to whoever started the job."""
    for finding in findings:
        say(str(finding))


def _permissions(scene: Scene, asked: Options) -> tuple[Finding, ...]:
    """Return what a report says of the launch's files."""
    if asked.report is None or asked.dry_run:
        return ()
    from securerun.audit import glance
    from securerun.preflight import files

    return glance.of_launch(files.of_launch(scene), os.environ)


def _found(scene: Scene, mode: str, hear: Hear = nobody, permissions: tuple[Finding, ...] = ()) -> tuple[Finding, ...]:
    findings: tuple[Finding, ...] = ()
    if mode != OFF:
        from securerun.preflight import checks

        findings = checks.look(scene)
    hear(Checked(findings, permissions))
    if mode == STRICT:
        require_none(findings)
    return findings


def _mode(asked: Options) -> str:
    return asked.preflight or (OFF if asked.dry_run else WARN)


def _shared_port(job: Job) -> int | None:
    """Return the port of the job's store, where another agent of the job may have it on this host already."""
    endpoint = job.meeting_point
    if endpoint is None or (job.first_node_listens and job.node_rank == 0):
        return None
    return endpoint.port
