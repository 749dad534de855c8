"""Descriptors that come along are neither taken nor closed by whoever reads or hangs up, by the kernel's own rules."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import pytest
from hosts import eventually

from securerun.linux import sent_along
from securerun.linux.sent_along import DescriptorsSent, Parting


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    sent_along.take_none(near)
    with near, far:
        yield near, far


def send(end: socket.socket, data: bytes, flags: int = 0) -> int:
    """Send this with the writing end of a pipe, and return the other end: it is at its end when nobody has that."""
    read, write = os.pipe()
    end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))], flags)
    os.close(write)
    os.set_blocking(read, False)
    return read


def is_closed(read: int) -> bool:
    try:
        return os.read(read, 1) == b""
    except BlockingIOError:
        return False


def test_what_has_none_along_is_received_as_ever(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.send(b"one")
    far.send(b"two")
    assert sent_along.receive(near, 4) == b"onet" and sent_along.receive(near, 100) == b"wo"
    with pytest.raises(BlockingIOError):
        sent_along.receive(near, 100, socket.MSG_DONTWAIT)
    far.close()
    assert sent_along.receive(near, 100) == b""


@pytest.mark.parametrize("before", [b"", b"one"])
def test_descriptors_stay_where_they_are(pair: tuple[socket.socket, socket.socket], before: bytes) -> None:
    near, far = pair
    if before:
        far.send(before)
    read = send(far, b"two")
    for _ in range(2):
        with pytest.raises(DescriptorsSent):
            sent_along.receive(near, 100)
    assert not is_closed(read)
    os.close(read)


def test_urgent_byte_hides_none(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    try:
        read = send(far, b"x", socket.MSG_OOB)
    except OSError:  # before Linux 5.15, or without CONFIG_AF_UNIX_OOB
        pytest.skip("local sockets have no urgent data on this kernel")
    far.send(b"y")
    with pytest.raises(DescriptorsSent):
        sent_along.receive(near, 100)
    assert not is_closed(read)
    os.close(read)


@pytest.mark.parametrize("flags", [0, socket.MSG_OOB])
def test_who_hangs_up_on_them_leaves_the_closing_to_a_child(flags: int) -> None:
    near, far = socket.socketpair()
    with far:
        try:
            read = send(far, b"x", flags)
        except OSError:
            pytest.skip("local sockets have no urgent data on this kernel")
        parting = Parting()
        parting.take(near)
        with pytest.raises(BrokenPipeError):
            far.send(b"more")
        assert len(parting) == 1 and not is_closed(read)
        parting.close()
        assert len(parting) == 0 and near.fileno() == -1
        assert eventually(lambda: is_closed(read), seconds=5)
        os.close(read)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_what_is_empty_is_closed_at_once() -> None:
    near, far = socket.socketpair()
    parting = Parting()
    parting.take(near)
    assert near.fileno() == -1 and len(parting) == 0
    far.close()


def test_what_another_process_goes_on_with_is_not_cut_off() -> None:
    near, far = socket.socketpair()
    other = socket.socket(fileno=os.dup(near.fileno()))
    parting = Parting()
    with far, other:
        parting.take(near, is_anothers=True)
        far.send(b"x")
        assert other.recv(10) == b"x"


def test_where_there_can_be_no_child_they_stay_open_until_there_can(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair()
    far.send(b"x")
    parting = Parting()
    parting.take(near)

    def none() -> int:
        raise BlockingIOError

    with monkeypatch.context() as refused:
        refused.setattr(os, "fork", none)
        parting.close()
    assert len(parting) == 1 and near.fileno() != -1
    parting.close()
    assert len(parting) == 0
    far.close()


def test_nobody_can_send_to_a_socket_that_only_asks_who_listens() -> None:
    with socket.socket(socket.AF_UNIX) as listener, sent_along.deaf() as end:
        listener.bind("")
        listener.listen()
        end.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted, pytest.raises(BrokenPipeError):
            send(accepted, b"x")
