"""Preflight: what of a host and a launch departs from the hardening advice, or would keep the job from running.

One function a check, each of which looks and changes nothing: no traffic, no rule, no module, no table. What cannot be
looked at (another user's, another namespace's) is no finding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable

from securerun.errors import PolicyError, PrivilegeError
from securerun.text import printable

if TYPE_CHECKING:
    from securerun.firewall.policy import PortRange
    from securerun.linux.networks import Network
    from securerun.preflight.firewalls import Reading

WARN, STRICT, OFF = "warn", "strict", "off"


@dataclass(frozen=True)
class Finding:
    """One thing to mend.

    name: of the check, the same for all that it finds. what: what was found. why: what comes of it. mend: the command.
    """

    name: str
    what: str
    why: str
    mend: str

    def __str__(self) -> str:
        return printable(f"{self.what}: {self.why}; mend it by `{self.mend}`")


@dataclass(frozen=True)
class Scene:
    """What the checks look at. Outside of a launch there is no command.

    umask: the shell's own, before securerun's. command: the script, or `-m` and the module, and its arguments.
    ports: the port plan. meeting_port: of these, one on which another process of the same user may listen rightly: the
    store of the job's other agent on this host. reserved: whether a lease keeps the plan's ports from being handed out.
    peers: who is to be let in. rules: the host's own rules, where they can be read.
    """

    umask: int
    environment: Mapping[str, str]
    command: tuple[str, ...] = ()
    log_dir: str | None = None
    ports: tuple[PortRange, ...] = ()
    meeting_port: int | None = None
    reserved: bool = False
    peers: tuple[Network, ...] = ()
    interfaces: tuple[str, ...] = ()
    rules: Reading | None = field(default=None, repr=False)


Check = Callable[[Scene], Iterable[Finding]]


def look(scene: Scene) -> tuple[Finding, ...]:
    """All findings, in the order of the documentation's table."""
    from securerun.preflight import files, firewalls, ports, remains, surroundings

    groups = (surroundings.CHECKS, files.CHECKS, ports.CHECKS, firewalls.CHECKS, remains.CHECKS)
    return tuple(finding for checks in groups for check in checks for finding in _made_by(check, scene))


def require_none(findings: Sequence[Finding]) -> None:
    """Raises PolicyError, with a line for each finding, where there is any."""
    if findings:
        count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
        verdict = f"--preflight strict: {count}, so nothing was started; mend them, or use --preflight warn"
        raise PolicyError("\n".join([*map(str, findings), verdict]))


def _made_by(check: Check, scene: Scene) -> Iterator[Finding]:
    # What goes away meanwhile, or lies where this user may not look, is nothing to tell of.
    with contextlib.suppress(OSError, PrivilegeError):
        yield from check(scene)
