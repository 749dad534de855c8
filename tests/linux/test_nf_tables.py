"""nf_tables asked without its library: what is there, what is ours to delete, and what the kernel refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Callable

import pytest
from cgroups import in_child, inside
from hosts import Host, Network
from sandbox import NOBODY

from securerun.linux import nf_tables
from securerun.linux.nf_tables import Deletions

INET = 1
TABLE = """
table inet t {
    chain base { type filter hook input priority 5; policy accept; tcp dport 7 accept comment "mine"; }
    chain empty { type filter hook input priority -5; policy accept; }
    chain strict { type filter hook input priority 6; policy drop; }
    chain plain { }
}
"""


@pytest.fixture
def node(network: Network) -> Iterator[Host]:
    """A host with a table, and this thread in it."""
    node = network["node0"]
    node.run(["nft", "-f", "-"], text_input=TABLE, check=True)
    with inside(node):
        yield node


def test_what_is_there_is_told_from_what_is_not(node: Host) -> None:
    assert nf_tables.table_exists(INET, "t") and not nf_tables.table_exists(INET, "u")
    assert nf_tables.chain_exists(INET, "t", "plain") and not nf_tables.chain_exists(INET, "t", "other")
    assert not nf_tables.table_has_owner(INET, "t") and not nf_tables.table_has_owner(INET, "u")
    assert nf_tables.priority_of(INET, "t", "base") == 5
    assert nf_tables.priority_of(INET, "t", "empty") == -5
    assert nf_tables.priority_of(INET, "t", "plain") is None
    assert nf_tables.priority_of(INET, "u", "base") is None
    assert (nf_tables.count_rules(INET, "t", "mine"), nf_tables.count_rules(INET, "t", "yours")) == (1, 0)
    found = {(chain.table, chain.name): (chain.accepts, chain.rules) for chain in nf_tables.input_chains()}
    assert found == {("t", "base"): (True, True), ("t", "empty"): (True, False), ("t", "strict"): (False, False)}


def test_only_what_nobody_uses_is_deleted(node: Host) -> None:
    assert not nf_tables.delete_unused_chain(INET, "t", "base")
    assert not nf_tables.delete_unused_chain(INET, "t", "strict")
    assert not nf_tables.delete_unused_chain(INET, "t", "other")
    assert nf_tables.delete_unused_chain(INET, "t", "empty")
    assert not nf_tables.chain_exists(INET, "t", "empty")
    assert not nf_tables.delete_empty_table(INET, "t")
    assert not nf_tables.delete_empty_table(INET, "u")
    node.run(["nft", "flush table inet t; delete chain inet t base; delete chain inet t strict"], check=True)
    node.run(["nft", "delete chain inet t plain"], check=True)
    assert nf_tables.delete_empty_table(INET, "t")


@pytest.mark.parametrize(
    "ask",
    [
        lambda: nf_tables.table_exists(INET, "t"),
        nf_tables.input_chains,
        lambda: nf_tables.delete_empty_table(INET, "t"),
        lambda: Deletions("t", "base", "mine"),
    ],
    ids=["ask", "dump", "delete", "listen"],
)
def test_what_an_ordinary_user_may_not_ask_is_an_error_and_no_answer(node: Host, ask: Callable[[], object]) -> None:
    def work() -> int | None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(OSError, match="not permitted") as refusal:
            ask()
        return refusal.value.errno

    assert in_child(work) == errno.EPERM


def test_of_all_deletions_those_that_concern_us_are_heard(node: Host) -> None:
    """Rules of the named chain, rules with the word, the table and its chains; and nothing else."""

    def heard_after(*commands: str) -> bool:
        for command in commands:
            node.run(["nft", command], check=True)
        return deletions.heard()

    deletions = Deletions("t", "base", "mine")
    assert not heard_after("add rule inet t plain tcp dport 8 accept", "flush chain inet t plain")
    assert heard_after("flush chain inet t base")
    assert heard_after('add rule inet t plain tcp dport 8 accept comment "mine"', "flush chain inet t plain")
    assert not heard_after("add table inet other", "delete table inet other")
    assert heard_after("delete chain inet t plain")
    assert heard_after("delete table inet t")
    deletions.close()
