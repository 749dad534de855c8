"""Connections of the job that nobody answers: a node that another node's guard does not know hears of it by itself.

Whoever is turned away gets no answer, so its job waits in connect() for minutes without a word. The kernel knows of a
connection that is being opened how often its SYN went out again, from which address, and where to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from securerun.firewall.job_key import JobKey
from securerun.firewall.policy import covers
from securerun.guard.lease import Lease
from securerun.linux import proc, sock_diag
from securerun.linux.networks import Address
from securerun.linux.sock_diag import Attempt, SocketDiagnosis, SocketsUnavailable

# The SYN goes out again after a second, and then after another (from Linux 6.5) or after two. One that was lost on the
# way, or met a full queue, is answered by then.
_RETRIES = 1
_RETRY_SECONDS = 1.0
# How long somebody has to be without an answer, seen at each look in between.
_WAITED_SECONDS = 2.0
# A pair of hosts is told of once, and again when it was at peace for so long.
_FORGOTTEN_SECONDS = 60.0
_MOST_TOLD = 256
# What a job listens on is no port below; what it merely asks (mail, names, web) is none of securerun's.
_FIRST_FREE_PORT = 1024
# The kernel walks all connections of the host: no more than half a percent of a processor.
_PAUSE_FACTOR = 200
# Nor more than a tenth to look at what the job holds, nor seconds at a stretch.
_REST, _MOST_DESCRIPTORS = 9, 500_000

Pair = tuple[Address, Address]


class Unanswered:
    """Looks for connections of a lease's job that stay without an answer; raises SocketsUnavailable without sock_diag.

    pause: how many seconds are to pass until the next look, for what the last one took.
    """

    def __init__(self, lease: Lease) -> None:
        self.pause = 0.0
        self._lease = lease
        self._diagnosis = SocketDiagnosis()
        self._planned = lease.order.policy.joined_ports()
        self._waiting: dict[Pair, float] = {}
        self._told: dict[Pair, float] = {}

    def look(self) -> tuple[str, ...]:
        """Return a line for each host that does not answer, and of which nothing was said before.

        Raises SocketsUnavailable.
        """
        now = time.monotonic()
        attempts = self._diagnosis.attempts(_RETRIES)
        asked = time.monotonic()
        found = {(one.source, one.target): one for one in self._of_the_job(attempts)}
        self.pause = (asked - now) * _PAUSE_FACTOR + (time.monotonic() - asked) * _REST
        self._waiting = {pair: self._waiting.get(pair, now) for pair in found}
        self._told = {
            pair: now if pair in found else at
            for pair, at in self._told.items()
            if pair in found or now - at < _FORGOTTEN_SECONDS
        }
        return tuple(self._news(found, now))

    def _news(self, found: dict[Pair, Attempt], now: float) -> Iterable[str]:
        for pair, since in self._waiting.items():
            if pair not in self._told and now - since >= _WAITED_SECONDS and len(self._told) < _MOST_TOLD:
                self._told[pair] = now
                yield _line(found[pair], now - since + _RETRY_SECONDS, self._lease.key)

    def _of_the_job(self, attempts: Iterable[Attempt]) -> list[Attempt]:
        asked = [one for one in attempts if one.port >= _FIRST_FREE_PORT or covers(self._planned, one.port)]
        cgroup = self._lease.cgroup
        ids = frozenset() if cgroup is None or not asked else sock_diag.cgroup_ids(cgroup.descriptor)
        # A socket names its cgroup from Linux 5.9 on.
        user = self._lease.caller.user
        unknown = {one.inode for one in asked if one.user == user and (not ids or one.cgroup_id is None)}
        pids = (each.pid for each in self._lease.processes()) if unknown else ()
        held = proc.sockets_of(pids, unknown, _MOST_DESCRIPTORS)
        return [one for one in asked if one.cgroup_id in ids or one.inode in held]


def open_unanswered(lease: Lease) -> Unanswered | None:
    """Open the look-out of a lease; None where the kernel has no sock_diag."""
    try:
        return Unanswered(lease)
    except SocketsUnavailable:
        return None


def _line(attempt: Attempt, seconds: float, key: JobKey | None) -> str:
    where = f"[{attempt.target}]:{attempt.port}" if attempt.target.version == 6 else f"{attempt.target}:{attempt.port}"
    begin = f"no answer from {where} for {seconds:.0f} s: "
    if attempt.target.is_loopback or attempt.source == attempt.target:
        return (
            f"{begin}if securerun guards that port with --loopback job, start all of the job by one securerun or one "
            "securerunctl exec, or use --loopback any there"
        )
    if key is not None:
        return (
            f"{begin}that host may be down, or a firewall in between; if securerun guards it, it may have another key "
            f"than this job's (fingerprint {key.fingerprint}), or none: compare the fingerprints, and what each key is "
            f"of and for, and see that nothing in between translates the address {attempt.source}, or takes TCP option "
            "254 away; or name it there with --peers, and --key auto"
        )
    return (
        f"{begin}that host may be down, or a firewall in between; if securerun guards it, it may not know this one by "
        f"the address {attempt.source}: name that there with --peers"
    )
