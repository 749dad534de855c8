"""Whatever dies, nothing leaks and nothing opens: every victim at every moment by every signal under every backend.

    kill_matrix.py                                          all cells
    kill_matrix.py --only 'guard/training/KILL/iptables'    one cell, or those that a pattern with * and ? matches
    kill_matrix.py --list | --seed N | --repeat N | --parallel N

In each cell tests/ground/light_job.py runs on a host with a lease. A stranger tries every port of it from before the
start until after the end, and must never get in. Then somebody dies:

    victim   launcher; guard; both at once; one worker; the launcher's process group; all in the job's cgroup
    moment   before the policy is sent; while the layers are installed; guarded, before anything listens; in
             rendezvous; in training; in a restart; in release
    signal   TERM, INT, HUP, QUIT, KILL, STOP followed by KILL

Afterwards the job goes on guarded if only its guard was meant; otherwise it is over after its grace period. Within
2 s of its last process' end the host is as it was before: no rule, no cgroup, no record, no guard. Only where
launcher and guard were both killed may something stay: then the next run, or the reaper, removes it.

Needs root. Prints figures; ends with status 1 if a cell was not as it must be, with how to run that one again.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import itertools
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from checkout import GROUND
from hosts import NAMESPACES, RECORDS, Host, Network, cgroup2_mount, eventually, hear_signals, is_alive
from probe import Probe, reach

VICTIMS = ("launcher", "guard", "both", "worker", "group", "cgroup")
MOMENTS = ("before", "layers", "guarded", "rendezvous", "training", "restart", "release")
SIGNALS: dict[str, tuple[signal.Signals, ...]] = {
    "TERM": (signal.SIGTERM,),
    "INT": (signal.SIGINT,),
    "HUP": (signal.SIGHUP,),
    "QUIT": (signal.SIGQUIT,),
    "KILL": (signal.SIGKILL,),
    "STOPKILL": (signal.SIGSTOP, signal.SIGKILL),
}
BACKENDS = ("iptables", "nftables", "legacy", "off")
WITHOUT_WORKERS = ("before", "layers", "guarded")
# At these marks the light job waits for an answer.
QUESTIONS = ("before policy", "guarded", "rendezvous", "training")

LIGHT_JOB = GROUND / "light_job.py"
CHILDREN = 6  # of tests/ground/light_job.py
CLEAN_SECONDS = 2.0
GRACE_SECONDS = 0.5
# A launch takes a fraction of a second on an idle machine; this is for one that runs other tests as well.
PATIENCE_SECONDS = 20.0
# What a guard waits before it asks a failed job's processes to end, and what ending them may take.
ENDING_SECONDS = 2.0
# How long the layers take to be installed, and a restart and a release last, so that a blow lands anywhere in them.
_INSTALL_SECONDS, _RESTART_SECONDS, _RELEASE_SECONDS = 0.15, 0.1, 0.01

_REAP = (
    "from securerun.guard import reaper, run_directory\n"
    "with run_directory.host_lock() as directory:\n"
    "    print(*reaper.reap_all(directory, 0), sep='\\n')"
)


class Violation(AssertionError):
    """A cell that was not as it must be."""


@dataclass(frozen=True)
class Cell:
    """Who dies, when, how, and under which port chains."""

    victim: str
    moment: str
    signal: str
    backend: str

    def __str__(self) -> str:
        return f"{self.victim}/{self.moment}/{self.signal}/{self.backend}"

    @property
    def exists(self) -> bool:
        """There is no worker to kill before the first one has started."""
        return self.victim != "worker" or self.moment not in WITHOUT_WORKERS

    @property
    def ends_a_guard(self) -> bool:
        """A guard ignores what a terminal or a batch system sends."""
        return self.victim in ("guard", "both") and self.signal in ("KILL", "STOPKILL")

    @property
    def may_leave_something(self) -> bool:
        """Launcher and guard are both gone: nobody is left to clean up before the next run comes."""
        return self.ends_a_guard and (self.victim == "both" or self.moment == "release")


def all_cells() -> list[Cell]:
    cells = itertools.starmap(Cell, itertools.product(VICTIMS, MOMENTS, SIGNALS, BACKENDS))
    return [cell for cell in cells if cell.exists]


def parse_cell(text: str) -> Cell:
    return Cell(*text.split("/"))


@dataclass
class Figures:
    """What happened in one cell or in many."""

    cells: int = 0
    attempts: int = 0
    connections: int = 0
    leaks: int = 0
    reaped: int = 0
    slowest: float = 0.0

    def add(self, other: Figures) -> None:
        self.cells += other.cells
        self.attempts += other.attempts
        self.connections += other.connections
        self.leaks += other.leaks
        self.reaped += other.reaped
        self.slowest = max(self.slowest, other.slowest)


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

    def reap(self) -> str:
        """What the next run does before it begins."""
        return self.node.run([sys.executable, "-c", _REAP], timeout=60, check=True).stdout.strip()


class LightJob:
    """tests/ground/light_job.py on a ground's node: what it says, who belongs to it, and the end of all of it."""

    def __init__(self, ground: Ground, backend: str, place: Path, *, naked: bool = False) -> None:
        self.node = ground.node
        self.run_id = secrets.token_hex(6)
        self.marks: list[str] = []
        self.children: dict[str, int] = {}
        self.pids: set[int] = set()
        self.ports: set[int] = set()
        self.news: list[str] = []
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
                *(sys.executable, LIGHT_JOB, "--run-id", self.run_id, "--lifeline", fifo),
                *("--peers", ",".join(ground.peer.addresses), "--firewall", backend),
                *("--grace", str(GRACE_SECONDS), *(["--naked"] if naked else [])),
            ],
            stdin=-1,
            stderr=self._errors,
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
        _require(mark in self.marks, f"the launcher never came to {mark!r}: {self.errors()}")

    def has_ended(self) -> bool:
        return self.launcher.poll() is not None

    def is_over(self) -> bool:
        """Whether the last process of the job has gone."""
        if not self.has_ended() or any(is_alive(pid) for pid in tuple(self.pids)):
            return False
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
        """The record, half-written ones too, and the cgroup, as far as they are there."""
        names = (self.cgroup, RECORDS / f"{self.run_id}.json", RECORDS / f".{self.run_id}.json.partial")
        left = [str(name) for name in names if name.exists()]
        return left + [f"guard {pid}" for pid in self.guards if is_alive(pid)]

    def errors(self) -> str:
        self._errors.seek(0)
        return f"{self._errors.read().strip() or 'no word'} (status {self.launcher.poll()}, news {self.news})"

    def _listen(self) -> None:
        for line in self._output:
            said = json.loads(line)
            with self._news_came:
                if "mark" in said:
                    self.marks.append(said["mark"])
                    self.question = said["mark"] if said["mark"] in QUESTIONS else None
                elif "child" in said:
                    self.children[said["child"]] = said["pid"]
                    self.pids.add(said["pid"])
                    self.ports.add(said["port"])
                else:
                    self.news.append(said["news"])
                self._news_came.notify_all()
        with self._news_came:
            self._speaks = False
            self._news_came.notify_all()


def run_cell(ground: Ground, cell: Cell, chance: random.Random, figures: Figures) -> None:
    """One cell; adds to the figures. Raises Violation if anything is not as it must be."""
    with tempfile.TemporaryDirectory(prefix="sr-kill-") as place, LightJob(ground, cell.backend, Path(place)) as job:
        probe = Probe(ground.stranger, ground.node)
        try:
            with probe:
                _come_to_the_moment(job, cell, chance, probe)
                strike(job, ground, cell, chance, probe)
                if cell.victim == "guard" and cell.moment != "release":
                    _require_guarded(job, ground, cell)
                    _end_well(job)
                _see_it_end(job, ground, cell, chance, probe, figures)
        finally:
            figures.attempts += _attempts(probe)
            figures.connections += sum(results["connected"] for results in probe.results.values())
            # Whatever else was wrong, this comes first.
            _require(not probe.reached, f"a stranger got in: {sorted(probe.reached)}; {job.errors()}")
        _require(
            eventually(lambda: not ground.node.processes(), seconds=CLEAN_SECONDS),
            f"still running on the host: {ground.node.processes()}",
        )


def _come_to_the_moment(job: LightJob, cell: Cell, chance: random.Random, probe: Probe) -> None:
    """Bring the job to the moment of the cell; inside the short ones, to a random place."""
    job.wait_for("before policy")
    if cell.moment == "before":
        time.sleep(chance.uniform(0, 0.05))  # the guard's interpreter is still coming up, or waits already
        return
    job.tell("go")
    if cell.moment == "layers":
        _wait_for_the_cgroup(job)
        time.sleep(chance.choice((0, chance.uniform(0, _INSTALL_SECONDS))))
        return
    for mark in ("guarded", "rendezvous", "training"):
        job.wait_for(mark)
        if mark == "training" or cell.moment == "training":
            _wait_until_seen(job, probe)
        if mark == cell.moment:
            return
        job.tell({"restart": "restart", "release": "end"}[cell.moment] if mark == "training" else "go")
    job.wait_for(cell.moment)
    time.sleep(chance.uniform(0, _RESTART_SECONDS if cell.moment == "restart" else _RELEASE_SECONDS))


def _wait_for_the_cgroup(job: LightJob) -> None:
    """The cgroup is the first layer's place: chains are not there yet. Looked for as often as can be."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not job.cgroup.exists():
        _require(time.monotonic() < deadline and not job.has_ended(), f"no cgroup appears: {job.errors()}")
        time.sleep(0.0002)


def _wait_until_seen(job: LightJob, probe: Probe) -> None:
    """The stranger knows every port that the job has opened so far, and has begun to try it."""
    _require(
        eventually(lambda: job.ports <= {port for _, port in probe.seen}, seconds=PATIENCE_SECONDS),
        f"the stranger's probe sees {sorted(probe.seen)} of {sorted(job.ports)}",
    )


def strike(job: LightJob, ground: Ground, cell: Cell, chance: random.Random, probe: Probe) -> None:
    """Kill whom the cell names."""
    job.guards |= ground.guards()
    for number in SIGNALS[cell.signal]:
        if cell.victim == "group":
            # The launcher leads it, and while it has not been waited for the number is its own.
            if not job.has_ended():
                os.killpg(job.launcher.pid, number)
        else:
            for pid in _victims(job, cell, chance):
                with contextlib.suppress(ProcessLookupError):
                    send(job.node, pid, number)
        if number is signal.SIGSTOP:
            _let_the_stranger_try(probe, chance)
    if cell.victim == "cgroup" and cell.signal in ("KILL", "STOPKILL"):
        with contextlib.suppress(OSError):  # as batch systems do it: what is being forked too
            (job.cgroup / "cgroup.kill").write_text("1")


def _victims(job: LightJob, cell: Cell, chance: random.Random) -> list[int]:
    if cell.victim == "worker":
        return [job.children["planned"]]
    if cell.victim == "cgroup":
        return sorted(job.members() | {job.launcher.pid})
    victims = {"launcher": [job.launcher.pid], "guard": [], "both": [job.launcher.pid]}[cell.victim]
    if cell.victim != "launcher":
        victims += [pid for pid in job.guards if is_alive(pid)]
    chance.shuffle(victims)
    return victims


def _let_the_stranger_try(probe: Probe, chance: random.Random) -> None:
    """While somebody is stopped the stranger tries each port again, to the end of the attempt."""
    if not probe.seen:
        time.sleep(chance.uniform(0.01, 0.1))
        return
    enough = _attempts(probe) + len(probe.seen)
    eventually(lambda: _attempts(probe) >= enough, seconds=1)


def _attempts(probe: Probe) -> int:
    return sum(sum(results.values()) for results in list(probe.results.values()))


def _require_guarded(job: LightJob, ground: Ground, cell: Cell) -> None:
    """Its guard was meant: the job lives on, and behind as much as before."""
    _require(not job.has_ended(), f"the launcher ended with its guard: {job.errors()}")
    if cell.moment in ("before", "layers"):
        if cell.moment == "before":
            job.tell("go")
        job.wait_for("guarded")
    else:
        _require_takeover(job, cell)
    wanted = {"shield", cell.backend} - {"off"}
    # Where the blow landed late, the guard had answered already and another is still at it.
    _require(
        eventually(lambda: job.layers() == wanted and ground.has_chains() == (cell.backend != "off")),
        f"layers that stand: {job.layers()}, chains {[*_differences(ground.before, ground.look())]}; {job.errors()}",
    )
    if cell.moment == "training":
        targets = ground.node.targets()
        _require(len(targets) >= CHILDREN, f"listeners: {targets}")
        _require(all(reach(ground.peer, targets).values()), f"a peer is kept out: {reach(ground.peer, targets)}")


def _require_takeover(job: LightJob, cell: Cell) -> None:
    """A guard that died is replaced, and the job is told; one that was only asked to go stays."""
    met = job.guards.copy()

    def is_guarded() -> bool:
        guard = job.recorded_guard()
        return guard is not None and is_alive(guard) and (guard not in met) == cell.ends_a_guard

    _require(eventually(is_guarded), f"guard {job.recorded_guard()} after {met}: {job.errors()}")
    if cell.ends_a_guard:
        told = eventually(lambda: any("another has taken over" in line for line in job.news))
        _require(told, f"nothing was said of the guard's death: {job.news}")


def _go_on(job: LightJob) -> None:
    """Let the job go on from wherever it is to its end, whichever end that is."""
    while not job.has_ended():
        came = eventually(lambda: job.question is not None or job.has_ended(), seconds=PATIENCE_SECONDS)
        _require(came, f"the launcher neither asks nor ends after {job.marks}: {job.errors()}")
        if job.question is not None:
            job.tell("end" if job.question == "training" else "go")


def _end_well(job: LightJob) -> None:
    _go_on(job)
    _require(job.launcher.returncode == 0, f"the job did not end well: {job.errors()}")


def _see_it_end(
    job: LightJob, ground: Ground, cell: Cell, chance: random.Random, probe: Probe, figures: Figures
) -> None:
    """The job is over when it must be, and the host then as it was before."""
    if cell.victim == "worker" and cell.moment == "restart":
        _go_on(job)  # the one that died may have been ending anyway
    _require(eventually(job.has_ended, seconds=PATIENCE_SECONDS), f"the launcher lives on: {job.errors()}")
    if cell.moment == "release" or job.launcher.returncode == 0 or cell.may_leave_something:
        # What outlives a job that ended well, and what nobody is left to end, stays closed until it ends by itself.
        if not job.is_over():
            _let_the_stranger_try(probe, chance)
        job.let_go()
        _require(eventually(job.is_over, seconds=PATIENCE_SECONDS), f"the children live on: {job.living()}")
    else:
        seconds = GRACE_SECONDS + ENDING_SECONDS
        _require(eventually(job.is_over, seconds=seconds), f"not ended after a failure: {job.living()}")
    ended = time.monotonic()
    if (
        cell.may_leave_something
        and eventually(lambda: not ground.guards(), seconds=CLEAN_SECONDS)
        and _reap_what_was_left(job, ground, cell, chance, figures)
    ):
        ended = time.monotonic()
    _require_clean(job, ground, ended, figures)


def _reap_what_was_left(job: LightJob, ground: Ground, cell: Cell, chance: random.Random, figures: Figures) -> bool:
    """No guard is left to remove what stands: the next run does, or the reaper by itself. Whether it was needed."""
    if not job.remains() and ground.look() == ground.before:
        return False
    figures.reaped += 1
    if chance.random() < 0.75:  # a whole run takes a second
        words = ground.reap()
        _require(not words, f"the reaper gave up: {words}")
        return True
    with (
        tempfile.TemporaryDirectory(prefix="sr-kill-") as place,
        LightJob(ground, cell.backend, Path(place)) as next_run,
    ):
        _end_well(next_run)
        next_run.let_go()
        gone = eventually(lambda: next_run.is_over() and not next_run.remains(), seconds=CLEAN_SECONDS)
        _require(gone, f"left by the next run: {next_run.remains()}")
    return True


def _require_clean(job: LightJob, ground: Ground, ended: float, figures: Figures) -> None:
    """Within 2 s nothing is left of the job."""
    while True:
        figures.slowest = time.monotonic() - ended
        left = [*job.remains(), *(f"guard {pid}" for pid in ground.guards())]
        left = left or list(_differences(ground.before, ground.look()))
        if not left and figures.slowest <= CLEAN_SECONDS:
            return
        if figures.slowest > CLEAN_SECONDS:
            figures.leaks += 1
            raise Violation(f"left after {figures.slowest:.2f} s: {'; '.join(left) or 'no more'}; {job.record()}")
        time.sleep(0.02)


def _differences(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    for tool, text in before.items():
        for line in difflib.unified_diff(text.splitlines(), after[tool].splitlines(), n=0, lineterm=""):
            if not line.startswith(("---", "+++", "@@")):
                yield f"{tool} {line}"


def control(ground: Ground) -> int:
    """The same job and the same stranger without a lease: how often it gets in. Raises Violation if it never does."""
    with (
        tempfile.TemporaryDirectory(prefix="sr-kill-") as place,
        LightJob(ground, "off", Path(place), naked=True) as job,
        Probe(ground.stranger, ground.node) as probe,
    ):
        for mark in ("guarded", "rendezvous"):
            job.wait_for(mark)
            job.tell("go")
        job.wait_for("training")

        def all_are_reached() -> bool:
            return job.ports <= {port for _, port in probe.reached}

        _require(eventually(all_are_reached), f"the stranger's probe reaches {probe.reached} of {job.ports}")
        _end_well(job)
    return sum(results["connected"] for results in probe.results.values())


class Matrix:
    """Cells, each on a ground of whichever thread runs it, and what came of them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.figures = Figures()
        self.failed: list[Cell] = []
        self._grounds: dict[tuple[int, bool], Ground] = {}
        self._change = threading.Lock()

    def run(self, cell: Cell, repeat: int) -> tuple[Figures, str]:
        """Run a cell; its figures, and what was wrong with it."""
        if self._stopped:
            return Figures(), ""
        figures, trouble = Figures(cells=1), ""
        ground = None
        try:
            ground = self._ground(legacy=cell.backend == "legacy")
            run_cell(ground, cell, random.Random(f"{self.seed}/{repeat}/{cell}"), figures)  # noqa: S311
        except Violation as violation:
            trouble = str(violation)
        except Exception:
            trouble = traceback.format_exc()
        if trouble and ground is not None:
            self._give_up(ground)
        with self._change:
            self.figures.add(figures)
            if trouble:
                self.failed.append(cell)
        return figures, trouble

    _stopped = False

    def stop(self) -> None:
        """Begin no further cell."""
        self._stopped = True

    def close(self) -> None:
        """Remove all grounds."""
        for ground in self._grounds.values():
            ground.network.close()

    def _ground(self, *, legacy: bool) -> Ground:
        key = (threading.get_ident(), legacy)
        if key not in self._grounds:
            ground = Ground(Network("node", "peer", "stranger").__enter__(), legacy=legacy)
            with self._change:
                self._grounds[key] = ground
        return self._grounds[key]

    def _give_up(self, ground: Ground) -> None:
        """What a failed cell left must not fail the next one too."""
        with self._change:
            self._grounds = {key: kept for key, kept in self._grounds.items() if kept is not ground}
        with contextlib.suppress(Exception):
            eventually(lambda: not ground.guards(), seconds=CLEAN_SECONDS)
            ground.reap()
        ground.network.close()
        for cgroup in ground.cgroups:
            with contextlib.suppress(OSError):
                cgroup.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    cells = [cell for cell in all_cells() if fnmatch.fnmatchcase(str(cell), options.only)]
    if options.list:
        print(*cells, sep="\n")
        return 0
    if not cells:
        print(f"no cell matches {options.only!r}; --list shows them all", file=sys.stderr)
        return 2
    hear_signals()
    signal.signal(signal.SIGTERM, _unwind)
    sys.setswitchinterval(0.0005)  # blows are to land when they are struck
    begun = time.monotonic()
    print(f"kill matrix: {len(cells)} cells, {options.repeat} times, {options.parallel} at once, seed {options.seed}")
    with Network("node", "peer", "stranger") as network:
        print(f"control: without a lease the stranger made {control(Ground(network, legacy=False))} connections")
    matrix = Matrix(options.seed)
    with contextlib.closing(matrix), ThreadPoolExecutor(options.parallel) as threads:
        try:
            for repeat in range(options.repeat):
                _run_all(matrix, threads, cells, repeat, verbose=options.verbose)
        finally:
            matrix.stop()
    _print_figures(matrix, time.monotonic() - begun)
    return 1 if matrix.failed or matrix.figures.connections or not matrix.figures.attempts else 0


def _run_all(matrix: Matrix, threads: ThreadPoolExecutor, cells: Sequence[Cell], repeat: int, *, verbose: bool) -> None:
    shuffled = random.Random(f"{matrix.seed}/{repeat}").sample(cells, len(cells))  # noqa: S311
    running = {threads.submit(matrix.run, cell, repeat): cell for cell in shuffled}
    for number, future in enumerate(as_completed(running), 1):
        cell, (figures, trouble) = running[future], future.result()
        if trouble:
            print(f"FAILED {cell}: {trouble}")
            print(f"       again: scripts/kill-matrix.sh --seed {matrix.seed} --only '{cell}'", flush=True)
        elif verbose:
            print(f"passed {cell}: {figures.attempts} attempts, clean after {figures.slowest:.2f} s", flush=True)
        if number % 100 == 0:
            print(f"       {number} of {len(cells)} cells", flush=True)


def _print_figures(matrix: Matrix, seconds: float) -> None:
    figures = matrix.figures
    print(
        f"cells {figures.cells}, not as they must be {len(matrix.failed)}; strangers' attempts {figures.attempts}, "
        f"connections made {figures.connections}; leaks {figures.leaks}, left by double kills and reaped "
        f"{figures.reaped}; slowest to be clean {figures.slowest:.2f} s; {seconds:.0f} s in all"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="victim/moment/signal/backend, with * and ?")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="where in a moment a blow lands")
    parser.add_argument("--repeat", type=int, default=1, help="run everything this often (default: 1)")
    parser.add_argument("--parallel", type=int, default=2 * (os.cpu_count() or 1), help="cells at once")
    parser.add_argument("--verbose", action="store_true", help="a line for each cell that passed, too")
    parser.add_argument("--list", action="store_true", help="print the cells and run none")
    return parser.parse_args(arguments)


def _unwind(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _require(condition: bool, words: str) -> None:
    if not condition:
        raise Violation(words)


def send(host: Host, pid: int, number: signal.Signals) -> None:
    """Send a signal to `pid` if it runs in `host`. Raises ProcessLookupError if it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        # Pinned first: between the look and the signal the number may have gone to another process.
        if _is_in(host, pid):
            signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


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


if __name__ == "__main__":
    sys.exit(main())
