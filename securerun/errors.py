"""What securerun says when it will not go on: one line for a person, one exit status for a script."""

from __future__ import annotations


class SecurerunError(Exception):
    """An error that a person can act on.

    The message is one line: what is wrong, which value, what to do next.
    `status` is the exit status of the command that gives up because of it.
    """

    status = 1


class UsageError(SecurerunError):
    """The command line, the environment or the site configuration cannot be read."""

    status = 2


class PrivilegeError(SecurerunError):
    """This process or this host cannot install what the job needs (EX_NOPERM of sysexits.h)."""

    status = 77


class PolicyError(SecurerunError):
    """The policy cannot be right: unknown peers, weak umask, bad port (EX_CONFIG of sysexits.h)."""

    status = 78


class Unavailable(Exception):
    """Something cannot be had on this host: a cgroup, a shield, port chains, a look at sockets.

    The message is one line and says why. Whoever asked for it goes on without, or gives up with a SecurerunError.
    """
