"""Attacks by guards that wait: each is a process of root's, costs its user nothing, and may be asked for by anybody."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from attacking import Ground
from conversation import WAYS, Conversation, guards, log_of, order
from hosts import eventually, finish

from securerun.errors import PrivilegeError
from securerun.guard import log, server
from securerun.guard.channel import Channel
from securerun.guard.waiting import FILE, SLOTS

# A launcher that has its guard come up while it is busy for some seconds, as with `import torch`.
_LAUNCH = """
import secrets, sys, time
from securerun.firewall.policy import Policy, PortRange
from securerun.guard.protocol import Order
from securerun.protection.client import Guard
guard = Guard()
time.sleep(2)
port = int(sys.argv[1])
policy = Policy(secrets.token_hex(6), (PortRange(port, port, "planned"),), ())
print(guard.guard(Order(policy, "auto", "auto", 0.5, "train.py"), print).layers[0].backend, flush=True)
sys.stdin.read()
guard.release(False)
"""
_JOBS = 20


def first_words(talks: list[Conversation]) -> list[dict[str, Any]]:
    return [talk.hear() for talk in talks]


@pytest.mark.parametrize("way", WAYS)
def test_connections_without_an_order_cost_few_processes_and_shut_nobody_out(ground: Ground, way: str) -> None:
    talks = [ground.talk(ground.alice, way) for _ in range(2 * SLOTS)]
    words = first_words(talks)
    assert sum("ready" in word for word in words) == SLOTS
    refused = [word["refused"] for word in words if "refused" in word]
    assert len(refused) == SLOTS and {one["status"] for one in refused} == {PrivilegeError.status}
    assert f"{SLOTS} guards of user {ground.alice.uid} are waiting" in refused[0]["message"]
    assert eventually(lambda: len(guards(ground.machine)) == SLOTS)
    ground.guarded(ground.bob, way).release()
    for talk in talks:
        talk.hang_up()
    assert eventually(lambda: not guards(ground.machine))


@pytest.mark.parametrize("way", WAYS)
def test_place_of_a_guard_is_given_back_however_it_ends(ground: Ground, way: str) -> None:
    talks = [ground.talk(ground.alice, way) for _ in range(SLOTS)]
    waiting = [word["ready"]["pid"] for word in first_words(talks)]
    os.kill(waiting[0], signal.SIGKILL)
    talks[1].hang_up()
    talks[2].say(order(ports=[22]))
    assert "refused" in talks[2].hear_verdict()
    talks[3].say(order())
    assert "guarding" in talks[3].hear_verdict()
    assert eventually(lambda: len(guards(ground.machine)) == SLOTS - 3)
    more = [ground.talk(ground.alice, way) for _ in range(4)]
    assert all("ready" in word for word in first_words(more))
    talks[3].release()
    for talk in (*talks[:1], *talks[2:3], *talks[4:], *more):
        talk.hang_up()


def test_nothing_is_left_of_places_that_were_all_given_back(ground: Ground) -> None:
    ground.guarded(ground.alice, "sudo").release()
    assert eventually(lambda: not guards(ground.machine))
    assert not ground.machine.place(FILE).exists()


@pytest.mark.parametrize("plant", ["link", "open", "anothers", "directory"])
def test_file_of_places_that_another_could_change_is_not_used(ground: Ground, plant: str) -> None:
    place = ground.machine.place(FILE)
    if plant == "link":
        place.symlink_to("/etc/hostname")
    elif plant == "directory":
        place.mkdir()
    else:
        place.touch()
        place.chmod(0o666 if plant == "open" else 0o600)
        os.chown(place, ground.alice.uid if plant == "anothers" else 0, 0)
    assert str(FILE) in ground.refusal(ground.alice, order())
    place.rmdir() if plant == "directory" else place.unlink()


def test_jobs_that_start_at_once_all_get_their_guards(ground: Ground) -> None:
    """As with `srun -n 20` on one host: while torch is imported there are places for some of them only."""
    programs = [
        ground.machine.popen(
            ground.node,
            [sys.executable, "-c", _LAUNCH, str(29500 + number)],
            user=ground.alice,
            stdin=subprocess.PIPE,
        )
        for number in range(_JOBS)
    ]
    for program in programs:
        assert program.stdout is not None and program.stderr is not None
        assert program.stdout.readline() == "shield\n", program.stderr.read()
    assert len(ground.machine.runs()) == _JOBS
    for program in programs:
        assert finish(program, timeout=60).returncode == 0


def test_asking_for_a_report_is_no_way_to_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PATIENCE_SECONDS", 1.0)
    near, far = socket.socketpair()
    asked = 0

    def report() -> None:
        nonlocal asked
        asked += 1
        time.sleep(0.1)
        far.send(b'{"report": {}}\n')

    with near, far:
        far.send(b'{"report": {}}\n')
        before = time.monotonic()
        with pytest.raises(PrivilegeError, match="waiting for an order for too long"):
            server.Orders(Channel(near.fileno(), os.O_RDONLY)).wait_for_order(report)
    assert time.monotonic() - before < 5 and asked > 3


def test_reports_without_end_are_answered_at_a_pace_that_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection had 37,400 of them in 3.5 s."""
    monkeypatch.setattr(server, "_PATIENCE_SECONDS", 2.0)
    near, far = socket.socketpair()
    asked = []

    def report() -> None:
        asked.append(time.monotonic())
        far.send(b'{"report": {}}\n')

    with near, far:
        far.send(b'{"report": {}}\n')
        with pytest.raises(PrivilegeError, match="waiting for an order for too long"):
            server.Orders(Channel(near.fileno(), os.O_RDONLY)).wait_for_order(report)
    assert 16 < len(asked) <= 16 + 2.0 / 0.25 + 1
    assert asked[15] - asked[0] < 1, "a command that looks asks a few times at once"


@pytest.mark.parametrize("way", WAYS)
def test_who_asks_a_guard_without_end_is_answered_now_and_then_and_guarded_still(ground: Ground, way: str) -> None:
    talk = ground.talk(ground.alice, way)
    assert "ready" in talk.hear()
    began, answered = time.monotonic(), 0
    while time.monotonic() - began < 1.5:
        talk.say({"report": {}})
        assert "runs" in talk.hear()
        answered += 1
    assert answered <= 16 + (time.monotonic() - began) / 0.25 + 1
    talk.say(order())
    assert "guarding" in talk.hear_verdict()
    talk.release()


def test_reports_that_take_long_are_answered_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs with 100,000 peers each takes a second of root's processor."""
    monkeypatch.setattr(server, "_PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(server, "_REPORTS_AT_ONCE", 1)
    near, far = socket.socketpair()
    spent = time.process_time()

    def report() -> None:
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        far.send(b'{"report": {}}\n')

    with near, far:
        far.send(b'{"report": {}}\n')
        with pytest.raises(PrivilegeError, match="waiting for an order for too long"):
            server.Orders(Channel(near.fileno(), os.O_RDONLY)).wait_for_order(report)
    assert time.process_time() - spent < 1


def test_order_after_many_reports_is_heard() -> None:
    near, far = socket.socketpair()
    left = 20

    def report() -> None:
        nonlocal left
        left -= 1
        far.send(b'{"report": {}}\n' if left else json.dumps(order()).encode() + b"\n")

    with near, far:
        far.send(b'{"report": {}}\n')
        assert server.Orders(Channel(near.fileno(), os.O_RDONLY)).wait_for_order(report) is not None


def test_report_with_the_beginning_of_another_is_no_way_to_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has begun has time to come, and so had whoever began again and again."""
    monkeypatch.setattr(server, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(server, "_ORDER_SECONDS", 0.5)
    near, far = socket.socketpair()
    parts = iter([b'"report": {}}\n', b'{"report": {}}\n{'] * 20)

    def say_on() -> None:
        with suppress(OSError):
            for part in parts:
                time.sleep(0.2)
                far.send(part)

    speaker = threading.Thread(target=say_on)
    with near, far:
        far.send(b"{")
        speaker.start()
        before = time.monotonic()
        with pytest.raises(PrivilegeError, match="waiting for an order for too long"):
            server.Orders(Channel(near.fileno(), os.O_RDONLY)).wait_for_order(lambda: None)
        lasted = time.monotonic() - before
    speaker.join()
    assert lasted < 2


# --- what is logged of it ---


def test_refusals_without_end_are_a_few_lines_a_minute(ground: Ground) -> None:
    for _ in range(25):
        ground.refusal(ground.alice, order(ports=[22]))
    assert log_of(ground.machine).count(f"refused to user {ground.alice.uid}") == 10
    ground.refusal(ground.bob, order(ports=[22]))
    assert f"refused to user {ground.bob.uid}" in log_of(ground.machine)
    # A minute later.
    place = ground.machine.place(FILE)
    entries = json.loads(place.read_text())
    place.write_text(json.dumps({name: [began - 61, refused] for name, (began, refused) in entries.items()}))
    ground.refusal(ground.bob, order(ports=[22]))
    assert f"15 more refusals to user {ground.alice.uid} are not in this log" in log_of(ground.machine)


def test_refusal_is_one_short_line_whatever_was_asked(ground: Ground) -> None:
    ports = [(1000 - number, 1000 - number) for number in range(250)]
    for asked in (
        order(ports=ports),
        order(peers=["x" * 2000]),
        {"order": {"x" * 30_000: 1}},
        b"\xff" * 60_000 + b"\n",
    ):
        ground.refusal(ground.alice, asked)
    lines = log_of(ground.machine).splitlines()
    assert len(lines) == 4 and max(len(line.encode()) for line in lines) <= 540


def test_line_of_the_log_is_cut_between_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def hear(place: str, data: bytes) -> None:
        if place != log.SYSTEM_LOG:
            raise FileNotFoundError(place)
        said.append(data.decode()[len("<86>Nov 28 18:00:00 ") :])

    monkeypatch.setattr("securerun.guard.log._send", hear)
    for words in ("short", "ü" * 3000, "\x1b" * 3000, "x" * 497):
        log.note("securerun-guard", words)
    assert said[0].endswith(": short")
    assert all(len(line.encode()) <= 500 for line in said)
    assert said[1].endswith("ü... (of 3000 characters)")
