"""Attacks by what is sent along on local sockets: descriptors whose last close holds up whoever is made to do it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lingering
import pytest
from attacking import Ground
from cgroups import new_cgroup
from conversation import SOCKET, Conversation, guards, log_of, order
from hosts import eventually
from users import GUARD, User

from securerun.firewall.policy import RUN_ID
from securerun.guard.presence import Presence
from securerun.guard.program import SOCKET as OF_LISTENER
from securerun.protection import apart_runs, keeper

LINGERING = str(Path(lingering.__file__))
RUN = "0123456789ab"
assert RUN_ID.fullmatch(RUN)


@contextmanager
def sent(ground: Ground, user: User, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A program of a user's that has sent what holds whoever closes it, and goes on."""
    process = ground.popen(user, [sys.executable, LINGERING, *words], stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    told = iter(process.stdout.readline, "")
    assert any(line == "sent\n" for line in told), process.stderr.read()
    yield process
    process.kill()
    process.communicate()


def test_descriptor_along_with_an_order_is_refused_and_holds_no_guard_up(ground: Ground) -> None:
    with sent(ground, ground.alice, SOCKET, json.dumps(order())):
        assert eventually(lambda: "descriptors were sent along" in log_of(ground.machine), seconds=5)
        assert eventually(lambda: not guards(ground.machine), seconds=5)


def test_descriptor_along_with_a_message_keeps_no_guard_from_its_work(ground: Ground) -> None:
    """The guard slept in the close for as long as its user had said, whatever became of the job."""
    message = json.dumps({"peers": {"networks": []}})
    with sent(ground, ground.alice, SOCKET, message, "--before", json.dumps(order())) as launcher:
        said = "sent what it must not: descriptors were sent along"
        assert eventually(lambda: said in log_of(ground.machine), seconds=5)
        launcher.kill()
        assert eventually(lambda: ground.machine.records() is None, seconds=5)
        assert eventually(lambda: not guards(ground.machine), seconds=5)


def test_nobody_holds_up_anothers_guard_by_what_they_send_to_its_sign(ground: Ground) -> None:
    """Anybody may connect there, which is all that it is for."""
    talk = ground.guarded(ground.alice, "socket")
    (record,) = ground.machine.runs()
    sign = f"@securerun-{record.partition('.')[0]}"
    with sent(ground, ground.bob, sign, "x", "--times", "3"):
        time.sleep(1.5)  # by then the guard has let those go that connected
        talk.release()
        assert eventually(lambda: ground.machine.records() is None, seconds=5)
        assert eventually(lambda: not guards(ground.machine), seconds=5)


# The guard of a node asks where init is: the cgroup of the tests' own is a container to it, and bob's is another.
_IN_A_CONTAINER = 'exec unshare --cgroup setpriv --reuid={0.uid} --regid={0.gid} --clear-groups "$@"'


def test_nobody_holds_up_the_listener_for_all_others(ground: Ground) -> None:
    listener = ground.machine.popen(ground.node, [GUARD, "--listen"], stdout=subprocess.DEVNULL)
    try:
        assert eventually(ground.machine.place(str(OF_LISTENER)).is_socket, seconds=20)
        with (
            new_cgroup() as own,
            sent(ground, ground.alice, str(OF_LISTENER), json.dumps({"report": {}}), "--times", "80"),
        ):
            talk = Conversation(
                ground.machine,
                ground.node,
                None,
                "socket",
                socket=str(OF_LISTENER),
                cgroup=own,
                before=_IN_A_CONTAINER.format(ground.bob),
            )
            assert "ready" in talk.hear()
            talk.hang_up()
        assert "turned away at the door" in log_of(ground.machine)
    finally:
        os.kill(listener.pid, signal.SIGTERM)
        assert listener.wait(timeout=20) is not None
    assert eventually(lambda: not guards(ground.machine), seconds=5)


@contextmanager
def lasting() -> Iterator[list[socket.socket]]:
    """What keeps descriptors that were sent along from being closed at once, until the block ends, or for some time."""
    kept: list[socket.socket] = []

    def close() -> None:
        for end in kept:
            end.close()

    late = threading.Timer(_HELD_SECONDS, close)
    late.start()
    try:
        yield kept
    finally:
        late.cancel()
        close()


_HELD_SECONDS = 10.0


@pytest.mark.usefixtures("root")
def test_status_is_not_held_up_by_who_stands_where_runs_are_asked_for() -> None:
    """Root's asks everybody who stands there."""
    with socket.socket(socket.AF_UNIX) as standing, lasting() as kept:
        standing.bind(keeper.place_of(RUN))
        standing.listen()

        def answer() -> None:
            kept.append(standing.accept()[0])
            lingering.send_along(kept[0], b"{}", kept)

        answering = threading.Thread(target=answer)
        answering.start()
        began = time.monotonic()
        assert apart_runs.read() == ()
        assert time.monotonic() - began < _HELD_SECONDS / 2
        answering.join()


@pytest.mark.usefixtures("root")
def test_sign_is_made_room_at_whoever_has_sent_what_with_it() -> None:
    """As in the guard's turn each second: it is back at once, and the next ones find room."""
    presence = Presence(RUN)
    try:
        with lasting() as kept:
            for _ in range(3):
                for _ in range(10):
                    kept.append(lingering.connected(f"\0securerun-{RUN}"))
                    lingering.send_along(kept[-1], b"x", kept)
                began = time.monotonic()
                presence.make_room()
                assert time.monotonic() - began < _HELD_SECONDS / 2
    finally:
        presence.close()
