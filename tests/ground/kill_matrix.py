"""Whatever dies, nothing leaks and nothing opens: every victim at every moment by every signal under every backend.

    kill_matrix.py                                                all cells
    kill_matrix.py --only 'guard/training/KILL/iptables/ports'    one cell, or those that a pattern with * and ? matches
    kill_matrix.py --list | --seed N | --repeat N | --parallel N

In each cell tests/ground/light_job.py runs on a host with a lease, and a stranger tries every port of it from before
the start until after the end. Then somebody dies:

    victim       launcher; guard; both at once; one worker; the launcher's process group; all in the job's cgroup
    moment       before the policy is sent; while the layers are installed; guarded, before anything listens; in
                 rendezvous; in training; in a restart; in release
    signal       TERM, INT, HUP, QUIT, KILL, STOP followed by KILL
    backend      iptables, nftables, legacy, off
    protection   the shield, port chains beside it; ports: port chains alone, and a cgroup that tells who belongs to the
                 job; nocgroup: port chains alone, and no cgroup to be had; key: the shield, which nobody passes but by
                 the tag of the job's key, port chains beside it

Behind the shield the stranger must never get in. Without it never to a planned port, and to one that was opened at
random only until a guard has seen it (tests/ground/gains.py); whatever he got is counted.

Afterwards the job goes on guarded if only its guard was meant; otherwise it is over after its grace period. Within
2 s of its last process' end the host is as it was before: no rule, no cgroup, no record, no guard. Only where
launcher and guard were both killed may something stay, and has to while the job lives: then the next run, or the
reaper, removes it.

Needs root. Prints figures; ends with status 1 if a cell was not as it must be, with how to run that one again.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
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

from cgroups import end_all
from gains import Deaf, Gain, gains
from hosts import Network, eventually, hear_signals, is_alive
from kill_cells import SIGNALS, Cell, all_cells
from kill_ground import GRACE_SECONDS, PATIENCE_SECONDS, TAKEN_OVER, Ground, LightJob, Violation, require, send
from patience import patient
from probe import Probe, reach

CHILDREN = 6  # of tests/ground/light_job.py
CLEAN_SECONDS = 2.0
# What a guard waits before it asks a failed job's processes to end, and what ending them may take.
ENDING_SECONDS = 2.0
_GAINS_NAMED = 8
# How long the layers take to be installed, and a restart and a release last, so that a blow lands anywhere in them.
_INSTALL_SECONDS, _RESTART_SECONDS, _RELEASE_SECONDS = 0.15, 0.1, 0.01


@dataclass
class Figures:
    """What happened in one cell or in many.

    forbidden: connections of a stranger's that he must not get; to_random: those that he may, without a shield.
    longest, longest_unseen: seconds that such a port was open, and one while no guard was there to see it.
    leaks, reaped: cells that left something, and that had to be cleaned up after; again: at the second look.
    lost: children that no guard knew of.
    slowest: seconds until all was clean.
    """

    cells: int = 0
    attempts: int = 0
    forbidden: int = 0
    to_random: int = 0
    longest: float = 0.0
    longest_unseen: float = 0.0
    leaks: int = 0
    reaped: int = 0
    again: int = 0
    lost: int = 0
    slowest: float = 0.0

    def add(self, other: Figures) -> None:
        self.cells += other.cells
        self.attempts += other.attempts
        self.forbidden += other.forbidden
        self.to_random += other.to_random
        self.longest = max(self.longest, other.longest)
        self.longest_unseen = max(self.longest_unseen, other.longest_unseen)
        self.leaks += other.leaks
        self.reaped += other.reaped
        self.again += other.again
        self.lost += other.lost
        self.slowest = max(self.slowest, other.slowest)

    def count(self, gained: Sequence[Gain]) -> None:
        """What a stranger got, where there is no shield."""
        permitted = [gain for gain in gained if not gain.is_too_much]
        self.forbidden += len(gained) - len(permitted)
        self.to_random += len(permitted)
        for gain in permitted:
            if gain.was_unseen:
                self.longest_unseen = max(self.longest_unseen, gain.age)
            else:
                self.longest = max(self.longest, gain.age)


def run_cell(ground: Ground, cell: Cell, chance: random.Random, figures: Figures) -> None:
    """One cell; adds to the figures. Raises Violation if anything is not as it must be."""
    with (
        tempfile.TemporaryDirectory(prefix="sr-kill-") as place,
        LightJob(ground, cell.backend, Path(place), protection=cell.protection) as job,
    ):
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
            # Whatever else was wrong, this comes first.
            _require_nothing_got(job, cell, probe, figures)
        require(
            eventually(lambda: not ground.node.processes(), seconds=CLEAN_SECONDS),
            f"still running on the host: {ground.node.processes()}",
        )


def _require_nothing_got(job: LightJob, cell: Cell, probe: Probe, figures: Figures) -> None:
    """A stranger got nothing, or no more than what is said of ports without a shield."""
    if cell.has_shield:
        figures.forbidden += len(probe.connections)
        require(not probe.reached, f"a stranger got in: {sorted(probe.reached)}; {job.errors()}")
        return
    guarded_again = min(job.guarded_after(job.struck), job.followed)
    deaf = Deaf(job.struck, guarded_again) if cell.ends_a_guard else Deaf()
    lost = job.port_of[job.lost] if job.lost else None
    gained = [gain for gain in gains(probe, deaf) if gain.endpoint[1] != lost]
    figures.count(gained)
    too_much = [str(gain) for gain in gained if gain.is_too_much]
    when = f"struck {job.struck:.2f}, guarded again {guarded_again:.2f}"
    listed = f"{'; '.join(too_much[:_GAINS_NAMED])} ({len(too_much)} times)"
    require(not too_much, f"a stranger got in: {listed}; {when}; {job.errors()}")


def _come_to_the_moment(job: LightJob, cell: Cell, chance: random.Random, probe: Probe) -> None:
    """Bring the job to the moment of the cell; inside the short ones, to a random place."""
    job.wait_for("before policy")
    if cell.moment == "before":
        time.sleep(chance.uniform(0, 0.05))  # the guard's interpreter is still coming up, or waits already
        return
    job.tell("go")
    if cell.moment == "layers":
        _wait_for_the_first_layer(job)
        time.sleep(chance.choice((0, chance.uniform(0, _INSTALL_SECONDS))))
        return
    for mark in ("guarded", "rendezvous", "training"):
        job.wait_for(mark)
        if mark == "training" or cell.moment == "training":
            _wait_until_seen(job, probe)
        if mark == cell.moment:
            if mark == "training" and cell.has_to_be_remembered:
                _wait_until_closed(job, probe)
            return
        job.tell({"restart": "restart", "release": "end"}[cell.moment] if mark == "training" else "go")
    job.wait_for(cell.moment)
    time.sleep(chance.uniform(0, _RESTART_SECONDS if cell.moment == "restart" else _RELEASE_SECONDS))


def _wait_for_the_first_layer(job: LightJob) -> None:
    """Nothing of it is there yet, or its cgroup alone. Looked for as often as can be."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not job.has_begun_to_be_guarded():
        require(time.monotonic() < deadline and not job.has_ended(), f"no layer appears: {job.errors()}")
        time.sleep(0.0002)


def _wait_until_seen(job: LightJob, probe: Probe) -> None:
    """The stranger knows every port that the job has opened so far, and has begun to try it."""
    require(
        eventually(lambda: job.ports <= {port for _, port in probe.seen}, seconds=PATIENCE_SECONDS),
        f"the stranger's probe sees {sorted(probe.seen)} of {sorted(job.ports)}",
    )


def _wait_until_closed(job: LightJob, probe: Probe) -> None:
    """The guard has looked who belongs to the job, and has closed every port of it."""
    require(
        eventually(lambda: all(target in probe.dropped for target in list(probe.seen)), seconds=PATIENCE_SECONDS),
        f"not closed: {sorted(probe.seen - probe.dropped.keys())}; {job.errors()}",
    )


def strike(job: LightJob, ground: Ground, cell: Cell, chance: random.Random, probe: Probe) -> None:
    """Kill whom the cell names."""
    job.guards |= ground.guards()
    job.struck = time.monotonic()
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
            end_all(job.cgroup)


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
    require(not job.has_ended(), f"the launcher ended with its guard: {job.errors()}")
    if cell.moment in ("before", "layers"):
        if cell.moment == "before":
            job.tell("go")
        job.wait_for("guarded")
    else:
        _require_takeover(job, cell)
    wanted = {"shield"} if cell.has_shield else set()
    wanted |= {cell.backend} - {"off"}
    # Where the blow landed late, the guard had answered already and another is still at it.
    require(
        eventually(lambda: job.layers() == wanted and ground.has_chains() == (cell.backend != "off")),
        f"layers that stand: {job.layers()}, chains {[*_differences(ground.before, ground.look())]}; {job.errors()}",
    )
    if cell.moment == "training":
        targets = ground.node.targets()
        require(len(targets) >= CHILDREN, f"listeners: {targets}")
        of_peer = job.reach_as_peer(ground, targets)
        require(all(of_peer.values()), f"a peer is kept out: {of_peer}")
        beside = reach(ground.peer, targets) if cell.has_key else {}
        require(not any(beside.values()), f"another process of a peer's host gets in: {beside}")


def _require_takeover(job: LightJob, cell: Cell) -> None:
    """A guard that died is replaced, and the job is told; one that was only asked to go stays."""
    met = job.guards.copy()

    def is_guarded() -> bool:
        guard = job.recorded_guard()
        return guard is not None and is_alive(guard) and (guard not in met) == cell.ends_a_guard

    require(eventually(is_guarded), f"guard {job.recorded_guard()} after {met}: {job.errors()}")
    if cell.ends_a_guard:
        told = eventually(lambda: any(TAKEN_OVER in line for line in job.news))
        require(told, f"nothing was said of the guard's death: {job.news}")


def _go_on(job: LightJob) -> None:
    """Let the job go on from wherever it is to its end, whichever end that is."""
    while not job.has_ended():
        came = eventually(lambda: job.question is not None or job.has_ended(), seconds=PATIENCE_SECONDS)
        require(came, f"the launcher neither asks nor ends after {job.marks}: {job.errors()}")
        if job.question is not None:
            job.tell("end" if job.question == "training" else "go")


def _end_well(job: LightJob) -> None:
    _go_on(job)
    require(job.launcher.returncode == 0, f"the job did not end well: {job.errors()}")


def _see_it_end(
    job: LightJob, ground: Ground, cell: Cell, chance: random.Random, probe: Probe, figures: Figures
) -> None:
    """The job is over when it must be, and the host then as it was before."""
    if cell.victim == "worker" and cell.moment == "restart":
        _go_on(job)  # the one that died may have been ending anyway
    require(eventually(job.has_ended, seconds=PATIENCE_SECONDS), f"the launcher lives on: {job.errors()}")
    if cell.moment == "release" or job.launcher.returncode == 0 or cell.may_leave_something:
        # What outlives a job that ended well, and what nobody is left to end, stays closed until it ends by itself.
        if not job.is_over():
            if cell.may_leave_something:
                _require_left_alone(job, ground, cell)
            _let_the_stranger_try(probe, chance)
        job.let_go()
        require(eventually(job.is_over, seconds=PATIENCE_SECONDS), f"the children live on: {job.living()}")
    else:
        is_over = eventually(job.is_over, seconds=GRACE_SECONDS + ENDING_SECONDS)
        may_be_lost = cell.has_to_be_remembered and cell.moment == "restart"
        if not is_over and may_be_lost and job.living().keys() == {job.children.get("forked")}:
            # Forked in the launcher's last moments, it shows nothing of the job (docs/threat-model.md).
            figures.lost += 1
            job.lost = job.children["forked"]
            job.let_go()
            is_over = eventually(job.is_over, seconds=PATIENCE_SECONDS)
        require(is_over, f"not ended after a failure: {job.living()}")
    ended = time.monotonic()
    if (
        cell.may_leave_something
        and eventually(lambda: not ground.guards(), seconds=CLEAN_SECONDS)
        and _reap_what_was_left(job, ground, cell, chance, figures)
    ):
        ended = time.monotonic()
    _require_clean(job, ground, ended, figures)


def _require_reaped(ground: Ground) -> list[str]:
    said = ground.reap()
    given_up = [line for line in said if "cannot be removed" in line]
    require(not given_up, f"the reaper gave up: {given_up}")
    return said


def _require_left_alone(job: LightJob, ground: Ground, cell: Cell) -> None:
    """The next run comes while the job lives that nobody guards any more, and takes nothing from it.

    A guard that was on its way when the last one died may be there all the same, with chains of its own: it comes and
    goes between two looks, so that it is looked for before and after them.
    """
    _require_reaped(ground)
    is_as_left = bool(ground.guards()) or ground.has_chains() == cell.chains_outlive_guards or bool(ground.guards())
    stands = job.record() is not None and is_as_left
    require(job.is_over() or stands, f"reaped alive: {[*_differences(ground.before, ground.look())]}; {job.living()}")


def _reap_what_was_left(job: LightJob, ground: Ground, cell: Cell, chance: random.Random, figures: Figures) -> bool:
    """No guard is left to remove what stands: the next run does, or the reaper by itself. Whether it was needed."""
    if not job.remains() and ground.look() == ground.before:
        return False
    figures.reaped += 1
    said = _reap_once(job, ground, cell, chance)
    if job.remains():
        # Whoever is in the middle of execve(2), anywhere on the host, may be the run's: it stays until the next look.
        figures.again += 1
        print(f"again  {cell}: {said}", flush=True)
        _require_reaped(ground)
    return True


def _reap_once(job: LightJob, ground: Ground, cell: Cell, chance: random.Random) -> list[str]:
    """Remove what is left, by the reaper or by a whole run, which takes a second; what it said of what it left."""
    if chance.random() < 0.75:
        return _require_reaped(ground)
    job.followed = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="sr-kill-") as place,
        LightJob(ground, cell.backend, Path(place), protection=cell.protection) as next_run,
    ):
        _end_well(next_run)
        next_run.let_go()
        gone = eventually(lambda: next_run.is_over() and not next_run.remains(), seconds=CLEAN_SECONDS)
        require(gone, f"left by the next run: {next_run.remains()}")
        return list(next_run.news)


def _require_clean(job: LightJob, ground: Ground, ended: float, figures: Figures) -> None:
    """Within 2 s nothing is left of the job."""
    while True:
        figures.slowest = time.monotonic() - ended
        left = [*job.remains(), *(f"guard {pid}" for pid in ground.guards())]
        left = left or list(_differences(ground.before, ground.look()))
        if not left and figures.slowest <= patient(CLEAN_SECONDS):
            return
        if figures.slowest > patient(CLEAN_SECONDS):
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

        require(eventually(all_are_reached), f"the stranger's probe reaches {probe.reached} of {job.ports}")
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
    return 1 if matrix.failed or matrix.figures.forbidden or not matrix.figures.attempts else 0


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
        f"connections that must not be {figures.forbidden}; without a shield to random ports {figures.to_random}, open "
        f"for {figures.longest:.2f} s at most, and {figures.longest_unseen:.2f} s while no guard was there; leaks "
        f"{figures.leaks}, left by double kills and reaped {figures.reaped} (at the second look {figures.again}), "
        f"forked and lost {figures.lost}; "
        f"slowest to be clean {figures.slowest:.2f} s; {seconds:.0f} s in all"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="victim/moment/signal/backend/protection, with * and ?"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="where in a moment a blow lands")
    parser.add_argument("--repeat", type=int, default=1, help="run everything this often (default: 1)")
    parser.add_argument("--parallel", type=int, default=2 * (os.cpu_count() or 1), help="cells at once")
    parser.add_argument("--verbose", action="store_true", help="a line for each cell that passed, too")
    parser.add_argument("--list", action="store_true", help="print the cells and run none")
    return parser.parse_args(arguments)


def _unwind(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
