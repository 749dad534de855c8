"""securerunctl doctor: the preflight's checks outside of a launch, and what securerun can do on this host."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

from securerun.console import say
from securerun.finding import Finding
from securerun.firewall.policy import SHIELD, PortRange
from securerun.host import interfaces, umask
from securerun.job import environment, ports
from securerun.job.libraries import Library, Variables, may_be_in_use
from securerun.linux.networks import Network
from securerun.preflight import abilities, checks
from securerun.preflight.abilities import Ability
from securerun.preflight.reading import Reading
from securerun.preflight.scene import Scene
from securerun.protection.ways import BY_SUDO
from securerun.text import printable

_STATES = {True: "yes", False: "no", None: "?"}


def examine(*, as_json: bool) -> int:
    """Print what was found. Returns the exit status: 1 where anything is to be mended."""
    found = abilities.find()
    to_fix = findings(found)
    if as_json:
        document = {
            "findings": [finding.document() for finding in to_fix],
            "host": [ability.document() for ability in found],
        }
        print(json.dumps(document, indent=2))
    else:
        for line in _lines(found, to_fix):
            print(line)
    return 1 if to_fix else 0


def findings(found: Sequence[Ability]) -> tuple[Finding, ...]:
    """Return what is to be fixed on this host. found: what securerun can do on it."""
    return (*_of_abilities(found), *_of_host())


def _of_host() -> tuple[Finding, ...]:
    rules = Reading()
    try:
        return checks.look(
            Scene(
                umask=umask.current(),
                environment=os.environ,
                ports=tuple(_ports()),
                peers=tuple(_neighbours()),
                rules=rules,
            )
        )
    finally:
        rules.close()


def _of_abilities(found: Sequence[Ability]) -> Iterator[Finding]:
    """Yield what keeps a job from being guarded at all, or from being guarded well."""
    for ability in found:
        if ability.name == SHIELD and ability.works is False:
            yield Finding("shield", f"no shield: {ability.what}", "random ports stay open for up to 0.2 s", ability.fix)
        if ability.name == abilities.KEY and ability.works is False and ability.what != abilities.NO_KEY:
            yield Finding("key", ability.what, "jobs of several nodes are refused with 78, or have none", ability.fix)
    guards = [ability for ability in found if ability.way]
    if not any(ability.works for ability in guards):
        reasons = "; ".join(f"{ability.way}: {ability.what}" for ability in guards)
        fix = next(ability.fix for ability in guards if ability.way == BY_SUDO)
        apart = any(ability.name == abilities.APART and ability.works for ability in found)
        refused = "jobs of several nodes are refused with 77" if apart else "jobs are refused with 77"
        yield Finding("guard", f"no guard can be had ({reasons})", refused, fix)


def _ports() -> Iterator[PortRange]:
    """Yield the ports of a job started from this shell, HCCL's only where there is an NPU or a word of HCCL."""
    job = environment.describe_job(os.environ, ())
    variables = Variables(os.environ)
    plan = ports.plan_ports(job, os.environ, None, variables=variables)
    for warning in variables.warnings:
        say(warning)
    for planned in plan:
        if planned.is_asked_for or _may_use_hccl():
            yield planned


def _may_use_hccl() -> bool:
    named = any(name.startswith(("HCCL_", "ASCEND_")) for name in os.environ)
    return named or may_be_in_use(Library.HCCL, os.environ)


def _neighbours() -> Iterator[Network]:
    """Yield the networks that this host is on, where a job's peers would be."""
    yield from interfaces.networks_of(interfaces.with_networks())


def _lines(found: Sequence[Ability], findings: Sequence[Finding]) -> Iterator[str]:
    width = max(len(ability.name) for ability in found)
    for ability in found:
        fix = f"; `{ability.fix}`" if ability.fix else ""
        yield printable(f"{ability.name:<{width}}  {_STATES[ability.works]:<3}  {ability.what}{fix}")
    yield ""
    if not findings:
        yield "nothing to fix"
    for finding in findings:
        yield f"{finding.name}: {finding}"
