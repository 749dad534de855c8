"""The legacy backend in real tables, run as the guard is: without site-packages and with an empty environment."""

from __future__ import annotations

import fcntl
import importlib.util
import ipaddress
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from cgroups import inside
from checkout import CHECKOUT
from hosts import Host, Network, eventually
from patience import patient
from probe import Endpoint, reach

from securerun.firewall.dispatcher import Dispatcher, render_install
from securerun.firewall.policy import Policy, PortRange
from securerun.linux import ip_set
from securerun.linux.networks import collapse

RUN, OTHER = "0123456789ab", "ba9876543210"
COMMANDS = ("iptables-legacy", "ip6tables-legacy")
CLOSED, PLANNED, UNPLANNED = 29500, (29500, 60000, 60015), (29499, 60016)
LOG_GROUP = 4712

# Carries out an order, one line of input as `order` below writes it; `hold` keeps a log group until the input ends.
PROGRAM = """
import ipaddress, json, sys
sys.path.append(sys.argv[1])
from securerun.firewall import legacy, libiptc
from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.droplog import DropLog
from securerun.firewall.policy import Policy, PortRange, collapse

def policy(order):
    peers = collapse(map(ipaddress.ip_network, order["peers"]))
    ports = [PortRange(*ends, "test") for ends in order["ports"]]
    return Policy(order["run"], tuple(ports), peers, tuple(order["interfaces"]), order["accept"])

def main(order):
    chains = legacy.LegacyChains(order["run"])
    if order["action"] == "remove":
        return chains.remove()
    if order["action"] == "install":
        return chains.install(policy(order), order["log_group"])
    drops = DropLog(order["log_group"])
    chains.install(policy(order), drops.group)
    print("held", flush=True)
    sys.stdin.read()
    drops.read()
    for denial in drops.denied():
        print(denial.source, denial.port, denial.packets)
    chains.remove()

order = json.loads(sys.stdin.readline())

def run():
    try:
        main(order)
    except PortChainsUnavailable as error:
        print(error)
"""


@pytest.fixture(autouse=True)
def python_iptables_is_installed() -> None:
    if importlib.util.find_spec("iptc") is None:
        pytest.fail("python-iptables is not installed; `scripts/setup.sh test` installs it, or pip install '.[legacy]'")


@pytest.fixture
def node(network: Network) -> Host:
    return network["node0"]


def order(
    action: str,
    run: str,
    *peers: str,
    interfaces: tuple[str, ...] = (),
    accept: bool = False,
    ports: tuple[tuple[int, int], ...] = ((29500, 29500), (60000, 60015)),
    log_group: int | None = None,
) -> str:
    """One order of PROGRAM's, as JSON; the fields are those of `Policy`."""
    fields = {"interfaces": interfaces, "accept": accept, "ports": ports, "log_group": log_group}
    return json.dumps({"action": action, "run": run, "peers": peers, **fields})


def as_guard(before: str = "", *, python: str | Path = sys.executable) -> list[str]:
    """PROGRAM in an interpreter like the guard's; `before` is code to run first."""
    program = f"{PROGRAM}\n{before}\nrun()"
    return ["env", "-i", str(python), "-I", "-S", "-c", program, str(CHECKOUT)]


def carry_out(host: Host, written: str, *, before: str = "") -> str:
    """What an order printed: nothing, or why it was refused."""
    done = host.run(as_guard(before), text_input=written)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def start(host: Host, written: str, command: list[str]) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
    """A command that carries an order out, and that waits for the end of its input; with its input and output."""
    process = host.popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{written}\n")
    process.stdin.flush()
    return process, process.stdin, process.stdout


def install(host: Host, run: str, *peers: str) -> None:
    assert carry_out(host, order("install", run, *peers)) == ""


def remove(host: Host, run: str) -> None:
    assert carry_out(host, order("remove", run)) == ""


def saved(host: Host) -> dict[str, list[str]]:
    """The rules and chains in the legacy filter table of each family; looking registers the table."""
    tables = {}
    for command in COMMANDS:
        host.run([command, "-S"], check=True)
        tables[command] = host.snapshot(legacy=True)[f"{command}-save"].splitlines()
    return tables


def foreign(host: Host) -> dict[str, list[str]]:
    """`saved` without what is ours."""
    return {
        command: [line for line in lines if "securerun" not in line.lower()] for command, lines in saved(host).items()
    }


def listen(host: Host, *ports: int) -> None:
    script = (
        "import socket, sys, time\n"
        "kept = [socket.create_server(('', int(port)), family=socket.AF_INET6, dualstack_ipv6=True)"
        " for port in sys.argv[1:]]\n"
        "print('listening', flush=True)\n"
        "time.sleep(120)"
    )
    listener = host.popen([sys.executable, "-I", "-S", "-c", script, *map(str, ports)])
    assert listener.stdout is not None
    assert listener.stdout.readline() == "listening\n"


def on(host: Host, *ports: int) -> list[Endpoint]:
    return [(address, port) for address in host.addresses for port in ports]


def all_are(reached: bool, endpoints: list[Endpoint]) -> dict[Endpoint, bool]:
    return dict.fromkeys(endpoints, reached)


def test_peers_pass_and_strangers_do_not_on_both_families(network: Network) -> None:
    node, peer, stranger = network
    listen(node, *PLANNED)
    install(node, RUN, *peer.addresses)
    planned = on(node, *PLANNED)
    assert reach(peer, planned) == all_are(True, planned)
    assert reach(stranger, planned) == all_are(False, planned)


def test_ports_outside_the_plan_stay_open_to_everyone(network: Network) -> None:
    node, peer, stranger = network
    listen(node, *UNPLANNED)
    install(node, RUN, *peer.addresses)
    unplanned = on(node, *UNPLANNED)
    assert reach(stranger, unplanned) == all_are(True, unplanned)


def test_loopback_passes(node: Host) -> None:
    listen(node, CLOSED)
    install(node, RUN)
    endpoints = [*on(node, CLOSED), ("127.0.0.1", CLOSED), ("::1", CLOSED)]
    assert reach(node, endpoints) == all_are(True, endpoints)


def test_each_of_two_runs_with_one_port_range_is_reached_by_its_own_peers(network: Network) -> None:
    node, peer, stranger = network
    listen(node, CLOSED)
    closed = on(node, CLOSED)
    install(node, RUN, *peer.addresses)
    install(node, OTHER, *stranger.addresses)
    assert reach(peer, closed) == reach(stranger, closed) == all_are(True, closed)
    remove(node, RUN)
    assert reach(peer, closed) == all_are(False, closed)
    assert reach(stranger, closed) == all_are(True, closed)
    remove(node, OTHER)
    assert reach(peer, closed) == all_are(True, closed)


def test_peers_are_let_in_through_the_named_interfaces_only(network: Network) -> None:
    node, peer, _ = network
    listen(node, CLOSED)
    closed = on(node, CLOSED)
    assert carry_out(node, order("install", RUN, *peer.addresses, interfaces=("eth1",))) == ""
    assert reach(peer, closed) == all_are(False, closed)
    assert carry_out(node, order("install", OTHER, *peer.addresses, interfaces=("eth1", "eth0"))) == ""
    assert reach(peer, closed) == all_are(True, closed)


def test_an_interface_whose_name_resembles_loopback_is_not_taken_for_it(network: Network) -> None:
    # The lowest bits of "bon" are those of "lo\0", and those are all that python-iptables has the kernel compare.
    node, _, stranger = network
    for words in ("link set eth0 down", "link set eth0 name bond0", "link set bond0 up"):
        node.run(["ip", *words.split()], check=True)
    node.run(["ip", "addr", "replace", f"{node.ipv6}/64", "dev", "bond0", "nodad"], check=True)
    listen(node, CLOSED)
    closed = on(node, CLOSED)
    assert reach(stranger, closed) == all_are(True, closed)
    install(node, RUN)
    assert reach(stranger, closed) == all_are(False, closed)


def test_pass_rules_open_nothing_that_the_host_closed_and_accept_does(network: Network) -> None:
    node, peer, _ = network
    listen(node, CLOSED)
    closed = on(node, CLOSED)
    for command in COMMANDS:
        for rule in ("-A INPUT -p tcp ! --syn -j ACCEPT", "-A INPUT -p ipv6-icmp -j ACCEPT", "-P INPUT DROP"):
            node.run([command, *rule.split()], check=True)
    install(node, RUN, *peer.addresses)
    assert reach(peer, closed) == all_are(False, closed)
    remove(node, RUN)
    assert carry_out(node, order("install", RUN, *peer.addresses, accept=True)) == ""
    assert reach(peer, closed) == all_are(True, closed)


@pytest.mark.parametrize("log_group", [None, LOG_GROUP])
@pytest.mark.parametrize("accept", [False, True])
def test_rules_are_those_that_iptables_legacy_restore_writes(
    network: Network, log_group: int | None, accept: bool
) -> None:
    node, other, _ = network
    peers = ("10.0.0.0/9", "10.128.0.7", "192.0.2.4/30", "fd00::/17", "fd77::2", "2001:db8::/127")
    ports = tuple((1000 + 10 * number, 1000 + 10 * number + number % 3) for number in range(20))
    interfaces = ("eth0", "fifteen.letters", "a")
    written = order("install", RUN, *peers, interfaces=interfaces, accept=accept, ports=ports, log_group=log_group)
    assert carry_out(node, written) == ""
    policy = Policy(
        RUN,
        tuple(PortRange(*ends, "test") for ends in ports),
        collapse(ipaddress.ip_network(peer) for peer in peers),
        interfaces,
        accept,
    )
    nothing = Dispatcher(exists=False, rules=(), jumps=(), jumped_to_first=False)
    for command, version in zip(COMMANDS, (4, 6)):
        text = render_install(policy, version, nothing, log_group=log_group)
        other.run([f"{command}-restore", "--noflush"], text_input=text, check=True)
    assert saved(node) == saved(other)
    assert any("fifteen.letters" in line for line in saved(node)["ip6tables-legacy"])


def test_iptables_legacy_can_delete_every_rule_by_its_own_words(node: Host) -> None:
    # It compares all bytes, also those that a listing does not show.
    before = saved(node)
    written = order("install", RUN, "10.77.0.2", "fd77::2", interfaces=("eth0",), log_group=LOG_GROUP)
    assert carry_out(node, written) == ""
    for command, lines in saved(node).items():
        deletions = [f"-D{line[2:]}" for line in lines if line.startswith("-A ")]
        assert len(deletions) == 4
        text = "\n".join(["*filter", *deletions, "-X SECURERUN", "COMMIT", ""])
        node.run([f"{command}-restore", "--noflush"], text_input=text, check=True)
    assert saved(node) == before


def test_foreign_rules_are_the_same_before_during_and_after(node: Host) -> None:
    for command in COMMANDS:
        for rule in (
            "-N theirs",
            "-A theirs -m string --string securing --algo bm -j DROP",
            "-A INPUT -c 12 3456 -p tcp -m tcp --dport 22 -j theirs",
            "-A INPUT -p udp -m conntrack --ctstate ESTABLISHED -j ACCEPT",
            "-A FORWARD -m recent --name seen --set -j LOG --log-prefix theirs",
            "-P FORWARD DROP",
        ):
            node.run([command, *rule.split()], check=True)
    before = foreign(node)
    assert len(before["iptables-legacy"]) == len(before["ip6tables-legacy"]) == 10
    install(node, RUN, "10.77.0.2", "fd77::2")
    assert foreign(node) == before
    install(node, OTHER, "10.77.0.3", "fd77::3")
    remove(node, RUN)
    assert foreign(node) == before
    remove(node, OTHER)
    assert saved(node) == before
    for command in COMMANDS:
        assert "[12:3456] -A INPUT -p tcp" in node.run([f"{command}-save", "-c"], check=True).stdout


def test_chain_of_others_whose_name_is_no_utf8_is_in_nobodys_way(node: Host) -> None:
    """The guard looks at INPUT's jumps again and again: it died of the name."""
    theirs = os.fsdecode("règles".encode("latin-1"))
    for command in COMMANDS:
        node.run([command, "-N", theirs], check=True)
        node.run([command, "-A", "INPUT", "-p", "udp", "-j", theirs], check=True)
    install(node, RUN, "10.77.0.2")
    remove(node, RUN)
    for command in COMMANDS:
        node.run([command, "-C", "INPUT", "-p", "udp", "-j", theirs], check=True)


def test_removal_of_the_last_run_takes_the_chain_and_the_jump_away(node: Host) -> None:
    before = saved(node)
    install(node, RUN, "10.77.0.2")
    install(node, OTHER, "10.77.0.2", "fd77::2")
    remove(node, RUN)
    for lines in saved(node).values():
        assert not any(RUN in line for line in lines)
        assert next(line for line in lines if line.startswith("-A INPUT")).endswith("-j SECURERUN")
    remove(node, OTHER)
    assert saved(node) == before


def test_removal_of_what_is_not_there_changes_nothing(node: Host) -> None:
    before = saved(node)
    remove(node, RUN)
    assert saved(node) == before
    install(node, OTHER, "10.77.0.2")
    with_other = saved(node)
    remove(node, RUN)
    assert saved(node) == with_other


def test_flushed_and_half_flushed_chains_are_removed_whole(node: Host) -> None:
    before = saved(node)
    install(node, RUN, "10.77.0.2")
    node.run(["iptables-legacy", "-D", "SECURERUN", "1"], check=True)
    node.run(["ip6tables-legacy", "-F"], check=True)
    remove(node, RUN)
    assert saved(node) == before


def test_jump_that_others_pushed_down_or_took_away_is_first_again_after_the_next_install(node: Host) -> None:
    install(node, RUN, "10.77.0.2")
    node.run(["iptables-legacy", "-I", "INPUT", "-p", "tcp", "--dport", "9", "-j", "ACCEPT"], check=True)
    node.run(["ip6tables-legacy", "-F", "INPUT"], check=True)
    install(node, OTHER, "10.77.0.2")
    for lines in saved(node).values():
        targets = [line.split()[-1] for line in lines if line.startswith("-A INPUT")]
        assert targets[0] == "SECURERUN"
        assert targets.count("SECURERUN") == 1


def test_a_rule_of_somebody_else_in_our_chain_refuses_the_install_in_both_families(node: Host) -> None:
    # IPv6 comes second: what was installed for IPv4 has to go again.
    node.run(["ip6tables-legacy", "-N", "SECURERUN"], check=True)
    node.run(["ip6tables-legacy", "-A", "SECURERUN", "-j", "ACCEPT"], check=True)
    before = saved(node)
    words = carry_out(node, order("install", RUN, "10.77.0.2", "fd77::2"))
    assert "rule 1 of chain SECURERUN in the legacy IPv6 filter table is not securerun's; remove it" in words
    assert saved(node) == before


def test_no_table_but_filter_is_touched(node: Host) -> None:
    install(node, RUN, "10.77.0.2", "fd77::2")
    assert carry_out(node, order("install", OTHER, log_group=LOG_GROUP)) == ""
    for names in ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"):
        assert node.run(["cat", names], check=True).stdout.split() == ["filter"]


def test_who_was_dropped_is_known_by_source_and_port(network: Network) -> None:
    node, _, stranger = network
    _, orders, answers = start(node, order("hold", RUN, log_group=LOG_GROUP), as_guard())
    assert answers.readline() == "held\n"
    reach(stranger, [(node.ipv4, 60007), (node.ipv6, CLOSED)])
    orders.close()
    denied = [line.split() for line in answers.read().splitlines()]
    assert {(source, port) for source, port, _ in denied} == {(stranger.ipv4, "60007"), (stranger.ipv6, str(CLOSED))}
    assert all(int(packets) >= 1 for *_, packets in denied)


def test_ten_thousand_peers_are_installed_and_removed_whole(node: Host) -> None:
    before = saved(node)
    peers = [f"10.{index >> 8}.{index & 255}.1" for index in range(10_000)]
    assert carry_out(node, order("install", RUN, *peers)) == ""
    with inside(node):
        assert ip_set.size(f"securerun-{RUN}-4") == 10_000
    assert sum(line.endswith("-j RETURN") for line in saved(node)["iptables-legacy"]) == 1
    remove(node, RUN)
    assert saved(node) == before
    with inside(node):
        assert ip_set.size(f"securerun-{RUN}-4") is None


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[IO[str]]:
    """What the commands of `with_lock` find as /run/xtables.lock, held by this process."""
    with (tmp_path / "xtables.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield held


def with_lock(lock: IO[str], command: list[str]) -> list[str]:
    """`command` with `lock` mounted over /run/xtables.lock: no other test on this machine waits for ours."""
    script = ': >> /run/xtables.lock; mount --bind "$0" /run/xtables.lock; exec "$@"'
    return ["unshare", "--mount", "--", "sh", "-ec", script, lock.name, *command]


def test_lock_held_by_another_is_named_after_a_while_and_nothing_is_installed(node: Host, lock: IO[str]) -> None:
    before = saved(node)
    shorter = "legacy._LOCK_SECONDS = 1.0"
    refused = node.run(with_lock(lock, as_guard(shorter)), text_input=order("install", RUN))
    assert refused.stdout.startswith("another program has held /run/xtables.lock for 1 s; see which with `fuser -v")
    assert refused.returncode == 0, refused.stderr
    assert saved(node) == before


def test_install_waits_for_the_lock_and_goes_on_when_it_is_given_back(node: Host, lock: IO[str]) -> None:
    before = saved(node)
    waiting = f"legacy._LOCK_SECONDS = {patient(10.0)}; print('waiting', flush=True)"
    installer, _, answers = start(node, order("install", RUN), with_lock(lock, as_guard(waiting)))
    assert answers.readline() == "waiting\n"
    assert not eventually(lambda: installer.poll() is not None, seconds=0.5)
    assert saved(node) == before
    fcntl.flock(lock, fcntl.LOCK_UN)
    assert installer.wait(timeout=30) == 0
    assert any(RUN in line for line in saved(node)["ip6tables-legacy"])


def test_lock_is_the_one_that_the_legacy_commands_take(node: Host) -> None:
    program = (
        "import subprocess, sys; sys.path.append(sys.argv[1]); from securerun.firewall import legacy\n"
        "with legacy.xtables_lock(): print(subprocess.run([sys.argv[2], '-w', '1', '-S'], stderr=1).returncode)"
    )
    done = node.run([sys.executable, "-I", "-S", "-c", program, str(CHECKOUT), "iptables-legacy"])
    assert "Another app is currently holding the xtables lock" in done.stdout
    assert done.stdout.split()[-1] == "4"


@pytest.fixture
def unlocked(tmp_path: Path) -> dict[str, str]:
    """An environment that has iptables take another lock: to the kernel, a program that takes none."""
    return {"XTABLES_LOCKFILE": str(tmp_path / "another.lock"), "PATH": os.environ["PATH"]}


def test_what_somebody_without_the_lock_wrote_in_between_stays_and_so_do_our_rules(
    node: Host, unlocked: dict[str, str]
) -> None:
    # Writes behind our back between the first reading and its commit: the kernel answers the commit with EAGAIN.
    before = f"""
import subprocess
commit = libiptc.View.commit
def commit_after_another(view):
    libiptc.View.commit = commit
    rule = ["iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "DROP"]
    subprocess.run(rule, env={unlocked}, check=True)
    return commit(view)
libiptc.View.commit = commit_after_another
"""
    assert carry_out(node, order("install", RUN), before=before) == ""
    rules = [line for line in saved(node)["iptables-legacy"] if line.startswith("-A")]
    assert [line.split()[-1] for line in rules] == ["SECURERUN", "DROP", "DROP"]
    assert "--dport 9" in rules[1]


def test_a_table_that_others_write_all_the_time_is_given_up_in_words(node: Host, unlocked: dict[str, str]) -> None:
    before = f"""
import subprocess
commit = libiptc.View.commit
def commit_after_another(view):
    rule = ["iptables-legacy", "-A", "FORWARD", "-j", "DROP"]
    if view.has_dispatcher and not removing:
        subprocess.run(rule, env={unlocked}, check=True)
    return commit(view)
libiptc.View.commit = commit_after_another
removing = []
take_out = legacy._take_out
legacy._take_out = lambda *words: (removing.append(True), take_out(*words))
"""
    words = carry_out(node, order("install", RUN), before=before)
    assert words == "others keep writing the legacy IPv4 filter table; try again"
    assert not any("SECURERUN" in line for lines in saved(node).values() for line in lines)


def test_without_python_iptables_the_reason_names_the_remedy(node: Host, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    done = node.run(as_guard(python=tmp_path / "bare" / "bin" / "python"), text_input=order("install", RUN))
    assert done.stdout.startswith(f"no python-iptables for {tmp_path}/bare/bin/python; install it with `pip install ")
    assert "'securerun[legacy]'" in done.stdout
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("library", ["xtables", "ip4tc", "ip6tc"])
def test_without_the_libraries_of_iptables_the_reason_names_them_each_time(node: Host, library: str) -> None:
    before = f"libiptc._SONAMES[{library!r}] = ('libnowhere.so.1',)\nrun()"
    words = carry_out(node, order("install", RUN), before=before).splitlines()
    assert len(words) == 2 and words[0] == words[1]
    assert "does not load (no libnowhere.so.1 on this host; its iptables package has them)" in words[0]


def test_loading_starts_no_program_and_takes_no_library_from_the_working_directory(node: Host, tmp_path: Path) -> None:
    for name in ("xtables", "ip4tc", "ip6tc", "xtwrapper", "libxtables.so.12", "libip4tc.so.2"):
        (tmp_path / name).symlink_to("/nowhere/evil.so")
    watching = """
import os
os.environ.update(IPTABLES_LIBDIR="/nowhere", XTABLES_LIBDIR="/nowhere", PYTHON_IPTABLES_XTABLES_VERSION="9")
def watch(event, words):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system", "os.fork"):
        print("started", words)
    if event == "ctypes.dlopen" and words[0] and "/" in words[0]:
        print("opened", words[0])
sys.addaudithook(watch)
"""
    done = node.run(as_guard(watching), text_input=order("install", RUN), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    opened = done.stdout.splitlines()
    assert len(opened) == 1
    assert opened[0].startswith(f"opened {sys.prefix}/") and "/libxtwrapper." in opened[0]


def test_nothing_is_left_on_the_path_and_standard_output_is_left_alone(node: Host) -> None:
    check = "before = list(sys.path), __import__('os').fstat(1)\nrun()\n"
    check += "print(before == (list(sys.path), __import__('os').fstat(1)))"
    assert carry_out(node, order("install", RUN), before=check) == "True"
