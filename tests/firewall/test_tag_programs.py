"""The programs of tags themselves: what they ask of the kernel, what they tell, and how they live and die."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import kernel
import packets
import pytest
from cgroups import Cgroup, new_cgroup
from dialing import attempts, dial, exchange
from hosts import Network
from packets import SYN
from shield_field import INGRESS, PATIENCE_SECONDS, port_of
from tag_field import BY_TAG, KEY, OTHER_KEY, TagField, has_tag, policy_with, segments_in, shielded, tag_field, wire

from securerun.errors import Obstacle, PolicyError
from securerun.firewall import siphash, tag, tags
from securerun.firewall.policy import Admission, Policy
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.shield import Shield, adopt, refuse_conflicts
from securerun.firewall.shield_maps import map_shapes
from securerun.firewall.tag_maps import tag_map_shapes
from securerun.firewall.tag_program import tag_program
from securerun.firewall.tag_writer import writing_program
from securerun.linux.assembler import (
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R10,
    Helper,
    Instruction,
    Label,
    Statement,
    assemble,
    calculate,
    call,
    jump_if,
    leave,
    listing,
    load,
    store,
)
from securerun.linux.bpf import (
    AttachFlags,
    AttachType,
    Map,
    Program,
    ProgramType,
    VerifierError,
    attached,
    verifier_log,
)
from securerun.linux.networks import collapse

SOCK_OPS = AttachType.CGROUP_SOCK_OPS
# The verifier of 5.10 walks no more (BPF_COMPLEXITY_LIMIT_INSNS), and stays a moment at this.
MOST_VERIFIED, MOST_INSTRUCTIONS = 20_000, 1024
EVERY = [(admission, closes) for admission in Admission for closes in (False, True)]


@pytest.fixture
def field(network: Network) -> Iterator[TagField]:
    kernel.require(kernel.TAGS)
    with tag_field(network) as made:
        yield made


# --- what they are ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("admission", "closes"), EVERY)
def test_the_judge_is_small(root: None, admission: Admission, closes: bool) -> None:
    kernel.require(kernel.TAGS)
    statements = tag_program(admission, close_loopback=closes, from_anywhere=False).build(("eth0",))
    assert verified(statements, ProgramType.CGROUP_SKB) < MOST_VERIFIED
    assert sum(each.slots for each in statements if isinstance(each, Instruction)) < MOST_INSTRUCTIONS


def test_the_writer_is_small(root: None) -> None:
    kernel.require(kernel.TAGS)
    assert verified(writing_program(), ProgramType.SOCK_OPS) < MOST_VERIFIED
    assert sum(each.slots for each in writing_program() if isinstance(each, Instruction)) < MOST_INSTRUCTIONS


def verified(statements: tuple[Statement, ...], kind: ProgramType) -> int:
    """How many instructions the verifier walked."""
    policy = replace(BY_TAG, interfaces=("eth0",))
    with contextlib.ExitStack() as stack:
        shapes = (*map_shapes(policy), *tag_map_shapes(1, counting=1))
        maps = [stack.enter_context(Map.create(shape)) for shape in shapes]
        symbols = {**{each.shape.name: each.fileno() for each in maps}, **tags.secret_words(KEY)}
        log = verifier_log("measured", assemble(statements, symbols), kind)
    (line,) = (line for line in log.splitlines() if line.startswith("processed"))
    return int(line.split()[1])


def test_data_takes_a_few_instructions() -> None:
    for closes in (False, True):
        before = []
        for statement in tag_program(Admission.TAG, close_loopback=closes).build(()):
            if statement == Label("look"):
                break
            before += [statement.text] if isinstance(statement, Instruction) else []
        assert len(before) == 6
        assert not any(text.startswith("call") for text in before)


# --- the key ----------------------------------------------------------------------------------------


def test_no_key_shows_in_a_listing_or_in_what_a_verifier_writes(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.require(kernel.TAGS)
    statements = tag_program(Admission.TAG, close_loopback=False).build(())
    words = list(tags.secret_words(OTHER_KEY).values())
    shown = [listing(statements), listing(writing_program()), repr(OTHER_KEY), repr(tags.secret_words)]
    with contextlib.ExitStack() as stack:
        maps = [stack.enter_context(Map.create(shape)) for shape in (*map_shapes(BY_TAG), *tag_map_shapes(1))]
        symbols = {each.shape.name: each.fileno() for each in maps}
        for broken, kind in ((statements, ProgramType.CGROUP_SKB), (writing_program(), ProgramType.SOCK_OPS)):
            # Refused where the hash is ready, after all words of the key were walked over.
            ready = max(place for place, each in enumerate(broken) if str(each) == "r1 ^= r4") + 1
            cut = (*broken[:ready], load(R0, 8, R10, 8), *broken[ready:])
            logs: list[str] = []
            load_program = Program.load

            def loading(*words: object, **more: object) -> Program:
                try:
                    return load_program(*words, **more)  # type: ignore[arg-type]  # noqa: B023
                except VerifierError as error:
                    logs.append(error.log)  # noqa: B023
                    raise

            monkeypatch.setattr(Program, "load", loading)
            with pytest.raises(ShieldUnavailable) as refused:
                tags._load("broken", cut, symbols, OTHER_KEY, kind)
            monkeypatch.undo()
            assert len(logs) == 1 and logs[0].count("r1 ^= r4") == 1 and logs[0].count("= 0x0") >= 4
            shown += [logs[0], str(refused.value), repr(refused.value.__cause__)]
    for text in shown:
        for word in words:
            for number in (word, word - (1 << 64), word & 0xFFFFFFFF, word >> 32):
                assert str(number) not in text and f"{number & (1 << 64) - 1:x}" not in text.lower()


def test_a_key_and_a_policy_that_goes_by_tags_belong_together(root: None) -> None:
    with new_cgroup() as cgroup:
        for policy, key in ((BY_TAG, None), (Policy("0123456789ab", (), ()), KEY)):
            with pytest.raises(PolicyError, match="one is there without the other"):
                Shield.attach(cgroup.descriptor, policy, key)
        assert attached(cgroup.descriptor, INGRESS).program_ids == ()
        assert attached(cgroup.descriptor, SOCK_OPS).program_ids == ()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tagged": ()}, "no network is named where they are written"),
        ({"tagged": (tag.WHERE_NODES_ARE[1], tag.WHERE_NODES_ARE[0])}, "not in order"),
        ({"admission": Admission.ADDRESS}, "nobody is told by them"),
        ({"admission": Admission.BOTH}, "there are no peers"),
    ],
)
def test_a_policy_that_cannot_be_right_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        replace(BY_TAG, **changes)  # type: ignore[arg-type]


def test_it_needs_cap_bpf_and_cap_net_admin_and_no_more(field: TagField) -> None:
    kernel.require(kernel.CAP_BPF)
    script = (
        "import os, sys\n"
        "from securerun.firewall import refusals, shield, tag\n"
        "from securerun.firewall.job_key import JobKey\n"
        "from securerun.firewall.policy import Admission, Policy\n"
        "assert [line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')] == [sys.argv[2]]\n"
        "cgroup = os.open(sys.argv[1], os.O_RDONLY)\n"
        "of = Policy('0123456789ab', (), (), admission=Admission.TAG, tagged=tag.WHERE_NODES_ARE)\n"
        "try:\n"
        "    held = shield.Shield.attach(cgroup, of, JobKey(bytes(16), bytes(16), ''))\n"
        "except refusals.ShieldUnavailable as error:\n"
        "    print('unavailable:', error)\n"
        "else:\n"
        "    shield.refuse_conflicts([cgroup], tags=True)\n"
        "    assert held.denied() == () and held.tags.seen().guarded == () and list(held.tags.answers()) == []\n"
        "    held.detach()\n"
        "    print('hung up')\n"
    )
    net_admin, sys_admin, bpf = 12, 21, 39
    for_both = "CAP_PERFMON or CAP_SYS_ADMIN" if kernel.lack_of(kernel.PACKETS_FOR_CAP_BPF) else "hung up"
    for capabilities, expected in (
        ((net_admin, bpf), for_both),
        ((net_admin, sys_admin, bpf), "hung up"),
        ((net_admin,), "CAP_BPF"),
        ((bpf,), "unavailable"),
    ):
        kept = ",".join(["-all", *(f"+cap_{number}" for number in capabilities)])
        mask = f"{sum(1 << number for number in capabilities):016x}"
        command = ["setpriv", f"--bounding-set={kept}", "--inh-caps=-all", "--", sys.executable, "-c", script]
        done = subprocess.run(
            [*command, str(field.job.path), mask], capture_output=True, text=True, check=False, timeout=60
        )
        assert expected in done.stdout, done.stdout + done.stderr
        assert programs_on(field.job) == (0, 0)


def test_a_kernel_whose_verifier_wants_cap_perfmon_is_said_to_be_one(
    field: TagField, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without d75e30dddf73, who has CAP_BPF alone may not compare where a program looks with the packet's end."""

    def refuse(name: str, *_: object, **__: object) -> Program:
        raise VerifierError(errno.EACCES, "Permission denied", "25: (2d) ...\nR3 pointer comparison prohibited\n")

    monkeypatch.setattr(Program, "load", refuse)
    with pytest.raises(
        ShieldUnavailable, match="give the guard CAP_SYS_ADMIN, or take a kernel with the fix"
    ) as refusal:
        Shield.attach(field.job.descriptor, BY_TAG, KEY)
    assert refusal.value.obstacle is Obstacle.NOT_PERMITTED and "\n" not in str(refusal.value)
    assert programs_on(field.job) == (0, 0)


# --- beside programs of others ----------------------------------------------------------------------

_OPERATION, _FLAGS, _TCP_FLAGS = 0, 84, 212
_CONNECTS, _LISTENS, _HAS_CONNECTED, _HAS_ACCEPTED, _RESERVES, _WRITES = 3, 11, 4, 5, 14, 15
# BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG
_RTO, _WRITE = 1, 64


def other_writer() -> bytes:
    """What some site hangs on a cgroup above: an option of its own, kind 253, in the same packets, and in data too."""
    statements = (
        calculate(R6, "=", R1),
        load(R2, 4, R6, _OPERATION),
        jump_if(R2, "==", _RESERVES, "reserve"),
        jump_if(R2, "==", _WRITES, "write"),
        *(jump_if(R2, "==", each, "ask") for each in (_CONNECTS, _LISTENS, _HAS_CONNECTED, _HAS_ACCEPTED)),
        *ended(),
        Label("ask"),
        load(R2, 4, R6, _FLAGS),
        calculate(R2, "|=", _RTO | _WRITE),
        calculate(R1, "=", R6),
        call(Helper.SOCK_OPS_CB_FLAGS_SET),
        *ended(),
        Label("reserve"),
        calculate(R1, "=", R6),
        calculate(R2, "=", 8),
        calculate(R3, "=", 0),
        call(Helper.RESERVE_HDR_OPT),
        *ended(),
        Label("write"),
        # kind 253, length 8, experiment "XX", four bytes
        calculate(R2, "=", 0x585808FD),
        store(8, R10, -8, R2),
        calculate(R1, "=", R6),
        calculate(R2, "=", R10),
        calculate(R2, "+=", -8),
        calculate(R3, "=", 8),
        calculate(R4, "=", 0),
        call(Helper.STORE_HDR_OPT),
        *ended(),
    )
    return assemble(statements, {})


def ended() -> tuple[Statement, ...]:
    return (calculate(R0, "=", 1), leave())


def test_tags_get_along_with_a_program_above_that_writes_options_too(field: TagField) -> None:
    other = b"\xfd\x08XX"
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(Program.load("somebody_else", other_writer(), ProgramType.SOCK_OPS))
        for above in (field.job, field.far):
            program.attach(above.descriptor, SOCK_OPS, AttachFlags.ALLOW_MULTI)
        near, far = (stack.enter_context(new_cgroup(above)) for above in (field.job, field.far))
        inner = replace(field, job=near, far=far)
        refuse_conflicts([field.job.descriptor], tags=True)
        stack.enter_context(inner.shielded())
        of_the_job = stack.enter_context(inner.listener())
        seen = stack.enter_context(wire(field.host))
        for address in field.host.addresses:

            def work() -> None:
                with dial(address, port_of(of_the_job)) as one, of_the_job.accept()[0] as other_end:  # noqa: B023
                    exchange(one, other_end)

            inner.from_far(work)
        segments = list(segments_in(packets.frames_in(seen, PATIENCE_SECONDS)))
        for above in (field.job, field.far):
            program.take_off(above.descriptor, SOCK_OPS)
    opening = [each for each in segments if each[13] & SYN]
    data = [each for each in segments if not each[13] & SYN]
    assert len(opening) == 4 and all(has_tag(each) and other in each for each in opening)
    # Theirs goes on, by the flag that both have asked for and only one has cleared.
    assert sum(other in each for each in data) > len(data) / 2
    assert not any(map(has_tag, data))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(AttachFlags.NONE, "forbids any below"), (AttachFlags.ALLOW_OVERRIDE, "would switch it off")],
)
def test_a_program_above_that_is_called_for_sockets_has_to_get_along_with_ours(
    field: TagField, flags: AttachFlags, complaint: str
) -> None:
    with Program.load("somebody_else", assemble(ended(), {}), ProgramType.SOCK_OPS) as foreign:
        foreign.attach(field.job.descriptor, SOCK_OPS, flags)
        refuse_conflicts([field.job.descriptor])
        with pytest.raises(ShieldUnavailable, match=complaint):
            refuse_conflicts([field.job.descriptor], tags=True)
        with new_cgroup(field.job) as below:
            if flags == AttachFlags.NONE:
                with pytest.raises(ShieldUnavailable, match="forbids any below"):
                    Shield.attach(below.descriptor, BY_TAG, KEY)
            assert programs_on(below) == (0, 0)
        foreign.take_off(field.job.descriptor, SOCK_OPS)


# --- hanging up, dying and taking over --------------------------------------------------------------


def programs_on(cgroup: Cgroup) -> tuple[int, int]:
    """How many judge what comes in, and how many are called for sockets."""
    judging, writing = (len(attached(cgroup.descriptor, kind).program_ids) for kind in (INGRESS, SOCK_OPS))
    return judging, writing


def hang_up_and_die(cgroup: Cgroup, policy: Policy = BY_TAG) -> None:
    child = os.fork()
    if not child:
        try:
            Shield.attach(cgroup.descriptor, policy, KEY)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("admission", [Admission.EITHER, Admission.TAG], ids=["adds", "narrows"])
def test_tags_outlive_the_sigkill_of_who_hung_them_up_and_are_adopted_whole(
    field: TagField, admission: Admission
) -> None:
    policy = policy_with(admission, *field.stranger.addresses)
    hang_up_and_die(field.job, policy)
    with shielded(field.far), field.listener() as of_the_job:
        port = port_of(of_the_job)
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == ["connected"] * 2
        adopted = adopt(field.job.descriptor)
        assert adopted.name == "socket and tag"
        assert adopted.tags is not None
        assert {str(address) for address in adopted.tags.seen().guarded} == set(field.peer.addresses)
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == ["connected"] * 2
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == ["timeout"] * 2
        adopted.replace_peers(collapse([]))
        adopted.tags.replace_networks(collapse(tag.WHERE_NODES_ARE[:1]))
        assert field.from_far(lambda: attempts(field.host.addresses, port)) == ["connected"] * 2
        for _ in range(2):
            adopted.detach()
        for _ in range(2):
            adopted.close()
        assert programs_on(field.job) == (0, 0)
        assert field.beside_far(lambda: attempts(field.host.addresses, port)) == ["connected"] * 2


@pytest.mark.parametrize("kind", [INGRESS, SOCK_OPS], ids=["judge", "writer"])
def test_half_of_it_lets_nobody_in_and_goes(field: TagField, kind: AttachType) -> None:
    hang_up_and_die(field.job)
    (identifier,) = attached(field.job.descriptor, kind).program_ids
    with Program.open(identifier) as gone:
        gone.detach(field.job.descriptor, kind)
    if kind is INGRESS:
        with pytest.raises(ShieldUnavailable, match="no shield hangs") as refused:
            adopt(field.job.descriptor)
        assert refused.value.obstacle is Obstacle.NOTHING_THERE
    else:
        adopted = adopt(field.job.descriptor)
        assert adopted.tags is None
        adopted.detach()
        adopted.close()
    assert programs_on(field.job) == (0, 0)


def test_where_tags_are_written_changes_while_the_job_runs(field: TagField) -> None:
    with field.shielded() as (_, far), field.listener() as of_the_job:
        port = port_of(of_the_job)
        assert far.tags is not None
        for networks, expected in (
            ([field.host.ipv4], ["connected", "timeout"]),
            ([field.host.ipv6], ["timeout", "connected"]),
            (["::/0"], ["timeout", "connected"]),
            (["0.0.0.0/0"], ["connected", "timeout"]),
            ([], ["timeout", "timeout"]),
            (field.host.addresses, ["connected", "connected"]),
        ):
            far.tags.replace_networks(policy_with(Admission.EITHER, *networks).peers)
            assert field.from_far(lambda: attempts(field.host.addresses, port)) == expected


def test_a_cgroup_that_is_removed_takes_the_programs_along(field: TagField) -> None:
    made = Shield.attach(field.job.descriptor, BY_TAG, KEY)
    field.job.path.rmdir()
    made.detach()
    made.close()


def test_the_option_is_what_the_page_says() -> None:
    (peer,) = policy_with(Admission.EITHER, "10.77.0.2").peers
    option = tag.syn_option(KEY.syn, peer.network_address, 40000, 7)
    assert option[:4] == b"\xfe\x0cSR" and len(option) == tag.SIZE == 12
    message = bytes(10) + b"\xff\xff" + bytes((10, 77, 0, 2)) + struct.pack("!HI", 40000, 7)
    assert int.from_bytes(option[4:], "little") == siphash.siphash(KEY.syn, message)
    once_more = tag.syn_option_once_more(KEY.syn, peer.network_address, 7)
    assert once_more == b"\xfe\x0cSr" + tag.syn_option(KEY.syn, peer.network_address, 0, 7)[4:]
