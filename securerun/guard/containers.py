"""Which container a caller is in, as the host sees it: its root cgroup. What is counted and told is so by container.

A user id alone is nobody's own in a container: its root takes on any, and the next container has the same ones. What
only the host's root makes, a cgroup or a pid namespace, makes a container; one that an ordinary user made (rootless
podman, enroot, `unshare`) is that user's own, and whoever is in it is that user. So nobody becomes several by making
namespaces, nor leaves a container by them: pid namespaces lie in each other, and the outermost around a process tells
whether it is in a container. Nor by cgroups: a set-user-id program (apptainer, firejail) makes root's pid namespaces
for anybody, in whatever cgroup they are, so of the way to that only what root made counts.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from securerun.errors import PrivilegeError
from securerun.firewall.policy import RUN_ID
from securerun.linux import cgroups, proc
from securerun.linux.cgroups import relative
from securerun.linux.namespaces import Namespace

ROOT = 0
# What guards make below the cgroups of launchers: whoever is in one is in the container still.
_OF_A_RUN = re.compile(rf"securerun-{RUN_ID.pattern}(-proof)?")
_LOOKS = 3
# User ids have 32 bits.
_FIRST_ACCOUNT = 1 << 32
# It stands in records, whose texts are limited.
_LONGEST = 2048


def container_of(pid: int) -> str:
    """Return the root cgroup of the container that a process is in, "" for a process of the host's own.

    Raises PrivilegeError where it cannot be told, and OSError for a process that has ended.
    """
    try:
        with Namespace("cgroup", pid) as cgroup, Namespace("pid", pid) as inner, inner.outermost() as processes:
            root = _root(cgroup, processes, pid)
    except FileNotFoundError:  # the process has ended, or this kernel has no such namespaces: then nobody is in one
        proc.start_time(pid)
        return ""
    if len(root) > _LONGEST:
        raise PrivilegeError(f"the name of the cgroup of process {pid} is longer than {_LONGEST} characters")
    return _without_runs(root) if root else ""


def _root(cgroup: Namespace, processes: Namespace, pid: int) -> str:
    """Return the root of a container's cgroups, "" for a process of the host's own.

    processes: the outermost pid namespace around it. Raises PrivilegeError where it cannot be told.
    """
    is_contained = _is_of_root(processes)
    if cgroup.is_own():
        return _telling(cgroups.paths_of(pid), processes, pid) if is_contained else ""
    is_of_root = _is_of_root(cgroup)
    if is_of_root and _was_made_with(processes, cgroup):
        return _root_seen_from(cgroup, pid)
    if is_contained or is_of_root:
        raise PrivilegeError(
            f"process {pid} is in a cgroup namespace that was made within its container, so nothing tells that from "
            "others; start the job outside of it (unshare, bwrap), in the container"
        )
    return ""


def _was_made_with(processes: Namespace, cgroup: Namespace) -> bool:
    """Return whether a cgroup namespace of root's is a container's: made with its pid namespace, or outside of all.

    User id 0 of a container makes user namespaces, as everybody may, and others in those: they are root's by their
    owner's number. An engine makes all of a container's in one user namespace.
    """
    makers = {proc.namespace("user")}
    if not processes.is_own():
        makers.add(processes.user_namespace())
    return cgroup.user_namespace() in makers


def account_of(container: str) -> int:
    """Return a number for a container that no other has, nor any user."""
    import hashlib  # where there is a container

    digest = hashlib.sha256(container.encode("utf-8", "surrogateescape")).digest()
    return _FIRST_ACCOUNT + int.from_bytes(digest[:7], "big")


def may_be_entered(network: Namespace) -> bool:
    """Return whether a network is of root's making: over any other an ordinary user has all capabilities."""
    return network.owners() <= {ROOT}


def _is_of_root(theirs: Namespace) -> bool:
    """Return whether a namespace is another than this process' own, and of nobody's making but root's."""
    if theirs.is_own():
        return False
    try:
        return theirs.owners() <= {ROOT}
    except OSError:
        return False


def _root_seen_from(namespace: Namespace, pid: int) -> str:
    """Return the cgroup that is the root of a cgroup namespace: the path that is seen from here, less that from there.

    Whoever can move within moves between two looks. So there are three, and the first has to be as the last.
    """
    for _ in range(_LOOKS):
        before = cgroups.paths_of(pid)
        with namespace.entered():
            within = cgroups.paths_of(pid)
        if cgroups.paths_of(pid) == before:
            roots = {name: _less(path, within.get(name, "")) for name, path in before.items()}
            return _telling(roots, namespace, pid)
    raise PrivilegeError(f"process {pid} moves from cgroup to cgroup, so its container cannot be told")


def _less(path: str, within: str) -> str:
    """Return a path without its end. Raises PrivilegeError where it has not got that."""
    if not within.startswith("/") or ".." in PurePosixPath(within).parts or not path.endswith(within.rstrip("/")):
        raise PrivilegeError(
            f"the cgroup {path} lies outside of what its own cgroup namespace shows; start the job in a container "
            "whose processes are in its cgroup"
        )
    return path[: len(path) - len(within.rstrip("/"))] or "/"


def _telling(roots: dict[str, str], made: Namespace, pid: int) -> str:
    """Return which of a container's roots, one a hierarchy, tells it from others: that of version 2, else the longest.

    made: root's namespace, which makes it a container. None tells that has this guard in it as well, such as the top.
    Raises PrivilegeError where there is no other: who was handed the host's cgroups may move anywhere.
    """
    own = cgroups.paths_of(proc.SELF)
    # An engine hands a container with a user namespace its cgroup; those of such a namespace are of no set-user-id
    # program's making.
    if made.user_namespace() == proc.namespace("user"):
        roots = {name: cgroups.deepest_of(ROOT, name, root) for name, root in roots.items()}
    telling = {name: root for name, root in roots.items() if relative(own.get(name, "/"), root) is None}
    if not telling:
        raise PrivilegeError(
            f"process {pid} is in a cgroup that its guard is in as well ({roots.get('', '/')}), so nothing tells its "
            "container from others; start the job in a container with a cgroup of its own"
        )
    return telling.get("") or max(telling.values(), key=len)


def _without_runs(root: str) -> str:
    parts = PurePosixPath(root).parts
    first = next((number for number, part in enumerate(parts) if _OF_A_RUN.fullmatch(part)), len(parts))
    return str(PurePosixPath(*parts[:first]))


def is_within(pid: int, container: str) -> bool:
    """Return whether a process is in a container; not where that cannot be told."""
    try:
        return container_of(pid) == container
    except (PrivilegeError, OSError):
        return False
