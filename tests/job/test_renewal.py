"""Peers named by host names, while the job runs: whoever has the name now may connect, whoever had it may no more."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import kernel
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, finish
from probe import reach

from securerun.job import peers as peers_module
from securerun.job import renewal
from securerun.job.peers import Peers
from securerun.job.renewal import Renewal

EXEC = (str(COMMANDS / "securerunctl"), "exec")
PORT = 7000
# Listens until the end of its input.
LISTENER = f"""
import socket, sys
listener = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
sys.stdin.read()
"""


def name_of(addresses: Iterable[str]) -> str:
    return "127.0.0.1 localhost\n" + "".join(f"{address} pod1\n" for address in addresses)


@contextlib.contextmanager
def listening_job(node: Host, hosts_file: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A job whose peer is pod1, on a host with a hosts file of its own."""
    command = [*EXEC, "--peers", "pod1", *options, "--", sys.executable, "-c", LISTENER]
    inner = 'mount --bind "$0" /etc/hosts && exec "$@"'
    job = node.popen(["unshare", "-m", "sh", "-c", inner, str(hosts_file), *command], stdin=subprocess.PIPE)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "listening\n"
        yield job
    finally:
        job.kill()
        finish(job)


def may_connect(origin: Host, target: Host) -> bool:
    return all(reach(origin, [(address, PORT) for address in target.addresses]).values())


def is_turned_away(origin: Host, target: Host) -> bool:
    return not any(reach(origin, [(address, PORT) for address in target.addresses]).values())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="iptables"),
        pytest.param(("--firewall", "nftables"), id="nftables", marks=kernel.needing(kernel.OWNED_TABLES)),
    ],
)
def test_a_pod_that_comes_back_with_another_address_may_connect_and_its_old_one_no_more(
    network: Network, tmp_path: Path, options: tuple[str, ...]
) -> None:
    node, before, after = network
    hosts_file = tmp_path / "hosts"
    hosts_file.write_text(name_of(before.addresses))
    with listening_job(node, hosts_file, "--ports", str(PORT), *options) as job:
        assert may_connect(before, node)
        assert is_turned_away(after, node)
        hosts_file.write_text(name_of(after.addresses))
        assert eventually(lambda: may_connect(after, node), seconds=30)
        assert is_turned_away(before, node)
        done = finish(job, text_input="")
    assert done.returncode == 0, done
    (line,) = (line for line in done.stderr.splitlines() if "other addresses" in line)
    said = f"{', '.join(before.addresses)} may no longer connect; {', '.join(after.addresses)} may connect now"
    assert line == f"securerun: the names of --peers have other addresses: {said}"


class NameService:
    """What peers' names are now, and how often that was asked."""

    def __init__(self) -> None:
        self.addresses: dict[str, tuple[str, ...] | OSError] = {}
        self.asked = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, name: str) -> Iterable[str]:
        self.asked += 1
        self.may_answer.wait(10)
        answer = self.addresses[name]
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> NameService:
    """A name service; names are asked for again at once instead of after seconds."""
    made = NameService()
    again = peers_module.again
    monkeypatch.setattr(peers_module, "again", lambda found: again(found, made))
    monkeypatch.setattr(renewal, "LEAST_SECONDS", 0.01)
    monkeypatch.setattr(renewal, "MOST_SECONDS", 0.02)
    monkeypatch.setattr(renewal, "_SECONDS_A_NAME", 0.0)
    return made


def networks(*addresses: str) -> tuple[ipaddress.IPv4Network, ...]:
    return tuple(ipaddress.IPv4Network(address) for address in addresses)


def found(*, fixed: tuple[str, ...] = (), **named: str) -> Peers:
    listed = {name: networks(address) for name, address in named.items()}
    every = (*networks(*fixed), *(network for group in listed.values() for network in group))
    return Peers(every, "--peers", fixed=networks(*fixed), named=listed)


GONE = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
SILENT = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (("10.0.0.9",), ("10.0.0.1", "10.0.0.9")),
        (("10.0.0.5", "10.0.0.9"), ("10.0.0.1", "10.0.0.5", "10.0.0.9")),
        (GONE, ("10.0.0.1",)),
    ],
    ids=["another address", "one more address", "no address any more"],
)
def test_what_a_name_has_now_counts_and_written_addresses_stay(
    service: NameService, answer: tuple[str, ...] | OSError, expected: tuple[str, ...]
) -> None:
    service.addresses["pod1"] = answer
    changes: list[Peers] = []
    changed = threading.Event()

    def change(_: Peers, now: Peers) -> None:
        changes.append(now)
        changed.set()

    with Renewal(found(fixed=("10.0.0.1",), pod1="10.0.0.5"), change):
        assert changed.wait(10)
    assert set(changes[0].networks) == set(networks(*expected))
    assert len(changes) == 1


@pytest.mark.parametrize("answer", [("10.0.0.5",), SILENT], ids=["the same address", "a silent name service"])
def test_nothing_changes_where_the_name_service_has_nothing_new(
    service: NameService, answer: tuple[str, ...] | OSError
) -> None:
    service.addresses["pod1"] = answer
    changes: list[Peers] = []
    with Renewal(found(pod1="10.0.0.5"), lambda _, now: changes.append(now)):
        assert eventually(lambda: service.asked >= 3)
    assert changes == []


def test_nobody_is_asked_about_written_addresses(service: NameService) -> None:
    before = threading.active_count()
    with Renewal(found(fixed=("10.0.0.1",)), lambda _, now: None):
        assert threading.active_count() == before


def test_after_the_job_nothing_is_changed(service: NameService) -> None:
    """An answer that comes when the lease is given back must not reach the guard any more."""
    service.addresses["pod1"] = ("10.0.0.9",)
    service.may_answer.clear()
    changes: list[Peers] = []
    with Renewal(found(pod1="10.0.0.5"), lambda _, now: changes.append(now)):
        assert eventually(lambda: service.asked == 1)
    service.may_answer.set()
    assert eventually(lambda: "securerun-names" not in {thread.name for thread in threading.enumerate()})
    assert changes == []


def test_somebody_turned_away_has_the_names_asked_for_soon(
    service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "MOST_SECONDS", 3600.0)
    service.addresses["pod1"] = ("10.0.0.9",)
    changed = threading.Event()
    with Renewal(found(pod1="10.0.0.5"), lambda _, now: changed.set()) as started:
        assert not changed.wait(0.1)
        started.hurry()
        assert changed.wait(10)


def test_ten_thousand_names_are_asked_for_no_faster_than_one_a_second() -> None:
    assert renewal.pace(10_000) == (100.0, 10_000.0)
    assert renewal.pace(2) == (5.0, 60.0)
