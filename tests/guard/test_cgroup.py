"""The job's cgroup on the real kernel: who is in it, how it is killed and removed, and what is refused."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import namespaces
import pytest
from cgroups import enter, in_child, new_cgroup
from containers import READ_ONLY_CGROUPS
from hosts import cgroup2_mount, eventually
from sandbox import NOBODY, apart

from securerun.errors import Obstacle, PrivilegeError
from securerun.firewall.policy import Policy
from securerun.guard import cgroup
from securerun.guard.caller import Caller
from securerun.guard.cgroup import JobCgroup, make_job_cgroup, open_job_cgroup, path_of_job_cgroup
from securerun.guard.lease import Lease
from securerun.guard.limits import SitePolicy
from securerun.guard.protocol import Order
from securerun.linux import cgroups, libc, proc, sock_diag
from securerun.linux.cgroups import CgroupUnavailable, cgroup_of
from securerun.preflight import abilities

_OUR_VIEW_ALONE = {"_VIEWS": (proc.SELF,)}


@pytest.fixture
def job(root_and_tools: None) -> Iterator[JobCgroup]:
    """A cgroup as a guard makes it; all that is in it is killed afterwards."""
    made = make_job_cgroup(path_of_job_cgroup(os.getpid(), secrets.token_hex(6)))
    yield made
    with suppress(OSError):
        made.kill()
    with suppress(CgroupUnavailable):
        made.remove()
    made.close()


def directory_of(job: JobCgroup) -> Path:
    mount = cgroup2_mount()
    assert mount is not None
    return mount / job.path.lstrip("/")


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def sleep_in(directory: Path, sleepers: list[subprocess.Popen[bytes]]) -> int:
    process = subprocess.Popen(["sleep", "60"])
    sleepers.append(process)
    (directory / "cgroup.procs").write_text(str(process.pid))
    return process.pid


# Where it is


def test_it_lies_below_the_launchers_own_and_is_found_again(job: JobCgroup) -> None:
    assert PurePosixPath(job.path).parent == PurePosixPath(cgroup_of(os.getpid()))
    again = open_job_cgroup(job.path)
    assert again is not None
    assert os.fstat(again.descriptor).st_ino == os.fstat(job.descriptor).st_ino
    again.close()


def test_one_that_does_not_exist_is_not_opened(job: JobCgroup) -> None:
    before = proc.own_descriptors()
    assert open_job_cgroup(f"{job.path}/none") is None
    assert open_job_cgroup(f"{job.path}/none/below") is None
    with pytest.raises(FileNotFoundError):
        cgroups.processes_of(f"{job.path}/none")
    assert proc.own_descriptors() == before
    # A guard would keep the mount of its own in which it looks: a child does it.
    assert in_child(lambda: open_job_cgroup("no/absolute/path")) is None


def test_one_that_cannot_be_made_leaves_nothing_open(job: JobCgroup) -> None:
    """There is one of that name, or no more are permitted, or too many files are open: a guard goes on without."""
    before = proc.own_descriptors()
    with pytest.raises(CgroupUnavailable, match="no cgroup can be made"):
        make_job_cgroup(job.path)
    assert proc.own_descriptors() == before


def test_one_that_cannot_be_opened_is_removed_again(monkeypatch: pytest.MonkeyPatch, root_and_tools: None) -> None:
    before, path = proc.own_descriptors(), path_of_job_cgroup(os.getpid(), secrets.token_hex(6))
    monkeypatch.setattr(JobCgroup, "_become_valid", _fail)
    with pytest.raises(CgroupUnavailable, match="no cgroup can be made"):
        make_job_cgroup(path)
    monkeypatch.undo()
    assert open_job_cgroup(path) is None
    assert proc.own_descriptors() == before


def _fail(_: JobCgroup) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_another_users_is_neither_taken_nor_opened(job: JobCgroup) -> None:
    """Whoever the parent is delegated to can put a directory of his own in the place of ours."""
    os.chown(job.descriptor, NOBODY, -1)
    assert open_job_cgroup(job.path) is None
    assert cgroups.processes_of(job.path) == set()


@pytest.mark.usefixtures("root_and_tools")
def test_a_launcher_whose_cgroup_lies_above_what_is_seen_gets_none() -> None:
    with new_cgroup() as outer, new_cgroup(outer) as inner:

        def work() -> str:
            launcher = os.getppid()
            inner.enter()
            namespaces.leave(namespaces.CGROUPS)
            with pytest.raises(CgroupUnavailable, match="lies outside of what this cgroup namespace shows") as refusal:
                path_of_job_cgroup(launcher, "0123456789ab")
            return str(refusal.value)

        assert "/.." in in_child(work)


@pytest.mark.usefixtures("root_and_tools")
def test_names_too_long_for_a_record_are_refused(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "_LONGEST_PATH", 10)
    with new_cgroup() as long:
        pid = sleep_in(long.path, sleepers)
        with pytest.raises(CgroupUnavailable, match="longer than 10 characters"):
            path_of_job_cgroup(pid, "0123456789ab")
        sleepers[0].kill()
        sleepers[0].wait()


def test_a_process_that_is_gone_has_none() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(CgroupUnavailable, match="cannot be read"):
        cgroup_of(process.pid)


def unmount_all() -> None:
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if " - cgroup" in line:
            assert libc.library.umount2(line.split()[4].encode(), 2) == 0


def view() -> tuple[str, str]:
    """What this process sees mounted, and where that is said."""
    return str(Path("/proc/self/ns/mnt").readlink()), Path("/proc/self/mountinfo").read_text()


@pytest.mark.usefixtures("root_and_tools")
def test_where_none_is_mounted_one_is_mounted_that_nobody_sees() -> None:
    """Nor this process, nor what it starts; and where none may be mounted, that is said."""
    run_id = secrets.token_hex(6)

    def work() -> str:
        vars(cgroups).update(_OUR_VIEW_ALONE)
        before = view()
        made = make_job_cgroup(f"/securerun-{run_id}")
        try:
            assert made.populated() is False
        finally:
            made.remove()
        assert view() == before
        return made.path

    assert apart(work, before=unmount_all) == f"/securerun-{run_id}"

    def refused() -> str:
        vars(cgroups).update(_VIEWS=("no such process",))
        with pytest.raises(CgroupUnavailable) as refusal:
            make_job_cgroup(f"/securerun-{run_id}")
        return str(refusal.value)

    assert "none may be mounted" in apart(refused, before=unmount_all, user=NOBODY)


class VersionOneAlone:
    """The C library, and /proc/PID/cgroup, of a host on which nobody has mounted version 2 since it booted."""

    def __init__(self) -> None:
        self._library, self._lines = libc.library, proc.cgroups
        # A child may be the one that mounts it.
        self._was_mounted = mmap.mmap(-1, 1)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the library has
        return getattr(self._library, name)

    def mount(self, source: bytes, place: bytes, kind: bytes, flags: int, data: bytes | None) -> int:
        result: int = self._library.mount(source, place, kind, flags, data)
        if kind == b"cgroup2" and result == 0:
            self._was_mounted[0] = 1
        return result

    def lines(self, pid: proc.Pid) -> list[str]:
        return [line for line in self._lines(pid) if self._was_mounted[0] or not line.startswith("0::")]


def boot_with_version_1_alone() -> None:
    """In a child: what it sees from then on."""
    unmount_all()
    host = VersionOneAlone()
    vars(libc).update(library=host)
    vars(proc).update(cgroups=host.lines)
    vars(cgroups).update(_OUR_VIEW_ALONE)


@pytest.mark.usefixtures("root_and_tools")
def test_with_version_1_alone_the_launchers_cgroup_is_told_once_version_2_was_mounted() -> None:
    """The kernel tells none before: /proc/PID/cgroup has no line of it."""
    run_id = secrets.token_hex(6)

    def work() -> tuple[str, str]:
        before = view()
        with pytest.raises(CgroupUnavailable, match="since this host booted"):
            cgroup_of(os.getpid())
        made = make_job_cgroup(path_of_job_cgroup(os.getpid(), run_id))
        made.remove()
        assert view() == before
        return made.path, cgroup_of(os.getpid())

    path, own = apart(work, before=boot_with_version_1_alone)
    assert path == str(PurePosixPath(own) / f"securerun-{run_id}")

    def refused() -> str:
        with pytest.raises(CgroupUnavailable) as refusal:
            path_of_job_cgroup(os.getpid(), run_id)
        return str(refusal.value)

    assert "no cgroup of version 2 is mounted here, and none can be: not permitted" in apart(
        refused, before=boot_with_version_1_alone, user=NOBODY
    )


@pytest.mark.usefixtures("root_and_tools")
def test_with_version_1_alone_doctor_has_nothing_to_mend() -> None:
    ability = apart(abilities._cgroup, before=boot_with_version_1_alone)
    assert (ability.works, ability.fix) == (True, "")
    assert "which is not mounted: a guard mounts it for itself" in ability.what
    ability = apart(abilities._cgroup, before=boot_with_version_1_alone, user=NOBODY)
    assert (ability.works, ability.fix) == (None, "sudo securerunctl doctor")


@pytest.mark.usefixtures("root_and_tools")
def test_a_read_only_hierarchy_is_refused_in_words() -> None:

    def make_read_only() -> None:
        subprocess.run(["sh", "-c", READ_ONLY_CGROUPS, str(cgroup2_mount())], check=True)

    def work() -> str:
        vars(cgroups).update(_OUR_VIEW_ALONE)
        with pytest.raises(CgroupUnavailable) as refusal:
            make_job_cgroup("/securerun-0123456789ab")
        assert refusal.value.obstacle is Obstacle.READ_ONLY_CGROUPS
        return str(refusal.value)

    assert "mounted read-only" in apart(work, before=make_read_only)


# Who is in it


def test_all_below_it_belongs_to_it(job: JobCgroup, sleepers: list[subprocess.Popen[bytes]]) -> None:
    below = directory_of(job) / "made-by-the-job" / "deeper"
    below.mkdir(parents=True)
    pids = {sleep_in(directory_of(job), sleepers), sleep_in(below, sleepers)}
    assert job.populated()
    assert job.processes() == cgroups.processes_of(job.path) == pids
    assert sock_diag.cgroup_ids(job.descriptor) == {
        path.stat().st_ino for path in (directory_of(job), below.parent, below)
    }
    job.kill()
    assert eventually(lambda: not job.populated())
    assert {process.wait() for process in sleepers} == {-signal.SIGKILL}
    job.remove()
    assert not directory_of(job).exists()
    assert job.populated() is False


@pytest.mark.usefixtures("root_and_tools")
def test_below_a_threaded_one_it_is_threaded_and_is_killed_one_by_one(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    with new_cgroup() as launchers:
        (launchers.path / "cgroup.type").write_text("threaded")
        place = PurePosixPath("/") / launchers.path.relative_to(str(cgroup2_mount())) / "securerun-0123456789ab"
        job = make_job_cgroup(str(place))
        assert (directory_of(job) / "cgroup.type").read_text() == "threaded\n"
        sleeper = subprocess.Popen(["sleep", "60"])
        sleepers.append(sleeper)
        (directory_of(job) / "cgroup.threads").write_text(str(sleeper.pid))
        assert job.processes() == {sleeper.pid}
        job.kill()
        assert sleeper.wait(timeout=10) == -signal.SIGKILL
        job.remove()
        job.close()


class Whom:
    """A process that is to be moved, and what is found when it is asked whether it is the same still."""

    def __init__(self, pid: int, *answers: bool, ended: bool = False) -> None:
        self.pid = pid
        self._answers = list(answers)
        self._ended = ended

    def has_ended(self) -> bool:
        return self._ended

    def is_unchanged(self) -> bool:
        return self._answers.pop(0) if self._answers else True


def test_what_may_not_be_moved_is_told(job: JobCgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CgroupUnavailable, match="cannot be read"):
        job.enter(Whom(0x7FFFFFFF))
    job.expel(Whom(0x7FFFFFFF))
    monkeypatch.setattr(cgroup, "cgroup_of", lambda _: job.path)
    with pytest.raises(CgroupUnavailable, match="may not be moved between cgroups"):
        job.enter(Whom(0x7FFFFFFF))
    job.expel(Whom(0x7FFFFFFF))


def test_number_that_is_anothers_by_now_is_not_moved(job: JobCgroup, sleepers: list[subprocess.Popen[bytes]]) -> None:
    """In, and out again."""
    with new_cgroup() as elsewhere:
        pid = sleep_in(elsewhere.path, sleepers)
        place = cgroup_of(pid)
        with pytest.raises(PrivilegeError, match="ended before its job could be guarded"):
            job.enter(Whom(pid, False, ended=True))
        assert cgroup_of(pid) == place
        job.expel(Whom(pid, ended=True))
        assert cgroup_of(pid) == place
        sleepers[0].kill()
        sleepers[0].wait()
    pid = sleep_in(directory_of(job), sleepers)
    job.expel(Whom(pid, ended=True))
    assert cgroup_of(pid) == job.path


def test_number_that_became_anothers_in_the_very_moment_goes_back(
    job: JobCgroup, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    """Whoever has just got it was started in its parent's cgroup; a program of root's in the launcher's place stays it.

    Nothing of that is in the way of who was started within the job: that one stays.
    """
    sleepers.append(subprocess.Popen(["sleep", "60"]))
    home = cgroup_of(os.getpid())
    with pytest.raises(PrivilegeError):
        job.enter(Whom(sleepers[0].pid, True, False, ended=True))
    assert cgroup_of(sleepers[0].pid) == home
    with new_cgroup() as elsewhere:
        pid = sleep_in(elsewhere.path, sleepers)
        place = cgroup_of(pid)
        with pytest.raises(PrivilegeError):
            job.enter(Whom(pid, True, False))
        assert cgroup_of(pid) == place
        sleepers[1].kill()
        sleepers[1].wait()

    def born_within() -> str:
        enter(directory_of(job))
        child = subprocess.Popen(["sleep", "60"])
        with pytest.raises(PrivilegeError):
            job.enter(Whom(child.pid, True, False, ended=True))
        place = cgroup_of(child.pid)
        child.kill()
        child.wait()
        return place

    assert in_child(born_within) == job.path


def test_member_whose_number_is_anothers_by_now_is_none(
    job: JobCgroup, sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is listed is a number, and looked at a moment later."""
    inside = sleep_in(directory_of(job), sleepers)
    sleepers.append(subprocess.Popen(["sleep", "60"]))
    outside = sleepers[1].pid
    monkeypatch.setattr(cgroups, "processes_below", lambda _: {inside, outside})
    assert {process.pid for process in job.members()} == {inside}


def test_a_guard_that_was_started_in_it_leaves_it(job: JobCgroup) -> None:
    def work() -> tuple[str, str]:
        enter(directory_of(job))
        inside = cgroup_of(os.getpid())
        job.leave()
        return inside, cgroup_of(os.getpid())

    inside, outside = in_child(work)
    assert inside == job.path
    assert not PurePosixPath(outside).is_relative_to(job.path)


def test_one_that_somebody_is_in_is_not_removed(
    job: JobCgroup, sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "_REMOVAL_SECONDS", 0.05)
    sleep_in(directory_of(job), sleepers)
    with pytest.raises(CgroupUnavailable, match="cannot be removed"):
        job.remove()
    assert directory_of(job).exists()


def test_one_that_somebody_is_in_keeps_the_rules_that_close_its_ports(
    job: JobCgroup, sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard that ends by a defect releases what it can: who was not to be ended for the job's user stays behind."""
    run = Policy(PurePosixPath(job.path).name.partition("-")[2], (), ())
    lease = Lease(Order(run, "auto", "auto", 0.0, ""), Caller(os.getpid()), SitePolicy())
    lease.cgroup = open_job_cgroup(job.path)
    monkeypatch.setattr(lease, "remove_chains", lambda: pytest.fail("its ports are open"))
    sleep_in(directory_of(job), sleepers)
    with pytest.raises(CgroupUnavailable, match="cannot be removed"):
        lease.release()


def test_its_removal_waits_for_the_kernel(job: JobCgroup, sleepers: list[subprocess.Popen[bytes]]) -> None:
    """A cgroup is busy for a moment after its last process was killed."""
    pid = sleep_in(directory_of(job), sleepers)
    os.kill(pid, signal.SIGKILL)
    job.remove()
    assert not directory_of(job).exists()
    job.remove()  # once more does no harm


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_one_that_the_owner_of_the_directory_above_made_in_its_place_keeps_nobody_from_removing_it(
    job: JobCgroup, sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Ours is gone then, and the other has somebody in it for as long as its owner likes."""
    place, remove_below = directory_of(job), cgroup._remove_below

    def swap(_: int) -> None:
        monkeypatch.setattr(cgroup, "_remove_below", remove_below)
        place.rmdir()
        place.mkdir()
        sleep_in(place, sleepers)

    try:
        if when == "before":
            swap(job.descriptor)
        else:
            monkeypatch.setattr(cgroup, "_remove_below", swap)
        job.remove()
        assert (place / "cgroup.procs").read_text() == f"{sleepers[0].pid}\n"
        assert not job.populated()
    finally:
        sleepers[0].kill()
        sleepers[0].wait()
        assert eventually(lambda: not (place / "cgroup.procs").read_text())
        place.rmdir()
