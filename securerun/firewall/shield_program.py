"""The shield's programs: policy → what judges each packet, as the statements of a program. Asks the kernel nothing.

On the way in a program sees every packet for a socket that a process of the job made, and lets only peers open
connections. Who is told by more than an address is told by `tag_program`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from securerun.firewall.policy import Opening
from securerun.firewall.program_steps import count, load_packet, look_up
from securerun.firewall.shield_maps import (
    DENIED,
    INTERFACES,
    PEERS4,
    PEERS6,
    PUBLIC,
    PUBLIC_KEY_BITS,
    public_groups,
)
from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R6,
    R7,
    R8,
    R9,
    R10,
    Label,
    Remark,
    Statement,
    calculate,
    from_network_order,
    jump,
    jump_if,
    leave,
    load,
    store,
)

# include/uapi/linux/bpf.h: offsets in struct __sk_buff and struct bpf_sock
_CONTEXT_PROTOCOL = 16
CONTEXT_INTERFACE = 40
CONTEXT_SOCKET = 168
_SOCKET_PORT = 44
SOCKET_STATE = 72

# drivers/net/loopback.c: the loopback is the first device of every network namespace.
LOOPBACK = 1
# include/net/tcp_states.h
SYN_SENT, LISTEN = 2, 10

_DROP, _PASS = 0, 1

TCP = 6
# Transports that TCP cannot hide in: UDP, DCCP, ICMPv6, SCTP, UDP-Lite.
_OTHER_TRANSPORTS = (17, 33, 58, 132, 136)
_FRAGMENT, _AUTHENTICATION = 44, 51
# Hop-by-hop, routing, destination options, mobility, HIP, shim6: length in units of 8 bytes (RFC 6564).
_OPTION_HEADERS = (0, 43, 60, 135, 139, 140)
_MOST_EXTENSION_HEADERS = 8

IPV4_HEADER, IPV6_HEADER, TCP_HEADER = 20, 40, 20
IPV4_WITHOUT_OPTIONS = 0x45
SYN_AND_ACK, SYN = 0x12, 0x02

# The two architectures of securerun are little-endian; what is loaded from a packet is in network order.
_ETHERTYPE_IPV4 = socket.htons(0x0800)
ETHERTYPE_IPV6 = socket.htons(0x86DD)
_IPV4_FRAGMENT_OFFSET = socket.htons(0x1FFF)
_IPV6_FRAGMENT_OFFSET = socket.htons(0xFFF8)
_MAPPED_MARKER = int.from_bytes(b"\x00\x00\xff\xff", "little", signed=True)

# The stack, from r10 downwards. The key of a denial is source and port; the source of an IPv6 packet is also the end of
# the keys for the tries. What is stored at a multiple of 8 the verifier keeps in mind ("spilled"), be it 8 bytes or the
# first of 8, and to CAP_BPF alone it then refuses to have a part of these 8 overwritten, by a helper neither (5.10 to
# 6.7; kernel/bpf/verifier.c, check_stack_write_fixed_off(): "attempt to corrupt spilled pointer on stack"). So what is
# written more than once there is written whole, and what a store begins a helper has filled in before.
PORT = -8
SOURCE = -24
_IPV4_SOURCE = -12
# Both headers from their beginning up to their source, which comes to lie where the keys have it.
_IPV4_BEGINNING, _IPV4_BEGINNING_SIZE = _IPV4_SOURCE - 12, 16
_IPV6_BEGINNING, _IPV6_BEGINNING_SIZE = SOURCE - 8, 24
_BEFORE_SOURCE = SOURCE - 8
_IPV6_KEY = SOURCE - 4
# For IPv4 the 8 bytes before the source are the key.
_IPV4_KEY = _BEFORE_SOURCE
# The key for the networks of public ports: its length, their group and the packet's protocol stand before the source.
_PUBLIC_KEY = _BEFORE_SOURCE - 4
_FIRST_PACKET = -48
_HEADER_OFFSET = -52
# Where the header was found, which is over when it is judged.
_INTERFACE_KEY = _HEADER_OFFSET
_HEADER = -88


class Build(Protocol):
    """Makes a program for the interfaces that peers come through, by name, and the ports that others may connect to."""

    def __call__(self, interfaces: Sequence[str], public: Sequence[Opening] = ()) -> tuple[Statement, ...]:
        """Return its statements."""


class ShieldProgram(NamedTuple):
    """One way to judge packets.

    name: what the job's layer is called. kernel_name: what the kernel's lists of programs show.
    needs: the kernel it was made for. build: makes its statements. shortfall: what it promises less than the others,
    for a person.
    """

    name: str
    kernel_name: str
    needs: str
    build: Build
    shortfall: str = ""


def socket_program(interfaces: Sequence[str], public: Sequence[Opening] = ()) -> tuple[Statement, ...]:
    """Judge every packet to a listening socket by its source alone. Nothing can hide in a header.

    A stranger's bare ACK falls as well, which would otherwise complete a handshake from before the shield or
    one by SYN cookie. Only listeners cost more than a few instructions.
    """
    return (
        calculate(R6, "=", R1),
        Remark("the loopback passes"),
        load(R2, 4, R6, CONTEXT_INTERFACE),
        jump_if(R2, "==", LOOPBACK, "pass"),
        Remark("so does every packet to a socket that does not listen"),
        *_pass_unless_listening(),
        *note_source_and_listener(),
        *pass_public(public),
        *judge_address(interfaces),
        *pass_or_deny(),
    )


def header_program(interfaces: Sequence[str], public: Sequence[Opening] = ()) -> tuple[Statement, ...]:
    """Judge packets that open a TCP connection (SYN without ACK) by source, for kernels without skb->sk (4.15-5.0).

    It has to find the TCP header itself, and drops what it cannot walk. All other packets of a stranger pass, so that a
    handshake from before it can be completed, and a bare ACK gets an RST. No loops (Linux 5.3), no direct packet
    access (4.20), no 32-bit jumps (5.1).
    """
    return (
        calculate(R6, "=", R1),
        load(R2, 4, R6, CONTEXT_INTERFACE),
        jump_if(R2, "==", LOOPBACK, "pass"),
        store(8, R10, PORT, 0),
        load(R9, 4, R6, _CONTEXT_PROTOCOL),
        jump_if(R9, "==", ETHERTYPE_IPV6, "ipv6"),
        jump_if(R9, "!=", _ETHERTYPE_IPV4, "drop"),
        *_find_tcp_in_ipv4(),
        Label("ipv6"),
        *_find_tcp_in_ipv6(),
        Label("tcp"),
        *load_packet(offset=R7, place=_HEADER, size=TCP_HEADER, otherwise="deny"),
        load(R2, 1, R10, _HEADER + 13),
        calculate(R2, "&=", SYN_AND_ACK),
        jump_if(R2, "!=", SYN, "pass"),
        load(R2, 2, R10, _HEADER + 2),
        from_network_order(R2, 2),
        store(8, R10, PORT, R2),
        *pass_public(public),
        *judge_address(interfaces),
        *pass_or_deny(),
    )


SOCKET_PROGRAM = ShieldProgram("socket", "securerun_sock", "from Linux 5.1", socket_program)
HEADER_PROGRAM = ShieldProgram(
    "header",
    "securerun_head",
    "for Linux 4.15 to 5.0",
    header_program,
    shortfall="before Linux 5.1 the shield judges opening packets alone, by their headers: what was being opened "
    "before it stood may still be completed, and to other packets a stranger hears resets",
)
PROGRAMS = (SOCKET_PROGRAM, HEADER_PROGRAM)


def _pass_unless_listening() -> Iterator[Statement]:
    """Go on only with packets to a socket that listens, which is then in r7."""
    yield load(R7, 8, R6, CONTEXT_SOCKET)
    yield jump_if(R7, "==", 0, "drop")
    yield load(R2, 4, R7, SOCKET_STATE)
    yield jump_if(R2, "!=", LISTEN, "pass")


def note_source_and_listener() -> Iterator[Statement]:
    """Leave the packet's protocol in r9."""
    yield Remark("the listener's port and the packet's source, as 16 bytes, to the stack")
    yield load(R2, 4, R7, _SOCKET_PORT)
    yield store(8, R10, PORT, R2)
    yield load(R9, 4, R6, _CONTEXT_PROTOCOL)
    yield jump_if(R9, "==", ETHERTYPE_IPV6, "ipv6")
    yield jump_if(R9, "!=", _ETHERTYPE_IPV4, "drop")
    yield from load_packet(offset=12, place=_IPV4_SOURCE, size=4, otherwise="drop")
    yield from _mark_source_as_mapped()
    yield jump("judge")
    yield Label("ipv6")
    yield from load_packet(offset=8, place=SOURCE, size=16, otherwise="drop")
    yield Label("judge")


def pass_public(public: Sequence[Opening]) -> Iterator[Statement]:
    """Pass who may connect to a public port and is no peer, over whatever interface; let the rest fall through.

    The ports are in the code, in ascending order: a packet to any other goes past two comparisons a port at most. Their
    networks are in one trie, each after the number of the ports that it is for.
    """
    if not public:
        return
    groups = public_groups(public)
    yield Remark("is the port public?")
    yield load(R2, 4, R10, PORT)
    for number, opening in enumerate(public):
        beyond = f"beyond {number}"
        yield jump_if(R2, "<", opening.first, "not public")
        yield jump_if(R2, ">", opening.last, beyond)
        if opening.is_for_all:
            yield jump("pass")
        else:
            yield calculate(R3, "=", groups[opening.networks])
            yield jump("public to some")
        yield Label(beyond)
    yield jump("not public")
    if groups:
        yield Label("public to some")
        yield Remark("is the source in one of its networks?")
        yield store(4, R10, _PUBLIC_KEY, PUBLIC_KEY_BITS)
        yield calculate(R2, "=", R9)
        yield calculate(R2, "<<=", 32)
        yield calculate(R2, "|=", R3)
        yield store(8, R10, _BEFORE_SOURCE, R2)
        yield from look_up(PUBLIC, _PUBLIC_KEY)
        yield jump_if(R0, "!=", 0, "pass")
    yield Label("not public")


def _find_tcp_in_ipv4() -> Iterator[Statement]:
    """Leave the offset of the TCP header in r7 and go to `tcp`."""
    yield from load_packet(offset=0, place=_IPV4_BEGINNING, size=_IPV4_BEGINNING_SIZE, otherwise="drop")
    yield load(R7, 1, R10, _IPV4_BEGINNING)
    yield load(R2, 2, R10, _IPV4_BEGINNING + 6)
    yield load(R3, 1, R10, _IPV4_BEGINNING + 9)
    yield from _mark_source_as_mapped()
    yield jump_if(R2, "&", _IPV4_FRAGMENT_OFFSET, "deny")
    yield jump_if(R3, "!=", TCP, "pass")
    yield calculate(R7, "&=", 0x0F)
    yield calculate(R7, "<<=", 2)
    yield jump_if(R7, "<", IPV4_HEADER, "deny")
    yield jump("tcp")


def _find_tcp_in_ipv6() -> Iterator[Statement]:
    """Leave the offset of the TCP header in r7 and fall through to `tcp`; r8 is the kind of the header there."""
    yield from load_packet(offset=0, place=_IPV6_BEGINNING, size=_IPV6_BEGINNING_SIZE, otherwise="drop")
    yield load(R8, 1, R10, _IPV6_BEGINNING + 6)
    yield calculate(R7, "=", IPV6_HEADER)
    for number in range(1, _MOST_EXTENSION_HEADERS + 1):
        yield from _step_over_extension_header(number)
    yield from _branch_at_transport()
    yield jump("deny")


def _branch_at_transport() -> Iterator[Statement]:
    yield jump_if(R8, "==", TCP, "tcp")
    for transport in _OTHER_TRANSPORTS:
        yield jump_if(R8, "==", transport, "pass")


def _step_over_extension_header(number: int) -> Iterator[Statement]:
    options, authentication, advance = (f"{place}{number}" for place in ("options", "authentication", "advance"))
    # The verifiers of the kernels that need this program follow each value of r7 on its own: three ways to
    # step over eight headers would be 6561 walks. Once it was in memory it is just any number.
    yield store(4, R10, _HEADER_OFFSET, R7)
    yield load(R7, 4, R10, _HEADER_OFFSET)
    yield from _branch_at_transport()
    yield from load_packet(offset=R7, place=_HEADER, size=4, otherwise="deny")
    yield load(R1, 1, R10, _HEADER + 1)
    for kind in _OPTION_HEADERS:
        yield jump_if(R8, "==", kind, options)
    yield jump_if(R8, "==", _AUTHENTICATION, authentication)
    yield jump_if(R8, "!=", _FRAGMENT, "deny")
    yield load(R2, 2, R10, _HEADER + 2)
    yield jump_if(R2, "&", _IPV6_FRAGMENT_OFFSET, "deny")
    yield calculate(R1, "=", 8)
    yield jump(advance)
    yield Label(authentication)
    yield calculate(R1, "+=", 2)
    yield calculate(R1, "<<=", 2)
    yield jump(advance)
    yield Label(options)
    yield calculate(R1, "+=", 1)
    yield calculate(R1, "<<=", 3)
    yield Label(advance)
    yield calculate(R7, "+=", R1)
    yield load(R8, 1, R10, _HEADER)


def judge_address(interfaces: Sequence[str], known: str = "pass") -> Iterator[Statement]:
    """Source and port are on the stack, the packet's protocol is in r9, the context in r6: go to `known` or `deny`."""
    yield from pass_through(interfaces)
    yield from find_peer(known, "deny")


def find_peer(known: str, unknown: str) -> Iterator[Statement]:
    """Go to one or the other, by the packet's source."""
    yield Remark("is the source one of the peers?")
    peer6 = f"peer6 or {unknown}"
    yield jump_if(R9, "==", ETHERTYPE_IPV6, peer6)
    yield load(R2, 4, R10, _IPV4_SOURCE)
    yield calculate(R2, "<<=", 32)
    yield calculate(R2, "|=", 32)
    yield store(8, R10, _IPV4_KEY, R2)
    yield from look_up(PEERS4, _IPV4_KEY)
    yield jump_if(R0, "==", 0, unknown)
    yield jump(known)
    yield Label(peer6)
    yield calculate(R2, "=", 128)
    yield calculate(R2, "<<=", 32)
    yield store(8, R10, _BEFORE_SOURCE, R2)
    yield from look_up(PEERS6, _IPV6_KEY)
    yield jump_if(R0, "==", 0, unknown)
    yield jump(known)


def pass_or_deny() -> Iterator[Statement]:
    """End a program: what is denied is counted by its source and port, which are on the stack."""
    yield Label("pass")
    yield calculate(R0, "=", _PASS)
    yield leave()
    yield Label("deny")
    yield Remark("count source and port")
    yield from count(DENIED, SOURCE, _FIRST_PACKET, "drop")
    yield Label("drop")
    yield calculate(R0, "=", _DROP)
    yield leave()


def pass_through(interfaces: Sequence[str]) -> Iterator[Statement]:
    """Go to `deny` with what comes through none of these interfaces, where there are any."""
    if not interfaces:
        return
    yield Remark("through one of the interfaces? Their numbers are in a map, since a name can get another")
    yield load(R2, 4, R6, CONTEXT_INTERFACE)
    yield store(4, R10, _INTERFACE_KEY, R2)
    yield from look_up(INTERFACES, _INTERFACE_KEY)
    yield jump_if(R0, "==", 0, "deny")


def _mark_source_as_mapped() -> Iterator[Statement]:
    """Make an IPv4 source, which is there already, the end of ::ffff:a.b.c.d."""
    yield store(8, R10, SOURCE, 0)
    yield store(4, R10, SOURCE + 8, _MAPPED_MARKER)
