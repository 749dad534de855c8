"""A worker that writes down the world it finds itself in: world/RANK.json in the working directory.

It says a line with its arguments on standard output and one on standard error; local rank 0 also reads its standard
input to the end, unless that is a terminal. May be started as a script, as a module, by a command or by runpy, and
imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
from pathlib import Path

# <linux/prctl.h>
_PR_GET_PDEATHSIG = 2
_PR_GET_CHILD_SUBREAPER = 37
# All but the network's: each side of a comparison has one of its own.
_NAMESPACES = ("cgroup", "ipc", "mnt", "pid", "time", "user", "uts")
_STATUS = ("Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Cpus_allowed_list")
_SIGNALS = ("SigBlk", "SigIgn", "SigCgt")
# Signals 32 and 33 are glibc's own, which it catches from a process' first thread on: nptl(7).
_OF_GLIBC = 0b11 << 31
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_INHERITED = ("oom_score_adj", "personality", "coredump_filter", "timerslack_ns", "limits")


def main() -> None:
    rank = os.environ["RANK"]
    say(1, f"worker {rank} says {sys.argv[1:]}")
    say(2, f"worker {rank} complains")
    directory = Path("world")
    directory.mkdir(exist_ok=True)
    (directory / f"{rank}.json").write_text(json.dumps(world(), indent=1))


def say(stream: int, line: str) -> None:
    """In one write, so that the lines of several workers do not mix; to nobody where the stream is none."""
    with contextlib.suppress(OSError):
        os.write(stream, f"{line}\n".encode())


def world() -> dict[str, object]:
    """All that a process has from whoever started it."""
    return {
        "arguments": sys.argv,
        "command": getattr(sys, "orig_argv", None),  # Python 3.10
        "python": (sys.executable, repr(sys.flags), sys.path),
        "collects garbage": gc.isenabled(),
        "directory": str(Path.cwd()),
        "environment": dict(os.environ),
        # A forked worker has all that its launcher has open, and the launchers differ there: one has a guard.
        "descriptors": None if is_forked() else descriptors(),
        "input": heard() if os.environ["LOCAL_RANK"] == "0" else None,
        "leads its session": os.getsid(0) == os.getpid(),
        "leads its group": os.getpgrp() == os.getpid(),
        "death signal": _ask(_PR_GET_PDEATHSIG),
        "is subreaper": _ask(_PR_GET_CHILD_SUBREAPER),
        "namespaces": {name: str(Path("/proc/self/ns", name).readlink()) for name in _NAMESPACES},
        "itself": process("self"),
        "launcher": {**process(str(os.getppid())), "name": Path(f"/proc/{os.getppid()}/comm").read_text()},
    }


def heard() -> str | None:
    """What stands on standard input; None where that is a terminal, or nothing to read from."""
    try:
        return None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    except OSError:
        return None


def process(pid: str) -> dict[str, object]:
    """What /proc says about a process and a child of it would inherit."""
    directory = Path("/proc", pid)
    fields = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
    return {
        **{name: fields[name].strip() for name in (*_STATUS, *_CAPABILITIES)},
        **{name: f"{int(fields[name], 16) & ~_OF_GLIBC:016x}" for name in _SIGNALS},
        **{name: _lines(directory / name) for name in _INHERITED},
        "command": (directory / "cmdline").read_text().split("\0"),
        "nice": os.getpriority(os.PRIO_PROCESS, 0 if pid == "self" else int(pid)),
    }


def _lines(path: Path) -> list[str]:
    """What a file of /proc says; nothing where only a capability would show it (timerslack_ns of another process)."""
    try:
        return path.read_text().splitlines()
    except PermissionError:
        return []


def is_forked() -> bool:
    """Whether this process runs the program of its launcher."""
    return Path("/proc/self/cmdline").read_bytes() == Path(f"/proc/{os.getppid()}/cmdline").read_bytes()


def descriptors() -> dict[str, object]:
    """What the standard streams of this process are, and what else it has open; of pipes and sockets the kind alone."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[link.name] = str(link.readlink()).partition(":[")[0]
        except FileNotFoundError:  # the one that listed the directory
            continue
    standard = {name: found.pop(name, "closed") for name in "012"}
    return {**standard, "others": sorted(found.values())}


def _ask(option: int) -> int:
    value = ctypes.c_int()
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.byref(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    return value.value


if __name__ == "__main__":
    main()
