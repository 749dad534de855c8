"""The same command lines through torchrun and through securerun, side by side, and what a user sees of each.

    with Pair(directory, networks) as pair:
        seen = pair.run("--nproc-per-node", "2", "train.py")   # fails where the two differ
        assert seen.status == [0]

Each side has hosts of its own, with the same names and addresses, and a directory of its own, in which the launcher is
started. What differs by nature is put aside knowingly: `_BY_NATURE` says what and why. Nothing else may differ but
two things that are wanted: what the job makes is made under securerun's umask, and its logs are sealed when it is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from difflib import unified_diff
from pathlib import Path

from checkout import COMMANDS, GROUND
from hosts import Host, Network, eventually, finish_all, is_alive, kill_group

from securerun.host.permissions import Kind, row
from securerun.host.umask import LEAST

WORLD = str(GROUND / "parity_world.py")
JOB = str(GROUND / "parity_job.py")
RUN_ID = "sameid"

_MODULES = {
    "torchrun": {"run": "torch.distributed.run", "launch": "torch.distributed.launch"},
    "securerun": {"run": "securerun", "launch": "securerun.launch"},
}
_SECONDS = 90
# What the tests themselves make is for nobody else, so that no umask shows on it.
_PRIVATE_FILE = 0o600
_PRIVATE_DIRECTORY = 0o700

# Makes standard input the controlling terminal of its session, and becomes what its arguments say.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)

# What a process of root's has, and one in a user namespace of root's has no more.
_CAPABILITIES = frozenset({"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"})

_LOG = re.compile(r"logs/[^/]+_RANDOM/.*\.(log|json)")

# What cannot be the same in two launches of anything, or is the launcher's own name.
_BY_NATURE: tuple[tuple[str, str], ...] = (
    # Two launchers are two programs.
    (rf"{re.escape(str(COMMANDS))}/(torchrun|securerun)\b", "LAUNCHER"),
    (r"^(torch\.distributed\.(run|launch)|securerun(\.launch)?)$", "LAUNCHER"),
    (r"^(usage: )?(torchrun|securerun|run\.py|launch\.py|__main__\.py)(: error:| \[-h\])", r"\1LAUNCHER\3"),
    # Securerun's own words, which it says on standard error behind its name.
    (r"^securerun: .*\n", ""),
    # The moment at the head of a log line, before torch 2.4.
    (r"^\[\d{4}-\d\d-\d\d [0-9:,]+\] ", "[WHEN] "),
    # Which of two nodes leaves first; the store at which they meet goes with one of them.
    (
        r"^(W|\[WHEN\]).* The node '.*' has failed to (shutdown|send a keep-alive heartbeat to) the rendezvous .* "
        r"RendezvousConnectionError\.\n",
        "",
    ),
    (r"^E.*\] Error waiting on exit barrier\. .*\n(E.* torch/distributed/elastic/agent/server/api\.py.*\n)*", ""),
    # Where a traceback of the launcher's leads through: other functions on the way to torch's.
    (r"^  File \".*\n(    .*\n)*", ""),
    # Who calls a function that warns: the line where it does, and that line's text.
    (r"^\S+:\d+: (FutureWarning: (.*\n)*?)  (return )?\S+\(.*\)\n", r"\1"),
    # A run without an id of its own gets a random one: torch/distributed/run.py, run().
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    # tempfile.mkdtemp()
    (rf"\b(torchelastic|UUID|none|{RUN_ID})_[a-z0-9_]{{8}}\b", r"\1_RANDOM"),
    # The moment and the process at the head of a log line: torch/_logging.
    (r"^([EIW])\d{4} [0-9:.]+ \d+ ", r"\1 "),
    (r"^  time      : .*$", "  time"),
    (r"\b\d+(\.\d+)?(e-\d+)? seconds\b", "N seconds"),
    # Pids.
    (r"\b(pid: |PID |[Pp]rocess )\d+", r"\1N"),
    # Ports that the kernel chose, which it does from 32768 on.
    (r"(?<![\w.])(32[7-9]\d\d|(3[3-9]|4\d|5\d|60)\d{3})(?!\d)", "PORT"),
    # The numbers of two descriptors; securerun's launcher has three more open, to its guard.
    (r"\b(tracker_fd=|pipe_handle=|main\()\d+(, \d+)?", r"\1N"),
)


@dataclass(frozen=True)
class Entry:
    """One file or directory that a launch left: its permissions, and what is in it."""

    mode: str
    content: object = None


@dataclass(frozen=True)
class Seen:
    """What a user sees of a launch when it is over, without what differs by nature.

    status: of each launcher, in the order in which they were started.
    output, errors: the lines of the standard streams of all launchers, sorted, since workers speak at once.
    files: all that is in the directory of this side now, by path; of JSON the content is the document.
    """

    status: list[int]
    output: list[str]
    errors: list[str]
    files: Mapping[str, Entry]

    def text(self) -> list[str]:
        """All of it as lines, for people."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).splitlines()

    def world(self, rank: int = 0) -> dict[str, object]:
        """What parity_world.py wrote down as this rank."""
        content = self.files[f"world/{rank}.json"].content
        assert isinstance(content, dict)
        return content


class Pair:
    """Two sides on which the same is done. Its `directory` is empty at the beginning."""

    def __init__(self, directory: Path, networks: Sequence[Network], *, apart: bool = False) -> None:
        """apart: whether securerun puts its jobs, of one node each, into networks of their own."""
        self._apart = apart
        # Short names of one length: paths to sockets have to fit into 108 bytes, unix(7).
        self.sides = tuple(
            Side(launcher, network, directory / launcher[0]) for launcher, network in zip(_MODULES, networks)
        )

    def run(
        self,
        *arguments: str,
        prefix: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        umask: int = 0o022,
        module: str | None = None,
    ) -> Seen:
        """Launch on both sides, wait for the end, and return what was seen, which was the same."""
        self.start(*arguments, prefix=prefix, env=env, umask=umask, module=module)
        return self.end()

    def start(
        self,
        *arguments: str,
        node: int = 0,
        prefix: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        umask: int = 0o022,
        module: str | None = None,
        terminal: bool = False,
    ) -> None:
        """Launch on one node of both sides.

        prefix: a command that arranges things and then becomes the launcher.
        module: launch by `python -m` what is called by that name, `run` or `launch`, in place of the command.
        terminal: let all standard streams be a terminal's, and the launcher its foreground.
        """
        scope = {"SECURERUN_SCOPE": "namespace"} if self._apart else {}
        for side in self.sides:
            side.start([*prefix, *side.launcher(module), *arguments], node, {**scope, **(env or {})}, umask, terminal)

    def wait_for(self, pattern: str, *, count: int = 1) -> None:
        """Wait until as many files of that pattern lie in each side's directory."""
        appeared = eventually(
            lambda: all(len(list(side.place.glob(pattern))) >= count for side in self.sides), seconds=_SECONDS
        )
        assert appeared, (pattern, [[path.name for path in side.place.iterdir()] for side in self.sides])

    def touch(self, name: str) -> None:
        """Make an empty file in each side's directory, for the workers to see."""
        for side in self.sides:
            (side.place / name).touch(mode=_PRIVATE_FILE)

    def signal(self, number: int, *, started: int = -1) -> None:
        """Send a signal to one launcher of each side, by default the last that was started, and to nothing else."""
        for side in self.sides:
            side.started[started].send_signal(number)

    def signal_worker(self, rank: int, number: int) -> None:
        """Send a signal to a worker that wrote its pid to up.RANK, and wait for its end."""
        for side in self.sides:
            pid = int((side.place / f"up.{rank}").read_text().removeprefix("pid: "))
            os.kill(pid, number)
            assert eventually(lambda pid=pid: not is_alive(pid), seconds=_SECONDS)  # type: ignore[misc]

    def type(self, key: bytes) -> None:
        """Press a key at the terminals."""
        for side in self.sides:
            side.type(key)

    def wait(self) -> None:
        """Wait for the end of the launchers alone, whatever of their jobs still runs."""
        for side in self.sides:
            for process in side.started:
                process.wait(timeout=_SECONDS)

    def end(self) -> Seen:
        """Wait for the end of all that holds the streams, and return what was seen, which was the same."""
        return self.same(*self.end_differently())

    def same(self, of_torchrun: Seen, of_securerun: Seen) -> Seen:
        """Return what was seen, which was the same."""
        expected = _under_umask_and_sealed(of_torchrun)
        if self._apart:
            expected, of_securerun = _but_for_a_namespace(expected), _but_for_a_namespace(of_securerun)
        differences = list(unified_diff(expected.text(), of_securerun.text(), "torchrun", "securerun", lineterm=""))
        assert not differences, "\n".join(differences)
        return of_securerun

    def end_differently(self) -> tuple[Seen, Seen]:
        """As `end`, where something else is meant to differ: what was seen of torchrun and of securerun."""
        of_torchrun, of_securerun = (side.see(side.finish()) for side in self.sides)
        return of_torchrun, of_securerun


class Side:
    """One launcher, on hosts of its own, in a directory of its own."""

    def __init__(self, name: str, network: Network, place: Path) -> None:
        self.name = name
        self.nodes: Sequence[Host] = tuple(network)
        self.place = place
        self.started: list[subprocess.Popen[str]] = []
        self._terminal: Terminal | None = None
        (place / "tmp").mkdir(mode=_PRIVATE_DIRECTORY, parents=True)

    def launcher(self, module: str | None) -> list[str]:
        # By this interpreter, since pip may have written different names of it into the first lines of two scripts.
        return [sys.executable, *(("-m", _MODULES[self.name][module]) if module else (str(COMMANDS / self.name),))]

    def start(
        self,
        command: Sequence[str],
        node: int,
        env: Mapping[str, str | None] | None,
        umask: int,
        terminal: bool,
    ) -> None:
        surroundings = {
            "TMPDIR": str(self.place / "tmp"),
            "PYTHONPATH": str(GROUND),
            # So that the name of a program does not decide where its usage is folded.
            "COLUMNS": "10000",
            # c10d's warnings, from C++, come as the network's moods do.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **(env or {}),
        }
        inward, outward = subprocess.DEVNULL, subprocess.PIPE
        if terminal:
            self._terminal = Terminal()
            command = [sys.executable, "-c", _TAKE_TERMINAL, *command]
            inward = outward = self._terminal.workers_end
        self.started.append(
            self.nodes[node].popen(
                command,
                env=surroundings,
                cwd=self.place,
                umask=umask,
                stdin=inward,
                stdout=outward,
                stderr=outward,
            )
        )

    def type(self, key: bytes) -> None:
        assert self._terminal is not None
        self._terminal.type(key)

    def finish(self) -> list[subprocess.CompletedProcess[str]]:
        """Wait for all that was started here; what was said on a terminal is standard output."""
        try:
            done = finish_all(self.started, timeout=_SECONDS)
        finally:
            for process in self.started:
                kill_group(process)
        if self._terminal is not None:
            done[-1].stdout += self._terminal.close()
        return done

    def processes(self) -> list[str]:
        """The command lines of what runs in this side's directory."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if (place / "cwd").readlink() == self.place:
                    found.append((place / "cmdline").read_text().replace("\0", " ").strip())
        return found

    def see(self, done: Sequence[subprocess.CompletedProcess[str]]) -> Seen:
        return Seen(
            status=[process.returncode for process in done],
            output=sorted(line for process in done for line in self._plain(process.stdout).splitlines()),
            errors=sorted(line for process in done for line in self._plain(process.stderr).splitlines()),
            files={
                self._plain(str(path.relative_to(self.place))): self._entry(path)
                for path in _below(self.place)
                # Made by torch's printing of a traceback, and so by whichever node leaves last.
                if not path.name.startswith("torchinductor_")
            },
        )

    def _entry(self, path: Path) -> Entry:
        mode = f"{path.stat().st_mode & 0o7777:04o}"
        if path.is_dir():
            return Entry(mode)
        content = path.read_bytes()
        try:
            return Entry(mode, self._comparable(json.loads(content)))
        except ValueError:
            return Entry(mode, self._plain(content.decode(errors="backslashreplace")))

    def _comparable(self, value: object) -> object:
        """A JSON document without what differs by nature."""
        if isinstance(value, str):
            return self._plain(value)
        if isinstance(value, list):
            return [self._comparable(item) for item in value]
        if isinstance(value, dict):
            # SECURERUN_* is what securerun tells the guards of later; the timestamp of an error file is a moment.
            return {
                key: self._comparable(item)
                for key, item in value.items()
                if not key.startswith("SECURERUN_") and key != "timestamp"
            }
        return value

    def _plain(self, text: str) -> str:
        text = text.replace(str(self.place), "PLACE")
        for pattern, plain in _BY_NATURE:
            text = re.sub(pattern, plain, text, flags=re.MULTILINE)
        return text


class Terminal:
    """A terminal without an echo. Somebody reads what is said there all the time, so that nobody waits for room."""

    def __init__(self) -> None:
        self._ours, self.workers_end = os.openpty()
        settings = termios.tcgetattr(self.workers_end)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(self.workers_end, termios.TCSANOW, settings)
        self._reader = ThreadPoolExecutor(1)
        self._said = self._reader.submit(self._read)

    def type(self, key: bytes) -> None:
        os.write(self._ours, key)

    def close(self) -> str:
        """Hang up when nobody else holds the terminal any more; all that was said on it."""
        os.close(self.workers_end)
        said = self._said.result(timeout=_SECONDS)
        self._reader.shutdown()
        os.close(self._ours)
        return said

    def _read(self) -> str:
        said = b""
        with contextlib.suppress(OSError):  # EIO: the last holder of the other end is gone
            while True:
                said += os.read(self._ours, 65536)
        return said.decode(errors="backslashreplace").replace("\r\n", "\n")


def _below(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        yield path
        if path.is_dir():
            yield from _below(path)


def _under_umask_and_sealed(seen: Seen) -> Seen:
    """What torchrun's user would have seen had he set securerun's umask, and sealed his logs, himself."""
    return Seen(
        seen.status,
        seen.output,
        seen.errors,
        {
            name: Entry(f"{int(entry.mode, 8) & ~LEAST & _seal(name):04o}", _of_processes_under_umask(entry.content))
            for name, entry in seen.files.items()
        },
    )


def _but_for_a_namespace(seen: Seen) -> Seen:
    """What was seen without what a user namespace of one's own is: root's capabilities go, and it has a number."""
    return Seen(
        seen.status,
        seen.output,
        seen.errors,
        {name: Entry(entry.mode, _without_namespace(entry.content)) for name, entry in seen.files.items()},
    )


def _without_namespace(content: object) -> object:
    if not isinstance(content, dict):
        return content
    plain = {
        key: _without_namespace(item)
        for key, item in content.items()
        if not (key == "user" and str(item).startswith("user:[")) and key not in _CAPABILITIES
    }
    launcher = plain.get("launcher")
    if isinstance(launcher, dict):
        launcher.pop("timerslack_ns")  # of another process, which CAP_SYS_NICE shows
    return plain


def _seal(name: str) -> int:
    """The bits that a file of this name may have: one that is a log, below `--log-dir logs`, has been finished."""
    return row(Kind.ARCHIVED_LOG).file if _LOG.fullmatch(name) else 0o7777


def _of_processes_under_umask(content: object) -> object:
    if isinstance(content, list):
        return [_of_processes_under_umask(item) for item in content]
    if isinstance(content, dict):
        return {
            key: f"{int(item, 8) | LEAST:04o}" if key == "Umask" else _of_processes_under_umask(item)
            for key, item in content.items()
        }
    return content
