"""Whatever dies, nothing leaks and nothing opens: a spread of ground/kill_matrix.py, and real jobs that are killed.

scripts/kill-matrix.sh runs all cells of the matrix.
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from hosts import Network, eventually, finish, is_alive, machine_snapshot
from kill_matrix import (
    BACKENDS,
    CLEAN_SECONDS,
    GRACE_SECONDS,
    MOMENTS,
    SIGNALS,
    VICTIMS,
    Cell,
    Figures,
    Ground,
    all_cells,
    control,
    parse_cell,
    run_cell,
    send,
)
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


@pytest.mark.parametrize("cell", [cell for cell in dict.fromkeys(spread()) if cell.exists], ids=str)
def test_nothing_leaks_and_nothing_opens(network: Network, cell: Cell) -> None:
    figures = Figures()
    run_cell(Ground(network, legacy=cell.backend == "legacy"), cell, random.Random(f"{SEED}/{cell}"), figures)  # noqa: S311
    assert figures.connections == figures.leaks == 0


def test_without_a_lease_the_stranger_reaches_every_port_of_the_light_job(network: Network) -> None:
    assert control(Ground(network, legacy=False)) >= 10


def test_the_spread_has_every_victim_moment_signal_and_backend() -> None:
    for position, values in enumerate((VICTIMS, MOMENTS, SIGNALS, BACKENDS)):
        assert {str(cell).split("/")[position] for cell in spread() if cell.exists} == set(values)


def test_the_matrix_has_every_combination_that_there_is() -> None:
    cells = all_cells()
    assert len(set(cells)) == len(cells) == 6 * 7 * 6 * 4 - 3 * 6 * 4
    assert all(parse_cell(str(cell)) == cell for cell in cells)


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
