"""securerunctl setup slurm: what an administrator installs so that jobs of Slurm's are guarded with nothing changed.

Prints, and installs nothing. A Prolog runs as root, so for an installation that others than root could change there is
nothing to print.
"""

from __future__ import annotations

import re
import shlex

from securerun.ctl.setup import trusted_program
from securerun.errors import UsageError
from securerun.guard.program import of_slurm

DIRECTORY = "/etc/slurm"
# What each does, for whoever reads it there.
_PARTS = {
    "task-prolog": (
        "As the job's user, before each task: has systemd's socket start a guard for the task.\n"
        "# Where that is refused the task does not start, and is told why."
    ),
    "prolog": (
        "As root, before anything of a job is on the node: makes the job's cgroup with the shield on it.\n"
        "# The job's nodes and Slurm's controllers may connect; whoever else is to, goes into --peers.\n"
        "# Where it fails Slurm drains the node, and `sinfo --list-reasons` says why."
    ),
    "epilog": "As root, when all of a job has gone from the node: lets its guard go.",
}
_LISTS = re.compile(r"[\w.,:/\[\]=;-]*", re.ASCII)

_CONFIGURATION = """\
# Lines for {directory}/slurm.conf. Made by `securerunctl setup slurm`.
# First, on each node: securerunctl setup systemd, and the files below by
#     securerunctl setup slurm prolog > {directory}/securerun-prolog.sh && chmod 755 {directory}/securerun-prolog.sh
# and so for epilog and task-prolog. Then: scontrol reconfigure
#
# Where Slurm knows a job by its cgroup of version 2 (CgroupPlugin=cgroup/v2 and ProctrackType=proctrack/cgroup),
# for the whole job, srun's own ports too:
PrologFlags=Alloc
Prolog={directory}/securerun-prolog.sh
Epilog={directory}/securerun-epilog.sh
#
# Anywhere, for each task, which gets a key of its job's besides; alone, or with the above:
TaskProlog={directory}/securerun-task-prolog.sh
"""

_SCRIPT = """\
#!/bin/sh
# {directory}/securerun-{part}.sh, mode 0755, root's. Made by `securerunctl setup slurm {part}`.
# {what}
exec {command}
"""


def print_slurm(part: str, *, peers: str = "", ports: str = "", public: str = "") -> None:
    """Print one of the scripts, or the lines of slurm.conf that name them.

    Raises UsageError for a part that there is not, and PrivilegeError for an installation that others could change.
    """
    trusted_program()
    options = {"--peers": peers, "--ports": ports, "--public": public}
    given = [word for name, value in options.items() if value for word in (name, _checked(name, value))]
    if given and part != "prolog":
        raise UsageError(f"{given[0]} is for the prolog; write `securerunctl setup slurm prolog {given[0]} …`")
    if not part:
        print(_CONFIGURATION.format(directory=DIRECTORY), end="")
        return
    if part not in _PARTS:
        raise UsageError(f"there is no part {part!r}; write one of {', '.join(_PARTS)}, or none for slurm.conf's lines")
    command = shlex.join(of_slurm(part, *given))
    print(_SCRIPT.format(directory=DIRECTORY, part=part, what=_PARTS[part], command=command), end="")


def _checked(name: str, value: str) -> str:
    if not _LISTS.fullmatch(value):
        raise UsageError(f"{name}: {value!r} has characters that no list of {name[2:]} has")
    return value
