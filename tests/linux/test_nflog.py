"""A log group's datagrams: the packets in them, and nothing else."""

from __future__ import annotations

import pytest

from securerun.linux.netlink import attribute, framed
from securerun.linux.nflog import packets_in

PACKET, CONFIGURATION = 4 << 8, 4 << 8 | 1
HEADER = bytes(4)
PAYLOAD, PREFIX = 9, 10


def logged(packet: bytes) -> bytes:
    return framed(PACKET, HEADER + attribute(3, b"mark") + attribute(PAYLOAD, packet), 0)


def test_the_packets_of_a_datagram_come_one_after_the_other() -> None:
    assert list(packets_in(logged(b"first") + logged(b"the second"))) == [b"first", b"the second"]


def test_what_is_no_packet_is_passed_over() -> None:
    other = framed(4 << 8 | 7, bytes(40), 0) + framed(CONFIGURATION, HEADER + attribute(PAYLOAD, b"none"), 0)
    assert list(packets_in(other)) == []
    assert list(packets_in(framed(PACKET, HEADER, 0))) == [b""]


def test_only_what_was_logged_with_the_prefix_is_taken() -> None:
    def prefixed(packet: bytes, prefix: bytes) -> bytes:
        return framed(PACKET, HEADER + attribute(PREFIX, prefix) + attribute(PAYLOAD, packet), 0)

    others = [b"securerun 0\0", b"\0", b"", b"securerun 00\0", b"securerun\0"]
    data = b"".join(prefixed(b"other", prefix) for prefix in others) + prefixed(b"ours", b"securerun 01\0")
    assert list(packets_in(data + logged(b"no prefix"), "securerun 01")) == [b"ours"]


@pytest.mark.parametrize("payload", [b"", bytes(3), HEADER + b"\xff\0\x09\0", HEADER + b"\x02\0\x09\0"])
def test_a_packet_that_is_not_whole_is_refused(payload: bytes) -> None:
    with pytest.raises(OSError, match="not whole"):
        list(packets_in(framed(PACKET, payload, 0)))
