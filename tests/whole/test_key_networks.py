"""Jobs by key where addresses tell little: second networks, temporary ones, Services, translation and what takes tags
away."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

import jobs
import pytest
import second_network
from hosts import Argument, Host, Network, eventually, finish_all, terminate_all
from key_homes import make_homes
from probe import Probe
from remains import nothing_left_behind
from routed import ROUTER_THERE, put_behind, renumber, strip_tags, translate

TRAIN = (str(jobs.TRAIN), "--groups", "2", "--epochs", "10")


@pytest.fixture
def four(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "node1", "router", "stranger") as network:
        yield network


@pytest.fixture
def behind_a_router(four: Network) -> Network:
    node0, node1, router, stranger = four
    put_behind(router, node1, node0, stranger)
    return four


def launch(kind: str, rank: int, address: str, *options: str, local: str = "") -> list[Argument]:
    """A node's command, of two that meet at an address."""
    meeting = ["--node-rank", str(rank), "--master-addr", address, "--master-port", str(jobs.PORT)]
    if kind == "c10d":
        at = f"[{address}]" if ":" in address else address
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{at}:{jobs.PORT}", "--rdzv-id", "test"]
        meeting += ["--rdzv-conf", f"is_host={int(rank == 0)}", *(("--local-addr", local) if local else ())]
    return [jobs.SECURERUN, *options, "--nnodes", "2", *meeting, *TRAIN]


def train(
    nodes: Sequence[Host], homes: Sequence[Path], commands: Sequence[Sequence[Argument]], **env: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run a job to its end, which is a good one."""
    started = [
        node.popen(command, env={"HOME": str(home), **env}) for node, home, command in zip(nodes, homes, commands)
    ]
    done = finish_all(started, timeout=120)
    assert [each.returncode for each in done] == [0, 0], done
    assert jobs.last_loss(done[0].stdout) < 1
    return done


@contextlib.contextmanager
def in_vain(
    nodes: Sequence[Host], homes: Sequence[Path], commands: Sequence[Sequence[Argument]], place: Path
) -> Iterator[list[Path]]:
    """A job whose nodes wait for each other in vain; yields the files where stands what they say, and ends it."""
    files = [place / f"said{rank}" for rank in (0, 1)]
    started = []
    for node, home, command, path in zip(nodes, homes, commands, files):
        with path.open("w") as file:
            started.append(node.popen(command, env={"HOME": str(home)}, stderr=file))
    try:
        yield files
    finally:
        terminate_all(started)


def says(path: Path, *words: str, seconds: float = 20) -> bool:
    """Whether one line of a file has all of these words, within seconds."""
    return eventually(
        lambda: any(all(word in line for word in words) for line in path.read_text().splitlines()), seconds=seconds
    )


@contextlib.contextmanager
def nobody_else(stranger: Host, node0: Host, node1: Host) -> Iterator[None]:
    """Nobody but the job's own processes reaches a port of node0 meanwhile: no stranger, nor another of node1's."""
    with Probe(stranger, node0) as outside, Probe(node1, node0) as beside_the_peer:
        yield
    assert outside.tried and outside.reached == beside_the_peer.reached == set()


def test_names_are_on_one_network_and_gloo_on_another_and_nothing_is_named(network: Network, tmp_path: Path) -> None:
    node0, node1, stranger = network
    second_network.connect(network)
    names = {node.name: [node.ipv4] for node in (node0, node1)}
    commands = [
        second_network.with_hosts_file(tmp_path / f"hosts{rank}", names, launch("static", rank, "node0"))
        for rank in (0, 1)
    ]
    homes = make_homes(node0, tmp_path)
    on_ib0 = [second_network.there(host) for host in network]
    with nobody_else(stranger, node0, node1), nobody_else(on_ib0[2], on_ib0[0], on_ib0[1]):
        done = train((node0, node1), homes, commands, GLOO_SOCKET_IFNAME=second_network.NAME)
    assert all("2 of 2 nodes guarded" in each.stderr for each in done), done


def test_a_node_whose_address_changes_from_one_connection_to_the_next_is_a_node(
    network: Network, tmp_path: Path
) -> None:
    """Temporary addresses of IPv6 alone (RFC 8981): every three seconds the kernel takes another."""
    node0, node1, stranger = network
    homes = make_homes(node0, tmp_path)
    for node in network:
        node.run(["ip", "addr", "del", f"{node.ipv4}/24", "dev", "eth0"], check=True)
    settings = ("use_tempaddr=2", "temp_prefered_lft=5", "temp_valid_lft=600", "max_desync_factor=0", "dad_transmits=0")
    for setting in settings:
        node1.run(["sysctl", "-qw", f"net.ipv6.conf.eth0.{setting}"], check=True)
    node1.run(["ip", "addr", "change", f"{node1.ipv6}/64", "dev", "eth0", "mngtmpaddr", "nodad"], check=True)
    commands = [launch("c10d", rank, node0.ipv6, local=node.ipv6) for rank, node in enumerate((node0, node1))]
    with nobody_else(stranger, node0, node1):
        done = train((node0, node1), homes, commands)
    temporary = node1.run(["ip", "-6", "addr", "show", "dev", "eth0", "temporary"], check=True).stdout
    assert temporary.count("inet6") >= 2, temporary
    assert all("2 of 2 nodes guarded" in each.stderr for each in done), done


@pytest.mark.parametrize(("kind", "service"), [("static", "10.96.0.1"), ("c10d", "203.0.113.7")])
def test_nodes_that_meet_at_a_service_s_address_know_each_other(
    network: Network, tmp_path: Path, kind: str, service: str
) -> None:
    """As kube-proxy has it: each host translates the address where a connection begins, node 0's own as well.

    And the source port with it where a connection of the host's has that one already, as all have here.
    """
    node0, node1, stranger = network
    homes = make_homes(node0, tmp_path)
    for node in (node0, node1):
        node.run(["ip", "route", "add", service, "dev", "eth0"], check=True)
        translate(node, "OUTPUT", f"-p tcp -d {service} --dport {jobs.PORT} -j DNAT --to-destination {node0.ipv4}")
    translate(node1, "POSTROUTING", f"-p tcp --dport {jobs.PORT} -j SNAT --to-source {node1.ipv4}:50000-50999")
    commands = [
        launch(kind, rank, service, "--loopback", "job", local=node.ipv4) for rank, node in enumerate((node0, node1))
    ]
    with nobody_else(stranger, node0, node1):
        done = train((node0, node1), homes, commands)
    assert all("2 of 2 nodes guarded" in each.stderr for each in done), done


def test_an_address_that_a_router_translates_is_no_hindrance(behind_a_router: Network, tmp_path: Path) -> None:
    node0, node1, router, stranger = behind_a_router
    homes = make_homes(node0, tmp_path)
    translate(
        router, "PREROUTING", f"-p tcp -d {ROUTER_THERE} --dport {jobs.PORT} -j DNAT --to-destination {node0.ipv4}"
    )
    with nothing_left_behind(node0, node1), nobody_else(stranger, node0, node1):
        done = train((node0, node1), homes, [launch("static", 0, node0.ipv4), launch("static", 1, ROUTER_THERE)])
    assert all("2 of 2 nodes guarded" in each.stderr for each in done), done


def test_public_networks_that_are_named_are_where_tags_go(four: Network, tmp_path: Path) -> None:
    """Of two such networks no node knows the other's; where both are named a tag can be insisted on as anywhere."""
    node0, node1, router, stranger = four
    renumber("203.0.113", node0, router, stranger)
    put_behind(router, node1, node0, network="198.51.100")
    nodes, homes = (node0, node1), make_homes(node0, tmp_path)
    with in_vain(nodes, homes, [launch("static", rank, node0.ipv4) for rank in (0, 1)], tmp_path) as said:
        fix = ("a public address of a network of its own", "--peers")
        assert says(said[1], f"{node0.ipv4}:{jobs.PORT} answered without", *fix), said[1].read_text()
    options = ("--peers", "203.0.113.0/24,198.51.100.0/24", "--key", "require")
    with nobody_else(stranger, node0, node1):
        done = train(nodes, homes, [launch("static", rank, node0.ipv4, *options) for rank in (0, 1)])
    assert all("2 of 2 nodes guarded" in each.stderr for each in done), done


def _hide_source(router: Host) -> None:
    translate(router, "POSTROUTING", "-s 10.88.0.0/24 -d 10.77.0.0/24 -j MASQUERADE")


@pytest.mark.parametrize(
    ("spoil", "seen_as"), [(_hide_source, "10.77.0.3"), (strip_tags, "10.88.0.2")], ids=["source", "option"]
)
def test_what_spoils_tags_on_the_way_is_said_with_its_fix_and_the_fix_fixes_it(
    behind_a_router: Network, tmp_path: Path, spoil: Callable[[Host], None], seen_as: str
) -> None:
    node0, node1, router, stranger = behind_a_router
    nodes, homes = (node0, node1), make_homes(node0, tmp_path)
    spoil(router)
    with in_vain(nodes, homes, [launch("static", rank, node0.ipv4) for rank in (0, 1)], tmp_path) as said:
        fix = ("addresses are translated", "TCP option 254", "--peers")
        assert says(said[0], f"blocked {seen_as} → {jobs.PORT}", *fix), said[0].read_text()
        fix = (f"translates the address {node1.ipv4}", "TCP option 254", "--peers")
        assert says(said[1], f"no answer from {node0.ipv4}:{jobs.PORT}", *fix), said[1].read_text()
    peers = ("--peers", f"{node0.ipv4},{node1.ipv4},{seen_as}")
    with Probe(stranger, node0) as outside:
        done = train(nodes, homes, [launch("static", rank, node0.ipv4, *peers) for rank in (0, 1)])
    assert outside.reached == set() and outside.tried
    assert f"{seen_as} came or answered without the job's key" in done[0].stderr, done[0].stderr
    assert "2 of 2 nodes guarded" in done[1].stderr or spoil is strip_tags


def test_answers_that_lose_their_tags_on_the_way_are_said_with_the_fix(
    behind_a_router: Network, tmp_path: Path
) -> None:
    node0, node1, router, _ = behind_a_router
    nodes, homes = (node0, node1), make_homes(node0, tmp_path)
    strip_tags(router, node0.ipv4)
    with in_vain(nodes, homes, [launch("static", rank, node0.ipv4) for rank in (0, 1)], tmp_path) as said:
        fix = ("TCP option 254", "--peers")
        assert says(said[1], f"{node0.ipv4}:{jobs.PORT} answered without", *fix), said[1].read_text()
