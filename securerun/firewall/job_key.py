"""The key of one job, as its shield uses it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class JobKey:
    """What the nodes of one job have in common: a SipHash key of 16 bytes for each direction.

    syn: of the packets that open connections. syn_ack: of those that answer. fingerprint: 8 hexadecimal digits, by
    which people compare nodes; it tells nothing of the keys. No text of it shows them.
    """

    syn: bytes = field(repr=False)
    syn_ack: bytes = field(repr=False)
    fingerprint: str
