"""What the checks of a preflight look at: a host and, where there is one, a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securerun.firewall.policy import PortRange
    from securerun.linux.networks import Network
    from securerun.preflight.reading import Reading


@dataclass(frozen=True)
class Scene:
    """What the checks look at. Outside of a launch there is no command.

    umask: the shell's own, before securerun's. command: the script, or `-m` and the module, and its arguments.
    ports: the port plan. meeting_port: of these, one on which another process of the same user may listen rightly:
    the store of the job's other agent on this host. siblings: whether other tasks of the job are launched on this
    host side by side, so that any port of the plan may rightly be the same user's already. reserved: whether a
    lease keeps the plan's ports from being handed out. peers: who is to be let in. rules: the host's own rules,
    where they can be read.
    """

    umask: int
    environment: Mapping[str, str]
    command: tuple[str, ...] = ()
    log_dir: str | None = None
    ports: tuple[PortRange, ...] = ()
    meeting_port: int | None = None
    siblings: bool = False
    reserved: bool = False
    peers: tuple[Network, ...] = ()
    interfaces: tuple[str, ...] = ()
    rules: Reading | None = field(default=None, repr=False)
