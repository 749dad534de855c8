"""The sets in which many peers stand, so that one rule of iptables looks a packet's source up in them.

A chain with a rule a peer costs a connection as many comparisons as there are peers; a set costs one look-up for each
length of prefix in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from securerun.linux import ip_set
from securerun.linux.networks import Network


def render(name: str, networks: Sequence[Network]) -> str:
    """Return the set in ipset's own language, as `ipset restore` takes it: for people."""
    family = "inet6" if networks[0].version == 6 else "inet"
    create = f"create {name} {ip_set.KIND} family {family} maxelem {len(networks)}"
    return "\n".join([create, *(f"add {name} {network}" for network in networks), ""])


def put(name: str, networks: Sequence[Network]) -> None:
    """Make the set of these networks, of one IP version, at least one of them; or make a standing set be of these.

    A rule that names the set sees either the old networks or the new ones, never less. Raises OSError, with nothing
    made, where the kernel has no such sets (EINVAL, or EPROTONOSUPPORT-like private numbers) or does not permit it.
    """
    if ip_set.size(name) is None:
        ip_set.make(name, networks)
        return
    new = _successor(name)
    ip_set.destroy(new)
    ip_set.make(new, networks)
    try:
        ip_set.swap(name, new)
    finally:
        ip_set.destroy(new)


def destroy(name: str) -> None:
    """Destroy the set, and what may have been left of changing it; nothing happens where there is none.

    Raises OSError while a rule names it.
    """
    for each in (name, _successor(name)):
        ip_set.destroy(each)


def _successor(name: str) -> str:
    return f"{name}+"
