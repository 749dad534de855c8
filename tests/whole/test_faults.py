"""What others do to a host while a job runs on it, and what a host may lack: nothing opens, nothing stays."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import kernel
import pytest
from holding import HOLDER, Held, held
from hosts import Host, Network, cgroup2_mount, eventually, finish_all, machine_snapshot
from patience import FACTOR
from probe import Probe, reach
from process_table import fields_of, name_of, status_of

# On a slow machine as many as come to the lock of the host in the half minute that a guard waits for it.
RUNS = int(50 / FACTOR)


def endpoint(node: Host, port: int = 60000) -> tuple[str, int]:
    return (node.ipv4, port)


def test_ports_scope_closes_each_port_soon_after_it_appears(network: Network) -> None:
    node, peer, stranger = network
    with held(node, "--scope", "ports", "--listen", "7001", "--peers", peer.ipv4) as holder:
        assert holder.start["guarding"] == ["iptables"]
        targets = [endpoint(node, 7001), (node.ipv6, 7001)]
        assert eventually(lambda: not any(reach(stranger, targets).values()), seconds=1)
        assert reach(peer, [endpoint(node, 7001)]) == {endpoint(node, 7001): True}
        assert reach(node, targets) == dict.fromkeys(targets, True)


def test_ports_scope_without_a_cgroup_knows_the_job_by_its_descent(network: Network) -> None:
    """In a container with a read-only cgroup file system."""
    node, _, stranger = network
    before, machine = node.snapshot(), machine_snapshot()
    # The guard ends with the container's first process, so that one gives it time to clean up.
    script = (
        'mount -t tmpfs -o ro none /sys/fs/cgroup; "$@"; while ls /run/securerun; do sleep 0.1; done > /dev/null 2>&1'
    )
    wrapped = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script, "sh"]
    holder = Held(
        node.popen(
            [*wrapped, "setpriv", "--bounding-set=-sys_admin,-bpf", sys.executable, HOLDER, "--listen", "7001"],
            stdin=subprocess.PIPE,
        )
    )
    assert holder.start["guarding"] == ["iptables"]
    assert "no shield" in " ".join(holder.start["notes"])
    assert eventually(lambda: not reach(stranger, [endpoint(node, 7001)])[endpoint(node, 7001)], seconds=2)
    holder.let_go()
    assert eventually(lambda: node.snapshot() == before and machine_snapshot() == machine, seconds=2)


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES, "legacy"])
def test_listener_that_the_shield_does_not_see_is_closed_by_the_chains_and_named(
    network: Network, backend: str
) -> None:
    node, peer, stranger = network
    if backend == "legacy":
        node.snapshot(legacy=True)
    options = ("--listen-elsewhere", "--listen", "7001", "--peers", peer.ipv4, "--firewall", backend)
    with held(node, *options) as holder:
        assert holder.start["guarding"] == ["shield", backend]
        holder.hear_of("port 7001 is on a socket that the shield does not cover")
        targets = [endpoint(node, 7001), (node.ipv6, 7001)]
        assert reach(stranger, targets) == dict.fromkeys(targets, False)
        assert reach(peer, [endpoint(node, 7001)]) == {endpoint(node, 7001): True}


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES, "legacy", "off"])
def test_a_peer_that_comes_is_let_in_and_one_that_goes_is_not(network: Network, backend: str) -> None:
    """A pod that is started anew has another address; the job need not be."""
    node, peer, stranger = network
    if backend == "legacy":
        node.snapshot(legacy=True)
    with held(node, "--peers", peer.ipv4, "--firewall", backend) as holder:
        targets = [endpoint(node), (node.ipv6, 60000)]
        assert not any(reach(stranger, targets).values())
        holder.say(f"{stranger.ipv4},{stranger.ipv6}")
        assert eventually(lambda: all(reach(stranger, targets).values()), seconds=2)
        assert reach(peer, [endpoint(node)]) == {endpoint(node): False}


def test_shield_alone_says_when_a_socket_is_not_behind_it(network: Network) -> None:
    node, _, _ = network
    with held(node, "--listen-elsewhere", "--listen", "7001", "--firewall", "off") as holder:
        holder.hear_of("port 7001 is open to every host")


_FLUSHES = {
    "iptables -F": "iptables -F; ip6tables -F",
    "iptables -F and -X": "iptables -F; iptables -X; ip6tables -F; ip6tables -X",
    "nft flush ruleset": "nft flush ruleset",
    "another firewall's reload": "printf 'flush ruleset\\ntable inet other { chain in "
    "{ type filter hook input priority 0; tcp dport 9 drop; }; }\\n' | nft -f -",
    "a foreign rule above ours": "iptables -I INPUT -p tcp -j ACCEPT; ip6tables -I INPUT -p tcp -j ACCEPT",
}


@pytest.mark.parametrize("what", _FLUSHES)
@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES])
def test_shield_holds_whatever_happens_to_the_hosts_firewall(network: Network, what: str, backend: str) -> None:
    node, peer, stranger = network
    holder = Held(
        node.popen([sys.executable, HOLDER, "--peers", peer.ipv4, "--firewall", backend], stdin=subprocess.PIPE)
    )
    with Probe(stranger, node) as probe:
        # The version that no peer has is answered at once, the other hears nothing.
        assert eventually(lambda: {address for address, _ in probe.tried} == set(node.addresses))
        node.run(["sh", "-c", _FLUSHES[what]], check=True)
        if backend == "iptables" and "above" not in what:
            holder.hear_of("flushed the port chains away; they are back")
            assert "SECURERUN" in node.snapshot()["iptables-save"]
            assert "SECURERUN" in node.snapshot()["ip6tables-save"]
        assert reach(peer, [endpoint(node)]) == {endpoint(node): True}
        time.sleep(0.3)  # a few more attempts of the stranger
        holder.let_go()
    assert probe.reached == set()
    assert {address for address, _ in probe.tried} == set(node.addresses)
    eventually(lambda: "SECURERUN" not in node.snapshot()["iptables-save"], seconds=2)
    after = node.snapshot()
    assert "SECURERUN" not in after["iptables-save"] + after["ip6tables-save"]
    assert "securerun" not in after["nft"]


def test_fifty_runs_with_one_range_are_each_reachable_by_their_own_peers_only(network: Network) -> None:
    node, peer, _ = network
    before, machine = node.snapshot(), machine_snapshot()
    addresses = [f"10.77.0.{100 + number}" for number in range(RUNS)]
    for address in addresses:
        peer.run(["ip", "address", "add", f"{address}/24", "dev", "eth0"], check=True)
    started = [
        node.popen(
            [sys.executable, HOLDER, "--peers", address, "--ports", "60000-60049", "--listen", str(60000 + number)],
            stdin=subprocess.PIPE,
        )
        for number, address in enumerate(addresses)
    ]
    holders = [Held(process) for process in started]
    assert [holder.start for holder in holders if holder.start.get("guarding") != ["shield", "iptables"]] == []
    found = json.loads(peer.run([sys.executable, "-c", _CONNECT_ALL, node.ipv4, *addresses], check=True).stdout)
    assert found == [[number, number] for number in range(RUNS)]
    for holder in holders:
        assert holder.process.stdin is not None
        holder.process.stdin.close()
    for holder in holders:
        assert holder.process.wait(timeout=60) == 0
    eventually(lambda: (node.snapshot(), machine_snapshot()) == (before, machine), seconds=30)
    assert (node.snapshot(), machine_snapshot()) == (before, machine)


# Prints each [number of the source address, number of the port] that connects: of each peer to its own run's port,
# which must succeed however busy the machine is, and to every fifth of the others'.
_CONNECT_ALL = """
import asyncio, json, sys
node, *addresses = sys.argv[1:]
async def connect(source, port, seconds):
    try:
        opening = asyncio.open_connection(node, 60000 + port, local_addr=(addresses[source], 0))
        _, writer = await asyncio.wait_for(opening, seconds)
        writer.close()
        return [source, port]
    except (OSError, asyncio.TimeoutError):
        return None
async def main():
    numbers = range(len(addresses))
    own = [(number, number, 20) for number in numbers]
    others = [(source, port, 3) for source in numbers for port in numbers if (source - port) % 5 == 1]
    found = await asyncio.gather(*(connect(*attempt) for attempt in own))
    found += await asyncio.gather(*(connect(*attempt) for attempt in others))
    print(json.dumps(sorted(pair for pair in found if pair)))
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("mount -t tmpfs -o size=4k none /run; yes > /run/full 2> /dev/null; mkdir /run/securerun", "make room there"),
        ("mount -t tmpfs -o ro none /run", "mount something writable at /run"),
        ("mount -t tmpfs none /run; mkdir -m 777 /run/securerun", "cannot be trusted"),
        ("mount -t tmpfs none /run; ln -s /tmp /run/securerun", "cannot use /run/securerun"),
    ],
    ids=["full disk", "read-only /run", "records that anyone may write", "a link in the place of the records"],
)
def test_run_that_cannot_be_recorded_is_refused_whole(network: Network, prepare: str, words: str) -> None:
    node, _, _ = network
    before, machine = node.snapshot(), machine_snapshot()
    done = node.run(
        ["unshare", "--mount", "sh", "-c", f'{prepare}; exec "$@"', "sh", sys.executable, HOLDER], text_input=""
    )
    assert done.returncode == 77, done
    assert words in json.loads(done.stdout)["refused"]
    assert (node.snapshot(), machine_snapshot()) == (before, machine)


@kernel.needing(kernel.OWNED_TABLES)
def test_two_backends_on_one_host_are_refused_since_they_collide(network: Network) -> None:
    node, _, _ = network
    with held(node, "--firewall", "nftables"):
        done = node.run([sys.executable, HOLDER, "--firewall", "iptables"], text_input="")
        assert done.returncode == 77
        assert "other runs of this host use nftables" in json.loads(done.stdout)["refused"]
        second = Held(node.popen([sys.executable, HOLDER, "--listen", "7000"], stdin=subprocess.PIPE))
        assert second.start["guarding"] == ["shield", "nftables"]
        second.let_go()


def test_loopback_job_keeps_other_processes_of_the_host_out(network: Network) -> None:
    node, peer, _ = network
    with held(node, "--loopback", "job", "--peers", peer.ipv4):
        targets = [("127.0.0.1", 60000), ("::1", 60000), endpoint(node)]
        assert reach(node, targets) == dict.fromkeys(targets, False)
        assert reach(peer, [endpoint(node)]) == {endpoint(node): True}


def test_guard_is_small_and_in_a_session_of_its_own(network: Network) -> None:
    node, _, _ = network
    with held(node) as holder:
        guard = next(pid for pid in node.processes() if name_of(pid) == "securerun-guard")
        resident = int(status_of(guard)["VmRSS"].split()[0])
        assert resident <= 20_000, resident
        assert int(fields_of(guard)[3]) == guard  # proc(5): session
        assert f"securerun-{holder.run_id}" not in Path(f"/proc/{guard}/cgroup").read_text()
        maps = Path(f"/proc/{guard}/maps").read_text()
        assert "torch" not in maps


@kernel.needing(kernel.FREEZING_CGROUPS)
def test_guard_sleeps_while_nothing_happens_and_after_something_did(network: Network) -> None:
    """Something that is never read wakes poll(2) for ever; how often a process reads is what proc(5) counts."""
    node, _, _ = network
    with held(node) as holder:
        guard = next(pid for pid in node.processes() if name_of(pid) == "securerun-guard")
        mount = cgroup2_mount()
        assert mount is not None
        (cgroup,) = mount.rglob(f"securerun-{holder.run_id}")
        for frozen in ("1", "0"):
            (cgroup / "cgroup.freeze").write_text(frozen)
        time.sleep(0.5)
        before = _reads_of(guard)
        time.sleep(1)
        assert _reads_of(guard) - before < 200


def _reads_of(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/io").read_text().splitlines() if line.startswith("syscr:"))
    return int(line.split()[1])


@kernel.needing(kernel.OWNED_TABLES)
def test_guard_of_a_killed_launcher_ends_what_is_left_and_cleans(network: Network) -> None:
    node, _, stranger = network
    with held(node, "--firewall", "nftables") as holder, Probe(stranger, node) as probe:
        assert eventually(lambda: bool(probe.tried))
        holder.process.kill()
        finish_all([holder.process])
        assert eventually(lambda: not any("holder" in command for command in node.processes().values()))
    assert probe.reached == set()
