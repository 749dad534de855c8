"""Several processes that share the look at large trees; a small one is looked at by this process alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Callable, NamedTuple, TypeVar

from securerun.audit.scan import Directory, Outcome, Scan, Settings
from securerun.audit.violations import Batch
from securerun.errors import SecurerunError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

T = TypeVar("T")

# About 50 ms of looking: so long this process looks alone, and so often a worker is heard of.
_BUDGET = 20_000
_MOST_WORKERS = 8
_MOST_DIRECTORIES = 64


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


def look(settings: Settings, starts: Sequence[Directory], present: Callable[[Batch], list[T]]) -> Iterator[Outcome[T]]:
    """Look at whole trees: what has been found, again and again until all has been seen.

    `left` of an outcome is not the asker's to look at. Raises SecurerunError when a worker is killed.
    """
    scan = Scan(settings, present)
    try:
        outcome = scan.look(starts, _BUDGET)
        count = min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
        yield outcome
        if count > 1 and outcome.left:
            yield from _share(settings, outcome.left, present, count)
            return
        while outcome.left:
            outcome = scan.look(outcome.left, _BUDGET)
            yield outcome
    finally:
        scan.close()


def _share(
    settings: Settings, left: list[Directory], present: Callable[[Batch], list[T]], count: int
) -> Iterator[Outcome[T]]:
    from multiprocessing.connection import wait

    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_start(settings, present, [worker.connection for worker in workers]))
        idle = [worker.connection for worker in workers]
        busy: list[Connection] = []
        left = [*left]
        while left or busy:
            while left and idle:
                # The last are handed out one by one, so that all workers are done at about the same time.
                share = max(1, min(_MOST_DIRECTORIES, len(left) // (2 * count)))
                idle[-1].send(left[-share:])
                busy.append(idle.pop())
                del left[-share:]
            ready = wait(busy)
            for connection in [each for each in busy if each in ready]:
                outcome: Outcome[T] = connection.recv()
                busy.remove(connection)
                idle.append(connection)
                left += outcome.left
                yield outcome
    except (EOFError, ConnectionError) as error:
        raise SecurerunError("a process of the audit was killed; is memory short? Audit fewer paths at once") from error
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.join()


def _start(settings: Settings, present: Callable[[Batch], list[T]], others: Sequence[Connection]) -> _Worker:
    import multiprocessing

    # Forked, a worker has the roots' descriptors and the table; neither it nor this process has threads here.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, settings, present, [ours, *others]), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(
    connection: Connection, settings: Settings, present: Callable[[Batch], list[T]], others: Sequence[Connection]
) -> None:
    """Look into what is asked until nobody asks any more: when the other process has ended, its end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in others:
        other.close()
    scan = Scan(settings, present)
    while True:
        try:
            directories: list[Directory] = connection.recv()
            connection.send(scan.look(directories, _BUDGET))
        except (EOFError, ConnectionError):
            return
