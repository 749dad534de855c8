"""What the guard permits of public ports: what guard.toml says, and none but its own to who takes a run over."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from securerun.errors import PolicyError, PrivilegeError
from securerun.firewall.policy import Opening, Policy, PortRange, Purpose
from securerun.guard.limits import _understood, require_permitted
from securerun.guard.protocol import Order
from securerun.guard.takeover import take_over
from securerun.linux.networks import collapse

EVERY, TEN, ELEVEN, SIX = (), ("10.9.0.0/16",), ("11.0.0.0/16",), ("fd00::/16",)
ALL = (EVERY, TEN, ELEVEN, SIX)


class Caller:
    """An ordinary user, as the limits look at one."""

    user = 6001
    groups = frozenset({6001})
    is_root = False
    container = ""


def order(*networks: str, port: int = 7001, last: int = 0) -> Order:
    opening = Opening(port, last or port, collapse(map(ipaddress.ip_network, networks)))
    ports = (PortRange(opening.first, opening.last, Purpose.PUBLIC),) if networks else ()
    return Order(Policy("0123456789ab", ports, (), public=(opening,)), "auto", "auto", 1.0, "train.py")


def is_permitted(limits: dict[str, Any], asked: Order) -> bool:
    try:
        require_permitted(_understood(limits), asked, Caller())  # type: ignore[arg-type]
    except PolicyError as error:
        assert "guard.toml" in str(error) and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("limits", "permitted"),
    [
        ({}, ALL),
        ({"public": True}, ALL),
        ({"public": False}, ()),
        ({"public": []}, ()),
        ({"public": ["10.0.0.0/8", "fd00::/8"]}, (TEN, SIX)),
        ({"public": ["0.0.0.0/0"]}, (TEN, ELEVEN)),
        ({"public": ["0.0.0.0/0", "::/0"]}, ALL),
        ({"peers": ["10.0.0.0/8"]}, (TEN,)),
        ({"peers": ["10.0.0.0/8"], "public": True}, ALL),
        ({"peers": ["10.0.0.0/8"], "public": ["11.0.0.0/8"]}, (ELEVEN,)),
        ({"peers": ["10.0.0.0/8"], "public": False}, ()),
    ],
    ids=str,
)
def test_a_site_says_whom_public_ports_may_be_for(limits: dict[str, Any], permitted: tuple[tuple[str, ...]]) -> None:
    assert tuple(networks for networks in ALL if is_permitted(limits, order(*networks))) == permitted


def test_public_ports_count_among_those_that_may_be_named() -> None:
    assert is_permitted({}, order(port=2000, last=2255))
    assert not is_permitted({}, order(port=2000, last=2256))
    assert not is_permitted({}, order(port=1023, last=1024))
    assert not is_permitted({"ports": ["20000-30000"]}, order(port=7001))


@pytest.mark.parametrize("wrong", ["10.0.0.0/33", 1.5, ["node1"], [["10.0.0.0/8"]], {}])
def test_what_cannot_be_understood_serves_nobody(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"public|10\.0\.0\.0/33|node1"):
        _understood({"public": wrong})


def test_whoever_takes_a_run_over_has_the_public_ports_that_its_shield_has() -> None:
    """The shield stays as it is, so an order with others would say what is not so, in chains and record."""
    asked = replace(order(port=7001), adopt=True)
    standing = SimpleNamespace(
        run_id=asked.policy.run_id, launcher=1, launcher_start=2, user=3, guard=4, guard_lives=False
    )
    lease = SimpleNamespace(order=asked, caller=SimpleNamespace(pid=1, start=2, user=3), stands=False)
    for public in ((), (Opening(7002, 7002),)):
        standing.policy = replace(asked.policy, public=public)
        with pytest.raises(PrivilegeError, match="has other public ports"):
            take_over(lease, standing)  # type: ignore[arg-type]
    assert not lease.stands
