"""Host names to addresses: side by side, within a time limit, and again where a name may only be late."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Callable, Union

# The addresses of a host name, as text; OSError where it has none.
Resolver = Callable[[str], Iterable[str]]
# What asking for a name came to: its addresses, or why there are none.
Outcome = Union[tuple[str, ...], Exception]

# All names together; one dead name server takes resolv.conf's five seconds before the next one is asked.
SECONDS = 10.0
PAUSE_SECONDS = 1.0
# A name service on this host is fastest with few threads; those that wait for a slow one are joined by more.
_THREADS, _MOST_THREADS = 16, 64
_STALLED_SECONDS = 0.05


def addresses_of(name: str) -> Iterable[str]:
    """Return all addresses of a host name, A and AAAA records or the hosts file; OSError where it has none."""
    # A text is encoded by IDNA, whose tables take longer than the hosts file.
    found = socket.getaddrinfo(name.encode() if name.isascii() else name, None, type=socket.SOCK_STREAM)
    return dict.fromkeys(str(address[4][0]) for address in found)


def ask(names: Iterable[str], resolve: Resolver, seconds: float | None = None) -> dict[str, Outcome]:
    """Resolve names side by side, each but once; TimeoutError for those that have not answered in `seconds`."""
    limit = SECONDS if seconds is None else seconds
    wanted = tuple(dict.fromkeys(names))
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[str, Outcome]] = queue.SimpleQueue()
    for name in wanted:
        questions.put(name)
    threads = _start(min(_THREADS, len(wanted)), questions, answers, resolve)
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + limit
    while len(outcomes) < len(wanted):
        left = deadline - time.monotonic()
        try:
            name, outcome = answers.get(timeout=max(0.0, min(_STALLED_SECONDS, left)))
        except queue.Empty:
            if left <= 0:
                _empty(questions)
                break
            threads += _start(min(_MOST_THREADS - threads, questions.qsize()), questions, answers, resolve)
            continue
        outcomes[name] = outcome
    late = TimeoutError(f"no answer within {limit:g} s")
    return {name: outcomes.get(name, late) for name in wanted}


def ask_patiently(
    groups: Sequence[tuple[str, ...]],
    others: Iterable[str],
    resolve: Resolver,
    patience: float,
    tell: Callable[[Sequence[str]], None],
) -> dict[str, Outcome]:
    """Resolve the names of several hosts; ask again, for `patience` seconds, for hosts of which no name has an address.

    groups: the names of each host. others: names that nobody waits for. A name server that says "try again" is asked
    again for SECONDS, patience or not.
    tell: called once, before the first wait, with the first name of each host that is waited for.
    """
    start = time.monotonic()
    outcomes = ask((*(name for group in groups for name in group), *others), resolve)
    waiting = False
    while True:
        elapsed = time.monotonic() - start
        late = [
            group
            for group in groups
            if not has_answered(group, outcomes) and elapsed < _patience(group, outcomes, patience)
        ]
        if not late:
            return outcomes
        if not waiting:
            tell([group[0] for group in late])
            waiting = True
        time.sleep(PAUSE_SECONDS)
        outcomes.update(ask((name for group in late for name in group), resolve))


def has_answered(group: Iterable[str], outcomes: dict[str, Outcome]) -> bool:
    """Return whether one of these names has addresses."""
    return any(isinstance(outcomes[name], tuple) for name in group)


def is_gone(outcome: Outcome) -> bool:
    """Return whether the name service knows that a name has no address; not that it could not be asked."""
    if not isinstance(outcome, socket.gaierror):
        return False
    # EAI_NODATA is glibc's: the name is there and has no address.
    return outcome.errno in {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


def _patience(group: Iterable[str], outcomes: dict[str, Outcome], patience: float) -> float:
    temporary = any(
        isinstance(outcome, socket.gaierror) and outcome.errno == socket.EAI_AGAIN
        for outcome in map(outcomes.__getitem__, group)
    )
    return max(patience, SECONDS) if temporary else patience


def _start(
    count: int, questions: queue.SimpleQueue[str], answers: queue.SimpleQueue[tuple[str, Outcome]], resolve: Resolver
) -> int:
    """Start so many threads that ask. Returns how many."""
    # Not concurrent.futures: its threads are joined at exit, and a name server that is silent would hold the exit up.
    for _ in range(count):
        threading.Thread(
            target=_work, args=(questions, answers, resolve), daemon=True, name="securerun-resolver"
        ).start()
    return count


def _work(
    questions: queue.SimpleQueue[str], answers: queue.SimpleQueue[tuple[str, Outcome]], resolve: Resolver
) -> None:
    while True:
        try:
            name = questions.get_nowait()
        except queue.Empty:
            return
        try:
            answers.put((name, tuple(resolve(name))))
        except (OSError, UnicodeError) as error:
            answers.put((name, error))


def _empty(questions: queue.SimpleQueue[str]) -> None:
    """Leave nothing for threads that still wait for an answer."""
    while True:
        try:
            questions.get_nowait()
        except queue.Empty:
            return
