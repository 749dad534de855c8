"""Sealed logs: what a launch wrote below its log directory, all of that, and nothing else."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from hosts import Host
from sandbox import NOBODY

from securerun.job.logs import sealed_afterwards


@pytest.fixture(autouse=True)
def _jobs_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o755)
    logs.chmod(0o755)
    return logs


def run(logs: Path) -> Path:
    """What torch makes of a run: a directory of its own, with a file of each rank of each attempt."""
    place = Path(tempfile.mkdtemp(prefix="none_", dir=logs))
    for rank in ("attempt_0/0", "attempt_0/1", "attempt_1/0"):
        (place / rank).mkdir(parents=True)
        (place / rank / "stdout.log").write_text("said\n")
    return place


def modes(top: Path) -> dict[str, int]:
    return {str(path.relative_to(top)): stat.S_IMODE(path.lstat().st_mode) for path in sorted(top.rglob("*"))}


def unexpected(words: str) -> None:
    raise AssertionError(words)


def test_files_become_440_and_directories_750_at_most_and_no_bit_is_added(logs: Path) -> None:
    with sealed_afterwards(str(logs), unexpected):
        place = run(logs)
        (place / "attempt_0/0/stdout.log").chmod(0o600)
        (place / "attempt_0/1/stdout.log").chmod(0o6777)
        (place / "attempt_0/1").chmod(0o777)
        (place / "attempt_1").chmod(0o700)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert modes(place) == {
        "attempt_0": 0o750,
        "attempt_0/0": 0o750,
        "attempt_0/0/stdout.log": 0o400,
        "attempt_0/1": 0o750,
        "attempt_0/1/stdout.log": 0o440,
        "attempt_1": 0o700,
        "attempt_1/0": 0o750,
        "attempt_1/0/stdout.log": 0o440,
    }


def test_only_what_this_run_wrote_is_sealed(logs: Path, tmp_path: Path) -> None:
    earlier = run(logs)
    (logs / "notes.txt").write_text("of the user's own")
    with sealed_afterwards(str(logs), unexpected):
        run(logs)
        elsewhere = Path(tempfile.mkdtemp(dir=tmp_path))
        (elsewhere / "data").touch()
        # Another run with the same name for its rendezvous, as on another node: made, but not by this process' torch.
        others = logs / "none_others00"
        others.mkdir()
        (others / "stdout.log").touch()
    assert tempfile.mkdtemp.__module__ == "tempfile" and tempfile.mkdtemp.__name__ == "mkdtemp"
    for path in (earlier / "attempt_0/0/stdout.log", logs / "notes.txt", others / "stdout.log", elsewhere / "data"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    assert stat.S_IMODE(logs.stat().st_mode) == 0o755


@pytest.mark.usefixtures("root")
def test_links_second_names_sockets_and_files_of_others_are_left_alone(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    for name in ("linked", "second"):
        (outside / name).write_text("")
        (outside / name).chmod(0o666)
    with sealed_afterwards(str(logs), unexpected), socket.socket(socket.AF_UNIX) as listener:
        place = run(logs)
        (place / "link").symlink_to(outside / "linked")
        (place / "directory").symlink_to(outside)
        os.link(outside / "second", place / "second")
        os.mkfifo(place / "fifo", 0o666)
        monkeypatch.chdir(place)  # the path of a socket has 108 bytes
        listener.bind("socket")
        (place / "theirs").write_text("")
        (place / "theirs").chmod(0o666)
        os.chown(place / "theirs", NOBODY, NOBODY)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o777
    assert modes(outside) == {"linked": 0o666, "second": 0o666}
    assert stat.S_IMODE((place / "theirs").stat().st_mode) == 0o666
    assert stat.S_IMODE((place / "fifo").stat().st_mode) == 0o640


def test_directory_that_is_put_in_the_runs_place_is_left_alone(logs: Path) -> None:
    with sealed_afterwards(str(logs), unexpected):
        place = run(logs)
        moved = place.rename(logs / "moved")
        place.mkdir()
        (place / "bait").touch()
    assert modes(place) == {"bait": 0o640}
    assert modes(moved)["attempt_0/0/stdout.log"] == 0o440


def test_run_whose_logs_were_removed_is_no_failure(logs: Path) -> None:
    with sealed_afterwards(str(logs), unexpected):
        place = run(logs)
        for path in sorted(place.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        place.rmdir()


def test_job_that_fails_has_its_logs_sealed_too(logs: Path) -> None:
    with pytest.raises(ValueError, match="of the job's"), sealed_afterwards(str(logs), unexpected):
        place = run(logs)
        raise ValueError("of the job's")
    assert modes(place)["attempt_1/0/stdout.log"] == 0o440


def test_log_directory_may_be_made_by_the_job_and_named_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with sealed_afterwards("./new/../new", unexpected):
        Path("new").mkdir()
        place = run(Path("new").resolve())
    assert modes(place)["attempt_0/0/stdout.log"] == 0o440


def test_whoever_still_writes_goes_on_writing(logs: Path) -> None:
    with sealed_afterwards(str(logs), unexpected):
        place = run(logs)
        log = (place / "attempt_0/0/stdout.log").open("a")
    with log:
        log.write("later\n")
    assert (place / "attempt_0/0/stdout.log").read_text() == "said\nlater\n"


@pytest.mark.parametrize("options", [[], ["--no-seal-logs"]], ids=["sealed", "left"])
def test_real_job_with_restarts_is_sealed_whole_unless_it_is_told_not_to(
    node: Host, tmp_path: Path, options: list[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("import os, sys; print('said'); sys.exit(int(os.environ['TORCHELASTIC_RESTART_COUNT']) < 1)")
    words = ["--log-dir", "logs", "--tee", "3", "--max-restarts", "1", "--nproc-per-node", "2", str(script)]
    done = node.run([jobs.SECURERUN, *options, *words], cwd=tmp_path)
    assert done.returncode == 0, done
    (place,) = (tmp_path / "logs").iterdir()
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*.log")}
    assert len(found) == 2 * 2 * 2, found
    assert set(found.values()) == ({0o640} if options else {0o440})
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*") if path.is_dir()} == {0o750}
    assert "could not be sealed" not in done.stderr
