"""What a stranger got: which ports he connected to, how long after they had appeared, and whether he ever may.

Behind a shield he may not. Without one, a port that was planned is closed before it listens, whoever dies. One that was
opened at random is closed once a guard has seen it, and then stays closed; while the guard is dead, nobody sees it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from patience import patient

Endpoint = tuple[str, int]


# 0.2 s are promised. Here four jobs at a time are started and killed on two cores, and wait for one lock.
OPEN_SECONDS = patient(1.0)
PLANNED = frozenset([29500, *range(60000, 60016)])


class Tries(Protocol):
    """What a probe knows of a stranger's attempts (`probe.Probe`)."""

    connections: list[tuple[Endpoint, float]]
    appeared: dict[Endpoint, list[float]]
    dropped: dict[Endpoint, list[float]]


@dataclass(frozen=True)
class Gain:
    """A connection of a stranger's.

    begun: when he began to try. since: when the port had appeared. until: by when it has to be closed, at the latest.
    was_unseen: whether that is later than with a guard there to see it. was_closed: whether it was closed before.
    """

    endpoint: Endpoint
    begun: float
    since: float
    until: float
    was_unseen: bool
    was_closed: bool

    @property
    def is_planned(self) -> bool:
        return self.endpoint[1] in PLANNED

    @property
    def age(self) -> float:
        """Seconds from the port's appearing to the attempt."""
        return self.begun - self.since

    @property
    def is_too_much(self) -> bool:
        return self.is_planned or self.was_closed or self.begun > self.until

    def __str__(self) -> str:
        address, port = self.endpoint
        kind = "planned " * self.is_planned + "reopened " * self.was_closed
        return f"{address}, {kind}port {port}, {self.age:.2f} s after it appeared"


@dataclass(frozen=True)
class Deaf:
    """When there was no guard to see ports: from the first signal to it until another one had taken over."""

    since: float = math.inf
    until: float = math.inf


def gains(probe: Tries, deaf: Deaf, seconds: float = OPEN_SECONDS) -> Iterator[Gain]:
    """Judge each connection, made to a port that may have been open for these seconds at most."""
    for endpoint, begun in probe.connections:
        times = probe.appeared[endpoint]
        since = times[max(0, bisect_right(times, begun) - 1)]
        # The kernel answers a SYN to a listener at once, so who got no answer was dropped.
        was_closed = any(since <= other < begun for other in probe.dropped.get(endpoint, ()))
        unseen = since < deaf.until and since + seconds > deaf.since
        yield Gain(endpoint, begun, since, (deaf.until if unseen else since) + seconds, unseen, was_closed)
