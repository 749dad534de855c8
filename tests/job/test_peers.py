"""Who may connect: every way to name a peer, every way to name one wrongly, and the rule where nobody is named."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from securerun.errors import PolicyError
from securerun.job import batch, peers, ranktable, resolver
from securerun.job.job import Endpoint, Job
from securerun.job.peers import Peers, find_peers
from securerun.options import Options
from securerun.protection import plan

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


@pytest.fixture(autouse=True)
def _a_host_of_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own machine may be a node of one."""
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr(batch, "SCONTROL_DIRECTORIES", ())
    monkeypatch.setattr(ranktable, "MOUNTED", ())


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
        ("node[1-2]", ["10.0.0.1/32", "10.0.0.2/32", "fd00::1/128"]),
        ("node[0-2]", ["10.0.0.1/32", "10.0.0.2/32", "fd00::1/128"]),
        ("node[ 1, 2 ] , 10.0.0.9", ["10.0.0.1/32", "10.0.0.2/32", "10.0.0.9/32", "fd00::1/128"]),
        (
            "[fd00::7],node[1,2],[fd00:1::]/64",
            ["10.0.0.1/32", "10.0.0.2/32", "fd00::1/128", "fd00::7/128", "fd00:1::/64"],
        ),
        ("10.0.0.[1-4,9]", ["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/32", "10.0.0.9/32"]),
        ("10.[1-2].0.[1-2]", ["10.1.0.1/32", "10.1.0.2/32", "10.2.0.1/32", "10.2.0.2/32"]),
        ("10.0.0.[0-8/4]", ["10.0.0.0/32", "10.0.0.4/32", "10.0.0.8/32"]),
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
        ("root@node1", ["'root@node1'", "peers have none", "write node1"]),
        ("node[1-2", ["'node[1-2' is no address", "node[0-3]"]),
        ("node[1-2]]", ["'node[1-2]]' is no address"]),
        ("node[a-c]", ["'node[a-c]' is no address"]),
        ("node[]", ["'node[]' is no list of nodes", "write one like node[0-3]"]),
        ("node[2-1]", ["'node[2-1]' is no list of nodes"]),
        ("node[01-100]", ["'node[01-100]' is no list of nodes", "padding"]),
        ("node[-1-3]", ["'node[-1-3]' is no list of nodes"]),
        ("node[-1-999999999]", ["'node[-1-999999999]' is no list of nodes"]),
        ("node[1-2][3-4]", ["'node[1-2][3-4]' is no list of nodes"]),
        ("node[0-999999999]", ["is more than 100000 nodes", "name networks"]),
        ("n[0-999999999/2]", ["is more than 100000 nodes"]),
        ("n[0-999]r[0-999]", ["is more than 100000 nodes"]),
        ("a[0-60000],b[0-60000]", ["'b[0-60000]' is more than 100000 nodes"]),
        (f"n[{'9' * 50}]", ["is more than 100000 nodes"]),
        ("node[1-2],@group", ["--peers @group: the host file cannot be read"]),
        ("node[1-2]!node1", ["'node[1-2]!node1' is no address"]),
        ("fd00::[1-4]", ["'fd00::[1-4]' is no address"]),
        ("10.0.0.[254-256]", ["'10.0.0.256' is no address"]),
        ("10.0.0.[08-09]", ["'10.0.0.08' is no address"]),
        ("node[8-9]", ["'node8' (and 1 more) cannot be resolved"]),
        ("[fd00::1]:29400", ["'[fd00::1]:29400'", "write fd00::1"]),
        ("10.0.0.7/24", ["10.0.0.7/24", "write 10.0.0.0/24", "or 10.0.0.7"]),
        ("fe80::%eth0/64", ["'fe80::%eth0/64' is no address"]),
        ("fd00::7/64", ["fd00::7/64", "write fd00::/64", "or fd00::7"]),
        ("0.0.0.0/0", ["0.0.0.0/0 is every host", "`any`"]),
        ("10.0.0.0/0", ["every host", "`any`"]),
        ("::/0", ["::/0 is every host", "`any`"]),
        ("0.0.0.0/0.0.0.0", ["every host", "`any`"]),
        ("::ffff:0.0.0.0/96", ["::ffff:0.0.0.0/96 is every host", "`any`"]),
        ("0.0.0.0/1,128.0.0.0/1", ["together are every host", "`any`"]),
        ("127.0.0.1", ["127.0.0.1 is the loopback", "write the address", "or `localhost` alone"]),
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


def test_a_folded_list_is_read_as_clustershell_reads_it() -> None:
    """With its zeros, suffixes and products, from whichever place, commas inside of the brackets or not."""
    asked: list[str] = []

    def answer(name: str) -> Iterable[str]:
        asked.append(name)
        return [f"10.1.0.{len(asked)}"]

    text = "node[0-2]i,rack[1-2]n[08-10,12],a[1]-x.cluster.example"
    for source in ("--peers", "SECURERUN_PEERS", "/etc/securerun/config.toml"):
        asked.clear()
        find_peers(Options(peers=text, peers_source=source), job(12), answer)
        racks = [f"rack{rack}n{number}" for rack in (1, 2) for number in ("08", "09", "10", "12")]
        assert sorted(asked) == sorted(["node0i", "node1i", "node2i", *racks, "a1-x.cluster.example"])


def test_a_python_caller_s_list_may_be_folded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is a list, with a comma inside of the brackets."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    for named in ("10.0.0.[1,3]", ["10.0.0.[1,3]"], ["10.0.0.1", "10.0.0.[3,3]"]):
        assert [str(network) for network in plan.policy(peers=named).peers] == ["10.0.0.1/32", "10.0.0.3/32"]
    with pytest.raises(PolicyError, match=r"--peers: 'node\[2-1\]' is no list of nodes"):
        plan.policy(peers=["node[2-1]"])


def test_a_large_folded_list_takes_little_time() -> None:
    started = time.monotonic()
    assert len(find("10.[0-9].[0-19].[1-100]", job(0)).listed) == 20_000
    assert time.monotonic() - started < 20


HOST_FILE_OF_MPI = """\
node0:8
root@node1 slots=8 max-slots=8
alice.b@10.0.0.5:16 binding=user:0,1
[fd00::7]:8
fd00::8
10.0.1.[1-2]:8
carol@10.0.2.[1,3] slots=4   # PRRTE
10.0.3.1 8 all.q@10.0.3.1 UNDEFINED
10.0.3.2 8 all.q@10.0.3.2 <NULL>
10.0.3.2 4 gpu.q@10.0.3.2 0,1:0,2
"""


def test_a_host_file_in_the_forms_of_mpi_and_of_grid_engine(tmp_path: Path) -> None:
    path = tmp_path / "hostfile.txt"
    path.write_text(HOST_FILE_OF_MPI)
    expected = ["10.0.0.1", "10.0.0.5", "10.0.1.1", "10.0.1.2", "10.0.2.1", "10.0.2.3", "10.0.3.1", "10.0.3.2"]
    found = find(f"@{path}", job(9))
    assert sorted(str(one.network_address) for one in found.listed if one.version == 4) == expected
    assert sorted(str(one.network_address) for one in found.listed if one.version == 6) == [
        "fd00::1",
        "fd00::7",
        "fd00::8",
    ]


def test_a_host_file_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("node1\n")
    monkeypatch.setattr("os.environ", {"HOME": str(tmp_path)})
    assert texts(find("@~/hosts")) == ["10.0.0.1/32", "fd00::1/128"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["names no host", "one host a line"]),
        (b"# node1\n\n", ["names no host"]),
        (b"\x7fELF\x02\x01\0\0\0", ["is no text"]),
        (b"node1\0\n", ["is no text"]),
        (b"node1\n\xff\xfe\n", ["is no text"]),
        (b"node1\n\nnode1:8:2\n", ["line 3", "'node1:8:2'"]),
        (b"node1\n:8\n", ["line 2", "':8'"]),
        (b"node1\nfd00::1:2:3:4:5:6:7:8\n", ["line 2", "'fd00::1:2:3:4:5:6:7:8'"]),
        (b"node1\nroot@\n", ["line 2", "'root@' is no address"]),
        (b"a@b@node1\n", ["line 1", "'b@node1' is a host with a user", "write node1"]),
        (b"root@any\n", ["line 1", "'any' is no host"]),
        (b"any:8\n", ["line 1", "'any' is no host"]),
        (b"node1\nnode[1-\n", ["line 2", "'node[1-' is no address"]),
        (b"node1\nnode[3-1]:8\n", ["line 2", "'node[3-1]' is no list of nodes"]),
        (b"n[0-99998]\nm[0-1]\n", ["line 2", "'m[0-1]' is more than 100000 nodes"]),
        (b"node1 8 all.q@node1\n", ["line 1", "'8'"]),
        (b"node1 eight all.q@node1 UNDEFINED\n", ["line 1", "'eight'"]),
        (b"node1 8 all.q@node1 UNDEFINED more\n", ["line 1", "'8'"]),
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
    words = ["2 nodes meet at 127.0.0.1:29400", "no other host may connect, whatever address the store listens on"]
    assert_line_with(warning, [*words, "if all nodes are on this host, write --peers localhost"])


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
    monkeypatch.setattr(resolver, "SECONDS", 0.2)
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


def find_in(environment: dict[str, str], described: Job | None = None, options: Options | None = None) -> Peers:
    """The peers of a job in this environment, where nobody was asked for."""
    return find_peers(options or Options(), described or job(), resolve, environment)


SITE = Options(peers="10.9.9.9", peers_source="/etc/securerun/config.toml")
SLURM, VOLCANO = {"SLURM_JOB_NODELIST": "node[1-2]"}, {"VC_WORKER_HOSTS": "node2,headless"}
NODES = ["10.0.0.1/32", "10.0.0.2/32", "fd00::1/128"]


def table_of(directory: Path, *servers: dict[str, object], status: str = "completed") -> dict[str, str]:
    path = directory / "hccl.json"
    path.write_text(json.dumps({"status": status, "version": "1.2", "server_list": servers}))
    return {"RANK_TABLE_FILE": str(path)}


def server(name: str, *ports: int, **fields: str) -> dict[str, object]:
    return {"server_id": name, **fields, "device": [{"device_ip": "192.168.0.1", "host_port": str(p)} for p in ports]}


def test_the_first_source_that_answers_wins(tmp_path: Path) -> None:
    table = table_of(tmp_path, server("a", host_ip="10.0.1.1"), server("b", host_ip="10.0.1.3"))
    everything = {**SLURM, **VOLCANO, **table}
    asked = Options(peers="node3.cluster.example")
    assert texts(find_in(everything, options=asked)) == ["10.0.0.3/32"]
    found = find_in(everything, options=SITE)
    assert (texts(found), found.source) == (NODES, "Slurm (SLURM_JOB_NODELIST)")
    found = find_in({**VOLCANO, **table}, job(3), SITE)
    assert found.source == "Volcano (VC_WORKER_HOSTS)"
    found = find_in(table, options=SITE)
    assert texts(found) == ["10.0.1.1/32", "10.0.1.3/32"]
    assert found.source == f"RANK_TABLE_FILE={tmp_path}/hccl.json"
    assert texts(find_in({}, options=SITE)) == ["10.9.9.9/32"]
    # A loopback endpoint says less than a source that names nodes.
    assert texts(find_in(SLURM, job(2, "localhost"))) == NODES


def test_one_node_has_no_peers_whatever_the_batch_system_gave(tmp_path: Path) -> None:
    """One torchrun a node, each with a job of its own; what is wrong with a list does not matter then."""
    alone = job(1, "10.0.0.1")
    for environment in (SLURM, VOLCANO, {"SLURM_JOB_NODELIST": "n["}, {"PBS_NODEFILE": str(tmp_path)}):
        assert find_in(environment, alone, SITE).networks == ()
    # It may grow.
    assert texts(find_in(SLURM, job(2, least=1))) == NODES


@pytest.mark.parametrize("source", ["SECURERUN_PEERS", "/etc/securerun/config.toml"])
def test_what_a_shell_or_a_site_exports_opens_no_job_of_one_node(source: str) -> None:
    """`export SECURERUN_PEERS=@hostfile.txt` is for all that a script starts; what is wrong with it is no matter."""
    for text in ("node1", "any", "@/nonexistent", "10.0.0.300"):
        asked = Options(peers=text, peers_source=source)
        found = find_in(SLURM, job(1), asked)
        assert (found.networks, found.warnings) == ((), ())
        assert found.source == f"job of one node, which {source} does not open; --peers does"
    asked = Options(peers="node1", peers_source=source)
    # It may grow; and of a command that nobody has read it is not known whether it is of one node.
    for described in (job(2, least=1), job(0)):
        assert texts(find_in({}, described, asked)) == ["10.0.0.1/32", "fd00::1/128"]


def test_what_is_named_for_one_launch_opens_a_job_of_one_node() -> None:
    assert texts(find("node1", job(1))) == ["10.0.0.1/32", "fd00::1/128"]
    assert find_peers(Options(), job(1), resolve).source == "job of one node"


@pytest.fixture
def on_node1(monkeypatch: pytest.MonkeyPatch) -> None:
    """This host is node1."""
    own = frozenset({"10.0.0.1", "fd00::1", "127.0.0.1"})
    monkeypatch.setattr(peers, "_own_addresses", lambda: own)
    monkeypatch.setattr("securerun.host.interfaces.may_bind", own.__contains__)


@pytest.mark.usefixtures("on_node1")
@pytest.mark.parametrize("text", ["10.0.0.1", "fd00::1", "node1", "node0,node1", "10.0.0.1,fd00::1", "localhost,node1"])
def test_a_list_that_names_this_host_alone_is_refused_by_whatever_name(text: str) -> None:
    for described in (job(2, "10.0.0.1"), job(3, "elsewhere"), job(4, "10.0.0.1", least=2)):
        with pytest.raises(PolicyError) as error:
            find_peers(Options(peers=text), described, {**HOSTS, "localhost": ["127.0.0.1"]}.__getitem__)
        advice = ["add the others", "--peers", "if all of them are on this host, write --peers localhost"]
        assert_line_with(str(error.value), ["--peers names this host alone", described.nodes, *advice])
    # It may run alone, or nobody knows.
    for described in (job(2, "10.0.0.1", least=1), job(0, "10.0.0.1"), job(1)):
        find_peers(Options(peers=text), described, {**HOSTS, "localhost": ["127.0.0.1"]}.__getitem__)


@pytest.mark.usefixtures("on_node1")
def test_a_batch_system_and_a_rank_table_that_name_this_host_alone_are_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path, server("a", host_ip="10.0.0.1"))
    instances = [{"server_id": "10.0.0.1", "rank_id": str(n), "devices": [{}]} for n in range(8)]
    (tmp_path / "groups.json").write_text(json.dumps({"group_list": [{"instance_list": instances}]}))
    groups = {"RANK_TABLE_FILE": str(tmp_path / "groups.json")}
    (tmp_path / "nodes").write_text("node1\nnode1\n")
    files = [{variable: str(tmp_path / "nodes")} for variable in ("PBS_NODEFILE", "PE_HOSTFILE", *batch._OPEN_MPI)]
    for environment in ({"SLURM_JOB_NODELIST": "node1"}, {"VC_WORKER_HOSTS": "10.0.0.1"}, table, groups, *files):
        with pytest.raises(PolicyError, match=r"names this host alone.*write --peers localhost"):
            find_in(environment)
        assert find_in(environment, job(2, least=1)).networks


@contextlib.contextmanager
def _piped(text: str) -> Iterator[str]:
    """A host file as a shell's <(...) is."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    try:
        yield f"/proc/self/fd/{reading}"
    finally:
        os.close(reading)


@pytest.mark.usefixtures("on_node1")
def test_others_may_yet_be_added_to_a_host_file_and_to_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node may add its own line as it starts; a headless Service has those pods that are up. A pipe ends."""
    with pytest.raises(PolicyError, match="names this host alone"), _piped("node1\n") as name:
        find(f"@{name}")
    (tmp_path / "hosts").write_text("node1\n")
    (warning,) = find(f"@{tmp_path}/hosts").warnings
    assert_line_with(warning, [f"@{tmp_path}/hosts names 0 other hosts", "2 nodes"])
    monkeypatch.setattr(peers, "POD_SECONDS", 1.0)
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    assert find_peers(Options(peers="node1"), job(), resolve, environment).networks


@pytest.mark.usefixtures("on_node1")
@pytest.mark.parametrize("source", ["--peers", "SECURERUN_PEERS"])
def test_localhost_by_itself_means_that_all_nodes_are_on_this_host(source: str) -> None:
    asked = Options(peers="localhost", peers_source=source)
    for described in (job(2, "10.0.0.1"), job(2, "localhost"), job(0), job(4, "node1", least=2)):
        found = find_peers(asked, described, resolve)
        assert (found.networks, found.source, found.warnings) == ((), f"{source} localhost", ())
    with pytest.raises(PolicyError) as error:
        find_peers(asked, job(2, "10.0.0.2"), resolve)
    words = ["names this host alone", "2 nodes meet at 10.0.0.2:29400", "no address of this host"]
    assert_line_with(str(error.value), [source, *words])


@pytest.mark.usefixtures("on_node1")
def test_agents_on_one_host_do_not_meet_at_a_name_of_another() -> None:
    asked = Options(peers="localhost")
    with pytest.raises(PolicyError) as error:
        find_peers(asked, job(2, "node2"), resolve)
    assert_line_with(str(error.value), ["names this host alone", "2 nodes meet at node2:29400", "name the others"])
    # A Service's address leads to its pods, this one perhaps, and a name that has no address yet may be given one.
    for host, environment in ("node2", {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}), ("nowhere", {}), ("node1", {}):
        assert find_peers(asked, job(2, host), resolve, environment).networks == ()


def test_agents_on_one_host_cannot_meet_where_the_loopback_is_closed_to_each() -> None:
    for asked in (Options(peers="localhost", loopback="job"), Options(loopback="job")):
        with pytest.raises(PolicyError) as error:
            find_peers(asked, job(2, "127.0.0.1"), resolve)
        assert_line_with(str(error.value), ["2 nodes on this host", "leave --loopback job out"])
        assert find_peers(asked, job(2, "127.0.0.1", least=1), resolve).networks == ()


@pytest.mark.usefixtures("on_node1")
def test_several_hosts_that_meet_at_a_loopback_get_a_word() -> None:
    """The template's MASTER_ADDR=localhost, on nodes that the batch system or the user names."""
    for found in (
        find_in(SLURM, job(2, "localhost")),
        find("node2", job(2, "127.0.0.1")),
        find("node2", job(0, "::1")),
    ):
        assert_line_with(found.warnings[-1], ["itself to each host", f"{found.source} names other hosts", "node0"])
    for found in (find_in(SLURM, job(2, "node1")), find_in(SLURM, job(1, "localhost")), find("node1", job(0, "::1"))):
        assert "itself to each host" not in " ".join(found.warnings)


def test_where_the_job_meets_makes_nobody_a_peer() -> None:
    """In Kubernetes MASTER_ADDR is a Service's cluster address; WORLD_SIZE and RANK are not torchrun's there."""
    environment = {
        "MASTER_ADDR": "10.96.0.12",
        "MASTER_PORT": "2222",
        "WORLD_SIZE": "16",
        "RANK": "0",
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    }
    assert texts(find_in({**environment, **SLURM}, job(2, "10.96.0.12"))) == NODES
    with pytest.raises(PolicyError, match="nothing says which hosts"):
        find_in(environment, job(2, "10.96.0.12"))


def test_words_with_a_meaning_in_peers_are_names_to_a_batch_system() -> None:
    for environment in ({"VC_WORKER_HOSTS": "any"}, {"LSB_HOSTS": "subnet"}, {"SLURM_JOB_NODELIST": "any"}):
        with pytest.raises(PolicyError, match=r"peer '(any|subnet)' cannot be resolved"):
            find_peers(Options(), job(), unknown, environment)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "NODE_SECONDS", 0.0)
    monkeypatch.setattr(peers, "POD_SECONDS", 0.0)


def unknown(name: str) -> Iterable[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"VC_WORKER_HOSTS": "10.0.0.0/8"}, ["Volcano (VC_WORKER_HOSTS)", "10.0.0.0/8 is a network, not a node"]),
        ({"VC_WORKER_HOSTS": "node2,127.0.0.1"}, ["127.0.0.1 is the loopback"]),
        ({"VC_WORKER_HOSTS": "node2:22"}, ["'node2:22' is a host with a port"]),
        ({"LSB_HOSTS": "node2 nosuch"}, ["LSF (LSB_HOSTS)", "'nosuch' cannot be resolved", "by address with --peers"]),
        ({"LSB_HOSTS": "node0"}, ["LSF (LSB_HOSTS) names this host alone", "2 nodes", "--peers"]),
        ({"LSB_HOSTS": "blocked"}, ["'blocked' resolves to 0.0.0.0"]),
    ],
)
def test_a_batch_system_s_nodes_are_checked_like_the_user_s(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        find_in(environment)
    assert_line_with(str(error.value), words)


def test_a_node_has_its_name_s_addresses_and_slurm_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that resolve nowhere do not matter where Slurm has an address, nor does this host's own."""
    command = tmp_path / "scontrol"
    command.write_text(f"""#!/bin/sh
echo NodeName=node1 NodeAddr=10.0.5.1
echo NodeName=sl7 NodeAddr=10.0.5.7
echo NodeName={socket.gethostname()} NodeAddr={socket.gethostname()}
""")
    command.chmod(0o755)
    monkeypatch.setattr(batch, "SCONTROL_DIRECTORIES", (str(tmp_path),))
    found = find_in({"SLURM_JOB_NODELIST": f"node1,sl7,{socket.gethostname()}"}, job(3))
    assert texts(found) == ["10.0.0.1/32", "10.0.5.1/32", "10.0.5.7/32", "fd00::1/128"]
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("environment", "nodes", "count"),
    [
        (SLURM, 4, "2 other hosts,"),
        ({"SLURM_JOB_NODELIST": "node[0-1]"}, 3, "1 other host,"),
        # A node's many addresses are one node.
        ({"LSB_HOSTS": "headless node2"}, 4, "2 other hosts,"),
    ],
)
def test_fewer_nodes_than_the_job_has_is_a_warning_that_names_the_batch_system(
    environment: dict[str, str], nodes: int, count: str
) -> None:
    found = find_in(environment, job(nodes))
    (warning,) = found.warnings
    assert_line_with(warning, [f"{found.source} names", count, f"{nodes} nodes", "--peers"])


def test_this_host_is_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_own_addresses", lambda: frozenset({"10.0.0.2"}))
    assert find_in(SLURM, job(2)).warnings == ()
    (warning,) = find_in(SLURM, job(3)).warnings
    assert_line_with(warning, ["names 1 other host,", "3 nodes"])
    assert find("node1,node2,node3.cluster.example", job(3)).warnings == ()


def test_own_addresses_are_those_of_every_interface() -> None:
    assert "127.0.0.1" in peers._own_addresses()


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_ports_of_a_rank_table_are_planned_whoever_names_the_peers(tmp_path: Path, nodes: int) -> None:
    environment = table_of(
        tmp_path, server("a", 16665, 16666, host_ip="10.0.1.1"), server("b", 16667, host_ip="10.0.1.3")
    )
    for options in (Options(), Options(peers="node2"), SITE):
        found = find_in(environment, job(nodes), options)
        assert [str(port) for port in found.ports] == ["16665-16667"]
        assert {port.purpose for port in found.ports} == {"HCCL (rank table)"}


def test_the_ports_of_a_rank_table_are_this_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_own_addresses", lambda: frozenset({"10.0.1.3"}))
    environment = table_of(tmp_path, server("a", 16665, host_ip="10.0.1.1"), server("b", 16667, host_ip="10.0.1.3"))
    assert [str(port) for port in find_in(environment).ports] == ["16667"]


def test_a_rank_table_that_is_not_needed_cannot_stop_a_launch(tmp_path: Path) -> None:
    environment = table_of(tmp_path, status="initializing")
    found = find_in(environment, options=Options(peers="node2"))
    (warning,) = found.warnings
    assert (texts(found), found.ports) == (["10.0.0.2/32"], ())
    assert_line_with(warning, ["ports of the rank table are not planned", "RANK_TABLE_FILE", "'initializing'"])


def test_a_rank_table_without_hosts_means_the_next_source(tmp_path: Path) -> None:
    environment = table_of(tmp_path, server("uid-a", 16665), server("uid-b"))
    found = find_in(environment, options=SITE)
    assert (texts(found), [str(port) for port in found.ports]) == (["10.9.9.9/32"], ["16665"])
    with pytest.raises(PolicyError) as error:
        find_in(environment)
    table = f"RANK_TABLE_FILE={tmp_path}/hccl.json"
    assert_line_with(str(error.value), [f"({table} has no addresses of hosts)", "export SECURERUN_PEERS=@hostfile.txt"])


UNKNOWN = {"version": "3.0", "node_list": [{"ip": "10.0.1.1"}]}
PLACEHOLDER = {"status": "completed", "server_list": [{"server_id": "n0", "host_ip": "xx.xx.xx.xx"}]}


def test_hosts_of_a_rank_table_with_groups_are_peers(tmp_path: Path) -> None:
    instances = [{"server_id": f"10.0.1.{1 + n // 2}", "rank_id": str(n), "devices": [{}]} for n in range(4)]
    path = tmp_path / "hccl.json"
    path.write_text(json.dumps({"status": "completed", "group_list": [{"instance_list": instances}]}))
    found = find_in({"RANK_TABLE_FILE": str(path)})
    assert (texts(found), found.warnings) == (["10.0.1.1/32", "10.0.1.2/32"], ())


def test_rank_table_of_an_unknown_kind_means_the_next_source_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "hccl.json"
    path.write_text(json.dumps(UNKNOWN))
    found = find_in({"RANK_TABLE_FILE": str(path)}, options=SITE)
    assert texts(found) == ["10.9.9.9/32"]
    (warning,) = found.warnings
    assert_line_with(warning, [f"RANK_TABLE_FILE={path}", "no rank table that is known here"])
    assert "anew" not in warning
    with pytest.raises(PolicyError) as error:
        find_in({"RANK_TABLE_FILE": str(path)})
    assert_line_with(str(error.value), ["nothing says which hosts", f"RANK_TABLE_FILE={path}", "known here"])


@pytest.mark.parametrize("text", [json.dumps(UNKNOWN), json.dumps(PLACEHOLDER), '{"server_list": "n0"}', "{} {}"])
def test_rank_table_that_nobody_named_stops_no_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "hccl.json"
    path.write_text(text)
    monkeypatch.setattr(ranktable, "MOUNTED", (path,))
    told: list[str] = []
    found = find_peers(SITE, job(), resolve, {}, told.append)
    assert texts(found) == ["10.9.9.9/32"]
    (line,) = (*found.warnings, *told)
    assert_line_with(line, [f"rank table {path}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [(json.dumps(PLACEHOLDER), "host_ip 'xx.xx.xx.xx'"), ("{} {}", "no JSON"), ('{"server_list": ["n0"]}', "anew")],
)
def test_rank_table_that_a_variable_names_and_that_is_broken_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hccl.json"
    path.write_text(text)
    with pytest.raises(PolicyError) as error:
        find_in({"RANK_TABLE_FILE": str(path)}, options=SITE)
    assert_line_with(str(error.value), [f"RANK_TABLE_FILE={path}", words])


def test_an_error_names_what_could_not_be_read() -> None:
    environment = {"PBS_NODEFILE": "/nonexistent/aux/7", "RANK_TABLE_FILE": "/nonexistent/table.json"}
    with pytest.raises(PolicyError) as error:
        find_in(environment)
    notes = "(PBS_NODEFILE names /nonexistent/aux/7, which is not on this host; RANK_TABLE_FILE names"
    assert_line_with(str(error.value), [notes, "export SECURERUN_PEERS=@hostfile.txt"])


class NameServer:
    """Answers a name with what stands for its last answer, once all before are used up."""

    def __init__(self, **answers: list[list[str] | int]) -> None:
        self.answers = answers
        self.questions: list[str] = []

    @classmethod
    def of(cls, answers: dict[str, list[list[str] | int]]) -> NameServer:
        """One whose names have dashes."""
        return cls(**answers)

    def __call__(self, name: str) -> Iterable[str]:
        self.questions.append(name)
        left = self.answers[name]
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, int):
            raise socket.gaierror(answer, "no answer today")
        return answer


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "PAUSE_SECONDS", 0.01)


def test_pods_that_come_up_late_are_waited_for(monkeypatch: pytest.MonkeyPatch, hurry: None) -> None:
    monkeypatch.setattr(peers, "POD_SECONDS", 60.0)
    names = NameServer(pod0=[["10.1.0.1"]], pod1=[socket.EAI_NONAME, socket.EAI_NODATA, ["10.1.0.2"]])
    told: list[str] = []
    found = find_peers(Options(), job(), names, {"VC_WORKER_HOSTS": "pod0,pod1"}, told.append)
    assert texts(found) == ["10.1.0.1/32", "10.1.0.2/32"]
    assert sorted(names.questions) == ["pod0", "pod1", "pod1", "pod1"]
    (words,) = told
    assert_line_with(words, ["Volcano (VC_WORKER_HOSTS)", "no address yet for pod1;", "up to 60 s"])
    # In Kubernetes whoever named them.
    names = NameServer(pod1=[socket.EAI_NONAME, ["10.1.0.2"]])
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    assert texts(find_peers(Options(peers="pod1"), job(), names, environment)) == ["10.1.0.2/32"]


TRAINJOB = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "PET_NNODES": "2", "PET_MASTER_ADDR": "llm-node-0-0.llm"}


def test_the_pods_of_a_kubeflow_trainjob_are_those_of_its_headless_service() -> None:
    names = NameServer.of({"llm": [["10.1.0.1", "10.1.0.2"]], "llm-node-0-0.llm": [["10.1.0.1"]]})
    found = find_peers(Options(), job(2, "llm-node-0-0.llm"), names, TRAINJOB)
    assert (texts(found), found.source) == (["10.1.0.1/32", "10.1.0.2/32"], "Kubeflow Trainer (PET_MASTER_ADDR)")
    assert found.warnings == ()
    # A pod that comes back, or comes late.
    names.answers["llm"] = [["10.1.0.1", "10.1.0.9"]]
    assert texts(peers.again(found, names)) == ["10.1.0.1/32", "10.1.0.9/32"]
    # Whoever names the peers himself is believed, and a job of one node has none.
    assert texts(find_peers(Options(peers="10.0.0.9"), job(), names, TRAINJOB)) == ["10.0.0.9/32"]
    assert find_peers(Options(), job(1), names, TRAINJOB).networks == ()


def test_all_pods_of_a_headless_service_are_waited_for(monkeypatch: pytest.MonkeyPatch, hurry: None) -> None:
    """Those that have no address by then may connect as soon as they have."""
    late: list[list[str] | int] = [socket.EAI_NONAME, ["10.1.0.2"], ["10.1.0.1", "10.1.0.2"], ["10.1.0.1", "10.1.0.2"]]
    three: list[list[str] | int] = [*late, ["10.1.0.1", "10.1.0.2", "10.1.0.3"]]
    for patience, answers in ((60.0, three), (0.2, late)):
        monkeypatch.setattr(peers, "POD_SECONDS", patience)
        told: list[str] = []
        names = NameServer.of({"llm": [*answers], "llm-node-0-0.llm": [["10.1.0.1"]]})
        found = find_peers(Options(), job(3), names, {**TRAINJOB, "PET_NNODES": "3"}, told.append)
        assert len(found.listed) == (3 if answers is three else 2)
        assert_line_with(told[-1], ["llm has the addresses of 1 pod so far", "3 nodes", f"up to {patience:g} s"])
        if answers is three:
            assert found.warnings == ()
            continue
        assert_line_with(found.warnings[0], ["llm has the addresses of 2 pods so far", "as soon as it has theirs"])


def test_this_pod_s_own_address_shows_a_headless_service_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_own_addresses", lambda: frozenset({"10.1.0.2"}))
    monkeypatch.setattr("securerun.host.interfaces.may_bind", "10.1.0.2".__eq__)
    names = NameServer.of({"llm": [["10.1.0.2"]], "llm-node-0-0.llm": [socket.EAI_NONAME]})
    (warning,) = find_peers(Options(), job(2), names, TRAINJOB).warnings
    assert_line_with(warning, ["1 pod so far", "2 nodes"])


def test_a_service_s_own_address_is_never_a_peer(monkeypatch: pytest.MonkeyPatch, hurry: None) -> None:
    monkeypatch.setattr(peers, "POD_SECONDS", 0.1)
    for of_first_pod in (["10.1.0.1"], socket.EAI_NONAME):
        names = NameServer.of({"llm": [["10.96.0.12"]], "llm-node-0-0.llm": [of_first_pod]})
        with pytest.raises(PolicyError) as error:
            find_peers(Options(), job(2, "llm-node-0-0.llm"), names, TRAINJOB)
        assert_line_with(str(error.value), ["nothing says which hosts", "no address of llm is known to be a pod's"])
        assert texts(find_peers(SITE, job(2, "llm-node-0-0.llm"), names, TRAINJOB)) == ["10.9.9.9/32"]


def test_a_wrong_name_is_an_error_at_once_and_a_busy_name_server_is_not(hurry: None) -> None:
    names = NameServer(node1=[socket.EAI_NONAME, ["10.0.0.1"]])
    with pytest.raises(PolicyError, match="no answer today"):
        find_peers(Options(peers="node1"), job(), names)
    assert names.questions == ["node1"]
    names = NameServer(node1=[socket.EAI_AGAIN, socket.EAI_AGAIN, ["10.0.0.1"]])
    assert texts(find_peers(Options(peers="node1"), job(), names)) == ["10.0.0.1/32"]


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch, hurry: None) -> None:
    monkeypatch.setattr(peers, "NODE_SECONDS", 0.2)
    told: list[str] = []
    with pytest.raises(PolicyError, match=r"'n1' \(and 4 more\) cannot be resolved"):
        find_peers(Options(), job(), unknown, {"LSB_HOSTS": "n1 n2 n3 n4 n5"}, told.append)
    (words,) = told
    assert_line_with(words, ["no address yet for n1, n2, n3 and 2 more;"])


def test_names_are_asked_for_again_while_the_job_runs() -> None:
    """An address that goes is removed, one that comes is added; who could not be asked about keeps what he had."""
    names = NameServer(
        moved=[["10.1.0.1"], ["10.1.0.7", "fd00::7"]],
        gone=[["10.1.0.3"], socket.EAI_NONAME],
        unknown=[["10.1.0.5"], socket.EAI_AGAIN],
        here=[["127.0.1.1"], ["10.1.0.9"]],
        wrong=[["10.1.0.11"], ["0.0.0.0", "127.0.0.1"]],  # noqa: S104
    )
    before = find_peers(Options(peers="moved,gone,unknown,here,wrong,10.2.0.0/16"), job(5), names)
    assert texts(before) == ["10.1.0.1/32", "10.1.0.3/32", "10.1.0.5/32", "10.1.0.11/32", "10.2.0.0/16"]
    after = peers.again(before, names)
    assert texts(after) == ["10.1.0.5/32", "10.1.0.7/32", "10.1.0.9/32", "10.2.0.0/16", "fd00::7/128"]
    assert (after.source, after.warnings) == (before.source, before.warnings)
    assert peers.again(after, names) == after


def test_a_silent_name_server_takes_no_address_away(monkeypatch: pytest.MonkeyPatch) -> None:
    before = find("node1,node2")
    monkeypatch.setattr(resolver, "SECONDS", 0.1)
    silence = threading.Event()
    after = peers.again(before, lambda name: [str(silence.wait(10))])
    silence.set()
    assert after == before


def test_what_is_written_out_has_nothing_to_ask_for() -> None:
    before = find("10.0.0.7,10.1.0.0/16,any")
    assert before.named == {}
    assert peers.again(before, unknown) == before


def assert_line_with(message: str, words: list[str]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message
