"""The ports of guarded jobs in net.ipv4.ip_local_reserved_ports, so that the kernel hands none of them to anyone else.

HCCL's documentation asks for it (HCCL_IF_BASE_PORT: `sysctl -w net.ipv4.ip_local_reserved_ports=60000-60015`), since
its default lies in the range from which every connection of the host gets its own port. The list belongs to a whole
network namespace: to its administrator, to other programs, and to all jobs at once. What the jobs want stands in their
records, and what of the list is theirs in a ledger beside the records. `settle` makes the list what it should be:
what others reserved, and what the recorded jobs want. Killed in its middle, it goes on the next time.

Somebody else may write to the list meanwhile. Whoever reads it, changes something and writes it back leaves ours in it;
whoever writes a list of their own means all of it, also ports that were ours. To tell one from the other, port 0 comes
and goes with ours, as a mark: nothing can be bound to it, so it reserves nothing, and no list of one's own has it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from securerun.errors import PolicyError
from securerun.firewall.policy import PortRange
from securerun.guard import records, run_directory
from securerun.guard.records import Record
from securerun.linux import port_ranges, proc, processes
from securerun.linux.port_ranges import Ports, Ranges, ReservationUnavailable, numbers, understood, written

_MARK = 0
# A write takes one page, and before kernel 5.2 a number that stood across its end was read as two.
_LONGEST_WRITE = 2048
# By the network namespace's inode (namespaces(7)).
_LEDGER_NAME = re.compile(r"reserved-[0-9]+\.ledger")


@dataclass(frozen=True)
class Choice:
    """Of a job's planned ports, those to reserve, and those that would leave the host too few of its own."""

    reserved: Ranges
    left_out: tuple[PortRange, ...]


def choose(directory: int, planned: Iterable[PortRange], run_id: str) -> Choice:
    """Choose which of a run's ports to reserve, the smallest ranges first.

    All jobs together get half of what the host has for connections of its own: a plan of 1024-65535 is right for port
    chains, and reserved it would leave no program of the host a port to connect from.
    Raises ReservationUnavailable.
    """
    current = port_ranges.reserved()
    free = port_ranges.all_handed_out() - (current - _ours(directory, current))
    chosen = _wanted(directory, without=run_id)
    own: Ports = frozenset()
    left_out = []
    for ports in sorted(planned, key=lambda ports: (ports.last - ports.first, ports)):
        these = numbers([(ports.first, ports.last)])
        if len((chosen | these) & free) > len(free) // 2:
            left_out.append(ports)
            continue
        chosen |= these
        own |= these
    return Choice(port_ranges.ranges(own), tuple(left_out))


def settle(directory: int, *, without: str = "") -> None:
    """Make the list of this network namespace what the recorded runs want, beside what others reserved.

    The caller holds the host's lock. Raises ReservationUnavailable, with the ledger as it should be for the next try.
    """
    current = port_ranges.reserved()
    ours = _ours(directory, current)
    others = current - ours
    mine = _wanted(directory, without) - others
    if mine:
        mine |= {_MARK} - others
    # In the ledger first: what is in the list and not in the ledger would stay for ever.
    _write_ledger(directory, ours | mine)
    if mine - ours:
        _add(mine - ours)
    if ours - mine:
        _take_away(ours - mine)
    _write_ledger(directory, mine)


def reserve(directory: int, run_id: str, ports: Ranges) -> None:
    """Make the list what it should be with a run's ports, and note those that it has by that, in a container.

    The caller holds the host's lock. Raises ReservationUnavailable.
    """
    settle(directory)
    if not processes.all_are_seen():
        from securerun.guard import noted

        noted.note(run_id, numbers(ports) & _ours(directory, port_ranges.reserved()))


def take_away(directory: int, ports: Ports, *, and_mark: bool) -> None:
    """Take ports off the list that a run of another /run had put there; those that runs of this one want become ours.

    and_mark: no run of another /run has any. The caller holds the host's lock. Raises ReservationUnavailable.
    """
    wanted, current = _wanted(directory, ""), port_ranges.reserved()
    taken_over = ports & wanted & current
    ours = _ours(directory, current) | taken_over
    mark = frozenset({_MARK}) & current
    if taken_over:
        _write_ledger(directory, ours | mark)
    gone = (ports - wanted) & current | (mark if and_mark and not ours else frozenset())
    if gone:
        _take_away(gone)


def give_back(directory: int, run_id: str) -> None:
    """Take a run's ports from the list, but for those that other runs of this network namespace want.

    The caller holds the host's lock, and removes the run's record afterwards. Raises ReservationUnavailable.
    """
    settle(directory, without=run_id)
    if not processes.all_are_seen():
        from securerun.guard import noted

        noted.note(run_id, frozenset())


def forget(directory: int, record: Record) -> None:
    """Remove the ledger of a dead run's network namespace, which is gone itself, or of another boot.

    The caller holds the host's lock.
    """
    name = _ledger_name(record.network)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if records.read_document(directory, name)["boot_id"] == record.boot_id:
            os.unlink(name, dir_fd=directory)


def are_reserved(ports: Ranges) -> bool:
    """Return whether all of these ports are in the list. Raises ReservationUnavailable."""
    return not ports or numbers(ports) <= port_ranges.reserved()


def ledgers(directory: int) -> tuple[str, ...]:
    """Return the names of the ledgers among the records."""
    return tuple(name for name in sorted(os.listdir(directory)) if _LEDGER_NAME.fullmatch(name))


def _ledger_name(network: int) -> str:
    return f"reserved-{network}.ledger"


def _wanted(directory: int, without: str) -> Ports:
    """Return what the runs of this network want, live or dead: a dead run's ports go when it is reaped."""
    here = (proc.namespace("net"), proc.boot_id())
    wanted: Ports = frozenset()
    for run_id, document in records.documents(directory):
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, PolicyError):
            if run_id != without and (document["network"], document["boot_id"]) == here:
                wanted |= numbers(records.reserved_ports(document))
    return wanted


def _ours(directory: int, current: Ports) -> Ports:
    """Return what of the current list is ours."""
    ledger = _read_ledger(directory)
    if _MARK in ledger and _MARK not in current:
        return frozenset()
    return ledger & current


def _read_ledger(directory: int) -> Ports:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        document = records.read_document(directory, _ledger_name(proc.namespace("net")))
        if document["boot_id"] == proc.boot_id():
            return understood(document["ports"])
    return frozenset()


def _write_ledger(directory: int, ports: Ports) -> None:
    if ports == _read_ledger(directory) and ports:
        return
    name = _ledger_name(proc.namespace("net"))
    try:
        if ports:
            run_directory.write_document(directory, name, {"boot_id": proc.boot_id(), "ports": written(ports)})
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
    except OSError as error:
        raise ReservationUnavailable(f"{records.DIRECTORY / name} cannot be written: {error.strerror}") from error


def _add(ports: Ports) -> None:
    """Add to the list, whatever stands in it at that moment.

    A write that does not begin at offset 0 counts as the rest of a longer one, and is added to what is there
    (kernel/sysctl.c, proc_do_large_bitmap, since 2.6.35): nobody's change between a read and a write of ours is lost.
    """
    for position, piece in enumerate(_pieces(ports), 1):
        _write(piece, position)
    if not ports <= port_ranges.reserved():
        raise ReservationUnavailable(f"{port_ranges.NAME} does not take {written(ports)}")


def _take_away(ports: Ports) -> None:
    # There is no write that only takes away: what somebody adds between these two lines is lost.
    remaining = port_ranges.reserved() - ports
    for position, piece in enumerate(_pieces(remaining) if remaining else [b"\n"]):
        _write(piece, position)


def _write(piece: bytes, position: int) -> None:
    try:
        descriptor = os.open(port_ranges.LIST, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, piece, position)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ReservationUnavailable(f"{port_ranges.NAME} cannot be written: {error.strerror}") from error


def _pieces(ports: Ports) -> Iterator[bytes]:
    piece = ""
    for word in written(ports).split(","):
        if len(piece) + len(word) > _LONGEST_WRITE:
            yield piece.encode() + b"\n"
            piece = ""
        piece += f",{word}" if piece else word
    yield piece.encode() + b"\n"
