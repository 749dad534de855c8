"""A child of the tester's with its own mounts and, in a host, its own network: for looks at a system made otherwise.

    findings = apart(lambda: list(check(scene)), before=lambda: cover("/proc/sys/kernel/core_pattern", "core"))

What is mounted or set in the child goes with it; its answer comes back as it was returned.
"""

from __future__ import annotations

import codecs
import os
import pickle
import subprocess
import tempfile
import traceback
from pathlib import Path
from typing import Callable, TypeVar

import namespaces
import pytest
from hosts import NAMESPACES, Host

Answer = TypeVar("Answer")
Test = TypeVar("Test", bound=Callable[..., None])

NOBODY = 65534
# As root of a user namespace of its own (user_namespaces(7)): no privilege is needed for it.
IN_NAMESPACE = ["unshare", "--map-root-user", "--net", "--user"]


def apart(
    look: Callable[[], Answer],
    *,
    before: Callable[[], object] = lambda: None,
    host: Host | None = None,
    user: int = 0,
) -> Answer:
    """What `look` returns in a child with mounts of its own, after `before`, in the network of a host, as a user.

    Raises RuntimeError, with the child's traceback, for whatever is raised there.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _answer(writing, look, before, host, user)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    worked, value = pickle.loads(answer)  # noqa: S301 - our own child's
    if not worked:
        raise RuntimeError(value)
    result: Answer = value
    return result


def cover(path: str, text: str) -> None:
    """In the child: another content for a file, such as one of /proc/sys that belongs to the whole machine."""
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write(text + "\n")
    Path(file.name).chmod(0o644)
    subprocess.run(["mount", "--no-mtab", "--bind", file.name, path], check=True)
    Path(file.name).unlink()


def cover_directory(path: str) -> None:
    """In the child: an empty directory of root's in place of another."""
    subprocess.run(["mount", "--no-mtab", "-t", "tmpfs", "-o", "mode=755", "tmpfs", path], check=True)


def _has_namespaces() -> bool:
    probe = [*IN_NAMESPACE, "ip", "link", "add", "wire0", "type", "veth", "peer", "name", "far0"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


_skipped_without = pytest.mark.skipif(not _has_namespaces(), reason="no network namespaces with veth devices here")


def needs_namespace(test: Test) -> Test:
    """Mark a test that runs something IN_NAMESPACE: for ordinary users too, where they may make such namespaces."""
    marked: Test = pytest.mark.ground(_skipped_without(test))
    return marked


def _answer(
    writing: int, look: Callable[[], object], before: Callable[[], object], host: Host | None, user: int
) -> None:
    try:
        namespaces.leave(namespaces.MOUNTS)
        subprocess.run(["mount", "--no-mtab", "--make-rprivate", "/"], check=True)
        if host is not None:
            with (NAMESPACES / host.namespace).open() as namespace:
                namespaces.enter(namespace.fileno(), namespaces.NETWORK)
        before()
        if user:
            codecs.lookup("ascii")  # and whatever else Python loads late: it may lie where only root may look
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        answer: tuple[bool, object] = (True, look())
    except BaseException:
        answer = (False, traceback.format_exc())
    with os.fdopen(writing, "wb") as answers:
        pickle.dump(answer, answers)
    os._exit(0)
