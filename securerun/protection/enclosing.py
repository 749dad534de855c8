"""The run that this process is already a part of, if it is: a launcher inside of a guarded job needs no second lease.

The environment alone is no proof: sbatch, ssh and `docker run --env` copy SECURERUN_RUN_ID to where no guard is. A job
that believed it would run open to everyone; one that does not believe what is true only takes a lease too many. Nor is
the run's cgroup: without a shield on it, it is the guard that closes each new port, and the guard may be gone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from securerun.errors import PolicyError
from securerun.firewall.policy import RUN_ID
from securerun.guard.protocol import RUN_ID_VARIABLE, presence_of
from securerun.linux import local_sockets, proc, sent_along
from securerun.linux.cgroups import CgroupUnavailable, cgroup_of
from securerun.options import Options

if TYPE_CHECKING:
    from securerun.guard import records

# What a lease was asked for, for launchers inside of it to compare; for their messages, never for what is closed.
TERMS_VARIABLE = "SECURERUN_LEASE"

# The options that are a lease's own. The others (umask, user, launcher) are in force inside of it as well.
_TERMS = (
    *("peers", "key", "interface", "ports", "public", "firewall", "scope", "loopback", "grace", "accept"),
    "hccl_whitelist",
)
_DEFAULTS = Options()
# Of --key: what insists on no key.
_UNDEMANDING = {"auto", "off"}
_LONGEST_TERM = 1000
_ROOT = 0
_LOOKS, _LOOK_SECONDS = 10, 0.1


@dataclass(frozen=True)
class Enclosing:
    """The run around this process.

    terms: what it was asked for where that is no default; `shield`: whether it has one; `needs_guard`: whether that may
    be switched off; `has_key`: whether its nodes are known by a key; `network`: the namespace that its launcher is in
    (namespaces(7)). Empty for a run that was begun by `securerun.guarded`.
    """

    run_id: str
    terms: Mapping[str, Any] = field(default_factory=dict)


def find(environment: Mapping[str, str]) -> Enclosing | None:
    """Return the run that the environment names, if this process is proven to be in it."""
    run_id = environment.get(RUN_ID_VARIABLE, "")
    if not RUN_ID.fullmatch(run_id):
        return None
    known = _read(environment.get(TERMS_VARIABLE, ""))
    # Of this very run: a script may have kept the terms of another.
    if known.get("run") != run_id:
        known = {}
    if _is_in_network_of(run_id):
        return Enclosing(run_id, known)
    if _is_in_cgroup_of(run_id):
        # A shield lasts as long as its cgroup, whoever lives; one that may be switched off as long as a guard looks.
        lasts = known.get("shield") is True and known.get("needs_guard") is not True
        if not lasts and not _guard_lives(run_id):
            return None
    elif not _is_known_by_environment(run_id):
        return None
    # A shield goes wherever the cgroup's processes go; port chains stay in their network namespace.
    network = proc.namespace("net")
    if known.get("shield") is not True and known.get("network", network) != network:
        return None
    return Enclosing(run_id, known)


def in_own_network(environment: Mapping[str, str]) -> str:
    """Return the id of the run whose own network this process is proven to be in; "" where it is in none."""
    run_id = environment.get(RUN_ID_VARIABLE, "")
    return run_id if RUN_ID.fullmatch(run_id) and _is_in_network_of(run_id) else ""


def terms(run_id: str, asked: Options, *, shield: bool, needs_guard: bool = False, has_key: bool = False) -> str:
    """Return what a lease was asked for, as the text of the variable that tells launchers inside of it."""
    few = {"needs_guard": needs_guard, "has_key": has_key}
    has = {"shield": shield, **{name: True for name, value in few.items() if value}}
    return json.dumps({**_given(asked), "run": run_id, **has, "network": proc.namespace("net")})


def without_effect(asked: Options, enclosing: Enclosing) -> list[str]:
    """Return the options, as flags, that a launcher inside of a run was given and that this run does not have as well.

    Raises PolicyError for those that insist on more protection than the run has.
    """
    known = enclosing.terms
    # Who insists on it has the job ended when a shield that may be switched off is.
    insists = known.get("needs_guard") is not True or known.get("scope") == "process"
    if asked.scope == "process" and not (known.get("shield") is True and insists):
        raise PolicyError(_too_weak("--scope process", enclosing, "it is not certain to have a shield"))
    # The loopback of a network of the job's own is the job's own.
    apart = known.get("scope") == "namespace"
    if asked.loopback == "job" and known.get("loopback") != "job" and not apart:
        raise PolicyError(_too_weak("--loopback job", enclosing, "its loopback is open to this host"))
    if asked.key not in _UNDEMANDING and known.get("has_key") is not True and not apart:
        raise PolicyError(_too_weak(f"--key {asked.key}", enclosing, "its nodes are not known by a key"))
    met = ({"scope"} if asked.scope == "process" else set()) | ({"loopback", "key"} if apart else set())
    differing = [name for name, value in _given(asked).items() if known.get(name, _default(name)) != value]
    # Of variables the launchers inside know as well: SECURERUN_REPORT was meant for the one that took the lease.
    reports = asked.report is not None and asked.report_source == "--report"
    others = ["--unprotected"] * asked.unprotected + ["--report"] * reports
    return [f"--{name.replace('_', '-')}" for name in differing if name not in met] + others


def _given(asked: Options) -> dict[str, str | bool]:
    """Return the options that are not left at their defaults."""
    values = {name: getattr(asked, name) for name in _TERMS}
    return {name: _short(value) for name, value in values.items() if value != _default(name)}


def _default(name: str) -> Any:  # noqa: ANN401 - what an option's value is
    return getattr(_DEFAULTS, name)


def _short(value: str | bool) -> str | bool:
    """Return a value as it is, or a digest of a long one: no text of the environment may exceed 128 KiB (execve(2))."""
    if isinstance(value, bool) or len(value) <= _LONGEST_TERM:
        return value
    import hashlib  # where a list of peers is that long

    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()


def _too_weak(option: str, enclosing: Enclosing, reason: str) -> str:
    return (
        f"{option}: run {enclosing.run_id} guards this process already, and {reason}; give {option} where that run is "
        "started, or leave it out here"
    )


def _read(text: str) -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_in_network_of(run_id: str) -> bool:
    """Whether a launcher stands in this very network, which is none of the host's, for a run that is alone in it.

    Nobody outside can have that place (unix(7): abstract names are of a network namespace), and who runs inside as
    another user is none of the run's.
    """
    if proc.is_in_first_user_namespace() or not proc.governs_network():
        return False
    from securerun.protection import keeper  # few are in a user namespace

    for _ in range(_LOOKS):
        try:
            with sent_along.deaf() as end:
                end.connect(keeper.place_of(run_id))
                return local_sockets.peer_of(end)[1] == os.getuid()
        except BlockingIOError:  # as many wait there as may: the launcher lets each go in a moment
            time.sleep(_LOOK_SECONDS)
        except OSError:
            return False
    return False


def _guard_lives(run_id: str) -> bool:
    """Whether root stands where the guard of the run is to stand; one that has just died is replaced in a moment."""
    for _ in range(_LOOKS):
        if _stands_there(run_id):
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def _stands_there(run_id: str) -> bool:
    try:
        with sent_along.deaf() as end:
            end.connect(presence_of(run_id))
            return local_sockets.peer_of(end)[1] == _ROOT
    except OSError:
        return False


def _is_in_cgroup_of(run_id: str) -> bool:
    """Whether this process is in the cgroup that a guard made for the run: whatever it starts is behind its shield."""
    try:
        path = cgroup_of(os.getpid())
    except CgroupUnavailable:
        return False
    return f"securerun-{run_id}" in PurePosixPath(path).parts


def _is_known_by_environment(run_id: str) -> bool:
    """Whether a live guard tells the run's processes by the very variable, since the run has no cgroup.

    It looks for root's processes in its own namespaces. An ordinary user may not read the records, and takes a lease.
    """
    from securerun.guard import records  # few are in a run that has no cgroup

    try:
        runs = records.read_briefs_of_host()
    except OSError:
        return False
    return any(
        record.run_id == run_id
        and record.user == os.getuid()
        and (record.network, record.processes) == (proc.namespace("net"), proc.namespace("pid"))
        and record.guard_lives
        and record.launcher_lives
        and not _has_cgroup(record)
        for record in runs
    )


def _has_cgroup(record: records.Known) -> bool:
    """Whether the run's processes are told by a cgroup: one may be recorded that the launcher could not move to."""
    try:
        return cgroup_of(record.launcher) == record.cgroup
    except CgroupUnavailable:
        return False
