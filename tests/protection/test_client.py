"""The launcher's side of the guard, with guards that die, refuse, or speak another version's language.

Each stand-in is a process that says what a line of Python has it say, by the channel of a real one.
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from cgroups import in_child

from securerun.errors import PolicyError, PrivilegeError
from securerun.firewall.policy import Layer, Policy
from securerun.guard.protocol import (
    RUN_ID_VARIABLE,
    Guarding,
    KeyOrder,
    Message,
    Notice,
    Order,
    Ready,
    Refused,
    Released,
    Run,
    Runs,
    encode,
)
from securerun.linux import proc
from securerun.linux.networks import collapse
from securerun.protection import client, ways
from securerun.protection.client import Guard, Refusal
from securerun.protection.ways import Way

ORDER = Order(Policy("0123456789ab", (), (ipaddress.IPv4Network("10.77.0.2"),)), "auto", "auto", 0.0, "test")
GUARDING = Guarding((Layer("shield", "test"),))
READ = "sys.stdin.readline()"
DIE = "sys.exit(3)"
PATIENCE_SECONDS = 30.0


def say(*messages: Message) -> str:
    return f"os.write(1, {b''.join(map(encode, messages))!r})"


_started: list[ways.Connection] = []


def start(script: str) -> ways.Connection:
    """Start what stands in for a guard; it ends with the test."""
    _started.append(ways._start([sys.executable, "-I", "-S", "-c", f"import os, sys\n{script}"], {}))
    return _started[-1]


@pytest.fixture(autouse=True)
def _no_stand_in_stays() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()._process
        assert process is not None
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _every_test_begins_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what is started after a test carry the run of one, which another test's guard may look for."""
    monkeypatch.setenv(RUN_ID_VARIABLE, "")
    monkeypatch.setattr(client, "_running", {})
    monkeypatch.setattr(client, "_stays", {})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[str]:
    """What the next guards do, one text each; the last one's is that of all after it."""
    scripts: queue.Queue[str] = queue.Queue()
    last = [DIE]

    def open_one() -> ways.Connection:
        if not scripts.empty():
            last[0] = scripts.get()
        return start(last[0])

    monkeypatch.setattr(client, "ways", lambda: (Way("by a test", "", open_one),))
    return scripts


def will(scripts: queue.Queue[str], *each: Sequence[str]) -> None:
    for steps in each:
        scripts.put("\n".join(steps))


def test_without_any_guard_the_ways_to_one_are_named(stand_in: queue.Queue[str]) -> None:
    will(stand_in, ["print('it may not', file=sys.stderr)", DIE])
    with pytest.raises(PrivilegeError) as refusal:
        Guard().guard(ORDER, lambda _: None)
    assert "securerunctl setup sudoers" in str(refusal.value)
    assert "by a test: it may not" in str(refusal.value)


def test_a_way_that_cannot_be_opened_is_named_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot() -> ways.Connection:
        raise FileNotFoundError(2, "No such file or directory")

    found = (Way("shut", "it is shut", cannot), Way("broken", "", cannot))
    monkeypatch.setattr(client, "ways", lambda: found)
    with pytest.raises(PrivilegeError, match="Tried: it is shut; broken: No such file or directory"):
        Guard().guard(ORDER, lambda _: None)


def test_guard_of_roots_that_is_killed_in_its_start_is_followed_by_another_of_roots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And by no other way, on which root has a user's limits; unless that one does not start either."""
    opened: list[str] = []

    def opener(way: str, *scripts: str) -> Way:
        def open_one() -> ways.Connection:
            opened.append(way)
            return start(scripts[min(opened.count(way), len(scripts)) - 1])

        return Way(way, "", open_one)

    works, killed = "\n".join([say(Ready(1)), READ, say(GUARDING), READ]), "os.kill(os.getpid(), 9)"
    monkeypatch.setattr(client, "ways", lambda: (opener(ways.DIRECTLY, killed, works), opener(ways.BY_SUDO, works)))
    assert Guard().guard(ORDER, lambda _: None) == GUARDING
    assert opened == [ways.DIRECTLY] * 2
    opened.clear()
    monkeypatch.setattr(client, "ways", lambda: (opener(ways.DIRECTLY, killed), opener(ways.BY_SUDO, killed)))
    with pytest.raises(PrivilegeError, match="Tried: directly: it ended with status -9; by sudo: it ended with") as no:
        Guard().guard(ORDER, lambda _: None)
    assert opened == [ways.DIRECTLY] * 2 + [ways.BY_SUDO]
    assert str(no.value).count("directly: ") == 1


def test_a_refusal_keeps_its_words_and_its_status(stand_in: queue.Queue[str]) -> None:
    will(stand_in, [say(Ready(1)), READ, say(Refused(78, "not with me"))])
    with pytest.raises(Refusal, match="not with me") as refusal:
        Guard().guard(ORDER, lambda _: None)
    assert refusal.value.status == 78
    will(stand_in, [say(Refused(77, "never"))])
    with pytest.raises(Refusal, match="never"):
        Guard().guard(ORDER, lambda _: None)


def test_a_guard_that_is_not_to_be_had_now_is_asked_for_again(stand_in: queue.Queue[str]) -> None:
    busy = [say(Refused(77, "too many", later=True))]
    will(stand_in, busy, busy, busy, [say(Ready(1)), READ, say(GUARDING), READ, say(Released(()))])
    guard = Guard()
    assert guard.guard(ORDER, lambda _: None) == GUARDING
    guard.release(False)


def test_a_guard_that_is_never_to_be_had_is_not_asked_for_without_end(
    stand_in: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_BUSY_SECONDS", 0.3)
    will(stand_in, *[[say(Refused(77, "too many", later=True))]] * 9)
    with pytest.raises(Refusal, match="too many"):
        Guard().guard(ORDER, lambda _: None)


def test_a_guard_of_another_version_is_no_guard(stand_in: queue.Queue[str]) -> None:
    will(stand_in, [r"os.write(1, b'{\"ready\": 1, \"securerun\": 0}\n')"])
    with pytest.raises(PrivilegeError, match="is not of this securerun"):
        Guard().guard(ORDER, lambda _: None)


def test_guards_that_die_over_the_order_are_replaced_a_few_times_and_no_more(stand_in: queue.Queue[str]) -> None:
    will(stand_in, [say(Ready(1)), READ, DIE])
    guard = Guard()
    with pytest.raises(PrivilegeError, match="the guard ended without an answer: it ended with status 3"):
        guard.guard(ORDER, lambda _: None)
    assert len(guard._replaced) == client._REPLACEMENTS
    assert not os.environ[RUN_ID_VARIABLE]


def test_a_guard_that_dies_over_the_order_is_replaced_by_one_that_takes_over(stand_in: queue.Queue[str]) -> None:
    adopting = ["import json", f"assert json.loads({READ})['order']['adopt'] is True"]
    released = [READ, say(Released(()))]
    will(stand_in, [say(Ready(1)), READ, DIE], [say(Ready(1)), *adopting, say(GUARDING), *released])
    guard = Guard()
    assert guard.guard(ORDER, lambda _: None) == GUARDING
    assert os.environ[RUN_ID_VARIABLE] == ORDER.policy.run_id
    assert guard.release(failed=False) == Released(())


def told_by(guard: Guard) -> queue.Queue[Notice]:
    told: queue.Queue[Notice] = queue.Queue()
    guard.guard(ORDER, told.put)
    return told


def test_a_guard_that_dies_meanwhile_is_replaced_and_that_is_said(stand_in: queue.Queue[str]) -> None:
    will(
        stand_in,
        [say(Ready(1)), READ, say(GUARDING), DIE],
        [say(Ready(2)), READ, say(Guarding((), ("no chains",))), READ, say(Released(()))],
    )
    guard = Guard()
    told = told_by(guard)
    assert told.get(timeout=PATIENCE_SECONDS).words == ("the guard died; another has taken over", "no chains")
    assert guard.release(failed=True) == Released(())


def test_guard_is_replaced_whatever_is_wrong_with_who_hears_its_news(
    stand_in: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    will(
        stand_in,
        [say(Ready(1)), READ, say(GUARDING, Notice(words=("news",))), DIE],
        [say(Ready(2)), READ, say(GUARDING), READ, say(Released(()))],
    )
    told: queue.Queue[Notice] = queue.Queue()
    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def tell(notice: Notice) -> None:
        told.put(notice)
        raise KeyError(notice.words)

    guard = Guard()
    assert guard.guard(ORDER, tell) == GUARDING
    assert told.get(timeout=PATIENCE_SECONDS).words == ("news",)
    assert told.get(timeout=PATIENCE_SECONDS).words == ("the guard died; another has taken over",)
    assert guard.release(failed=False) == Released(())
    assert [str(error.exc_value) for error in shown][:1] == ["('news',)"]


def test_launcher_without_descriptors_for_a_moment_replaces_its_guard_all_the_same(
    stand_in: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many jobs are who load their data from thousands of files: their guard died in such a moment, and for good."""
    monkeypatch.setattr(client, "_PAUSE_SECONDS", 0.1)
    will(stand_in, [say(Ready(1)), READ, say(GUARDING), DIE], [say(Ready(2)), READ, say(GUARDING), READ])
    looks = 0

    def ways_but_once() -> Sequence[Way]:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return tuple(client.__dict__["ways"]())

    told: queue.Queue[Notice] = queue.Queue()
    guard = Guard(by=ways_but_once)
    assert guard.guard(ORDER, told.put) == GUARDING
    assert "no other can take over: [Errno 24]" in told.get(timeout=PATIENCE_SECONDS).words[0]
    assert told.get(timeout=PATIENCE_SECONDS).words == ("the guard died; another has taken over",)
    guard.release(failed=False)


def test_job_that_is_to_end_is_ended_also_where_nobody_can_tell_who_waits_for_the_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []

    def cannot(_: object) -> proc.Status:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(proc, "status", cannot)
    monkeypatch.setattr(os, "kill", lambda _, number: ended.append(number))
    monkeypatch.setattr(os, "_exit", ended.append)
    client._end_job(77)
    assert ended == [signal.SIGTERM]


def test_guards_that_die_again_and_again_are_replaced_with_pauses_and_that_is_said(
    stand_in: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But never given up: nobody else would end what the job leaves behind."""
    monkeypatch.setattr(client, "_PAUSE_SECONDS", 0.4)
    will(stand_in, [say(Ready(1)), READ, say(GUARDING), DIE])
    guard = Guard()
    told = told_by(guard)
    words = [told.get(timeout=PATIENCE_SECONDS).words[0] for _ in range(client._REPLACEMENTS + 1)]
    assert words[:-1] == ["the guard died; another has taken over"] * client._REPLACEMENTS
    assert words[-1] == ("guards die again and again; what stands stays, and another guard is tried every 0 s")
    began = time.monotonic()
    more = [told.get(timeout=PATIENCE_SECONDS).words[0] for _ in range(7)]
    assert more.count("the guard died; another has taken over") == 4
    assert time.monotonic() - began >= 3 * 0.4
    assert guard.release(failed=False) is None


def test_guards_that_were_killed_long_ago_do_not_count(
    stand_in: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_REPLACEMENTS_SECONDS", 0.0)
    dying = [say(Ready(1)), READ, say(GUARDING), DIE]
    will(stand_in, *[dying] * (client._REPLACEMENTS + 3), [say(Ready(1)), READ, say(GUARDING), READ, say(Released(()))])
    guard = Guard()
    told = told_by(guard)
    words = [told.get(timeout=PATIENCE_SECONDS).words[0] for _ in range(client._REPLACEMENTS + 3)]
    assert set(words) == {"the guard died; another has taken over"}
    assert guard.release(failed=False) == Released(())


def test_when_no_other_may_take_over_that_is_said_once_and_tried_again(
    stand_in: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PAUSE_SECONDS", 0.1)
    refused = [say(Refused(77, "you have too many"))]
    later = [say(Ready(1)), READ, say(GUARDING), READ, say(Released(()))]
    will(stand_in, [say(Ready(1)), READ, say(GUARDING), DIE], *[refused] * 3, later)
    guard = Guard()
    told = told_by(guard)
    (words,) = told.get(timeout=PATIENCE_SECONDS).words
    assert words.startswith("the guard died and no other can take over: you have too many; what stands stays")
    assert told.get(timeout=PATIENCE_SECONDS).words == ("the guard died; another has taken over",)
    assert guard.release(failed=False) == Released(())


def test_job_that_is_over_waits_for_no_guard_that_cannot_be_had(stand_in: queue.Queue[str]) -> None:
    will(stand_in, [say(Ready(1)), READ, say(GUARDING), DIE], [say(Refused(77, "you have too many"))])
    guard = Guard()
    told = told_by(guard)
    assert told.get(timeout=PATIENCE_SECONDS).words[0].startswith("the guard died and no other can take over")
    began = time.monotonic()
    assert guard.release(failed=False) is None
    assert time.monotonic() - began < client._FAREWELL_SECONDS


def test_peers_of_a_job_that_is_not_guarded_yet_are_nobodys_business(stand_in: queue.Queue[str]) -> None:
    will(stand_in, [READ])
    Guard().change_peers((ipaddress.IPv4Network("10.77.0.9"),))


def test_what_the_job_forks_lets_go_of_the_guard_once_and_of_nothing_else(stand_in: queue.Queue[str]) -> None:
    """A worker's own descriptors take the numbers of those, and a DataLoader of the worker's forks with them."""
    will(stand_in, [say(Ready(1)), READ, say(GUARDING), READ, say(Released(()))])
    guard = Guard()
    guard.guard(ORDER, lambda _: None)
    connection = guard._connection
    assert connection is not None
    ends = (connection._orders, connection._answers, connection._words)
    the_guards = {end for end in ends if end is not None}

    def work() -> tuple[set[int], list[int]]:
        own = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
        return the_guards & set(own), in_child(lambda: [end for end in own if not is_open(end)])

    taken, lost = in_child(work)
    assert taken == the_guards
    assert lost == []
    assert guard.release(failed=False) == Released(())


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# A process that goes on


@pytest.mark.parametrize(
    ("answer", "stays"),
    [
        (say(Released(())), ""),
        (say(Released((), stays="it still listens on port 7002")), "it still listens on port 7002"),
        (DIE, "its guard was gone when it ended"),
    ],
    ids=["is out", "stays", "the guard died"],
)
def test_process_that_cannot_leave_its_run_begins_no_other(
    stand_in: queue.Queue[str], monkeypatch: pytest.MonkeyPatch, answer: str, stays: str
) -> None:
    monkeypatch.setattr(client, "_PAUSE_SECONDS", 0.1)
    will(stand_in, [say(Ready(1)), READ, say(GUARDING), READ, answer], [DIE])
    guard = Guard()
    guard.guard(ORDER, lambda _: None)
    assert client.peers_in_force() == {ORDER.policy.run_id: ORDER.policy.peers}
    guard.release(failed=False)
    assert client.peers_in_force() == {}
    assert guard.has_parted == (not stays)
    assert os.environ[RUN_ID_VARIABLE] == (ORDER.policy.run_id if stays else "")
    if not stays:
        client.require_parted()
        return
    with pytest.raises(PolicyError, match=f"run {ORDER.policy.run_id} .* has ended.*: {stays}; start each"):
        client.require_parted()


def test_a_command_that_ends_with_its_job_does_not_ask_to_be_let_out(stand_in: queue.Queue[str]) -> None:
    asked = [f"release = {READ}", 'assert "goes_on" not in release, release', say(Released(()))]
    will(stand_in, [say(Ready(1)), READ, say(GUARDING), *asked])
    guard = Guard(goes_on=False)
    guard.guard(ORDER, lambda _: None)
    assert guard.release(failed=False) == Released(())
    assert not guard.has_parted


@pytest.mark.parametrize(
    ("peers", "others", "within"),
    [
        ([], [], True),
        ([], ["10.0.0.1"], True),
        (["10.0.0.1"], [], False),
        (["10.0.0.1", "fd00::1"], ["10.0.0.0/8", "fd00::/64"], True),
        (["10.0.0.0/8"], ["10.0.0.0/9", "10.128.0.0/9"], True),
        (["10.0.0.1", "fd00::1"], ["0.0.0.0/0"], False),
    ],
)
def test_peers_are_within_others_address_by_address(peers: list[str], others: list[str], within: bool) -> None:
    first, second = (collapse(map(ipaddress.ip_network, each)) for each in (peers, others))
    assert client.are_within(first, second) == within


@pytest.mark.parametrize("answer", ["pass", say(Ready(2)), say(Runs(2)) + "\n" + say(Run({"run": 1}))])
def test_a_report_that_breaks_off_is_told_from_an_empty_one(stand_in: queue.Queue[str], answer: str) -> None:
    will(stand_in, [say(Ready(1)), READ, answer])
    guard = Guard()
    if "runs" in answer:
        assert guard.report() == ({"run": 1},)
        return
    with pytest.raises(PrivilegeError, match="ended without an answer"):
        guard.report()


BY_KEY = KeyOrder(required=False, meeting=bytes(32))
# What a guard of the release before keys says to an order with one.
NOT_UNDERSTOOD = Refused(78, "the launcher speaks version 2, this side 1; install one securerun")


def order_was(version: int) -> str:
    """Die, unless the order is of this version."""
    return f"import json; assert json.loads({READ})['order']['version'] == {version}"


def test_a_guard_of_the_release_before_guards_a_job_whose_key_only_adds(stand_in: queue.Queue[str]) -> None:
    will(
        stand_in,
        [say(Ready(1)), order_was(2), say(NOT_UNDERSTOOD)],
        [say(Ready(1)), order_was(1), say(GUARDING), READ, say(Released(()))],
    )
    guard = Guard()
    answer = guard.guard(dataclasses.replace(ORDER, key=BY_KEY), lambda _: None)
    assert answer.layers == GUARDING.layers and "older securerun" in answer.notes[-1]
    assert guard.release(failed=False) == Released(())


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        (dataclasses.replace(BY_KEY, required=True), NOT_UNDERSTOOD),
        (BY_KEY, Refused(78, "port 22 may not be named", knows_keys=True)),
    ],
    ids=["the key is the only way in", "it is not for the key that it refuses"],
)
def test_a_job_that_is_refused_with_its_key_is_not_ordered_without(
    stand_in: queue.Queue[str], key: KeyOrder, refused: Refused
) -> None:
    will(stand_in, [say(Ready(1)), order_was(2), say(refused)], [say(Ready(1)), READ, say(GUARDING), READ])
    with pytest.raises(Refusal) as refusal:
        Guard().guard(dataclasses.replace(ORDER, key=key), lambda _: None)
    assert (refusal.value.status, str(refusal.value)) == (78, refused.message)
