"""The backends of the port chains by the names that `--firewall` takes, each loaded only when it is wanted."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Callable, cast

from securerun.firewall.chains import PortChains, PortChainsUnavailable

# In the order in which `auto` tries them. `legacy` is for hosts whose own rules are in legacy tables: only by name.
_AUTOMATIC = ("iptables", "nftables")
_CLASSES = {
    "iptables": ("securerun.firewall.iptables", "IptablesChains"),
    "nftables": ("securerun.firewall.nftables", "NftablesChains"),
    "legacy": ("securerun.firewall.legacy", "LegacyChains"),
}
NAMES = tuple(_CLASSES)
NO_RUN = "0" * 12
"""The id of no run: by it what stands of all others is looked for."""
_LEGACY_TABLES = (Path("/proc/net/ip_tables_names"), Path("/proc/net/ip6_tables_names"))
_LEGACY_FILTER = "filter"


def open_chains(backend: str, run_id: str) -> PortChains:
    """Return the port chains of a run in one backend.

    Raises PortChainsUnavailable where this host has no such thing.
    """
    module, name = _CLASSES[backend]
    make = cast("Callable[[str], PortChains]", getattr(importlib.import_module(module), name))
    return make(run_id)


def standing_runs(backend: str) -> frozenset[str]:
    """Return the runs that have rules in one backend that stay without their guard; none where it is not in use here.

    To look at legacy tables registers them in the kernel, so only those that are registered are looked at.
    """
    if backend == "legacy" and not any(_LEGACY_FILTER in _names(tables) for tables in _LEGACY_TABLES):
        return frozenset()
    try:
        chains = open_chains(backend, NO_RUN)
        chains.begin(adopt=True, outlive=True)
    except PortChainsUnavailable:
        return frozenset()
    return chains.others


def _names(tables: Path) -> list[str]:
    try:
        return tables.read_text(encoding="ascii").split()
    except OSError:
        return []


def prepare() -> None:
    """Load what `auto` takes first, for whoever has time now and none later."""
    importlib.import_module(_CLASSES[_AUTOMATIC[0]][0])


def open_best_chains(run_id: str) -> PortChains:
    """Return the first backend that this host has.

    Raises PortChainsUnavailable, with all reasons, where it has none.
    """
    reasons = []
    for backend in _AUTOMATIC:
        try:
            return open_chains(backend, run_id)
        except PortChainsUnavailable as error:
            reasons.append(str(error))
    raise PortChainsUnavailable("; ".join(reasons))
