"""The ways to a guard, one by one: what stands in the way of each, and guards that do not answer as they should."""

from __future__ import annotations

import codecs
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cgroups import in_child
from sandbox import NOBODY

from securerun.errors import PrivilegeError
from securerun.guard.documents import ProtocolError
from securerun.guard.protocol import Ready, Release, encode
from securerun.linux import capabilities, libc, proc
from securerun.protection import ways
from securerun.protection.client import Guard
from securerun.protection.ways import Connection

SHORT_SECONDS = 0.05


def guard_that(script: str) -> Connection:
    """A process in the place of a guard: what it does is a line of Python."""
    return ways._start([sys.executable, "-I", "-S", "-c", f"import os, sys, time\n{script}"], {})


@pytest.fixture
def pipes() -> Iterator[tuple[Connection, int]]:
    """A connection, and the end that a guard would write to; nobody reads its orders."""
    orders_read, orders = os.pipe()
    answers, answers_write = os.pipe()
    os.close(orders_read)
    connection = Connection(orders, answers, None, None)
    yield connection, answers_write
    connection.close()
    os.close(answers_write)


def test_a_guard_that_is_gone_takes_no_order(pipes: tuple[Connection, int]) -> None:
    connection, _ = pipes
    assert connection.send(Release(failed=False)) is False


def test_a_guard_that_says_nothing_is_waited_for_no_longer_than_asked(pipes: tuple[Connection, int]) -> None:
    connection, far = pipes
    assert connection.receive(SHORT_SECONDS) is None
    os.write(far, encode(Ready(7))[:-3])
    assert connection.receive(SHORT_SECONDS) is None
    os.write(far, encode(Ready(7))[-3:])
    assert connection.receive(SHORT_SECONDS) == Ready(7)


def test_an_answer_without_an_end_is_none(pipes: tuple[Connection, int], monkeypatch: pytest.MonkeyPatch) -> None:
    connection, far = pipes
    monkeypatch.setattr(ways, "MAXIMUM_RECORD_BYTES", 100)
    os.write(far, b"x" * 200)
    assert connection.receive(SHORT_SECONDS) is None


def test_what_another_version_says_is_not_guessed_at(pipes: tuple[Connection, int]) -> None:
    connection, far = pipes
    os.write(far, b'{"securerun": 99, "hello": true}\n')
    with pytest.raises(ProtocolError):
        connection.receive(SHORT_SECONDS)


def test_a_connection_that_is_reset_is_an_end() -> None:
    near, far = socket.socketpair()
    descriptor = near.detach()
    connection = Connection(descriptor, descriptor, None, None)
    assert connection.send(Release(failed=False))
    far.close()  # with an order unread: the other end gets ECONNRESET (unix(7))
    assert connection.receive(SHORT_SECONDS) is None
    assert connection.last_words() == "it closed the connection"
    connection.close()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('first\\nno permission for this', file=sys.stderr)", "no permission for this"),
        ("sys.exit(7)", "it ended with status 7"),
    ],
)
def test_what_a_guard_ended_with_is_told(script: str, words: str) -> None:
    connection = guard_that(script)
    assert connection.receive(None) is None
    assert connection.last_words() == words
    connection.close()


def test_a_guard_that_hangs_is_told_from_one_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_LAST_WORDS_SECONDS", SHORT_SECONDS)
    connection = guard_that("sys.stdin.read()")
    connection.reap()
    assert connection.last_words() == "it does not answer"
    connection.close()
    assert connection._process is not None
    assert connection._process.wait(timeout=20) == 0


def test_no_end_of_a_connection_is_a_standard_stream_of_the_job() -> None:
    """A launcher that was started with one closed would hand the guard's pipes on to every worker."""

    def work() -> list[int]:
        for standard in (0, 1, 2):
            os.close(standard)
        connection = guard_that("sys.stdin.read()")
        ends = [connection._orders, connection._answers, connection._words]
        connection.close()
        return [end for end in ends if end is not None]

    assert min(in_child(work)) > 2


# Obstacles


@pytest.mark.usefixtures("root")
def test_without_sudo_or_a_guard_of_roots_that_way_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_SYSTEM_DIRECTORIES", (tmp_path,))
    assert ways.sudo_program() is None
    assert ways._obstacle_to_sudo() == "sudo is not installed"
    (tmp_path / "sudo").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert ways.guard_programs() == ()
    assert "securerun-guard of root's" in ways._obstacle_to_sudo()
    guard = tmp_path / "securerun-guard"
    guard.touch()
    os.chown(guard, NOBODY, -1)
    assert ways.guard_programs() == ()
    os.chown(guard, 0, -1)
    assert ways._obstacle_to_sudo() == ""


def become_nobody_with(held: set[int]) -> None:
    """In a child. The tester's Python may lie where nobody can look, so what is read from it is read before."""
    codecs.lookup("ascii")
    assert libc.library.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    os.setresuid(NOBODY, NOBODY, NOBODY)
    capabilities._set(effective=held, inheritable=(), permitted=held)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("held", "way_is_open"),
    [
        ({capabilities.NET_ADMIN, capabilities.BPF}, True),
        ({capabilities.NET_ADMIN, capabilities.SYS_ADMIN}, True),
        ({capabilities.NET_ADMIN}, False),
        ({capabilities.BPF}, False),
    ],
)
def test_the_direct_way_takes_both_capabilities(held: set[int], way_is_open: bool) -> None:
    def work() -> str:
        become_nobody_with(held)
        return ways._obstacle_to_direct()

    assert (in_child(work) == "") is way_is_open


@pytest.mark.usefixtures("root")
def test_what_a_user_lends_to_its_guard_it_has_afterwards_as_before() -> None:
    """Programs that are started in between have it, as ambient capabilities (capabilities(7)); later ones do not."""
    lent = {capabilities.NET_ADMIN, capabilities.BPF}

    def sets() -> dict[str, str]:
        lines = subprocess.run(["/bin/grep", "^Cap", "/proc/self/status"], capture_output=True, text=True, check=True)
        return dict(line.split() for line in lines.stdout.splitlines())

    def work() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        become_nobody_with(lent)
        before = sets()
        with capabilities.handed_on({*lent, capabilities.SYS_ADMIN}):
            meanwhile = sets()
        return before, meanwhile, sets()

    before, meanwhile, afterwards = in_child(work)
    number = sum(1 << capability for capability in lent)
    assert int(meanwhile["CapEff:"], 16) == number
    assert int(before["CapEff:"], 16) == int(afterwards["CapEff:"], 16) == 0


# systemd's socket


def serve(path: Path, user: int) -> int:
    """A process of a user's that listens there; its pid."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        os.setresuid(user, user, user)
        listener.listen()
        os.write(told, b"!")
        listener.accept()[0].recv(1)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return child


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("user", [0, NOBODY])
def test_a_socket_that_is_not_served_by_root_is_no_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    place = tmp_path / "securerun.sock"
    monkeypatch.setattr(ways, "SOCKET", place)
    assert ways._obstacle_to_socket() == f"there is no {place}"
    server = serve(place, user)
    try:
        assert ways._obstacle_to_socket() == ""
        if user == 0:
            connection = ways._open_socket()
            assert connection.last_words() == "it closed the connection"
            connection.close()
        else:
            with pytest.raises(PermissionError, match=f"is served by user {user}, not by root"):
                ways._open_socket()
    finally:
        os.kill(server, 9)
        os.waitpid(server, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "there is no {place}"),
        (Path.mkdir, "{place} is a directory and no socket"),
        (Path.touch, "{place} is a file and no socket"),
        (os.mkfifo, "{place} is a pipe and no socket"),
        (lambda place: place.symlink_to("/dev/null"), "{place} is a device and no socket"),
        (lambda place: place.symlink_to("nowhere"), "there is no {place}"),
        (lambda place: place.symlink_to(place), "{place} cannot be looked at: Too many levels of symbolic links"),
    ],
    ids=["nothing", "directory", "file", "pipe", "device", "dangling", "loop"],
)
def test_what_is_named_in_place_of_a_socket_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], words: str
) -> None:
    place = tmp_path / "o"
    make(place)
    monkeypatch.setenv("SECURERUN_SOCKET", str(place))
    told = f"{words.format(place=place)}; SECURERUN_SOCKET names it, and is to name a guard's socket"
    meant = f", such as {place}/guard.sock" if place.is_dir() else ""
    assert ways._obstacle_to_socket() == told + meant
    monkeypatch.delenv("SECURERUN_SOCKET")
    monkeypatch.setattr(ways, "SOCKET", place)
    monkeypatch.setattr(ways, "of_site", lambda key: {"socket": ""}[key])
    assert ways._obstacle_to_socket() == words.format(place=place)


@pytest.mark.parametrize("name", ["x" * 300, "nothing\0at all"])
def test_name_that_nothing_can_have_is_no_way_to_a_guard(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("SECURERUN_SOCKET", raising=False)
    monkeypatch.setattr(ways, "of_site", lambda key: {"socket": f"/run/{name}"}[key])
    said = ways._obstacle_to_socket()
    assert "cannot be looked at" in said and "socket in /etc/securerun/config.toml names it" in said


@pytest.mark.usefixtures("root")
def test_socket_in_a_directory_that_may_not_be_entered_is_said(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)

    def work() -> str:
        become_nobody_with(set())
        os.environ["SECURERUN_SOCKET"] = f"{closed}/guard.sock"
        return ways._obstacle_to_socket()

    for directory in (tmp_path, *list(tmp_path.parents)[:2]):
        directory.chmod(0o755)
    assert f"{closed}/guard.sock cannot be looked at: Permission denied" in in_child(work)


def test_socket_without_a_listener_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "guard.sock"
    monkeypatch.setenv("SECURERUN_SOCKET", str(place))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(place))
    with pytest.raises(ConnectionRefusedError) as refused:
        ways._open_socket()
    said = refused.value.strerror or ""
    assert f"nobody listens at {place} any more" in said and "systemctl restart securerun.socket" in said
    place.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(place))
        with pytest.raises(OSError, match=f"{place} cannot be connected to: Protocol wrong type"):
            ways._open_socket()
    monkeypatch.setenv("SECURERUN_SOCKET", f"/{'x' * 120}")
    with pytest.raises(OSError, match="x cannot be connected to: AF_UNIX path too long"):
        ways._open_socket()


def test_socket_at_which_too_many_wait_is_waited_for_some_seconds_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever listens there may be stopped, or keep up with nobody: a launch waited without a word, and without end."""
    place = tmp_path / "guard.sock"
    monkeypatch.setenv("SECURERUN_SOCKET", str(place))
    monkeypatch.setattr(ways, "_CONNECT_SECONDS", 1)
    with ExitStack() as ends:
        listener = ends.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(place))
        listener.listen(0)
        first = ends.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(place))
        began = time.monotonic()
        with pytest.raises(OSError, match=f"too many wait at {place} to be served: for 1 s"):
            ways._open_socket()
        assert 0.9 < time.monotonic() - began < 5
        (way,) = ways.by_socket_alone()
        with pytest.raises(PrivilegeError, match=r"too many wait at .* \(systemctl status securerun.socket\)"):
            Guard(by=lambda: (way,)).report()


@pytest.mark.usefixtures("root")
def test_connection_that_was_waited_for_waits_for_its_answers_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "guard.sock"
    monkeypatch.setenv("SECURERUN_SOCKET", str(place))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        connection = ways._open_socket()
        with socket.socket(fileno=connection._orders) as end:
            limit = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, ways._TIME.size)
            assert ways._TIME.unpack(limit) == (0, 0)


def test_advice_is_for_the_place_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_obstacle_to_direct", lambda: ways.ROOT_OF_CONTAINER)
    monkeypatch.setattr(ways, "of_site", lambda key: {"socket": ""}[key])
    monkeypatch.delenv("SECURERUN_SOCKET", raising=False)
    assert any(f"mount {ways.SOCKET.parent} here" in line for line in ways.advice())
    for named, meant in ((tmp_path, tmp_path / "guard.sock"), (tmp_path / "g.sock", tmp_path / "g.sock")):
        monkeypatch.setenv("SECURERUN_SOCKET", str(named))
        for governs in (True, False):
            monkeypatch.setattr(proc, "governs_network", lambda governs=governs: governs)
            said = "\n".join(ways.advice())
            assert f"so that SECURERUN_SOCKET finds it at {meant} " in said and str(ways.SOCKET.parent) not in said
    monkeypatch.setattr(proc, "governs_network", lambda: True)
    monkeypatch.setattr(ways, "_obstacle_to_direct", lambda: "no")
    assert f"have SECURERUN_SOCKET name {ways.SOCKET} instead of {tmp_path}/g.sock" in "\n".join(ways.advice())


def test_socket_is_where_the_environment_or_the_site_says_else_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "SOCKET", tmp_path / "securerun.d" / "guard.sock")
    monkeypatch.setattr(ways, "SOCKET_BEFORE", tmp_path / "securerun.sock")
    monkeypatch.setattr(ways, "of_site", lambda key: {"socket": ""}[key])
    monkeypatch.delenv("SECURERUN_SOCKET", raising=False)
    assert ways.socket_place() == ways.SOCKET
    with socket.socket(socket.AF_UNIX) as before, socket.socket(socket.AF_UNIX) as now:
        before.bind(str(ways.SOCKET_BEFORE))
        assert ways.socket_place() == ways.SOCKET_BEFORE
        ways.SOCKET.parent.mkdir()
        now.bind(str(ways.SOCKET))
        assert ways.socket_place() == ways.SOCKET
    monkeypatch.setattr(ways, "of_site", lambda key: {"socket": "/srv/guard.sock"}[key])
    assert ways.socket_place() == Path("/srv/guard.sock")
    monkeypatch.setenv("SECURERUN_SOCKET", "/elsewhere.sock")
    assert ways.socket_place() == Path("/elsewhere.sock")
