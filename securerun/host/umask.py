"""The umask of the job: only ever stricter than it was, and never looser than 0027."""

from __future__ import annotations

import os
import re

from securerun.errors import PolicyError

# Of new files: nothing for others, no writing for the group (the permission table's 640 and 750).
LEAST = 0o027

_NAMES = (
    (0o020, "group write"),
    (0o004, "others read"),
    (0o002, "others write"),
    (0o001, "others execute"),
)


def current() -> int:
    """Return this process' umask, which can only be read by setting it: everything is closed for that moment."""
    found = os.umask(0o777)
    os.umask(found)
    return found


def tighten(requested: str, source: str = "--umask") -> int:
    """Add the bits of an octal umask to this process' own, and return the umask that is then in force.

    Raises PolicyError if the text is no octal umask, or one that leaves open what 0027 closes.
    """
    mask = parse(requested, source)
    # The umask can only be read by setting it: everything is closed for that moment, nothing is open.
    current = os.umask(0o777)
    in_force = stricter(current, mask)
    os.umask(in_force)
    return in_force


def parse(text: str, source: str = "--umask") -> int:
    """Return the number that an octal umask stands for; PolicyError if it is none, or looser than 0027."""
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", text) or int(text, 8) > 0o777:
        raise PolicyError(f"{source}: umask {text!r} is no octal number of 0000-0777; write 0027, or a stricter one")
    mask = int(text, 8)
    missing = [name for bit, name in _NAMES if LEAST & bit & ~mask]
    if missing:
        raise PolicyError(
            f"{source}: umask {mask:04o} would leave new files open ({', '.join(missing)}); "
            f"write {mask | LEAST:04o}, or a stricter one"
        )
    return mask


def stricter(current: int, requested: int) -> int:
    """Return the umask that takes away what either takes away."""
    return current | requested
