"""securerunctl setup: what an administrator installs once: ways for ordinary users to a guard, and a timer for metrics.

Prints, and installs nothing: these files are for somebody's eyes first. A guard that others than root could change
would make root of whoever changes it, so for such a one there is nothing to print.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from securerun.errors import PolicyError, PrivilegeError, UsageError
from securerun.guard.program import PACKAGE, SOCKET, SOCKET_ARGUMENT
from securerun.linux import capabilities, trust
from securerun.protection.ways import SOCKET_BEFORE

DEFAULT_GROUP = "securerun"
_PROGRAM = "securerun-guard"
_METRICS_PROGRAM = "securerunctl"
_LIBRARY = Path(os.__file__).parent
_ADMINISTRATORS_PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
# useradd(8)'s own rule, without its closing dollar sign.
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_PLAIN_PATH = re.compile(r"/[\w/.+-]*")

_HEADER = "# {place}. Made by `securerunctl setup {command}`.\n"
_UNITS = "/etc/systemd/system"
_SUDOERS = """\
{who} ALL=(root) NOPASSWD:NOSETENV: {program} ""
"""

_SOCKET_UNIT = """\
# Then: systemctl daemon-reload && systemctl enable --now securerun.socket
[Unit]
Description=securerun: guards for the jobs of ordinary users

[Socket]
ListenStream={socket}
# Launchers of the release before look here.
ListenStream={before}
Accept=yes
SocketUser=root
SocketGroup={group}
SocketMode=0660
MaxConnections=256
# By user in new versions of systemd; older ones do not count those of AF_UNIX. Guards themselves limit how many of a
# user's wait for their orders, whatever systemd does.
MaxConnectionsPerSource=64
# Or whoever connects 200 times in 2 s ends this socket for everybody, until it is started again.
TriggerLimitIntervalSec=0

[Install]
WantedBy=sockets.target
"""

# The last one to give up all but these.
_CAPABILITIES = " ".join((*sorted({**capabilities.FOR_GUARDING, **capabilities.FOR_BEGINNING}), "CAP_SETPCAP"))
# What none of the services needs more than.
_CONFINED = f"""\
NoNewPrivileges=yes
CapabilityBoundingSet={_CAPABILITIES}
ProtectSystem=full
ProtectHome=read-only
PrivateTmp=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
"""

# What all guards may have is no more than what so many of the least are, whoever asks for them.
_SLICE = "securerun.slice"
_SLICE_UNIT = """\
[Unit]
Description=securerun: the guards of this host, all together

[Slice]
# 256 guards of 20 MB. Where that is not enough one of them ends: its shield stays, and its launcher has the next.
MemoryMax=6G
TasksMax=1024
"""

_SERVICE_UNIT = """\
[Unit]
Description=securerun: the guard of one job
CollectMode=inactive-or-failed

[Service]
ExecStart={program} {argument}
StandardInput=socket
StandardOutput=socket
StandardError=journal
# The guard ends when its job has ended; it does so also while the host shuts down.
KillMode=process
TimeoutStopSec=20
Slice={slice}
# Of one guard: some 20 MB, 50 MB with 10,000 peers, and the few processes of iptables.
MemoryMax=512M
TasksMax=16
OOMPolicy=continue
UMask=0077
{confined}"""

_METRICS_UNIT = """\
[Unit]
Description=securerun: the runs of this host as numbers, for Prometheus
ConditionPathIsDirectory={directory}

[Service]
Type=oneshot
ExecStart={program} metrics --output {directory}/securerun.prom
TimeoutStartSec=50
Slice={slice}
MemoryMax=512M
TasksMax=16
{confined}"""

_TIMER_UNIT = """\
# Then: systemctl enable --now securerun-metrics.timer
[Unit]
Description=securerun: the runs of this host as numbers, for Prometheus

[Timer]
OnBootSec=1min
OnUnitActiveSec=1min
AccuracySec=5s

[Install]
WantedBy=timers.target
"""


def print_sudoers(group: str, user: str | None) -> None:
    """Print the rule that lets a group, or one user, have guards by sudo; checked by visudo.

    Raises UsageError for a name that is none, PrivilegeError for a guard that others than root could change, and
    PolicyError when visudo does not take the rule.
    """
    who = _required_name(user, "--user") if user else f"%{_required_name(group, '--group')}"
    rule = sudoers_rule(who, trusted_program())
    _check_sudoers(rule)
    print(_HEADER.format(place="/etc/sudoers.d/securerun, mode 0440", command="sudoers") + rule, end="")


def sudoers_rule(who: str, program: Path) -> str:
    """Return the rule that lets somebody have guards by sudo. program: of root's, and of nobody else's."""
    return _SUDOERS.format(who=who, program=program)


def print_systemd(group: str, textfiles: str) -> None:
    """Print the units that start a guard for each member of a group who connects, and those of metrics.

    textfiles: the directory of node_exporter's textfile collector. Where others than root could change what metrics
    load, those units are left out, which is said.

    Raises UsageError for a name that is none, and PrivilegeError for a guard that others than root could change.
    """
    if not _PLAIN_PATH.fullmatch(textfiles):
        raise UsageError(f"--textfiles: {textfiles!r} is no plain absolute path; write one")
    units = guard_units(trusted_program(), _required_name(group, "--group"))
    try:
        units.update(metrics_units(_trusted_metrics_program(), textfiles))
    except PrivilegeError as error:
        print(f"securerunctl: the units of metrics are left out: {error}", file=sys.stderr)
    places = {name: _HEADER.format(place=f"{_UNITS}/{name}", command="systemd") for name in units}
    print("\n".join(places[name] + text for name, text in units.items()), end="")


def guard_units(program: Path, group: str) -> dict[str, str]:
    """Return the units of guards, by name: socket, service and slice. program: of root's, and of nobody else's."""
    service = _SERVICE_UNIT.format(program=program, argument=SOCKET_ARGUMENT, slice=_SLICE, confined=_CONFINED)
    return {
        "securerun.socket": _SOCKET_UNIT.format(socket=SOCKET, before=SOCKET_BEFORE, group=group),
        "securerun@.service": service,
        _SLICE: _SLICE_UNIT,
    }


def metrics_units(program: Path, textfiles: str) -> dict[str, str]:
    """Return the units of metrics, by name. program: securerunctl, of root's and of nobody else's."""
    service = _METRICS_UNIT.format(program=program, directory=textfiles, slice=_SLICE, confined=_CONFINED)
    return {"securerun-metrics.service": service, "securerun-metrics.timer": _TIMER_UNIT}


def _trusted_metrics_program() -> Path:
    """Return this installation's securerunctl, which loads packages of others as well.

    Raises PrivilegeError when others than root could change any of it.
    """
    program = Path(sys.executable).parent / _METRICS_PROGRAM
    packages = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    weaknesses = (trust.weak_point(program), *map(trust.weak_point, packages), *map(trust.weak_point_below, packages))
    for weakness in filter(None, weaknesses):
        raise PrivilegeError(f"{program} would run as root, but {weakness}")
    return program


def trusted_program() -> Path:
    """Return this installation's securerun-guard. Raises PrivilegeError when others than root could change it."""
    program = Path(sys.executable).parent / _PROGRAM
    try:
        ways = map(trust.weak_point, (program, Path(sys.executable), PACKAGE, _LIBRARY))
        below = map(trust.weak_point_below, (PACKAGE, _LIBRARY / "__pycache__"))
        for weakness in (*ways, *below):
            if weakness is not None:
                raise PrivilegeError(
                    f"{program} would run as root, but {weakness}; install securerun as root where only root writes, "
                    "such as a virtual environment below /opt"
                )
    except FileNotFoundError as error:
        raise PrivilegeError(f"{error.filename} is missing; install securerun with pip, then try again") from error
    if not _PLAIN_PATH.fullmatch(str(program)):
        raise PolicyError(f"{program} has characters that sudo or systemd read in their own way; install it elsewhere")
    return program


def _required_name(name: str, source: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{source}: {name!r} is no name of a user or group; write {source} {DEFAULT_GROUP}")
    return name


def _check_sudoers(text: str) -> None:
    """Have visudo read the rule, where there is sudo: a sudoers file with an error locks everybody out."""
    visudo = shutil.which("visudo", path=_ADMINISTRATORS_PATH)
    if visudo is None:
        print("securerunctl: sudo is not installed here, so visudo has not checked this rule", file=sys.stderr)
        return
    with tempfile.NamedTemporaryFile("w", suffix=".sudoers") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(  # noqa: S603 - an absolute path, and a file of our own
            [visudo, "-c", "-f", file.name], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise PolicyError(f"visudo does not take the rule: {(done.stderr or done.stdout).strip().splitlines()[0]}")
