"""Linux capabilities: what this process has, and how it gives up what it does not need (capabilities(7))."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from securerun.linux import libc, prctl, proc

# include/uapi/linux/capability.h
CHOWN = 0
DAC_OVERRIDE = 1
KILL = 5
SETUID = 7
SETPCAP = 8
NET_ADMIN = 12
NET_RAW = 13
SYS_MODULE = 16
SYS_PTRACE = 19
SYS_ADMIN = 21
SYS_RESOURCE = 24
SETFCAP = 31
BPF = 39  # since kernel 5.8; before, SYS_ADMIN stands for it

# What a guard works with, the most important first: what the layers take, and what it takes to see, move and end
# processes of others. SYS_ADMIN: bpf(2) before kernel 5.8, programs by id and mounting cgroup2; SYS_RESOURCE: to raise
# limits; DAC_OVERRIDE: cgroups delegated to users; NET_RAW: libiptc.
FOR_GUARDING = {
    "CAP_NET_ADMIN": NET_ADMIN,
    "CAP_BPF": BPF,
    "CAP_SYS_ADMIN": SYS_ADMIN,
    "CAP_SYS_RESOURCE": SYS_RESOURCE,
    "CAP_SYS_PTRACE": SYS_PTRACE,
    "CAP_KILL": KILL,
    "CAP_DAC_OVERRIDE": DAC_OVERRIDE,
    "CAP_NET_RAW": NET_RAW,
}
# And until the job is guarded: to give its user what is made for them.
FOR_BEGINNING = {"CAP_CHOWN": CHOWN}

_VERSION_3 = 0x20080522
_HEADER = struct.Struct("=Ii")
_SETS = struct.Struct("=IIIIII")  # effective, permitted, inheritable: the low 32 of each, then the high 32


def effective() -> frozenset[int]:
    """Return the capabilities that this process can use now."""
    return _held("CapEff")


def suffice_for_guarding(held: Collection[int]) -> bool:
    """Return whether a guard can work with these capabilities; with the others `FOR_GUARDING` it works better."""
    return NET_ADMIN in held and (BPF in held or SYS_ADMIN in held)


def run_as_root() -> str:
    """Return what to do, in words, for who lacks root's rights: who has user id 0 may be told so as well."""
    if not proc.is_in_first_user_namespace():
        return "run as root of the host, outside of this user namespace"
    return "run as root" if os.geteuid() != 0 else "run as root with more capabilities, as the host's own has"


def keep_only(capabilities: Collection[int], for_now: Collection[int] = ()) -> None:
    """Give up every other capability for good, for this process and whatever it starts.

    for_now: what this process itself, and nothing that it starts, keeps until it says this again without.
    What this process does not have is not gained. Raises OSError when the kernel refuses.
    """
    if SETPCAP in effective():
        _drop_from_bounding_set(capabilities)
    held = _held("CapPrm")
    kept = held & frozenset(capabilities)
    _set(effective=kept | (held & frozenset(for_now)), inheritable=_held("CapInh") & kept)
    prctl.forbid_new_privileges()


def give_up_all() -> None:
    """Give up every capability for good, for this process and whatever it starts, as whoever made a user namespace.

    Root's number there is of no more use to a program that is started than any other. Raises OSError.
    """
    _drop_from_bounding_set(())
    prctl.clear_ambient()
    _set(effective=(), inheritable=())


def begin_to_leave() -> None:
    """Keep, of root's capabilities, only the one to become another user, and none for whatever is started later."""
    if SETPCAP in effective():
        _drop_from_bounding_set(())
    kept = _held("CapPrm") & {SETUID}
    _set(effective=kept, inheritable=())


@contextmanager
def handed_on(capabilities: Collection[int]) -> Iterator[None]:
    """Have programs that are started within the block have these of our capabilities; root's have them anyway."""
    if os.geteuid() == 0:
        yield
        return
    inheritable, permitted = _held("CapInh"), _held("CapPrm")
    lent = permitted & frozenset(capabilities)
    ambient = _held("CapAmb")
    _set(effective=effective(), inheritable=inheritable | lent, permitted=permitted)
    for capability in lent:
        prctl.raise_ambient(capability)
    try:
        yield
    finally:
        prctl.clear_ambient()
        for capability in ambient:
            prctl.raise_ambient(capability)
        _set(effective=effective(), inheritable=inheritable, permitted=permitted)


def _drop_from_bounding_set(kept: Collection[int]) -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    for capability in set(range(last + 1)) - set(kept):
        prctl.drop_from_bounding_set(capability)


def _held(kind: str) -> frozenset[int]:
    return proc.status(proc.SELF).bits(kind)


def _set(*, effective: Collection[int], inheritable: Collection[int], permitted: Collection[int] | None = None) -> None:
    sets = [_bits(kind) for kind in (effective, effective if permitted is None else permitted, inheritable)]
    low, high = [bits & 0xFFFFFFFF for bits in sets], [bits >> 32 for bits in sets]
    libc.check(libc.library.capset(_HEADER.pack(_VERSION_3, 0), _SETS.pack(*low, *high)))


def _bits(capabilities: Collection[int]) -> int:
    return sum(1 << number for number in set(capabilities))
