"""The ground itself: what the other tests stand on must be able to see an open port, and a closed one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import (
    NAMESPACES,
    Host,
    Network,
    TookTooLong,
    cgroup2_mount,
    eventually,
    finish,
    finish_all,
    is_alive,
    machine_snapshot,
)
from probe import Probe, reach, scan, targets_of

# Listens on every address, as torch's stores do, and says so; ends with its input.
LISTENER = """
import socket, sys
for port in map(int, sys.argv[1:]):
    sock = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    globals()[f"keep{port}"] = sock
print("listening", flush=True)
sys.stdin.read()
"""


def listen(host: Host, *ports: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-I", "-S", "-c", LISTENER, *map(str, ports)]
    listener = host.popen(words, stdin=subprocess.PIPE)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "listening\n"
    return listener


def drop(host: Host, port: int) -> None:
    for tool in ("iptables", "ip6tables"):
        host.run([tool, "-A", "INPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"], check=True)


def on(host: Host, port: int) -> set[tuple[str, int]]:
    return {(address, port) for address in host.addresses}


def machine_links() -> tuple[list[str], str]:
    """Interfaces and routes of the machine's own network namespace."""
    return sorted(name for _, name in socket.if_nameindex()), Path("/proc/self/net/route").read_text()


def test_two_hosts_reach_each_others_listeners_over_both_families(network: Network) -> None:
    node0, node1, _ = network
    listen(node0, 7001)
    listen(node1, 7002)
    assert reach(node1, on(node0, 7001)) == dict.fromkeys(on(node0, 7001), True)
    assert reach(node0, on(node1, 7002)) == dict.fromkeys(on(node1, 7002), True)


def test_a_port_that_nobody_listens_on_is_not_reached(network: Network) -> None:
    node0, node1, _ = network
    assert reach(node1, on(node0, 7001)) == dict.fromkeys(on(node0, 7001), False)


def test_a_host_tells_its_own_listeners_only(network: Network) -> None:
    node0, node1, _ = network
    listen(node0, 7001)
    assert node0.listening() == {("*", 7001)}
    assert node0.targets() == on(node0, 7001)
    assert node1.listening() == set()


def test_a_host_tells_what_each_listener_is_bound_to(network: Network) -> None:
    node0 = network["node0"]
    ipv4 = [("0.0.0.0", 7001), ("10.77.0.1", 7002), ("127.0.0.1", 7003)]  # noqa: S104 - in a host of ours
    bound = [*ipv4, ("::", 7004), ("fd77::1", 7005), ("::1", 7006)]
    for address, port in bound:
        family = "AF_INET6" if ":" in address else "AF_INET"
        script = f"import socket, sys; s = socket.create_server({(address, port)}, family=socket.{family})"
        listener = node0.popen(
            [sys.executable, "-I", "-S", "-c", f"{script}; print(flush=True); sys.stdin.read()"], stdin=subprocess.PIPE
        )
        assert listener.stdout is not None and listener.stdout.readline() == "\n"
    assert node0.listening() == set(bound)
    assert node0.targets() == {("10.77.0.1", 7001), ("10.77.0.1", 7002), ("fd77::1", 7004), ("fd77::1", 7005)}


def test_the_probe_reaches_an_open_port_and_not_a_dropped_one(network: Network) -> None:
    node0, _, stranger = network
    drop(node0, 7002)
    with Probe(stranger, node0, seconds=30) as probe:
        listen(node0, 7001, 7002)
        assert eventually(lambda: probe.tried == on(node0, 7001) | on(node0, 7002))
    assert probe.seen == probe.tried
    assert probe.reached == on(node0, 7001)
    for endpoint in on(node0, 7002):
        assert set(probe.results[endpoint]) == {"timeout"}


def test_the_probe_follows_listeners_that_come_and_go(network: Network) -> None:
    node0, _, stranger = network
    with Probe(stranger, node0, seconds=30, ignore=[7009]) as probe:
        listen(node0, 7009)
        for port in (7001, 7002):
            listener = listen(node0, port)
            assert eventually(lambda port=port: on(node0, port) <= probe.reached)  # type: ignore[misc]
            finish(listener)
    assert probe.reached == on(node0, 7001) | on(node0, 7002)


def test_the_probe_ends_with_its_block_and_leaves_no_process(network: Network) -> None:
    node0, _, stranger = network
    with Probe(stranger, node0, seconds=30):
        assert eventually(lambda: bool(node0.processes()))  # its watcher comes by and by
    assert node0.processes() == stranger.processes() == {}


def test_a_scan_finds_every_open_port(network: Network) -> None:
    node0, _, stranger = network
    drop(node0, 7002)
    listen(node0, 1, 7001, 7002, 65535)
    assert scan(stranger, node0.ipv4) == {1, 7001, 65535}


@pytest.mark.usefixtures("root_and_tools")
def test_hosts_leave_nothing_behind_and_never_touch_the_machines_own_network() -> None:
    links = machine_links()
    with Network("one", "other") as network:
        namespaces = network.namespaces
        assert all((NAMESPACES / namespace).exists() for namespace in namespaces)
        assert machine_links() == links
        orphan = "setsid sleep 600 >/dev/null 2>&1 </dev/null & echo $!"
        pid = int(network["one"].run(["sh", "-c", orphan], check=True).stdout)
        listen(network["other"], 7001)
        assert is_alive(pid)
    assert not is_alive(pid)
    assert not any((NAMESPACES / namespace).exists() for namespace in namespaces)
    assert machine_links() == links


@pytest.mark.usefixtures("root_and_tools")
def test_hosts_are_removed_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), Network("one") as network:
        namespaces = network.namespaces
        listen(network["one"], 7001)
        raise ZeroDivisionError
    assert not any((NAMESPACES / namespace).exists() for namespace in namespaces)


@pytest.mark.usefixtures("root_and_tools")
def test_hosts_are_removed_when_the_interpreter_ends_inside_the_block() -> None:
    script = "from hosts import Network; n = Network('one').__enter__(); print(*n.namespaces)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    namespaces = done.stdout.split()
    assert len(namespaces) == 2
    assert not any((NAMESPACES / namespace).exists() for namespace in namespaces)


def test_a_snapshot_shows_a_rule_and_no_counters(network: Network) -> None:
    node0, node1, _ = network
    before = node0.snapshot()
    drop(node0, 7002)
    with_rule = node0.snapshot()
    assert "--dport 7002 -j DROP" in with_rule["iptables-save"]
    assert "--dport 7002 -j DROP" in with_rule["ip6tables-save"]
    reach(node1, on(node0, 7002), seconds=0.1)
    assert node0.snapshot() == with_rule != before
    assert node1.snapshot() == before


def test_a_snapshot_of_the_machine_shows_a_control_group_of_securerun(network: Network) -> None:
    mount = cgroup2_mount()
    if mount is None:
        pytest.skip("no cgroup2 is mounted")
    group = mount / f"securerun-{network.namespaces[0]}"  # a name that nobody else has
    group.mkdir()
    try:
        assert group.name in (machine_snapshot().cgroups or ())
    finally:
        group.rmdir()
    assert group.name not in (machine_snapshot().cgroups or ())


def test_a_command_that_takes_too_long_is_ended_and_shows_what_it_printed(network: Network) -> None:
    node0 = network["node0"]
    with pytest.raises(TookTooLong, match="so far") as failure:
        node0.run(["sh", "-c", "echo so far; sleep 600"], timeout=0.5)
    assert str(failure.value.stdout) == "so far\n"
    assert node0.processes() == {}


def test_where_one_node_takes_too_long_all_show_what_they_said(network: Network) -> None:
    node0, node1, _ = network
    nodes = [host.popen(["sh", "-c", script]) for host, script in ((node0, "sleep 600"), (node1, "echo no key >&2"))]
    with pytest.raises(TookTooLong, match="no key"):
        finish_all(nodes, timeout=0.5)
    assert node0.processes() == {}


def test_nodes_that_print_much_are_read_at_once(network: Network) -> None:
    node0, node1, _ = network
    much = "yes securerun | head -n 100000; cat >/dev/null"
    nodes = [host.popen(["sh", "-c", much]) for host in (node0, node1)]
    assert [len(done.stdout) for done in finish_all(nodes)] == [1000000, 1000000]


def test_a_command_sees_the_cgroups_and_only_the_variables_it_is_given(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECURERUN_PEERS", "192.0.2.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    shown = network["node0"].run(["env"], env={"MASTER_PORT": "2", "OMP_NUM_THREADS": None}).stdout.splitlines()
    assert "MASTER_PORT=2" in shown
    assert not any(line.startswith(("SECURERUN_", "OMP_NUM_THREADS")) for line in shown)
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "cgroup" in line]
    assert network["node0"].run(["grep", "cgroup", "/proc/self/mountinfo"]).stdout.splitlines() == mounts


def test_a_command_can_be_run_as_another_user(network: Network) -> None:
    assert network["node0"].run(["id", "-un"], user="nobody").stdout == "nobody\n"


@pytest.mark.parametrize(
    ("bound", "tried"),
    [
        ("0.0.0.0", {"10.77.0.1"}),  # noqa: S104 - read from a table, not bound
        ("*", {"10.77.0.1", "fd77::1"}),
        ("::", {"fd77::1"}),
        ("10.77.0.1", {"10.77.0.1"}),
        ("::ffff:10.77.0.1", {"10.77.0.1"}),
        ("fd77::1", {"fd77::1"}),
        ("127.0.0.1", set()),
        ("::1", set()),
    ],
)
def test_a_listener_is_tried_where_another_host_could_reach_it(bound: str, tried: set[str]) -> None:
    assert targets_of([(bound, 7001)], ("10.77.0.1", "fd77::1")) == {(address, 7001) for address in tried}
