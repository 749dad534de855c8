"""Whom a guard serves: processes that end, or become another's, between two looks; and inputs that name nobody."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator

import kernel
import pytest
from cgroups import in_child, leave_for_a_new_network
from sandbox import NOBODY

from securerun.errors import PrivilegeError
from securerun.guard import caller
from securerun.guard.caller import SUDO_USER_VARIABLE, Caller, find_ancestor, find_peer
from securerun.linux import local_sockets, proc


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("has_pidfds", [pytest.param(True, marks=kernel.needing(kernel.PIDFDS)), False])
def test_a_process_that_ended_is_served_no_more(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, has_pidfds: bool
) -> None:
    """Before kernel 5.3 the start time tells."""
    if not has_pidfds:
        monkeypatch.delattr(os, "pidfd_open")
    served = Caller(process.pid)
    assert (served.pidfd is not None) is has_pidfds
    assert not served.has_ended()
    served.identify_again()
    served.require_same_network()
    end(process)
    assert served.has_ended()
    with pytest.raises(PrivilegeError, match="which started the guard, has ended"):
        served.identify_again()
    with pytest.raises(PrivilegeError, match="cannot be seen"):
        served.require_same_network()
    with pytest.raises(PrivilegeError, match="has ended"):
        Caller(process.pid)


@kernel.needing(kernel.PIDFDS)
def test_launcher_lives_on_for_a_guard_that_cannot_look_at_it_for_a_moment(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the job for a failed one, and heard nothing of its launcher any more."""
    served = Caller(process.pid)

    def cannot(_: object) -> proc.Stat:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(proc, "stat", cannot)
    assert not served.has_ended()
    end(process)
    assert served.has_ended()


def test_one_that_waits_to_be_reaped_has_ended(process: subprocess.Popen[bytes]) -> None:
    served = Caller(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(PrivilegeError, match="has ended"):
        served.identify_again()


@pytest.mark.usefixtures("root")
def test_a_process_that_became_another_users_is_not_served() -> None:
    def work() -> str:
        os.setresuid(NOBODY, NOBODY, 0)
        os.setresuid(-1, -1, NOBODY)
        served = Caller(os.getpid())
        served.user = NOBODY - 1
        with pytest.raises(PrivilegeError) as refusal:
            served.identify_again()
        return str(refusal.value)

    assert f"began as user {NOBODY - 1} and is user {NOBODY} now" in in_child(work)


@pytest.mark.usefixtures("root")
def test_a_process_of_several_users_is_not_served() -> None:
    def work() -> str:
        os.setresuid(NOBODY, NOBODY, 0)
        with pytest.raises(PrivilegeError) as refusal:
            Caller(os.getpid())
        return str(refusal.value)

    assert "is of several users at once (0, 65534)" in in_child(work)


@pytest.mark.usefixtures("root")
def test_a_process_in_another_network_is_not_served(process: subprocess.Popen[bytes]) -> None:
    def work() -> str:
        leave_for_a_new_network()
        with pytest.raises(PrivilegeError) as refusal:
            Caller(process.pid).require_same_network()
        return str(refusal.value)

    assert "is in another network namespace" in in_child(work)


def test_who_sudo_names_has_to_be_who_called_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUDO_USER_VARIABLE, "somebody")
    with pytest.raises(PrivilegeError, match="'somebody', which is no user id"):
        find_ancestor()
    monkeypatch.setenv(SUDO_USER_VARIABLE, str(NOBODY))
    with pytest.raises(PrivilegeError, match=f"sudo was started by user {NOBODY}"):
        find_ancestor()
    assert caller.sudo_processes() == ()


def test_what_is_gone_is_not_sudo(process: subprocess.Popen[bytes]) -> None:
    assert not caller._is_sudo(process.pid)
    end(process)
    assert not caller._is_sudo(process.pid)


def test_a_connection_names_its_peer_only_where_the_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUDO_USER_VARIABLE, raising=False)
    near, far = socket.socketpair()
    with near, far:
        assert find_peer(near.fileno()).pid == os.getpid()
        monkeypatch.setattr(local_sockets, "_SO_PEERPIDFD", 0x7FFF)  # before kernel 6.5
        assert find_peer(near.fileno()).pid == os.getpid()
        monkeypatch.setenv(SUDO_USER_VARIABLE, "0")
        with pytest.raises(PrivilegeError, match="takes no socket"):
            find_peer(near.fileno())
        monkeypatch.delenv(SUDO_USER_VARIABLE)
    with socket.socket() as wide, pytest.raises(PrivilegeError, match="only AF_UNIX names its peer"):
        find_peer(wide.fileno())
    reading, writing = os.pipe()
    try:
        with pytest.raises(PrivilegeError, match="is no socket"):
            find_peer(reading)
    finally:
        os.close(reading)
        os.close(writing)


def test_whoever_connected_and_ended_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUDO_USER_VARIABLE, raising=False)
    near, far = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0securerun-test-{os.getpid()}")
    listener.listen()
    with near, far, listener:

        def connect() -> None:
            with socket.socket(socket.AF_UNIX) as connecting:
                connecting.connect(listener.getsockname())

        in_child(connect)
        connected, _ = listener.accept()
        with connected, pytest.raises(PrivilegeError, match="has ended"):
            find_peer(connected.fileno())
