"""What listens for containers: starts of guards are shared out, and it takes no place that is another's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import CHECKOUT
from hosts import eventually
from users import GUARD

from securerun.errors import PrivilegeError
from securerun.guard import listener
from securerun.guard.listener import Guards
from securerun.guard.share import Share


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_share_is_a_number_at_once_and_then_so_many_a_second(clock: list[float]) -> None:
    share = Share(at_once=16, a_second=2.0)
    assert [share.take() for _ in range(17)] == [True] * 16 + [False]
    clock[0] += 1
    assert [share.take() for _ in range(3)] == [True, True, False]
    assert not share.is_whole
    clock[0] += 3600
    assert share.is_whole and [share.take() for _ in range(17)] == [True] * 16 + [False]


def test_one_account_takes_nothing_from_another(clock: list[float]) -> None:
    guards = Guards()
    while not guards.obstacle(1):
        pass
    assert guards.obstacle(2) == ""


def test_whoever_takes_on_many_accounts_fills_no_memory(clock: list[float]) -> None:
    guards = Guards()
    obstacles = {guards.obstacle(account) for account in range(5_000)}
    assert "too many ask for guards" in obstacles
    clock[0] += 60
    assert guards.obstacle(20_000) == ""


@pytest.mark.usefixtures("root")
def test_listener_takes_the_place_of_one_that_ended_and_of_no_other(tmp_path: Path) -> None:
    place = tmp_path / "securerun.d" / "guard.sock"
    first = listener._listen(place)
    assert place.stat().st_mode & 0o777 == 0o666 and os.listdir(place.parent) == [place.name]
    with pytest.raises(PrivilegeError, match="another guard listens"):
        listener._listen(place)
    first.close()
    second = listener._listen(place)
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(place))
    listener._remove(place, second)
    assert not place.exists()


@pytest.mark.usefixtures("root")
def test_listener_takes_no_directory_that_others_can_change(tmp_path: Path) -> None:
    place = tmp_path / "securerun.d" / "guard.sock"
    place.parent.mkdir()
    place.parent.chmod(0o777)
    with pytest.raises(PrivilegeError, match="root alone can change"):
        listener._listen(place)
    place.parent.chmod(0o755)
    os.chown(place.parent, 65534, 65534)
    with pytest.raises(PrivilegeError, match="root alone can change"):
        listener._listen(place)
    with pytest.raises(PrivilegeError, match="no absolute path"):
        listener._listen(Path("guard.sock"))


def test_who_has_hung_up_is_known_to_have() -> None:
    near, far = socket.socketpair()
    with near:
        assert not listener._has_hung_up(near)
        far.close()
        assert listener._has_hung_up(near)


@pytest.mark.usefixtures("root")
def test_path_that_is_too_long_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(PrivilegeError, match="too long"):
        listener._listen(tmp_path / ("x" * 150))


def test_listener_that_was_started_deaf_hears_its_end_and_its_childrens(tmp_path: Path) -> None:
    """Started by what ignores SIGCHLD it took all guards for living, and none was to be had after the 512th."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as end:
        end.bind(str(tmp_path / "s"))
        end.listen()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            try:
                listener._serve(end, listener._hear_of_the_end())
            finally:
                os._exit(0 if signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL else 1)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.kill(pid, signal.SIGTERM)
        assert eventually(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, seconds=5)
    finally:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.usefixtures("root")
def test_listener_without_standard_streams_has_nothing_of_its_own_in_their_place(tmp_path: Path) -> None:
    """Its wake pipe was its standard error: a line that no log takes would have ended it."""
    place = tmp_path / "securerun.d" / "guard.sock"
    process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", GUARD, "--listen", str(place)])
    try:
        assert eventually(place.is_socket, seconds=20)
        held = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)]
        assert held == [Path(os.devnull)] * 3
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


@pytest.mark.usefixtures("root")
def test_listener_that_is_told_to_end_once_its_socket_is_there_leaves_none(tmp_path: Path) -> None:
    """However soon: between the two it wrote its first line to the log, which takes its time."""
    place = tmp_path / "securerun.d" / "guard.sock"
    program = """
import os, signal, sys
sys.path.append(sys.argv[1])
from securerun.guard import listener, log
log.note = lambda _, words: words.startswith("listening") and os.kill(os.getpid(), signal.SIGTERM)
sys.exit(listener.main(sys.argv[2:]))
"""
    command = [sys.executable, "-I", "-S", "-c", program, str(CHECKOUT), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(place.parent) == []


@pytest.mark.usefixtures("root")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is missing")
def test_listener_that_may_open_too_few_files_says_so_and_does_not_start(tmp_path: Path) -> None:
    place = tmp_path / "securerun.d" / "guard.sock"
    limited = 'ulimit -n 6; exec setpriv --inh-caps=-all --bounding-set=-sys_resource "$@"'
    command = ["sh", "-c", limited, "sh", GUARD, "--listen", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 77 and "a hard limit of 6 (ulimit -n)" in done.stderr, done
    assert done.stderr.count("\n") == 1 and not place.exists()


@pytest.mark.parametrize("streams", ["< /dev/null", "> /dev/null", "<&-", ">&-"])
def test_guard_that_no_launcher_started_says_who_starts_it_and_how_to_listen(streams: str) -> None:
    command = ["sh", "-c", f'echo | {{ "$@" {streams}; }}', "sh", GUARD]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2 and "securerun starts this" in done.stderr and "--listen" in done.stderr, done
    assert done.stderr.count("\n") == 1
