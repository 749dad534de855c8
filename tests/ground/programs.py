"""Programs of the shield's kind, run by the kernel on packets made by hand."""

from __future__ import annotations

import enum
import struct

from securerun.linux import bpf
from securerun.linux.bpf import Program


class _Command(enum.IntEnum):
    PROG_TEST_RUN = 10


def result_of(program: Program, frame: bytes, interface: int) -> int:
    """What the program returns for an Ethernet frame that came in through the interface with this index.

    net/bpf/test_run.c: the index must be that of an interface in the current network namespace, 0 and 1
    both mean the loopback; the packet's socket is a new one, in no state.
    """
    packet = bpf._copy(frame)
    # struct __sk_buff: 40 bytes of other things, ifindex; what follows is zero.
    context = bpf._copy(struct.pack("=40xI148x", interface))
    attributes = struct.pack(
        "=iIIIQQIIIIQQ",
        *(program.fileno(), 0, len(frame), 0, bpf._address(packet), 0),
        *(0, 0, len(context), 0, bpf._address(context), 0),
    )
    _, after = bpf._call(_Command.PROG_TEST_RUN, attributes)
    returned: int = struct.unpack_from("=4xI", after)[0]
    return returned
