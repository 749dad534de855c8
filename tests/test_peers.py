"""Who may connect: every way to name a peer, every way to name one wrongly, and the rule where nobody is named."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from securerun.errors import PolicyError
from securerun.job import peers
from securerun.job.launchers import Endpoint, Job
from securerun.job.peers import Peers, find_peers
from securerun.options import Options

HOSTS = {
    "node0": ["127.0.1.1"],  # this host, as Debian's installer writes it into /etc/hosts
    "node1": ["10.0.0.1", "fd00::1"],
    "node2": ["10.0.0.2"],
    "node3.cluster.example": ["10.0.0.3"],
    "mixed": ["127.0.1.1", "::1", "10.0.0.9"],
    "headless": ["10.1.0.1", "10.1.0.2", "10.1.0.3"],
    "scoped": ["fe80::9%eth0"],
    "mapped": ["::ffff:10.0.0.8"],
    "blocked": ["0.0.0.0"],  # noqa: S104
}


def resolve(name: str) -> Iterable[str]:
    if name not in HOSTS:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return HOSTS[name]


def job(nodes: int = 2, host: str = "node1", backend: str = "c10d", least: int = 0) -> Job:
    return Job(backend, Endpoint(host, 29400), least or nodes, nodes, 0, ("train.py",))


def find(text: str, described: Job | None = None) -> Peers:
    return find_peers(Options(peers=text), described or job(), resolve)


def texts(found: Peers) -> list[str]:
    return [str(network) for network in found.networks]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.7", ["10.0.0.7/32"]),
        ("10.0.0.8,10.0.0.9", ["10.0.0.8/31"]),
        ("10.0.0.7, 10.0.0.9\n fd00::7\t", ["10.0.0.7/32", "10.0.0.9/32", "fd00::7/128"]),
        ("10.0.0.0/24,10.0.0.7", ["10.0.0.0/24"]),
        ("10.0.0.0/255.255.255.0", ["10.0.0.0/24"]),
        ("[fd00::7],[fd00:1::]/64", ["fd00::7/128", "fd00:1::/64"]),
        ("::ffff:10.0.0.7", ["10.0.0.7/32"]),
        ("::ffff:10.0.0.0/120", ["10.0.0.0/24"]),
        ("fe80::7%eth0", ["fe80::7/128"]),
        ("node1", ["10.0.0.1/32", "fd00::1/128"]),
        ("node1,node2,node1", ["10.0.0.1/32", "10.0.0.2/32", "fd00::1/128"]),
        ("node3.cluster.example", ["10.0.0.3/32"]),
        ("mixed", ["10.0.0.9/32"]),
        ("headless", ["10.1.0.1/32", "10.1.0.2/31"]),
        ("scoped", ["fe80::9/128"]),
        ("mapped", ["10.0.0.8/32"]),
        ("node0,node1", ["10.0.0.1/32", "fd00::1/128"]),
        ("any", ["0.0.0.0/0", "::/0"]),
        ("node1,any", ["0.0.0.0/0", "::/0"]),
        ("any,0.0.0.0/1", ["0.0.0.0/0", "::/0"]),
    ],
)
def test_a_list_of_peers(text: str, expected: list[str]) -> None:
    found = find(text)
    assert texts(found) == expected
    assert found.source == "--peers"
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10.0.0.300", ["'10.0.0.300'", "no address, network or host name"]),
        ("10.0.1", ["'10.0.1'"]),  # inet_aton(3) would make 10.0.0.1 of it
        ("0x0a000001", ["'0x0a000001'"]),
        ("17", ["'17'"]),
        ("010.0.0.1", ["'010.0.0.1'"]),
        ("node1.10", ["'node1.10'"]),
        ("fd00::7::1", ["'fd00::7::1'"]),
        ("10.0.0.0/33", ["'10.0.0.0/33'"]),
        ("10.0.0.0/8/8", ["'10.0.0.0/8/8'"]),
        ("node1/24", ["'node1/24'"]),
        ("node_1;id", ["'node_1;id'"]),
        ("-node1", ["'-node1'"]),
        ("no..de", ["'no..de'"]),
        ("kn\u00f6tchen", ["'kn\u00f6tchen'"]),
        ("node1:29400", ["'node1:29400'", "peers have none", "write node1"]),
        ("[fd00::1]:29400", ["'[fd00::1]:29400'", "write fd00::1"]),
        ("10.0.0.7/24", ["10.0.0.7/24", "write 10.0.0.0/24", "or 10.0.0.7"]),
        ("fd00::7/64", ["fd00::7/64", "write fd00::/64", "or fd00::7"]),
        ("0.0.0.0/0", ["0.0.0.0/0 is every host", "`any`"]),
        ("10.0.0.0/0", ["every host", "`any`"]),
        ("::/0", ["::/0 is every host", "`any`"]),
        ("0.0.0.0/0.0.0.0", ["every host", "`any`"]),
        ("::ffff:0.0.0.0/96", ["::ffff:0.0.0.0/96 is every host", "`any`"]),
        ("0.0.0.0/1,128.0.0.0/1", ["together are every host", "`any`"]),
        ("127.0.0.1", ["127.0.0.1 is the loopback", "write the address"]),
        ("::1", ["::1 is the loopback"]),
        ("::ffff:127.0.0.1", ["loopback"]),
        ("127.0.0.0/8", ["127.0.0.0/8 is the loopback"]),
        ("224.0.0.1", ["224.0.0.1 is multicast"]),
        ("ff02::/16", ["multicast"]),
        ("0.0.0.0", ["0.0.0.0 is no address of a host"]),  # noqa: S104
        ("::", ["no address of a host"]),
        ("node1,nosuch,nosuch2", ["'nosuch' (and 1 more) cannot be resolved", "not known", "correct the name"]),
        ("ANY", ["'ANY' cannot be resolved"]),
        ("blocked", ["'blocked' resolves to 0.0.0.0"]),
        ("node0", ["names this host alone", "2 nodes", "add the others"]),
        (" , ", ["names no host", "write node1,node2"]),
        ("@", ["no file after the @"]),
    ],
)
def test_what_cannot_be_a_peer_is_refused_in_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        find(text)
    assert error.value.status == 78
    assert_line_with(str(error.value), ["--peers", *words])


def test_the_place_of_the_list_is_named() -> None:
    options = Options(peers="10.0.0.300", peers_source="SECURERUN_PEERS")
    with pytest.raises(PolicyError, match=r"^SECURERUN_PEERS: "):
        find_peers(options, job(), resolve)
    options = Options(peers="node1", peers_source="/etc/securerun/config.toml")
    assert find_peers(options, job(), resolve).source == "/etc/securerun/config.toml"


def test_names_come_from_the_hosts_file_too() -> None:
    assert find_peers(Options(peers="localhost,10.0.0.1"), job()).networks == (ipaddress.IPv4Network("10.0.0.1/32"),)


HOST_FILE = """\ufeff# the cluster
node0 slots=8
node1   slots = 8 max_slots=16  # the second
\t
10.0.0.5\r
fd00:5::/64
"""


def test_a_host_file(tmp_path: Path) -> None:
    path = tmp_path / "hostfile.txt"
    path.write_text(HOST_FILE)
    found = find(f"@{path},node2")
    assert texts(found) == ["10.0.0.1/32", "10.0.0.2/32", "10.0.0.5/32", "fd00::1/128", "fd00:5::/64"]
    assert found.source == f"--peers @{path}"


def test_a_host_file_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("node1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts(find("@~/hosts")) == ["10.0.0.1/32", "fd00::1/128"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["names no host", "one host a line"]),
        (b"# node1\n\n", ["names no host"]),
        (b"\x7fELF\x02\x01\0\0\0", ["is no text"]),
        (b"node1\0\n", ["is no text"]),
        (b"node1\n\xff\xfe\n", ["is no text"]),
        (b"node1\n\nnode1:8\n", ["line 3", "'node1:8'", "write node1"]),
        (b"node1 node2\n", ["line 1", "'node2'", "one host a line"]),
        (b"node1 8\n", ["line 1", "'8'"]),
        (b"node1,node2\n", ["line 1", "'node1,node2'"]),
        (b"any\n", ["line 1", "'any' is no host"]),
        (b"subnet\n", ["line 1", "'subnet' is no host"]),
        (b"@other\n", ["line 1", "'@other' is no host"]),
        (b"0.0.0.0/0\n", ["line 1", "every host"]),
        (b"node1\nnosuch\n", ["line 2", "'nosuch' cannot be resolved"]),
        (b"node1\n127.0.0.1\n", ["line 2", "loopback"]),
    ],
)
def test_a_wrong_host_file_is_named_with_its_line(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content)
    with pytest.raises(PolicyError) as error:
        find(f"@{path}")
    assert_line_with(str(error.value), [f"@{path}", *words])


def test_a_host_file_that_is_missing_no_file_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"cannot be read \(No such file"):
        find(f"@{tmp_path}/nothing")
    with pytest.raises(PolicyError, match=r"cannot be read \(Is a directory"):
        find(f"@{tmp_path}")
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(16 * 1024 * 1024 + 1)
    with pytest.raises(PolicyError, match="larger than 16 MB"):
        find(f"@{huge}")


@pytest.mark.parametrize(
    ("text", "nodes", "count"),
    [
        ("10.0.0.7", 3, "1 other host,"),
        ("node1,node2", 4, "2 other hosts,"),
        ("node0,node1", 3, "1 other host,"),
        ("node1,node1", 3, "1 other host,"),
        ("headless", 5, "3 other hosts,"),
    ],
)
def test_fewer_peers_than_nodes_is_a_warning_that_names_the_source(text: str, nodes: int, count: str) -> None:
    (warning,) = find(text, job(nodes)).warnings
    assert_line_with(warning, ["--peers names", count, f"{nodes} nodes"])


@pytest.mark.parametrize(("text", "nodes"), [("10.0.0.0/24", 9), ("any", 9), ("headless", 4), ("node1,10.0.0.9", 3)])
def test_enough_peers_are_no_warning(text: str, nodes: int) -> None:
    assert find(text, job(nodes)).warnings == ()


@pytest.mark.parametrize("described", [job(1), job(1, "localhost"), Job("c10d", None, 1, 1, 0, ())])
def test_a_job_of_one_node_has_no_peers(described: Job) -> None:
    found = find_peers(Options(), described, resolve)
    assert (found.networks, found.warnings) == ((), ())


def test_a_loopback_endpoint_means_no_peers_and_a_warning_if_there_are_more_nodes() -> None:
    found = find_peers(Options(), job(2, "127.0.0.1"), resolve)
    assert (found.networks, found.source) == ((), "loopback rendezvous endpoint")
    (warning,) = found.warnings
    assert_line_with(warning, ["2 nodes meet at 127.0.0.1:29400", "no other host may connect", "--peers"])


def test_named_peers_count_on_a_loopback_endpoint_too() -> None:
    assert texts(find("node2", job(2, "localhost"))) == ["10.0.0.2/32"]
    assert find("node0", job(2, "localhost")).networks == ()


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (job(2, "10.0.0.1"), ["2 nodes meet at 10.0.0.1:29400"]),
        (job(4, "fd00::1", least=1), ["1 to 4 nodes meet at [fd00::1]:29400"]),
        (job(2, "localhost", "etcd-v2"), ["2 nodes"]),
        (Job("c10d", None, 2, 2, 0, ()), ["2 nodes", "without an address"]),
    ],
)
def test_several_nodes_that_nobody_named_are_an_error_with_the_line_to_add(described: Job, words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        find_peers(Options(), described, resolve)
    advice = ["--peers node1,node2", "export SECURERUN_PEERS=@hostfile.txt", "/etc/securerun/config.toml"]
    assert_line_with(str(error.value), [*words, *advice])


def test_names_are_resolved_side_by_side() -> None:
    everyone_asks = threading.Barrier(8, timeout=5)

    def slow(name: str) -> Iterable[str]:
        everyone_asks.wait()
        return [f"10.0.0.{name[4:]}"]

    text = ",".join(f"node{number}" for number in range(1, 9))
    assert len(find_peers(Options(peers=text), job(), slow).networks) == 4


def test_a_silent_name_server_is_waited_for_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RESOLVE_SECONDS", 0.2)
    answered = threading.Event()

    def silent(name: str) -> Iterable[str]:
        answered.wait(10)
        return []

    started = time.monotonic()
    with pytest.raises(PolicyError, match=r"'node1' \(and 99 more\) cannot be resolved \(no answer within 0.2 s\)"):
        find_peers(Options(peers=",".join(f"node{number}" for number in range(1, 101))), job(), silent)
    answered.set()
    assert time.monotonic() - started < 2


def test_ten_thousand_peers_take_little_time() -> None:
    """About 0.3 s here; anything quadratic would take minutes."""
    text = ",".join(str(ipaddress.IPv4Address((10 << 24) + 2 * number)) for number in range(10_000))
    started = time.monotonic()
    assert len(find(text).networks) == 10_000
    assert time.monotonic() - started < 10


def assert_line_with(message: str, words: list[str]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message
