"""The shield: an eBPF program on the job's cgroup that lets only peers open connections to the job.

It sees every packet for a socket that a process of the job made, and nobody else's, whatever the port. Its
life is the cgroup's: the attachment outlives the process that made it. It is hung beside the programs of
others (BPF_F_ALLOW_MULTI, Linux 4.15).

Where the policy goes by tags, or closes the loopback, a second program on the same cgroup writes them into what the
job sends, and the first looks for them (`tags`).

What the programs do is written in `shield_program.py`; here the kernel is given them, and asked.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from securerun.errors import Obstacle, PolicyError
from securerun.firewall import selftest
from securerun.firewall.policy import Admission, Denial, Policy
from securerun.firewall.refusals import CANNOT_OPEN, FORBIDDEN_ABOVE, ShieldUnavailable, explained, lack_of_privilege
from securerun.firewall.shield_maps import (
    DENIED,
    INTERFACES,
    NO_VALUE,
    PEERS4,
    PEERS6,
    denial_in,
    interface_key,
    map_shapes,
    peer_keys,
    public_keys,
    public_shape,
)
from securerun.firewall.shield_program import PROGRAMS, ShieldProgram
from securerun.linux.assembler import assemble
from securerun.linux.bpf import AttachFlags, AttachType, Map, MapShape, Program, VerifierError, attached, programs_on
from securerun.linux.networks import Network, collapse

if TYPE_CHECKING:
    from securerun.firewall.job_key import JobKey
    from securerun.firewall.tags import Tags

_CANNOT_CLOSE_LOOPBACK = "--loopback job needs Linux 5.10, whose programs write TCP options; use --loopback any here"


class Shield:
    """The shield of one job. Made by Shield.attach() or adopt(); close() leaves the attachment in place.

    name: which program judges: "socket" (from Linux 5.1) or "header" (before), "socket and tag" where the policy goes
    by tags, with "loopback" where it closes that. shortfall: what that one promises less than the
    others, "" for nothing. tags: those of the job, None where it has none.
    """

    def __init__(
        self,
        cgroup: int,
        kind: ShieldProgram,
        program: Program,
        maps: Mapping[str, Map],
        *,
        tags: Tags | None = None,
    ) -> None:
        self.tags = tags
        self.name = kind.name
        self.shortfall = kind.shortfall
        self._cgroup = os.dup(cgroup)
        self._program = program
        # A program that goes by tags alone knows no peers.
        self._peers4, self._peers6 = (maps.get(symbol.name) for symbol in (PEERS4, PEERS6))
        self._denied = maps[DENIED.name]
        self._interfaces = maps.get(INTERFACES.name)
        self._indices: frozenset[int] | None = None

    @classmethod
    def attach(cls, cgroup: int, policy: Policy, key: JobKey | None = None, *, for_trial: bool = False) -> Shield:
        """Hang a shield for the policy on the cgroup whose directory `cgroup` is open on.

        key: what tags are made with, where the policy goes by them. Where it closes the loopback and there is none, it
        is one that nobody else has. for_trial: it is for a few connections with tags, and then thrown away.
        Sockets that processes of the cgroup make from now on, and made before in it, are covered at once.
        Raises ShieldUnavailable when the kernel will not have it, and PolicyError for an interface that is
        not there (names are looked up in the network namespace of the caller).
        """
        if key is None and policy.close_loopback:
            return _attach_alone(cgroup, policy)
        programs = PROGRAMS if key is None else _by_tags(policy)
        return attach_first_of(programs, cgroup, policy, key, for_trial=for_trial)

    def denied(self) -> tuple[Denial, ...]:
        """Return who was turned away so far, most packets first; of more than 4096 pairs the latest.

        Cumulative since the shield was hung up. Raises ShieldUnavailable.
        """
        with explained("reading the shield's counters"):
            denials = [denial_in(key, value) for key, value in self._denied.items()]
        return tuple(sorted(denials, key=_most_packets_first))

    def replace_peers(self, peers: Iterable[Network]) -> None:
        """Let these networks connect and no others; established connections stay.

        Who is in the old and in the new peers can connect at every moment in between. Raises ShieldUnavailable,
        with nothing changed, when there is no room for that many.
        """
        wanted = collapse(peers)
        with explained("changing the shield's peers"):
            changes = [
                _changes(trie, set(peer_keys(wanted, version)))
                for trie, version in ((self._peers4, 4), (self._peers6, 6))
                if trie is not None
            ]
            for trie, new, _ in changes:
                trie.update_many(dict.fromkeys(new, NO_VALUE))
            for trie, _, gone in changes:
                for key in gone:
                    trie.delete(key)

    def follow_interfaces(self, names: Iterable[str]) -> bool:
        """Let peers in through the interfaces that have these names now; return whether they are others than before.

        Whoever made eth0 anew gave it another number, and its old number may be somebody else's; who has it is kept
        out first. Through a name that nothing has, nobody comes in. Raises ShieldUnavailable.
        """
        if self._interfaces is None:
            return False
        indices = frozenset(filter(None, map(_index_or_none, names)))
        if indices == self._indices:
            return False
        with explained("changing the shield's interfaces"):
            wanted = {interface_key(index) for index in indices}
            present = set(self._interfaces.keys())
            for key in present - wanted:
                self._interfaces.delete(key)
            self._interfaces.update_many(dict.fromkeys(wanted - present, NO_VALUE))
        self._indices = indices
        return wanted != present

    def detach(self) -> None:
        """Take the shield off the cgroup; nothing happens when it, or the cgroup, is gone already."""
        with explained("taking the shield off"):
            self._program.take_off(self._cgroup, AttachType.CGROUP_INET_INGRESS)
            if self.tags is not None:
                self.tags.take_off(self._cgroup)

    def close(self) -> None:
        """Close this process' descriptors. The attachment stays until detach(), or as long as the cgroup."""
        for thing in (
            self._program,
            self._peers4,
            self._peers6,
            self._denied,
            self._interfaces,
            self.tags,
        ):
            if thing is not None:
                thing.close()
        if self._cgroup >= 0:
            os.close(self._cgroup)
            self._cgroup = -1


def attach_first_of(
    programs: Sequence[ShieldProgram],
    cgroup: int,
    policy: Policy,
    key: JobKey | None = None,
    *,
    for_trial: bool = False,
) -> Shield:
    """Do what Shield.attach() does, with the first of these programs that suits the policy and the kernel accepts."""
    if policy.has_tags != (key is not None):
        raise PolicyError("nodes are told by tags, which are made with a key, and one is there without the other")
    symbols: dict[str, int] = {}
    for name in policy.interfaces:
        _require_interface(name)
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as loading:
        maps = [undo.enter_context(_create(shape)) for shape in map_shapes(policy)]
        # Nobody but the programs needs these.
        others = [loading.enter_context(made) for made in _create_others(policy)]
        symbols.update((each.shape.name, each.fileno()) for each in (*maps, *others))
        if key is None:
            chosen, program = _load_first_of(programs, policy, symbols)
            tags = None
        else:
            (chosen,) = programs
            program, tags = _load_with_tags(chosen, policy, symbols, key, undo, loading, for_trial=for_trial)
        undo.enter_context(program)
        shield = Shield(cgroup, chosen, program, {each.shape.name: each for each in maps}, tags=tags)
        undo.callback(shield.close)
        shield.follow_interfaces(policy.interfaces)
        with explained("filling in the shield's peers"):
            for trie, version in zip(maps, (4, 6)):
                trie.update_many(dict.fromkeys(peer_keys(policy.peers_of(version), version), NO_VALUE))
        with explained("hanging the shield on the cgroup", FORBIDDEN_ABOVE):
            if tags is not None:
                # First, so that there is no SYN of the job that is judged and has no tag.
                tags.attach(cgroup)
                undo.callback(tags.take_off, cgroup)
            program.attach(cgroup, AttachType.CGROUP_INET_INGRESS, AttachFlags.ALLOW_MULTI)
        undo.pop_all()
    return shield


def _attach_alone(cgroup: int, policy: Policy) -> Shield:
    """Hang a shield that tells the job's own processes from others of this host by a key that nobody else has."""
    from securerun.firewall.tags import of_this_host_alone

    policy, key = of_this_host_alone(policy)
    try:
        return attach_first_of(_by_tags(policy), cgroup, policy, key)
    except ShieldUnavailable as error:
        if error.obstacle is not Obstacle.OLD_KERNEL:
            raise
        raise ShieldUnavailable(f"{_CANNOT_CLOSE_LOOPBACK} ({error})", error.obstacle) from error


def _by_tags(policy: Policy) -> tuple[ShieldProgram, ...]:
    from securerun.firewall.tag_program import program_of  # not every job's guard needs it

    return (program_of(policy),)


def _kinds_by_tags() -> tuple[ShieldProgram, ...]:
    """Return programs with the names that those have which judge by tags, whatever else they go by."""
    from securerun.firewall.tag_program import tag_program

    return tuple(tag_program(Admission.TAG, close_loopback=closes) for closes in (False, True))


def _load_with_tags(
    chosen: ShieldProgram,
    policy: Policy,
    symbols: Mapping[str, int],
    key: JobKey,
    kept: contextlib.ExitStack,
    loading: contextlib.ExitStack,
    *,
    for_trial: bool,
) -> tuple[Program, Tags]:
    """Load the program that judges tags and the one that writes them, and close what they take with the stacks.

    Raises ShieldUnavailable.
    """
    from securerun.firewall import tags

    maps = tags.create_maps(policy, kept, loading, for_trial=for_trial)
    numbers = {**symbols, **{name: each.fileno() for name, each in maps.items()}}
    program = kept.enter_context(
        tags.load_judge(chosen.kernel_name, chosen.build(policy.interfaces, policy.public), numbers, key)
    )
    writer = kept.enter_context(tags.load_writer(maps, key, policy.public))
    with explained("mapping the shield's ring buffer"):
        return program, tags.Tags(writer, {name: maps[name] for name in tags.KEPT})


def adopt(cgroup: int) -> Shield:
    """Return the shield that a dead guard left on this cgroup, with its peers and counters. Needs CAP_SYS_ADMIN.

    A self-test that the guard died in is taken off: it would forbid the job to send anything. So is the half of a
    shield that only writes tags. Raises ShieldUnavailable when there is no shield on the cgroup.
    """
    with explained("looking for the shield of an earlier guard", CANNOT_OPEN):
        selftest.take_off_remains(cgroup)
        kinds = {kind.kernel_name: kind for kind in (*PROGRAMS, *_kinds_by_tags())}
        for program in programs_on(cgroup, AttachType.CGROUP_INET_INGRESS, tuple(kinds)):
            return _adopt_program(cgroup, program, kinds)
        _find_writer(cgroup, ())
    raise ShieldUnavailable("no shield hangs on this cgroup", Obstacle.NOTHING_THERE)


def refuse_conflicts(ancestors: Sequence[int], *, tags: bool = False) -> None:
    """Raise ShieldUnavailable when a program on one of the ancestor cgroups does not get along with a shield below.

    ancestors: descriptors of the directories of the cgroups above the job's. tags: whether the shield is
    to write some, as one that closes the loopback does.
    """
    kinds = [AttachType.CGROUP_INET_INGRESS, *[AttachType.CGROUP_SOCK_OPS] * tags]
    for ancestor, kind in itertools.product(ancestors, kinds):
        with explained("asking for the programs on the cgroups above"):
            found = attached(ancestor, kind)
        if not found.program_ids or found.flags & AttachFlags.ALLOW_MULTI:
            continue
        identifiers = " ".join(str(identifier) for identifier in found.program_ids)
        if found.flags & AttachFlags.ALLOW_OVERRIDE:
            raise ShieldUnavailable(
                f"program {identifiers} on a cgroup above was attached with BPF_F_ALLOW_OVERRIDE, "
                "so a shield below would switch it off; start the job in another cgroup",
                Obstacle.PROGRAM_ABOVE,
            )
        raise ShieldUnavailable(
            f"program {identifiers} on a cgroup above forbids any below (systemd does that for IP accounting "
            "and IPAddressDeny=); start the job in another cgroup or give the unit Delegate=yes",
            Obstacle.PROGRAM_ABOVE,
        )


def _create(shape: MapShape) -> Map:
    with explained("creating the shield's maps"):
        return Map.create(shape)


def _create_others(policy: Policy) -> Iterator[Map]:
    """Make the maps that stay as they are, or are the programs' own."""
    shape = public_shape(policy.public)
    if shape is not None:
        made = _create(shape)
        yield made
        with explained("filling in the networks of public ports"):
            made.update_many(dict.fromkeys(public_keys(policy.public), NO_VALUE))


def _changes(trie: Map, wanted: set[bytes]) -> tuple[Map, set[bytes], set[bytes]]:
    present = set(trie.keys())
    if len(present | wanted) > trie.shape.entries:
        raise ShieldUnavailable(
            f"the shield has room for {trie.shape.entries} networks, old and new, and {len(present | wanted)} are "
            "needed; start the job again with these peers",
            Obstacle.FULL,
        )
    return trie, wanted - present, present - wanted


def _most_packets_first(denial: Denial) -> tuple[int, int, int, int]:
    return (-denial.packets, denial.source.version, int(denial.source), denial.port)


def _load_first_of(
    programs: Sequence[ShieldProgram], policy: Policy, symbols: dict[str, int]
) -> tuple[ShieldProgram, Program]:
    refusals = []
    for program in programs:
        code = assemble(program.build(policy.interfaces, policy.public), symbols)
        try:
            return program, Program.load(program.kernel_name, code)
        except VerifierError as error:
            if error.errno == errno.EPERM:
                raise ShieldUnavailable(f"loading the shield: {lack_of_privilege()}", Obstacle.NOT_PERMITTED) from error
            refusals.append(f"{program.name}: {error.strerror}")
    raise ShieldUnavailable(
        f"this kernel accepts none of the shield's programs: {'; '.join(refusals)}", Obstacle.OLD_KERNEL
    )


def _require_interface(interface: str) -> None:
    if _index_or_none(interface) is None:
        raise PolicyError(f"there is no network interface {interface!r} here; see `ip link`")


def _index_or_none(interface: str) -> int | None:
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return None


def _adopt_program(cgroup: int, program: Program, kinds: dict[str, ShieldProgram]) -> Shield:
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as others:
        undo.enter_context(program)
        information = program.information()
        # The program of a guard from before there was a map of interfaces has their numbers in itself, for good.
        own = {symbol.name for symbol in (PEERS4, PEERS6, DENIED, INTERFACES)}
        kept = set(own)
        writer = _find_writer(cgroup, information.map_ids)
        if writer is not None:
            kept |= _names_of_tags()
            undo.enter_context(writer)
        maps = {}
        for identifier in information.map_ids:
            opened = Map.open(identifier)
            (undo if opened.shape.name in kept else others).enter_context(opened)
            maps[opened.shape.name] = opened
        tags = None if writer is None else _tags_of(writer, maps)
        known = {name: each for name, each in maps.items() if name in own}
        shield = Shield(cgroup, kinds[information.name], program, known, tags=tags)
        undo.pop_all()
    return shield


def _names_of_tags() -> set[str]:
    from securerun.firewall.tags import KEPT

    return set(KEPT)


def _tags_of(writer: Program, maps: Mapping[str, Map]) -> Tags:
    from securerun.firewall.tags import KEPT, Tags

    return Tags(writer, {name: maps[name] for name in KEPT})


def _find_writer(cgroup: int, map_ids: Sequence[int]) -> Program | None:
    """Return the program on the cgroup that writes tags by one of these maps; take off those whose shield is gone."""
    from securerun.firewall.tag_writer import WRITING_NAME

    found = None
    for program in programs_on(cgroup, AttachType.CGROUP_SOCK_OPS, (WRITING_NAME,)):
        if set(program.information().map_ids) & set(map_ids):
            found = program
            continue
        with program:
            program.take_off(cgroup, AttachType.CGROUP_SOCK_OPS)
    return found
