"""A guard that is told of a key to come has loaded what that takes before the order comes; any other has not."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from securerun.guard import program
from securerun.guard.program import brings_key, launcher_address, reads_versions
from securerun.guard.protocol import Ready, Report, Runs
from securerun.protection.ways import DIRECTLY, Connection, ways

pytestmark = pytest.mark.usefixtures("root")
# What hashes is a library of its own, and of all that is loaded takes longest.
HASHES = "_hashlib"


@contextlib.contextmanager
def started_directly(is_likely: bool) -> Iterator[Connection]:
    way, *_ = ways(brings_key=is_likely)
    assert way.name == DIRECTLY
    with contextlib.closing(way.open()) as connection:
        yield connection


@contextlib.contextmanager
def started_for_a_socket(is_likely: bool) -> Iterator[Connection]:
    """A guard as systemd starts one, whose launcher is this process."""
    place = launcher_address()  # any that nobody has
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as end:
        listener.bind(place)
        listener.listen()
        end.bind(launcher_address(brings_key=is_likely))
        end.connect(place)
        accepted = listener.accept()[0]
        with accepted:
            process = subprocess.Popen(
                program.command(program.SOCKET_ARGUMENT), stdin=accepted.fileno(), stdout=accepted.fileno()
            )
        descriptor = end.detach()
    with contextlib.closing(Connection(descriptor, descriptor, None, None)) as connection:
        yield connection
    process.wait()


@pytest.mark.parametrize("start", [started_directly, started_for_a_socket])
@pytest.mark.parametrize("is_likely", [True, False])
def test_what_a_key_takes_is_there_before_the_order_and_only_where_one_is_likely(
    start: Callable[[bool], contextlib.AbstractContextManager[Connection]], is_likely: bool
) -> None:
    with start(is_likely) as connection:
        ready = connection.receive(30.0)
        assert isinstance(ready, Ready)
        # Answered when all that is done while it waits has been done.
        assert connection.send(Report()) and isinstance(connection.receive(30.0), Runs)
        assert (HASHES in Path(f"/proc/{ready.pid}/maps").read_text()) is is_likely


def test_nobody_elses_address_is_taken_for_a_word_of_a_key() -> None:
    named = launcher_address(brings_key=True)
    assert brings_key(named) and brings_key(named.encode()) and reads_versions(named)
    assert not any(brings_key(address) for address in (launcher_address(), "", b"", "/run/x-key", b"\0\xff-key"))
