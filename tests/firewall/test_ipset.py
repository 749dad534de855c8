"""Sets of peers in the kernel, and the port chains that name them, in a host's real tables."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path

import pytest
from cgroups import inside
from hosts import Host, Network
from probe import reach

from securerun.errors import PolicyError
from securerun.firewall import ipset, iptables, script
from securerun.firewall.backends import open_chains
from securerun.firewall.chains import TooManyRules
from securerun.firewall.policy import Policy, PortRange
from securerun.linux import ip_set, nfnetlink
from securerun.linux.networks import Network as PeerNetwork
from securerun.linux.networks import collapse

RUN, OTHER = "0123456789ab", "ba9876543210"
SET, SET6 = f"securerun-{RUN}-4", f"securerun-{RUN}-6"
PORTS = (PortRange(29500, 29500, "master port"),)
BACKENDS = ("iptables", "legacy")
LIBRARIES = next(Path("/usr").glob("lib*/**/xtables/libxt_set.so")).parent
# enum ipset_cmd: IPSET_CMD_FLUSH
FLUSH = 4


def many(*others: str, count: int = 100) -> tuple[PeerNetwork, ...]:
    """As many networks a family that nothing of them can be joined, and these."""
    hosts: list[PeerNetwork] = [ipaddress.ip_network(other) for other in others]
    for number in range(0, 4 * count, 4):
        hosts += [ipaddress.IPv4Network((10 << 24) + number), ipaddress.IPv6Network((0xFD << 120) + number)]
    return collapse(hosts)


def policy(*peers: str, run_id: str = RUN, count: int = 100) -> Policy:
    return Policy(run_id, PORTS, many(*peers, count=count))


def saved(host: Host, backend: str) -> str:
    """The host's IPv4 rules."""
    return host.run(["iptables-legacy-save" if backend == "legacy" else "iptables-save"], check=True).stdout


def flush(name: str) -> None:
    """What `ipset flush NAME` does."""
    with nfnetlink.open_channel() as channel:
        ip_set._order(channel, nfnetlink.type_of(nfnetlink.IP_SET, FLUSH), nfnetlink.text(ip_set._NAME, name))


def test_a_set_is_made_changed_in_place_and_destroyed(node: Host) -> None:
    with inside(node):
        for version, name in ((4, SET), (6, SET6)):
            assert ip_set.size(name) is None
            ipset.put(name, policy().peers_of(version))
            assert ip_set.size(name) == 100
            ipset.put(name, policy(count=5000).peers_of(version))
            assert ip_set.size(name) == 5000
            assert ip_set.size(f"{name}+") is None
            ipset.destroy(name)
            assert ip_set.size(name) is None
            ipset.destroy(name)


def test_a_refusal_of_the_longest_message_is_read_whole(node: Host) -> None:
    """It carries a copy of what it refuses."""
    networks = policy(count=ip_set._ENTRIES_A_MESSAGE).peers_of(6)
    with inside(node):
        ip_set.make(SET6, networks)
        ip_set.destroy(SET6)
        with nfnetlink.open_channel() as channel, pytest.raises(FileNotFoundError):
            ip_set._order(channel, ip_set._ADD, ip_set._entries(SET6, networks))


@pytest.mark.parametrize("backend", BACKENDS)
def test_peers_of_each_run_pass_by_sets_and_nobody_else_on_both_families(network: Network, backend: str) -> None:
    node, peer, stranger = network
    targets = [(address, 29500) for address in node.addresses]
    with inside(node):
        listener = socket.create_server(("", 29500), family=socket.AF_INET6, dualstack_ipv6=True)
        first, second = open_chains(backend, RUN), open_chains(backend, OTHER)
        first.install(policy(*peer.addresses), None)
    with listener:
        assert f"--match-set {SET} src" in saved(node, backend)
        assert saved(node, backend).count("-j RETURN") == 1
        assert reach(peer, targets) == dict.fromkeys(targets, True)
        assert reach(stranger, targets) == dict.fromkeys(targets, False)
        with inside(node):
            second.install(policy(*stranger.addresses, run_id=OTHER), None)
        assert reach(peer, targets) == reach(stranger, targets) == dict.fromkeys(targets, True)
        with inside(node):
            first.remove()
        assert reach(peer, targets) == dict.fromkeys(targets, False)
        with inside(node):
            second.remove()
            assert ip_set.size(SET) is ip_set.size(f"securerun-{OTHER}-4") is None
    assert "SECURERUN" not in saved(node, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_or_fewer_peers_replace_the_set_or_do_without(node: Host, backend: str) -> None:
    with inside(node):
        chains = open_chains(backend, RUN)
        for count, size in ((100, 100), (300, 300), (5, None), (50, 50)):
            chains.install(policy(count=count), None)
            assert ip_set.size(SET) == ip_set.size(SET6) == size
            assert chains.stand()
            assert saved(node, backend).count("-j RETURN") == (5 if size is None else 1)
        chains.remove()
        assert ip_set.size(SET) is ip_set.size(SET6) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_that_somebody_flushed_is_noticed_and_filled_again(node: Host, backend: str) -> None:
    with inside(node):
        chains = open_chains(backend, RUN)
        chains.install(policy(), None)
        flush(SET6)
        assert not chains.stand()
        chains.install(policy(), None)
        assert chains.stand()
        chains.remove()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_without_sets_gets_a_rule_a_peer(node: Host, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_subsystem(name: str, _networks: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", name)

    monkeypatch.setattr(ipset, "put", no_such_subsystem)
    with inside(node):
        chains = open_chains(backend, RUN)
        chains.install(policy(), None)
        assert chains.stand()
        assert saved(node, backend).count("-j RETURN") == 100
        chains.remove()
    assert "SECURERUN" not in saved(node, backend)


def test_a_host_without_the_match_gets_a_rule_a_peer_and_no_set(
    node: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where iptables' library of that match is not installed."""
    for library in LIBRARIES.glob("*.so"):
        if library.name != "libxt_set.so":
            (tmp_path / library.name).symlink_to(library)
    monkeypatch.setattr(iptables, "_ENVIRONMENT", {**iptables._ENVIRONMENT, "XTABLES_LIBDIR": str(tmp_path)})
    with inside(node):
        chains = open_chains("iptables", RUN)
        chains.install(policy(), None)
        assert ip_set.size(SET) is None
        assert saved(node, "iptables").count("-j RETURN") == 100
        chains.remove()


def test_what_a_killed_guard_left_is_removed_by_name(node: Host) -> None:
    """A set without a rule, a half of a swap, and rules of a run that this process did not install."""
    with inside(node):
        open_chains("iptables", RUN).install(policy(), None)
        ipset.put(f"{SET}+", policy().peers_of(4))
        open_chains("iptables", RUN).remove()
        assert ip_set.size(SET) is ip_set.size(f"{SET}+") is None
        ipset.put(SET, policy().peers_of(4))
        open_chains("iptables", RUN).remove()
        assert ip_set.size(SET) is None


def test_a_set_that_a_rule_names_cannot_be_destroyed(node: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ip_set, "_LET_GO_SECONDS", 0.0)
    with inside(node):
        chains = open_chains("iptables", RUN)
        chains.install(policy(), None)
        with pytest.raises(OSError, match="4100|busy"):
            ipset.destroy(SET)
        assert chains.stand()
        monkeypatch.undo()
        chains.remove()


def test_the_text_for_people_is_ipsets_own(node: Host) -> None:
    text = ipset.render(SET, policy(count=2).peers_of(4))
    assert text == f"create {SET} hash:net family inet maxelem 2\nadd {SET} 10.0.0.0/32\nadd {SET} 10.0.0.4/32\n"


WORST_PORTS = tuple(PortRange(port, port, "x") for port in range(20001, 20513, 2))
WORST = tuple(f"eth{number}" for number in range(64))


def worst(*, peers: int = 32, interfaces: int = 64, ports: int = 256) -> Policy:
    """What an ordinary user may order, and no two things of it can be joined."""
    return Policy(RUN, WORST_PORTS[:ports], many(count=peers), WORST[:interfaces])


def rules(host: Host, backend: str) -> int:
    return saved(host, backend).count("-A SECURERUN ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_peers_interfaces_and_ports_are_never_multiplied_into_rules(node: Host, backend: str) -> None:
    with inside(node):
        chains = open_chains(backend, RUN)
        for peers, interfaces, ports in (
            (32, 64, 256),
            (2, 64, 256),
            (32, 3, 15),
            (0, 0, 256),
            (32, 0, 60),
            (1, 64, 75),
        ):
            chains.install(worst(peers=peers, interfaces=interfaces, ports=ports), 77)
            assert chains.stand()
            assert 0 < rules(node, backend) <= 72, (peers, interfaces, ports)
        chains.remove()
        assert ip_set.size(f"securerun-{RUN}-p") is None
    assert "SECURERUN" not in saved(node, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ports_in_a_set_are_closed_to_all_but_peers_and_the_others_stay_open(network: Network, backend: str) -> None:
    node, peer, stranger = network
    planned, beside = (20001, 20511), (20002, 20510)
    targets = [(address, port) for address in node.addresses for port in (*planned, *beside)]
    with inside(node):
        listeners = [
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True) for _, port in targets[:4]
        ]
        chains = open_chains(backend, RUN)
        chains.install(Policy(RUN, WORST_PORTS, many(*peer.addresses, count=5), ("eth0", "eth1")), None)
    assert f"--match-set securerun-{RUN}-p dst" in saved(node, backend)
    assert reach(peer, targets) == dict.fromkeys(targets, True)
    assert reach(stranger, targets) == {(address, port): port in beside for address, port in targets}
    with inside(node):
        chains.install(Policy(RUN, (*WORST_PORTS, PortRange(20002, 20002, "x")), many(*peer.addresses, count=5)), None)
        assert chains.stand()
    assert reach(stranger, targets) == {(address, port): port == 20510 for address, port in targets}
    with inside(node):
        flush(f"securerun-{RUN}-p")
        assert not chains.stand()
        chains.remove()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_without_sets_gets_no_more_than_512_rules(
    node: Host, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such_subsystem(name: str, _members: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", name)

    monkeypatch.setattr(ipset, "put", no_such_subsystem)
    with inside(node):
        chains = open_chains(backend, RUN)
        with pytest.raises(TooManyRules, match="--firewall nftables"):
            chains.install(worst(), None)
        assert "SECURERUN" not in saved(node, backend)
        chains.install(worst(peers=32, interfaces=16, ports=15), None)
        assert rules(node, backend) == 32 * 16 + 1
        before = saved(node, backend)
        with pytest.raises(TooManyRules):
            chains.install(worst(peers=32, interfaces=17, ports=15), None)
        assert rules(node, backend) == before.count("-A SECURERUN "), "what stood does not stand any more"
        chains.remove()


def test_a_script_has_no_more_than_512_rules_either() -> None:
    with pytest.raises(PolicyError, match="--firewall nftables"):
        script.render(worst(), "iptables", [])
    assert script.render(worst(peers=32, interfaces=16, ports=15), "legacy", []).count("-j RETURN") == 2 * 512
    assert script.render(worst(), "nftables", [])


def test_the_text_of_ports_for_people_is_ipsets_own() -> None:
    text = ipset.render("securerun-x-p", [(7, 7), (20, 30)])
    assert text == "create securerun-x-p bitmap:port range 1-65535\nadd securerun-x-p 7-7\nadd securerun-x-p 20-30\n"
