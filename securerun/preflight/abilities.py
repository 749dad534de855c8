"""What securerun can do on this host, tried and not assumed: the shield, the backends of the port chains, a guard.

All of it is undone at once and leaves nothing: no rule, no table, no module; a cgroup for a moment.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from securerun.errors import Obstacle, SecurerunError
from securerun.firewall import backends, selftest, shield, tag_proof
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.policy import SHIELD, Policy
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.shield import Shield
from securerun.guard import cgroup, keys
from securerun.guard.documents import ProtocolError
from securerun.guard.program import SITE_KEY
from securerun.guard.protocol import Ready, Refused
from securerun.job import key
from securerun.linux import capabilities, cgroups, net_cgroups, packages, port_ranges, proc, signals
from securerun.linux.cgroups import CgroupUnavailable
from securerun.protection import bars, way_out, ways
from securerun.protection.ways import Way
from securerun.text import printable

APART = "own-network"
KEY = "key"
NO_KEY = "no key: jobs of several nodes are told who their peers are, but for those of Slurm's"
_LEAST_KERNEL = (4, 15)
# Without the others a guard works too, but adopts no shield, raises no limit, or sees and ends no processes of others.
_INDISPENSABLE = ("CAP_NET_ADMIN", "CAP_BPF")
_FIXES_OF_SHIELD = {
    Obstacle.NET_CLS: "reboot with cgroup_no_v1=net_cls,net_prio",
    Obstacle.READ_ONLY_CGROUPS: "docker run --cap-add SYS_ADMIN --cgroupns host -v /sys/fs/cgroup:/sys/fs/cgroup:rw",
}
_FIXES_OF_CGROUP = {Obstacle.OLD_KERNEL: "upgrade to Linux 4.15 or newer"}
_FIX_OF_CGROUP = "docker run --cap-add SYS_ADMIN (in a container)"
_FIX_OF_SHIELD = "docker run --cap-add NET_ADMIN --cap-add SYS_ADMIN (in a container); else start in another cgroup"
_BACKENDS = {
    "iptables": "apt-get install iptables (dnf install iptables-nft)",
    "nftables": "apt-get install nftables (dnf install nftables)",
    "legacy": "pip install 'securerun[legacy]'",
}
_WAYS = {
    ways.BY_SUDO: "securerunctl setup sudoers",
    ways.BY_SYSTEMD: "securerunctl setup systemd",
}
_ANSWER_SECONDS = 10.0
_EXAMPLE_PEER = ipaddress.IPv4Network("192.0.2.1/32")  # RFC 5737: nobody's address


@dataclass(frozen=True)
class Ability:
    """One thing that a host can do or not; None where only root can tell.

    what: how it is, or why not. fix: the command that gives the ability, "" where it is there.
    way: which way to a guard this is about; "" for other abilities.
    """

    name: str
    works: bool | None
    what: str
    fix: str = ""
    way: str = ""

    def document(self) -> dict[str, Any]:
        """Return the ability as JSON's own types, as `securerunctl doctor --json` has it."""
        return {"name": self.name, "works": self.works, "what": self.what, "mend": self.fix}


def find() -> tuple[Ability, ...]:
    """Return all of them, in the order in which they build on each other."""
    built = (_kernel(), _capabilities(), _cgroup(), _shield(), _key())
    return (*built, *_port_chains(), _reserved_ports(), *_guards(), _apart())


def _apart() -> Ability:
    """Try whether this user may have a network of their own, which jobs of one node take where there is no guard."""
    barred = bars.tried() or way_out.bar()
    if barred is not None:
        return Ability(APART, False, f"a job cannot have a network of its own: {barred.what}", barred.fix)
    found = way_out.find()
    return Ability(
        APART, True, f"a job of one node can have a network of its own, out by {found.name if found else ''}"
    )


def _kernel() -> Ability:
    release = os.uname().release
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if version < _LEAST_KERNEL:
        return Ability(
            "kernel", False, f"Linux {release} is older than 4.15: no shield", "upgrade to Linux 4.15 or newer"
        )
    return Ability("kernel", True, f"Linux {release}")


def _capabilities() -> Ability:
    held = capabilities.effective()
    if not proc.governs_network():
        what = f"{ways.OF_NAMESPACE}: its capabilities do not count for the network here"
        return Ability("capabilities", False, what, ways.OUTSIDE)
    if not capabilities.suffice_for_guarding(held):
        what = "this process has no CAP_NET_ADMIN and CAP_BPF, so it cannot start a guard by itself"
        return Ability("capabilities", False, what, _fix_of_privilege())
    needed = capabilities.FOR_GUARDING.items()
    missing = [name for name, number in needed if number not in held and name not in _INDISPENSABLE]
    without = f"; without {', '.join(missing)}" if missing else ""
    return Ability("capabilities", True, f"CAP_NET_ADMIN and CAP_BPF{without}")


def _fix_of_privilege() -> str:
    """Return the command for who lacks it: root does so in a container."""
    if os.geteuid() != 0:
        return "sudo securerunctl doctor"
    named, _ = ways.named_place()
    looked_for = f"-e {ways.SOCKET_VARIABLE}={ways.SOCKET} " if named else ""
    directory = ways.SOCKET.parent
    return f"docker run {looked_for}-v {directory}:{directory}:ro (securerunctl setup systemd, on the host)"


def _cgroup() -> Ability:
    try:
        path = cgroups.cgroup_of(os.getpid())
    except CgroupUnavailable:
        return _untold_cgroup()
    return Ability("cgroup", True, f"version 2, {path}{_stays()}")


def _untold_cgroup() -> Ability:
    """Tell what a guard finds where version 1 is all that was mounted since the host booted."""
    if os.geteuid() != 0 or not proc.governs_network():
        what = "version 2 is not mounted; a guard mounts it for itself alone, and only root can try that"
        return Ability("cgroup", None, what, "sudo securerunctl doctor")
    try:
        path = cgroups.cgroup_once_mounted(os.getpid())
    except CgroupUnavailable as error:
        return Ability("cgroup", False, str(error), _FIXES_OF_CGROUP.get(error.obstacle, _FIX_OF_CGROUP))
    return Ability("cgroup", True, f"version 2, {path}, which is not mounted: a guard mounts it for itself{_stays()}")


def _stays() -> str:
    if cgroups.may_leave_shared():
        return ""
    return "; a guard of this process' own cannot leave it, and ends with a batch job"


def _shield() -> Ability:
    """Hang the shield on a cgroup made for it, prove it, and take both away again."""
    policy = Policy(secrets.token_hex(6), (), (_EXAMPLE_PEER,), ())
    try:
        with signals.held_back():  # what is made goes again
            name, shortfall, tags = _try_shield(policy)
    except (CgroupUnavailable, ShieldUnavailable) as error:
        if not proc.governs_network():
            return Ability(SHIELD, None, "only a guard from outside of this user namespace can hang one")
        if os.geteuid() != 0:
            return Ability(SHIELD, None, "only root can try it", "sudo securerunctl doctor")
        if not proc.is_in_first_user_namespace():
            return Ability(SHIELD, False, "the kernel takes none from a user namespace", ways.OUTSIDE)
        return Ability(SHIELD, False, str(error), _FIXES_OF_SHIELD.get(error.obstacle, _FIX_OF_SHIELD))
    less = f"; {shortfall}" if shortfall else ""
    what = f"the {name} filter was hung on a cgroup here, proven, and taken off{less}; {tags}{_doubt()}"
    return Ability(SHIELD, True, what)


def _doubt() -> str:
    if not (net_cgroups.of(proc.SELF) and net_cgroups.may_void_filters()):
        return ""
    return (
        "; net_cls or net_prio of cgroup version 1 is here and may switch it off on this kernel, so a job's port "
        "chains close each of its ports as well"
    )


def _try_shield(policy: Policy) -> tuple[str, str, str]:
    """Return the name of the program that the kernel took, what that promises less than the others, and of tags.

    Raises CgroupUnavailable or ShieldUnavailable.
    """
    with contextlib.ExitStack() as undo:
        made = cgroup.make_job_cgroup(cgroup.path_of_job_cgroup(os.getpid(), policy.run_id))
        undo.callback(made.close)
        undo.callback(made.remove)
        shield.refuse_conflicts(made.ancestors)
        hung = Shield.attach(made.descriptor, policy)
        undo.callback(hung.close)
        undo.callback(hung.detach)
        selftest.require_proof(made.descriptor)
        return hung.name, hung.shortfall, _tags(made)


def _tags(made: cgroup.JobCgroup) -> str:
    """Return whether the nodes of a job can be known by its key here."""
    try:
        shield.refuse_conflicts(made.ancestors, tags=True)
        tag_proof.require_tags(made.descriptor)
    except ShieldUnavailable as error:
        return f"nodes cannot be known by a key (--key): {error}"
    return "nodes can be known by a key (--key)"


def _key() -> Ability:
    """Tell by what file the nodes of this user's jobs know each other, and nothing of what is in it."""
    users, doubt = key.users_file()
    if doubt:
        return Ability(KEY, False, doubt, "export HOME=DIRECTORY")
    if users is not None:
        lack, shown = key.lack_of(users), printable(str(users))
        if lack:
            return Ability(KEY, False, f"{shown} {lack}", "securerunctl setup key (once it is away)")
        return Ability(KEY, True, f"{shown}: who has it too is a node of this user's jobs")
    if not os.path.lexists(SITE_KEY):
        return Ability(KEY, False, NO_KEY, "securerunctl setup key")
    if os.geteuid() != 0:
        return Ability(KEY, None, f"of {SITE_KEY}, which only guards read")
    lack = keys.lack_of_site_key()
    if lack:
        return Ability(KEY, False, f"{SITE_KEY} {lack}", "securerunctl setup key --site (once it is away)")
    return Ability(KEY, True, f"of {SITE_KEY}, for each user another one")


def _port_chains() -> Iterator[Ability]:
    for backend, fix in _BACKENDS.items():
        try:
            what = _found_backend(backend)
        except PortChainsUnavailable as error:
            yield Ability(backend, False, str(error), fix)
        else:
            yield Ability(backend, True, what)


def _found_backend(backend: str) -> str:
    """Return what of a backend is here. Raises PortChainsUnavailable."""
    if backend == "legacy":
        # Its libraries register the tables, and load modules, as soon as they are asked anything.
        if any((path / "iptc" / "__init__.py").is_file() for path in packages.directories()):
            return "python-iptables is installed"
        raise PortChainsUnavailable(
            "python-iptables is not installed; only hosts whose rules are in legacy tables need it"
        )
    backends.open_chains(backend, secrets.token_hex(6))
    if backend == "nftables":
        from securerun.firewall.libnftables import Nftables, NftablesError

        try:
            Nftables().close()
        except NftablesError as error:
            raise PortChainsUnavailable(str(error)) from error
    return "its commands are installed" if backend == "iptables" else "its library is installed"


def _reserved_ports() -> Ability:
    if os.geteuid() != 0 or not proc.governs_network():
        return Ability("reserved-ports", None, f"only root can tell whether {port_ranges.NAME} can be written")
    if os.access(port_ranges.LIST, os.W_OK):
        return Ability("reserved-ports", True, f"{port_ranges.NAME} can be written")
    return Ability(
        "reserved-ports",
        False,
        f"{port_ranges.NAME} is read-only here",
        f"sysctl -w {port_ranges.NAME}=PORTS (on the host)",
    )


def _guards() -> Iterator[Ability]:
    """Try whether a guard answers, by the first way that leads to one; it is let go before it has an order."""
    answered = ""
    for way in ways.ways():
        about = partial(Ability, f"guard {way.name}", way=way.name)
        obstacle = way.obstacle or ("" if answered else _refusal(way))
        if obstacle:
            yield about(works=False, what=obstacle, fix=_fix_of(way))
        elif answered:
            yield about(works=None, what=f"not tried: a guard answers {answered}")
        else:
            answered = way.name
            yield about(works=True, what="a guard answers")


def _fix_of(way: Way) -> str:
    if not proc.governs_network():
        return "securerunctl setup systemd" if way.name == ways.BY_SYSTEMD else ways.OUTSIDE
    if way.name == ways.DIRECTLY:
        return _fix_of_privilege()
    return _WAYS[ways.BY_SYSTEMD if way.name == ways.BY_SUDO and ways.barred_to_sudo() else way.name]


def _refusal(way: Way) -> str:
    """Return why no guard can be had by a way that has no obstacle; "" if one can."""
    try:
        connection = way.open()
    except OSError as error:
        return error.strerror or str(error)
    try:
        answer = connection.receive(_ANSWER_SECONDS)
        if isinstance(answer, Ready):
            return ""
        return answer.message if isinstance(answer, Refused) else connection.last_words()
    except (ProtocolError, SecurerunError) as error:
        return str(error)
    finally:
        connection.close()
