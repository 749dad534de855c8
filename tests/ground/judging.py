"""A shield that is asked packet by packet: its program is run by the kernel on packets made by hand."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import kernel
import packets
from cgroups import new_cgroup
from programs import result_of

from securerun.firewall.policy import Policy
from securerun.firewall.shield import Shield, attach_first_of
from securerun.firewall.shield_program import ShieldProgram
from securerun.linux.bpf import AttachType, Program, attached


@dataclass(frozen=True)
class Judge:
    """A shield by the header program, asked packet by packet."""

    shield: Shield
    program: Program
    interface: int

    def passes(self, content: bytes) -> bool:
        return self.passes_frame(packets.frame(content))

    def passes_frame(self, frame: bytes) -> bool:
        kernel.require(kernel.TEST_RUNS)
        return result_of(self.program, frame, self.interface) == 1

    def denials(self) -> set[tuple[str, int, int]]:
        return {(str(denial.source), denial.port, denial.packets) for denial in self.shield.denied()}


@contextmanager
def judging(program: ShieldProgram, of: Policy) -> Iterator[Judge]:
    kernel.require(kernel.TEST_RUNS)
    with new_cgroup() as cgroup:
        hung_up = attach_first_of((program,), cgroup.descriptor, of)
        (identifier,) = attached(cgroup.descriptor, AttachType.CGROUP_INET_INGRESS).program_ids
        with Program.open(identifier) as opened:
            yield Judge(hung_up, opened, socket.if_nametoindex("eth0"))
        hung_up.close()
