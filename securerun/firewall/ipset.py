"""The sets in which many peers or ports stand, so that one rule of iptables looks a packet up in them.

A chain with a rule a peer costs a connection as many comparisons as there are peers; a set costs one look-up for each
length of prefix in it, and one of ports a look at one bit.
"""

from __future__ import annotations

from securerun.linux import ip_set
from securerun.linux.ip_set import Members


def render(name: str, members: Members) -> str:
    """Return the set in ipset's own language, as `ipset restore` takes it: for people."""
    first = members[0]
    if isinstance(first, tuple):
        create = f"create {name} {ip_set.KIND_OF_PORTS} range 1-65535"
    else:
        family = "inet6" if first.version == 6 else "inet"
        create = f"create {name} {ip_set.KIND} family {family} maxelem {len(members)}"
    entries = (f"{member[0]}-{member[1]}" if isinstance(member, tuple) else str(member) for member in members)
    return "\n".join([create, *(f"add {name} {entry}" for entry in entries), ""])


def put(name: str, members: Members) -> None:
    """Make the set of these networks or ports, as `ip_set.make` does; or make a standing set be of these.

    A rule that names the set sees either the old members or the new ones, never less. Raises OSError, with nothing
    made, where the kernel has no such sets (EINVAL, or EPROTONOSUPPORT-like private numbers) or does not permit it.
    """
    if ip_set.size(name) is None:
        ip_set.make(name, members)
        return
    new = _successor(name)
    ip_set.destroy(new)
    ip_set.make(new, members)
    try:
        ip_set.swap(name, new)
    finally:
        ip_set.destroy(new)


def destroy(name: str, deadline: float | None = None) -> None:
    """Destroy the set, and what may have been left of changing it; nothing happens where there is none.

    deadline: as `ip_set.destroy` has it. Raises OSError while a rule names it.
    """
    for each in (name, _successor(name)):
        ip_set.destroy(each, deadline)


def _successor(name: str) -> str:
    return f"{name}+"
