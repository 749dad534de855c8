"""A socket at which each who connects gets a guard of their own, as by systemd's socket unit where there is none.

For a node whose jobs are in containers: it runs in one of the node's own, sees all processes (hostPID) and the node's
network. It speaks to nobody but to turn them away; the guards are processes of their own, begun anew.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from securerun.errors import PrivilegeError
from securerun.guard import containers, inherited, log, program, refusals
from securerun.guard.protocol import Refused, encode
from securerun.guard.share import Share
from securerun.linux import local_sockets, proc, sent_along
from securerun.linux.namespaces import Namespace
from securerun.linux.sent_along import Parting

_NAME = "securerun-guard"
_MODE, _DIRECTORY_MODE = 0o666, 0o755
_OTHERS_WRITE = 0o022
_WAITING = 4096
# A guard takes some 20 MB, and as long as its job. How many may be of one account is for the site's policy to say, and
# how many of them wait for the guards themselves; this is above both.
MOST_GUARDS = 512
MOST_OF_ONE = 256
# The start of a guard takes 60 ms of a processor: so many at once, and then so many a second.
_AT_ONCE, _A_SECOND = 16, 2.0
_MOST_KNOWN = 4096
_LOOK_MILLISECONDS = 1000
_SAID_SECONDS = 60.0
# Connections that are to be closed by a child, some at a time; without a child they are open until there can be one.
_UNREAD_AT_ONCE = 64
_MOST_UNREAD = 1024
_PAUSE_SECONDS = 0.25


class Guards:
    """The guards that were begun and have not ended, by account."""

    def __init__(self) -> None:
        self._accounts: dict[int, int] = {}
        self._shares: dict[int, Share] = {}

    def obstacle(self, account: int) -> str:
        """Return why an account may have no guard begun now; "" where it may, and then one is taken of its share."""
        if len(self._accounts) >= MOST_GUARDS:
            return f"this node has {MOST_GUARDS} guards, and no more may be"
        if Counter(self._accounts.values())[account] >= MOST_OF_ONE:
            return f"there are {MOST_OF_ONE} guards for this container or user, and no more may be"
        if len(self._shares) >= _MOST_KNOWN:
            self._shares = {known: share for known, share in self._shares.items() if not share.is_whole}
        if len(self._shares) >= _MOST_KNOWN:
            return "too many ask for guards"
        if not self._shares.setdefault(account, Share(_AT_ONCE, _A_SECOND)).take():
            return "too many guards were asked for from this container or by this user"
        return ""

    def begin(self, connection: socket.socket, account: int) -> None:
        """Begin a guard for whoever is at the other end. Raises OSError."""
        command = program.command(program.SOCKET_ARGUMENT)
        ends = [(os.POSIX_SPAWN_DUP2, connection.fileno(), descriptor) for descriptor in (0, 1)]
        pid = os.posix_spawn(
            sys.executable, command, {}, file_actions=ends, setsigmask=(), setsigdef=signal.valid_signals()
        )
        self._accounts[pid] = account

    def reap(self) -> None:
        """Take note of those that have ended."""
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._accounts.pop(pid, None)


def main(arguments: Sequence[str]) -> int:
    """Listen at the path that is the only argument, until SIGTERM. Return the exit status."""
    place = Path(arguments[0])
    inherited.open_missing_streams()
    inherited.lift_limits()
    try:
        inherited.require_unlimited()
        _go_where_the_node_is()
        # Whoever sees the socket may tell it to end.
        ended = _hear_of_the_end()
        listener = _listen(place)
    except PrivilegeError as error:
        program.say(str(error))
        return error.status
    log.note(_NAME, f"listening at {place}")
    try:
        _serve(listener, ended)
    finally:
        _remove(place, listener)
    return 0


def _hear_of_the_end() -> int:
    """Return what can be read from when this is told to end."""
    # What started this may ignore the end of its children, and then none is told of; or keep SIGTERM from them.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGTERM, lambda *_: os.write(wake, b"."))
    signal.signal(signal.SIGINT, lambda *_: os.write(wake, b"."))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return ended


def _serve(listener: socket.socket, ended: int) -> None:
    guards, parting, said = Guards(), Parting(), 0.0
    poller = select.poll()
    for descriptor in (listener.fileno(), ended):
        poller.register(descriptor, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poller.poll(_LOOK_MILLISECONDS)}
        guards.reap()
        if ended in ready:
            return
        if len(parting) >= _UNREAD_AT_ONCE or not ready:
            parting.close()
        if listener.fileno() not in ready:
            continue
        if len(parting) >= _MOST_UNREAD:
            time.sleep(_PAUSE_SECONDS)
            continue
        obstacle = _serve_next(guards, listener, parting)
        if obstacle and time.monotonic() - said > _SAID_SECONDS:
            said = time.monotonic()
            log.note(_NAME, f"turned away at the door: {obstacle}")


def _serve_next(guards: Guards, listener: socket.socket, parting: Parting) -> str:
    """Have a guard for who connected first; return why there is none, "" where there is."""
    has_guard = False
    try:
        connection = listener.accept()[0]
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    try:
        if _has_hung_up(connection):
            return ""
        obstacle = _begin(guards, connection)
        has_guard = not obstacle
        return obstacle
    except Exception as error:  # one who connects must not end it for all others
        return f"{type(error).__name__}: {error}"
    finally:
        parting.take(connection, is_anothers=has_guard)


def _begin(guards: Guards, connection: socket.socket) -> str:
    """Have a guard for a connection, or say why not; return that."""
    account = _account(connection)
    obstacle = guards.obstacle(account)
    if not obstacle:
        try:
            guards.begin(connection, account)
        except OSError as error:
            obstacle = f"no guard can be started ({error.strerror})"
    if obstacle:
        refused = Refused(PrivilegeError.status, f"{obstacle}; wait until others have ended", later=True)
        with contextlib.suppress(OSError):
            connection.send(encode(refused), socket.MSG_DONTWAIT)
    return obstacle


def _has_hung_up(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLRDHUP)
    return bool(poller.poll(0))


def _account(connection: socket.socket) -> int:
    """Return whose share a connection is of. To be wrong harms nobody else: the guard asks who it is by itself."""
    pid, user = local_sockets.peer_of(connection)
    try:
        container = containers.container_of(pid)
    except (OSError, PrivilegeError):  # a container's root has as many user ids as it likes
        return refusals.SOMEBODY
    return containers.account_of(container) if container else user


def _go_where_the_node_is() -> None:
    """See cgroups by the names that the node has for them. Raises PrivilegeError."""
    if os.geteuid() != 0:
        raise PrivilegeError("only root can guard the jobs of a node; run this as root")
    if not proc.is_of_this_pid_namespace():
        raise PrivilegeError("the proc file system here is of another pid namespace; mount one of its own")
    try:
        with Namespace("cgroup", proc.INIT) as node:
            if not node.is_own():
                node.enter()
    except OSError as error:
        log.note(
            _NAME, f"only cgroups below the guard's own root are served, since init's cannot be seen: {error.strerror}"
        )


def _listen(place: Path) -> socket.socket:
    """Listen, in the place of one that has ended; raise PrivilegeError where another listens, or could be put there.

    Under another name first: whoever has the directory mounted finds the old socket or the new one.
    """
    if not place.is_absolute():
        raise PrivilegeError(
            f"{place} is no absolute path; write {program.LISTEN_ARGUMENT} /run/securerun.d/guard.sock"
        )
    try:
        with contextlib.suppress(FileExistsError):
            place.parent.mkdir(mode=_DIRECTORY_MODE)
        directory = place.parent.lstat()
        if not stat.S_ISDIR(directory.st_mode) or directory.st_uid != 0 or directory.st_mode & _OTHERS_WRITE:
            raise PrivilegeError(f"{place.parent} is no directory that root alone can change; remove it")
        if _is_served(place):
            raise PrivilegeError(f"another guard listens at {place}; end that first")
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        listener.bind(str(temporary))
        temporary.chmod(_MODE)
        listener.listen(_WAITING)
        temporary.rename(place)
    except OSError as error:
        raise PrivilegeError(f"nobody can listen at {place}: {error.strerror or error}") from error
    return listener


def _is_served(place: Path) -> bool:
    with sent_along.deaf() as end:
        try:
            end.connect(str(place))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def _remove(place: Path, listener: socket.socket) -> None:
    """Remove the socket unless another has taken its place. What a socket is bound to is told by its name alone.

    Closed it is by the end of this process, with those in it that nobody has served.
    """
    listener.shutdown(socket.SHUT_RD)  # nobody can connect any more
    if not _is_served(place):
        with contextlib.suppress(OSError):
            place.unlink()
