"""Cgroups of their own for tests, and work done by a process inside one."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import select
import signal
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, TypeVar

import namespaces
import pytest
from hosts import NAMESPACES, Host, cgroup2_mount, eventually
from lacking import Lacking
from patience import patient

Result = TypeVar("Result")

CHILD_SECONDS = 20.0
_numbers = itertools.count()


class Cgroup:
    """A directory of the cgroup2 mount, and a descriptor open on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def enter(self) -> None:
        """Move this process here."""
        enter(self.path)

    def remove(self) -> None:
        """Remove the directory as soon as its last process is gone."""
        os.close(self.descriptor)
        assert not self.path.exists() or eventually(self._removed), f"{self.path} is still in use"

    def _removed(self) -> bool:
        try:
            self.path.rmdir()
        except OSError:
            return False
        return True


@contextlib.contextmanager
def new_cgroup(parent: Cgroup | None = None) -> Iterator[Cgroup]:
    mount = cgroup2_mount()
    if os.geteuid() != 0 or mount is None:
        raise Lacking("cgroups need root and a cgroup2 mount")
    above = mount if parent is None else parent.path
    cgroup = Cgroup(above / f"sr-test-{os.getpid()}-{next(_numbers)}")
    try:
        yield cgroup
    finally:
        cgroup.remove()


def enter(directory: Path) -> None:
    membership = os.open(directory / "cgroup.procs", os.O_WRONLY)
    try:
        os.write(membership, b"0")
    finally:
        os.close(membership)


def end_all(directory: Path) -> None:
    """SIGKILL all that is in a cgroup and below it: at once where the kernel can, as batch systems do it."""
    together = directory / "cgroup.kill"
    if together.exists():
        together.write_text("1")
        return
    for listed in directory.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            for pid in listed.read_text().split():
                os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """This thread in the host's network namespace; sockets made meanwhile stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(NAMESPACES / host.namespace, os.O_RDONLY)
    try:
        namespaces.enter(there, namespaces.NETWORK)
        yield
    finally:
        namespaces.enter(home, namespaces.NETWORK)
        os.close(there)
        os.close(home)


def leave_for_a_new_network() -> None:
    """This process alone in a network namespace whose loopback was never up; for a child of its own."""
    namespaces.leave(namespaces.NETWORK)


def in_child(work: Callable[[], Result]) -> Result:
    """What `work` returns in a process of its own, which it may move and cripple as it likes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.write(writing, _outcome(work))
        os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], patient(CHILD_SECONDS))[0], "the child gives no answer"
        with os.fdopen(reading, "rb") as answer:
            result, failure = pickle.loads(answer.read())  # noqa: S301 - our own child wrote it
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert failure is None, failure
    return result  # type: ignore[no-any-return]


def _outcome(work: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((work(), None))
    except BaseException:
        return pickle.dumps((None, traceback.format_exc()))


def socket_made_in(cgroup: Cgroup, make: Callable[[], socket.socket], leave_to: Path | None = None) -> socket.socket:
    """A socket that a process of the cgroup made; the process then left it, if asked to, and has ended."""
    near, far = socket.socketpair()

    def work() -> None:
        cgroup.enter()
        with make() as made:
            if leave_to is not None:
                enter(leave_to)
            socket.send_fds(far, [b"!"], [made.fileno()])

    with near, far:
        in_child(work)
        _, descriptors, _, _ = socket.recv_fds(near, 1, 1)
    return socket.socket(fileno=descriptors[0])


def place_of_version_1(name: str) -> Path:
    """Where a hierarchy of version 1 is mounted, by a controller of it or by `name=...`; skips where it is not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ")[:3]
        if kind == "cgroup" and name in options.split(","):
            return Path(mount.split(" ")[4])
    pytest.skip(f"no cgroups of version 1 for {name} on this machine")


@contextlib.contextmanager
def cgroup_of_version_1(name: str, owner: int) -> Iterator[Path]:
    """A cgroup of an ordinary user's own, as administrators of version 1 make them: the directory and all its files."""
    path = place_of_version_1(name) / f"sr-test-{os.getpid()}-{next(_numbers)}"
    path.mkdir()
    try:
        if name == "cpuset":
            for file in ("cpuset.cpus", "cpuset.mems"):
                (path / file).write_text((path.parent / file).read_text())
        for entry in (path, *path.iterdir()):
            os.chown(entry, owner, owner)
        yield path
    finally:
        assert eventually(lambda: _ended_and_removed(path)), f"{path} is still in use"


def _ended_and_removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        for pid in (path / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        path.rmdir()
        return True
    return False
