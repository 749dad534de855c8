"""A file with a secret in it, read so that nobody else can have read it, and nothing in its place does any harm.

All is asked of the open file, never of its name: what the name stands for may be another file a moment later.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path

# munge's, which makes 128 bytes and takes 1,024 at most, are the longest that are known.
MOST_BYTES = 4096
LEAST_BYTES = 32
# A key in hexadecimal digits has some 14 of 16; a passphrase of 32 letters has more than these.
_LEAST_DIFFERENT = 8
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OF_ROOT_TOO = stat.S_IRGRP
_ROOT = 0
# Whoever a server of NFS makes of root, or of a user that it does not know (exports(5), idmapd.conf(5)).
_SQUASHED = (65534, 4294967294)
_BLANK = b" \t\r\n"
_SQUASH = "on a file system of the network root may be nobody (exports(5), root_squash)"


class Unfit(Exception):
    """A file is not one to keep a secret in, or has none. The message goes on from the file's name."""


def read(path: Path, owners: Collection[int]) -> bytes:
    """Return the secret in a file, without the blanks and line ends behind it.

    owners: the user ids whose file it may be. Raises FileNotFoundError where there is none, and Unfit for what must not
    be believed to be a secret, and for what cannot be read.
    """
    try:
        # Whoever opens a FIFO waits for its other end, without O_NONBLOCK; and a terminal is not to become ours.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Unfit(_why_not_opened(error)) from error
    try:
        found = os.fstat(descriptor)
        _require_secluded(found, owners)
        content = _content(descriptor)
    except OSError as error:
        raise Unfit(f"cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)
    if content and not found.st_size:  # of /proc and /sys: what is read there others may know, and tomorrow it is other
        raise Unfit("is no file that is kept, the kernel makes it when it is read; name a file with the key in it")
    return _required(content)


def _why_not_opened(error: OSError | ValueError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ELOOP:
        return "is a symbolic link, which may come to lead to another file; name the file itself"
    if number == errno.ENXIO:  # a socket
        return "is no regular file; name a file with the key in it"
    if number in (errno.EACCES, errno.EPERM) and os.geteuid() == _ROOT:
        return f"cannot be read by root ({os.strerror(number)}); {_SQUASH}: start the job as the file's owner"
    reason = error.strerror if isinstance(error, OSError) else error
    return f"cannot be read ({reason}); name a file that you can read"


def _require_secluded(found: os.stat_result, owners: Collection[int]) -> None:
    """Raise Unfit unless it is a regular file that its owner, one of `owners`, keeps from all others."""
    if stat.S_ISDIR(found.st_mode):
        raise Unfit("is a directory; name the file in it")
    if not stat.S_ISREG(found.st_mode):
        raise Unfit("is no regular file; name a file with the key in it")
    if found.st_uid not in owners:
        why = f" ({_SQUASH})" if found.st_uid in _SQUASHED else ""
        raise Unfit(
            f"belongs to user {found.st_uid}, who knows it then and may change it{why}; have a copy of your own"
        )
    # Of root's files a group may read one where root gave it to that group: so a pod's secrets are, with fsGroup.
    forbidden = _OTHERS & ~_OF_ROOT_TOO if found.st_uid == _ROOT != os.geteuid() else _OTHERS
    mode = stat.S_IMODE(found.st_mode)
    if mode & forbidden:
        raise Unfit(
            f"can be read or changed by others (mode {mode:o}), who may have it: move it away on all nodes, make a new "
            "one, and `chmod go-rwx` each copy at once"
        )


def _content(descriptor: int) -> bytes:
    """Read what is there, and no more than one byte more than there may be. Raises OSError."""
    content = b""
    while len(content) <= MOST_BYTES:
        chunk = os.read(descriptor, MOST_BYTES + 1 - len(content))
        if not chunk:
            break
        content += chunk
    return content


def _required(content: bytes) -> bytes:
    """Return what is a secret of some length. Raises Unfit."""
    if len(content) > MOST_BYTES:
        raise Unfit(f"has more than {MOST_BYTES} bytes, as no key has; name the file with the key")
    secret = content.rstrip(_BLANK)
    if not secret:
        raise Unfit("is empty; copy the key there once more, or make one")
    if len(secret) < LEAST_BYTES:
        raise Unfit(f"has {len(secret)} bytes, and a key has {LEAST_BYTES} at least; copy it once more, or make one")
    if len(set(secret)) < _LEAST_DIFFERENT:
        raise Unfit("is nearly the same byte all over, which anybody could guess; make a key")
    return secret
