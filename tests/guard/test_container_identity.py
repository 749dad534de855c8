"""Which container a caller is in: told by what only root makes, the same wherever in it, and never by its own word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cgroups import Cgroup, new_cgroup
from hosts import eventually

from securerun.errors import PrivilegeError
from securerun.guard.containers import account_of, container_of
from securerun.linux import cgroups

RUN = "securerun-0123456789ab"
NOBODY = 65534
# A process that says when it is where it is to be. It can be root's, who may look into it.
WAITING = ("sh", "-c", "echo; exec sleep 600")


@pytest.fixture
def cgroup(root: None) -> Iterator[Cgroup]:
    with new_cgroup() as cgroup:
        yield cgroup


def running(cgroup: Cgroup | None, *before: str, then: Sequence[str] = WAITING) -> subprocess.Popen[str]:
    """A process that enters a cgroup, and becomes what `before` makes of it."""
    entering = [] if cgroup is None else ["sh", "-ec", 'echo $$ > "$0"; exec "$@"', str(cgroup.path / "cgroup.procs")]
    process = subprocess.Popen([*entering, *before, *then], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    return process


def seen(process: subprocess.Popen[str], pid: int | None = None) -> str:
    try:
        return container_of(process.pid if pid is None else pid)
    finally:
        if pid is not None:  # a change of user takes off what --kill-child is by (prctl(2), PR_SET_PDEATHSIG)
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def path_of(cgroup: Cgroup) -> str:
    """The cgroup by the name that it has for this process."""
    process = running(cgroup)
    try:
        return cgroups.cgroup_of(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_process_of_the_hosts_own_is_in_none(cgroup: Cgroup) -> None:
    assert seen(running(None)) == seen(running(cgroup)) == ""
    assert seen(running(cgroup, "unshare", "--mount", "--net", "--ipc", "--uts")) == ""


def test_container_is_the_root_of_the_cgroup_namespace_that_root_made(cgroup: Cgroup) -> None:
    path = path_of(cgroup)
    assert seen(running(cgroup, "unshare", "--cgroup")) == path
    with new_cgroup(cgroup) as below:
        entering = ["unshare", "--cgroup", "sh", "-ec", f'echo $$ > {below.path}/cgroup.procs; exec "$@"', "sh"]
        assert seen(running(cgroup, *entering)) == path


def test_container_with_the_hosts_cgroups_is_told_by_its_pid_namespace(cgroup: Cgroup) -> None:
    outer = running(cgroup, "unshare", "--pid", "--fork", "--kill-child")
    children = f"/proc/{outer.pid}/task/{outer.pid}/children"
    (pid,) = open(children).read().split()  # noqa: PTH123, SIM115 - a line of the kernel's
    assert seen(outer, int(pid)) == path_of(cgroup)


def test_job_in_a_container_is_no_container_of_its_own(cgroup: Cgroup) -> None:
    """Else each run would make room for as many as a container may have."""
    path = path_of(cgroup)
    directory = cgroup.path / RUN
    directory.mkdir()
    try:
        entering = ["sh", "-ec", f'echo $$ > {directory}/cgroup.procs; exec "$@"', "sh", "unshare", "--cgroup"]
        assert seen(running(None, *entering)) == path
    finally:
        assert eventually(lambda: not (directory / "cgroup.procs").read_text())
        directory.rmdir()


def test_user_does_not_become_several_by_namespaces_of_their_own(cgroup: Cgroup) -> None:
    becoming = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    made = ["unshare", "--user", "--map-current-user", "--cgroup", "--pid", "--fork", "--kill-child"]
    assert seen(running(cgroup, *becoming, *made)) == ""
    assert seen(running(cgroup, *becoming, "unshare", "--user", "--cgroup")) == ""


CONTAINED = ("unshare", "--cgroup", "--pid", "--fork", "--kill-child")
BECOMING = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
OWN = ("unshare", "--user", "--map-current-user")


def innermost(process: subprocess.Popen[str]) -> int:
    """The last of a line of only children: each unshare(1) waits for one."""
    pid = process.pid
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        (pid,) = map(int, children)
    return pid


@pytest.mark.parametrize("before", [(), BECOMING], ids=["root", "user"])
def test_nobody_leaves_a_container_by_namespaces_of_their_own(cgroup: Cgroup, before: Sequence[str]) -> None:
    """A user of a container became the one of that number on the host, whom the site let have a guard."""
    path = path_of(cgroup)
    nested = running(cgroup, *CONTAINED, *before, *OWN, "--pid", "--fork", "--kill-child")
    assert seen(nested, innermost(nested)) == path
    leaving = running(cgroup, *CONTAINED, *before, *OWN, "--cgroup", "--pid", "--fork", "--kill-child")
    with pytest.raises(PrivilegeError, match="made within its container"):
        seen(leaving, innermost(leaving))


@pytest.mark.parametrize("before", [(), BECOMING], ids=["root", "user"])
def test_nobody_makes_containers_of_a_container(cgroup: Cgroup, before: Sequence[str]) -> None:
    """Each with as many runs as a container may have, in cgroups of its own, which a container may be given."""
    with new_cgroup(cgroup) as below:
        entering = ["sh", "-ec", f'echo $$ > {below.path}/cgroup.procs; exec "$@"', "sh"]
        process = running(cgroup, *CONTAINED, *entering, *before, *OWN, "--cgroup")
        with pytest.raises(PrivilegeError, match="made within its container"):
            seen(process, innermost(process))


@pytest.mark.parametrize("made", [("--pid", "--fork", "--kill-child"), ("--cgroup",), CONTAINED[1:]], ids="-".join)
def test_user_does_not_become_several_by_a_program_that_makes_namespaces_as_root(
    cgroup: Cgroup, made: Sequence[str]
) -> None:
    """As apptainer does, installed set-user-id: each of the user's own cgroups was a container."""
    path = path_of(cgroup)
    with new_cgroup(cgroup) as own, new_cgroup(own) as below:
        os.chown(own.path, NOBODY, NOBODY)
        os.chown(below.path, NOBODY, NOBODY)
        for place in (own, below):
            process = running(place, "unshare", *made, *BECOMING)
            assert seen(process, innermost(process)) == path


@pytest.mark.parametrize("user", ["--user", ""], ids=["user-namespace", "host-ids"])
def test_container_of_an_engine_may_have_a_user_namespace(cgroup: Cgroup, user: str) -> None:
    process = running(cgroup, *CONTAINED, *filter(None, [user]))
    assert seen(process, innermost(process)) == path_of(cgroup)


@pytest.mark.usefixtures("root")
def test_container_that_holds_its_guard_as_well_is_none() -> None:
    process = running(None, "unshare", "--cgroup")
    with pytest.raises(PrivilegeError, match="its guard is in as well"):
        seen(process)


def test_process_outside_of_what_its_namespace_shows_is_refused(cgroup: Cgroup) -> None:
    with new_cgroup(cgroup) as below:
        leaving = ["unshare", "--cgroup", "sh", "-ec", f'echo $$ > {cgroup.path}/cgroup.procs; exec "$@"', "sh"]
        with pytest.raises(PrivilegeError, match="outside of what its own cgroup namespace shows"):
            seen(running(below, *leaving))


def test_process_that_has_ended_is_in_no_container() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(OSError):
        container_of(process.pid)


def test_account_of_a_container_is_no_users_and_a_place_in_a_file() -> None:
    accounts = {account_of(name) for name in ("/a", "/b", "/a/b", "/\udcff")}
    assert len(accounts) == 4
    assert all(account >= 2**32 and account * 8 + 8 < 2**62 for account in accounts)
    assert os.getuid() not in accounts
