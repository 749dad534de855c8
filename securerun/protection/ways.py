"""The ways from a launcher to a guard with privilege: its own privilege, sudo, or systemd's socket. One protocol."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import struct
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from securerun.errors import UsageError
from securerun.guard import program
from securerun.guard.documents import MAXIMUM_RECORD_BYTES
from securerun.guard.protocol import RUN_ID_VARIABLE, Message, decode, encode
from securerun.lines import LineBuffer
from securerun.linux import capabilities, local_sockets, prctl, proc, sent_along
from securerun.options import SITE_CONFIG, of_site
from securerun.text import printable

if TYPE_CHECKING:
    import subprocess

DIRECTLY, BY_SUDO, BY_SYSTEMD = "directly", "by sudo", "by systemd"
SOCKET = program.SOCKET
# Where guards of the release before are found, and launchers of that look for them.
SOCKET_BEFORE = Path("/run/securerun.sock")
SOCKET_VARIABLE = "SECURERUN_SOCKET"
_PROGRAM = "securerun-guard"
_SYSTEMD = "systemd"
_SYSTEM_DIRECTORIES = tuple(map(Path, ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")))
# sudo's messages are looked at, so they are to be in one language; nothing else is for it.
_SUDO_ENVIRONMENT = {"PATH": ":".join(map(str, _SYSTEM_DIRECTORIES)), "LC_ALL": "C"}
# SUDO_UID of the shell that this root came from would mean another way; and by the id of its run a guard that replaces
# another, with all that it starts, would count among the job's processes, and wait for its own end.
_NOT_FOR_GUARDS = {"SUDO_UID", RUN_ID_VARIABLE}
_ROOT = 0
_OTHERS_WRITE = 0o022
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What is so in a user namespace, and the way that works there: what descends from a launcher outside is guarded.
OF_NAMESPACE = "in this user namespace root is not root of the host"
ROOT_OF_CONTAINER = "this process is root without CAP_NET_ADMIN, as in a container"
OUTSIDE = "securerunctl exec -- unshare -Ur torchrun …"
_LAST_WORDS_SECONDS = 1.0
# For sudo to say whether it would run something; it may have to ask a directory service.
_SUDO_SECONDS = 10.0
_LAST_STANDARD = 2
_CONNECT_SECONDS = 10
_TIME = struct.Struct("@ll")  # struct timeval


class Connection:
    """A guard at the other end: orders go to one descriptor, answers come from another.

    process: the child that is, or leads to, the guard; None where somebody who listens starts it. words: its standard
    error. by: how it is started, in words, where more is known of that than the way's name.
    Raises nothing by itself: a guard that cannot be had does not answer, and `last_words` tells why.
    """

    def __init__(
        self, orders: int, answers: int, process: subprocess.Popen[bytes] | None, words: int | None, by: str = ""
    ) -> None:
        self.by = by
        self._orders = orders
        self._answers = answers
        self._process = process
        self._words = words
        self._pending = LineBuffer()

    def send(self, message: Message) -> bool:
        """Write a message; False when nobody is there to read it."""
        data = memoryview(encode(message))
        try:
            while data:
                data = data[os.write(self._orders, data) :]
        except OSError:
            return False
        return True

    def receive(self, seconds: float | None) -> Message | None:
        """Return the guard's next message; None when it has ended, or says nothing within the time.

        Raises ProtocolError for what this version of securerun does not understand.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while (line := self._pending.take()) is None:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not _can_be_read(self._answers, remaining):
                return None
            try:
                chunk = os.read(self._answers, 65536)
            except ConnectionError:
                return None
            if not chunk or len(self._pending) > MAXIMUM_RECORD_BYTES:
                return None
            self._pending.add(chunk)
        return decode(line, of_guard=True)

    def has_answer(self) -> bool:
        """Return whether there is something to receive, or nobody any more from whom to."""
        return self._pending.has_line() or _can_be_read(self._answers, 0)

    def reap(self) -> None:
        """Take note that the first process has made way for the guard itself, which is no child of ours (server.py)."""
        if self._process is not None:
            import subprocess

            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_WORDS_SECONDS)

    def last_words(self) -> str:
        """Why there is no answer: the last line of standard error, or the exit status."""
        if self._process is None or self._words is None:
            return "it closed the connection"
        import subprocess

        try:
            status = self._process.wait(_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        said = os.read(self._words, 65536) if _can_be_read(self._words, 0) else b""
        lines = said.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {status}"

    def close(self) -> None:
        """Close this end; a guard that holds a lease takes the end of its input for the launcher's."""
        for descriptor in {self._orders, self._answers, self._words} - {None}:
            with contextlib.suppress(OSError):
                os.close(descriptor)  # type: ignore[arg-type]
        if self._process is not None:
            self._process.poll()  # a child that has ended is not to stay as a zombie


@dataclass(frozen=True)
class Way:
    """One way. name: how the guard is started, in words. obstacle: why it cannot even be tried, "" if it can."""

    name: str
    obstacle: str
    open: Callable[[], Connection]


def ways(*, brings_key: bool = False) -> tuple[Way, ...]:
    """Return the three ways, in the order in which they are tried. Looks, and starts nothing.

    brings_key: whether the order is likely to have a key, so that a guard loads what that takes before it comes; sudo
    passes no word of that on.
    """
    return (
        Way(DIRECTLY, _obstacle_to_direct(), partial(_open_directly, brings_key=brings_key)),
        Way(BY_SUDO, _obstacle_to_sudo(), _open_by_sudo),
        *by_socket_alone(brings_key=brings_key),
    )


def by_socket_alone(*, brings_key: bool = False) -> tuple[Way, ...]:
    """Return the way to a guard of the host's from a container, whatever this process may be in there."""
    return (Way(BY_SYSTEMD, _obstacle_to_socket(), partial(_open_socket, brings_key=brings_key)),)


def guard_programs() -> tuple[Path, ...]:
    """Return the programs that sudo may be asked for: this installation's if it belongs to root, then the system's.

    Whether the caller may run one is for sudo to say.
    """
    found: dict[Path, Path] = {}
    for place in (Path(sys.executable).parent, *_SYSTEM_DIRECTORIES):
        if _is_of_root(place / _PROGRAM):
            found.setdefault(place.resolve(), place / _PROGRAM)  # /sbin mostly is /usr/sbin
    return tuple(found.values())


def _permitted_program() -> Path:
    """Return the first of them that sudo lets this user run, where there is a choice.

    An administrator may permit the one of a package while root has another beside the Python that users share.
    """
    first, *others = guard_programs()
    if not others:
        return first
    return next((program for program in (first, *others) if _is_permitted(program)), first)


def _is_permitted(program: Path) -> bool:
    import subprocess

    try:
        done = subprocess.run(  # noqa: S603 - absolute paths, and an environment of our own
            [str(sudo_program()), "-n", "-l", "--", str(program)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_SUDO_ENVIRONMENT,
            timeout=_SUDO_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def sudo_program() -> Path | None:
    """sudo, where distributions put it; PATH has no say in it."""
    return next((place / "sudo" for place in _SYSTEM_DIRECTORIES if _is_of_root(place / "sudo")), None)


def _is_of_root(path: Path) -> bool:
    try:
        return path.stat().st_uid == 0
    except OSError:
        return False


def advice() -> list[str]:
    """Return what gives a guard, where there is none: each takes another person."""
    if not proc.governs_network():
        return [
            f"  start the job from outside of this user namespace: {OUTSIDE} (or apptainer, or enroot)",
            f"  or bring the host's guard in: {_how_to_bring_in()} (securerunctl setup systemd, on the host)",
        ]
    if _obstacle_to_direct() == ROOT_OF_CONTAINER:
        return [
            f"  bring the host's guard in: {_how_to_bring_in()} (securerunctl setup systemd, on the host)",
            "  or give the container CAP_NET_ADMIN and, for the shield, CAP_SYS_ADMIN and the host's cgroups",
            "  or start it open to everyone: --unprotected",
        ]
    return [
        "  start it as root with --run-as USER, or with CAP_NET_ADMIN and CAP_BPF",
        *([] if barred_to_sudo() else ["  an administrator permits the guard by sudo: securerunctl setup sudoers"]),
        f"  an administrator has systemd start it: securerunctl setup systemd{_which_is_not_looked_for()}",
    ]


def _how_to_bring_in() -> str:
    named, place = named_place()
    if not named:
        return f"mount {SOCKET.parent} here"
    return f"mount the directory of its socket so that {named} finds it at {_socket_in(place)}"


def _which_is_not_looked_for() -> str:
    named, place = named_place()
    return f", and have {named} name {SOCKET} instead of {place}" if named and place != SOCKET else ""


def barred_to_sudo() -> str:
    """Return why the sudo that is here can give no privilege, whatever it permits; "" where nothing bars it."""
    if not proc.governs_network() or (sudo_program() is None and not proc.is_in_first_user_namespace()):
        return "sudo gives no privilege over the host in a user namespace"
    if not prctl.may_gain_privileges():
        return (
            "sudo cannot give privilege here, since no_new_privs is set (Kubernetes: allowPrivilegeEscalation; docker: "
            "no-new-privileges; systemd: NoNewPrivileges)"
        )
    sudo = sudo_program()
    if sudo is not None and _is_nosuid(sudo):
        return f"sudo cannot give privilege here, since {sudo.parent} is mounted nosuid"
    return ""


def _is_nosuid(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOSUID)
    except OSError:
        return False


def _can_be_read(descriptor: int, seconds: float | None) -> bool:
    """Return whether there is something to read, or an end; waits for it. select(2) knows no descriptor beyond 1023."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def _obstacle_to_direct() -> str:
    # Where the network is an outer namespace's, capabilities of this one, root's too, count for nothing.
    if not proc.governs_network():
        return OF_NAMESPACE
    held = capabilities.effective()
    if os.geteuid() == _ROOT:
        # Either has port chains or, on new kernels, the shield.
        return "" if {capabilities.NET_ADMIN, capabilities.SYS_ADMIN} & held else ROOT_OF_CONTAINER
    if capabilities.suffice_for_guarding(held):
        return ""
    return "this process is not root and has no CAP_NET_ADMIN and CAP_BPF"


def _obstacle_to_sudo() -> str:
    barred = barred_to_sudo()
    if barred:
        return barred
    if sudo_program() is None:
        return "sudo is not installed"
    if not guard_programs():
        return f"no {_PROGRAM} of root's beside {sys.executable} or in {_SYSTEM_DIRECTORIES[0]}"
    if _obstacle_to_direct() == ROOT_OF_CONTAINER:
        return "sudo gives root no more than it has"
    return ""


def socket_place() -> Path:
    """Return where to look for a guard's socket: where the environment says, or the site file, else in the usual place.

    Raises UsageError for a site file that cannot be read.
    """
    named = os.environ.get(SOCKET_VARIABLE, "").strip() or of_site("socket")
    if named:
        return Path(named)
    return SOCKET_BEFORE if not _why_no_socket(SOCKET_BEFORE) and _why_no_socket(SOCKET) else SOCKET


def named_place() -> tuple[str, Path]:
    """Return what names another place than the usual one, and that place; "" where nothing does."""
    if os.environ.get(SOCKET_VARIABLE, "").strip():
        return SOCKET_VARIABLE, socket_place()
    with contextlib.suppress(UsageError):
        if of_site("socket"):
            return f"socket in {SITE_CONFIG}", socket_place()
    return "", SOCKET


def _obstacle_to_socket() -> str:
    try:
        place = socket_place()
    except UsageError as error:  # whoever reads the options says it
        return str(error)
    why = _why_no_socket(place)
    named = named_place()[0] if why else ""
    return f"{why}; {named} names it, and is to name a guard's socket{_such_as(place)}" if named else why


def _such_as(place: Path) -> str:
    meant = _socket_in(place)
    return "" if meant == place else f", such as {meant}"


def _why_no_socket(place: Path) -> str:
    """Return what is at a place instead of a socket; "" where one is. Somebody else named it, so it may be anything."""
    try:
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no {place}"
    except (OSError, ValueError) as error:
        return f"{place} cannot be looked at: {getattr(error, 'strerror', None) or error}"
    return "" if stat.S_ISSOCK(mode) else f"{place} is {_KINDS.get(stat.S_IFMT(mode), 'something else')} and no socket"


def _socket_in(place: Path) -> Path:
    """Return the socket that is meant where its directory is named."""
    with contextlib.suppress(OSError, ValueError):
        if place.is_dir():
            return place / SOCKET.name
    return place


def _open_directly(*, brings_key: bool = False) -> Connection:
    arguments = (program.KEY_ARGUMENT,) if brings_key else ()
    with capabilities.handed_on(capabilities.FOR_GUARDING.values()):
        return _start(
            program.command(*arguments),
            {name: text for name, text in os.environ.items() if name not in _NOT_FOR_GUARDS},
        )


def _open_by_sudo() -> Connection:
    return _start([str(sudo_program()), "-n", "--", str(_permitted_program())], _SUDO_ENVIRONMENT)


def _start(command: list[str], environment: dict[str, str]) -> Connection:
    import subprocess  # who connects to a socket starts nothing

    orders_read, orders = os.pipe()
    answers, answers_write = os.pipe()
    # Not the launcher's standard error: a guard that held it would keep `2>&1 | tee` waiting.
    words, words_write = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: S603 - an absolute path, and an environment of our own
            command,
            stdin=orders_read,
            stdout=answers_write,
            stderr=words_write,
            env=environment,
            start_new_session=True,
        )
    finally:
        for theirs in (orders_read, answers_write, words_write):
            os.close(theirs)
    return Connection(beside_standard(orders), beside_standard(answers), process, beside_standard(words))


def beside_standard(descriptor: int) -> int:
    """Return the same, but not as a standard stream.

    Started with one closed, this process would hand it to every worker.
    """
    if descriptor > _LAST_STANDARD:
        return descriptor
    moved: int = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LAST_STANDARD + 1)
    os.close(descriptor)
    return moved


def _open_socket(*, brings_key: bool = False) -> Connection:
    """Connect to the socket. Raises OSError when nobody, or nobody of root's, listens there."""
    place = socket_place()
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(OSError):
            end.bind(program.launcher_address(brings_key=brings_key))
        _connect(end, place)
        _, user = local_sockets.peer_of(end)
        if user != _ROOT and not (user == proc.overflow_user() and _only_root_put_it_there(place)):
            raise PermissionError(f"{place} is served by user {user}, not by root")
        by = _by_whom(end, place)
    except BaseException:
        parting = sent_along.Parting()
        parting.take(end)
        parting.close()
        raise
    descriptor = beside_standard(end.detach())
    return Connection(descriptor, descriptor, None, None, by)


def _by_whom(end: socket.socket, place: Path) -> str:
    """Return who starts guards there, in words: systemd where it is proven to be what listens, else the socket alone.

    The kernel noted who called listen(2); a process of another pid namespace has no number here.
    """
    pid, _ = local_sockets.peer_of(end)
    with contextlib.suppress(OSError):
        if pid == proc.INIT and proc.name(pid).strip() == _SYSTEMD:
            return BY_SYSTEMD
    return f"by the socket {printable(str(place))}"


def _connect(end: socket.socket, place: Path) -> None:
    """Connect to the socket at a place. Raises OSError, which names the place and says what to do."""
    # While as many wait there as may, one more is to wait as well, for as long as anybody likes (unix_wait_for_peer).
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(_CONNECT_SECONDS, 0))
    try:
        end.connect(str(place))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(0, 0))
    except BlockingIOError as error:
        words = (
            f"too many wait at {place} to be served: for {_CONNECT_SECONDS} s there was no place for one more; look "
            "at what listens there, on the host (systemctl status securerun.socket), and try again"
        )
        raise OSError(error.errno, words) from error
    except ConnectionRefusedError as error:
        words = (
            f"nobody listens at {place} any more; have the host's guard listen again (systemctl restart "
            f"securerun.socket, on the host), and in a container mount {place.parent}, not the socket alone"
        )
        raise OSError(error.errno, words) from error
    except PermissionError as error:
        words = f"this user may not connect to {place}; an administrator permits it: securerunctl setup systemd --group"
        raise OSError(error.errno, words) from error
    except OSError as error:
        raise OSError(error.errno or 0, f"{place} cannot be connected to: {error.strerror or error}") from error


def _only_root_put_it_there(socket_at: Path | None = None) -> bool:
    """Return whether the socket is one that only root, or who made this user namespace, can have put there.

    The host's root has no number in most user namespaces, and so cannot be told from others without one. But of those
    nobody could have made the socket in a directory that is not theirs to write to.
    """
    if proc.is_in_first_user_namespace():
        return False
    try:
        at = SOCKET if socket_at is None else socket_at
        place, served = at.parent.stat(), at.lstat()
    except OSError:
        return False
    nobody_elses = {_ROOT, proc.overflow_user(), os.geteuid()}
    if not {place.st_uid, served.st_uid} <= nobody_elses or place.st_mode & _OTHERS_WRITE:
        return False
    # Where somebody in here has the very number, theirs looks as root's does. In what is mounted read-only is none.
    has_number = proc.outer_user(proc.overflow_user()) is not None
    return not has_number or bool(os.statvfs(at.parent).f_flag & os.ST_RDONLY)
