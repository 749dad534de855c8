"""What a policy's shield is, for people who ask before they start: who may connect, and the programs. Asks nobody."""

from __future__ import annotations

from collections.abc import Iterator

from securerun.firewall.policy import Policy
from securerun.firewall.shield_program import HEADER_PROGRAM, SOCKET_PROGRAM
from securerun.firewall.tag_program import program_of
from securerun.firewall.tag_writer import writing_program
from securerun.linux.assembler import listing


def describe(policy: Policy) -> str:
    """Return the shield that this policy makes, for people: who may connect, and the programs."""
    passing = " ".join(str(network) for network in policy.peers) or "no other host"
    lines = [
        "shield: an eBPF program on the job's cgroup, for every TCP port of the job, IPv4 and IPv6",
        f"may connect: {passing}",
        f"through: {' '.join(policy.interfaces) or 'any interface'}",
        *(
            f"port {opening}, through any interface: {' '.join(map(str, opening.networks)) or 'every host'}"
            for opening in policy.public
        ),
    ]
    if policy.has_tags or policy.close_loopback:
        return "\n".join((*lines, *_describe_tags(policy)))
    lines += [
        "always passes: the loopback, connections that the job opens itself, connections that are established",
        f"program {SOCKET_PROGRAM.name!r} ({SOCKET_PROGRAM.needs}; older kernels get {HEADER_PROGRAM.name!r}):",
        listing(SOCKET_PROGRAM.build(policy.interfaces, policy.public)),
    ]
    return "\n".join(lines)


def _describe_tags(policy: Policy) -> Iterator[str]:
    program = program_of(policy)
    if policy.has_tags:
        yield f"who connects shows: {policy.admission}, of the job's key"
        yield f"tags are written towards: {' '.join(map(str, policy.tagged))}"
    passing = "connections that the job opens itself, connections that are established"
    if policy.close_loopback:
        yield "over the loopback, and from this host's own addresses: the job's own processes, by tag, nobody else"
        yield f"always passes: {passing}"
    else:
        yield f"always passes: the loopback, {passing}"
    yield f"program {program.name!r} ({program.needs}; older kernels have none):"
    yield listing(program.build(policy.interfaces, policy.public))
    yield "program that writes tags to what opens connections of the job's:"
    yield listing(writing_program(policy.public))
