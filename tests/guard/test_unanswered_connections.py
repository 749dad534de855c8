"""Which connections of the job are told of as unanswered, and how often; without a cgroup it goes by who holds them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cgroups import inside
from hosts import Network

from securerun.firewall.policy import Policy, PortRange
from securerun.guard import unanswered
from securerun.guard.unanswered import Unanswered
from securerun.linux import proc
from securerun.linux.sock_diag import Attempt

NOBODY = "10.77.0.200"


def lease(*pids: int) -> Any:  # noqa: ANN401 - what of a lease is asked
    """The lease of a job that has these processes and no cgroup, planned with port 29500 and 999."""
    policy = Policy("0123456789ab", (PortRange(999, 999, "x"), PortRange(29500, 29500, "x")), ())
    return SimpleNamespace(
        order=SimpleNamespace(policy=policy),
        cgroup=None,
        key=None,
        caller=SimpleNamespace(user=os.geteuid()),
        processes=lambda: [SimpleNamespace(pid=pid) for pid in pids],
    )


@contextlib.contextmanager
def knocking(*ports: int) -> Iterator[None]:
    with contextlib.ExitStack() as kept:
        for port in ports:
            made = kept.enter_context(socket.socket())
            made.setblocking(False)
            made.connect_ex((NOBODY, port))
        yield


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unanswered, "_RETRIES", 0)
    monkeypatch.setattr(unanswered, "_WAITED_SECONDS", 0.0)


def test_without_a_cgroup_a_connection_is_the_jobs_if_one_of_its_processes_holds_it(network: Network) -> None:
    with inside(network["node0"]), knocking(40000):
        (line,) = Unanswered(lease(os.getpid())).look()
        assert f"no answer from {NOBODY}:40000 for " in line
        assert Unanswered(lease(1)).look() == Unanswered(lease()).look() == ()


def test_ports_below_1024_are_told_only_where_they_are_planned(network: Network) -> None:
    with inside(network["node0"]):
        with knocking(443, 22, 998):
            assert Unanswered(lease(os.getpid())).look() == ()
        with knocking(443, 999):
            (line,) = Unanswered(lease(os.getpid())).look()
            assert f"{NOBODY}:999 " in line


def test_a_host_is_told_of_once_and_again_after_a_time_of_peace(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unanswered, "_FORGOTTEN_SECONDS", 0.05)
    with inside(network["node0"]):
        looking = Unanswered(lease(os.getpid()))
        with knocking(40000, 40001):
            assert [len(looking.look()) for _ in range(3)] == [1, 0, 0]
            time.sleep(0.06)
            assert looking.look() == (), "it is unanswered still"
        assert looking.look() == ()
        time.sleep(0.06)
        assert looking.look() == ()
        with knocking(40000):
            assert len(looking.look()) == 1


def test_hosts_without_end_are_told_up_to_a_bound(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempts(_retries: int) -> tuple[Attempt, ...]:
        own = ipaddress.ip_address("10.77.0.1")
        return tuple(Attempt(own, own + number, 40000, 1, 0, 7, None) for number in range(1, 1000))

    with inside(network["node0"]):
        looking = Unanswered(lease())
    monkeypatch.setattr(looking._diagnosis, "attempts", attempts)
    monkeypatch.setattr(looking, "_of_the_job", lambda found: list(found))
    assert len(looking.look()) == 256
    assert looking.look() == ()


def test_looks_are_further_apart_where_they_take_long(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    with inside(network["node0"]):
        looking = Unanswered(lease())

    def slow(_retries: int) -> tuple[Attempt, ...]:
        time.sleep(0.05)
        return ()

    monkeypatch.setattr(looking._diagnosis, "attempts", slow)
    looking.look()
    assert 10 <= looking.pause < 60


def test_looks_are_further_apart_where_the_job_holds_very_much_and_see_no_more_than_a_bound(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looked = [1000.0], []

    def descriptors(_: object) -> Iterator[tuple[int, int]]:
        for number in range(1000):
            looked.append(number)
            now[0] += 1.0
            yield os.getpid(), 0

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(unanswered, "_MOST_DESCRIPTORS", 100, raising=False)
    monkeypatch.setattr(proc, "descriptors_of", descriptors, raising=False)
    with inside(network["node0"]), knocking(40000):
        looking = Unanswered(lease(os.getpid()))
        assert looking.look() == ()
    assert len(looked) == 100
    assert looking.pause == pytest.approx(900.0)
