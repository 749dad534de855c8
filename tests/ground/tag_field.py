"""Where tags are tried: the job on two hosts, each with its own shield, and others on the same hosts and elsewhere."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Callable, TypeVar

import packets
from cgroups import Cgroup, in_child, inside, new_cgroup, socket_made_in
from dialing import listening
from hosts import Host, Network
from packets import Flow
from shield_field import PATIENCE_SECONDS, ShieldField

from securerun.firewall import tag
from securerun.firewall.job_key import JobKey
from securerun.firewall.policy import Admission, Policy
from securerun.firewall.shield import Shield
from securerun.linux.networks import collapse

Result = TypeVar("Result")

KEY = JobKey(bytes(range(16)), bytes(range(16, 32)), "01234567")
OTHER_KEY = JobKey(bytes(range(1, 17)), bytes(range(17, 33)), "76543210")
# Of packets that are made by hand.
SEQUENCE = 0x01020304
BY_TAG = Policy("0123456789ab", (), (), admission=Admission.TAG, tagged=tag.WHERE_NODES_ARE)


@dataclass(frozen=True)
class TagField(ShieldField):
    """far: the job's cgroup on the peer. `job` and `elsewhere` are on the host, and of the peer's is `not_far`."""

    far: Cgroup
    not_far: Cgroup

    def listener(self, cgroup: Cgroup | None = None, port: int = 0, **options: int) -> socket.socket:
        """Listens on every address of the host, IPv4 and IPv6, as torch's stores do."""
        return socket_made_in(cgroup or self.job, lambda: listening(self.host, port, **options))

    @contextlib.contextmanager
    def shielded(self, key: JobKey = KEY, policy: Policy = BY_TAG) -> Iterator[tuple[Shield, Shield]]:
        """The shields of the job's parts on both hosts."""
        with shielded(self.job, policy) as near, shielded(self.far, BY_TAG, key) as far:
            yield near, far

    def in_job(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in a process of the job on its host."""
        return within(self.job, self.host, work)

    def from_far(self, work: Callable[[], Result]) -> Result:
        """The same in a process of the job on the peer."""
        return within(self.far, self.peer, work)

    def beside_far(self, work: Callable[[], Result]) -> Result:
        """The same in a process on the peer that is not the job's."""
        return within(self.not_far, self.peer, work)


@contextlib.contextmanager
def tag_field(network: Network) -> Iterator[TagField]:
    """A field whose host is node0 and whose peer is node1."""
    with contextlib.ExitStack() as stack:
        cgroups = [stack.enter_context(new_cgroup()) for _ in range(4)]
        yield TagField(network["node0"], network["node1"], network["stranger"], *cgroups)


@contextlib.contextmanager
def shielded(cgroup: Cgroup, policy: Policy = BY_TAG, key: JobKey | None = KEY) -> Iterator[Shield]:
    """A shield on a cgroup, taken off at the end."""
    held = Shield.attach(cgroup.descriptor, policy, key)
    try:
        yield held
    finally:
        held.detach()
        held.close()


def within(cgroup: Cgroup, host: Host, work: Callable[[], Result]) -> Result:
    """What `work` returns in a process in this cgroup on this host."""

    def enter_and_work() -> Result:
        cgroup.enter()
        with inside(host):
            return work()

    return in_child(enter_and_work)


def policy_with(admission: Admission, *peers: str, **changes: object) -> Policy:
    """A policy of this admission with these peers."""
    networks = collapse(ipaddress.ip_network(peer) for peer in peers)
    return replace(BY_TAG, admission=admission, peers=networks, **changes)  # type: ignore[arg-type]


@contextlib.contextmanager
def wire(host: Host, interface: str = "eth0") -> Iterator[socket.socket]:
    """A packet socket on an interface of the host's."""
    with inside(host):
        endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        endpoint.bind((interface, 3))
    with endpoint:
        yield endpoint


def link_address(host: Host) -> bytes:
    with wire(host) as endpoint:
        address: bytes = endpoint.getsockname()[4]
        return address


def flow_to(field: TagField, origin: Host, family: int, port: int, source_port: int = 41000) -> Flow:
    """The flow of packets from another host to a port of the field's."""
    number = 0 if family == 4 else 1
    source, target = (ipaddress.ip_address(host.addresses[number]) for host in (origin, field.host))
    return Flow(source, target, source_port, port)


def answer_to(field: TagField, origin: Host, flow: Flow, segment: bytes) -> list[int]:
    """The TCP flags of the first answer that a segment gets, sent from this host; none where it gets none."""
    return answers_to(field, origin, {flow: segment})[flow]


def answers_to(field: TagField, origin: Host, sent: Mapping[Flow, bytes]) -> dict[Flow, list[int]]:
    """The same for segments of several flows, sent one after the other."""
    to = link_address(field.host)
    with wire(origin) as endpoint:
        own = endpoint.getsockname()[4]
        for flow, segment in sent.items():
            endpoint.send(packets.frame(packets.packet(flow, segment), to=to, sender=own))
        received = packets.frames_in(endpoint, PATIENCE_SECONDS / 2)
    return {
        flow: [found[13] & 0x3F for frame in received if (found := packets.answer(frame, flow))][:1] for flow in sent
    }


def segments_in(frames: Sequence[bytes]) -> Iterator[bytes]:
    """The TCP segments in frames, without IP options or extension headers."""
    for frame in frames:
        ethertype = int.from_bytes(frame[12:14], "big")
        if ethertype == packets.ETHERTYPE_IPV4 and frame[23] == packets.TCP:
            yield frame[34 : 14 + int.from_bytes(frame[16:18], "big")]
        elif ethertype == packets.ETHERTYPE_IPV6 and frame[20] == packets.TCP:
            yield frame[54:]


def has_tag(segment: bytes) -> bool:
    """Whether a segment carries the option, whatever its tag."""
    return any(head in segment[20 : (segment[12] >> 4) * 4] for head in (tag.HEAD, tag.HEAD_ONCE_MORE))
