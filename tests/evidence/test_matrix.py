"""securerunctl matrix: the same rows in both languages and in every form, and those of a live job against `ss`."""

from __future__ import annotations

import csv
import io
import ipaddress
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import plans
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, finish
from users import GUARD, PrivateMachine

from securerun.errors import SecurerunError
from securerun.evidence import matrix, matrix_words
from securerun.evidence.matrix import Connection, Ends
from securerun.evidence.matrix_words import COLUMNS, FORMATS, LANGUAGES, Setting
from securerun.firewall.policy import PortRange, Purpose
from securerun.job.job import Endpoint, Job

SECURERUNCTL = str(COMMANDS / "securerunctl")
ENDS = Ends(("10.77.0.1", "fd77::1"), ("10.77.0.2", "fd77::2"))
ALONE = Ends(("10.77.0.1",), ())
STORE = ("10.77.0.1",)
SETTING = Setting("node0", "32768-60999", "2.13.0")
STATIC = Job("static", Endpoint("10.77.0.1", 29500), 2, 2, 0, ("train.py",))
C10D = Job("c10d", Endpoint("10.77.0.1", 29400), 2, 2, 0, ("train.py",))
ETCD = Job("etcd", Endpoint("10.0.0.9", 2379), 2, 2, 0, ("train.py",))
HCCL = PortRange(60000, 60015, "HCCL")
C10D_PORT = PortRange(29400, 29400, "rendezvous store (c10d)")
# The titles in the notes of torch_npu and MindSpeed (通信矩阵信息), in their order.
NOTES = [
    *("组件", "源设备", "源IP", "源端口", "目的设备", "目的IP", "目的端口（侦听）", "协议"),
    *("端口说明", "侦听端口是否可更改", "认证方式", "加密方式", "所属平面", "版本", "特殊场景", "备注"),
]

# What a job is to the matrix: an agent with a store, and workers with sockets of every kind. Prints its run's id.
JOB = """
import ipaddress, os, socket, subprocess, sys
from securerun import guarded
from securerun.firewall.policy import Policy, PortRange

ports = (PortRange(29500, 29500, "master port (static rendezvous)"), PortRange(60000, 60015, "HCCL"))
peers = (ipaddress.ip_network("10.77.0.2"), ipaddress.ip_network("fd77::2"))

def listen(address, port=0):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, dualstack_ipv6=address == "::")

with guarded(Policy("0123456789ab", ports, peers), command="train.py"):
    agents = [listen("::", 29500), listen("::")]
    if os.fork() == 0:
        workers = [listen(address) for address in ("10.77.0.1", "fd77::1", "0.0.0.0", "127.0.0.1")]
        hccl = listen("0.0.0.0", 60003)
        print("listening", flush=True)
        sys.stdin.read()
        os._exit(0)
    os.wait()
"""


def planned(job: Job, *ports: PortRange, ends: Ends = ENDS, here: bool = True) -> list[Connection]:
    return matrix.planned(job, ports, ends, STORE, here=here)


def services(connections: list[Connection]) -> list[tuple[str, str]]:
    return [(connection.service, connection.direction) for connection in connections]


def rows(connections: list[Connection], language: str = "en") -> list[matrix_words.Row]:
    return matrix_words.rows(connections, SETTING, language)


def test_the_columns_are_those_of_the_security_notes() -> None:
    assert LANGUAGES["zh"].columns == tuple(NOTES)
    assert len(LANGUAGES["en"].columns) == len(COLUMNS) == len(NOTES) == 16


def test_both_languages_have_the_same_words_to_say() -> None:
    english, chinese = LANGUAGES["en"], LANGUAGES["zh"]
    assert english.services.keys() == chinese.services.keys()
    for service, words in english.services.items():
        assert words.of_torch == chinese.services[service].of_torch
    for name, words in vars(english).items():
        other = getattr(chinese, name)
        assert type(words) is type(other)
        if isinstance(words, str):  # the same things are filled in
            assert re.findall(r"{\w+}", words) == re.findall(r"{\w+}", other), name


def test_a_static_job_has_one_store_and_whatever_the_collectives_open() -> None:
    found = planned(STATIC, plans.PORTS[0], HCCL)
    both = [(service, direction) for service in ("hccl", "gloo", "nccl") for direction in ("in", "out")]
    assert services(found) == [("static", "in"), *both]
    store = rows(found)[0]
    assert store["source_ip"] == "10.77.0.2, fd77::2"
    assert store["destination_ip"] == "10.77.0.1"
    assert store["destination_port"] == "29500"
    assert store["source_device"] == "peer: another node of the job"
    assert store["destination_device"] == "this node (node0)"
    assert store["changeable"] == "yes: --master-port"
    assert store["version"] == "2.13.0"


def test_the_store_of_another_node_is_what_this_one_connects_to() -> None:
    (store, *_) = planned(C10D, C10D_PORT, here=False)
    assert (store.service, store.direction, store.sources, store.destinations) == ("c10d", "out", ENDS.node, STORE)
    row = rows([store])[0]
    assert row["source_port"] == "chosen by the operating system (32768-60999)"


def test_every_rendezvous_but_static_has_a_second_store_on_a_random_port() -> None:
    for job, ports in ((C10D, (C10D_PORT,)), (ETCD, ())):
        found = [row for row in planned(job, *ports) if row.service == "worker_store"]
        assert [row.direction for row in found] == ["in", "out"]
        assert rows(found)[0]["destination_port"] == "random, chosen by the operating system"


def test_an_etcd_server_is_somebody_elses() -> None:
    (server,) = [row for row in planned(ETCD) if row.service == "etcd"]
    assert (server.direction, server.ports) == ("out", ("2379",))
    assert rows([server])[0]["destination_device"] == "etcd"


def test_hccl_is_there_with_its_range_or_with_random_ports() -> None:
    ranged = rows([row for row in planned(STATIC, HCCL) if row.service == "hccl"])
    assert {row["destination_port"] for row in ranged} == {"60000-60015"}
    assert {row["source_port"] for row in ranged} == {"60000-60015, or chosen by the operating system"}
    automatic = rows([row for row in planned(STATIC) if row.service == "hccl"])
    assert {row["destination_port"] for row in automatic} == {"random, chosen by the operating system"}


def test_a_job_of_one_node_stays_on_it() -> None:
    found = planned(STATIC, plans.PORTS[0], HCCL, ends=ALONE)
    assert {row.direction for row in found} == {"within"}
    assert all("no other host takes part" in row["remarks"] for row in rows(found))


def test_ports_that_the_user_added_are_the_scripts() -> None:
    found = planned(STATIC, PortRange(7000, 7010, "added with --ports"))
    assert [(row.service, row.ports) for row in found][:2] == [("added", ("7000-7010",))] * 2


def test_every_purpose_of_a_plan_has_a_service() -> None:
    found = {purpose: planned(STATIC, PortRange(7000, 7010, purpose))[0].service for purpose in Purpose}
    # A public port has a row of its own. A port that was opened meanwhile is in no plan.
    assert found.pop(Purpose.PUBLIC) == "hccl"
    assert [one for one, service in found.items() if service == "added"] == [Purpose.ADDED, Purpose.OPENED_MEANWHILE]
    assert {*found.values()} <= LANGUAGES["en"].services.keys()


def test_a_purpose_that_is_not_known_is_a_port_that_somebody_added() -> None:
    assert services(planned(STATIC, PortRange(7000, 7010, "store of some later torch")))[0] == ("added", "in")


def test_a_port_that_was_closed_meanwhile_is_shown_as_what_listens_there() -> None:
    found = matrix.Found(ipaddress.ip_address("10.77.0.1"), 40000, of_launcher=False)
    for ports in ((), (PortRange(40000, 40000, Purpose.OPENED_MEANWHILE),)):
        assert matrix.running(ports, ENDS, [found])[0].service == "collective"


def test_a_port_that_no_layer_closes_is_open_to_every_host() -> None:
    """As after the shield was switched off where there are no port chains; planned or not."""
    planned_port = PortRange(29500, 29500, Purpose.STATIC_STORE)
    found = [matrix.Found(ipaddress.ip_address("::"), port, of_launcher=True) for port in (29500, 40000, 40001)]
    connections = matrix.running([planned_port], ENDS, found, left_open=[(29500, 29500), (40000, 40000)])
    inbound = {row["destination_port"]: row for row in rows([row for row in connections if row.direction == "in"])}
    for port in ("29500", "40000"):
        assert inbound[port]["source_ip"] == "0.0.0.0/0, ::/0"
        assert "securerun lets only the peers connect" not in inbound[port]["remarks"]
    assert inbound["40001"]["source_ip"] == ", ".join(ENDS.peers)


def test_a_job_that_is_open_to_every_host_is_not_called_closed() -> None:
    every = Ends(ENDS.node, ("0.0.0.0/0", "::/0"))
    for row in rows([row for row in planned(STATIC, HCCL, ends=every) if row.direction == "in"]):
        assert row["source_device"] == "any host"
        assert "securerun" not in row["remarks"]


@pytest.mark.parametrize("form", list(FORMATS))
def test_every_form_has_the_same_shape_in_both_languages(form: str) -> None:
    connections = planned(C10D, C10D_PORT, HCCL)
    english, chinese = (FORMATS[form](rows(connections, name), name) for name in ("en", "zh"))
    assert english != chinese
    for language, text in (("en", english), ("zh", chinese)):
        assert all(label in text for label in LANGUAGES[language].columns)
        cells = cells_of(form, text)
        assert [len(row) for row in cells] == [len(COLUMNS)] * len(connections)
        assert [row[5] for row in cells] == [", ".join(one.destinations) for one in connections]


def cells_of(form: str, text: str) -> list[list[str]]:
    if form == "table":
        blocks = [block.splitlines() for block in text.split("\n\n")]
        return [[re.split(r"\s{2,}", line, maxsplit=1)[1] for line in block] for block in blocks]
    if form == "md":
        return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    if form == "csv":
        return list(csv.reader(io.StringIO(text)))[1:]
    return [list(row.values()) for row in json.loads(text)["rows"]]


def test_names_that_others_chose_stay_in_their_cell() -> None:
    hostile = Ends(("=cmd|' /C calc'!A1", "a|b\n| c"), ("<script>", "-1+1", "\x1b[2J"))
    for direction in ("in", "out"):
        found = rows([row for row in planned(STATIC, HCCL, ends=hostile) if row.direction == direction])
        assert len(FORMATS["md"](found, "en").splitlines()) == 2 + len(found)
        assert "<script>" not in FORMATS["md"](found, "en").replace("\\<script\\>", "")
        for line in csv.reader(io.StringIO(FORMATS["csv"](found, "en"))):
            assert not any(cell.startswith(("=", "+", "-", "@")) for cell in line)
        assert all("\x1b" not in form(found, "en") for form in FORMATS.values())


class Live(NamedTuple):
    node: Host
    process: subprocess.Popen[str]


# A listener of somebody else's.
OTHER = "import socket, sys; listener = socket.create_server(('', 0)); sys.stdin.read()"


@pytest.fixture
def live(node: Host) -> Iterator[Live]:
    """A job that runs on node0, and something that listens there and is none of its own."""
    other = node.popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE)
    process = node.popen([sys.executable, "-c", JOB], stdin=subprocess.PIPE, stderr=None)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    yield Live(node, process)
    assert finish(process, text_input="").returncode == 0
    finish(other, text_input="")


def of_live(live: Live, *words: str) -> dict[str, Any]:
    done = live.node.run([SECURERUNCTL, "matrix", "--format", "json", *words])
    assert (done.returncode, done.stderr) == (0, ""), done
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_live_job_has_a_row_for_every_port_that_ss_shows(live: Live) -> None:
    shown = live.node.run(["ss", "--no-header", "--listening", "--tcp", "--numeric", "--processes"], check=True).stdout
    members = {live.process.pid, *children_of(live.process.pid)}
    expected = {
        int(line.split()[3].rpartition(":")[2])
        for line in shown.splitlines()
        if members.intersection(map(int, re.findall(r"pid=(\d+)", line)))
    }
    assert len(expected) == 7
    document = of_live(live)
    listening = {
        int(port)
        for row in document["rows"]
        for port in re.findall(r":(\d+)(?=[,;]|$)", row["remarks"].partition("listening now: ")[2])
    }
    assert listening == expected


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_the_rows_of_a_live_job_tell_stores_from_collectives(live: Live) -> None:
    found = of_live(live, "--run", plans.RUN)["rows"]
    by_component: dict[str, list[dict[str, str]]] = {}
    for row in found:
        by_component.setdefault(row["component"], []).append(row)
    (store, second) = by_component["PyTorch"]
    assert (store["destination_port"], store["source_ip"]) == ("29500", "10.77.0.2, fd77::2")
    assert store["destination_ip"] == "10.77.0.1, fd77::1"
    assert second["destination_port"].isdigit()
    (inbound, outbound) = by_component["HCCL"]
    assert "listening now: *:60003" in inbound["remarks"]
    assert "listening" not in outbound["remarks"]
    collectives = by_component["PyTorch (gloo or NCCL)"]
    assert [
        row["destination_ip"] for row in collectives if row["destination_device"] == "this node (" + node_name() + ")"
    ]
    assert {"10.77.0.1", "fd77::1", "127.0.0.1"} <= {row["destination_ip"] for row in collectives}
    (loopback,) = [row for row in collectives if row["destination_ip"] == "127.0.0.1"]
    assert "no other host takes part" in loopback["remarks"]
    assert len(by_component["PyTorch or training script"]) == 1


def node_name() -> str:
    return subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()


def test_a_live_matrix_in_chinese_has_the_same_rows(live: Live) -> None:
    english, chinese = of_live(live)["rows"], of_live(live, "--lang", "zh")["rows"]
    for name in ("source_ip", "destination_ip", "protocol"):
        assert [row[name] for row in english] == [row[name] for row in chinese]
    assert [row["version"] == "all versions" for row in english] == [row["version"] == "所有版本" for row in chinese]


def test_users_see_the_ports_of_their_own_job(network: Network) -> None:
    with PrivateMachine() as machine:
        node = network["node0"]
        alice = machine.add_user("alice")
        machine.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
        job = machine.popen(node, [sys.executable, "-c", JOB], user=alice, stdin=subprocess.PIPE, stderr=None)
        assert job.stdout is not None
        assert job.stdout.readline() == "listening\n"
        done = machine.run(node, [SECURERUNCTL, "matrix", "--format", "csv"], user=alice)
        assert finish(job, text_input="").returncode == 0
        assert (done.returncode, done.stderr) == (0, ""), done
        assert "listening now: *:29500" in done.stdout
        assert len(done.stdout.splitlines()) == 10
        assert eventually(lambda: not machine.records())


def test_users_see_what_the_launcher_alone_listens_on(network: Network) -> None:
    """Nobody of its user may look into a launcher; what it holds is told from the run's cgroup."""
    with PrivateMachine() as machine:
        node = network["node0"]
        alice = machine.add_user("alice")
        machine.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
        program = JOB.replace("if os.fork() == 0:", "if True:").replace("os._exit(0)", "sys.exit()")
        job = machine.popen(node, [sys.executable, "-c", program], user=alice, stdin=subprocess.PIPE, stderr=None)
        assert job.stdout is not None
        assert job.stdout.readline() == "listening\n"
        words = [SECURERUNCTL, "matrix", "--format", "csv"]
        seen = [machine.run(node, words, user=user) for user in (alice, None)]
        finish(job, text_input="")
        assert seen[0].returncode == 0, seen
        assert (seen[0].stdout, seen[0].stderr) == (seen[1].stdout, seen[1].stderr)
        assert "listening now: *:29500" in seen[0].stdout
        assert eventually(lambda: not machine.records())


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--run", "ffffffffffff"], 2, "--run ffffffffffff"),
        (["--run", plans.RUN, "--", "train.py"], 2, "--run"),
        (["--lang", "fr"], 2, "fr"),
    ],
)
def test_a_matrix_of_nothing_is_refused_in_words(live: Live, words: list[str], status: int, reason: str) -> None:
    done = live.node.run([SECURERUNCTL, "matrix", *words])
    assert (done.returncode, done.stdout) == (status, ""), done
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_from_another_network_namespace_the_way_there_is_told(live: Live) -> None:
    done = subprocess.run([SECURERUNCTL, "matrix"], capture_output=True, text=True)
    assert done.returncode == SecurerunError.status
    assert f"nsenter --target {live.process.pid} --net securerunctl matrix --run {plans.RUN}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_reads_a_launch(node: Host, script: str) -> None:
    arguments = [
        "--peers",
        "10.77.0.1,10.77.0.9",
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.77.0.1:7001",
        script,
    ]
    done = node.run([SECURERUNCTL, "matrix", "--lang", "zh", "--format", "csv", "--", *arguments])
    assert (done.returncode, done.stderr) == (0, ""), done
    (labels, store, *_) = csv.reader(io.StringIO(done.stdout))
    assert labels == NOTES
    assert (store[0], store[2], store[5], store[6]) == ("PyTorch", "10.77.0.9", "10.77.0.1", "7001")


def test_without_a_launch_and_without_a_run_it_says_what_to_write(node: Host) -> None:
    done = node.run([SECURERUNCTL, "matrix"])
    assert done.returncode == 2
    assert "securerunctl matrix -- [OPTIONS] SCRIPT" in done.stderr
