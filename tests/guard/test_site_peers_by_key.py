"""`peers` in guard.toml binds ordinary users who have a key as well: the shield asks both, and addresses go as ever."""

from __future__ import annotations

import json

import kernel
import pytest
from attacking import Ground
from holding import HOLDER, Held
from ways_in import SECRET, by_address, by_key

PORT = 7100
OPTIONS = ("--key", SECRET.hex(), "--ports", str(PORT), "--listen", str(PORT))


@pytest.fixture
def bound(ground: Ground) -> Ground:
    """The site allows peers from the peer's address alone."""
    kernel.require(kernel.TAGS)
    ground.machine.configure(f'peers = ["{ground.peer.ipv4}/32"]')
    return ground


def recorded(ground: Ground, holder: Held) -> dict[str, object]:
    path = ground.machine.place(f"/run/securerun/{holder.run_id}.json")
    policy: dict[str, object] = json.loads(path.read_text())["policy"]
    return policy


def ground_status(ground: Ground) -> str:
    return ground.run(ground.alice, ["securerunctl", "status"]).stdout


@pytest.mark.parametrize("named", [True, False], ids=["named", "nobody-named"])
def test_a_tag_counts_from_the_sites_peers_alone_and_who_is_named_comes_in_as_ever(bound: Ground, named: bool) -> None:
    node, peer, stranger = bound.node, bound.peer, bound.stranger
    options = ("--peers", peer.ipv4) if named else ("--require-key",)
    holder = bound.holder(bound.alice, *OPTIONS, *options)
    said = " ".join(holder.start["notes"])
    assert f"a tag of the job's key counts from {peer.ipv4} alone" in said and "/etc/securerun/guard.toml" in said
    assert by_key(peer, node, PORT) and not by_key(stranger, node, PORT)
    assert by_address(peer, node, PORT) is named and not by_address(stranger, node, PORT)
    policy = recorded(bound, holder)
    assert policy["tags_from"] == [f"{peer.ipv4}/32"] and policy["peers"] == ([f"{peer.ipv4}/32"] if named else [])
    shown = ground_status(bound)
    assert f"whoever has the job's key and comes from {peer.ipv4}/32" in shown, shown
    # And for all peers that are named later: none may be that the site does not allow.
    holder.say(stranger.ipv4)
    assert "may not be named a peer" in holder.hear_of("a part of the guard's work fails")["news"]
    assert not by_address(stranger, node, PORT) and not by_key(stranger, node, PORT)
    holder.let_go()


def test_both_are_asked_for_where_a_tag_is_insisted_on_and_peers_are_named(bound: Ground) -> None:
    holder = bound.holder(bound.alice, *OPTIONS, "--require-key", "--peers", bound.peer.ipv4)
    assert by_key(bound.peer, bound.node, PORT)
    assert not by_address(bound.peer, bound.node, PORT) and not by_key(bound.stranger, bound.node, PORT)
    holder.let_go()


def test_a_site_that_allows_no_peers_allows_none_with_a_key(ground: Ground) -> None:
    kernel.require(kernel.TAGS)
    ground.machine.configure("peers = []")
    holder = ground.holder(ground.alice, *OPTIONS)
    assert "no key (this host allows no peers" in " ".join(holder.start["notes"])
    assert not by_key(ground.peer, ground.node, PORT)
    holder.let_go()
    refused = Held(ground.popen(ground.alice, ["python", str(HOLDER), *OPTIONS, "--require-key"]))
    assert "this host allows no peers" in refused.start["refused"]


def test_nobody_is_named_a_peer_of_a_run_whose_only_way_in_is_a_tag(ground: Ground) -> None:
    kernel.require(kernel.TAGS)
    holder = ground.holder(ground.alice, *OPTIONS, "--require-key")
    holder.say(ground.stranger.ipv4)
    assert "the only way in to this run is a tag" in holder.hear_of("a part of the guard's work fails")["news"]
    assert not by_address(ground.stranger, ground.node, PORT)
    assert recorded(ground, holder)["peers"] == []
    holder.let_go()
