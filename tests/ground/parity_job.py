"""A worker that does what its first argument says, for tests that compare two launchers.

    streams        print lines to both streams, bytes that are no text, and a last line without its end
    fail HOW       rank 1 fails at each attempt, by `exit`, `signal` or `exception`; the others wait for their end
    wait           wait for the file `over`; before that, write `pid: N` to up.RANK
    leave          leave a process behind that holds none of the streams, and waits for the file `over`
    generations    touch RESTARTS.RANK.SIZE, and wait: for `fail.RANK` to fail, for `over` to end well

Who waits says which signal ends it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

RANK = os.environ["RANK"]
_ATTEMPT = os.environ["TORCHELASTIC_RESTART_COUNT"]
_PATIENCE_SECONDS = 60
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def streams() -> None:
    for number, fruit in enumerate(("apple", "pear", "apple")):
        say(f"line {number} of {RANK}: {fruit}")
        say(f"complaint {number} of {RANK}", stream=2)
    os.write(1, b"\xff\xfe bytes\n" * 2 + b"the end without a newline, of " + RANK.encode())


def fail(how: str) -> None:
    say(f"attempt {_ATTEMPT} of {RANK}")
    ready = Path(f"ready.{_ATTEMPT}")
    if RANK != "1":
        say_which_signal_ends_this()
        ready.touch()
        wait_for("over")
    wait_for(ready.name)
    if how == "exit":
        sys.exit(3)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    fail_by_exception()


def fail_by_exception() -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    @record  # type: ignore[untyped-decorator]
    def train() -> None:
        raise ValueError("the loss is no number")

    train()


def wait() -> None:
    say_which_signal_ends_this()
    partial = Path(f"partial.{RANK}")
    partial.write_text(f"pid: {os.getpid()}")
    partial.rename(f"up.{RANK}")
    wait_for("over")


def leave() -> None:
    null = subprocess.DEVNULL
    script = f"for _ in $(seq {_PATIENCE_SECONDS}0); do [ -e over ] && exit; sleep 0.1; done"
    subprocess.Popen(["sh", "-c", script, "left"], stdin=null, stdout=null, stderr=null, start_new_session=True)


def generations() -> None:
    say_which_signal_ends_this()
    Path(f"{_ATTEMPT}.{RANK}.{os.environ['WORLD_SIZE']}").touch()
    failing = f"fail.{RANK}"
    if wait_for("over", failing) == failing:
        Path(failing).unlink()
        sys.exit(1)


def wait_for(*names: str) -> str:
    """Wait until one of these files is there, and return its name."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        for name in names:
            if Path(name).exists():
                return name
        time.sleep(0.02)
    raise TimeoutError(f"nobody made {names}")


def say(line: str, *, stream: int = 1) -> None:
    """In one write: the lines of several workers must not mix."""
    os.write(stream, f"{line}\n".encode())


def say_which_signal_ends_this() -> None:
    def end(number: int, _frame: FrameType | None) -> None:
        say(f"worker {RANK} got {signal.Signals(number).name}")
        os._exit(0)

    for number in _SIGNALS:
        signal.signal(number, end)


if __name__ == "__main__":
    tasks: tuple[Callable[..., None], ...] = (streams, fail, wait, leave, generations)
    {task.__name__: task for task in tasks}[sys.argv[1]](*sys.argv[2:])
