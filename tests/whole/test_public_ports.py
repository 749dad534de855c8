"""Ports of the job that are for others (--public): open to those, while everything else stays closed.

node0 runs the job, node1 is its peer, `known` stands in the networks of a public port, the stranger nowhere.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jobs
import kernel
import plans
import pytest
from attacking import Ground
from checkout import COMMANDS
from conversation import order
from holding import HOLDER, Held, held
from hosts import Host, Network, eventually, finish
from probe import reach

import securerun
from securerun.ctl.plan import render
from securerun.evidence import report_html
from securerun.firewall import script
from securerun.firewall.policy import Policy, PortRange, Purpose
from securerun.job.public import openings
from securerun.protection import words

PLANNED, PUBLIC, SOME, RANDOM = 60000, 7001, 7002, 7004
LISTENED = (PLANNED, PUBLIC, SOME, RANDOM)


@pytest.fixture
def hosts(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "node1", "known", "stranger") as network:
        yield network


def reached(origin: Host, node: Host, ports: tuple[int, ...] = LISTENED) -> dict[int, list[bool]]:
    """For each port, whether `origin` reaches it over IPv4 and over IPv6."""
    targets = [(address, port) for port in ports for address in node.addresses]
    found = reach(origin, targets, seconds=0.5)
    return {port: [found[address, port] for address in node.addresses] for port in ports}


def only(*ports: int) -> dict[int, list[bool]]:
    return {port: [port in ports] * 2 for port in LISTENED}


def listen(lease: Held) -> None:
    for port in LISTENED[1:]:
        lease.say(f"listen {port}")


def public_to(*hosts: Host) -> str:
    """Port PUBLIC for everybody, port SOME for these hosts."""
    return f"{PUBLIC}; {SOME}={','.join(address for host in hosts for address in host.addresses)}"


def guard_of(run_id: str) -> int:
    found: int = json.loads(Path(f"/run/securerun/{run_id}.json").read_text())["guard"]
    return found


@pytest.mark.parametrize(
    ("scope", "backend"),
    [
        ("process", "off"),
        ("process", "iptables"),
        pytest.param("process", "nftables", marks=kernel.needing(kernel.OWNED_TABLES)),
        ("ports", "iptables"),
        ("ports", "nftables"),
        ("ports", "legacy"),
    ],
)
def test_stranger_reaches_the_public_port_and_no_other_and_networks_only_theirs(
    hosts: Network, scope: str, backend: str
) -> None:
    node, peer, known, stranger = hosts
    peers = ["--peers", ",".join(peer.addresses)]
    with held(node, *peers, "--public", public_to(known), "--scope", scope, "--firewall", backend) as lease:
        listen(lease)
        assert eventually(lambda: reached(stranger, node) == only(PUBLIC)), reached(stranger, node)
        assert eventually(lambda: reached(known, node) == only(PUBLIC, SOME)), reached(known, node)
        for origin in (peer, node):
            assert eventually(lambda: reached(origin, node) == only(*LISTENED)), reached(origin, node)  # noqa: B023
        # New peers change nothing of it, nor does a guard that takes over from a dead one.
        lease.say(peer.ipv4)
        assert eventually(lambda: reached(peer, node)[RANDOM] == [True, False]), reached(peer, node)
        os.kill(guard_of(lease.run_id), signal.SIGKILL)
        lease.hear_of("another has taken over")
        assert eventually(lambda: reached(stranger, node) == only(PUBLIC)), reached(stranger, node)
        assert eventually(lambda: reached(known, node) == only(PUBLIC, SOME)), reached(known, node)


def test_public_ports_are_open_through_every_interface_and_peers_through_theirs(hosts: Network) -> None:
    node, peer, known, stranger = hosts
    node.run(["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth2"], check=True)
    words = ("--peers", ",".join(peer.addresses), "--interface", "eth1", "--public", public_to(known))
    with held(node, *words) as lease:
        listen(lease)
        assert eventually(lambda: reached(stranger, node) == only(PUBLIC)), reached(stranger, node)
        assert reached(known, node) == only(PUBLIC, SOME)
        assert reached(peer, node) == only(PUBLIC)


def test_with_a_closed_loopback_a_probe_of_the_same_host_reaches_what_is_public_to_it(hosts: Network) -> None:
    node = hosts["node0"]
    public = f"{PUBLIC}; {SOME}=127.0.0.0/8"
    targets = [(address, port) for port in LISTENED for address in ("127.0.0.1", "::1")]
    with held(node, "--loopback", "job", "--public", public) as lease:
        listen(lease)
        expected = {target: target[1] == PUBLIC or target == ("127.0.0.1", SOME) for target in targets}
        assert eventually(lambda: reach(node, targets, seconds=0.5) == expected)


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES])
def test_what_the_administrator_closed_stays_closed(hosts: Network, backend: str) -> None:
    """By rules of their own, and by a script of `plan --format sh`."""
    node, peer, known, stranger = hosts
    for command in ("iptables", "ip6tables"):
        node.run([command, "-A", "INPUT", "-p", "tcp", "--dport", str(PUBLIC), "-j", "DROP"], check=True)
    closed = Policy("0123456789ab", (PortRange(SOME, SOME, Purpose.ADDED),), ())
    by_hand = ["sh", "-c", script.render(closed, backend, []), "by_hand"]
    assert node.run([*by_hand, "up"]).returncode == 0
    words = ("--peers", ",".join(peer.addresses), "--public", public_to(known, stranger), "--firewall", backend)
    with held(node, *words) as lease:
        listen(lease)
        for origin in (stranger, known):
            assert eventually(lambda origin=origin: reached(origin, node) == only()), reached(origin, node)  # type: ignore[misc]
    assert node.run([*by_hand, "down"]).returncode == 0


def test_no_random_port_of_the_job_becomes_public_by_chance(hosts: Network) -> None:
    """Public ports are reserved; where they cannot be, those that the kernel gives at random are refused."""
    node = hosts["node0"]
    listed = ["cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"]
    with held(node, "--firewall", "off", "--public", "40000; 40001=10.9.0.0/16; 40010-40019") as lease:
        found = node.run(listed).stdout
        assert "40000-40001" in found and "40010-40019" in found
        lease.let_go()
    assert eventually(lambda: "40000" not in node.run(listed).stdout)
    read_only = 'mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; exec "$@"'
    for public, refused in (("40000", "public port 40000 is"), ("7001;40000=10.9.0.0/16", "40000"), ("7001", "")):
        command = ["unshare", "--mount", "sh", "-ec", read_only, "sh", sys.executable, str(HOLDER)]
        lease = Held(node.popen([*command, "--public", public, "--firewall", "off"], stdin=subprocess.PIPE))
        assert (refused in lease.start["refused"]) if refused else ("guarding" in lease.start), lease.start
        if refused:
            assert "name ports outside of these" in lease.start["refused"]
            assert lease.process.wait(timeout=30) == 78
        else:
            lease.let_go()
    with held(node, "--firewall", "off") as lease:
        lease.let_go()


def test_the_scripts_of_an_administrator_know_public_ports(hosts: Network) -> None:
    node, _, known, stranger = hosts
    ports = (PortRange(PLANNED, PLANNED, Purpose.ADDED), PortRange(SOME, SOME, Purpose.PUBLIC))
    policy = Policy("0123456789ab", ports, (), public=openings(public_to(known), "--public"))
    for backend in ("iptables", "nftables"):
        by_hand = ["sh", "-c", script.render(policy, backend, []), "by_hand"]
        listener = node.popen(
            ["python3", "-c", _LISTEN, *map(str, LISTENED)],
        )
        assert listener.stdout is not None and listener.stdout.readline() == "up\n"
        before = node.snapshot()
        assert node.run([*by_hand, "up"]).returncode == 0
        assert reached(stranger, node) == only(PUBLIC, RANDOM)
        assert reached(known, node) == only(PUBLIC, SOME, RANDOM)
        assert node.run([*by_hand, "down"]).returncode == 0
        assert node.snapshot() == before
        listener.kill()
        listener.wait()


_LISTEN = """
import socket, sys, time
held = [socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True) for port in sys.argv[1:]]
print("up", flush=True)
time.sleep(60)
"""


def public_order(ground: Ground, public: list[dict[str, object]], **changes: object) -> dict[str, object]:
    """An order of an ordinary user's for these public ports."""
    document = order(peers=ground.peer.addresses, **changes)  # type: ignore[arg-type]
    policy = document["order"]["policy"]
    policy["public"] = public
    policy["ports"] += [
        {"first": one["first"], "last": one["last"], "purpose": "public to some networks (--public)"}
        for one in public
        if one["networks"]
    ]
    return document


def opening(port: int, *networks: str) -> dict[str, object]:
    return {"first": port, "last": port, "networks": list(networks)}


def test_an_ordinary_user_may_have_public_ports_unless_the_site_says_otherwise(ground: Ground) -> None:
    every, some = [opening(7001)], [opening(7001, "10.9.0.0/16")]
    with_guard = ground.holder(ground.alice, "--public", f"{PUBLIC}; {SOME}=10.9.0.0/16")
    assert "shield" in with_guard.start["guarding"]
    listen(with_guard)
    assert eventually(lambda: reached(ground.stranger, ground.node) == only(PUBLIC))
    with_guard.let_go()
    ground.machine.configure('public = ["10.0.0.0/8"]')
    assert "port 7001 may not be public to every host" in ground.refusal(ground.alice, public_order(ground, every))
    assert "may not be public to 11.0.0.0/8" in ground.refusal(
        ground.alice, public_order(ground, [opening(7001, "11.0.0.0/8")])
    )
    ground.machine.configure("public = false")
    refusal = ground.refusal(ground.alice, public_order(ground, some))
    assert "this host allows no public port (public in /etc/securerun/guard.toml)" in refusal
    # Where the site says who peers may be, public ports are for no others, as long as it does not say so.
    ground.machine.configure('peers = ["10.77.0.0/16", "fd77::/64"]')
    refusal = ground.refusal(ground.alice, public_order(ground, every))
    assert "(peers in /etc/securerun/guard.toml)" in refusal
    assert "may not be public to 10.9.0.0/16" in ground.refusal(ground.alice, public_order(ground, some))


def test_an_ordinary_user_cannot_let_others_into_another_users_bare_job_by_a_public_port(ground: Ground) -> None:
    bobs = ground.holder(ground.bob, "--ports", "7001", "--listen", "7001", "--scope", "ports")
    assert "shield" not in bobs.start["guarding"]
    # Without peers of her own: it is the public port alone that would let them in.
    document = public_order(ground, [opening(7001, f"{ground.stranger.ipv4}/32")], ports=[29500])
    document["order"]["policy"]["peers"] = []  # type: ignore[index]
    assert "so this job's peers could reach it" in ground.refusal(ground.alice, document)
    assert not any(reach(ground.stranger, [(ground.node.ipv4, 7001)], seconds=0.5).values())
    bobs.let_go()


_SERVING = """
import socket, sys, time
from pathlib import Path
place = Path(sys.argv[1])
held = [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) for port in (7001, 7002, 7004)]
(place / "serving").touch()
while not (place / "go on").exists():
    time.sleep(0.05)
"""


def test_a_real_launch_has_its_metrics_port_open_and_says_so_wherever_it_speaks(hosts: Network, tmp_path: Path) -> None:
    node, _, known, stranger = hosts
    serve = tmp_path / "serve.py"
    serve.write_text(_SERVING)
    reports = [tmp_path / "report.json", tmp_path / "report.html"]
    ports, ctl = (jobs.PORT, 7001, 7002, 7004), str(COMMANDS / "securerunctl")
    words = ["--public", public_to(known), "--report", str(reports[0]), "--nnodes", "1", "--nproc-per-node", "1"]
    words += ["--master-addr", node.ipv4, "--master-port", str(jobs.PORT)]
    job = node.popen([jobs.SECURERUN, *words, str(serve), str(tmp_path)])
    assert eventually((tmp_path / "serving").exists, seconds=60), job.stderr and job.stderr.read()
    own = f"{PUBLIC} to every host; {SOME} to {known.ipv4}, {known.ipv6}"
    for origin, open_to in ((stranger, (PUBLIC,)), (known, (PUBLIC, SOME))):
        expected = {port: [port in open_to] * 2 for port in ports}
        assert eventually(lambda: reached(origin, node, ports) == expected), reached(origin, node, ports)  # noqa: B023
    assert own in node.run([ctl, "status"]).stdout
    (run,) = json.loads(node.run([ctl, "status", "--json"]).stdout)["runs"]
    networks = [f"{known.ipv4}/32", f"{known.ipv6}/128"]
    written = [
        {"first": PUBLIC, "last": PUBLIC, "networks": []},
        {"first": SOME, "last": SOME, "networks": networks},
    ]
    assert run["public"] == written
    rows = json.loads(node.run([ctl, "matrix", "--format", "json"]).stdout)["rows"]
    found = {row["destination_port"]: row for row in rows}
    assert found[str(PUBLIC)]["source_ip"] == "0.0.0.0/0, ::/0"
    assert found[str(SOME)]["source_ip"] == f"{known.ipv4}, {known.ipv6}"
    assert f"listening now: *:{SOME}" in found[str(SOME)]["remarks"]
    (tmp_path / "go on").touch()
    done = finish(job, timeout=60)
    assert done.returncode == 0, done
    assert f"public as far as this host's own rules let it be: port {own}" in done.stderr
    assert "every other TCP port of this job closed to all others by shield" in done.stderr
    stranger_at = f"blocked {stranger.ipv4} → "
    # Told once for a port, whichever address it is said of first.
    of_some = [line for line in done.stderr.splitlines() if f" → {SOME} (" in line]
    of_others = [line for line in done.stderr.splitlines() if f"{stranger_at}7004" in line]
    assert f"{stranger_at}{PUBLIC}" not in done.stderr and of_some and of_others
    assert all("--peers" not in line for line in of_some)
    assert any(
        f"if it may connect there, add it, or its network, with --public '{SOME}=...'" in line for line in of_some
    )
    report = json.loads(reports[0].read_text())
    assert report["launch"]["policy"]["public"] == written
    reports[1].write_text(report_html.render(report))
    assert f"public (--public): open to {known.ipv4}, {known.ipv6} as well" in reports[1].read_text()


def test_a_public_port_that_another_run_closes_is_told_of(hosts: Network) -> None:
    """Its plan closes it for the whole host; what is for networks passes by it."""
    node, _, known, stranger = hosts
    beside = ("--listen", "60001", "--public")
    with held(node, "--public", f"{SOME}={known.ipv4}"):
        with held(node, *beside, f"{PUBLIC}; {SOME}") as second:
            (note,) = [note for note in second.start["notes"] if "public" in note]
            assert f"public port {SOME} is in the plan of run" in note
            assert "have this job listen on another port" in note
        with held(node, *beside, f"{SOME}={stranger.ipv4}") as second:
            assert not [note for note in second.start["notes"] if "public" in note]
    with held(node, "--public", f"{SOME}={known.ipv4}", "--firewall", "off"), held(node, *beside, str(SOME)) as second:
        assert not [note for note in second.start["notes"] if "public" in note]


def test_any_command_may_have_public_ports_and_launchers_inside_have_those(hosts: Network, tmp_path: Path) -> None:
    """By the environment; what a launcher inside is given besides has no effect, and it says so."""
    node, _, _, stranger = hosts
    serve = tmp_path / "serve.py"
    serve.write_text(_SERVING)
    ctl = str(COMMANDS / "securerunctl")
    inner = f"{ctl} exec --public 7004 -- {sys.executable} {serve} {tmp_path}"
    job = node.popen([ctl, "exec", "--peers", "localhost", "--", "sh", "-c", inner], env={"SECURERUN_PUBLIC": "7001"})
    assert eventually((tmp_path / "serving").exists, seconds=60)
    assert reached(stranger, node) == only(PUBLIC)
    (tmp_path / "go on").touch()
    done = finish(job, timeout=60)
    assert done.returncode == 0
    assert "--public have no effect here" in done.stderr or "--public has no effect here" in done.stderr


def test_a_plan_shows_public_ports_in_every_form() -> None:
    made = plans.plan()
    public = openings("8080;8081=10.9.0.0/16", "--public")
    ports = (*made.policy.ports, PortRange(8081, 8081, Purpose.PUBLIC))
    made = replace(made, policy=replace(made.policy, ports=ports, public=public))
    shown = words.whole(made, "started directly")
    assert "public       port 8080 to every host; 8081 to 10.9.0.0/16" in shown
    assert "port 8080, through any interface: every host" in shown
    rule = "1 -s 10.9.0.0/16 -p tcp -m multiport --dports 8081"
    for text, chain in (
        (shown, "SECURERUN"),
        (render(made, "iptables"), "SECURERUN"),
        (render(made, "sh"), "SECURERUN-LASTING"),
    ):
        assert f"-I {chain} {rule}" in text
    match = "tcp dport { 8081 } ip saddr { 10.9.0.0/16 } meta priority set"
    assert match in render(made, "nft")


def test_a_launch_with_its_rendezvous_public_is_refused_before_anything_is_started(hosts: Network) -> None:
    node = hosts["node0"]
    launch = ["--nnodes", "2", "--master-addr", "10.77.0.1", "--peers", "10.77.0.2", "train.py"]
    done = node.run([jobs.SECURERUN, "--public", "8080;29500=10.9.0.0/16", *launch])
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert "--public: port 29500 is among 29500, which only the job's nodes may reach (master port" in line


@pytest.mark.parametrize("inner", ["securerun", "exec"])
def test_a_launcher_inside_of_a_run_does_not_meet_at_a_public_port_of_it(hosts: Network, inner: str) -> None:
    """Its command line, or a variable that a script sets, says where it meets; the run around knew nothing of it."""
    node, ctl = hosts["node0"], str(COMMANDS / "securerunctl")
    launch = {
        "securerun": f"{jobs.SECURERUN} --master-addr {node.ipv4} --master-port $((7000+1)) --nnodes 1 /bin/never",
        "exec": f"MASTER_PORT=$((7000+1)) {ctl} exec -- echo it was started",
    }
    outer = [ctl, "exec", "--peers", "localhost", "--public", "7001; 7002=10.9.0.0/16", "--", "sh", "-c"]
    done = node.run([*outer, launch[inner]])
    assert done.returncode == 78, done
    assert "--public of run" in done.stderr and "port 7001 is among 7001, which only the job's nodes" in done.stderr
    assert "it was started" not in done.stdout


def test_python_callers_name_public_ports_as_a_text_or_a_list() -> None:
    made = [securerun.policy(["10.0.0.1"], public=public) for public in ("8080=10.9.0.0/16;9100", _AS_A_LIST)]
    assert made[0].public == made[1].public == openings("8080=10.9.0.0/16;9100", "")
    assert PortRange(8080, 8080, Purpose.PUBLIC) in made[0].ports


_AS_A_LIST: list[int | str] = ["8080=10.9.0.0/16", 9100]
