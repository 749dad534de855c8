"""What securerun says when it will not go on: one line for a person, one exit status for a script.

All exceptions of securerun's own, each where it stands if that is not here; a test holds this to the code.

    SecurerunError                    a command gives up, with a status of 1 where no other is said
    ├── UsageError                    2
    ├── PrivilegeError                77
    │   ├── Barred                    protection.apart
    │   ├── Powerless                 77
    │   ├── ReservationUnavailable    linux.port_ranges
    │   └── TooManyWaiting            guard.waiting
    ├── PolicyError                   78
    │   ├── Unfinished                job.ranktable
    │   ├── Unknown                   job.ranktable
    │   └── Unnamed                   job.peers
    ├── Refusal                       protection.client
    └── CommandError                  ctl.exec
    Unavailable                       something cannot be had on this host
    ├── CgroupUnavailable             linux.cgroups
    ├── ShieldUnavailable             firewall.refusals
    ├── PortChainsUnavailable         firewall.chains
    │   └── TooManyRules              firewall.chains
    ├── ReservationUnavailable        linux.port_ranges
    └── SocketsUnavailable            linux.sock_diag
    Exception                         for the caller, who makes one of the above of it
    ├── ProtocolError                 guard.documents
    ├── NftablesError                 firewall.libnftables
    ├── JSONError                     job.jsonstream
    ├── TimeUp                        linux.file_lock
    └── Unfit                         linux.secret_file
    OSError
    ├── DescriptorsSent               linux.sent_along
    └── VerifierError                 linux.bpf
"""

from __future__ import annotations

import enum


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


class Powerless(PrivilegeError):
    """A guard has too little privilege, or finds too little here; one that is come by in another way may have more."""


class PolicyError(SecurerunError):
    """The policy cannot be right: unknown peers, weak umask, bad port (EX_CONFIG of sysexits.h)."""

    status = 78


class Obstacle(enum.Enum):
    """What stands in the way of what cannot be had, for code that decides by it: the words for people may change."""

    NOT_PERMITTED = enum.auto()
    OLD_KERNEL = enum.auto()
    READ_ONLY_CGROUPS = enum.auto()
    NO_CGROUP = enum.auto()
    """What was to be a cgroup is none, or was removed."""
    NET_CLS = enum.auto()
    """net_cls or net_prio was used, which on some kernels has the sockets of every cgroup count as the root's."""
    PROGRAM_ABOVE = enum.auto()
    """A program on a cgroup above forbids any below, or would be switched off by one."""
    NOT_PROVEN = enum.auto()
    """The self-test could not judge."""
    FULL = enum.auto()
    NOTHING_THERE = enum.auto()
    """What was to be taken over does not exist."""
    OTHER = enum.auto()


class Unavailable(Exception):
    """Something cannot be had on this host: a cgroup, a shield, port chains, a look at sockets.

    The message is one line and says why. Whoever asked for it goes on without, or gives up with a SecurerunError.
    """

    def __init__(self, message: str, obstacle: Obstacle = Obstacle.OTHER) -> None:
        super().__init__(message)
        self.obstacle = obstacle
