"""The program that writes tags: a sock_ops program on the job's cgroup. Asks the kernel nothing.

The kernel calls it when a socket of the job begins to connect or to listen; there it asks for room in the headers of
what opens connections, and gets it for SYNs and SYN-ACKs towards where nodes can be. Once a connection stands it asks
no more, or each packet of data would carry the option. Linux 5.10 (BPF_SOCK_OPS_WRITE_HDR_OPT_CB).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from securerun.firewall import siphash, tag
from securerun.firewall.policy import Opening
from securerun.firewall.program_steps import point
from securerun.firewall.tag_program import lay_end, look_up_network
from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    R8,
    R9,
    R10,
    Helper,
    Label,
    Remark,
    Statement,
    calculate,
    call,
    constant,
    from_network_order,
    jump,
    jump_if,
    leave,
    load,
    store,
)

WRITING_NAME = "securerun_write"

# include/uapi/linux/bpf.h: offsets in struct bpf_sock_ops, what the kernel calls for, and the flag that asks for it
_OPERATION, _FAMILY, _CALLBACK_FLAGS = 0, 20, 84
_REMOTE_IPV4, _LOCAL_IPV4, _REMOTE_IPV6, _LOCAL_IPV6 = 24, 28, 32, 48
_IS_FULL_SOCKET, _TOTAL_RETRANSMISSIONS, _HEADER, _HEADER_END, _LENGTH, _TCP_FLAGS = 72, 136, 192, 200, 208, 212
_CONNECTS, _HAS_CONNECTED, _HAS_ACCEPTED, _LISTENS, _RESERVES, _WRITES = 3, 4, 5, 11, 14, 15
_WRITE_OPTION = 64
_AF_INET = 2

# Offsets in a TCP header
_SOURCE_PORT, _SEQUENCE, _ACKNOWLEDGED, _DATA_OFFSET, _TCP_HEADER = 0, 4, 8, 12, 20
_SYN, _ACK = 0x02, 0x10

# The stack: all of it is written by stores of 8 bytes at multiples of 8 (`shield_program`), but for the option's head.
_ADDRESS = -16
_MESSAGE = -40
_MESSAGE_WORDS = (_MESSAGE, _MESSAGE + 8, _MESSAGE + 16)
_NETWORK = -64
_OPTION = -84
_MAPPED_WORD = 0xFFFF0000


@functools.cache
def writing_program(public: tuple[Opening, ...] = ()) -> tuple[Statement, ...]:
    """Write tags. Another program's flags are left as they are, and so is what it answers to the kernel.

    public: whence answers carry none. Others get those: with a sequence number of their choice they would have made
    for them what a node of the job waits for elsewhere.
    Made once: a guard loads it for the proof, and for the job.
    """
    return (
        calculate(R6, "=", R1),
        load(R7, 4, R6, _OPERATION),
        jump_if(R7, "==", _CONNECTS, "connects"),
        jump_if(R7, "==", _LISTENS, "ask"),
        jump_if(R7, "==", _HAS_CONNECTED, "ask no more"),
        jump_if(R7, "==", _HAS_ACCEPTED, "ask no more"),
        jump_if(R7, "==", _RESERVES, "option"),
        jump_if(R7, "==", _WRITES, "option"),
        jump("end"),
        *_ask(),
        *_choose_packets(),
        *_reserve(),
        *_write(public),
        Label("end"),
        calculate(R0, "=", 1),
        leave(),
    )


def _ask() -> Iterator[Statement]:
    """Set the flag or clear it, and no other."""
    yield Label("connects")
    yield Remark("to where nodes can be?")
    yield from _lay_address(_REMOTE_IPV4, _REMOTE_IPV6, "target")
    yield from look_up_network(_ADDRESS, _NETWORK, "version of a target")
    yield jump_if(R0, "==", 0, "end")
    yield Label("ask")
    yield load(R2, 4, R6, _CALLBACK_FLAGS)
    yield calculate(R2, "|=", _WRITE_OPTION)
    yield jump("flags")
    yield Label("ask no more")
    yield load(R2, 4, R6, _CALLBACK_FLAGS)
    yield calculate(R2, "&=", ~_WRITE_OPTION)
    yield Label("flags")
    yield calculate(R1, "=", R6)
    yield call(Helper.SOCK_OPS_CB_FLAGS_SET)
    yield jump("end")


def _choose_packets() -> Iterator[Statement]:
    """Go on with a SYN, or a listener's SYN-ACK, that goes where nodes can be; its flags are in r8.

    A socket that opens a connection itself, and gets a SYN, answers whoever sent it (simultaneous open), and they chose
    the number that it acknowledges: with a tag they would have what a node of the job waits for elsewhere. A listener's
    answer has no full socket (net/ipv4/tcp_output.c, bpf_skops_write_hdr_opt()).

    Others may have asked for the option too, so the flag tells nothing here. There is no packet, and no flags, where
    the kernel asks how much room data will have.
    """
    yield Label("option")
    yield load(R8, 4, R6, _TCP_FLAGS)
    yield calculate(R8, "&=", _SYN | _ACK)
    yield calculate(R2, "=", R8)
    yield calculate(R2, "&=", _SYN)
    yield jump_if(R2, "==", 0, "end")
    yield jump_if(R8, "==", _SYN, "where to")
    yield load(R2, 4, R6, _IS_FULL_SOCKET)
    yield jump_if(R2, "!=", 0, "end")
    yield Label("where to")
    yield from _lay_address(_REMOTE_IPV4, _REMOTE_IPV6, "other")
    yield from look_up_network(_ADDRESS, _NETWORK, "version of the other")
    yield jump_if(R0, "==", 0, "end")
    yield load(R9, 4, R6, _LENGTH)
    yield jump_if(R7, "==", _WRITES, "write")


def _reserve() -> Iterator[Statement]:
    """Ask for room. A SYN with data gets no tag: whoever takes it sends an answer that has none either.

    net/ipv4/tcp_fastopen.c, tcp_fastopen_create_child(): the connection counts as established at once. Sent again, it
    has no data.
    """
    yield jump_if(R8, "!=", _SYN, "reserve")
    yield jump_if(R9, "!=", 0, "end")
    yield Label("reserve")
    yield calculate(R1, "=", R6)
    yield calculate(R2, "=", tag.SIZE)
    yield calculate(R3, "=", 0)
    yield call(Helper.RESERVE_HDR_OPT)
    yield jump("end")


def _write(public: tuple[Opening, ...]) -> Iterator[Statement]:
    """Hash the packet, whose TCP header is in r7, and write the option.

    Of a SYN that is sent again the port is left out: net/ipv4/tcp_output.c, __tcp_retransmit_skb() counts before it
    sends.
    """
    yield Label("write")
    yield load(R7, 8, R6, _HEADER)
    yield load(R2, 8, R6, _HEADER_END)
    yield calculate(R3, "=", R7)
    yield calculate(R3, "+=", _TCP_HEADER)
    yield jump_if(R3, ">", R2, "end")
    yield load(R3, 4, R7, _SEQUENCE)
    yield store(4, R10, _OPTION, tag.HEAD_WORD)
    yield jump_if(R8, "!=", _SYN, "answer")
    yield Remark("what others reserved for a SYN with data is theirs")
    yield load(R2, 1, R7, _DATA_OFFSET)
    yield calculate(R2, "&=", 0xF0)
    yield calculate(R2, ">>=", 2)
    yield jump_if(R9, "!=", R2, "end")
    yield load(R4, 2, R7, _SOURCE_PORT)
    yield load(R2, 4, R6, _TOTAL_RETRANSMISSIONS)
    yield jump_if(R2, "==", 0, "first SYN")
    yield calculate(R4, "=", tag.NO_PORT)
    yield store(4, R10, _OPTION, tag.HEAD_WORD_ONCE_MORE)
    yield Label("first SYN")
    yield from lay_end(_MESSAGE)
    yield from _lay_address(_LOCAL_IPV4, _LOCAL_IPV6, "source")
    for place in (0, 8):
        yield load(R2, 8, R10, _ADDRESS + place)
        yield store(8, R10, _MESSAGE + place, R2)
    yield from siphash.begin(tag.SYN_KEY)
    yield jump("hash")
    yield Label("answer")
    yield from _leave_public(public)
    yield calculate(R4, "=", tag.NO_PORT)
    yield from lay_end(_MESSAGE)
    yield load(R2, 4, R7, _ACKNOWLEDGED)
    yield store(8, R10, _MESSAGE, R2)
    yield calculate(R2, "=", 0)
    yield store(8, R10, _MESSAGE + 8, R2)
    yield from siphash.begin(tag.SYN_ACK_KEY)
    yield Label("hash")
    yield Remark("SipHash-2-4")
    yield from siphash.take_in(_MESSAGE_WORDS)
    yield store(8, R10, _OPTION + len(tag.HEAD), siphash.RESULT)
    yield calculate(R1, "=", R6)
    yield from point(R2, _OPTION)
    yield calculate(R3, "=", tag.SIZE)
    yield calculate(R4, "=", 0)
    yield call(Helper.STORE_HDR_OPT)


def _leave_public(public: tuple[Opening, ...]) -> Iterator[Statement]:
    """Write nothing to an answer from a public port; the kernel fills the room that was reserved with NOPs."""
    if not public:
        return
    yield load(R2, 2, R7, _SOURCE_PORT)
    yield from_network_order(R2, 2)
    for opening in public:
        yield jump_if(R2, "<", opening.first, "not public")
        yield jump_if(R2, "<", opening.last + 1, "end")
    yield Label("not public")


def _lay_address(ipv4: int, ipv6: int, name: str) -> Iterator[Statement]:
    """Lay an address of the socket to the stack, of IPv4 as ::ffff:a.b.c.d: so it is in a socket of IPv6 anyway."""
    yield load(R2, 4, R6, _FAMILY)
    yield jump_if(R2, "==", _AF_INET, f"{name} of IPv4")
    for place in (0, 8):
        yield load(R3, 4, R6, ipv6 + place)
        yield load(R2, 4, R6, ipv6 + place + 4)
        yield calculate(R2, "<<=", 32)
        yield calculate(R2, "|=", R3)
        yield store(8, R10, _ADDRESS + place, R2)
    yield jump(name)
    yield Label(f"{name} of IPv4")
    yield calculate(R2, "=", 0)
    yield store(8, R10, _ADDRESS, R2)
    yield load(R2, 4, R6, ipv4)
    yield calculate(R2, "<<=", 32)
    yield constant(R3, _MAPPED_WORD)
    yield calculate(R2, "|=", R3)
    yield store(8, R10, _ADDRESS + 8, R2)
    yield Label(name)
