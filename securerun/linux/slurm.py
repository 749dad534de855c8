"""Where a host has Slurm: its command scontrol, and its configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from securerun.linux import trust

# Where Slurm's commands are: distributions, a build from source, Bright Cluster Manager. Never from PATH.
SCONTROL_DIRECTORIES = (
    "/usr/bin",
    "/usr/local/bin",
    "/opt/slurm/bin",
    "/opt/slurm/current/bin",
    "/usr/local/slurm/bin",
    "/cm/shared/apps/slurm/current/bin",
)
# Where slurm.conf is on a node: distributions, builds from source, and what a slurmd without one got from slurmctld.
CONFIGURATIONS = (
    Path("/etc/slurm/slurm.conf"),
    Path("/etc/slurm-llnl/slurm.conf"),
    Path("/run/slurm/conf/slurm.conf"),
    Path("/usr/local/etc/slurm.conf"),
    Path("/opt/slurm/etc/slurm.conf"),
)
_VARIABLE = "SLURM_CONF"
_PATH = "/usr/bin:/bin"
_ROOT = 0


def find_scontrol(directories: Iterable[str] = SCONTROL_DIRECTORIES) -> str | None:
    """Return the path of scontrol; None where there is none that this user may run. Root runs only what is root's."""
    for directory in directories:
        command = Path(directory, "scontrol")
        if os.access(command, os.X_OK) and command.is_file() and _may_run(command):
            return str(command)
    return None


def environment(conf: str | None = None) -> dict[str, str]:
    """Return the environment for Slurm's commands, and for nothing else. conf: SLURM_CONF, where that is known."""
    clean = {"PATH": _PATH, "LC_ALL": "C"}
    conf = os.environ.get(_VARIABLE) if conf is None else conf
    if conf is None:
        conf = next((str(path) for path in CONFIGURATIONS if path.is_file()), None)
    return clean if conf is None else {**clean, _VARIABLE: conf}


def _may_run(command: Path) -> bool:
    try:
        return os.geteuid() != _ROOT or trust.weak_point(command, trust.roots() | {os.geteuid()}) is None
    except OSError:
        return False
