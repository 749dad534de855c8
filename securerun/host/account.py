"""Becoming an ordinary user, for good: root starts the guard, and whoever trains is somebody else."""

from __future__ import annotations

import os
import pwd
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from securerun.errors import PrivilegeError, UsageError
from securerun.linux import capabilities, prctl

# What was root's own, or tells how root came to be root.
_LEFT_BEHIND = ("XDG_RUNTIME_DIR", "SUDO_USER", "SUDO_UID", "SUDO_GID", "SUDO_COMMAND", "MAIL")


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


def become(account: Account) -> None:
    """Be this user from now on, with his groups and home, no capability, and no way to gain any (no_new_privs).

    Raises PrivilegeError for whoever may not become another user, and where that user cannot run this Python.
    """
    if os.getresuid() == (account.user, account.user, account.user):
        return
    try:
        os.setgroups(account.groups)
        os.setresgid(account.group, account.group, account.group)
        # The bounding set can be emptied only while the capability to do so is there.
        capabilities.begin_to_leave()
        os.setresuid(account.user, account.user, account.user)
        capabilities.keep_only(())
    except OSError as error:
        raise PrivilegeError(
            f"--run-as {account.name}: this process may not become another user ({error.strerror}); start it as root"
        ) from error
    # A process that changed its user is root's in /proc until it executes something, and this one does not.
    prctl.set_dumpable(True)
    _take_on_environment(account)
    _require_this_python(account)


def _take_on_environment(account: Account) -> None:
    os.environ.update(HOME=account.home, USER=account.name, LOGNAME=account.name, SHELL=account.shell)
    for name in _LEFT_BEHIND:
        os.environ.pop(name, None)


def _require_this_python(account: Account) -> None:
    for needed, access in ((Path(sys.executable), os.X_OK), (Path(__file__), os.R_OK)):
        if not os.access(needed, access):
            raise PrivilegeError(
                f"--run-as {account.name}: that user has no access to {needed}; install Python and securerun where "
                "every user may run them, not below /root"
            )
