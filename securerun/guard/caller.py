"""Whoever this guard serves: proven by ancestry or by the kernel's word on a socket, never named by the orders.

A process id alone proves nothing, since it is used again. So the process is first held by pidfd; only then is it
asked who it is, and whether it is still where it was found.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from typing import Callable

from securerun.errors import PrivilegeError
from securerun.guard import containers
from securerun.linux import capabilities, local_sockets, namespaces, proc, processes
from securerun.linux.namespaces import Namespace
from securerun.linux.processes import Process

ROOT = 0
SUDO_USER_VARIABLE = "SUDO_UID"  # set by sudo itself, sudo(8)
_SUDO = ("sudo", "sudo-rs", "sudo.ws")  # the last two: Ubuntu 25.10 and newer, which has both


class Caller:
    """The process that the guard serves.

    pid, start: which process (proc(5): start time in clock ticks since boot). user: its user id, real, effective
    and saved. group, groups: the ids of its group and of all of them.
    container: which one it is in (securerun.guard.containers), "" for a process of the host's own.
    is_root: whether it may ask for anything. pidfd: readable once it has ended; None before kernel 5.3, where its start
    time tells. attendants: what descends from it and only waits for the guard: sudo, and what it started.

    Raises PrivilegeError when the process ended before it could be held, or is of two users at once.
    """

    def __init__(self, pid: int, pidfd: int | None = None, *, directly: bool = False) -> None:
        """Hold the process. directly: it started this guard itself, by nobody who has more privilege than it has."""
        self.pid = pid
        self._directly = directly
        self._network: int | None = None
        self.container = ""
        self.pidfd = processes.pidfd(pid) if pidfd is None else pidfd
        self.attendants: tuple[Process, ...] = ()
        try:
            self.start = proc.start_time(pid)
            self._identify()
        except OSError as error:
            raise PrivilegeError(f"process {pid}, which started the guard, has ended") from error

    @property
    def is_direct(self) -> bool:
        """Whether it started this guard itself, of the same securerun and with no more privilege than it has."""
        return self._directly

    @property
    def owner(self) -> tuple[int, bool, str]:
        """Whose a run of this caller's is (securerun.guard.records.Known.owner)."""
        return self.user, self.is_root, self.container

    @property
    def account(self) -> int:
        """A user's own number; of a container one for all user ids in it, which its root takes on as it likes."""
        return containers.account_of(self.container) if self.container else self.user

    def has_ended(self) -> bool:
        """Return whether the process is gone, or is no longer the one that this guard began to serve."""
        if self.pidfd is not None and select.select([self.pidfd], [], [], 0)[0]:
            return True
        try:
            return not proc.is_running(self.pid, self.start)
        except OSError:  # without a descriptor or memory for a moment: then the pidfd alone tells
            return self.pidfd is None

    def waiting(self) -> frozenset[int]:
        """Return the pids of those attendants that live: the launcher started them, and they are no part of its job."""
        return frozenset(process.pid for process in self.attendants if processes.lives(process))

    def is_unchanged(self) -> bool:
        """Return whether the process lives and is of its one user, to be asked before and after it is acted upon."""
        try:
            users = set(proc.status(self.pid).users)
        except OSError:
            return False
        # Its end is looked for last: the users are its own if it had not ended by then.
        return users == {self.user} and not self.has_ended()

    def identify_again(self) -> None:
        """Take note of root having become an ordinary user meanwhile (`--run-as`). There is no other change.

        Raises PrivilegeError for one: who began as an ordinary user must not order as another, by starting a
        set-user-id program in the same process.
        """
        before = self.user
        try:
            self._identify()
        except OSError as error:
            raise PrivilegeError(f"process {self.pid}, which started the guard, has ended") from error
        if self.has_ended():
            raise PrivilegeError(f"process {self.pid}, which started the guard, has ended")
        if before not in (ROOT, self.user):
            raise PrivilegeError(f"process {self.pid} began as user {before} and is user {self.user} now")

    def _network_now(self) -> int:
        try:
            return proc.namespace("net", self.pid)
        except PermissionError:
            if self._network is None or not self._directly:
                raise
            return self._network

    def require_same_container(self) -> None:
        """Raise PrivilegeError for a process that has gone into another container, or out of its own, meanwhile."""
        if self._look_for_container() != self.container:
            raise PrivilegeError(f"process {self.pid} has changed its cgroup or pid namespace; start the job again")

    def find_container(self) -> None:
        """Look which container it is in. Raises PrivilegeError where that cannot be told."""
        self.container = self._look_for_container()

    def enter_network(self) -> bool:
        """Have this guard go on in its container's own network, where the job's ports are; return whether it has one.

        That of an ordinary user's making is not entered, nor is any for a process of the host's own: there the next
        look at the network refuses.
        """
        if not self.container:
            return False
        try:
            with Namespace("net", self.pid) as network:
                if network.is_own() or not containers.may_be_entered(network):
                    return False
                network.enter()
        except OSError as error:
            raise PrivilegeError(f"the network of process {self.pid} cannot be entered: {error.strerror}") from error
        if self.has_ended():
            raise PrivilegeError(f"process {self.pid}, which started the guard, has ended")
        return True

    def _look_for_container(self) -> str:
        try:
            return containers.container_of(self.pid)
        except OSError as error:
            raise PrivilegeError(f"the namespaces of process {self.pid} cannot be seen: {error.strerror}") from error

    def _identify(self) -> None:
        """Look who it is. Raises OSError when there is no such process, and PrivilegeError for one of several users.

        User id 0 alone makes nobody root: a container's, to which the socket is mounted, has it and no capability. What
        comes from sudo or the socket is under the site's limits, whoever it is: root needs neither.
        """
        status = proc.status(self.pid)
        users = set(status.users)
        if len(users) != 1:
            raise PrivilegeError(
                f"process {self.pid} is of several users at once ({', '.join(map(str, sorted(users)))})"
            )
        self.user, self.groups = users.pop(), status.groups
        self.group = int(status.words("Gid")[1])  # the effective one
        may_anything = self.user == ROOT and capabilities.NET_ADMIN in status.bits("CapEff")
        self.is_root = self._directly and may_anything and _is_of_our_user_namespace(self.pid)

    def can_be_looked_into(self) -> bool:
        """Return whether what this process, and others of its user, hold can be seen from here (ptrace(2))."""
        return self.user == os.geteuid() or capabilities.SYS_PTRACE in capabilities.effective()

    def look_at_network(self) -> None:
        """Look which network namespace it is in while that can be seen: before it changes its user (`--run-as`).

        Without CAP_SYS_PTRACE nobody sees that of who is of another user by now. It is believed to be there still: who
        starts a guard with root's rights and goes elsewhere leaves its own job open, and nobody else's.
        """
        with contextlib.suppress(OSError):
            self._network = proc.namespace("net", self.pid)

    def require_same_network(self) -> None:
        """Raise PrivilegeError when the process is in another network namespace: rules made here would miss it."""
        try:
            theirs = self._network_now()
        except OSError as error:
            raise PrivilegeError(f"the network namespace of process {self.pid} cannot be seen: {error}") from error
        if theirs != proc.namespace("net"):
            raise PrivilegeError(
                f"process {self.pid} is in another network namespace than its guard, which cannot close its ports from "
                "there; start the guard in the job's own (as root in the container, or through sudo)"
            )


def find_ancestor() -> Caller:
    """Find whoever started this guard: its parent or, started by sudo, the parent of sudo.

    Raises PrivilegeError when that is not the user that sudo names, or it ended meanwhile.
    """
    user = _sudo_user()
    caller = _held(os.getppid, directly=True) if user is None else _held(_parent_of_sudo, directly=False)
    if user is not None and caller.user != user:
        raise PrivilegeError(
            f"sudo was started by user {user}, and process {caller.pid} above it is user {caller.user}'s"
        )
    return caller


def find_peer(connection: int) -> Caller:
    """Find whoever connected to this socket, as the kernel noted at that moment (unix(7), SO_PEERCRED).

    Raises PrivilegeError when that process has ended, or its id belongs to another user by now; and when the guard
    was started by sudo, whose caller could hand it a socket to which somebody else connected.
    """
    if SUDO_USER_VARIABLE in os.environ:
        raise PrivilegeError("a guard that sudo starts takes no socket; start securerun-guard without arguments")
    try:
        with socket.socket(fileno=os.dup(connection)) as end:
            if end.family != socket.AF_UNIX:
                raise PrivilegeError("the guard's standard input is a socket of a network; only AF_UNIX names its peer")
            pid, user = local_sockets.peer_of(end)
            pidfd = local_sockets.pidfd_of_peer(end)
    except OSError as error:
        raise PrivilegeError(f"the guard's standard input is no socket: {error.strerror}") from error
    if pid <= 0:
        raise PrivilegeError("whoever connected is in another pid namespace and cannot be guarded from here")
    caller = Caller(pid, pidfd)
    if caller.user != user:
        raise PrivilegeError(f"user {user} connected, and process {pid} is of user {caller.user} now")
    require_own_number(caller)
    caller.find_container()
    # What was asked of a number was asked of whoever is held only if they have it still.
    if caller.has_ended():
        raise PrivilegeError(f"process {pid}, which connected, has ended")
    return caller


def require_own_number(caller: Caller) -> None:
    """Raise PrivilegeError for a user id that another user may have taken on: limits count by it.

    Within a user namespace of theirs users may take on all ids that are subordinate to them (subuid(5), 65,536 as a
    rule), each with groups that they had outside. One that root made is a container's, and has the ids that root gave.
    """
    try:
        makers = namespaces.owners_of_user_namespaces(caller.pid) - {ROOT, caller.user}
    except OSError as error:
        raise PrivilegeError(f"the user namespace of process {caller.pid} cannot be seen: {error.strerror}") from error
    if makers:
        raise PrivilegeError(
            f"process {caller.pid} is user {caller.user} in a user namespace of user {min(makers)}, who may have many "
            "such numbers; start the job as that user, outside of it"
        )


def sudo_processes() -> tuple[int, ...]:
    """Return the processes of sudo that wait for this guard, the nearest first; none where sudo did not start it."""
    found: list[int] = []
    pid = os.getppid()
    while _sudo_user() is not None and pid > 0 and _is_sudo(pid):
        found.append(pid)
        pid = _parent(pid)
    return tuple(found)


def _held(find: Callable[[], int], *, directly: bool) -> Caller:
    """Return the process that `find` tells, held before it is asked who it is, and found again afterwards."""
    pid = find()
    caller = Caller(pid, directly=directly)
    if find() != pid or caller.has_ended():
        raise PrivilegeError(f"process {pid}, which started the guard, has ended")
    return caller


def _sudo_user() -> int | None:
    text = os.environ.get(SUDO_USER_VARIABLE)
    if text is None:
        return None
    if not text.isdecimal():
        raise PrivilegeError(f"{SUDO_USER_VARIABLE} is {text[:20]!r}, which is no user id")
    return int(text)


def _parent_of_sudo() -> int:
    """Return the nearest ancestor that is not sudo itself: sudo may stay as one process or two, or not at all."""
    waiting = sudo_processes()
    return _parent(waiting[-1]) if waiting else os.getppid()


def _is_sudo(pid: int) -> bool:
    """Return whether a process runs root's set-user-id program of that name, as root (its effective user id)."""
    try:
        file, name = proc.program(pid)
        effective = proc.status(pid).users[1]
    except OSError:
        return False
    is_roots = file.st_uid == ROOT and file.st_mode & stat.S_ISUID
    return bool(is_roots) and effective == ROOT and name in _SUDO


def _parent(pid: int) -> int:
    return proc.status(pid).parent


def _is_of_our_user_namespace(pid: int) -> bool:
    """Return whether a process' capabilities are such in this process' user namespace; not where nobody may look."""
    try:
        return proc.namespace("user", pid) == proc.namespace("user")
    except OSError:
        return False
