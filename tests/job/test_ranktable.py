"""Rank tables as HCCL's documentation, MindCluster and MindIE write them: whose hosts are in them, with which ports.

Every address that begins with 192.168 is an NPU's, and none of those is ever a host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
from hosts import Network, finish_all
from probe import Probe

from securerun.errors import PolicyError
from securerun.job import ranktable
from securerun.job.ranktable import Location, RankTable, Unfinished

Table = dict[str, Any]


def devices(*ports: object) -> list[Table]:
    return [
        {"device_id": str(n), "device_ip": f"192.168.0.{n + 1}", "rank_id": str(n), "host_port": port}
        for n, port in enumerate(ports)
    ]


def table_1_0(*servers: Table) -> Table:
    """As MindCluster writes it: every server has host_ip, also if it is empty."""
    return {"status": "completed", "server_list": list(servers), "server_count": str(len(servers)), "version": "1.0"}


def rank(number: int, address: str | None, port: int | None = None, **changed: object) -> Table:
    """A rank of version 2.0: two NPU ports, and the host's network card at net_layer 3 where `address` is given."""
    npu = [
        {"addr_type": "EID", "addr": "000000000000000000100000dfdf0020", "ports": ["0/4"]},
        {"addr_type": "IPV4", "addr": f"192.168.1.{number}", "ports": ["1/5", "1/6"]},
    ]
    host = {"addr_type": "IPV4", "addr": address, "ports": ["d2h"], "plane_id": "plane0", **changed}
    levels = [{"net_layer": 0, "net_type": "TOPO_FILE_DESC", "rank_addr_list": npu}]
    if address is not None:
        levels.append({"net_layer": 3, "net_type": "CLOS", "rank_addr_list": [host]})
    ports = {} if port is None else {"host_port": port}
    return {"rank_id": number, "local_id": 0, "device_id": 0, "level_list": levels, "device_port": 16666, **ports}


def table_2_0(*ranks: Table) -> Table:
    return {"status": "completed", "version": "2.0", "rank_count": len(ranks), "rank_list": list(ranks)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Location]:
    def write(table: object) -> Location:
        path = tmp_path / "hccl.json"
        path.write_text(table if isinstance(table, str) else json.dumps(table, indent=1))
        return Location(path, "RANK_TABLE_FILE=hccl.json")

    return write


Write = Callable[[object], Location]


def hosts(table: RankTable) -> list[tuple[str, ...]]:
    return [entry.words for entry in table.entries()]


HCCL_1_0 = table_1_0({"server_id": "10.0.0.1", "device": devices()}, {"server_id": "10.0.0.2", "device": devices()})
MINDCLUSTER = table_1_0(
    {"server_id": "3f6a11c2-5c1e-4b27-b7d0-000000000001", "host_ip": "10.0.0.1", "container_ip": "10.244.0.1"},
    {"server_id": "3f6a11c2-5c1e-4b27-b7d0-000000000002", "host_ip": "", "container_ip": "10.244.0.2"},
)
SUPER_PODS = {
    "version": "1.2",
    # Before what it refers to, and with one server that stands nowhere else.
    "super_pod_list": [
        {"super_pod_id": "0", "server_list": [{"server_id": "node_0"}, {"server_id": "node_1"}]},
        {"super_pod_id": "1", "server_list": [{"server_id": "10.0.0.3"}]},
    ],
    "server_list": [
        {"server_id": "node_0", "host_ip": "10.0.0.1", "device": devices("16665", "16666")},
        {"server_id": "node_1", "host_ip": "fd00::1", "device": devices("16667", "16668")},
    ],
    "status": "completed",
}
MINDIE = {
    "version": "1.0",
    "status": "completed",
    "server_group_list": [
        {"group_id": "0", "server_count": "1", "server_list": [{"server_ip": "10.0.0.1"}]},
        # One host may serve in two groups.
        {"group_id": "1", "server_count": "1", "server_list": [{"server_id": "10.0.0.2", "server_ip": "10.0.0.1"}]},
        {
            "group_id": "2",
            "server_list": [{"server_id": "10.0.0.2", "server_ip": "10.244.0.2", "device": devices()}],
            "super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "10.0.0.2"}]}],
        },
        {"group_id": "3", "server_list": []},
    ],
}


# As CANN's guides have it for a laboratory: an instance for each device.
INSTANCE_A_DEVICE = {
    "board_id": "0x0020",
    "chip_info": "910",
    "deploy_mode": "lab",
    "group_count": "1",
    "group_list": [
        {
            "device_num": "4",
            "server_num": "2",
            "group_name": "",
            "instance_count": "4",
            "instance_list": [
                {
                    "devices": [{"device_id": str(n % 2), "device_ip": f"192.168.0.{n}", "host_port": str(16665 + n)}],
                    "rank_id": str(n),
                    "server_id": f"10.0.0.{1 + n // 2}",
                }
                for n in range(4)
            ],
        }
    ],
    "para_plane_nic_location": "device",
    "para_plane_nic_name": ["eth0", "eth1"],
    "para_plane_nic_num": "2",
    "status": "completed",
}
# As ModelArts and HCCL-Controller write it: an instance for each pod. Two pods on a host are two nodes of the job.
INSTANCE_A_POD = {
    "status": "completed",
    "group_count": "1",
    "group_list": [
        {
            "group_name": "worker",
            "device_count": "8",
            "instance_count": "3",
            "instance_list": [
                {"pod_name": f"job-{n}", "server_id": f"10.0.0.{1 + n // 2}", "devices": devices()} for n in range(3)
            ],
        }
    ],
}
# As vLLM and MindIE have it where prefill and decode are apart: each device by itself.
PREFILL_AND_DECODE = {
    "version": "1.2",
    "server_count": "2",
    "prefill_device_list": [
        {"server_id": "10.0.0.1", "device_id": str(n), "device_ip": f"192.168.0.{n}", "cluster_id": "1"}
        for n in range(2)
    ],
    "decode_device_list": [
        {"server_id": f"10.0.0.{n}", "device_id": "3", "device_ip": f"192.168.1.{n}", "cluster_id": "2"} for n in (1, 2)
    ],
    "status": "completed",
}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (INSTANCE_A_DEVICE, [("10.0.0.1",), ("10.0.0.2",)]),
        (INSTANCE_A_POD, [("10.0.0.1",), ("10.0.0.1",), ("10.0.0.2",)]),
        (PREFILL_AND_DECODE, [("10.0.0.1",), ("10.0.0.2",)]),
        (HCCL_1_0, [("10.0.0.1",), ("10.0.0.2",)]),
        (MINDCLUSTER, [("10.0.0.1", "10.244.0.1"), ("10.244.0.2",)]),
        (SUPER_PODS, [("10.0.0.1",), ("fd00::1",), ("10.0.0.3",)]),
        (MINDIE, [("10.0.0.1",), ("10.0.0.1", "10.0.0.2"), ("10.244.0.2", "10.0.0.2")]),
        (table_2_0(rank(0, "10.0.0.1"), rank(1, "10.0.0.1"), rank(2, "10.0.0.2")), [("10.0.0.1",), ("10.0.0.2",)]),
        (table_2_0(rank(0, "10.0.0.1"), rank(1, None)), [("10.0.0.1",)]),
        (table_2_0(rank(0, "fd00::0001", addr_type="IPv6")), [("fd00::1",)]),
        # Two pods in one host's network are two nodes of the job.
        (
            table_1_0({"server_id": "a", "host_ip": "10.0.0.1"}, {"server_id": "b", "host_ip": "10.0.0.1"}),
            [("10.0.0.1",), ("10.0.0.1",)],
        ),
        # A server_id may be any text beside an address, also the loopback's.
        (table_1_0({"server_id": "127.0.0.1", "host_ip": "10.0.0.1"}), [("10.0.0.1",)]),
        ("\ufeff" + json.dumps(HCCL_1_0), [("10.0.0.1",), ("10.0.0.2",)]),
    ],
)
def test_the_hosts_of_a_table(write: Write, table: object, expected: list[tuple[str, ...]]) -> None:
    assert hosts(ranktable.read(write(table))) == expected


@pytest.mark.parametrize(
    "table",
    [
        table_1_0({"server_id": "node_0", "device": devices()}, {"server_id": "node_1", "device": devices()}),
        table_1_0(),
        {"group_list": [{"instance_list": [{"server_id": "node_0", "devices": devices()}]}]},
        {"prefill_device_list": [], "decode_device_list": []},
        table_2_0(rank(0, None), rank(1, None)),
        table_2_0(rank(0, "10.0.0.1", addr_type="EID")),
        # An NPU's port is Die/port, whatever else is said of the address.
        table_2_0(rank(0, "10.0.0.1", ports=["0/1"])),
        table_2_0(rank(0, "10.0.0.1", ports=[])),
    ],
)
def test_a_table_may_know_no_address_of_a_host(write: Write, table: Table) -> None:
    assert ranktable.read(write(table)).entries() == ()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (table_1_0({"server_id": "n0", "host_ip": "0.0.0.0"}), ["'n0'", "host_ip '0.0.0.0'", "write its own"]),  # noqa: S104
        (table_1_0({"server_id": "n0", "host_ip": "127.0.0.1"}), ["host_ip '127.0.0.1' is no address of a host"]),
        (table_1_0({"server_id": "n0", "host_ip": "xxx"}), ["host_ip 'xxx'"]),
        (table_1_0({"server_id": "n0", "host_ip": "xx.xx.xx.xx"}), ["host_ip 'xx.xx.xx.xx'"]),
        (table_1_0({"server_id": "n0", "host_ip": ""}), ["host_ip ''"]),
        (table_1_0({"server_id": "n0", "host_ip": "10.0.0.1", "container_ip": "::"}), ["container_ip '::'"]),
        (table_1_0({"server_id": "n0", "server_ip": "10.0.0.256"}), ["server_ip '10.0.0.256'"]),
        (table_1_0({"server_id": "n0", "host_ip": "224.0.0.1"}), ["host_ip '224.0.0.1'"]),
        (table_1_0({"server_id": "n0", "host_ip": None}), ["host_ip 'None'"]),
        (table_1_0({"server_id": "127.0.0.1"}), ["server_id '127.0.0.1'"]),
        (
            table_1_0({"server_id": "n0", "host_ip": "10.0.0.1"}, {"server_id": "n1"}),
            ["'n1' has no address, and others"],
        ),
        (table_2_0(rank(0, "127.0.0.1")), ["addr '127.0.0.1'"]),
        (table_2_0(rank(0, "host0")), ["addr 'host0'"]),
    ],
)
def test_a_placeholder_is_no_host(write: Write, table: Table, words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        ranktable.read(write(table)).entries()
    assert_line_with(str(error.value), ["RANK_TABLE_FILE=hccl.json", *words, "--peers"])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (table_1_0({"server_id": "n0"}, {"server_id": "n0"}), ["'n0' stands twice"]),
        ({"server_group_list": [{"server_list": [{"server_id": "n0"}] * 2}]}, ["'n0' stands twice"]),
        ({"group_list": [{"instance_list": [{"server_id": "n0", "devices": "0"}]}]}, ["device of server 'n0' is no"]),
        ({"decode_device_list": ["n0"]}, ["decode_device_list.item is str, not an object"]),
        ([], ["no rank table", "server_list"]),
        ({"version": "1.0"}, ["no rank table", "server_list"]),
        ({"server_list": "n0"}, ["no rank table"]),
        ({"server_list": ["n0"]}, ["server_list.item is str, not an object"]),
        ({"rank_list": [7]}, ["rank_list.item is int, not an object"]),
        (table_1_0({"server_id": "n0", "device": "0"}), ["device of server 'n0' is no list"]),
        (table_1_0({"server_id": "n0", "device": ["0"]}), ["device is str"]),
        (table_1_0({"server_id": "n0", "device": devices("http")}), ["host_port 'http'", "1-65535"]),
        (table_1_0({"server_id": "n0", "device": devices("65536")}), ["host_port '65536'"]),
        (table_1_0({"server_id": "n0", "device": devices([1])}), ["host_port '[1]'"]),
        (table_2_0(rank(0, "10.0.0.1", 0)), ["host_port '0'"]),
        ('{"server_list": [\n{"server_id" "n0"}]}', ["line 2", "no JSON", "write it anew"]),
        ('{"server_list": [] // all of them\n}', ["line 1", "no JSON"]),
        ("server_list: []", ["line 1", "no JSON"]),
    ],
)
def test_a_wrong_table_is_named_with_what_is_wrong(write: Write, table: object, words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        ranktable.read(write(table))
    assert error.value.status == 78
    assert not isinstance(error.value, Unfinished)
    assert_line_with(str(error.value), ["RANK_TABLE_FILE=hccl.json", *words])


def test_a_table_that_is_no_text_is_refused(write: Write) -> None:
    location = write("")
    location.path.write_bytes(b'{"server_list": "\xff\xfe"}')
    with pytest.raises(PolicyError, match="no UTF-8 text"):
        ranktable.read(location)


def test_what_is_no_file_is_refused_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(PolicyError, match="this is no file"):
            ranktable.read(Location(tmp_path / name, "here"))


def test_a_table_of_more_than_1_gb_is_refused_unread(write: Write) -> None:
    location = write("{")
    os.truncate(location.path, (1 << 30) + 1)
    with pytest.raises(PolicyError, match=r"larger than 1 GB \(1024 MB\)"):
        ranktable.read(location)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"10.0.0.1", "127.0.0.1"}, (16665, 16666)),
        ({"fd00::1"}, (16667, 16668)),
        ({"10.9.9.9"}, (16665, 16666, 16667, 16668)),
        ({"192.168.0.1"}, (16665, 16666, 16667, 16668)),
    ],
)
def test_the_ports_are_this_host_s_where_the_table_has_this_host(
    write: Write, own: set[str], expected: tuple[int, ...]
) -> None:
    assert ranktable.read(write(SUPER_PODS)).ports(lambda: own) == expected


@pytest.mark.parametrize(("own", "expected"), [("10.0.0.2", (16667, 16668)), ("10.9.9.9", tuple(range(16665, 16669)))])
def test_the_ports_of_a_server_s_instances_are_its_own(write: Write, own: str, expected: tuple[int, ...]) -> None:
    assert ranktable.read(write(INSTANCE_A_DEVICE)).ports(lambda: {own}) == expected


@pytest.mark.parametrize("table", [[], {"version": "3.0", "node_list": [{"ip": "10.0.0.1"}]}, {"group_list": []}])
def test_what_is_unknown_is_told_from_what_is_broken(write: Write, table: object) -> None:
    with pytest.raises(ranktable.Unknown) as error:
        ranktable.read(write(table))
    assert_line_with(str(error.value), ["no rank table that is known here", "group_list", "--peers"])
    assert "anew" not in str(error.value)


def test_ports_of_ranks_are_numbers_and_those_of_an_unknown_host_count_everywhere(write: Write) -> None:
    table = table_2_0(rank(0, "10.0.0.1", 60001), rank(1, "10.0.0.1", 60002), rank(2, "10.0.0.2", 1), rank(3, None, 9))
    assert ranktable.read(write(table)).ports(lambda: {"10.0.0.1"}) == (9, 60001, 60002)


def test_a_table_without_ports_does_not_ask_for_addresses(write: Write) -> None:
    def own() -> set[str]:
        raise AssertionError

    assert ranktable.read(write(MINDCLUSTER)).ports(own) == ()


def test_a_table_that_is_being_written_is_waited_for_and_the_user_is_told_once(write: Write) -> None:
    location = write({"status": "initializing", "server_list": []})
    told: list[str] = []

    def tell(words: str) -> None:
        told.append(words)
        write({"status": "initializing", "server_list": [{"server_id": "10.0.0.1"}]})
        threading.Timer(0.5, write, [HCCL_1_0]).start()

    assert hosts(ranktable.wait_for(location, tell)) == [("10.0.0.1",), ("10.0.0.2",)]
    (words,) = told
    assert_line_with(words, ["RANK_TABLE_FILE=hccl.json", "status is 'initializing'", "waiting up to 120 s"])


def test_a_table_that_stays_unfinished_is_an_error(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranktable, "STATUS_SECONDS", 0.3)
    with pytest.raises(PolicyError) as error:
        ranktable.wait_for(write({"status": "initializing", "server_list": []}), lambda words: None)
    assert_line_with(str(error.value), ["'initializing', not 'completed'", "the other nodes of the job", "--peers"])


@pytest.mark.parametrize("text", ["", '{"status": "comp', '{"status": "completed", "server_list": [{"server_id":'])
def test_a_table_without_its_end_is_an_error_unless_that_is_just_being_written(
    write: Write, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(ranktable, "WRITING_SECONDS", 0.5)
    with pytest.raises(PolicyError) as error:
        ranktable.wait_for(write(text), pytest.fail)
    assert_line_with(str(error.value), ["line 1", "ends in the middle", "write it anew", "--peers"])
    location = write(text)
    threading.Timer(0.2, write, [HCCL_1_0]).start()
    assert len(hosts(ranktable.wait_for(location, pytest.fail))) == 2


def test_the_links_of_a_config_map_are_followed_when_they_change(tmp_path: Path) -> None:
    """The kubelet's atomic writer: hccl.json -> ..data/hccl.json, ..data -> a directory that is replaced."""
    for version, table in (("..1", {"status": "initializing"}), ("..2", HCCL_1_0)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "hccl.json").write_text(json.dumps({"server_list": [], **table}))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "hccl.json").symlink_to("..data/hccl.json")

    def publish(_: str) -> None:
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    location = ranktable.locate({"RANK_TABLE_FILE": str(tmp_path / "hccl.json")}, pytest.fail)
    assert location is not None
    assert len(hosts(ranktable.wait_for(location, publish))) == 2


def test_where_a_table_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = tmp_path / "config" / "hccl.json"
    monkeypatch.setattr(ranktable, "MOUNTED", (tmp_path / "nothing.json", mounted))
    notes: list[str] = []
    assert ranktable.locate({}, notes.append) is None
    mounted.parent.mkdir()
    mounted.write_text("{}")
    assert ranktable.locate({}, notes.append) == Location(mounted, f"rank table {mounted}", is_named=False)
    named = tmp_path / "named.json"
    named.write_text("{}")
    both = {"RANK_TABLE_FILE": str(named), "RANK_TABLE_PATH": str(mounted.parent)}
    assert ranktable.locate(both, notes.append) == Location(named, f"RANK_TABLE_FILE={named}")
    # RANK_TABLE_PATH may be the directory.
    path_only = {"RANK_TABLE_PATH": str(mounted.parent)}
    assert ranktable.locate(path_only, notes.append) == Location(mounted, f"RANK_TABLE_PATH={mounted}")
    assert notes == []
    missing = {"RANK_TABLE_FILE": "/nonexistent/table.json"}
    assert ranktable.locate(missing, notes.append) == Location(mounted, f"rank table {mounted}", is_named=False)
    assert notes == ["RANK_TABLE_FILE names /nonexistent/table.json, which is not on this host"]


MEASURE = """
import re, sys
from pathlib import Path
from securerun.job import ranktable
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
location = ranktable.Location(Path(sys.argv[1]), "table")
before = peak()
table = ranktable.read(location)
print(peak() - before, len(table.entries()), len(table.ports(set)))
"""


def test_a_large_table_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "hccl.json"
    device = json.dumps(rank(1, "10.0.0.1", 60001) | {"filler": [{"key": "x" * 500} for _ in range(5)]})
    with path.open("w") as file:
        file.write('{"status": "completed", "unknown": [')
        file.writelines('{"deep": [[1, 2, {"er": "x"}]]},' for _ in range(20_000))
        file.write('0], "rank_list": [')
        file.writelines(device + "," for _ in range(10_000))
        file.write(device + "]}")
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    grown, found, ports = map(int, done.stdout.split())
    assert (found, ports) == (1, 1)
    assert grown < path.stat().st_size / 4


def assert_line_with(message: str, words: list[str]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message


def test_two_hosts_of_a_table_with_an_instance_a_device_train(network: Network, tmp_path: Path) -> None:
    node0, node1, stranger = network
    table = json.loads(json.dumps(INSTANCE_A_DEVICE).replace("10.0.0.1", node0.ipv4).replace("10.0.0.2", node1.ipv4))
    path = tmp_path / "rank_table.json"
    path.write_text(json.dumps(table))
    options = ["--nnodes", "2", "--nproc-per-node", "2"]
    with Probe(stranger, node0) as probe:
        started = [
            node.popen(
                [jobs.SECURERUN, *options, *jobs.rendezvous("static", node, rank, node0), jobs.TRAIN],
                env={"RANK_TABLE_FILE": str(path)},
            )
            for rank, node in enumerate((node0, node1))
        ]
        done = finish_all(started, timeout=60)
    assert [one.returncode for one in done] == [0, 0], done
    assert probe.reached == set()
    assert f"(RANK_TABLE_FILE={path})" in done[0].stderr
    assert "TCP ports 16665-16666, 29500, 60000-60015 closed" in done[0].stderr
