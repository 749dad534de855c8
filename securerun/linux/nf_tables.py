"""Ask nf_tables what exists, and take an unused base chain away without hitting anyone else's.

iptables-nft makes `table ip filter` and the base chain it needs, and never removes them
(iptables/nft.c: nft_xt_builtin_init), so what our rules brought into being has to be undone here.
NLM_F_NONREC makes the kernel itself refuse, with EBUSY, to delete a chain that has rules or a table that
has chains, sets or objects (net/netfilter/nf_tables_api.c: nf_tables_delchain, nf_tables_deltable);
without that flag it deletes all of the content too.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_NETLINK_NETFILTER = 12
_SUBSYSTEM_NFTABLES = 10
# include/uapi/linux/netfilter/nf_tables.h: enum nf_tables_msg_types
_GET_TABLE, _DELETE_TABLE, _GET_CHAIN, _DELETE_CHAIN, _GET_RULE = 1, 2, 4, 5, 7
# include/uapi/linux/netfilter/nfnetlink.h
_BATCH_BEGIN, _BATCH_END = 16, 17
_TABLE_NAME, _TABLE_FLAGS = 1, 2
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_USE = 1, 3, 4, 5, 6
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_INPUT_HOOK = 1  # NF_INET_LOCAL_IN
_INPUT_FAMILIES = (1, socket.AF_INET, socket.AF_INET6)  # NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6
_RULE_TABLE = 1
_REQUEST, _ACKNOWLEDGE, _NOT_RECURSIVE, _DUMP = 0x1, 0x4, 0x100, 0x300
_ERROR_MESSAGE, _DONE_MESSAGE = 2, 3
_HAS_OWNER = 0x2  # NFT_TABLE_F_OWNER
_POLICY_ACCEPT = 1
_TIMEOUT_SECONDS = 5
_GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES
# NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE
_TABLE_DELETED, _CHAIN_DELETED, _RULE_DELETED = (_SUBSYSTEM_NFTABLES << 8 | deletion for deletion in (2, 5, 8))

IPV4 = socket.AF_INET
IPV6 = socket.AF_INET6


def chain_exists(family: int, table: str, chain: str) -> bool:
    """Whether nf_tables has this chain. Raises OSError when the kernel has no nf_tables or permits no look."""
    return _get_chain(family, table, chain) is not None


def table_exists(family: int, table: str) -> bool:
    """Whether nf_tables has this table. Raises OSError as `chain_exists` does."""
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
    """The base chains that see packets to this host's own sockets. Raises OSError as `chain_exists` does."""
    found = []
    for payload in _dump(_message(_GET_CHAIN, socket.AF_UNSPEC, b"", _REQUEST | _DUMP)):
        chain = attributes(payload[4:])
        hook = attributes(chain.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER)
        if payload[0] not in _INPUT_FAMILIES or hook is None or _number(hook) != _INPUT_HOOK:
            continue
        table, name = (
            chain.get(key, b"").rstrip(b"\0").decode(errors="replace") for key in (_CHAIN_TABLE, _CHAIN_NAME)
        )
        accepts = _number(chain.get(_CHAIN_POLICY)) == _POLICY_ACCEPT
        # Each rule counts as a use of its chain (net/netfilter/nf_tables_api.c, nf_tables_newrule).
        found.append(BaseChain(payload[0], table, name, accepts, _number(chain.get(_CHAIN_USE)) > 0))
    return tuple(found)


def table_has_owner(family: int, table: str) -> bool:
    """Whether this table is there and belongs to a socket. Raises OSError as `chain_exists` does."""
    found = _get_table(family, table)
    return found is not None and bool(_number(found.get(_TABLE_FLAGS)) & _HAS_OWNER)


def priority_of(family: int, table: str, chain: str) -> int | None:
    """The priority of a base chain; None where there is none of this name. Raises OSError as `chain_exists` does."""
    found = _get_chain(family, table, chain)
    if found is None or _CHAIN_HOOK not in found:
        return None
    (priority,) = struct.unpack("!i", attributes(found[_CHAIN_HOOK])[_HOOK_PRIORITY])
    return int(priority)


def count_rules(family: int, table: str, word: str) -> int:
    """How many rules of a table have this text in them, as in a comment. Raises OSError as `chain_exists` does."""
    question = _message(_GET_RULE, family, _text(_RULE_TABLE, table), _REQUEST | _DUMP)
    return sum(word.encode() in rule for rule in _dump(question))


def delete_unused_chain(family: int, table: str, chain: str) -> bool:
    """Delete a base chain that has no rules and policy accept.

    Returns False, with nothing changed, when it is used or gone. Raises OSError for anything else.
    """
    found = _get_chain(family, table, chain)
    if found is None or _number(found.get(_CHAIN_POLICY)) != _POLICY_ACCEPT:
        return False
    return _delete(_DELETE_CHAIN, family, _text(_CHAIN_TABLE, table) + _text(_CHAIN_NAME, chain))


def delete_empty_table(family: int, table: str) -> bool:
    """Delete a table with nothing in it. Returns False, with nothing changed, when it is used or gone."""
    return _delete(_DELETE_TABLE, family, _text(_TABLE_NAME, table))


def _get_table(family: int, table: str) -> dict[int, bytes] | None:
    answer = _ask(_message(_GET_TABLE, family, _text(_TABLE_NAME, table), _REQUEST))
    return None if answer is None else attributes(answer)


def _get_chain(family: int, table: str, chain: str) -> dict[int, bytes] | None:
    name = _text(_CHAIN_TABLE, table) + _text(_CHAIN_NAME, chain)
    answer = _ask(_message(_GET_CHAIN, family, name, _REQUEST))
    return None if answer is None else attributes(answer)


def _ask(question: bytes) -> bytes | None:
    """The attributes of the one answer, or None where there is no such thing (ENOENT)."""
    with open_channel() as channel:
        channel.send(question)
        for kind, payload in messages(channel.recv(65536)):
            if kind != _ERROR_MESSAGE:
                return payload[4:]
            (negative,) = struct.unpack_from("=i", payload)
            if negative == -errno.ENOENT:
                return None
            raise OSError(-negative, os.strerror(-negative))
    raise OSError(errno.EPROTO, "nf_tables gave no answer")


def _dump(question: bytes) -> Iterator[bytes]:
    """The payload of each message of a dump."""
    with open_channel() as channel:
        yield from (payload for _, payload in dumped(channel, question))


def _delete(kind: int, family: int, name: bytes) -> bool:
    order = _message(kind, family, name, _REQUEST | _ACKNOWLEDGE | _NOT_RECURSIVE)
    with open_channel() as channel:
        channel.send(_batch(_BATCH_BEGIN) + order + _batch(_BATCH_END))
        while True:
            for answer, payload in messages(channel.recv(65536)):
                if answer != _ERROR_MESSAGE:
                    continue
                (negative,) = struct.unpack_from("=i", payload)
                if -negative in (errno.EBUSY, errno.ENOENT):
                    return False
                if negative:
                    raise OSError(-negative, os.strerror(-negative))
                return True


def open_channel() -> socket.socket:
    """A netlink socket to netfilter. Raises OSError where the kernel has none or permits none."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    channel.settimeout(_TIMEOUT_SECONDS)
    return channel


def _message(kind: int, family: int, body: bytes, flags: int) -> bytes:
    return framed(_SUBSYSTEM_NFTABLES << 8 | kind, struct.pack("!BBH", family, 0, 0) + body, flags)


def _batch(kind: int) -> bytes:
    return framed(kind, struct.pack("!BBH", 0, 0, _SUBSYSTEM_NFTABLES), _REQUEST)


def framed(kind: int, payload: bytes, flags: int) -> bytes:
    """One netlink message with its header (RFC 3549, 2.3.2)."""
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 0, 0) + payload


def dumped(channel: socket.socket, question: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each message of a dump (RFC 3549, 2.3.2). Raises OSError for what the kernel reports."""
    channel.send(question)
    while True:
        for kind, payload in messages(channel.recv(65536)):
            if kind == _DONE_MESSAGE:
                return
            if kind == _ERROR_MESSAGE:
                (negative,) = struct.unpack_from("=i", payload)
                raise OSError(-negative, os.strerror(-negative))
            yield kind, payload


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The netlink messages of one datagram: type and payload of each (RFC 3549, 2.3.2)."""
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16:
            return
        yield kind, data[16:length]
        data = data[(length + 3) & ~3 :]


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute: length, type, value, padded to four bytes."""
    padding = b"\0" * (-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in `data` by type, the flags for nested and network order taken off."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def _number(value: bytes | None) -> int:
    return int.from_bytes(value, "big") if value else 0


class Deletions:
    """Hears when a table of a name, one of its chains, or one of its rules that interest us is deleted.

    chain: all rules of this chain interest us. word: so do rules in which this text stands, as in a comment.
    Raises OSError where the kernel has no nf_tables or permits no listening.
    """

    def __init__(self, table: str, chain: str, word: str) -> None:
        self._table, self._chain, self._word = table.encode(), chain.encode(), word.encode()
        self._channel = open_channel()
        try:
            self._channel.bind((0, 1 << (_GROUP_NFTABLES - 1)))
        except OSError:
            self._channel.close()
            raise
        self._channel.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._channel.fileno()

    def heard(self) -> bool:
        """Take in all that happened since; whether any of it was such a deletion."""
        heard = False
        while True:
            try:
                data = self._channel.recv(65536)
            except BlockingIOError:
                return heard
            except OSError:
                return True  # ENOBUFS: more happened than was kept for us
            heard |= any(self._concerns(kind, payload) for kind, payload in messages(data))

    def close(self) -> None:
        """Stop listening."""
        self._channel.close()

    def _concerns(self, kind: int, payload: bytes) -> bool:
        if kind not in (_TABLE_DELETED, _CHAIN_DELETED, _RULE_DELETED):
            return False
        # The table's name is the first attribute of all three, the chain's the second of a rule (nf_tables.h).
        named = attributes(payload[4:])
        if named.get(1, b"").rstrip(b"\0") != self._table:
            return False
        return kind != _RULE_DELETED or named.get(2, b"").rstrip(b"\0") == self._chain or self._word in payload
