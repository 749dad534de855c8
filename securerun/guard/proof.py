"""Whether a shield that was proven still holds, looked at again and again where something can switch it off.

That is so on kernels on which net_cls and net_prio of cgroup version 1 may (`securerun.linux.net_cgroups`): for all
cgroups at once, by their first use, or for the sockets of a process that they note something of. Elsewhere, what was
proven holds as long as the cgroup.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack

from securerun.firewall import selftest
from securerun.firewall.refusals import ShieldUnavailable
from securerun.guard.lease import Lease
from securerun.linux import cgroups, net_cgroups, proc, processes
from securerun.text import printable

SWITCHED_OFF = (
    "net_cls or net_prio of cgroup version 1 came into use, which switches filters on cgroups off on this kernel until "
    "the next boot"
)

# Of what cannot be judged for so long nobody knows whether it holds.
_LONGEST_UNPROVEN_SECONDS = 5.0
# A child that was killed is replaced, not without end in a moment.
_AGAIN_SECONDS = 0.5
# Each process is a file to read; with thousands of them no more than a tenth of the time.
_LOOK_SECONDS, _REST = 0.1, 9
_LONGEST_PLACE = 200
# rmdir answers EBUSY for a moment after the last process has gone.
_REMOVAL_SECONDS, _REMOVAL_INTERVAL_SECONDS = 0.2, 0.005


class Proof:
    """Proves the shield of a lease again, beside the job, and watches where the job's processes are."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._room: _Room | None = None
        self._repeated: selftest.Repeated | None = None
        self._must_prove_launcher = lease.order.adopt
        self._unproven_since: float | None = None
        self._next_begin = 0.0
        self._next_look = 0.0

    def look(self) -> str:
        """Return why the shield does not hold any more; "" while it does, or nobody can tell for a moment."""
        return self._why_unproven() or self._who_moved()

    def is_threatened(self) -> bool:
        """Return whether what may switch the shield off is there. Raises OSError."""
        return bool(net_cgroups.of(proc.SELF))

    def end(self) -> None:
        """End what it takes and remove it."""
        if self._repeated is not None:
            self._repeated.end()
            self._repeated = None
        if self._room is not None:
            self._room.remove()
            self._room = None

    def _why_unproven(self) -> str:
        try:
            runs = self._runs()
        except (ShieldUnavailable, OSError) as error:
            self.end()
            self._next_begin = time.monotonic() + _AGAIN_SECONDS
            return self._why_overdue(str(error))
        if runs is False:
            return SWITCHED_OFF
        if runs:
            self._unproven_since = None
            return ""
        return self._why_overdue("no answer of the self-test")

    def _why_overdue(self, reason: str) -> str:
        """Return that the shield counts as none where nobody could tell for too long; "" before that.

        Counted from look to look: what kept this guard from looking is no fault of the shield's.
        """
        now = time.monotonic()
        self._unproven_since = self._unproven_since or now
        overdue = now - self._unproven_since > _LONGEST_UNPROVEN_SECONDS
        return f"it cannot be proven any more ({reason})" if overdue else ""

    def _runs(self) -> bool | None:
        """Return whether filters on a cgroup run; None while that is not known. Raises ShieldUnavailable or OSError."""
        if self._repeated is None:
            if time.monotonic() < self._next_begin:
                return None
            return self._begin()
        return self._repeated.look()

    def _begin(self) -> bool | None:
        cgroup = self._lease.cgroup
        if cgroup is None:
            return None
        self._room = _Room.make(cgroup.ancestors, _name_of(self._lease.policy.run_id))
        if self._must_prove_launcher:
            # The guard that died knew where the launcher was when the shield was proven; this one does not.
            launcher = self._lease.caller.pid
            self._lease.proven_in = net_cgroups.of(launcher)
            if not selftest.prove(self._room.descriptor, launcher):
                return False
            self._must_prove_launcher = False
        with _tops() as tops:
            room = self._room
            self._repeated = selftest.Repeated(room.descriptor, tops, room.leave, (room.parent,))
        return None

    def _who_moved(self) -> str:
        """Return which process of the job is in another cgroup of net_cls or net_prio than the proof was made in."""
        began = time.monotonic()
        if began < self._next_look or not self.is_threatened():
            return ""
        for pid, found in self._memberships():
            for name, path in net_cgroups.differing(found, self._lease.proven_in).items():
                place = printable(f"{name}:{path}"[:_LONGEST_PLACE])
                return f"process {pid} of the job is in {place} now, for which nothing was proven"
        now = time.monotonic()
        self._next_look = now + max(_LOOK_SECONDS, _REST * (now - began))
        return ""

    def _memberships(self) -> Iterator[tuple[int, net_cgroups.Memberships]]:
        """Yield each process of the job with its cgroups; both are read at once, so that no number is another's."""
        cgroup = self._lease.cgroup
        if cgroup is None:
            return
        for pid in cgroup.processes():
            with contextlib.suppress(OSError):
                lines = proc.cgroups(pid)
                path = next((line[3:] for line in lines if line.startswith("0::")), "")
                if cgroups.relative(path, cgroup.path) is not None:
                    yield pid, net_cgroups.among(lines)
        for process in self._lease.strays:
            with contextlib.suppress(OSError):
                found = net_cgroups.of(process.pid)
                if processes.lives(process):
                    yield process.pid, found


class _Room:
    """An empty cgroup of the run's own. descriptor, parent: of its directory, and of the one above, which is not ours.

    Raises OSError where there is none, or it cannot have a process.
    """

    def __init__(self, parent: int, name: str) -> None:
        self.parent = parent
        self._name = name
        self.descriptor = os.open(name, cgroups.DIRECTORY_FLAGS, dir_fd=parent)
        with ExitStack() as undo:
            undo.callback(os.close, self.descriptor)
            if cgroups.read(self.descriptor, "cgroup.type") == "domain invalid":
                cgroups.write(self.descriptor, "cgroup.type", "threaded")
            undo.pop_all()

    @classmethod
    def make(cls, above: tuple[int, ...], name: str) -> _Room:
        """Make it at the top, where it belongs to nobody who could freeze it, else beside the job. Raises OSError."""
        try:
            return cls._make_in(above[0], name)
        except OSError:
            return cls._make_in(above[-1], name)

    @classmethod
    def _make_in(cls, parent: int, name: str) -> _Room:
        _remove(parent, name)  # of a guard that was killed
        os.mkdir(name, 0o755, dir_fd=parent)
        try:
            return cls(parent, name)
        except OSError:
            _remove(parent, name)
            raise

    def leave(self) -> None:
        """Have the process that is in it leave and remove it, since its guard has died. Raises OSError."""
        net_cgroups.enter(self.parent)
        _remove(self.parent, self._name)

    def remove(self) -> None:
        """Remove it, as soon as the kernel lets go of what was in it."""
        os.close(self.descriptor)
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while not _remove(self.parent, self._name) and time.monotonic() < deadline:
            time.sleep(_REMOVAL_INTERVAL_SECONDS)


def remove_remains(path: str, run_id: str) -> None:
    """Remove what a run's proof left that was killed with its guard. path: the job's cgroup, which may be gone."""
    for place in cgroups.places_of(path):
        with contextlib.suppress(OSError):
            descriptors = place.open_as_far_as_there_is()
            for parent in {descriptors[0], descriptors[-1]}:
                _remove(parent, _name_of(run_id))
            for descriptor in descriptors:
                os.close(descriptor)
        return


def _name_of(run_id: str) -> str:
    return f"securerun-{run_id}-proof"


def _remove(parent: int, name: str) -> bool:
    """Remove an empty cgroup; return whether it is gone."""
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _tops() -> Iterator[tuple[int, ...]]:
    """The tops of the hierarchies of net_cls and net_prio that this process is further down in.

    There nobody notes anything of what the proof's sockets are. Raises OSError.
    """
    with ExitStack() as undo:
        found = []
        for name in net_cgroups.differing(net_cgroups.of(proc.SELF), {}):
            found.append(net_cgroups.open_place(name, "/"))
            undo.callback(os.close, found[-1])
        yield tuple(found)
