"""Which of a host's reserved ports are those of a container's run, noted where the host keeps them too.

The list of reserved ports is the network namespace's, and says nothing of whose its ports are. That stands in a ledger
beside the records (reserved.py), and for a container with a /run of its own both go with it when it is killed. So its
guard also puts them into a set of the kernel's that no rule names: it is of the network namespace as well. Where there
are no such sets (ip_set), what a killed container reserved stays reserved until the next boot.

No guard on a host's own pid namespace loads this, unless it finds something left over.
"""

from __future__ import annotations

import contextlib
import re

from securerun.firewall import ipset
from securerun.firewall.policy import RUN_ID
from securerun.linux import ip_set, port_ranges
from securerun.linux.port_ranges import Ports, ReservationUnavailable

_NAMED = re.compile(f"securerun-({RUN_ID.pattern})-r")


def note(run_id: str, ports: Ports) -> None:
    """Note, or note anew, which ports a run has in the list. Not where this kernel has no such sets."""
    with contextlib.suppress(OSError):
        if ports:
            ipset.put(_name(run_id), port_ranges.ranges(ports))
        else:
            ipset.destroy(_name(run_id))


def runs() -> frozenset[str]:
    """Return the runs that have a note here."""
    with contextlib.suppress(OSError):
        return frozenset(named[1] for name in ip_set.names() if (named := _NAMED.fullmatch(name)))
    return frozenset()


def ports_of(run_id: str) -> Ports:
    """Return the ports that are noted as a run's. Raises ReservationUnavailable."""
    try:
        return ip_set.ports_of(_name(run_id))
    except OSError as error:
        raise ReservationUnavailable(f"the set {_name(run_id)} cannot be read: {error.strerror}") from error


def of_others(run_id: str) -> Ports:
    """Return the ports that are noted as any other run's. Raises ReservationUnavailable."""
    return frozenset().union(*(ports_of(other) for other in runs() - {run_id}))


def _name(run_id: str) -> str:
    return f"securerun-{run_id}-r"
