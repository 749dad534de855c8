"""A file system that is mounted where nobody sees it, this process included: it has a descriptor of its root."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from pathlib import Path

from securerun.linux import forked, libc

_CLONE_NEWNS = 0x00020000
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MS_REC_PRIVATE = 16384 | 1 << 18
_SECONDS = 5.0
_ANSWER = struct.Struct("=i")
# A directory that there is; in the child's namespace nobody misses what was there.
_PLACES = ("/sys/fs/cgroup", "/mnt", "/tmp")  # noqa: S108 - hidden, not used


def open_unseen(kind: str, options: str = "") -> int:
    """Mount a file system for this process alone and return a descriptor of its root. Raises OSError.

    A child mounts it, in a mount namespace of its own, and hands the descriptor over: what this process sees, and
    whatever it starts, stays as it is. The mount lasts as long as something is open in it (umount2(2), MNT_DETACH).
    """
    child, near = forked.fork(lambda far: _hand_over(far, kind, options))
    with near:
        near.settimeout(_SECONDS)
        try:
            answer, descriptors, _, _ = socket.recv_fds(near, _ANSWER.size, 1)
        finally:
            os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored, the kernel reaps
                os.waitpid(child, 0)
    code = _ANSWER.unpack(answer)[0] if len(answer) == _ANSWER.size else errno.EIO
    if code or not descriptors:
        raise OSError(code or errno.EIO, os.strerror(code or errno.EIO))
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def _hand_over(far: socket.socket, kind: str, options: str) -> None:
    try:
        socket.send_fds(far, [_ANSWER.pack(0)], [_mounted(kind, options)])
    except OSError as error:
        far.sendall(_ANSWER.pack(error.errno or errno.EIO))
    # Until the parent has taken the descriptor and kills.
    far.recv(1)


def _mounted(kind: str, options: str) -> int:
    libc.check(libc.library.unshare(_CLONE_NEWNS))
    libc.check(libc.library.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))
    place = next(filter(os.path.isdir, _PLACES), "/mnt")
    flags, data = _MS_NOSUID_NODEV_NOEXEC, options.encode() or None
    libc.check(libc.library.mount(kind.encode(), place.encode(), kind.encode(), flags, data))
    return os.open(Path(place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
