"""Other firewalls: what the preflight says of a host's rules is what the kernel does with a peer's packets."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import plans
import pytest
from hosts import Host, Network
from probe import reach
from sandbox import NOBODY, apart, cover_directory

from securerun.ctl.plan import render
from securerun.finding import Finding
from securerun.firewall.policy import PortRange
from securerun.preflight.firewalls import turned_away
from securerun.preflight.reading import Reading
from securerun.preflight.scene import Scene

PORT = 29500
RANDOM = 46883  # the middle of 32768-60999, which the kernel has by default
_LISTEN = (
    "import socket, sys\n"
    "options = {'family': socket.AF_INET6, 'dualstack_ipv6': True}\n"
    "held = [socket.create_server(('::', int(port)), **options) for port in sys.argv[1:]]\n"
    "print('listens', flush=True); sys.stdin.read()"
)

# RHEL's, as `iptables-services` brings them.
_RHEL = """*filter
:INPUT ACCEPT [0:0]
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p icmp -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp -m state --state NEW -m tcp --dport 22 -j ACCEPT
{more}
-A INPUT -j REJECT --reject-with icmp-host-prohibited
COMMIT
"""
# What ufw 0.36 loads, its chains for logging and for UDP left out.
_UFW = """*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-not-local - [0:0]
:ufw-user-input - [0:0]
:ufw-after-input - [0:0]
:ufw-skip-to-policy-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j LOG
-A ufw-not-local -j DROP
{more}
-A ufw-after-input -m addrtype --dst-type BROADCAST -j ufw-skip-to-policy-input
-A ufw-skip-to-policy-input -j DROP
COMMIT
"""
# firewalld 1.3's table of zone `public` (or `trusted`, for a source), its empty chains left out.
_FIREWALLD = """table inet firewalld {{
  chain filter_INPUT {{
    type filter hook input priority filter + 10; policy accept;
    ct state {{ established, related }} accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    jump filter_INPUT_ZONES
    reject with icmpx admin-prohibited
  }}
  chain filter_INPUT_ZONES {{
    {more}
    iifname "eth0" goto filter_IN_public
    goto filter_IN_public
  }}
  chain filter_IN_public {{
    jump filter_IN_public_allow
    meta l4proto {{ icmp, ipv6-icmp }} accept
    reject with icmpx admin-prohibited
  }}
  chain filter_IN_public_allow {{
    tcp dport 22 accept
    ip6 daddr fe80::/64 udp dport 546 accept
  }}
  chain filter_IN_trusted {{
    accept
  }}
}}"""
_NFT = """table inet host {{
  set nodes {{ type ipv4_addr; flags interval; elements = {{ 10.77.0.2, 10.99.0.0/16 }} }}
  chain {name} {{
    type filter hook input priority 0; policy {policy};
    {rules}
  }}
}}"""


def nft(rules: str, policy: str = "drop", name: str = "input") -> str:
    return _NFT.format(rules=rules, policy=policy, name=name)


# How a tool is told, what it is told, and whether the peer 10.77.0.2 is let to the port of the plan, and to any other.
RULESETS: dict[str, tuple[str, str, tuple[bool, bool]]] = {
    "nothing": ("", "", (True, True)),
    "policy": ("iptables", "*filter\n:INPUT DROP [0:0]\nCOMMIT\n", (False, False)),
    "policy legacy": ("iptables-legacy", "*filter\n:INPUT DROP [0:0]\nCOMMIT\n", (False, False)),
    "rhel": ("iptables", _RHEL.format(more=""), (False, False)),
    "rhel legacy": ("iptables-legacy", _RHEL.format(more=""), (False, False)),
    "rhel, peer": ("iptables", _RHEL.format(more="-A INPUT -s 10.77.0.2/32 -p tcp -j ACCEPT"), (True, True)),
    "rhel, port": ("iptables", _RHEL.format(more="-A INPUT -p tcp -m tcp --dport 29500 -j ACCEPT"), (True, False)),
    "rhel, ports": (
        "iptables",
        _RHEL.format(more="-A INPUT -i eth+ -p tcp -m multiport --dports 22,29000:47000 -j ACCEPT"),
        (True, True),
    ),
    "rhel, another interface": ("iptables", _RHEL.format(more="-A INPUT -i ib0 -j ACCEPT"), (False, False)),
    "rhel, all but": ("iptables", _RHEL.format(more="-A INPUT ! -s 10.77.0.2/32 -j ACCEPT"), (False, False)),
    "rhel, syn": (
        "iptables",
        _RHEL.format(more="-A INPUT -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT"),
        (False, False),
    ),
    "ufw": ("iptables", _UFW.format(more=""), (False, False)),
    "ufw allow from": ("iptables", _UFW.format(more="-A ufw-user-input -s 10.77.0.0/24 -j ACCEPT"), (True, True)),
    "ufw allow port": (
        "iptables",
        _UFW.format(more="-A ufw-user-input -p tcp -m tcp --dport 29500 -j ACCEPT"),
        (True, False),
    ),
    "goto": (
        "iptables",
        "*filter\n:INPUT ACCEPT [0:0]\n:jail - [0:0]\n-A INPUT -s 10.77.0.0/24 -g jail\n-A INPUT -j DROP\n"
        "-A jail -p tcp -m tcp --dport 29500 -j DROP\nCOMMIT\n",
        (False, True),
    ),
    "firewalld": ("nft", _FIREWALLD.format(more=""), (False, False)),
    "firewalld, trusted": (
        "nft",
        _FIREWALLD.format(more="ip saddr 10.77.0.2 goto filter_IN_trusted"),
        (True, True),
    ),
    "nft policy": ("nft", nft(""), (False, False)),
    "nft accept all": ("nft", nft("accept"), (True, True)),
    "nft set": ("nft", nft("ip saddr @nodes accept"), (True, True)),
    "nft other set": ("nft", nft("ip saddr { 10.77.0.3, 10.77.0.4-10.77.0.9 } accept"), (False, False)),
    "nft range": ("nft", nft("tcp dport 29000-30000 accept"), (True, False)),
    "nft not": ("nft", nft("tcp dport != 29500 accept"), (False, True)),
    "nft states": (
        "nft",
        nft("ct state vmap { established : accept, related : accept, new : drop }", "accept"),
        (False, False),
    ),
    "nft map of ports": ("nft", nft("tcp dport vmap { 29500 : accept, 46883 : drop }", "accept"), (True, False)),
    "nft other protocols": ("nft", nft("meta l4proto { udp, icmp } accept; ip protocol udp accept"), (False, False)),
    "nft interface": ("nft", nft('iifname "eth0" accept'), (True, True)),
    "nft other interface": ("nft", nft('iifname { "ib0", "lo" } accept'), (False, False)),
    "nft ip6 only": ("nft", nft("meta nfproto ipv6 drop", "accept"), (True, True)),
    "nft forward": ("nft", nft("", "accept").replace("hook input", "hook forward"), (True, True)),
    "nft two tables": (
        "nft",
        nft("accept") + "\n" + nft("tcp dport 29500 drop", "accept").replace("host", "other"),
        (False, True),
    ),
    "nft local": ("nft", nft("fib daddr type local accept"), (True, True)),
}
# What cannot be told from the text may not be told of: a limit, a mark, a set that another tool keeps.
UNCERTAIN = {
    "limit": ("iptables", _RHEL.format(more="-A INPUT -m limit --limit 1000/sec -j ACCEPT")),
    "mark": ("iptables", "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m mark --mark 0x8000/0x8000 -j DROP\nCOMMIT\n"),
    "nft limit": ("nft", nft("limit rate 1000/second accept")),
    "nft mark": ("nft", nft("meta mark 0x8000 drop", "accept")),
}


@pytest.fixture(scope="module")
def network(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "node1") as network:
        yield network


@pytest.fixture(scope="module")
def node0(network: Network) -> Iterator[Host]:
    node0 = network["node0"]
    listener = node0.popen([sys.executable, "-c", _LISTEN, str(PORT), str(RANDOM)], stdin=subprocess.PIPE)
    assert listener.stdout is not None and listener.stdin is not None
    assert listener.stdout.readline() == "listens\n"
    yield node0
    listener.stdin.close()


@contextlib.contextmanager
def ruled(host: Host, tool: str, text: str) -> Iterator[None]:
    """The host with these rules; afterwards without any."""
    command = {"nft": ["nft", "-f", "-"], "": ["cat"]}.get(tool, [f"{tool}-restore"])
    host.run(command, text_input=text, check=True)
    try:
        yield
    finally:
        host.run(["nft", "flush", "ruleset"], check=True)
        if tool == "iptables-legacy":
            empty = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
            host.run(["iptables-legacy-restore"], text_input=empty, check=True)


def told(host: Host, *peers: str) -> list[Finding]:
    """What the check tells of a launch with these peers."""
    networks = tuple(ipaddress.ip_network(peer) for peer in peers)
    plan = (PortRange(PORT, PORT, "master port"),)

    def look() -> list[Finding]:
        scene = Scene(0o027, {}, ("train.py",), ports=plan, peers=networks, rules=Reading())
        return list(turned_away(scene))

    return apart(look, host=host)


@pytest.mark.parametrize("name", RULESETS)
def test_a_peer_is_told_to_be_turned_away_exactly_where_the_kernel_does_it(
    network: Network, node0: Host, name: str
) -> None:
    tool, text, let_in = RULESETS[name]
    with ruled(node0, tool, text):
        before = node0.snapshot()
        findings = told(node0, "10.77.0.2")
        assert node0.snapshot() == before
        reached = reach(network["node1"], [(node0.ipv4, PORT), (node0.ipv4, RANDOM)])
    assert (reached[node0.ipv4, PORT], reached[node0.ipv4, RANDOM]) == let_in
    refused = [port for port, reaches in zip((PORT, RANDOM), let_in) if not reaches]
    assert bool(findings) == bool(refused), findings
    for finding in findings:
        assert finding.name == "firewall"
        assert f"turns 10.77.0.2 away from TCP ports {', '.join(map(str, refused))}" in finding.what


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_cannot_be_told_from_the_rules_is_not_told(node0: Host, name: str) -> None:
    with ruled(node0, *UNCERTAIN[name]):
        assert told(node0, "10.77.0.2") == []


@pytest.mark.parametrize("name", ["rhel", "nft policy", "rhel legacy"])
def test_command_that_is_told_lets_the_peer_in(network: Network, node0: Host, name: str) -> None:
    tool, text, _ = RULESETS[name]
    with ruled(node0, tool, text):
        (finding,) = told(node0, "10.77.0.2", "10.77.0.9")
        assert "10.77.0.2 and 1 more away" in finding.what
        command = finding.fix.replace("iptables -I", f"{tool} -I") if tool != "nft" else finding.fix
        node0.run(command.split(), check=True)
        assert told(node0, "10.77.0.2") == []
        assert all(reach(network["node1"], [(node0.ipv4, PORT), (node0.ipv4, RANDOM)]).values())


def test_ipv6_has_rules_of_its_own(network: Network, node0: Host) -> None:
    with ruled(node0, "ip6tables", "*filter\n:INPUT DROP [0:0]\nCOMMIT\n"):
        assert told(node0, "10.77.0.2") == []
        (finding,) = told(node0, "fd77::2")
        assert "chain INPUT of ip6tables" in finding.what
        assert reach(network["node1"], [(node0.ipv6, PORT)]) == {(node0.ipv6, PORT): False}
        node0.run(finding.fix.split(), check=True)
        assert told(node0, "fd77::2") == []


def test_this_host_itself_wide_networks_and_single_nodes_have_no_peers_to_turn_away(node0: Host) -> None:
    with ruled(node0, "nft", nft('iifname "lo" accept')):
        assert told(node0, "10.77.0.1", "0.0.0.0/0", "fd77::1") == []
        assert told(node0) == []
        assert told(node0, "10.77.0.0/24") != []


def test_rules_of_securerun_itself_are_no_other_firewall(node0: Host) -> None:
    chain = (
        "*filter\n:SECURERUN - [0:0]\n-A INPUT -j SECURERUN\n-A SECURERUN -p tcp -m tcp --dport 29500 -j DROP\nCOMMIT\n"
    )
    with ruled(node0, "iptables", chain):
        assert told(node0, "10.77.0.2") == []
    with ruled(node0, "nft", nft("").replace("inet host", "inet securerun-0123456789ab")):
        assert told(node0, "10.77.0.2") == []


def test_an_administrators_script_is_one_which_turns_away_whom_it_does_not_name(node0: Host, tmp_path: Path) -> None:
    script = tmp_path / "ports.sh"
    script.write_text(render(plans.plan(("10.77.0.2",), firewall="iptables"), "sh"))
    node0.run(["sh", script, "up"], check=True)
    try:
        assert told(node0, "10.77.0.2") == []
        assert told(node0, "10.77.0.9") != []
    finally:
        node0.run(["sh", script, "down"], check=True)


def test_looking_registers_no_table_and_starts_nothing_where_no_rule_is(node0: Host) -> None:
    def look() -> tuple[object, ...]:
        names = Path("/proc/net/ip_tables_names")
        before = names.read_text() if names.exists() else None
        reading = Reading()
        started = list(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        return started, reading.chains(), (names.read_text() if names.exists() else None) == before

    with Network("fresh") as fresh:
        before = fresh["fresh"].snapshot()
        assert apart(look, host=fresh["fresh"]) == ([], (), True)
        assert fresh["fresh"].snapshot() == before
        assert before["nft"] == ""


@pytest.mark.parametrize("enabled", ["yes", "no"])
def test_user_who_may_not_read_rules_hears_of_an_active_ufw(node0: Host, enabled: str) -> None:
    def arrange() -> None:
        cover_directory("/etc")
        Path("/etc/ufw").mkdir()
        Path("/etc/ufw/ufw.conf").write_text(f"# comment\nENABLED={enabled}\n")

    def look() -> list[Finding]:
        return list(turned_away(Scene(0o027, {}, peers=(ipaddress.IPv4Network("10.77.0.2/32"),), rules=Reading())))

    findings = apart(look, before=arrange, host=node0, user=NOBODY)
    if enabled == "yes":
        (finding,) = findings
        assert "ufw is active and may turn 10.77.0.2 away" in finding.what
        assert finding.fix == "sudo ufw status"
    else:
        assert findings == []


@pytest.mark.parametrize(
    ("manager", "mend"), [("ufw", "ufw allow proto tcp from 10.77.0.2"), ("firewalld", "firewall-cmd")]
)
def test_rules_that_a_program_keeps_are_mended_by_its_own_command(node0: Host, manager: str, mend: str) -> None:
    def arrange() -> None:
        cover_directory("/etc")
        cover_directory("/run")
        if manager == "ufw":
            Path("/etc/ufw").mkdir()
            Path("/etc/ufw/ufw.conf").write_text("ENABLED=yes\n")
        else:
            # A process of that name, as /proc tells it: this one.
            Path("/run/firewalld.pid").write_text(str(os.getpid()))
            Path("/proc/self/comm").write_text("firewalld")

    def look() -> list[Finding]:
        peers = (ipaddress.IPv4Network("10.77.0.2/32"),)
        return list(turned_away(Scene(0o027, {}, peers=peers, rules=Reading())))

    with ruled(node0, "nft", RULESETS["firewalld"][1]):
        (finding,) = apart(look, before=arrange, host=node0)
    assert finding.what.startswith(f"{manager}, chain filter_INPUT of nft (table inet firewalld) turns 10.77.0.2 away")
    assert finding.fix.startswith(mend)
