"""Whatever dies, nothing leaks and nothing opens: a spread of ground/kill_matrix.py, and real jobs that are killed.

scripts/kill-matrix.sh runs all cells of the matrix.
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jobs
import kernel
import pytest
from gains import Deaf, gains
from hosts import Network, eventually, finish, is_alive, machine_snapshot
from kill_cells import (
    BACKENDS,
    MOMENTS,
    PROTECTIONS,
    SIGNALS,
    VICTIMS,
    WITHOUT_A_SHIELD,
    Cell,
    all_cells,
    parse_cell,
)
from kill_ground import GRACE_SECONDS, TAKEN_OVER, Ground, LightJob, send
from kill_matrix import CLEAN_SECONDS, Figures, control, run_cell
from probe import Probe, reach
from process_table import name_of

from securerun.guard import records, run_directory

SEED = 0
# torch's own start, on a machine that does something else as well.
LAUNCH_SECONDS = 60.0
# A job that meets on gloo, says so by a file for each rank, and waits to be told to end.
WAITING_JOB = """
import pathlib, sys, time, torch, torch.distributed as dist
place = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
(place / f"trained {dist.get_rank()}").touch()
while not (place / "go on").exists():
    time.sleep(0.05)
dist.barrier()
dist.destroy_process_group()
"""


def spread() -> Iterator[Cell]:
    """Every victim at every moment, signals and backends in turn; and guards that die, at every moment."""
    for number, (moment, victim) in enumerate(itertools.product(MOMENTS, VICTIMS)):
        # 6 victims and 6 signals: shifted by one a moment, so that each victim meets each signal.
        yield Cell(victim, moment, list(SIGNALS)[(number + number // 6) % 6], BACKENDS[(number + number // 4) % 4])
    for number, (victim, moment) in enumerate(itertools.product(("guard", "both"), MOMENTS)):
        yield Cell(victim, moment, ("KILL", "STOPKILL")[number % 2], BACKENDS[number % 4])
    yield from spread_without_a_shield()
    yield from spread_with_a_key()


def spread_without_a_shield() -> Iterator[Cell]:
    """Likewise, with a cgroup and without one in turn; and guards that die, at every moment, with and without one."""
    bare = WITHOUT_A_SHIELD
    for number, (moment, victim) in enumerate(itertools.product(MOMENTS, VICTIMS)):
        protection = bare[(number + number // 12) % 2] if victim != "cgroup" else "ports"
        yield Cell(victim, moment, list(SIGNALS)[(number + number // 6) % 6], BACKENDS[number % 3], protection)
    for number, (moment, victim, protection) in enumerate(itertools.product(MOMENTS, ("guard", "both"), bare)):
        yield Cell(victim, moment, ("KILL", "STOPKILL")[number // 2 % 2], BACKENDS[number % 3], protection)


def spread_with_a_key() -> Iterator[Cell]:
    """Guards that die, at every moment; and every other victim at every second moment."""
    for number, (moment, victim) in enumerate(itertools.product(MOMENTS, ("guard", "both"))):
        yield Cell(victim, moment, ("KILL", "STOPKILL")[number // 2 % 2], BACKENDS[number % 4], "key")
    others = [victim for victim in VICTIMS if victim not in ("guard", "both")]
    for number, (moment, victim) in enumerate(itertools.product(MOMENTS, others)):
        if (number + number // 4) % 2:
            yield Cell(victim, moment, list(SIGNALS)[number // 2 % 6], BACKENDS[number // 3 % 4], "key")


@pytest.mark.parametrize("cell", [cell for cell in dict.fromkeys(spread()) if cell.exists], ids=str)
def test_nothing_leaks_and_nothing_opens(network: Network, cell: Cell) -> None:
    if cell.has_shield and cell.backend == "nftables":
        kernel.require(kernel.OWNED_TABLES)
    if cell.has_key:
        kernel.require(kernel.TAGS)
    figures = Figures()
    run_cell(Ground(network, legacy=cell.backend == "legacy"), cell, random.Random(f"{SEED}/{cell}"), figures)  # noqa: S311
    assert figures.forbidden == figures.leaks == 0


def test_without_a_lease_the_stranger_reaches_every_port_of_the_light_job(network: Network) -> None:
    assert control(Ground(network, legacy=False)) >= 10


def test_the_spread_has_every_victim_moment_signal_backend_and_protection() -> None:
    for position, values in enumerate((VICTIMS, MOMENTS, SIGNALS, BACKENDS, PROTECTIONS)):
        assert {str(cell).split("/")[position] for cell in spread() if cell.exists} == set(values)


def test_the_matrix_has_every_combination_that_there_is() -> None:
    """Without a shield what ends no guard takes the three backends in turn: 4 signals once, and 2 under each.

    With a key all take the four in turn, and those that end a guard meet each: 2 victims at 7 moments by 2 signals.
    """
    cells = all_cells()
    places = 6 * 7 - 3
    shielded, with_a_cgroup, without_one = places * 6 * 4, places * (4 + 2 * 3), (places - 7) * (4 + 2 * 3)
    by_key = places * 6 + 3 * 2 * 7 * 2
    assert len(set(cells)) == len(cells) == shielded + with_a_cgroup + without_one + by_key
    assert all(parse_cell(str(cell)) == cell for cell in cells)
    assert {cell.backend for cell in cells if not cell.has_shield and not cell.ends_a_guard} == set(BACKENDS[:3])
    assert {cell.backend for cell in cells if cell.has_key and not cell.ends_a_guard} == set(BACKENDS)


class Tried:
    """A stranger's attempts, written down by hand, in seconds."""

    def __init__(self, since: float, connected: list[float], dropped: list[float], *, port: int = 40000) -> None:
        endpoint = ("10.77.0.1", port)
        self.appeared = {endpoint: [since]}
        self.connections = [(endpoint, begun) for begun in connected]
        self.dropped = {endpoint: dropped}


@pytest.mark.parametrize(
    ("tried", "deaf", "wrong"),
    [
        pytest.param(Tried(10, [10.1, 10.9], []), Deaf(), 0, id="open for a moment"),
        pytest.param(Tried(10, [10.1, 11.1, 11.2], []), Deaf(), 2, id="open for too long"),
        pytest.param(Tried(10, [10.1, 10.3], [10.2]), Deaf(), 1, id="closed and opened again"),
        pytest.param(Tried(10, [10.1], [], port=29500), Deaf(), 1, id="planned"),
        pytest.param(Tried(10, [10.1], [], port=60015), Deaf(10, 12), 1, id="planned, without a guard"),
        pytest.param(Tried(10, [10.1, 12.9], []), Deaf(10.5, 12), 0, id="until another guard has seen it"),
        pytest.param(Tried(10, [10.1, 13.1], []), Deaf(10.5, 12), 1, id="another guard does not see it"),
        pytest.param(Tried(10, [12.5], []), Deaf(11.5, 12), 1, id="seen before the guard died"),
        pytest.param(Tried(10, [10.1, 99], []), Deaf(10.5), 0, id="no guard ever again"),
        pytest.param(Tried(10, [11.5], []), Deaf(8, 9), 1, id="after another guard has taken over"),
    ],
)
def test_a_stranger_gets_no_more_than_what_is_said_of_ports_without_a_shield(
    tried: Tried, deaf: Deaf, wrong: int
) -> None:
    assert [gain.is_too_much for gain in gains(tried, deaf)].count(True) == wrong


@pytest.mark.parametrize("protection", WITHOUT_A_SHIELD)
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_guards_that_are_killed_one_after_the_other_open_nothing_again(
    network: Network, tmp_path: Path, backend: str, protection: str
) -> None:
    """Without a shield: what one has closed stays closed, planned or not, under the next and the one after it."""
    ground = Ground(network, legacy=backend == "legacy")
    with (
        LightJob(ground, backend, tmp_path, protection=protection) as job,
        Probe(ground.stranger, ground.node) as probe,
    ):
        for mark in ("before policy", "guarded", "rendezvous"):
            job.wait_for(mark)
            job.tell("go")
        job.wait_for("training")
        targets = ground.node.targets()
        assert eventually(lambda: not any(reach(ground.stranger, targets).values()))
        closed = time.monotonic()
        for number in range(3):
            guard = job.recorded_guard()
            assert guard is not None
            send(ground.node, guard, signal.SIGKILL)
            assert eventually(lambda: sum(TAKEN_OVER in line for line in job.news) > number), job.errors()  # noqa: B023
            assert not any(reach(ground.stranger, targets).values())
            assert all(reach(ground.peer, targets).values())
        job.tell("end")
        assert eventually(job.has_ended) and job.launcher.returncode == 0, job.errors()
        job.let_go()
        assert eventually(lambda: not job.remains() and ground.look() == ground.before)
    opened = [f"{endpoint}, {begun - closed:.2f} s later" for endpoint, begun in probe.connections if begun > closed]
    assert not opened


class RealJob:
    """Two workers of torchrun behind securerun, on the ground's node, met and waiting."""

    def __init__(self, ground: Ground, place: Path, *, launcher: tuple[str, ...] = (jobs.SECURERUN,)) -> None:
        script = place / "wait.py"
        script.write_text(WAITING_JOB)
        self.ground = ground
        self.node = ground.node
        self.place = place
        self.launcher: subprocess.Popen[str] = self.node.popen(
            [*launcher, "--grace", str(GRACE_SECONDS), "--nproc-per-node", "2", "--", script, place]
        )
        met = eventually(lambda: len(list(place.glob("trained *"))) == 2 or self._has_ended(), seconds=LAUNCH_SECONDS)
        assert met and not self._has_ended(), finish(self.launcher, timeout=0)
        self.guards = ground.guards()
        assert len(self.guards) == 1
        (self.run_id,) = self._runs()

    def of_the_job(self) -> dict[int, str]:
        """What runs on the node but guards and the stranger's probe, by pid, with the command."""
        guards = self.ground.guards()
        found = self.node.processes()
        return {pid: command for pid, command in found.items() if pid not in guards and "probe.py" not in command}

    def workers(self) -> set[int]:
        return {pid for pid, command in self.of_the_job().items() if str(self.place / "wait.py") in command} - {
            self.launcher.pid
        }

    def remains(self) -> list[str]:
        """The guards, the record and the cgroup, as far as they are there."""
        cgroups = machine_snapshot().cgroups or ()
        left = [name for name in cgroups if name.endswith(f"securerun-{self.run_id}")]
        return [*left, *(f"guard {pid}" for pid in self.ground.guards()), *(f"record {run}" for run in self._runs())]

    def kill(self, *pids: int) -> None:
        for pid in pids:
            send(self.node, pid, signal.SIGKILL)

    def end(self) -> subprocess.CompletedProcess[str]:
        (self.place / "go on").touch()
        return finish(self.launcher)

    def _runs(self) -> list[str]:
        """The runs of this launcher that have a record."""
        with run_directory.host_lock() as directory:
            found = records.read_all(directory)
        return [record.run_id for record in found if record.launcher == self.launcher.pid]

    def _has_ended(self) -> bool:
        return self.launcher.poll() is not None


@pytest.fixture
def ground(network: Network) -> Ground:
    return Ground(network, legacy=False)


def _require_gone_and_clean(job: RealJob, *, within: float) -> None:
    assert eventually(lambda: not job.of_the_job(), seconds=within), job.of_the_job()
    if not eventually(lambda: not job.remains() and job.ground.look() == job.ground.before, seconds=CLEAN_SECONDS):
        assert not job.remains()
        assert job.ground.look() == job.ground.before


def test_a_killed_launcher_leaves_no_worker_behind(ground: Ground, tmp_path: Path) -> None:
    with Probe(ground.stranger, ground.node) as probe:
        job = RealJob(ground, tmp_path)
        assert len(job.workers()) == 2
        job.kill(job.launcher.pid)
        _require_gone_and_clean(job, within=GRACE_SECONDS + CLEAN_SECONDS)
    assert finish(job.launcher).returncode == -signal.SIGKILL
    assert probe.reached == set() and probe.tried


def test_a_killed_guard_is_replaced_and_the_job_ends_well(ground: Ground, tmp_path: Path) -> None:
    with Probe(ground.stranger, ground.node) as probe:
        job = RealJob(ground, tmp_path)
        job.kill(*job.guards)
        assert eventually(lambda: any(is_alive(pid) for pid in ground.guards() - job.guards))
        assert eventually(lambda: ground.look() != ground.before)
        targets = ground.node.targets()
        assert targets and not any(reach(ground.stranger, targets).values())
        done = job.end()
        _require_gone_and_clean(job, within=CLEAN_SECONDS)
    assert done.returncode == 0, done
    assert "the guard died; another has taken over" in done.stderr
    assert probe.reached == set() and probe.tried


def test_pkill_9_python_ends_the_job_but_not_its_guard(ground: Ground, tmp_path: Path) -> None:
    with Probe(ground.stranger, ground.node) as probe:
        job = RealJob(ground, tmp_path, launcher=(sys.executable, "-m", "securerun"))
        named_python = {
            pid for pid in job.of_the_job() if name_of(pid).startswith("python") or name_of(pid) == "pt_elastic"
        }
        assert {job.launcher.pid, *job.workers()} <= named_python
        assert {name_of(pid) for pid in job.guards} == {"securerun-guard"}
        job.kill(*named_python)
        _require_gone_and_clean(job, within=GRACE_SECONDS + CLEAN_SECONDS)
    assert finish(job.launcher).returncode == -signal.SIGKILL
    assert probe.reached == set() and probe.tried


def test_a_killed_worker_ends_the_job_as_under_torchrun(ground: Ground, tmp_path: Path) -> None:
    with Probe(ground.stranger, ground.node) as probe:
        job = RealJob(ground, tmp_path)
        job.kill(min(job.workers()))
        done = finish(job.launcher)
        _require_gone_and_clean(job, within=GRACE_SECONDS + CLEAN_SECONDS)
    assert done.returncode == 1, done
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert probe.reached == set() and probe.tried


def test_after_launcher_and_guard_were_killed_the_next_run_removes_what_they_left(
    ground: Ground, tmp_path: Path
) -> None:
    with Probe(ground.stranger, ground.node) as probe:
        job = RealJob(ground, tmp_path)
        workers = job.workers()
        job.kill(*job.guards, job.launcher.pid)
        # Nobody is left to end them, but the shield is theirs: it needs no process.
        targets = ground.node.targets()
        assert not any(reach(ground.stranger, targets).values())
        job.kill(*(pid for pid in workers if is_alive(pid)))
        assert eventually(lambda: not job.of_the_job()), job.of_the_job()
        assert ground.look() != ground.before
        done = ground.node.run([jobs.SECURERUN, "--no-python", "true"])
        assert done.returncode == 0, done
        _require_gone_and_clean(job, within=CLEAN_SECONDS)
    finish(job.launcher)
    assert probe.reached == set() and probe.tried
