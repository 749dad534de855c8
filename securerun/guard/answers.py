"""Answers without a tag to the job's own connections: who gave them is no node of the job.

The shield has dropped them, so that the job would wait for minutes. It is to see an error at once, and people are to
hear who answered: one node may be without securerun, or have another key, or something else listens there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from securerun.firewall.refusals import ShieldUnavailable
from securerun.linux.sock_diag import SocketDiagnosis, SocketsUnavailable

if TYPE_CHECKING:
    from securerun.firewall.tag_maps import Answer
    from securerun.firewall.tags import Tags
    from securerun.guard.lease import Lease
    from securerun.linux.networks import Address

# Who answered is told of once, and again when they were silent for so long.
_FORGOTTEN_SECONDS = 60.0
_MOST_TOLD = 256


class Answers:
    """Ends the connections of a job that were answered without a tag. fileno() is readable when there is one.

    Raises SocketsUnavailable without sock_diag.
    """

    def __init__(self, tags: Tags, whose: str, *, has_key: bool) -> None:
        """Begin. whose: what those who answered have not got, for people. has_key: whether that is the job's key."""
        self._tags = tags
        self._whose = whose
        self._has_key = has_key
        self._diagnosis = SocketDiagnosis()
        self._told: dict[tuple[Address, int], float] = {}

    def fileno(self) -> int:
        """Return the descriptor to be polled."""
        return self._tags.fileno()

    def take_in(self) -> tuple[str, ...]:
        """End what waits for another answer; return a line for each who answered and was not told of before."""
        now = time.monotonic()
        self._told = {who: at for who, at in self._told.items() if now - at < _FORGOTTEN_SECONDS}
        return tuple(line for answer in self._tags.answers() for line in self._end(answer, now))

    def close(self) -> None:
        """Close the socket that asks the kernel."""
        self._diagnosis.close()

    def _end(self, answer: Answer, now: float) -> Iterator[str]:
        how = "the connection was ended"
        try:
            self._diagnosis.end(answer.source, answer.source_port, answer.target, answer.port, answer.cookie)
        except SocketsUnavailable as error:
            how = f"the connection has to wait for its time-out ({error})"
        who = (answer.target, answer.port)
        if who not in self._told and len(self._told) >= _MOST_TOLD:
            return
        if who not in self._told:
            yield f"{_written(*who)} answered without {self._lacked_by(*who)}; {how}"
        self._told[who] = now

    def _lacked_by(self, target: Address, port: int) -> str:
        """Return what an answer lacks, and what to do: of an address that showed the key before, it is not that."""
        if not self._has_key or not self._is_known(target):
            return self._whose
        return (
            f"a tag, though {target} has this job's key: port {port} is planned here, and there it is public, or is of "
            "a process that is not the job's; name it in --public on both nodes or on neither, and see who listens "
            f"there (ss -ltnp sport = :{port})"
        )

    def _is_known(self, target: Address) -> bool:
        with contextlib.suppress(ShieldUnavailable):
            return target in self._tags.seen().guarded
        return False


def open_answers(lease: Lease) -> Answers | None:
    """Open the look-out of a lease; None where its shield does not go by tags, or the kernel has no sock_diag."""
    if lease.shield is None or lease.shield.tags is None:
        return None
    with contextlib.suppress(SocketsUnavailable):
        return Answers(lease.shield.tags, _lacking(lease), has_key=lease.key is not None)
    return None


def _lacking(lease: Lease) -> str:
    if lease.key is None:
        return (
            "being a process of this job, the only ones that --loopback job lets it meet on its planned ports of this "
            "host; start all of the job by one securerun, or use --loopback any"
        )
    fix = "start it by securerun with the same key, make what is public there public here too, or name it with --peers"
    if lease.key_required:
        fix = (
            "start it by securerun with the same key, and make what is public there public here too; if something in "
            "between takes TCP option 254 away, or it has, as this host, a public address of a network of its own, "
            "name each there with --peers, and --key auto"
        )
    key = f"the tag of this job's key (fingerprint {lease.key.fingerprint})"
    return f"{key}, so it counts as no node of it: if it is one, {fix}"


def _written(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
