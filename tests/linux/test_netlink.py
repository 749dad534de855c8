"""What the kernel may answer over netlink, and what it may not: frames, dumps, errors and attributes."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroups import inside
from hosts import Network

from securerun.linux import netlink
from securerun.linux.netlink import Channel, Dump

KIND = 20
NOT_WHOLE = "not whole|without its header"


def message(kind: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 0, 0) + payload


def done(number: int = 0, flags: int = 0) -> bytes:
    return message(3, struct.pack("=i", -number), flags)


def dump_of(*parts: bytes) -> Dump:
    datagrams = iter(parts)
    return Dump(lambda: next(datagrams))


# Messages


def test_a_message_is_read_as_it_was_framed() -> None:
    framed = netlink.framed(KIND, b"abc", 0x301)
    assert framed == message(KIND, b"abc", 0x301)
    assert list(netlink.messages(framed + b"\0" + framed)) == [(KIND, 0x301, b"abc")] * 2
    assert list(netlink.messages(b"")) == []


@pytest.mark.parametrize("length", [1, 15, 16, 17, 87])
def test_a_message_that_is_cut_short_is_refused(length: int) -> None:
    data = message(KIND, b"a" * 72)[:length]
    with pytest.raises(OSError, match=NOT_WHOLE) as refusal:
        list(dump_of(data))
    assert refusal.value.errno == errno.EBADMSG


@pytest.mark.parametrize(
    "data",
    [struct.pack("=IHHII", 0, 20, 0, 0, 0), message(3, b""), message(2, b"\0\0"), bytes(15), b"\x0f" + bytes(30)],
)
def test_a_message_that_cannot_be_is_refused(data: bytes) -> None:
    with pytest.raises(OSError, match=NOT_WHOLE):
        list(dump_of(data))


# Dumps


def test_answers_of_several_datagrams_are_one_answer() -> None:
    parts = [message(KIND, b"a" * 72) + message(KIND, b"b" * 75) + b"\0", message(KIND, b"c" * 72), done()]
    dump = dump_of(*parts)
    assert [(kind, answer[:1]) for kind, answer in dump] == [(KIND, b"a"), (KIND, b"b"), (KIND, b"c")]
    assert not dump.interrupted


@pytest.mark.parametrize("marked", [0, 1])
def test_an_inconsistent_answer_is_noticed(marked: int) -> None:
    flags = [0x10 if part == marked else 0 for part in range(2)]
    dump = dump_of(message(KIND, b"a" * 72, flags[0]), done(flags=flags[1]))
    assert len(list(dump)) == 1
    assert dump.interrupted


@pytest.mark.parametrize("kind", [2, 3])
def test_an_error_is_raised_whichever_message_carries_it(kind: int) -> None:
    with pytest.raises(PermissionError):
        list(dump_of(message(kind, struct.pack("=i", -1))))


@pytest.mark.parametrize(("inconsistent", "asked"), [(0, 1), (2, 3), (9, 4)])
def test_an_inconsistent_answer_is_asked_for_again_but_not_for_ever(
    inconsistent: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([True] * inconsistent + [False] * 9)
    read = Dump.__iter__
    questions = []

    def judged(self: Dump) -> Iterator[tuple[int, bytes]]:
        yield from read(self)
        self.interrupted = next(verdicts)
        questions.append(self)

    monkeypatch.setattr(Dump, "__iter__", judged)
    with Channel(netlink.ROUTE) as channel:
        assert channel.listed(links(), NEW_LINK)
    assert len(questions) == asked


# RTM_NEWLINK, RTM_GETLINK, and struct ifinfomsg with all fields but the family zero
NEW_LINK, GET_LINK = 16, 18


def links(index: int = 0, flags: int = netlink.REQUEST | netlink.DUMP) -> bytes:
    return netlink.framed(GET_LINK, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, 0, 0), flags)


# The kernel


def test_only_what_is_wanted_of_a_dump_is_listed() -> None:
    with Channel(netlink.ROUTE) as channel:
        assert channel.listed(links(), NEW_LINK)
        assert channel.listed(links(), NEW_LINK + 1) == []


def test_one_thing_is_asked_for_and_is_there_or_is_not() -> None:
    lowest, none = 1, 2**31 - 1
    with Channel(netlink.ROUTE) as channel:
        assert netlink.attributes(channel.ask(links(lowest, netlink.REQUEST))[16:])[3] == b"lo\0"
        with pytest.raises(OSError, match="No such device"):
            channel.ask(links(none, netlink.REQUEST))


def test_a_channel_hears_the_kernel_alone(network: Network) -> None:
    with inside(network["node0"]), Channel(netlink.ROUTE) as channel:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.ROUTE) as other:
            other.bind((0, 0))
            with pytest.raises(ConnectionRefusedError):
                other.sendto(message(NEW_LINK, b"forged"), channel._socket.getsockname())
        channel.stop_waiting()
        with pytest.raises(BlockingIOError):
            channel.receive()


def test_a_datagram_that_does_not_fit_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "_DATAGRAM_BYTES", 100)
    with Channel(netlink.ROUTE) as channel, pytest.raises(OSError, match="cut short"):
        channel.ask(links(1, netlink.REQUEST))


def test_a_channel_is_told_from_other_descriptors_and_from_none() -> None:
    with Channel(netlink.NETFILTER) as channel, socket.socket() as other, Path(os.devnull).open("rb") as file:
        assert netlink.is_channel(channel.fileno(), netlink.NETFILTER)
        assert not netlink.is_channel(channel.fileno(), netlink.ROUTE)
        assert not netlink.is_channel(other.fileno(), netlink.NETFILTER)
        assert not netlink.is_channel(file.fileno(), netlink.NETFILTER)
        closed = channel.fileno()
    assert not netlink.is_channel(closed, netlink.NETFILTER)


# Attributes


def test_attributes_are_read_as_they_were_written() -> None:
    nested = netlink.attribute(2 | netlink.NESTED, netlink.attribute(1 | netlink.NETWORK_ORDER, b"abcde"))
    found = netlink.attributes(netlink.attribute(7, b"") + nested)
    assert set(found) == {2, 7}
    assert found[7] == b""
    assert netlink.attributes(found[2]) == {1: b"abcde"}
    assert netlink.attributes(b"") == {}


@pytest.mark.parametrize("data", [b"\x03\x00\x00\x00", b"\x04", b"\x05\x00\x01\x00", bytes(4), b"\xff\xff\x01\x00" * 9])
def test_an_attribute_that_is_not_whole_is_refused(data: bytes) -> None:
    for whole in (b"", netlink.attribute(1, b"abcd")):
        with pytest.raises(OSError, match=NOT_WHOLE):
            netlink.attributes(whole + data)


def test_an_attribute_that_is_missing_is_the_kernels_error() -> None:
    found = netlink.attributes(netlink.attribute(1, b"abcd"))
    assert found.get(2) is None
    with pytest.raises(OSError, match="without its attribute 2"):
        found[2]
