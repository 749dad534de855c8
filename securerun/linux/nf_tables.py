"""Ask nf_tables what exists, and take an unused base chain away without hitting anyone else's.

iptables-nft makes `table ip filter` and the base chain it needs, and never removes them
(iptables/nft.c: nft_xt_builtin_init), so what our rules brought into being has to be undone here.
NLM_F_NONREC makes the kernel itself refuse, with EBUSY, to delete a chain that has rules or a table that
has chains, sets or objects (net/netfilter/nf_tables_api.c: nf_tables_delchain, nf_tables_deltable);
without that flag it deletes all of the content too.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from securerun.linux import netlink
from securerun.linux.netlink import Attributes
from securerun.linux.nfnetlink import (
    NF_TABLES,
    attributes_of,
    family_of,
    number,
    open_channel,
    request,
    text,
    transaction,
    type_of,
)

# include/uapi/linux/netfilter/nf_tables.h: enum nf_tables_msg_types
_NEW_TABLE, _GET_TABLE, _DELETE_TABLE, _NEW_CHAIN, _GET_CHAIN, _DELETE_CHAIN, _NEW_RULE, _GET_RULE, _DELETE_RULE = (
    type_of(NF_TABLES, message) for message in range(9)
)
_TABLE_NAME, _TABLE_FLAGS = 1, 2
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_USE = 1, 3, 4, 5, 6
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_PRIORITY = struct.Struct("!i")
_INPUT_HOOK = 1  # NF_INET_LOCAL_IN
_RULE_TABLE, _RULE_CHAIN = 1, 2
_HAS_OWNER = 0x2  # NFT_TABLE_F_OWNER
_POLICY_ACCEPT = 1
_EVENTS = 7  # NFNLGRP_NFTABLES

# include/uapi/linux/netfilter.h: NFPROTO_INET, which is both, NFPROTO_IPV4, NFPROTO_IPV6
INET = 1
IPV4 = socket.AF_INET
IPV6 = socket.AF_INET6


def chain_exists(family: int, table: str, chain: str) -> bool:
    """Return whether nf_tables has this chain.

    Raises OSError when the kernel has no nf_tables or permits no look.
    """
    return _get_chain(family, table, chain) is not None


def table_exists(family: int, table: str) -> bool:
    """Return whether nf_tables has this table. Raises OSError as `chain_exists` does."""
    return _get_table(family, table) is not None


@dataclass(frozen=True)
class BaseChain:
    """A chain that the kernel itself hands packets to. family: as in netfilter. rules: whether it has any."""

    family: int
    table: str
    name: str
    accepts: bool
    rules: bool


def input_chains() -> tuple[BaseChain, ...]:
    """Return the base chains that see packets to this host's own sockets. Raises OSError as `chain_exists` does."""
    found = []
    for answer in _dump(request(_GET_CHAIN, socket.AF_UNSPEC, b"", netlink.DUMP), _NEW_CHAIN):
        chain, family = attributes_of(answer), family_of(answer)
        hook = netlink.attributes(chain.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER)
        if family not in (INET, IPV4, IPV6) or hook is None or number(hook) != _INPUT_HOOK:
            continue
        table, name = (
            chain.get(key, b"").rstrip(b"\0").decode(errors="replace") for key in (_CHAIN_TABLE, _CHAIN_NAME)
        )
        accepts = number(chain.get(_CHAIN_POLICY)) == _POLICY_ACCEPT
        # Each rule counts as a use of its chain (net/netfilter/nf_tables_api.c, nf_tables_newrule).
        found.append(BaseChain(family, table, name, accepts, number(chain.get(_CHAIN_USE)) > 0))
    return tuple(found)


def tables(family: int) -> dict[str, bool]:
    """Return the names of all tables of a family, and whether each belongs to a socket. Raises OSError."""
    found = (attributes_of(answer) for answer in _dump(request(_GET_TABLE, family, b"", netlink.DUMP), _NEW_TABLE))
    return {
        table.get(_TABLE_NAME, b"").rstrip(b"\0").decode(errors="replace"): bool(
            number(table.get(_TABLE_FLAGS)) & _HAS_OWNER
        )
        for table in found
    }


def table_has_owner(family: int, table: str) -> bool:
    """Return whether this table is there and belongs to a socket. Raises OSError as `chain_exists` does."""
    found = _get_table(family, table)
    return found is not None and bool(number(found.get(_TABLE_FLAGS)) & _HAS_OWNER)


def priority_of(family: int, table: str, chain: str) -> int | None:
    """Return the priority of a base chain; None where there is none of this name. Raises OSError as `chain_exists`."""
    found = _get_chain(family, table, chain)
    if found is None or _CHAIN_HOOK not in found:
        return None
    (priority,) = netlink.unpacked(_PRIORITY, netlink.attributes(found[_CHAIN_HOOK])[_HOOK_PRIORITY])
    return int(priority)


def count_rules(family: int, table: str, word: str) -> int:
    """Count the rules of a table that have this text in them, as in a comment. Raises OSError as `chain_exists`."""
    question = request(_GET_RULE, family, text(_RULE_TABLE, table), netlink.DUMP)
    return sum(word.encode() in rule for rule in _dump(question, _NEW_RULE))


def delete_unused_chain(family: int, table: str, chain: str) -> bool:
    """Delete a base chain that has no rules and policy accept.

    Returns False, with nothing changed, when it is used or gone. Raises OSError for anything else.
    """
    found = _get_chain(family, table, chain)
    if found is None or number(found.get(_CHAIN_POLICY)) != _POLICY_ACCEPT:
        return False
    return _delete(_DELETE_CHAIN, family, text(_CHAIN_TABLE, table) + text(_CHAIN_NAME, chain))


def delete_empty_table(family: int, table: str) -> bool:
    """Delete a table with nothing in it. Returns False, with nothing changed, when it is used or gone."""
    return _delete(_DELETE_TABLE, family, text(_TABLE_NAME, table))


def delete_table(family: int, table: str) -> bool:
    """Delete a table with all that is in it. Returns False when it is gone. Raises OSError for anything else."""
    return _delete(_DELETE_TABLE, family, text(_TABLE_NAME, table), with_content=True)


class Deletions:
    """Hears when a table of a name, one of its chains, or one of its rules that interest us is deleted.

    chain: all rules of this chain interest us. word: so do rules in which this text stands, as in a comment.
    Raises OSError where the kernel has no nf_tables or permits no listening.
    """

    def __init__(self, table: str, chain: str, word: str) -> None:
        self._table, self._chain, self._word = table.encode(), chain.encode(), word.encode()
        self._channel = open_channel(_EVENTS)
        self._channel.stop_waiting()

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._channel.fileno()

    def heard(self) -> bool:
        """Take in all that happened since, and return whether any of it was such a deletion."""
        heard = False
        while True:
            try:
                events = netlink.messages(self._channel.receive())
                heard |= any(self._concerns(kind, payload) for kind, _, payload in events)
            except BlockingIOError:
                return heard
            except OSError:
                return True  # ENOBUFS: more happened than was kept for us

    def close(self) -> None:
        """Stop listening."""
        self._channel.close()

    def _concerns(self, kind: int, payload: bytes) -> bool:
        if kind not in (_DELETE_TABLE, _DELETE_CHAIN, _DELETE_RULE):
            return False
        # The table's name is the first attribute of all three (nf_tables.h).
        named = attributes_of(payload)
        if named.get(_TABLE_NAME, b"").rstrip(b"\0") != self._table:
            return False
        if kind != _DELETE_RULE:
            return True
        return named.get(_RULE_CHAIN, b"").rstrip(b"\0") == self._chain or self._word in payload


def _get_table(family: int, table: str) -> Attributes | None:
    return _ask(request(_GET_TABLE, family, text(_TABLE_NAME, table)))


def _get_chain(family: int, table: str, chain: str) -> Attributes | None:
    return _ask(request(_GET_CHAIN, family, text(_CHAIN_TABLE, table) + text(_CHAIN_NAME, chain)))


def _ask(question: bytes) -> Attributes | None:
    """Return what the one answer says; None where there is no such thing."""
    with open_channel() as channel:
        try:
            return attributes_of(channel.ask(question))
        except FileNotFoundError:
            return None


def _dump(question: bytes, wanted: int) -> list[bytes]:
    with open_channel() as channel:
        return channel.listed(question, wanted)


def _delete(kind: int, family: int, name: bytes, *, with_content: bool = False) -> bool:
    how = 0 if with_content else netlink.NOT_RECURSIVE
    deletion = request(kind, family, name, netlink.ACKNOWLEDGE | how)
    with open_channel() as channel:
        try:
            channel.order(transaction(NF_TABLES, deletion))
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENOENT):
                return False
            raise
    return True
