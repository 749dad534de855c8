"""Where the kill matrix takes place: three hosts, and tests/ground/light_job.py on one of them, with its guards."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Any

from checkout import COMMANDS, GROUND
from containers import READ_ONLY_CGROUPS
from hosts import NAMESPACES, RECORDS, Endpoint, Host, Network, cgroup2_mount, is_alive
from kill_cells import PROTECTIONS
from probe import reach
from process_table import signal_if

# At these marks the light job waits for an answer.
QUESTIONS = ("before policy", "guarded", "rendezvous", "training")
LIGHT_JOB = GROUND / "light_job.py"
GRACE_SECONDS = 0.5
# A launch takes a fraction of a second on an idle machine; this is for one that runs other tests as well.
PATIENCE_SECONDS = 20.0
TAKEN_OVER = "another has taken over"

_SCOPES = dict(zip(PROTECTIONS, ("auto", "ports", "auto", "auto")))
# What of a launch the key is made of, beside its file.
_MEETING = {"MASTER_PORT": "29500"}
_SECRETS = Path("/run/securerun-jobs")
_WITHOUT_CGROUP = ("unshare", "--mount", "sh", "-ec", f'{READ_ONLY_CGROUPS}; exec "$@"')
_REAP = (
    "from securerun.guard import reaper, run_directory\n"
    "with run_directory.host_lock() as directory:\n"
    "    print(*reaper.reap_all(directory, 0), sep='\\n')"
)


class Violation(AssertionError):
    """A cell that was not as it must be."""


def require(condition: bool, words: str) -> None:
    if not condition:
        raise Violation(words)


class Ground:
    """Three hosts, and what the one that runs the jobs looks like without any."""

    def __init__(self, network: Network, *, legacy: bool) -> None:
        self.node, self.peer, self.stranger = network
        self.network = network
        self.legacy = legacy
        self.cgroups: set[Path] = set()
        if legacy:
            # A look at the legacy tables registers them, and that is not to count as left behind.
            for command in ("iptables-legacy", "ip6tables-legacy"):
                self.node.run([command, "-S"], check=True)
        self.before = self.look()

    def look(self) -> dict[str, str]:
        return self.node.snapshot(legacy=self.legacy)

    def has_chains(self) -> bool:
        """Whether there are rules that were not there before; ports are reserved with any backend."""
        return any(text != self.before[tool] for tool, text in self.look().items() if tool != "reserved ports")

    def guards(self) -> set[int]:
        """All guards that run on the node, whoever started them."""
        return {pid for pid, command in self.node.processes().items() if "securerun.guard.server" in command}

    def reap(self) -> list[str]:
        """What the next run does before it begins; what it says of runs that it leaves, also of other grounds'."""
        return self.node.run([sys.executable, "-c", _REAP], timeout=60, check=True).stdout.splitlines()


class LightJob:
    """tests/ground/light_job.py on a ground's node: what it says, who belongs to it, and the end of all of it."""

    def __init__(
        self, ground: Ground, backend: str, place: Path, *, protection: str = "shield", naked: bool = False
    ) -> None:
        self.node = ground.node
        self.run_id = secrets.token_hex(6)
        self.has_cgroup = protection != "nocgroup"
        self._key: Path | None = None
        way_in = ("--peers", ",".join(ground.peer.addresses))
        if protection == "key":
            self._key = place / "key"
            self._key.touch(0o600)
            self._key.write_text(secrets.token_hex(32))
            way_in = ("--key", str(self._key))
        self.marks: list[str] = []
        self.children: dict[str, int] = {}
        self.pids: set[int] = set()
        self.ports: set[int] = set()
        self.port_of: dict[int, int] = {}
        self.lost: int | None = None  # the child that nobody knows of any more
        self.news: list[str] = []
        self.guarded_at: list[float] = []
        # When somebody was killed, and when another run came after it.
        self.struck = self.followed = math.inf
        self.question: str | None = None
        self.guards: set[int] = set()
        self._news_came = threading.Condition()
        self._speaks = True
        fifo = place / "lifeline"
        os.mkfifo(fifo)
        self._lifeline: int | None = os.open(fifo, os.O_RDWR)
        self._errors = (place / "errors").open("w+")
        self.launcher = self.node.popen(
            [
                *(() if self.has_cgroup else (*_WITHOUT_CGROUP, str(cgroup2_mount()))),
                *(sys.executable, LIGHT_JOB, "--run-id", self.run_id, "--lifeline", fifo),
                *(*way_in, "--firewall", backend),
                *("--scope", _SCOPES[protection], "--grace", str(GRACE_SECONDS), *(["--naked"] if naked else [])),
            ],
            stdin=-1,
            stderr=self._errors,
            env=_MEETING,
        )
        assert self.launcher.stdin is not None and self.launcher.stdout is not None
        self._orders: IO[str] = self.launcher.stdin
        self._output: IO[str] = self.launcher.stdout
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.cgroup = _cgroup_of_tester() / f"securerun-{self.run_id}"
        ground.cgroups.add(self.cgroup)

    def __enter__(self) -> LightJob:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened, nothing of the job runs on: its children end with the fifo, its guard with all of them."""
        self.let_go()
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        with contextlib.suppress(ProcessLookupError):
            send(self.node, self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()
        self._listener.join(timeout=PATIENCE_SECONDS)
        self._errors.close()

    def let_go(self) -> None:
        """Let the children end that nobody else ends."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def tell(self, order: str) -> None:
        """Answer the launcher's last question; it may be gone."""
        self.question = None
        with contextlib.suppress(BrokenPipeError):
            print(order, file=self._orders, flush=True)

    def wait_for(self, mark: str) -> None:
        """Wait until the launcher has said `mark`. Raises Violation if it does not."""
        with self._news_came:
            self._news_came.wait_for(lambda: mark in self.marks or not self._speaks, timeout=PATIENCE_SECONDS)
        require(mark in self.marks, f"the launcher never came to {mark!r}: {self.errors()}")

    def reach_as_peer(self, ground: Ground, targets: set[Endpoint]) -> dict[Endpoint, bool]:
        """For each address and port, whether a process of the job on another host connects: by a tag where it has a
        key."""
        if self._key is None:
            return reach(ground.peer, targets)
        around = (str(COMMANDS / "securerunctl"), "exec", "--key", str(self._key), "--")
        return reach(ground.peer, targets, around=around, env=_MEETING)

    def has_ended(self) -> bool:
        return self.launcher.poll() is not None

    def is_over(self) -> bool:
        """Whether the last process of the job has gone."""
        if not self.has_ended() or any(is_alive(pid) for pid in tuple(self.pids)):
            return False
        if not self.has_cgroup:
            return not self.living()
        with contextlib.suppress(OSError):
            return "populated 0" in (self.cgroup / "cgroup.events").read_text()
        return True

    def members(self) -> set[int]:
        """Who is in the job's cgroup; nobody before it is there."""
        with contextlib.suppress(OSError):
            return {int(line) for line in (self.cgroup / "cgroup.procs").read_text().split()}
        return set()

    def living(self) -> dict[int, str]:
        """Those of the job's host who are no guard and no probe, by pid, with their command."""
        return {pid: command for pid, command in self.node.processes().items() if LIGHT_JOB.name in command}

    def has_begun_to_be_guarded(self) -> bool:
        """Whether its first layer is being installed: the cgroup, and without one the port chains."""
        return (self.cgroup if self.has_cgroup else RECORDS / f"{self.run_id}.json").exists()

    def guarded_after(self, moment: float) -> float:
        """When it was guarded for the first time after a moment of the monotonic clock; infinity for never again."""
        return min((at for at in self.guarded_at if at > moment), default=math.inf)

    def record(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError):
            document: dict[str, Any] = json.loads((RECORDS / f"{self.run_id}.json").read_text())
            return document
        return None

    def layers(self) -> set[str]:
        """The layers that the record names, while the guard that it names lives."""
        record = self.record()
        is_held = record is not None and is_alive(record["guard"])
        return {layer["backend"] for layer in record["layers"]} if record and is_held else set()

    def recorded_guard(self) -> int | None:
        """The guard that the record names."""
        record = self.record()
        if record is None:
            return None
        self.guards.add(record["guard"])
        return int(record["guard"])

    def remains(self) -> list[str]:
        """The record, half-written ones too, the cgroup, and what has the secret, as far as they are there."""
        of_run = (RECORDS / f"{self.run_id}.json", RECORDS / f".{self.run_id}.json.partial", _SECRETS / self.run_id)
        names = (self.cgroup, *of_run)
        left = [str(name) for name in names if name.exists()]
        return left + [f"guard {pid}" for pid in self.guards if is_alive(pid)]

    def errors(self) -> str:
        self._errors.seek(0)
        return f"{self._errors.read().strip() or 'no word'} (status {self.launcher.poll()}, news {self.news})"

    def _listen(self) -> None:
        for line in self._output:
            said = json.loads(line)
            with self._news_came:
                if said.get("mark") == "guarded" or TAKEN_OVER in said.get("news", ""):
                    self.guarded_at.append(said["at"])
                if "mark" in said:
                    self.marks.append(said["mark"])
                    self.question = said["mark"] if said["mark"] in QUESTIONS else None
                elif "child" in said:
                    self.children[said["child"]] = said["pid"]
                    self.pids.add(said["pid"])
                    self.ports.add(said["port"])
                    self.port_of[said["pid"]] = said["port"]
                else:
                    self.news.append(said["news"])
                self._news_came.notify_all()
        with self._news_came:
            self._speaks = False
            self._news_came.notify_all()


def send(host: Host, pid: int, number: signal.Signals) -> None:
    """Send a signal to `pid` if it runs in `host`. Raises ProcessLookupError if it is gone."""
    signal_if(pid, number, lambda: _is_in(host, pid))


def _is_in(host: Host, pid: int) -> bool:
    try:
        there, wanted = Path(f"/proc/{pid}/ns/net").stat(), (NAMESPACES / host.namespace).stat()
    except OSError:
        return False  # it has ended
    return (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino)


def _cgroup_of_tester() -> Path:
    """Where a job of ours gets its cgroup: below the one that we are in."""
    mount = cgroup2_mount()
    if mount is None:
        raise RuntimeError("no cgroup version 2 is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return mount / next(line[len("0::/") :] for line in lines if line.startswith("0::"))
