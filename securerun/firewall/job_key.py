"""The key of a job, and how it comes from what the nodes of a job have in common (HKDF-SHA256, RFC 5869).

    source ──extract──▶ · ──expand: kind, user, meeting──▶ secret of the job ──expand──▶ key of its SYNs
    a file's bytes                                         32 bytes                    ├─▶ key of its SYN-ACKs
                                                                                       ├─▶ fingerprint, for people
                                                                                       └─▶ secret for its frameworks

Who holds the source makes the job's secret, the launcher or the guard; what is made of that is made in the guard. Each
of these hides its bytes from whoever prints, pickles or copies it, so that none gets into a log, a record or a report.

Loads nothing: what hashes is imported where there is a key, since it would take a guard 5 ms at each start.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NoReturn

SECRET_BYTES = 32
# SipHash-2-4's.
_KEY_BYTES = 16
_FINGERPRINT_BYTES = 4
_HASH = "sha256"
_HASH_BYTES = 32

# Whose the source is. The same file is the same key for all who have it, whatever they call it; of a source that root's
# guard holds each user has a key of their own.
OF_USER, OF_SITE, OF_SLURM = "user", "site", "slurm"

# Another one would be another key on each node.
_CONTEXT = b"securerun: the key of a job, 1"
# kind, user id or _NOBODY, meeting: of fixed sizes, so that no two things are written alike.
_ABOUT = struct.Struct(f">8sQ{SECRET_BYTES}s")
_NOBODY = 2**64 - 1


class _Hidden:
    """What is not printed, pickled or copied with its bytes; nor is it JSON."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is not to leave this process")


class JobSecret(_Hidden):
    """What the keys of one job are made of: 32 bytes. Raises ValueError for another number of them."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        if len(value) != SECRET_BYTES:
            raise ValueError(f"the secret of a job has {SECRET_BYTES} bytes")
        self._value = value

    def __repr__(self) -> str:
        return "JobSecret()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobSecret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def reveal(self) -> bytes:
        """Return the bytes, for the message that takes them to the guard."""
        return self._value

    def key(self) -> JobKey:
        """Return the key whose tags the nodes of the job show to each other."""
        return JobKey(
            syn=expand(self._value, b"SYN", _KEY_BYTES),
            syn_ack=expand(self._value, b"SYN-ACK", _KEY_BYTES),
            fingerprint=expand(self._value, b"fingerprint", _FINGERPRINT_BYTES).hex(),
        )

    def for_frameworks(self) -> bytes:
        """Return what the job's own programs may use as a secret: from it nobody gets at the keys."""
        return expand(self._value, b"frameworks", SECRET_BYTES)


@dataclass(frozen=True)
class JobKey(_Hidden):
    """What the packets that open a job's connections are signed with.

    syn, syn_ack: of those who open a connection, and of those who answer; 16 bytes each. fingerprint: 8 hexadecimal
    digits that tell keys apart, and nothing of them, to be seen by anybody.
    Raises ValueError for keys of another length.
    """

    syn: bytes = field(repr=False)
    syn_ack: bytes = field(repr=False)
    fingerprint: str

    def __post_init__(self) -> None:
        if not len(self.syn) == len(self.syn_ack) == _KEY_BYTES:
            raise ValueError(f"a key of SipHash has {_KEY_BYTES} bytes")


def derive(source: bytes, kind: str, meeting: bytes, user: int | None = None) -> JobSecret:
    """Return the secret of a job whose nodes have a source in common, and meet at the same place.

    kind: OF_USER, OF_SITE or OF_SLURM. meeting: the digest of what the nodes know of where they meet, without having
    talked. user: whose job it is, where the source is not the user's own.
    """
    about = _ABOUT.pack(kind.encode("ascii"), _NOBODY if user is None else user, meeting)
    return JobSecret(expand(extract(_CONTEXT, source), about, SECRET_BYTES))


def prepare() -> None:
    """Load what hashes."""
    expand(bytes(_HASH_BYTES), b"", 1)


def extract(salt: bytes, material: bytes) -> bytes:
    """Return a pseudorandom key of any material (RFC 5869, 2.2)."""
    import hmac

    return hmac.digest(salt or bytes(_HASH_BYTES), material, _HASH)


def expand(key: bytes, info: bytes, length: int) -> bytes:
    """Return so many bytes of a pseudorandom key, others for each `info` (RFC 5869, 2.3)."""
    import hmac

    block, found = b"", b""
    for number in range(1, -(-length // _HASH_BYTES) + 1):
        block = hmac.digest(key, block + info + bytes([number]), _HASH)
        found += block
    return found[:length]
