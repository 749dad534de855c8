"""The tags of one shield: what the kernel is given for them beside the program that judges, and what it tells."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from securerun.errors import Obstacle
from securerun.firewall import siphash, tag
from securerun.firewall.job_key import JobKey
from securerun.firewall.policy import Opening, Policy
from securerun.firewall.refusals import ShieldUnavailable, explained, lack_of_privilege
from securerun.firewall.shield_maps import NO_VALUE
from securerun.firewall.tag_maps import (
    ANSWERS,
    PLANNED,
    TAG_NETWORKS,
    TAGGED,
    TAGS_FROM,
    UNTAGGED,
    Answer,
    Untagged,
    answer_in,
    network_keys,
    planned_words,
    tag_map_shapes,
    untagged_in,
)
from securerun.firewall.tag_writer import WRITING_NAME, writing_program
from securerun.linux.addresses import own
from securerun.linux.assembler import Statement, assemble
from securerun.linux.bpf import AttachFlags, AttachType, Map, MapShape, Program, ProgramType, VerifierError
from securerun.linux.networks import Address, Network, collapse
from securerun.linux.ring_buffer import RingBuffer

# What is asked while the job runs; the rest is for the programs alone.
KEPT = (TAG_NETWORKS.name, TAGGED.name, UNTAGGED.name, ANSWERS.name)
# kernel/bpf/verifier.c, check_cond_jmp_op(): whoever looks into a packet compares where they look with its end.
_COMPARES = "pointer comparison prohibited"
_LACK_OF_SIGHT = (
    "loading the program that writes tags: this kernel lets it look into packets with CAP_PERFMON or CAP_SYS_ADMIN "
    "alone; give the guard CAP_SYS_ADMIN, or take a kernel with the fix d75e30dddf73, as Linux 6.6 has it"
)
_LACKING = "tags in packets need Linux 5.10, which lets a program write TCP options"


@dataclass(frozen=True)
class Seen:
    """Whom the shield met. guarded: who showed a right tag, in whatever direction. without: who did not, of those who
    are peers by address or answered the job."""

    guarded: tuple[Address, ...] = ()
    without: tuple[Untagged, ...] = ()


class Tags:
    """The tags of one shield: the program that writes them, and the maps that it shares with the one that judges.

    fileno() becomes readable when an answer was dropped.
    """

    def __init__(self, writer: Program, maps: Mapping[str, Map]) -> None:
        self._writer = writer
        self._maps = dict(maps)
        self._ring: RingBuffer | None = RingBuffer(maps[ANSWERS.name])

    def attach(self, cgroup: int) -> None:
        """Have the sockets of a cgroup write tags. Raises OSError."""
        self._writer.attach(cgroup, AttachType.CGROUP_SOCK_OPS, AttachFlags.ALLOW_MULTI)

    def take_off(self, cgroup: int) -> None:
        """Have them write none; nothing happens when they do not, or the cgroup is gone. Raises OSError."""
        self._writer.take_off(cgroup, AttachType.CGROUP_SOCK_OPS)

    def replace_networks(self, networks: Iterable[Network]) -> None:
        """Write tags towards these networks and no others. Raises OSError, or ShieldUnavailable where there is no room.

        Who is in the old and in the new ones gets tags at every moment in between.
        """
        trie = self._maps[TAG_NETWORKS.name]
        wanted, present = network_keys(networks), set(trie.keys())
        if len(wanted | present) > trie.shape.entries:
            raise ShieldUnavailable(
                f"the shield has room for {trie.shape.entries} networks where tags are written, old and new, and "
                f"{len(wanted | present)} are needed; start the job again with these peers",
                Obstacle.FULL,
            )
        trie.update_many(dict.fromkeys(wanted - present, NO_VALUE))
        for key in present - wanted:
            trie.delete(key)

    def seen(self) -> Seen:
        """Return whom the shield met so far; of more than some thousands the latest. Raises ShieldUnavailable."""
        with explained("reading who showed a tag"):
            guarded = [untagged_in(*item).address for item in self._maps[TAGGED.name].items()]
            without = [untagged_in(*item) for item in self._maps[UNTAGGED.name].items()]
        return Seen(tuple(sorted(guarded, key=_by_address)), tuple(sorted(without, key=_by_address_and_port)))

    def answers(self) -> Iterator[Answer]:
        """Yield the job's connections whose answer was dropped since the last look."""
        if self._ring is not None:
            yield from map(answer_in, self._ring.records())

    def fileno(self) -> int:
        """Return the descriptor to be polled."""
        return self._maps[ANSWERS.name].fileno()

    def close(self) -> None:
        """Close this process' descriptors; the writer stays where it hangs."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        for thing in (self._writer, *self._maps.values()):
            thing.close()


def of_this_host_alone(policy: Policy) -> tuple[Policy, JobKey]:
    """Return the policy of a job that is told from others of this host by a key which nobody else has, and that key.

    Tags are written towards wherever this host has addresses, or may come to have some. Raises ShieldUnavailable.
    """
    with explained("asking for this host's addresses"):
        networks = collapse((*tag.LOOPBACK, *tag.WHERE_NODES_ARE, *own().networks))
    return replace(policy, tagged=networks), JobKey(os.urandom(siphash.KEY_SIZE), os.urandom(siphash.KEY_SIZE), "")


def create_maps(policy: Policy, kept: ExitStack, loading: ExitStack, *, for_trial: bool = False) -> dict[str, Map]:
    """Make the maps of tags and fill in what the policy says. Raises ShieldUnavailable.

    kept: closes those that `Tags` takes. loading: closes those that nobody but the programs needs. for_trial: they are
    for a few connections.
    """
    maps = {}
    for shape in tag_map_shapes(len(policy.tagged), len(policy.tags_from), for_trial=for_trial):
        maps[shape.name] = (kept if shape.name in KEPT else loading).enter_context(_create(shape))
    with explained("filling in where tags are written"):
        maps[TAG_NETWORKS.name].update_many(dict.fromkeys(network_keys(policy.tagged), NO_VALUE))
        if policy.tags_from:
            maps[TAGS_FROM.name].update_many(dict.fromkeys(network_keys(policy.tags_from), NO_VALUE))
        maps[PLANNED.name].update_many(planned_words(policy.ports_of_nodes()))
    return maps


def _create(shape: MapShape) -> Map:
    with explained("creating the maps of tags"):
        try:
            return Map.create(shape)
        except OSError as error:
            # kernel/bpf/syscall.c, find_and_alloc_map(): of a kind that it does not know.
            if error.errno != errno.EINVAL:
                raise
            raise ShieldUnavailable(f"{_LACKING} ({error.strerror})", Obstacle.OLD_KERNEL) from error


def secret_words(key: JobKey) -> dict[str, int]:
    """Return the numbers that a key's symbols stand for in both programs."""
    return {**siphash.state_words(tag.SYN_KEY, key.syn), **siphash.state_words(tag.SYN_ACK_KEY, key.syn_ack)}


def load_judge(name: str, statements: Sequence[Statement], symbols: Mapping[str, int], key: JobKey) -> Program:
    """Load the program that judges tags. Raises ShieldUnavailable."""
    return _load(name, statements, symbols, key, ProgramType.CGROUP_SKB)


def load_writer(maps: Mapping[str, Map], key: JobKey, public: tuple[Opening, ...] = ()) -> Program:
    """Load the program that writes tags, by the maps that it shares with the judge. Raises ShieldUnavailable.

    public: the ports whose answers carry none.
    """
    symbols = {TAG_NETWORKS.name: maps[TAG_NETWORKS.name].fileno()}
    return _load(WRITING_NAME, writing_program(public), symbols, key, ProgramType.SOCK_OPS)


def _load(
    name: str, statements: Sequence[Statement], symbols: Mapping[str, int], key: JobKey, kind: ProgramType
) -> Program:
    secret = secret_words(key)
    code = assemble(statements, {**symbols, **secret})
    try:
        return Program.load(
            name, code, kind, shown=lambda: assemble(statements, {**symbols, **dict.fromkeys(secret, 0)})
        )
    except VerifierError as error:
        if error.errno == errno.EPERM:
            raise ShieldUnavailable(f"loading the shield: {lack_of_privilege()}", Obstacle.NOT_PERMITTED) from error
        if _COMPARES in error.log:
            raise ShieldUnavailable(_LACK_OF_SIGHT, Obstacle.NOT_PERMITTED) from error
        raise ShieldUnavailable(f"{_LACKING} ({error.strerror})", Obstacle.OLD_KERNEL) from error


def _by_address(address: Address) -> tuple[int, int]:
    return address.version, int(address)


def _by_address_and_port(one: Untagged) -> tuple[int, int, int]:
    return (*_by_address(one.address), one.port)
