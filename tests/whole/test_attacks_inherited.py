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
from conversation import WAYS, Conversation, guards, log_of, order
from handing_down import OF_ANYBODY, io_priority_of, scheduling_of
from hosts import eventually, is_alive
from process_table import status_of

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
        "memory policies": {line.split()[1] for line in (place / "numa_maps").read_text().splitlines()},
        "scheduling": scheduling_of(pid),
        "io priority": io_priority_of(pid),
        "processors": os.sched_getaffinity(pid),
        "session": os.getsid(pid) == pid,
        "descriptors": {name for name in os.listdir(place / "fd") if int(name) > 10},
        **{name: status[name] for name in _OF_STATUS if name in status},
    }


@pytest.mark.parametrize("what", [*OF_ANYBODY, "nothing"])
@pytest.mark.parametrize("way", WAYS)
def test_guard_has_nothing_that_its_caller_handed_down(ground: Ground, way: str, what: str) -> None:
    plain = ground.talk(ground.bob, way)
    expected = seen(plain.hear()["ready"]["pid"])
    talk = ground.talk(ground.alice, way, before=handing(what))
    answer = talk.hear()
    if not answer and f"{what}: " in (errors := talk.errors()):
        plain.hang_up()
        pytest.skip(f"not taken here: {errors.strip()}")
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


@pytest.mark.parametrize("name", ["ALRM", "TSTP", "TTIN", "PIPE", "USR1", "TERM", "CONT"])
def test_signal_that_sudo_passes_on_does_not_end_the_guard(ground: Ground, name: str) -> None:
    """Whoever called sudo may signal it, and it hands on what it gets; for an alarm it ends its command."""
    talk = ground.guarded(ground.alice, "sudo")
    (guard,) = guards(ground.machine)
    ground.run(ground.alice, ["pkill", f"-{name}", "-x", "sudo"])
    time.sleep(_SUDOS_PATIENCE_SECONDS if name == "ALRM" else 0.3)
    assert is_alive(guard) and status_of(guard)["State"].startswith("S")
    os.kill(guard, getattr(signal, f"SIG{name}"))  # also from one whose sudo passes on more
    time.sleep(0.2)
    assert is_alive(guard) and status_of(guard)["State"].startswith("S")
    ground.run(ground.alice, ["pkill", "-CONT", "-x", "sudo"])
    talk.hang_up()
    assert eventually(lambda: not is_alive(guard), seconds=5)
    assert log_of(ground.machine).count(": released") == 1
