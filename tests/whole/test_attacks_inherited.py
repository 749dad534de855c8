"""Attacks by what a caller hands down: attributes of his process, and the cgroups of version 1 that are his own."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import handing_down
import pytest
from attacking import Ground
from cgroups import cgroup_of_version_1, place_of_version_1
from conversation import WAYS, Conversation, guards, log_of, order
from handing_down import OF_ANYBODY, io_priority_of, scheduling_of
from hosts import eventually, is_alive
from process_table import name_of, status_of

# terminate_command(): SIGHUP, SIGTERM, and two seconds later SIGKILL.
_SUDOS_PATIENCE_SECONDS = 3.0
_OF_STATUS = ("THP_enabled", "Speculation_Store_Bypass", "SpeculationIndirectBranch", "Umask", "SigBlk", "SigIgn")


def handing(what: str) -> str:
    """The shell's command that hands it down to what it executes."""
    words = [sys.executable, "-I", "-S", handing_down.__file__, what, "--"]
    return f'exec {shlex.join(words)} /bin/sh -c \'exec "$@"\' sh "$@"'


def seen(pid: int) -> dict[str, Any]:
    """What can be seen from outside of what a process has been handed down."""
    place = Path("/proc", str(pid))
    status = status_of(pid)
    return {
        "timer slack": (place / "timerslack_ns").read_text(),
        "personality": (place / "personality").read_text(),
        "core filter": (place / "coredump_filter").read_text(),
        "memory shortage": (place / "oom_score_adj").read_text(),
        "autogroup": (place / "autogroup").read_text().partition(" ")[2],
        "memory policies": {line.split()[1] for line in _lines_of(place / "numa_maps")},
        "scheduling": scheduling_of(pid),
        "io priority": io_priority_of(pid),
        "processors": os.sched_getaffinity(pid),
        "session": os.getsid(pid) == pid,
        "descriptors": {name for name in os.listdir(place / "fd") if int(name) > 10},
        **{name: status[name] for name in _OF_STATUS if name in status},
    }


def _lines_of(file: Path) -> list[str]:
    """The lines of a file; none on a kernel that has no such file."""
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("what", [*OF_ANYBODY, "nothing"])
@pytest.mark.parametrize("way", WAYS)
def test_guard_has_nothing_that_its_caller_handed_down(ground: Ground, way: str, what: str) -> None:
    plain = ground.talk(ground.bob, way)
    expected = seen(plain.hear()["ready"]["pid"])
    talk = ground.talk(ground.alice, way, before=handing(what))
    answer = talk.hear()
    if not answer and f"{what}: " in (errors := talk.errors()):
        plain.hang_up()
        pytest.skip(f"this kernel does not take it: {errors.strip()}")
    found = seen(answer["ready"]["pid"])
    assert found == expected
    assert found["timer slack"] == "1\n" and found["session"]
    talk.say(order(peers=[ground.peer.ipv4]))
    assert "guarding" in talk.hear_verdict()
    talk.release()
    plain.hang_up()


def test_root_of_a_container_hands_nothing_down_either(ground: Ground) -> None:
    for what in ("timer slack", "io priority", "personality"):
        talk = Conversation(ground.machine, ground.node, None, "direct", before=handing(what))
        guard = seen(talk.hear()["ready"]["pid"])
        assert (guard["timer slack"], guard["io priority"], guard["personality"]) == ("1\n", 0, "00000000\n")
        talk.hang_up()


@pytest.mark.parametrize("what", ["timer slack", "idle", "io priority"])
def test_pace_of_a_caller_keeps_nobody_else_waiting(ground: Ground, what: str) -> None:
    """The guard holds the lock of the host while it runs iptables, and waits for that with a time-out."""
    alices = [ground.talk(ground.alice, "sudo", before=handing(what)) for _ in range(3)]
    for number, talk in enumerate(alices):
        assert talk.hear()["ready"]
        talk.say(order(peers=[ground.peer.ipv4], ports=[29500 + number]))
    before = time.monotonic()
    ground.guarded(ground.bob, "sudo", ports=[40000]).release()
    assert time.monotonic() - before < 15
    for talk in alices:
        assert "guarding" in talk.hear_verdict()
        talk.release()


def waits_for_orders(guard: int) -> bool:
    """Tell a guard that sleeps in its loop from one that was stopped; for a moment it may also be at work."""
    return status_of(guard)["State"].startswith("S")


@pytest.mark.parametrize("name", ["ALRM", "TSTP", "TTIN", "PIPE", "USR1", "TERM", "CONT"])
def test_signal_that_sudo_passes_on_does_not_end_the_guard(ground: Ground, name: str) -> None:
    """Whoever called sudo may signal it, and it hands on what it gets; for an alarm it ends its command."""
    talk = ground.guarded(ground.alice, "sudo")
    (guard,) = guards(ground.machine)
    ground.run(ground.alice, ["pkill", f"-{name}", "-x", "sudo"])
    time.sleep(_SUDOS_PATIENCE_SECONDS if name == "ALRM" else 0.3)
    assert eventually(lambda: is_alive(guard) and waits_for_orders(guard), seconds=5)
    os.kill(guard, getattr(signal, f"SIG{name}"))  # also from one whose sudo passes on more
    time.sleep(0.2)
    assert eventually(lambda: is_alive(guard) and waits_for_orders(guard), seconds=5)
    ground.run(ground.alice, ["pkill", "-CONT", "-x", "sudo"])
    talk.hang_up()
    assert eventually(lambda: not is_alive(guard), seconds=5)
    assert log_of(ground.machine).count(": released") == 1


# --- cgroups of version 1 that are the caller's own ---

_VERSION_1 = ["memory", "pids", "cpu", "cpuacct", "cpuset", "freezer", "devices", "blkio", "name=systemd"]
# Takes memory until there is none left.
_TAKE_MEMORY = "held = []\nwhile True: held.append(bytearray(1 << 20))"
_MEGABYTE = 1 << 20
# sudo, a guard and what waits for it, and some of what comes with them.
_ROOM = 100 * _MEGABYTE


def enter(place: Path) -> str:
    return f'echo $$ > "{place}/cgroup.procs"'


def paths_of(pid: int) -> dict[str, str]:
    """The cgroup of a process in each hierarchy, by controllers or name."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines}


def in_it(place: Path) -> set[int]:
    return set(map(int, (place / "cgroup.procs").read_text().split()))


@pytest.mark.parametrize("name", _VERSION_1)
def test_guard_leaves_a_cgroup_of_version_1_that_is_its_callers_own(ground: Ground, name: str) -> None:
    """But not before its order was found good: until then whoever starts guards pays for them."""
    with cgroup_of_version_1(name, ground.alice.uid) as place:
        talk = ground.talk(ground.alice, "sudo", before=enter(place))
        guard = talk.hear()["ready"]["pid"]
        assert guard in in_it(place)
        talk.say(order(peers=[ground.peer.ipv4]))
        assert "guarding" in talk.hear_verdict()
        assert f"/{place.name}" not in paths_of(guard).values()
        # What waits for the guard is not there either. sudo is, where processors are: who moves it between those must
        # have all that it may do (cap_task_setscheduler), and the guard has given that up.
        left = {name_of(pid) for pid in in_it(place)} - {name_of(talk.pid)}
        assert left <= ({"sudo"} if name == "cpuset" else set())
        talk.release()


def test_order_that_is_refused_moves_nobody(ground: Ground) -> None:
    with cgroup_of_version_1("memory", ground.alice.uid) as place:
        talk = ground.talk(ground.alice, "sudo", before=enter(place))
        guard = talk.hear()["ready"]["pid"]
        talk.say(order(ports=[22]))
        assert "refused" in talk.hear_verdict()
        assert guard in in_it(place) or not is_alive(guard)
        talk.hang_up()


def test_memory_that_is_used_up_without_a_killer_does_not_stop_the_guard(ground: Ground) -> None:
    """Whoever needs more sleeps until there is some (memory.oom_control): a guard did so with the host's lock."""
    with cgroup_of_version_1("memory", ground.alice.uid) as place:
        talk = ground.talk(ground.alice, "sudo", before=enter(place))
        talk.say(order(peers=[ground.peer.ipv4]))
        assert "guarding" in talk.hear_verdict()
        (guard,) = guards(ground.machine)
        (place / "memory.oom_control").write_text("1")
        (place / "memory.limit_in_bytes").write_text(str(_ROOM))
        hog = ["sh", "-c", f'{enter(place)}; exec "$@"', "sh", sys.executable, "-I", "-S", "-c", _TAKE_MEMORY]
        taking = ground.popen(ground.alice, hog)
        assert eventually(lambda: "under_oom 1" in (place / "memory.oom_control").read_text(), seconds=20)
        peers = [f"10.1.{number >> 8}.{number & 255}" for number in range(3000)]
        talk.say({"peers": {"networks": peers}})
        time.sleep(1)
        talk.process.kill()  # it sleeps there as well
        talk.hang_up()
        assert eventually(lambda: not is_alive(guard), seconds=15), status_of(guard)["State"]
        assert ground.machine.runs() == frozenset()
        ground.guarded(ground.bob, "sudo").release()
        taking.kill()


def test_limit_on_processes_does_not_keep_the_guard_from_cleaning_up(ground: Ground) -> None:
    with cgroup_of_version_1("pids", ground.alice.uid) as place:
        talk = ground.talk(ground.alice, "sudo", before=enter(place))
        talk.say(order(peers=[ground.peer.ipv4]))
        assert "guarding" in talk.hear_verdict()
        (place / "pids.max").write_text("1")
        talk.hang_up()
        assert eventually(lambda: not guards(ground.machine), seconds=15)
        assert log_of(ground.machine).count(": released") == 1


def test_processor_that_is_kept_short_keeps_nobody_else_waiting(ground: Ground) -> None:
    """1 ms a second: what a guard does under the host's lock would take minutes."""
    with cgroup_of_version_1("cpu", ground.alice.uid) as place:
        if not (place / "cpu.cfs_quota_us").exists():
            pytest.skip("this kernel limits no processor time (CONFIG_CFS_BANDWIDTH)")
        alices = [ground.talk(ground.alice, "sudo", before=enter(place)) for _ in range(3)]
        for talk in alices:
            assert talk.hear()["ready"]
        (place / "cpu.cfs_period_us").write_text("1000000")
        (place / "cpu.cfs_quota_us").write_text("20000")
        for number, talk in enumerate(alices):
            talk.say(order(peers=[ground.peer.ipv4], ports=[29500 + number]))
        time.sleep(2)
        before = time.monotonic()
        ground.guarded(ground.bob, "sudo", ports=[40000]).release()
        assert time.monotonic() - before < 10
        (place / "cpu.cfs_quota_us").write_text("-1")
        for talk in alices:
            assert "guarding" in talk.hear_verdict()
            talk.release()


def test_guard_that_cannot_leave_its_callers_cgroup_does_not_take_the_lock(ground: Ground) -> None:
    with cgroup_of_version_1("memory", ground.alice.uid) as place:
        mount = str(place_of_version_1("memory"))
        talk = ground.talk(ground.alice, "sudo", before=enter(place))
        assert talk.hear()["ready"]
        assert ground.machine.run(ground.node, ["mount", "-o", "remount,bind,ro", mount]).returncode == 0
        try:
            talk.say(order(peers=[ground.peer.ipv4]))
            words = talk.hear_verdict()["refused"]["message"]
        finally:
            assert ground.machine.run(ground.node, ["mount", "-o", "remount,bind,rw", mount]).returncode == 0
        talk.hang_up()
        assert f"cannot leave the cgroup memory:/{place.name}" in words
