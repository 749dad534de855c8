"""SYN packets from invented sources, as many as one processor sends: run inside a host, bounded in time.

flood.py INTERFACE SECONDS DESTINATION MAC PORT [tagged]     prints how many packets it sent, and in how many seconds

tagged: each has a tag of nobody's key.
"""

from __future__ import annotations

import ctypes
import ipaddress
import random
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/ground"))

from packets import ETHERTYPE_IPV4, SYN, Flow, ipv4, tcp

MOST_SECONDS = 10.0
FRAMES = 1024
# Of securerun.firewall.tag, which this program does without.
_TAG_HEAD = b"\xfe\x0cSR"


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


def frames(destination: str, mac: str, port: int, *, tagged: bool = False) -> list[bytes]:
    """Ethernet frames, each with a SYN of another source in 198.18.0.0/15 (RFC 2544: for benchmarks)."""
    chance = random.Random(1)  # noqa: S311 - no secret
    target = ipaddress.IPv4Address(destination)
    head = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("020000000001") + ETHERTYPE_IPV4.to_bytes(2, "big")
    found = []
    for _ in range(FRAMES):
        source = ipaddress.IPv4Address(int(ipaddress.IPv4Address("198.18.0.0")) + chance.getrandbits(17))
        flow = Flow(source, target, chance.randrange(1024, 65536), port)
        options = _TAG_HEAD + chance.randbytes(8) if tagged else b""
        found.append(head + ipv4(flow, tcp(flow, SYN, sequence=chance.getrandbits(32), options=options)))
    return found


def main(interface: str, seconds: str, destination: str, mac: str, port: str, tagged: str = "") -> None:
    made = frames(destination, mac, int(port), tagged=tagged == "tagged")
    kept = [ctypes.create_string_buffer(frame, len(frame)) for frame in made]
    messages = (_Message * FRAMES)()
    vectors = (_Vector * FRAMES)()
    for message, vector, frame in zip(messages, vectors, kept):
        vector.base, vector.length = ctypes.addressof(frame), len(frame)
        message.header.vectors, message.header.vector_count = ctypes.pointer(vector), 1
    library = ctypes.CDLL(None, use_errno=True)
    sent = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as stranger:
        stranger.bind((interface, 0))
        print("begin", flush=True)
        begin = time.perf_counter()
        end = begin + min(float(seconds), MOST_SECONDS)
        while time.perf_counter() < end:
            done = library.sendmmsg(stranger.fileno(), messages, FRAMES, 0)
            if done < 0:
                raise OSError(ctypes.get_errno(), "sendmmsg")
            sent += done
        print(sent, time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
