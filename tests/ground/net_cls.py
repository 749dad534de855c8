"""net_cls and net_prio of cgroup version 1, and jobs on a kernel that does not say whether they switch filters off.

A kernel on which they do is not at hand. One that does not say so is taken for one; and what the switch does to a
filter, taking it off does as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import GROUND
from holding import HOLDER, Held
from hosts import Host, cgroup2_mount, eventually, machine_snapshot
from patience import patient
from process_table import fields_of

from securerun.linux.bpf import AttachType, Program, attached

# A guard that is started so finds no BTF of the kernel.
UNTOLD = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    '[ ! -d /sys/kernel/btf ] || mount --no-mtab -t tmpfs none /sys/kernel/btf; exec "$@"',
    "sh",
)
_FIRST_CGROUP_NAMESPACE = 0xEFFFFFFB  # include/linux/proc_ns.h
# Moves itself to a cgroup of version 1, then becomes the command.
FROM_WITHIN = ("sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"')


_held: list[int] = []


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Controllers, and what their use switches, are the machine's: of test runs side by side one has them at a time."""
    if not _held:
        _held.append(os.open(GROUND, os.O_RDONLY | os.O_DIRECTORY))
        fcntl.flock(_held[0], fcntl.LOCK_EX)
    _held.append(_held[0])
    try:
        yield
    finally:
        _held.pop()
        if len(_held) == 1:
            os.close(_held.pop())


@contextlib.contextmanager
def hierarchy(place: Path, controller: str = "net_cls") -> Iterator[Path]:
    """A hierarchy of version 1, mounted at a directory that is made for it; skips where the kernel has none."""
    place.mkdir()
    if controller not in Path("/proc/cgroups").read_text().split():
        pytest.skip(f"this kernel has no {controller} for cgroup version 1")
    mount = ["mount", "--no-mtab", "-t", "cgroup", "-o", controller, "none", str(place)]
    # A new hierarchy is mounted from the first cgroup namespace alone (cgroup1_root_to_use).
    first = _of_first_cgroup_namespace(os.getpid())
    if first is None:
        pytest.skip("the first cgroup namespace is not to be seen from here")
    # One that was unmounted a moment ago is going still.
    there = ["nsenter", f"--cgroup={first}", *mount]
    with _alone():
        assert eventually(lambda: not subprocess.run(there, capture_output=True).returncode), controller
        try:
            yield place
        finally:
            for below in place.glob("sr-test-*"):
                assert eventually(lambda below=below: _is_removed(below)), f"{below} is still in use"  # type: ignore[misc]
            # The hierarchy goes with its last mount if no cgroup is left in it, and removed ones are for a moment.
            eventually(lambda: cgroups_of(controller) == 1, seconds=3)
            subprocess.run(["umount", str(place)], check=True)


def cgroups_of(controller: str) -> int:
    """How many cgroups there are of a controller in a hierarchy of version 1; 0 where there is none."""
    for line in Path("/proc/cgroups").read_text().splitlines():
        name, hierarchy, number, _ = line.split()
        if name == controller:
            return int(number) if hierarchy != "0" else 0
    return 0


def cgroup_in(place: Path, class_id: int = 0) -> Path:
    """A cgroup of its own in a hierarchy; what its processes make has this class."""
    made = place / f"sr-test-{os.getpid()}-{secrets.token_hex(4)}"
    made.mkdir()
    if class_id:
        (made / "net_cls.classid").write_text(str(class_id))
    return made


@contextlib.contextmanager
def doubted(node: Host, *options: str, before: tuple[str, ...] = ()) -> Iterator[Held]:
    """A lease on a kernel that does not say; afterwards the node and the machine are as before."""
    _top()
    with _alone():
        rules, machine = node.snapshot(), machine_snapshot()
        holder = Held(node.popen([*UNTOLD, *before, sys.executable, HOLDER, *options], stdin=subprocess.PIPE))
        yield holder
        if holder.process.poll() is None:
            holder.let_go()
        eventually(lambda: (node.snapshot(), machine_snapshot()) == (rules, machine), seconds=3)
        assert node.snapshot() == rules
        assert machine_snapshot() == machine


def room_of(run_id: str) -> Path:
    """Where the proof of a run is made."""
    return _top() / f"securerun-{run_id}-proof"


def job_cgroup_of(run_id: str) -> Path:
    """A run's cgroup."""
    return next(_top().rglob(f"securerun-{run_id}"))


def switch_off(cgroup: Path, kind: AttachType) -> None:
    """Take the filters off a cgroup behind the guard's back."""
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = attached(directory, kind).program_ids
        assert found, f"no filter on {cgroup}"
        for identifier in found:
            with Program.open(identifier) as program:
                program.take_off(directory, kind)
    finally:
        os.close(directory)


def switch_all_off(run_id: str) -> None:
    """What the switch does: no filter on a cgroup runs, neither on the job's nor on that beside it."""
    switch_off(job_cgroup_of(run_id), AttachType.CGROUP_INET_INGRESS)
    switch_off(room_of(run_id), AttachType.CGROUP_INET_EGRESS)


def is_proven_again(run_id: str) -> bool:
    """Whether the proof beside a job has got so far that it tells something: its filter stays."""
    first = _filters_of_proof(run_id)
    time.sleep(patient(0.1))
    return first != () and first == _filters_of_proof(run_id)


def _filters_of_proof(run_id: str) -> tuple[int, ...]:
    try:
        directory = os.open(room_of(run_id), os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return ()
    try:
        return attached(directory, AttachType.CGROUP_INET_EGRESS).program_ids
    finally:
        os.close(directory)


def _of_first_cgroup_namespace(pid: int) -> Path | None:
    """The first cgroup namespace, by the nearest process above that is in it."""
    while pid:
        place = Path(f"/proc/{pid}/ns/cgroup")
        with contextlib.suppress(OSError):
            if place.stat().st_ino == _FIRST_CGROUP_NAMESPACE:
                return place
        pid = int(fields_of(pid)[1])
    return None


def _top() -> Path:
    mount = cgroup2_mount()
    if mount is None:
        pytest.skip("no cgroup of version 2 is mounted here, for a test to look into")
    return mount


def _is_removed(place: Path) -> bool:
    with contextlib.suppress(OSError):
        place.rmdir()
    return not place.exists()
