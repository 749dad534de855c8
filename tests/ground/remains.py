"""What a job may leave behind on hosts and on the machine: nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hosts import Host, MachineState, eventually, machine_snapshot

_CLEAN_SECONDS = 2


@dataclass(frozen=True)
class Left:
    """What a host and the machine looked like before a job, to be the same after it."""

    hosts: Sequence[tuple[Host, dict[str, str]]]
    machine: MachineState

    def nothing(self) -> bool:
        return machine_snapshot() == self.machine and all(host.snapshot() == before for host, before in self.hosts)


@contextmanager
def nothing_left_behind(*hosts: Host) -> Iterator[None]:
    """Whatever the block does, the hosts and the machine are afterwards as they were before."""
    left = Left([(host, host.snapshot()) for host in hosts], machine_snapshot())
    yield
    if eventually(left.nothing, seconds=_CLEAN_SECONDS):
        return
    assert machine_snapshot() == left.machine
    for host, before in left.hosts:
        assert host.snapshot() == before
