"""The guard's own sources of a job's key, which no user reads: the site's file, and in a Slurm job munge's or Slurm's.

Of each user the kernel tells who it is, and by that they get a key of their own: the user id goes into it. All else
that goes into it is the launcher's word, and may be: whoever names another job's number, or takes themselves to be in a
job of Slurm's, gets a key of their own for it, which nobody but their own other job has, and whoever has the user's
rights could have started that. So nothing is proven of the job, and nothing has to be.

A key that the guard makes tells nothing of the file that it is of (HKDF), short of trying files: munge's is as good
as it was made, since munge gives every user as much to try them by with each credential.

Loaded where an order has a key.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from securerun import site_file
from securerun.errors import PrivilegeError
from securerun.firewall import job_key
from securerun.firewall.job_key import JobSecret
from securerun.guard import limits
from securerun.guard.caller import ROOT, Caller
from securerun.guard.limits import SitePolicy
from securerun.guard.program import LIMITS_FILE, SITE_KEY
from securerun.guard.protocol import KeyOrder
from securerun.linux import secret_file, slurm, trust
from securerun.linux.secret_file import Unfit

# Not where the launcher's SLURM_CONF says: that is the user's.
SLURM_CONFIGURATIONS = slurm.CONFIGURATIONS
MUNGE_KEYS = (Path("/etc/munge/munge.key"), Path("/usr/local/etc/munge/munge.key"))
SLURM_KEYS = (Path("/etc/slurm/slurm.key"), Path("/etc/slurm-llnl/slurm.key"), Path("/opt/slurm/etc/slurm.key"))
# slurm.conf(5): "auth/munge", which it is where nothing is said.
_AUTHENTICATION = re.compile(rb"^[ \t]*AuthType[ \t]*=[ \t]*([^\s#]+)", re.MULTILINE | re.IGNORECASE)
_MUNGE, _SLURM = "auth/munge", "auth/slurm"


@dataclass(frozen=True)
class Found:
    """What an order's key comes to. secret: None where there is none, and `why` says so.

    source: where the guard has it from, in words; "" for the launcher's own. is_wrong: whether there is something that
    was to be a source and must not be believed, of which people have to hear. is_forbidden: whether the site lets no
    job have a key of the guard's.
    """

    secret: JobSecret | None
    source: str = ""
    why: str = ""
    is_wrong: bool = False
    is_forbidden: bool = False


def find(wanted: KeyOrder, caller: Caller, site: SitePolicy) -> Found:
    """Return the secret that an order's key is made of, or why there is none."""
    if wanted.secret is not None:
        return Found(wanted.secret)
    if not _permitted(caller, site):
        why = f'this host gives out no key (site_key = "off" in {LIMITS_FILE})'
        return Found(None, why=why, is_forbidden=True)
    if caller.user == ROOT and not caller.is_root:
        return Found(
            None, why="user id 0 without root's rights may be anybody in a container, and has no key of the site"
        )
    try:
        return _of_site(wanted, caller) or _of_slurm(wanted, caller) or Found(None, why=_none(wanted))
    except Unfit as error:
        return Found(None, why=str(error), is_wrong=True)


def lack_of_site_key() -> str:
    """Return why root's guard does not use the site's file, and what to do; "" if it does."""
    try:
        weakness = trust.weak_point(SITE_KEY.parent, trust.roots())
        secret_file.read(SITE_KEY, trust.roots())
    except (OSError, Unfit) as error:
        return str(error.strerror if isinstance(error, OSError) else error)
    return f"may be another's by now: {weakness}" if weakness else ""


def _permitted(caller: Caller, site: SitePolicy) -> bool:
    """Return whether the site lets its own key be used; root, who is under no limit, is asked as well."""
    if not caller.is_root:
        return site.site_key
    try:
        return limits.read_site_policy()[0].site_key
    except PrivilegeError:
        return False


def _of_site(wanted: KeyOrder, caller: Caller) -> Found | None:
    """Return the key that is of the site's file. Raises Unfit for one that must not be believed: it is to be used."""
    return _secret((SITE_KEY,), job_key.OF_SITE, wanted, caller, owners=trust.roots())


def _of_slurm(wanted: KeyOrder, caller: Caller) -> Found | None:
    """Return the key that is of what Slurm's daemons prove themselves with, in a job of Slurm's. Raises Unfit."""
    if not wanted.in_slurm:
        return None
    kind = _authentication()
    if kind == _MUNGE:
        return _secret(MUNGE_KEYS, job_key.OF_SLURM, wanted, caller)
    if kind == _SLURM:
        return _secret(SLURM_KEYS, job_key.OF_SLURM, wanted, caller)
    return None


def _secret(
    paths: Collection[Path], kind: str, wanted: KeyOrder, caller: Caller, owners: Collection[int] = ()
) -> Found | None:
    """Return the key that is of the first of these files. owners: whose it may be; whoever has it already, by default.

    None where there is none of them. Raises Unfit.
    """
    for path in paths:
        try:
            whose = owners or trust.roots() | {path.lstat().st_uid}
            weakness = trust.weak_point(path.parent, whose)
            source = secret_file.read(path, whose)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise Unfit(f"{path} cannot be read ({error.strerror}); tell this host's administrator") from error
        except Unfit as error:
            raise Unfit(f"{path} {error}") from error
        if weakness is not None:
            raise Unfit(f"{path} may be another's by now: {weakness}; tell this host's administrator")
        return Found(job_key.derive(source, kind, wanted.meeting, caller.user), str(path))
    return None


def _authentication() -> str:
    """Return how Slurm's daemons prove who they are on this host, as slurm.conf says; "" where there is none."""
    for path in SLURM_CONFIGURATIONS:
        try:
            found = _AUTHENTICATION.search(site_file.content(path))
        except (OSError, ValueError):
            continue
        kind = found[1].decode("ascii", "replace").lower() if found else _MUNGE
        return kind if "/" in kind else f"auth/{kind}"
    return ""


def _none(wanted: KeyOrder) -> str:
    of_slurm = ", and Slurm's own (AuthType) is none that a key can be made of" if wanted.in_slurm else ""
    return f"this host has no {SITE_KEY}{of_slurm}"
