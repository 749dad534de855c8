"""The cells of the kill matrix: who dies, when, how, and what protects the job."""

from __future__ import annotations

import itertools
import signal
from dataclasses import dataclass

VICTIMS = ("launcher", "guard", "both", "worker", "group", "cgroup")
MOMENTS = ("before", "layers", "guarded", "rendezvous", "training", "restart", "release")
SIGNALS: dict[str, tuple[signal.Signals, ...]] = {
    "TERM": (signal.SIGTERM,),
    "INT": (signal.SIGINT,),
    "HUP": (signal.SIGHUP,),
    "QUIT": (signal.SIGQUIT,),
    "KILL": (signal.SIGKILL,),
    "STOPKILL": (signal.SIGSTOP, signal.SIGKILL),
}
BACKENDS = ("iptables", "nftables", "legacy", "off")
# The shield; --scope ports, with a cgroup that tells who belongs to the job; no cgroup to be had, so no shield either;
# the shield by a key: no peer is named, and who shows the key's tag comes in.
PROTECTIONS = ("shield", "ports", "nocgroup", "key")
WITHOUT_A_SHIELD = ("ports", "nocgroup")
WITHOUT_WORKERS = ("before", "layers", "guarded")
# What a guard ignores, as terminals and batch systems send it.
IGNORED_BY_GUARDS = ("TERM", "INT", "HUP", "QUIT")


@dataclass(frozen=True)
class Cell:
    """Who dies, when, how, under which port chains, and what protects the job beside them."""

    victim: str
    moment: str
    signal: str
    backend: str
    protection: str = "shield"

    def __str__(self) -> str:
        return f"{self.victim}/{self.moment}/{self.signal}/{self.backend}/{self.protection}"

    @property
    def exists(self) -> bool:
        """There is no worker to kill before the first one has started; and something has to protect the job."""
        if self.victim == "worker" and self.moment in WITHOUT_WORKERS:
            return False
        if self.victim == "cgroup" and self.protection == "nocgroup":
            return False
        return self.has_shield or self.backend != "off"

    @property
    def has_shield(self) -> bool:
        """Whether a stranger can never get in; else to a port that was opened at random until it has been seen."""
        return self.protection not in WITHOUT_A_SHIELD

    @property
    def has_key(self) -> bool:
        """Whether a peer is known by its tag, and by that alone."""
        return self.protection == "key"

    @property
    def ends_a_guard(self) -> bool:
        """A guard ignores what a terminal or a batch system sends."""
        return self.victim in ("guard", "both") and self.signal not in IGNORED_BY_GUARDS

    @property
    def has_to_be_remembered(self) -> bool:
        """The launcher ends under its guard, and nothing tells what it has only forked but a look from before."""
        launcher_ends = self.victim in ("launcher", "group", "worker", "both")
        return self.protection == "nocgroup" and launcher_ends and not self.ends_a_guard

    @property
    def chains_outlive_guards(self) -> bool:
        """Beside a shield nftables' tables belong to their guards, and go with them."""
        return self.backend != "off" and not (self.has_shield and self.backend == "nftables")

    @property
    def may_leave_something(self) -> bool:
        """Launcher and guard are both gone: nobody is left to clean up before the next run comes."""
        return self.ends_a_guard and (self.victim == "both" or self.moment == "release")


def all_cells() -> list[Cell]:
    """Every combination that there is.

    Without a shield the signals that a guard ignores take the backends in turn: whoever dies by them, the guard lives,
    and does under one backend what it does under another. With a key so does whatever ends no guard.
    """
    everything = itertools.product(VICTIMS, MOMENTS, SIGNALS, BACKENDS, PROTECTIONS)
    cells = itertools.starmap(Cell, everything)
    return [cell for cell in cells if cell.exists and (cell.protection == "shield" or _is_its_turn(cell))]


def _is_its_turn(cell: Cell) -> bool:
    if cell.ends_a_guard if cell.has_key else cell.signal not in IGNORED_BY_GUARDS:
        return True
    place = (PROTECTIONS, VICTIMS, MOMENTS, tuple(SIGNALS))
    values = (cell.protection, cell.victim, cell.moment, cell.signal)
    turn = sum(names.index(value) for names, value in zip(place, values))
    return BACKENDS.index(cell.backend) == turn % (4 if cell.has_shield else 3)


def parse_cell(text: str) -> Cell:
    return Cell(*text.split("/"))
