"""What a guard gets from whoever started it, it gives up: each attribute set as root, and read back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import handing_down
import pytest
from checkout import CHECKOUT
from handing_down import OF_ANYBODY, OF_ROOT

# It cannot be taken back; a guard works under it (tests/whole/test_attacks_inherited.py).
_FOR_GOOD = {"writable code"}


def read_back(what: str) -> list[dict[str, Any]]:
    """What a process has after it was executed, and after it discarded; skips what this kernel does not take."""
    argv = [sys.executable, "-I", "-S", handing_down.__file__, what, "--", "read"]

    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        start_new_session=True,
    )
    if done.stderr.startswith(f"{what}: "):
        pytest.skip(f"this kernel does not take it: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def fresh(root: None) -> dict[str, Any]:
    """What a process has that inherited nothing unusual, when it has discarded."""
    return read_back("nothing")[1]


@pytest.mark.parametrize("what", [name for name in (*OF_ANYBODY, *OF_ROOT) if name not in {"nothing", *_FOR_GOOD}])
def test_attribute_that_survives_execve_is_given_up(fresh: dict[str, Any], what: str) -> None:
    plain, _ = read_back("nothing")
    before, after = read_back(what)
    assert before != plain, f"{what} does not survive execve(2), so this tries nothing"
    assert after == fresh


def test_slack_of_timers_is_the_least_and_not_the_default_of_the_caller(fresh: dict[str, Any]) -> None:
    assert fresh["timer slack"] == 1


def test_nobody_looks_into_a_guard_or_has_its_core(fresh: dict[str, Any]) -> None:
    assert fresh["dumpable"] == 0


def test_clock_of_the_processor_may_be_read_again(root: None) -> None:
    """Without it the next look at a clock ends the process: so it is set where nothing comes between."""
    program = """
import ctypes, sys
sys.path.append(sys.argv[1])
from securerun.guard import inherited
from securerun.linux import libc
assert libc.library.prctl(26, 2, 0, 0, 0) == 0
inherited.discard("securerun-test")
found = ctypes.c_int(-1)
libc.library.prctl(25, ctypes.byref(found))
print(found.value)
"""
    argv = [sys.executable, "-I", "-S", "-c", program, str(CHECKOUT)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30)
    if "AssertionError" in done.stderr:
        pytest.skip("only x86 has such a switch")
    assert done.stdout == "1\n", (done.returncode, done.stderr)


def test_standard_stream_that_is_closed_is_nobodys_socket(root: None) -> None:
    """The next file would take its place, and standard error is where lines go that no log takes."""
    program = """
import os, socket, sys
sys.path.append(sys.argv[1])
from securerun.guard import inherited
inherited.discard("securerun-test")
near, far = socket.socketpair()
assert near.fileno() > 2
os.write(2, b"to nobody")
print(os.readlink("/proc/self/fd/2"))
"""
    argv = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-I", "-S", "-c", program, str(CHECKOUT)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "/dev/null\n"), done


def test_low_soft_limit_on_open_files_is_lifted_where_the_hard_one_stays(root: None) -> None:
    program = """
import resource, sys
sys.path.append(sys.argv[1])
from securerun.guard import inherited
from securerun.linux import capabilities
capabilities.keep_only(())
inherited.lift_limits()
inherited.require_unlimited()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    limited = 'ulimit -Sn 64; ulimit -Hn 1024; exec "$@"'
    argv = ["sh", "-c", limited, "sh", sys.executable, "-I", "-S", "-c", program, str(CHECKOUT)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "1024 1024\n"), done
