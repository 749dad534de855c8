"""What --public says: which ports, for whom, and what is refused before anything is started."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from securerun.errors import PolicyError
from securerun.firewall import dispatcher
from securerun.firewall.policy import Opening, Policy, PortRange, Purpose
from securerun.job.public import openings, within
from securerun.linux.networks import Network, collapse

STORE = PortRange(29500, 29500, Purpose.STATIC_STORE)


def networks(*texts: str) -> tuple[Network, ...]:
    return collapse(ipaddress.ip_network(text) for text in texts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080", [(8080, 8080)]),
        (
            "8080,9090=10.0.0.0/8,10.1.0.0/16; 9100",
            [(8080, 8080, "10.0.0.0/8"), (9090, 9090, "10.0.0.0/8"), (9100, 9100)],
        ),
        (" 8080 - 8090 = 10.0.0.1 fd00::/64 ;; 1 ;", [(1, 1), (8080, 8090, "10.0.0.1", "fd00::/64")]),
        ("65535=::ffff:10.0.0.1,10.0.0.0/31", [(65535, 65535, "10.0.0.0/31")]),
        ("8080=0.0.0.0/0,::/0", [(8080, 8080, "0.0.0.0/0", "::/0")]),
    ],
)
def test_ports_are_for_everybody_or_for_the_networks_behind_them(text: str, expected: list[tuple[int, ...]]) -> None:
    assert openings(text, "--public") == tuple(
        Opening(first, last, networks(*map(str, whom))) for first, last, *whom in expected
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", ["port 0 is outside 1-65535"]),
        ("65536", ["port 65536 is outside 1-65535"]),
        ("8090-8080", ["crossed", "write 8080-8090"]),
        ("http", ["'http' is no port", "8080,9090=10.0.0.0/8;9100"]),
        ("8080:10.0.0.0/8", ["'8080:10.0.0.0/8' is no port"]),
        ("8080=", ["nobody stands after '8080='", "write '8080' alone"]),
        ("=10.0.0.0/8", ["names no port before ="]),
        ("8080=node1", ["'node1' is no address and no network", "names are not looked up here"]),
        ("8080=any", ["'any' is no address", "no = at all for every host"]),
        ("8080=10.0.0.1/8", ["10.0.0.1/8 is an address within a network", "write 10.0.0.0/8"]),
        ("8080=fe80::1%eth0", ["scope id"]),
        ("8080=10.0.0.0/8=1", ["'10.0.0.0/8=1'"]),
        (" ; ", ["names no port"]),
        ("8080;8080=10.0.0.0/8", ["port 8080 is named twice", "with all of its networks"]),
        ("8080-8090,8085", ["port 8085 is named twice"]),
        (",".join(str(port) for port in range(2000, 2130, 2)), ["65 ports and ranges are more than the 64"]),
        ("8080=" + ",".join(f"10.{n}.0.0/24" for n in range(65)), ["65 networks are more than the 64"]),
        (
            ",".join(str(port) for port in range(2000, 2020, 2)) + "=" + ",".join(f"10.{n}.0.0/24" for n in range(30)),
            ["300 pairs", "256 are the most"],
        ),
        ("8080=" + "1" * 5000, ["'" + "1" * 60 + "...'"]),
        ("8" * 20000, ["20000 characters are too many"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_public_port_that_cannot_be_right_is_refused_in_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        openings(text, "SECURERUN_PUBLIC")
    said = str(error.value)
    assert error.value.status == 78
    assert said.startswith("SECURERUN_PUBLIC: ") and "\n" not in said and len(said) < 400
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "purpose",
    [
        Purpose.C10D_STORE,
        Purpose.STATIC_STORE,
        Purpose.PARALLEL_STORE,
        Purpose.ENDPOINT,
        Purpose.MASTER_PORT,
        Purpose.HCCL,
        Purpose.HCCL_DEFAULT,
        Purpose.RANK_TABLE,
    ],
)
def test_what_only_the_jobs_nodes_may_reach_is_never_public(purpose: Purpose) -> None:
    for text in ("60003", "1-65535", "60015=10.0.0.0/8"):
        with pytest.raises(PolicyError) as error:
            within([PortRange(60000, 60015, purpose)], openings(text, "--public"), "--public")
        assert "is among 60000-60015, which" in str(error.value)
        assert str(purpose) in str(error.value) or "HCCL" in str(error.value)
        public = openings(text, "--public")
        with pytest.raises(PolicyError, match="the job's own nodes"):
            Policy("0123456789ab", (PortRange(60000, 60015, purpose),), (), public=public)


def test_a_public_port_wins_over_the_same_port_of_ports() -> None:
    added = PortRange(8000, 8100, Purpose.ADDED)
    plan = within([STORE, added], openings("8000;8080-8085;8090=10.0.0.0/8", "--public"), "--public")
    assert plan == (
        PortRange(8001, 8079, Purpose.ADDED),
        PortRange(8086, 8089, Purpose.ADDED),
        PortRange(8090, 8090, Purpose.PUBLIC),
        PortRange(8091, 8100, Purpose.ADDED),
        STORE,
    )
    assert within([added], openings("7000-9000", "--public"), "--public") == ()


def test_a_policy_closes_a_public_port_to_all_but_its_networks_and_to_nobody_where_it_has_none() -> None:
    planned = (PortRange(8080, 8080, Purpose.ADDED),)
    with pytest.raises(PolicyError, match="for every host, and planned to be closed"):
        Policy("0123456789ab", planned, (), public=openings("8080", "--public"))
    with pytest.raises(PolicyError, match="not planned to be closed to all others"):
        Policy("0123456789ab", planned, (), public=openings("8080-8081=10.0.0.0/8", "--public"))


def test_public_ports_never_become_many_rules_nor_an_accept() -> None:
    # 27 networks with 8 ranges each, and as many with one port as are left: what costs the most.
    many = ",".join(f"{port}-{port + 1}" for port in range(2000, 2024, 3))
    text = f"{many}={','.join(f'10.{n}.0.0/24' for n in range(27))}; 9={','.join(f'11.{n}.0.0/24' for n in range(37))}"
    public = openings(text, "--public")
    plan = within([], public, "--public")
    policy = Policy("0123456789ab", plan, networks("10.77.0.2"), accept=True, public=public)
    without = replace(policy, public=())
    rules = set(dispatcher.passes(policy, 4)) - set(dispatcher.passes(without, 4))
    assert len(rules) == 91
    assert all(rule.endswith("-j RETURN") for rule in rules)
    assert set(dispatcher.passes(policy, 6)) == set(dispatcher.passes(without, 6))
