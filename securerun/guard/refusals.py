"""Which refusals get a line in the system's log: a few a minute of each user, and of the others their number.

Each refusal is by another process, so what was logged stands in a file of root's, the one of `securerun.guard.waiting`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

from securerun.errors import PrivilegeError
from securerun.guard import waiting
from securerun.linux import file_lock

_LINES_A_PERIOD = 10
_MOST_BYTES = 1 << 20
_LAST_USER = (1 << 32) - 2
# Whoever was refused before it was told who it is; no user has this number (chown(2)).
SOMEBODY = (1 << 32) - 1
_LOCK_SECONDS = 2.0


def lines(account: int, words: str) -> list[str]:
    """Return what is to be logged now that this account was refused something: the words, unless there were many.

    And how many others were left out of the log, of any user whose minute is over.
    """
    try:
        descriptor = waiting.open_file()
    except PrivilegeError:
        return [words]
    try:
        with file_lock.time_limit(_LOCK_SECONDS):
            file_lock.lock(descriptor)
        return _counted(descriptor, str(account), words)
    except (OSError, file_lock.TimeUp):
        return []  # so many at once are a flood
    finally:
        os.close(descriptor)


def _counted(descriptor: int, user: str, words: str) -> list[str]:
    now = time.monotonic()
    known = _read(descriptor)
    over = {name: entry for name, entry in known.items() if not 0 <= now - entry[0] < waiting.REFUSALS_SECONDS}
    found = [
        f"{int(refused) - _LINES_A_PERIOD} more refusals to {_named(int(name))} are not in this log"
        for name, (_, refused) in over.items()
        if refused > _LINES_A_PERIOD
    ]
    current = {name: entry for name, entry in known.items() if name not in over}
    began, refused = current.get(user, (now, 0))
    current[user] = (began, refused + 1)
    _write(descriptor, current)
    return [*found, words] if refused < _LINES_A_PERIOD else found


def _named(account: int) -> str:
    if account == SOMEBODY:
        return "somebody"
    return f"user {account}" if account <= _LAST_USER else "a container"


def _read(descriptor: int) -> dict[str, tuple[float, float]]:
    """Return when each user's minute began, on the monotonic clock, and how many refusals it had; {} for nonsense."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        document = json.loads(os.pread(descriptor, _MOST_BYTES, 0) or b"{}")
        return {str(int(name)): (float(began), float(refused)) for name, (began, refused) in document.items()}
    return {}


def _write(descriptor: int, entries: dict[str, tuple[float, float]]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(entries).encode(), 0)
