"""Port chains in the legacy tables, written through libiptc.

For hosts whose rules live in legacy tables but whose iptables commands are missing or speak to nf_tables.
The rules are those that `dispatcher.render_install` renders, so both backends install the same text, find each
other's runs in the same chain and agree; only who writes them differs. It is written under the lock that iptables'
own legacy commands take.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from securerun.firewall.chains import PortChainsUnavailable, Resets, TooManyRules, of_another
from securerun.firewall.dispatcher import CHAIN, Dispatcher, render_install
from securerun.firewall.libiptc import FilterTable, View, filter_tables
from securerun.firewall.policy import Policy
from securerun.firewall.run_sets import RunSets
from securerun.linux import file_lock

# iptables/xshared.h: XT_LOCK_NAME
_LOCK = Path("/run/xtables.lock")
_LOCK_SECONDS = 10.0


class LegacyChains:
    """The port chains of one run in the legacy filter tables (see `chains.PortChains`).

    Raises PortChainsUnavailable where python-iptables or the libraries of iptables are missing.
    """

    backend = "legacy"
    name = CHAIN

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._tables = filter_tables()
        self._sets = RunSets(run_id)
        self.resets = Resets()
        self.others: frozenset[str] = frozenset()

    def begin(self, *, adopt: bool, outlive: bool) -> None:
        """Refuse rules of another run of this id. Such rules belong to no process, and stay in any case."""
        with xtables_lock():
            found = frozenset(run for table in self._tables for run in _runs_in(table))
        if not adopt and self._run_id in found:
            raise of_another(self._run_id)
        self.others = found - {self._run_id}

    def install(self, policy: Policy, log_group: int | None) -> None:
        """Install in one transaction a family, and read back that the rules stand where they must.

        Raises PortChainsUnavailable, with nothing of this run left in either family, and TooManyRules with what stood.
        """
        with xtables_lock():
            try:
                self._sets.install(policy, lambda with_sets: self._install_best(policy, log_group, with_sets))
            except PortChainsUnavailable as error:
                if not (isinstance(error, TooManyRules) and self._sets.installed):
                    self._remove()
                raise

    def remove(self) -> None:
        """Remove this run's rules, and with the last run's the chain and the jump to it.

        Raises PortChainsUnavailable when the tables cannot be read or written.
        """
        with xtables_lock():
            self._remove()

    def stand(self) -> bool:
        """Whether INPUT jumps to the dispatcher, and this run has rules there and all in its sets."""
        return all(self._stands_in(table) for table in self._tables) and self._sets.stand()

    def _install_best(self, policy: Policy, log_group: int | None, with_sets: bool) -> None:
        self.resets.install(policy, lambda resets: self._install(policy, log_group, with_sets, resets))

    def _install(self, policy: Policy, log_group: int | None, with_sets: bool, resets: bool) -> None:
        for table in self._tables:
            _install_in(table, policy, log_group, with_sets=with_sets, resets=resets)

    def _stands_in(self, table: FilterTable) -> bool:
        with table.reading() as view:
            return bool(view.jumps()) and any(entry.run_id == self._run_id for entry in view.entries(CHAIN))

    def _remove(self) -> None:
        for table in self._tables:
            table.change(lambda view: _take_out(view, self._run_id))
        self._sets.remove()


@contextlib.contextmanager
def xtables_lock() -> Iterator[None]:
    """Hold the lock that iptables' legacy commands take, as `iptables-legacy --wait 10` does.

    Raises PortChainsUnavailable when somebody else holds it for longer.
    """
    try:
        descriptor = os.open(_LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PortChainsUnavailable(f"{_LOCK} cannot be opened: {error.strerror}") from error
    try:
        _wait_for(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    try:
        with file_lock.time_limit(_LOCK_SECONDS):
            file_lock.lock(descriptor)
    except file_lock.TimeUp:
        raise PortChainsUnavailable(
            f"another program has held {_LOCK} for {_LOCK_SECONDS:.0f} s; "
            f"see which with `fuser -v {_LOCK}`, wait for it or end it, then try again"
        ) from None


def _install_in(table: FilterTable, policy: Policy, log_group: int | None, *, with_sets: bool, resets: bool) -> None:
    table.change(lambda view: _put_in(view, table.version, policy, log_group, with_sets=with_sets, resets=resets))
    with table.reading() as view:
        stands = _jumped_to_first(view) and any(entry.run_id == policy.run_id for entry in view.entries(CHAIN))
    if not stands:
        raise PortChainsUnavailable(f"libiptc reported success, but the IPv{table.version} rules are not there")


def _runs_in(table: FilterTable) -> Iterator[str]:
    with table.reading() as view:
        yield from (entry.run_id for entry in view.entries(CHAIN) if entry.run_id is not None)


def _put_in(view: View, version: int, policy: Policy, log_group: int | None, *, with_sets: bool, resets: bool) -> None:
    """Add the run to the dispatcher, and the dispatcher where it is missing."""
    foreign = [number for number, entry in enumerate(view.entries(CHAIN), 1) if entry.run_id is None]
    if foreign:
        raise PortChainsUnavailable(
            f"rule {foreign[0]} of chain {CHAIN} in the legacy IPv{version} filter table is not securerun's; "
            "remove it or use --firewall off"
        )
    entries = view.entries(CHAIN)
    view.delete(CHAIN, [position for position, entry in enumerate(entries) if entry.run_id == policy.run_id])
    first = _jumped_to_first(view)
    if not first:
        view.delete("INPUT", view.jumps())
    # Of the run's rules and of the jumps none is left to be deleted.
    found = Dispatcher(exists=view.has_dispatcher, rules=(), jumps=(), jumped_to_first=first)
    text = render_install(policy, version, found, log_group=log_group, with_sets=with_sets, resets=resets)
    for line in text.splitlines():
        view.write(line)


def _take_out(view: View, run_id: str) -> None:
    """Take the run out of the dispatcher, and the dispatcher away with the last run."""
    entries = view.entries(CHAIN)
    ours = [position for position, entry in enumerate(entries) if entry.run_id == run_id]
    if view.has_dispatcher and len(ours) == len(entries):
        view.delete_dispatcher()
    else:
        view.delete(CHAIN, ours)


def _jumped_to_first(view: View) -> bool:
    return view.jumps() == [0]
