"""What every backend of the port chains offers, and how one says that it cannot work here."""

from __future__ import annotations

import socket
import time
from typing import Callable, Protocol

from securerun.errors import Unavailable
from securerun.firewall.policy import Policy


class PortChainsUnavailable(Unavailable):
    """This host cannot have port chains of this backend. The message is one line and says why."""


class TooManyRules(PortChainsUnavailable):
    """A policy would take more rules a family than are written where there are no sets. The message says what to do."""


# To sources that are invented, each answer takes a place among the neighbours that the whole machine may look for at
# once (net.ipv6.neigh.default.gc_thresh3: 1,024), for some three seconds. What is beyond is dropped.
ANSWERED_A_SECOND = 100
# What the kernel does not know it refuses at once; another who holds a lock is waited for, and not twice.
_REFUSED_WITHIN_SECONDS = 3.0


class Resets:
    """Whether the rules of one run can answer with a reset: found out by trying, as its module may be missing.

    missing: they cannot here, so that who would be answered is dropped in silence.
    """

    def __init__(self) -> None:
        self.missing = False

    def install(self, policy: Policy, install: Callable[[bool], None]) -> None:
        """Have `install(True)` install rules with resets where the policy has some, else `install(False)` others.

        Raises what these raise.
        """
        wanted = policy.answered_version is not None and not self.missing
        began = time.monotonic()
        try:
            install(wanted)
        except PortChainsUnavailable:
            if not wanted or time.monotonic() - began > _REFUSED_WITHIN_SECONDS:
                raise
            install(False)
            self.missing = True


def of_another(run_id: str) -> PortChainsUnavailable:
    """Return the error for rules that stand under a run's id before it has made any."""
    return PortChainsUnavailable(
        f"a run with the id {run_id} exists already, by its rules, but not in this /run; start the job again"
    )


class PortChains(Protocol):
    """The port chains of one run. Callers hold the host's lock (guard/run_directory.py) while they change them."""

    backend: str
    """The name of the backend, as `--firewall` takes it."""
    name: str
    """The chain or table to look for in the kernel."""
    resets: Resets
    """Whether they can answer the IP version that no peer has."""
    others: frozenset[str]
    """The other runs whose rules `begin` found, and that keep them when their guard is killed."""

    def begin(self, *, adopt: bool, outlive: bool) -> None:
        """Look whether rules of a run of this id stand already, before any are installed.

        The id is the launcher's choice, and a run in a container with a /run of its own may have the same: its rules
        are neither replaced nor removed. adopt: a dead guard of this very run may have left them. outlive: have the
        rules stay when this process is killed; only nftables' would go.

        Raises PortChainsUnavailable for rules of a run that is not this one.
        """

    def install(self, policy: Policy, log_group: int | None) -> None:
        """Install this run's rules, in place of those that it has already, and read them back.

        What is dropped is also logged to the netfilter log group. Raises PortChainsUnavailable: with nothing of this
        run left, or with what it had before.
        """

    def stand(self) -> bool:
        """Whether the rules of this run, and the way to them, are still there.

        Raises PortChainsUnavailable when the tables cannot be read.
        """

    def remove(self) -> None:
        """Remove this run's rules and, with the last run's, all that is there because of us.

        Raises PortChainsUnavailable when the tables cannot be read or written.
        """


class Logging:
    """Whether one run's rules can log what they drop: kernels without the NFLOG target get rules that do not."""

    def __init__(self) -> None:
        self._missing = False
        self._proven = False

    def install(self, chains: PortChains, policy: Policy, group: int | None) -> None:
        """Install with the log group, or without where that cannot be had. Raises PortChainsUnavailable."""
        if group is None or self._missing:
            chains.install(policy, None)
            return
        try:
            chains.install(policy, group)
            self._proven = True
        except PortChainsUnavailable as error:
            # What was logged to before is not what is missing now.
            if self._proven or isinstance(error, TooManyRules):
                raise
            chains.install(policy, None)
            self._missing = True


def spoken_versions() -> tuple[int, ...]:
    """Return the IP versions that this kernel speaks: port chains for one of two alone would close nothing.

    `ipv6.disable=1` on the kernel's command line forbids sockets of IPv6.
    """
    if not socket.has_ipv6:
        return (4,)
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return (4,)
    return (4, 6)
