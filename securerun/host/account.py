"""Becoming an ordinary user, for good: root starts the guard, and whoever trains is somebody else."""

from __future__ import annotations

import ctypes
import os
import pwd
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from securerun.errors import PrivilegeError, UsageError
from securerun.host import kept
from securerun.linux import capabilities, keyrings, libc, proc, seclusion


@dataclass(frozen=True)
class Account:
    """An ordinary user: name, ids, home directory, shell and the ids of all groups (passwd(5), group(5))."""

    name: str
    user: int
    group: int
    home: str
    shell: str
    groups: tuple[int, ...]


@cache
def name_of(user: int) -> str:
    """Return the name of a user id, or the number where passwd has none for it (a container's --user 12345)."""
    try:
        return pwd.getpwuid(user).pw_name
    except (KeyError, OverflowError):
        return str(user)


def find_account(name: str, source: str) -> Account:
    """Return the account of a user name or id. Raises UsageError where there is none, and for root's."""
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError) as error:
        raise UsageError(f"{source}: there is no user {name!r} on this host; name one of `getent passwd`") from error
    if entry.pw_uid == 0:
        raise UsageError(f"{source}: {name!r} is root; name an ordinary user, or leave {source} out")
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell, groups)


def is_mine(account: Account) -> bool:
    """Return whether this process is that user's already, and nobody else's besides."""
    return os.getresuid() == (account.user, account.user, account.user)


def become(account: Account) -> None:
    """Be this user from now on, with his groups and home, no capability, and no way to gain any (no_new_privs).

    Of whoever this process was before, the keys of the session and all of the environment that no job needs are left
    behind. No process of the new user may look into this one, whose memory holds more than that.

    Raises PrivilegeError for whoever may not become another user, and where that user cannot run this Python.
    """
    seclusion.begin()
    try:
        os.setgroups(account.groups)
        os.setresgid(account.group, account.group, account.group)
        # The bounding set can be emptied only while the capability to do so is there.
        capabilities.begin_to_leave()
        os.setresuid(account.user, account.user, account.user)
        capabilities.keep_only(())
    except OSError as error:
        raise PrivilegeError(
            f"--run-as {account.name}: this process may not become another user ({error.strerror}); "
            f"{capabilities.run_as_root()}"
        ) from error
    # By itself it is so only from here on, and not where fs.suid_dumpable says otherwise.
    seclusion.begin()
    try:
        keyrings.begin_new_session()
    except OSError as error:
        raise PrivilegeError(
            f"--run-as {account.name}: no session keyring can be made for that user ({error.strerror}); have "
            "them remove keys (keyctl), or raise kernel.keys.maxkeys"
        ) from error
    _take_on_environment(account)
    _require_this_python(account)


def _take_on_environment(account: Account) -> None:
    """Have an environment of what stays, also where others would look for it: what this process was started with."""
    environment = kept.of(os.environ)
    environment.update(HOME=account.home, USER=account.name, LOGNAME=account.name, SHELL=account.shell)
    libc.library.clearenv()
    for name in list(os.environ):
        del os.environ[name]
    # Copied by setenv(3), so that from here on nothing lies where it lay.
    os.environ.update(environment)
    first, last = proc.stat(proc.SELF).environment_span
    ctypes.memset(first, 0, last - first)


def _require_this_python(account: Account) -> None:
    for needed, access in ((Path(sys.executable), os.X_OK), (Path(__file__), os.R_OK)):
        if not os.access(needed, access):
            raise PrivilegeError(
                f"--run-as {account.name}: that user has no access to {needed}; install Python and securerun where "
                "every user may run them, not below /root"
            )
