"""The program that judges tags: the shield's own, for a job that has a key. Asks the kernel nothing.

It sees what the shield's other programs see, and two kinds of packets more closely. Of what comes to a listener, a SYN
with the right tag is noted, and the rest of its handshake goes by that note; a wrong tag touches nothing. Of what comes
to a socket that waits for an answer, a SYN-ACK from where nodes can be has to have a tag too. Linux 5.10.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from securerun.firewall import siphash, tag
from securerun.firewall.policy import Admission, Opening, Policy
from securerun.firewall.program_steps import add, count, load_packet, look_up, point
from securerun.firewall.shield_program import (
    CONTEXT_INTERFACE,
    CONTEXT_SOCKET,
    ETHERTYPE_IPV6,
    IPV4_HEADER,
    IPV4_WITHOUT_OPTIONS,
    IPV6_HEADER,
    LISTEN,
    LOOPBACK,
    PORT,
    SOCKET_STATE,
    SOURCE,
    SYN,
    SYN_AND_ACK,
    SYN_SENT,
    TCP,
    TCP_HEADER,
    ShieldProgram,
    find_peer,
    judge_address,
    note_source_and_listener,
    pass_or_deny,
    pass_public,
    pass_through,
)
from securerun.firewall.tag_maps import (
    ANSWER_SIZE,
    ANSWERS,
    NETWORK_KEY_BITS,
    NOTES,
    PLANNED,
    TAG_NETWORKS,
    TAGGED,
    TAGS_FROM,
    UNTAGGED,
)
from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
    Helper,
    Label,
    Remark,
    Statement,
    Symbol,
    calculate,
    call,
    constant,
    from_network_order,
    jump,
    jump_if,
    load,
    map_reference,
    store,
)

_NAME, _NAME_WITH_LOOPBACK = "securerun_tag", "securerun_tagl"

# How long a note lets the packets of its handshake pass. Linux gives up a connection that nobody answers after 127 s
# (tcp_syn_retries, 6), and one that it answered after 63 (tcp_synack_retries, 5).
NOTE_SECONDS = 130
_NOTE_NANOSECONDS = NOTE_SECONDS * 10**9

# include/uapi/linux/bpf.h: offsets in struct bpf_sock
_SOCKET_FAMILY, _SOCKET_IPV4, _SOCKET_IPV6, _SOCKET_PEER_PORT = 4, 24, 28, 48
_AF_INET = 2
# and in struct bpf_tcp_sock
_TCP_UNACKNOWLEDGED = 24
# What a SYN takes of the sequence numbers: one, and its data (TCP_FASTOPEN). What was sent is known by the socket only
# after that (net/ipv4/tcp_output.c, tcp_connect()), and an answer over a veth pair may come before.
_MOST_IN_A_SYN = 65535

# Offsets in a TCP header, and where the options of one of 60 bytes can begin that has room for a tag.
_SOURCE_PORT, _SEQUENCE, _ACKNOWLEDGED, _DATA_OFFSET, _FLAGS = 0, 4, 8, 12, 13
_SHORTEST_WITH_TAG = TCP_HEADER + tag.SIZE
_LONGEST_HEADER = 60

# The stack below what the shield's other programs have there. All of it is written by stores of 8 bytes at multiples of
# 8, or by helpers where no store goes (`shield_program`). A packet's headers are copied so that TCP's begins here.
_TCP_AT = -208
# The tag itself lies at a multiple of 8.
_OPTION = -268
_NOTED = -280
_COUNTED = -304
_FIRST = -312
_NETWORK = -336
_PORT_WORD = -340
_ANSWER = -392
# What is hashed; with its length it is also the key of a note.
_MESSAGE = -184
_MESSAGE_WORDS = (_MESSAGE, _MESSAGE + 8, _MESSAGE + 16)
_MAPPED_WORD = 0xFFFF0000 << 32

# In r8, beside a socket's state: the packet would open a connection.
_OPENING = 1


def program_of(policy: Policy) -> ShieldProgram:
    """Return the program that judges by tags as this policy says."""
    return tag_program(
        policy.admission,
        close_loopback=policy.close_loopback,
        tags_through_any=policy.tags_through_any,
        from_anywhere=not policy.tags_from,
    )


def tag_program(
    admission: Admission, *, close_loopback: bool, tags_through_any: bool = False, from_anywhere: bool = True
) -> ShieldProgram:
    """Return the program that judges by tags in this way.

    tags_through_any: the interfaces that it is built for are for those who are known by address. from_anywhere: a tag
    counts from any network, and not from those of a map alone.
    """

    def build(interfaces: Sequence[str], public: Sequence[Opening] = ()) -> tuple[Statement, ...]:
        counts = tuple(_counts(() if tags_through_any else interfaces, from_anywhere=from_anywhere))
        return _statements(admission, interfaces, counts, public, close_loopback=close_loopback)

    name = "socket, tag and loopback" if close_loopback else "socket and tag"
    kernel_name = _NAME_WITH_LOOPBACK if close_loopback else _NAME
    return ShieldProgram(name, kernel_name, "from Linux 5.10", build)


def _statements(
    admission: Admission,
    interfaces: Sequence[str],
    counts: Sequence[Statement],
    public: Sequence[Opening],
    *,
    close_loopback: bool,
) -> tuple[Statement, ...]:
    return (
        calculate(R6, "=", R1),
        Remark("every packet passes to a socket that neither listens nor waits for an answer"),
        load(R7, 8, R6, CONTEXT_SOCKET),
        jump_if(R7, "==", 0, "drop"),
        load(R8, 4, R7, SOCKET_STATE),
        jump_if(R8, "==", LISTEN, "look"),
        jump_if(R8, "!=", SYN_SENT, "pass"),
        Label("look"),
        *_pass_loopback(close_loopback),
        *note_source_and_listener(),
        jump_if(R8, "==", SYN_SENT, "answer"),
        *pass_public(public),
        *_leave_others_to_addresses(admission),
        jump("header"),
        Label("answer"),
        *_leave_others_to_nobody(admission),
        Remark("an answer, from where tags are written to?"),
        *look_up_network(SOURCE, _NETWORK, "version"),
        jump_if(R0, "==", 0, "pass"),
        Label("header"),
        *_load_header(),
        *_tell_packets_apart(),
        Label("option"),
        *_find_option(),
        *_compare(),
        *_note(),
        *_judge_noted(),
        *_count_right(),
        *_admit(admission, interfaces, counts, close_loopback=close_loopback),
        *_count_without(admission),
        *_turn_answer_away(admission),
        *pass_or_deny(),
    )


def _pass_loopback(close_loopback: bool) -> Iterator[Statement]:
    if close_loopback:
        return
    yield Remark("the loopback passes")
    yield load(R2, 4, R6, CONTEXT_INTERFACE)
    yield jump_if(R2, "==", LOOPBACK, "pass")


def _leave_others_to_addresses(admission: Admission) -> Iterator[Statement]:
    """Where the key is this host's alone, who comes from outside is judged by address."""
    if admission is Admission.ADDRESS:
        yield load(R2, 4, R6, CONTEXT_INTERFACE)
        yield jump_if(R2, "!=", LOOPBACK, "address")


def _leave_others_to_nobody(admission: Admission) -> Iterator[Statement]:
    """And of who answers from outside nothing is asked."""
    if admission is Admission.ADDRESS:
        yield load(R2, 4, R6, CONTEXT_INTERFACE)
        yield jump_if(R2, "!=", LOOPBACK, "pass")


def look_up_network(address: int, key: int, label: str, among: Symbol = TAG_NETWORKS) -> Iterator[Statement]:
    """Look up the 16 bytes of an address, which are on the stack, among networks: those that tags are written to."""
    yield load(R2, 8, R10, address)
    yield load(R3, 8, R10, address + 8)
    yield store(8, R10, key + 8, R2)
    yield store(8, R10, key + 16, R3)
    yield constant(R4, 6 << 32 | NETWORK_KEY_BITS)
    yield jump_if(R2, "!=", 0, label)
    yield calculate(R3, "<<=", 32)
    yield constant(R5, _MAPPED_WORD)
    yield jump_if(R3, "!=", R5, label)
    yield constant(R4, 4 << 32 | NETWORK_KEY_BITS)
    yield Label(label)
    yield store(8, R10, key, R4)
    yield from look_up(among, key)


def _load_header() -> Iterator[Statement]:
    """Leave the offset of the TCP header in r7, and its beginning on the stack.

    Go to `unread` where it does not follow the IP header at once: who writes tags sends no other packets.
    """
    before4, before6 = _TCP_AT - IPV4_HEADER, _TCP_AT - IPV6_HEADER
    yield jump_if(R9, "==", ETHERTYPE_IPV6, "header6")
    yield from load_packet(offset=0, place=before4, size=IPV4_HEADER + TCP_HEADER, otherwise="unread")
    yield load(R2, 1, R10, before4)
    yield jump_if(R2, "!=", IPV4_WITHOUT_OPTIONS, "unread")
    yield load(R2, 1, R10, before4 + 9)
    yield jump_if(R2, "!=", TCP, "unread")
    yield calculate(R7, "=", IPV4_HEADER)
    yield jump("flags")
    yield Label("header6")
    yield from load_packet(offset=0, place=before6, size=IPV6_HEADER + TCP_HEADER, otherwise="unread")
    yield load(R2, 1, R10, before6 + 6)
    yield jump_if(R2, "!=", TCP, "unread")
    yield calculate(R7, "=", IPV6_HEADER)
    yield Label("flags")


def _tell_packets_apart() -> Iterator[Statement]:
    """Go to `option` with what has to show a tag, in r8 what that is, and to `noted` with the rest of a handshake."""
    yield load(R2, 1, R10, _TCP_AT + _FLAGS)
    yield calculate(R2, "&=", SYN_AND_ACK)
    yield jump_if(R8, "==", SYN_SENT, "waits")
    yield jump_if(R2, "!=", SYN, "noted")
    yield calculate(R8, "=", _OPENING)
    yield jump("option")
    yield Label("waits")
    yield jump_if(R2, "==", SYN_AND_ACK, "option")
    yield calculate(R2, "&=", SYN)
    yield jump_if(R2, "==", 0, "pass")
    yield Remark("two who open towards each other need no SYN-ACK, and no node of a job does that")
    yield jump("no option")


def _find_option() -> Iterator[Statement]:
    """Leave the option on the stack: the last one, or before options that other programs of the sender's have added."""
    yield load(R2, 1, R10, _TCP_AT + _DATA_OFFSET)
    yield calculate(R2, "&=", 0xF0)
    yield calculate(R2, ">>=", 2)
    yield jump_if(R2, "<", _SHORTEST_WITH_TAG, "no option")
    yield calculate(R7, "+=", R2)
    yield calculate(R7, "+=", -tag.SIZE)
    for length in range(_SHORTEST_WITH_TAG, _LONGEST_HEADER + 1, 4):
        yield from load_packet(offset=R7, place=_OPTION, size=tag.SIZE, otherwise="no option")
        yield load(R2, 4, R10, _OPTION)
        yield jump_if(R2, "==", tag.HEAD_WORD, "found")
        yield jump_if(R2, "==", tag.HEAD_WORD_ONCE_MORE, "found")
        yield load(R2, 1, R10, _TCP_AT + _DATA_OFFSET)
        yield jump_if(R2, "<", (length + 4) // 4 << 4, "no option")
        yield calculate(R7, "+=", -4)
    yield Label("found")


def _compare() -> Iterator[Statement]:
    """Fall through with a SYN whose tag is right, and go to `right` with such an answer; with others go elsewhere.

    The option's head is in r2.
    """
    yield load(R3, 4, R10, _TCP_AT + _SEQUENCE)
    yield jump_if(R8, "==", SYN_SENT, "message of an answer")
    yield load(R4, 2, R10, _TCP_AT + _SOURCE_PORT)
    yield jump_if(R2, "==", tag.HEAD_WORD, "port")
    yield calculate(R4, "=", tag.NO_PORT)
    yield Label("port")
    yield from lay_end(_MESSAGE)
    yield from _lay_source()
    yield from siphash.begin(tag.SYN_KEY)
    yield jump("hash")
    yield Label("message of an answer")
    yield jump_if(R2, "!=", tag.HEAD_WORD, "no option")
    yield calculate(R4, "=", tag.NO_PORT)
    yield from lay_end(_MESSAGE)
    yield load(R2, 4, R10, _TCP_AT + _ACKNOWLEDGED)
    yield store(8, R10, _MESSAGE, R2)
    yield calculate(R2, "=", 0)
    yield store(8, R10, _MESSAGE + 8, R2)
    yield from siphash.begin(tag.SYN_ACK_KEY)
    yield Label("hash")
    yield Remark("SipHash-2-4")
    yield from siphash.take_in(_MESSAGE_WORDS)
    yield load(R2, 8, R10, _OPTION + len(tag.HEAD))
    yield jump_if(siphash.RESULT, "==", R2, "fits")
    yield Label("no option")
    yield jump_if(R8, "==", SYN_SENT, "without")
    yield jump("untagged")
    yield Label("unread")
    yield jump_if(R8, "==", SYN_SENT, "unread answer")
    yield jump("untagged")
    yield Label("fits")
    yield jump_if(R8, "==", SYN_SENT, "right")


def _lay_source() -> Iterator[Statement]:
    for place in (0, 8):
        yield load(R2, 8, R10, SOURCE + place)
        yield store(8, R10, _MESSAGE + place, R2)


def lay_end(message: int) -> Iterator[Statement]:
    """Lay the end of the message at this place: the opener's port or 0 from r4, the number from r3, and the length."""
    yield calculate(R3, "<<=", 16)
    yield calculate(R4, "|=", R3)
    yield constant(R3, siphash.last_word(tag.MESSAGE_SIZE))
    yield calculate(R4, "|=", R3)
    yield store(8, R10, message + 16, R4)


def _note() -> Iterator[Statement]:
    """Note a SYN with the right tag, and go to `right`; one that was noted too long ago is a replay."""
    yield Remark("a right tag: note its packet")
    yield call(Helper.KTIME_GET_NS)
    yield store(8, R10, _NOTED, R0)
    yield from add(NOTES, _MESSAGE, _NOTED)
    yield jump_if(R0, "==", 0, "right")
    yield Remark("it was noted before")
    yield from _judge_note("drop", "deny")


def _judge_noted() -> Iterator[Statement]:
    """Have the rest of a handshake pass whose SYN was noted, the first or one that was sent again.

    What comes next after a SYN has the next number.
    """
    yield Label("noted")
    yield from _lay_source()
    yield load(R3, 4, R10, _TCP_AT + _SEQUENCE)
    yield from_network_order(R3, 4)
    yield calculate(R3, "+=", -1)
    yield from_network_order(R3, 4)
    yield load(R4, 2, R10, _TCP_AT + _SOURCE_PORT)
    yield from lay_end(_MESSAGE)
    yield from _judge_note("noted without a port", "noted without a port")
    yield Label("noted without a port")
    yield load(R2, 8, R10, _MESSAGE + 16)
    yield calculate(R2, "&=", ~0xFFFF)
    yield store(8, R10, _MESSAGE + 16, R2)
    yield from _judge_note("untagged", "untagged")


def _judge_note(missing: str, old: str) -> Iterator[Statement]:
    """Go to `tagged` with a packet that was noted no longer ago than a handshake takes."""
    yield from look_up(NOTES, _MESSAGE)
    yield jump_if(R0, "==", 0, missing)
    yield load(R7, 8, R0, 0)
    yield call(Helper.KTIME_GET_NS)
    # The clock of another processor may be ahead by a little (kernel/time/timekeeping.c, ktime_get_mono_fast_ns()).
    yield jump_if(R7, ">", R0, "tagged")
    yield calculate(R0, "-=", R7)
    yield constant(R1, _NOTE_NANOSECONDS)
    yield jump_if(R0, ">", R1, old)
    yield jump("tagged")


def _count_right() -> Iterator[Statement]:
    """Count who showed a right tag: nobody else can, so that no flood drives a node of the job out of this map."""
    yield Label("right")
    yield calculate(R3, "=", 0)
    yield from _count_source(TAGGED, "right and counted")
    yield Label("right and counted")
    yield jump_if(R8, "==", SYN_SENT, "pass")


def _count_source(name: Symbol, then: str) -> Iterator[Statement]:
    """Count the packet's source, with the port in r3."""
    yield store(8, R10, _COUNTED + 16, R3)
    for place in (0, 8):
        yield load(R2, 8, R10, SOURCE + place)
        yield store(8, R10, _COUNTED + place, R2)
    yield from count(name, _COUNTED, _FIRST, then)


def _counts(interfaces: Sequence[str], *, from_anywhere: bool) -> Iterator[Statement]:
    """Go to `deny` with who shows a right tag where it does not count: through none of these interfaces, or from
    outside of the site's networks."""
    yield from pass_through(interfaces)
    if not from_anywhere:
        yield Remark("from a network that a tag counts from?")
        yield from look_up_network(SOURCE, _NETWORK, "version of who shows a tag", TAGS_FROM)
        yield jump_if(R0, "==", 0, "deny")


def _admit(
    admission: Admission, interfaces: Sequence[str], counts: Sequence[Statement], *, close_loopback: bool
) -> Iterator[Statement]:
    """Decide about a packet to a listener, by its tag or by where it comes from."""
    yield Label("tagged")
    yield from _over_loopback(close_loopback, "pass")
    if admission is Admission.BOTH:
        yield jump("address")
    else:
        yield from counts
        yield jump("pass")
    yield Label("untagged")
    yield from _over_loopback(close_loopback, "deny")
    if admission in (Admission.TAG, Admission.BOTH):
        yield jump("deny")
    if admission is not Admission.TAG:
        yield Label("address")
        yield from judge_address(interfaces, "known" if admission is Admission.EITHER else "pass")


def _over_loopback(close_loopback: bool, then: str) -> Iterator[Statement]:
    if close_loopback:
        yield load(R2, 4, R6, CONTEXT_INTERFACE)
        yield jump_if(R2, "==", LOOPBACK, then)


def _count_without(admission: Admission) -> Iterator[Statement]:
    """Count who opened a connection by address, or answered, without a right tag; of an answer also its port."""
    if admission is Admission.EITHER:
        yield Label("known")
        yield jump_if(R8, "!=", _OPENING, "pass")
        yield Remark("a peer by address that shows no tag")
        yield calculate(R3, "=", 0)
        yield jump("count without")
    yield Label("unread answer")
    yield load(R7, 8, R6, CONTEXT_SOCKET)
    yield jump_if(R7, "==", 0, "drop")
    yield jump("an answer")
    yield Label("without")
    yield load(R7, 8, R6, CONTEXT_SOCKET)
    yield jump_if(R7, "==", 0, "drop")
    yield from _leave_wrong_numbers_to_tcp()
    yield Label("an answer")
    yield load(R3, 4, R7, _SOCKET_PEER_PORT)
    yield from_network_order(R3, 2)
    yield Label("count without")
    yield from _count_source(UNTAGGED, "without and counted")
    yield Label("without and counted")
    yield jump_if(R8, "!=", SYN_SENT, "pass")


def _leave_wrong_numbers_to_tcp() -> Iterator[Statement]:
    """Let an answer pass that does not acknowledge the SYN: TCP refuses it, and goes on waiting.

    So whoever does not see the SYN cannot have the guard end the socket. A SYN alone acknowledges nothing, and TCP
    takes it.
    """
    yield load(R2, 1, R10, _TCP_AT + _FLAGS)
    yield calculate(R2, "&=", SYN_AND_ACK)
    yield jump_if(R2, "!=", SYN_AND_ACK, "an answer")
    yield calculate(R1, "=", R7)
    yield call(Helper.TCP_SOCK)
    yield jump_if(R0, "==", 0, "drop")
    yield load(R2, 4, R0, _TCP_UNACKNOWLEDGED)
    yield load(R1, 4, R10, _TCP_AT + _ACKNOWLEDGED)
    yield from_network_order(R1, 4)
    yield calculate(R1, "-=", R2)
    yield calculate(R1, "<<=", 32)
    yield calculate(R1, ">>=", 32)
    yield jump_if(R1, "==", 0, "pass")
    yield jump_if(R1, ">", _MOST_IN_A_SYN, "pass")


def _turn_answer_away(admission: Admission) -> Iterator[Statement]:
    """Drop an answer without a tag from a planned port, and tell the guard whose socket waits for another."""
    yield Remark("is the port planned?")
    yield load(R2, 8, R10, _COUNTED + 16)
    yield calculate(R2, ">>=", 6)
    yield store(4, R10, _PORT_WORD, R2)
    yield from look_up(PLANNED, _PORT_WORD)
    yield jump_if(R0, "==", 0, "pass")
    yield load(R2, 8, R0, 0)
    yield load(R3, 8, R10, _COUNTED + 16)
    yield calculate(R3, "&=", 63)
    yield calculate(R2, ">>=", R3)
    yield jump_if(R2, "&", 1, "planned")
    yield jump("pass")
    yield Label("planned")
    if admission is Admission.EITHER:
        yield from find_peer("pass", "unknown")
        yield Label("unknown")
    yield from _tell_answer()
    yield jump("drop")


def _tell_answer() -> Iterator[Statement]:
    """Write who answered, to which address of this host, and both ports."""
    for place in (0, 8):
        yield load(R2, 8, R10, SOURCE + place)
        yield store(8, R10, _ANSWER + place, R2)
    yield load(R7, 8, R6, CONTEXT_SOCKET)
    yield jump_if(R7, "==", 0, "drop")
    yield load(R2, 4, R7, _SOCKET_FAMILY)
    yield jump_if(R2, "==", _AF_INET, "own address of IPv4")
    for place in (0, 8):
        yield load(R3, 4, R7, _SOCKET_IPV6 + place)
        yield load(R2, 4, R7, _SOCKET_IPV6 + place + 4)
        yield calculate(R2, "<<=", 32)
        yield calculate(R2, "|=", R3)
        yield store(8, R10, _ANSWER + 16 + place, R2)
    yield jump("ports")
    yield Label("own address of IPv4")
    yield calculate(R3, "=", 0)
    yield store(8, R10, _ANSWER + 16, R3)
    yield load(R2, 4, R7, _SOCKET_IPV4)
    yield calculate(R2, "<<=", 32)
    yield constant(R3, _MAPPED_WORD >> 32)
    yield calculate(R2, "|=", R3)
    yield store(8, R10, _ANSWER + 24, R2)
    yield Label("ports")
    yield load(R2, 4, R10, PORT)
    yield calculate(R2, "<<=", 16)
    yield load(R3, 8, R10, _COUNTED + 16)
    yield calculate(R2, "|=", R3)
    yield store(8, R10, _ANSWER + 32, R2)
    yield calculate(R1, "=", R6)
    yield call(Helper.GET_SOCKET_COOKIE)
    yield store(8, R10, _ANSWER + 40, R0)
    yield map_reference(R1, ANSWERS)
    yield from point(R2, _ANSWER)
    yield calculate(R3, "=", ANSWER_SIZE)
    yield calculate(R4, "=", 0)
    yield call(Helper.RINGBUF_OUTPUT)
