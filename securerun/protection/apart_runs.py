"""The runs of this host that are in networks of their own, as their keepers tell this user, or root, of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from securerun.firewall.policy import RUN_ID
from securerun.guard import records
from securerun.guard.records import Record
from securerun.linux import local_sockets
from securerun.protection import keeper

_SOCKETS = Path("/proc/net/unix")
# "@name" for an abstract address, which begins with a zero byte (unix(7)).
_PLACE = re.compile(rf" @{re.escape(keeper.place_of('')[1:])}({RUN_ID.pattern})$", re.MULTILINE)
_SECONDS = 1.0
_MOST_BYTES = 1024 * 1024


def read() -> tuple[Record, ...]:
    """Return their records: this user's own, for root everybody's. What is none, or another's, is passed over."""
    try:
        text = _SOCKETS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(record for run_id in sorted(set(_PLACE.findall(text))) for record in _of(run_id))


def _of(run_id: str) -> Iterator[Record]:
    with contextlib.suppress(*records.NO_RECORD), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.settimeout(_SECONDS)
        end.connect(keeper.place_of(run_id))
        _, user = local_sockets.peer_of(end)
        if os.getuid() not in {user, 0}:
            return
        record = records.understood(json.loads(_all(end)))
        # Whoever stands there tells of their own run alone.
        if record.run_id == run_id and record.user == user:
            yield record


def _all(end: socket.socket) -> bytes:
    text = b""
    while len(text) < _MOST_BYTES and (chunk := end.recv(65536)):
        text += chunk
    return text
