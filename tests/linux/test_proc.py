"""What is read of processes in /proc: of such as call themselves what they like, have ended, or show too much."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from headless import HEADLESS
from hosts import eventually
from memory_shown import SHOWS_A_GIGABYTE

from securerun.linux import proc

# All that ends a line for Python's splitlines; the kernel escapes the newline alone, and that not in `comm`.
LINE_ENDS = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028"]
_PR_SET_NAME = 15


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def python(started: list[subprocess.Popen[bytes]], script: str, **variables: str) -> int:
    """Start a script that says a line when it is ready."""
    words = [sys.executable, "-ISc", f"{script}\nprint('ready', flush=True)\nimport time\ntime.sleep(60)"]
    process = subprocess.Popen(words, env=variables, stdout=subprocess.PIPE)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process.pid


def named(started: list[subprocess.Popen[bytes]], name: bytes) -> int:
    """Start a process that gives itself a name, of 15 bytes at most."""
    return python(started, f"import ctypes; ctypes.CDLL(None).prctl({_PR_SET_NAME}, {name!r}, 0, 0, 0)")


def gone() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# Names


@pytest.mark.parametrize(
    "name",
    [
        b") Z 1 (",
        b"a) R 7 7 7 7 7",
        b"((((",
        b"))))",
        b"a\nUid:\t4711",
        b"a\nPPid:\t1",
        b"x\rUid:\t9\r",
        b"Uid:\t1 2 3 4",
        b" ",
        b"",
        b"\xff\xfe\n\x80",
        *(f"a{end}Uid:\t9".encode() for end in LINE_ENDS),
    ],
)
def test_whatever_a_process_calls_itself_is_its_name_and_nothing_else(
    started: list[subprocess.Popen[bytes]], name: bytes
) -> None:
    pid = named(started, name)
    found, status = proc.stat(pid), proc.status(pid)
    assert (found.parent, status.parent) == (os.getpid(), os.getpid())
    assert status.users == 4 * (os.getuid(),)
    assert status.groups == {os.getgid(), *os.getgroups()}
    assert proc.real_user(pid) == os.getuid()
    assert not found.has_ended
    assert proc.is_running(pid, found.start)
    assert proc.name(pid) == f"{name.decode('utf-8', 'replace')}\n"


def test_this_process_is_read_like_any_other() -> None:
    assert proc.stat(proc.SELF).start == proc.start_time(os.getpid())
    assert proc.status(proc.SELF).parent == os.getppid()
    assert os.getpid() in set(proc.pids())
    assert proc.owner(os.getpid()) == os.geteuid()
    assert proc.arguments(proc.SELF)[0] == Path("/proc/self/cmdline").read_bytes().partition(b"\0")[0]
    assert proc.program(os.getpid())[0].st_ino == Path(sys.executable).stat().st_ino


def test_a_field_that_this_kernel_does_not_have_holds_nothing() -> None:
    status = proc.status(proc.SELF)
    assert status.words("Ui") == status.words("NoSuchField") == []
    assert status.bits("NoSuchField") == frozenset()


def test_the_bits_of_a_field_are_numbered_from_none() -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGRTMAX})
    try:
        found = proc.status(proc.SELF).bits("SigBlk")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert found == {number - 1 for number in (*blocked, signal.SIGUSR1, signal.SIGRTMAX)}


# Ends


def test_of_a_process_that_is_gone_nothing_is_made_up() -> None:
    pid = gone()
    for read in (proc.stat, proc.status, proc.name, proc.arguments, proc.cgroups, proc.program, proc.children):
        with pytest.raises(OSError, match="No such"):
            read(pid)
    assert proc.environment(pid) == b""
    assert not proc.has_environment_to_come(pid)
    assert not proc.may_be_looked_into(pid)
    assert not proc.is_running(pid, 0)
    assert proc.real_user(pid) is None
    assert proc.sockets_of([pid]) == {}
    with pytest.raises(FileNotFoundError):
        proc.namespace("net", pid)


def test_a_process_that_ends_between_opening_and_reading_is_gone(started: list[subprocess.Popen[bytes]]) -> None:
    pid = named(started, b"short")
    descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try:
        started[0].kill()
        started[0].wait()
        with pytest.raises(ProcessLookupError):
            os.read(descriptor, 1)
    finally:
        os.close(descriptor)
    assert not proc.is_running(pid, 0)


def test_one_that_waits_to_be_reaped_is_there_and_does_not_run() -> None:
    process = subprocess.Popen(["true"], env={"NAME": "value"})
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        found = proc.stat(process.pid)
        assert found.first_thread_has_ended
        assert found.has_ended
        assert not proc.is_running(process.pid, found.start)
        assert proc.real_user(process.pid) == os.getuid()
        assert proc.environment(process.pid) == b""
        assert not proc.has_environment_to_come(process.pid)
        assert proc.arguments(process.pid) == [b""]
        with pytest.raises(FileNotFoundError):
            proc.program(process.pid)
    finally:
        process.wait()


def test_one_whose_first_thread_has_ended_shows_what_it_has_through_another(
    started: list[subprocess.Popen[bytes]],
) -> None:
    script = f"import socket; made = socket.socket()\n{HEADLESS}"
    process = subprocess.Popen([sys.executable, "-ISc", script], env={"NAME": "value"}, stdout=subprocess.PIPE)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    found = proc.stat(process.pid)
    assert found.first_thread_has_ended
    assert not found.has_ended
    assert proc.environment(process.pid) == b"NAME=value\0"
    assert len(proc.sockets_of([process.pid])) == 1


# Memory


def test_the_longest_environment_that_execve_takes_is_read_whole(started: list[subprocess.Popen[bytes]]) -> None:
    """Three quarters of 8 MiB, of which pointers take a part, and each text at most 128 KiB."""

    def unlimited_stack() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))

    if resource.getrlimit(resource.RLIMIT_STACK)[1] != resource.RLIM_INFINITY:
        pytest.skip("the stack is limited here, and with it what execve takes")
    long = {f"A{number:02}": "x" * 130_000 for number in range(46)}
    last = {"ZZZ": "the last"}
    sleeper = subprocess.Popen(["sleep", "60"], env={**long, **last}, preexec_fn=unlimited_stack)
    started.append(sleeper)
    text = proc.environment(sleeper.pid)
    assert len(text) > 5_900_000
    assert text.endswith(b"\0ZZZ=the last\0")


def test_a_process_that_shows_a_gigabyte_keeps_its_reader_no_longer_than_an_honest_one(
    started: list[subprocess.Popen[bytes]],
) -> None:
    words = [sys.executable, "-ISc", f"{SHOWS_A_GIGABYTE}\nprint('ready', flush=True)\nimport time\ntime.sleep(60)"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    started.append(process)
    assert process.stdout is not None
    said = process.stdout.readline()
    if said != b"ready\n":
        pytest.skip(f"this kernel lets no process say where its environment is (error {said.decode().strip()})")
    start, end = proc.stat(process.pid).environment_span
    assert end - start == 1 << 30
    began = time.monotonic()
    text = proc.environment(process.pid)
    assert time.monotonic() - began < 1.0
    assert len(text) == 6 * 1024 * 1024
    assert sum(map(len, proc.arguments(process.pid))) <= 6 * 1024 * 1024


def test_a_process_with_very_many_descriptors_takes_up_no_memory_of_its_readers(
    started: list[subprocess.Popen[bytes]],
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(hard, 60_000) - 20
    pid = python(
        started,
        "import os, resource, socket\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({hard}, {hard}))\n"
        "ends = [socket.socketpair() for _ in range(10)]\n"
        f"for number in range({count - 20}): os.dup(ends[number % 10][number % 2].fileno())\n",
    )
    with socket.socket() as mine:
        (inode,) = proc.sockets_of([os.getpid()]).keys() - proc.sockets_of([pid]).keys() & {
            os.fstat(mine.fileno()).st_ino
        }
        tracemalloc.start()
        try:
            assert proc.sockets_of([pid, os.getpid()], {inode}) == {inode: os.getpid()}
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 200_000


def test_of_threads_that_show_nothing_a_few_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(proc, "_threads", lambda _: map(str, range(30_000)))

    def nothing(path: str) -> bytes:
        asked.append(path)
        return b""

    monkeypatch.setattr(proc, "_read_or_nothing", nothing)
    assert proc.environment(1) == b""
    assert len(asked) < 10


# Descriptors, namespaces


def test_the_path_of_a_descriptor_leads_to_the_file_whatever_has_its_name(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("first")
    with place.open() as held:
        place.unlink()
        place.write_text("second")
        assert Path(proc.path_of_own_descriptor(held.fileno())).read_text() == "first"
        assert held.fileno() in proc.own_descriptors()


def test_sockets_are_told_from_other_descriptors() -> None:
    near, far = socket.socketpair()
    with near, far:
        found = proc.sockets_of([os.getpid()])
        assert {os.fstat(end.fileno()).st_ino for end in (near, far)} <= found.keys()
    assert not {os.fstat(descriptor).st_ino for descriptor in (0, 1, 2)} & found.keys()


def test_a_namespace_exists_as_long_as_a_process_is_seen_in_it() -> None:
    assert proc.namespace_exists("net", proc.namespace("net"))
    assert proc.namespace("net") == proc.namespace("net", os.getpid())
    assert not proc.namespace_exists("net", 1)


def test_a_program_that_was_removed_has_its_name_still(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    copy = tmp_path / "a program"
    copy.write_bytes(Path("/bin/sleep").read_bytes())
    copy.chmod(0o700)
    started.append(subprocess.Popen([str(copy), "60"]))
    assert eventually(lambda: proc.program(started[0].pid)[1] == "a program")
    copy.unlink()
    assert proc.program(started[0].pid)[1] == "a program"


def test_what_is_mapped_is_told_by_its_path() -> None:
    library = ctypes.CDLL(None)
    assert library is not None
    assert any(path.name.startswith("libc.so") or "musl" in path.name for path in proc.own_mapped_files())
