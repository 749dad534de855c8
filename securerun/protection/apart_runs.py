"""The runs of this host that are in networks of their own, as their keepers tell this user, or root, of them.

Anybody may stand at such a place, at many of them, and be silent: nobody is waited for longer than their share.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from securerun.firewall.policy import RUN_ID
from securerun.guard import records
from securerun.guard.records import Record
from securerun.linux import local_sockets, sent_along
from securerun.protection import keeper

_SOCKETS = Path("/proc/net/unix")
# "@name" for an abstract address, which begins with a zero byte (unix(7)).
_PLACE = re.compile(rf" @{re.escape(keeper.place_of('')[1:])}({RUN_ID.pattern})$", re.MULTILINE)
# Of one user, all together.
_SECONDS = 1.0
_MOST_RUNS = 256
_MOST_PLACES = 65_536
_MOST_BYTES = 1024 * 1024
_UNREAD_AT_ONCE = 64


def read() -> tuple[Record, ...]:
    """Return their records: this user's own, for root everybody's. What is none, or another's, is passed over."""
    try:
        text = _SOCKETS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found: list[Record] = []
    spent: Counter[int] = Counter()  # nanoseconds, by user
    asked: Counter[int] = Counter()
    parting = sent_along.Parting()
    for run_id in sorted(set(_PLACE.findall(text)))[:_MOST_PLACES]:
        with contextlib.suppress(*records.NO_RECORD), _at(run_id, parting) as end:
            _, user = local_sockets.peer_of(end)
            asked[user] += 1
            if os.getuid() not in {user, 0} or asked[user] > _MOST_RUNS or spent[user] > _SECONDS * 1e9:
                continue
            begun = time.monotonic_ns()
            try:
                record = _record(end, run_id, user)
            finally:
                spent[user] += time.monotonic_ns() - begun
            found += record
    parting.close()
    return tuple(found)


@contextlib.contextmanager
def _at(run_id: str, parting: sent_along.Parting) -> Iterator[socket.socket]:
    """Have a conversation with whoever stands there. Raises OSError, also where it would have to be waited for."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sent_along.take_none(end)
        end.connect(keeper.place_of(run_id))
        yield end
    finally:
        parting.take(end)
        if len(parting) >= _UNREAD_AT_ONCE:
            parting.close()


def _record(end: socket.socket, run_id: str, user: int) -> list[Record]:
    record = records.understood(json.loads(_all(end)))
    # Whoever stands there tells of their own run alone.
    return [record] if record.run_id == run_id and record.user == user else []


def _all(end: socket.socket) -> bytes:
    deadline, text = time.monotonic() + _SECONDS, bytearray()
    while len(text) < _MOST_BYTES:
        end.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = sent_along.receive(end, 65536)
        if not chunk:
            break
        text += chunk
    return bytes(text)
