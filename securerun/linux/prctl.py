"""What this process says of itself to the kernel, and gives up (prctl(2))."""

from __future__ import annotations

from securerun.linux import libc

# include/uapi/linux/prctl.h
_SET_PDEATHSIG = 1
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4
_SET_NAME = 15
_CAPBSET_DROP = 24
_SET_NO_NEW_PRIVS, _GET_NO_NEW_PRIVS = 38, 39
_CAP_AMBIENT = 47
_AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 2, 4


def set_dumpable(dumpable: bool) -> None:
    """Say whether a core may be written of this process, and whether its user may look into it (/proc, ptrace)."""
    libc.library.prctl(_SET_DUMPABLE, int(dumpable), 0, 0, 0)


def is_dumpable() -> bool:
    """Return whether a core may be written of this process, and its user may look into it."""
    return bool(libc.library.prctl(_GET_DUMPABLE, 0, 0, 0, 0) == 1)


def set_signal_at_parents_end(number: int) -> None:
    """Have this signal sent to this process when its parent's thread ends; forgotten when the user changes."""
    libc.library.prctl(_SET_PDEATHSIG, int(number), 0, 0, 0)


def set_name(name: str) -> None:
    """Name the calling thread; the first one's name is the process' own, of which 15 bytes are kept."""
    libc.library.prctl(_SET_NAME, name.encode(), 0, 0, 0)


def forbid_new_privileges() -> None:
    """From now on no program started from here gains by set-id bits or file capabilities (no_new_privs)."""
    libc.check(libc.library.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def may_gain_privileges() -> bool:
    """Return whether set-id bits and file capabilities count for what is started from here: no_new_privs is not set."""
    return bool(libc.library.prctl(_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1)


def drop_from_bounding_set(capability: int) -> None:
    """Give up a capability for whatever is started from here, root's programs too. Raises OSError."""
    libc.check(libc.library.prctl(_CAPBSET_DROP, capability, 0, 0, 0))


def raise_ambient(capability: int) -> None:
    """Have programs that are started have this capability, which must be permitted and inheritable. Raises OSError."""
    libc.check(libc.library.prctl(_CAP_AMBIENT, _AMBIENT_RAISE, capability, 0, 0))


def clear_ambient() -> None:
    """Hand no capability on to programs that are started. Raises OSError."""
    libc.check(libc.library.prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0))
