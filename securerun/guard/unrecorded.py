"""Rules of runs that no record here names: of a container that was killed, or of one that lives and has its own /run.

A guard that lives stands at an abstract name (presence.py), which like its rules is of the network namespace, whoever's
/run it writes to. So rules without a record are left over if nobody stands there who may make such rules at all:
CAP_NET_ADMIN is asked of the very process that the kernel names, and user ids are not, since a container's root has
number 0 without it. Where the kernel does not name it, as for a guard that is in no pid namespace below this one, it is
believed to be one: then the host's own root can tell.

No launch that finds no such rules loads this.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from itertools import islice

from securerun.firewall import backends
from securerun.firewall.chains import PortChainsUnavailable
from securerun.guard import noted, program, records, reserved
from securerun.guard.presence import MORE_NAMES
from securerun.guard.protocol import presence_of
from securerun.linux import capabilities, local_sockets, proc, processes, sent_along, user_namespaces
from securerun.linux.port_ranges import ReservationUnavailable

# What stands in the way of removing.
OBSTACLES = (PortChainsUnavailable, ReservationUnavailable)

# Looking and removing are done under the host's lock, for which others wait.
_SECONDS = 3.0
_READING_SECONDS = 1.0
_MOST_NAMES = 64


def left_over(directory: int, runs: Iterable[str]) -> Iterator[str]:
    """Yield those of these runs that have no record here, and for which no guard stands, as far as there is time."""
    deadline = time.monotonic() + _SECONDS
    for run_id in sorted(runs):
        if time.monotonic() > deadline:
            return
        if not records.exists(directory, run_id) and not is_stood_for(run_id):
            yield run_id


def remove(directory: int, backend: str, runs: Iterable[str]) -> Iterator[str]:
    """Remove what is left over of these runs in one backend, and yield a line for each. Needs the host's lock."""
    for run_id in left_over(directory, runs):
        try:
            backends.open_chains(backend, run_id).remove()
            give_ports_back(directory, run_id)
            yield f"removed the rules that run {run_id} had left in {backend}: no guard stands for it, and no record"
        except OBSTACLES as error:
            yield f"not all that run {run_id} left, with rules in {backend}, can be removed: {error}"


def give_ports_back(directory: int, run_id: str) -> None:
    """Take the ports off the list that are noted as a killed container's, but for those of other runs.

    The caller holds the host's lock. Raises ReservationUnavailable.
    """
    ports = noted.ports_of(run_id)
    if ports:
        others = noted.of_others(run_id)
        reserved.take_away(directory, ports - others, and_mark=not others)
        noted.note(run_id, frozenset())


def is_stood_for(run_id: str) -> bool:
    """Return whether a guard stands for a run in this network namespace; also where that cannot be told from here."""
    first = presence_of(run_id)
    if _is_a_guards(first):
        return True
    more = re.compile(re.escape(first[1:]).encode() + MORE_NAMES.encode())
    try:
        if processes.all_are_seen():
            return _is_held_by_a_guard(more)
        found = islice(local_sockets.listening(more, _READING_SECONDS), _MOST_NAMES + 1)
        return any(_is_a_guards(name) or number == _MOST_NAMES for number, (name, _) in enumerate(found))
    except OSError:
        return True


def _is_a_guards(name: str | bytes) -> bool:
    with sent_along.deaf() as end:
        try:
            end.connect(name)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            # Too many wait there already. Who has it let come so far may be the guard, or anybody.
            written = (name.encode() if isinstance(name, str) else name)[1:]
            try:
                return not processes.all_are_seen() or _is_held_by_a_guard(re.compile(re.escape(written)))
            except OSError:
                return True
        pid, _ = local_sockets.peer_of(end)
        # Without a number here it is in no pid namespace within this one. Its end is looked for last: if it had not
        # ended by then, what was asked of its number was asked of it.
        return pid == 0 or (_may_make_rules(pid) and not local_sockets.is_of_a_process_that_is_gone(end))


def _is_held_by_a_guard(names: re.Pattern[bytes]) -> bool:
    """Return whether one of this host's guards listens at such a name; however many others do.

    Raises OSError where that cannot be told in time.
    """
    inodes = {inode for _, inode in local_sockets.listening(names, _READING_SECONDS)}
    return bool(inodes and proc.sockets_of(filter(_is_a_guard, proc.pids()), inodes))


def _is_a_guard(pid: int) -> bool:
    try:
        return proc.name(pid).strip() == program.NAME and _may_make_rules(pid)
    except OSError:
        return False


def _may_make_rules(pid: int) -> bool:
    """Return whether a process has CAP_NET_ADMIN for this network: in the user namespace that it is of, or here."""
    try:
        has = capabilities.NET_ADMIN in proc.status(pid).bits("CapEff")
        return has and proc.namespace("user", pid) in (proc.namespace("user"), user_namespaces.of_network())
    except proc.GONE:
        return False
    except OSError:
        return True  # it may not be looked into: no ordinary user's
