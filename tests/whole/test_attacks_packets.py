"""What a stranger's packets, and a user's messages, cannot keep the guard from: bounded in memory, words and time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import kernel
import pytest
from attacking import Ground, program
from checkout import COMMANDS, GROUND
from conversation import WAYS, Conversation, guards, log_of, order
from hosts import RECORDS, Host, Network, eventually, finish, is_alive
from patience import patient
from probe import listening, reach
from users import User

EXEC = (str(COMMANDS / "securerunctl"), "exec")
PLANNED = range(60000, 60016)

# Sends opening packets from sources that it invents, so many a second, until its end of input; says how many.
_FLOOD = """
import random, select, socket, sys, time
sys.path.insert(0, sys.argv[1])
from ipaddress import ip_address
from packets import SYN, Flow, ipv4, ipv6, tcp
target, rate, ports = ip_address(sys.argv[2]), int(sys.argv[3]), [int(port) for port in sys.argv[4:]]
family, render = (socket.AF_INET, ipv4) if target.version == 4 else (socket.AF_INET6, ipv6)
sending = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
numbers = random.Random(7)
bits = 16 if target.version == 4 else 64
first = int(target) >> bits << bits
sent, began = 0, time.monotonic()
while not select.select([sys.stdin], [], [], 0.002)[0]:
    while sent < (time.monotonic() - began) * rate:
        source = ip_address(first + 256 + numbers.randrange(2 ** bits - 512))
        flow = Flow(source, target, numbers.randrange(1024, 65536), numbers.choice(ports))
        sending.sendto(render(flow, tcp(flow, SYN)), (str(target), 0))
        sent += 1
print(sent)
"""
# Dials one port of an address after the other, again and again, and prints when one was answered: [port, seconds].
_KNOCK = """
import errno, select, socket, sys, time
address, ports = sys.argv[1], [int(port) for port in sys.argv[2:]]
print("knocking", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    dialling = {}
    for port in ports:
        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        one.setblocking(False)
        one.connect_ex((address, port))
        dialling[one] = port
    time.sleep(0.02)
    for one, port in dialling.items():
        with one:
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and select.select([], [one], [], 0)[1]:
                print([port, time.monotonic()], flush=True)
"""
# Listens on a port for each line of input that names one, and says since when; its listeners go with its input's end.
_JOB = """
import socket, sys, time
print("ready", flush=True)
held = []
for line in sys.stdin:
    address, port = line.split()
    if ":" in address:
        held.append(socket.create_server((address, int(port)), family=socket.AF_INET6, dualstack_ipv6=True))
    else:
        held.append(socket.create_server((address, int(port))))
    print(time.monotonic(), flush=True)
"""


@contextlib.contextmanager
def flooded(stranger: Host, target: str, *, rate: int = 1500, ports: range = PLANNED) -> Iterator[None]:
    """Packets of invented sources, so many a second; at least half of that were sent."""
    words = [sys.executable, "-c", _FLOOD, str(GROUND), target, str(rate), *map(str, ports)]
    flood, began = stranger.popen(words, stdin=subprocess.PIPE), time.monotonic()
    yield
    seconds = time.monotonic() - began
    done = finish(flood, text_input="")
    assert int(done.stdout) > seconds * rate / 3, done


@contextlib.contextmanager
def knocked(stranger: Host, target: str, *ports: int) -> Iterator[list[tuple[int, float]]]:
    """Every attempt of a stranger's that was answered in the block: the port, and when; filled in at its end."""
    words = [sys.executable, "-c", _KNOCK, target, *map(str, ports)]
    knocker = stranger.popen(words, stdin=subprocess.PIPE)
    assert knocker.stdout is not None and knocker.stdout.readline() == "knocking\n"
    answered: list[tuple[int, float]] = []
    yield answered
    for line in finish(knocker, text_input="").stdout.splitlines():
        port, at = json.loads(line)
        answered.append((port, at))


@contextlib.contextmanager
def job(node: Host, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A job that listens where it is told to."""
    command = [*EXEC, "--ports", f"{PLANNED[0]}-{PLANNED[-1]}", "--peers", "10.99.0.1", *options]
    process = node.popen([*command, "--", sys.executable, "-c", _JOB], stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", finish(process)
    try:
        yield process
    finally:
        process.kill()


def listen(process: subprocess.Popen[str], port: int, address: str = "::") -> float:
    """Have the job listen on a port; since when it does."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{address} {port}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


@pytest.mark.parametrize("version", [4, 6])
def test_stranger_who_invents_sources_cannot_keep_ports_from_being_closed(network: Network, version: int) -> None:
    """Scope `ports` promises 0.2 s; on a machine that is busy with other tests a second has to do."""
    node, _, stranger = network
    target = node.ipv4 if version == 4 else node.ipv6
    ports = range(41000, 41006)
    with job(node, "--scope", "ports") as process, flooded(stranger, target):
        time.sleep(6)
        with knocked(stranger, target, *ports) as answered:
            since = {}
            for port in ports:
                since[port] = listen(process, port)
                time.sleep(1.5)
        late = [(port, at - since[port]) for port, at in answered if at > since[port] + patient(1.0)]
        assert not late, late


@pytest.mark.parametrize("scope", ["ports", "auto"])
def test_stranger_who_invents_sources_gets_a_few_lines_a_minute(network: Network, scope: str) -> None:
    """In the job's log, and the end of the job does not wait for what was not said."""
    node, _, stranger = network
    with job(node, "--scope", scope) as process:
        for port in PLANNED:
            listen(process, port)
        for target in node.addresses:
            with flooded(stranger, target):
                time.sleep(6)
        began = time.monotonic()
        done = finish(process, text_input="")
        took = time.monotonic() - began
    said = [line for line in done.stderr.splitlines() if "blocked" in line]
    assert done.returncode == 0, done
    assert 2 <= len(said) < 30, done.stderr
    assert any("more pairs of source and port" in line for line in said), done.stderr
    assert took < 3, took


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES, "legacy"])
def test_stranger_who_invents_sources_of_a_version_that_is_answered_leaves_the_host_its_neighbours(
    network: Network, backend: str
) -> None:
    """A machine looks for 1,024 neighbours at once: answers to who is not there would take the places of all others."""
    node, _, stranger = network
    with job(node, "--firewall", backend), flooded(stranger, node.ipv6):
        time.sleep(3)
        neighbours = node.run(["ip", "-6", "neighbour", "show"], check=True).stdout.splitlines()
    assert 10 < len(neighbours) < 600, "some were answered, and no more than so many a second"


@contextlib.contextmanager
def talked_to(talk: Conversation, document: dict[str, object]) -> Iterator[list[int]]:
    """The guard hears the same thing again and again in the block; yields how often it was sent so far."""
    lines = json.dumps(document).encode() + b"\n"
    sent, over = [0], threading.Event()

    def talk_on() -> None:
        while not over.is_set() and talk.say(lines * 50):
            sent[0] += 50

    talker = threading.Thread(target=talk_on)
    talker.start()
    yield sent
    over.set()
    talker.join()


@pytest.mark.parametrize("way", WAYS)
def test_messages_without_end_do_not_hide_the_end_of_the_launcher(ground: Ground, way: str) -> None:
    talk = ground.talk(ground.alice, way, apart=True)
    talk.say(order(ports=PLANNED))
    assert "guarding" in talk.hear_verdict()
    with talked_to(talk, {"peers": {"networks": [f"{ground.peer.ipv4}/32"]}}) as sent:
        time.sleep(1)
        talk.process.kill()
        talk.process.wait()
        assert eventually(lambda: not guards(ground.machine), seconds=5)
    assert sent[0] >= 1000
    talk.hang_up()


def test_messages_without_end_change_peers_once_a_second_and_are_written_down_a_few_times_a_minute(
    ground: Ground,
) -> None:
    """The host's lock, its chains and its log are everybody's; the newest list is the one that holds in the end."""
    talk = ground.guarded(ground.alice, "socket")
    for number in range(300):
        talk.say({"peers": {"networks": [f"10.{number % 200}.0.1/32"]}})
    talk.say({"peers": {"networks": [f"{ground.stranger.ipv4}/32"]}})
    assert eventually(lambda: ground.stranger.ipv4 in str(ground.node.snapshot()), seconds=5)
    assert log_of(ground.machine).count("peer networks now") < 10
    talk.release()


def recorded(field: str) -> int:
    """A number in the record of the one run that there is."""
    (record,) = RECORDS.glob("*.json")
    return int(json.loads(record.read_text())[field])


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_stranger_gets_to_no_planned_port_while_guards_are_killed_in_scope_ports(
    network: Network, backend: str
) -> None:
    node, _, stranger = network
    before = node.snapshot()
    guards_killed: list[int] = []
    with job(node, "--scope", "ports", "--firewall", backend) as process:
        listen(process, PLANNED[0])
        with knocked(stranger, node.ipv4, PLANNED[0]) as by_ipv4, knocked(stranger, node.ipv6, PLANNED[0]) as by_ipv6:
            for _ in range(3):
                guards_killed.append(recorded("guard"))
                os.kill(guards_killed[-1], signal.SIGKILL)
                assert eventually(lambda: recorded("guard") not in guards_killed, seconds=10)
                time.sleep(0.5)
        done = finish(process, text_input="")
    assert (done.returncode, by_ipv4, by_ipv6) == (0, [], []), done
    assert eventually(lambda: node.snapshot() == before, seconds=5)


@pytest.mark.parametrize("cleaner", ["clean", "next run"])
def test_rules_without_a_guard_close_the_ports_until_somebody_cleans_up(network: Network, cleaner: str) -> None:
    """Launcher and guard are killed; who listens lives on for a while."""
    node, _, stranger = network
    before = node.snapshot()
    with job(node, "--scope", "ports", "--firewall", "nftables") as process:
        listen(process, PLANNED[0])
        guard = recorded("guard")
        with knocked(stranger, node.ipv4, PLANNED[0]) as answered:
            os.kill(guard, signal.SIGSTOP)
            process.kill()
            os.kill(guard, signal.SIGKILL)
            assert eventually(lambda: not is_alive(guard))
            time.sleep(1)
    assert answered == []
    assert "securerun-" in str(node.snapshot())
    assert process.stdin is not None
    process.stdin.close()  # with which the job's own process ends
    assert eventually(lambda: not {port for _, port in listening(node)}.intersection(PLANNED))
    commands = {
        "clean": [str(COMMANDS / "securerunctl"), "clean"],
        "next run": [*EXEC, "--ports", "7000", "--peers", "10.99.0.1", "--", "true"],
    }
    assert node.run(commands[cleaner]).returncode == 0
    assert eventually(lambda: node.snapshot() == before, seconds=5)


def test_listener_on_the_loopback_that_a_host_leads_strangers_to_is_closed_in_scope_ports(network: Network) -> None:
    """As Kubernetes' node ports, and what publishes ports of containers, have it: route_localnet, and DNAT to 127/8."""
    node, _, stranger = network
    port, led = 42000, 42001
    node.run(["sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1"], check=True)
    hook = "type nat hook prerouting priority -100; policy accept"
    rule = f"tcp dport {{ {port}, {led} }} dnat to 127.0.0.1:{port}"
    rules = f"table ip led {{\nchain before {{\n{hook}\n{rule}\n}}\n}}\n"
    node.run(["nft", "-f", "-"], text_input=rules, check=True)
    with job(node, "--scope", "ports") as process:
        with knocked(stranger, node.ipv4, port, led) as answered:
            since = listen(process, port, "127.0.0.1")
            time.sleep(3)
        assert [at for _, at in answered if at > since + 1.0] == []
        dial = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert node.run([sys.executable, "-c", dial]).returncode == 0


# --- what a user's listeners close for the whole host ---

# Listens on ports for each line of input, "close" for the lines before; says how many it could have.
_LISTENERS = """
import socket, sys
print("ready", flush=True)
held = []
for line in sys.stdin:
    if line == "close\\n":
        held.clear()
    ports, _, address = line.strip().partition("@")
    first, _, last = ports.partition("-")
    for port in range(int(first), int(last) + 1) if last else ():
        try:
            held.append(socket.create_server((address or "10.77.0.1", port), family=10 if ":" in address else 2))
        except OSError:
            pass
    print(len(held), flush=True)
"""


@contextlib.contextmanager
def listeners(ground: Ground, user: User | None, *before: str) -> Iterator[Callable[[str], int]]:
    """A process of a user's, or of root's, that listens; yields what has it do so, and returns on how many ports."""
    process = ground.popen(user, [*before, sys.executable, "-c", _LISTENERS], stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    first = process.stdout.readline()
    assert first == "ready\n", (first, process.stderr and process.stderr.read())

    def tell(line: str) -> int:
        assert process.stdout is not None and process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield tell
    process.stdin.close()
    process.wait(timeout=20)


def bare(scope: str = "ports") -> tuple[str, ...]:
    """A job, by itself without a shield."""
    return (*EXEC, "--scope", scope, "--ports", "60000", "--peers", "10.77.0.2", "--")


def closed_for(ground: Ground) -> list[range]:
    """What the one run's record says to be closed, beside the plan."""
    (record,) = (ground.machine.place(RECORDS)).glob("*.json")
    ports = json.loads(record.read_text())["policy"]["ports"]
    return [range(port["first"], port["last"] + 1) for port in ports if port["purpose"] == "opened while the job runs"]


def left_open(ground: Ground) -> list[list[int]]:
    """What the one run's record says to be open to every host."""
    (record,) = (ground.machine.place(RECORDS)).glob("*.json")
    found: list[list[int]] = json.loads(record.read_text())["left_open"]
    return found


def test_user_closes_no_more_ports_of_the_host_than_the_site_allows(ground: Ground) -> None:
    """And is told of the rest, in a line, in the record and by status; root's port stays in reach."""
    ground.machine.configure("ports_found_per_run = 100\n")
    with listeners(ground, ground.alice, *bare()) as tell:
        assert tell("20000-20299") == 300
        assert eventually(lambda: sum(map(len, closed_for(ground))) == 100, seconds=10)
        assert eventually(lambda: left_open(ground) == [[20100, 20299]], seconds=5)
        shown = ground.machine.run(ground.node, [COMMANDS / "securerunctl", "status"]).stdout
        assert "to every host: ports 20100-20299" in shown
    assert "20100" in log_of(ground.machine) and "ports_found_per_run" in log_of(ground.machine)


def test_user_closes_no_port_of_the_systems_where_users_may_listen_there(ground: Ground) -> None:
    free = "net.ipv4.ip_unprivileged_port_start"
    ground.node.run(["sysctl", "-qw", f"{free}=80"], check=True)
    try:
        with listeners(ground, ground.alice, *bare()) as tell:
            assert tell("1020-1027") == 8
            assert eventually(lambda: closed_for(ground) == [range(1024, 1028)], seconds=5)
            assert eventually(lambda: left_open(ground) == [[1020, 1023]], seconds=5)
        assert "ports below 1024" in log_of(ground.machine)
    finally:
        ground.node.run(["sysctl", "-qw", f"{free}=1024"], check=True)


@pytest.mark.parametrize("address", ["127.0.0.2", "::1"])
def test_user_closes_no_port_from_the_loopback_for_who_comes_to_listen_there(ground: Ground, address: str) -> None:
    """One who has each port of 127.0.0.2 or ::1 first could otherwise close all that others serve on from then on."""
    with listeners(ground, ground.alice, *bare()) as tell, listeners(ground, ground.bob) as tell_bob:
        assert tell(f"20000-20015@{address}") == 16
        assert eventually(lambda: closed_for(ground) == [range(20000, 20016)], seconds=5)
        assert tell_bob("20007-20007") == 1
        assert eventually(lambda: left_open(ground) == [[20007, 20007]], seconds=5)
        assert eventually(lambda: all(reach(ground.stranger, [(ground.node.ipv4, 20007)]).values()), seconds=5)
        assert closed_for(ground) == [range(20000, 20007), range(20008, 20016)]


def test_port_that_a_job_had_first_is_not_opened_by_who_comes_to_listen_there(ground: Ground) -> None:
    """Another user who listens there on another address would otherwise open it to the whole network."""
    with listeners(ground, ground.alice, *bare()) as tell, listeners(ground, ground.bob) as tell_bob:
        assert tell("20000-20000") == 1
        assert eventually(lambda: closed_for(ground) == [range(20000, 20001)], seconds=5)
        assert tell_bob(f"20000-20000@{ground.node.ipv6}") == 1
        time.sleep(2.5)
        assert closed_for(ground) == [range(20000, 20001)]
        assert not any(reach(ground.stranger, [(ground.node.ipv4, 20000)]).values())


def test_ports_that_a_job_no_longer_listens_on_are_the_hosts_again(ground: Ground) -> None:
    """Whoever listens there next, an ordinary user or root, is in reach, while the first one's job goes on."""
    with listeners(ground, ground.alice, *bare()) as tell, listeners(ground, ground.bob) as tell_bob:
        tell("20000-20031")
        assert eventually(lambda: sum(map(len, closed_for(ground))) == 32, seconds=5)
        tell("close")
        assert tell_bob("20000-20031") == 32
        assert eventually(lambda: closed_for(ground) == [], seconds=10)
        assert eventually(lambda: all(reach(ground.stranger, [(ground.node.ipv4, 20007)]).values()), seconds=5)
        # What is closed for nobody's sake any more is not closed for Alice's by Bob's being there.
        assert tell_bob("close") == 0
        tell("20040-20041")
        assert eventually(lambda: closed_for(ground) == [range(20040, 20042)], seconds=5)


# Listens, and hands its listeners to whoever connects to a local socket.
_HAND_OUT = """
import array, os, socket, sys
listeners = [socket.create_server(("10.77.0.1", int(port))) for port in sys.argv[2:]]
with socket.socket(socket.AF_UNIX) as local:
    local.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o666)
    local.listen()
    print("ready", flush=True)
    taker, _ = local.accept()
    rights = array.array("i", [one.fileno() for one in listeners])
    taker.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
sys.stdin.read()
os.unlink(sys.argv[1])
"""
_TAKE = """
import socket, sys
end = socket.socket(socket.AF_UNIX)
end.connect(sys.argv[1])
end.recvmsg(1, 100)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("giver", ["root", "bob"])
@pytest.mark.parametrize("scope", ["ports", "auto"])
def test_listener_of_anothers_that_is_handed_in_closes_no_port_of_theirs(
    ground: Ground, giver: str, scope: str
) -> None:
    """Whose socket it is says the kernel, whoever holds it by SCM_RIGHTS."""
    owner = ground.bob if giver == "bob" else None
    place = f"{ground.bob.home}/handed.sock"
    ports = ["20500"] if owner else ["20500", "443"]
    giving = ground.popen(owner, program(_HAND_OUT, place, *ports), stdin=subprocess.PIPE)
    assert giving.stdout is not None and giving.stdin is not None
    assert giving.stdout.readline() == "ready\n", giving.stderr and giving.stderr.read()
    taking = ground.popen(ground.alice, [*bare(scope=scope), *program(_TAKE, place)], stdin=subprocess.PIPE)
    assert taking.stdout is not None and taking.stdout.readline() == "taken\n", finish(taking)
    assert eventually(lambda: len(left_open(ground)) == len(ports), seconds=5)
    assert closed_for(ground) == []
    assert all(reach(ground.stranger, [(ground.node.ipv4, int(port)) for port in ports]).values())
    done = finish(taking, text_input="")
    assert "open to every host" in done.stderr, done
    giving.stdin.close()
    giving.wait(timeout=10)


def test_job_that_insists_on_the_shield_is_ended_when_a_port_of_it_is_open(ground: Ground) -> None:
    """With the status of a refusal, its processes too, and a line that says why."""
    place = f"{ground.bob.home}/handed.sock"
    giving = ground.popen(ground.bob, program(_HAND_OUT, place, "20500"), stdin=subprocess.PIPE)
    assert giving.stdout is not None and giving.stdin is not None and giving.stdout.readline() == "ready\n"
    taking = ground.popen(ground.alice, [*bare(scope="process"), *program(_TAKE, place)], stdin=subprocess.PIPE)
    assert taking.wait(timeout=20) == 77
    done = finish(taking)
    assert "--scope process" in done.stderr and "port 20500 is open to every host" in done.stderr
    giving.stdin.close()
    giving.wait(timeout=10)


# Listens outside of the job's cgroup, as root can: its socket is not behind the shield.
_TRAIN = """
import os, socket, sys, time
sys.path.insert(0, sys.argv[1])
from holder import listen_elsewhere
held = listen_elsewhere(20500)
time.sleep(60)
"""


def test_training_that_insists_on_the_shield_is_ended_when_a_port_of_it_is_open(
    network: Network, tmp_path: Path
) -> None:
    """By torchrun's own handling of SIGTERM, and with a report that says why."""
    script, report = tmp_path / "train.py", tmp_path / "report.json"
    script.write_text(_TRAIN)
    options = ["--nproc-per-node", "1", "--peers", "10.77.0.2", "--scope", "process", "--firewall", "off"]
    command = [str(COMMANDS / "securerun"), *options, "--report", str(report), str(script), str(GROUND)]
    done = network["node0"].run(command, timeout=60)
    assert done.returncode == 77, done
    assert "port 20500 is open to every host" in done.stderr
    assert "port 20500 is open to every host" in report.read_text()
    assert not listening(network["node0"])
