"""A node whose guard serves containers: the listener of `securerun-guard --listen`, and jobs behind its socket."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from engines import IMAGE_USER, Engine, Node
from holding import HOLDER, Held
from hosts import Host, eventually
from users import GUARD

from securerun.guard.program import SOCKET

ANSWER_SECONDS = 20.0
# Nothing beyond what Pod Security "restricted" has: no capability, no way to more, the default seccomp filter.
RESTRICTED = ("--cap-drop=all", "--security-opt=no-new-privileges")
MOUNTED = f"--volume={SOCKET.parent}:{SOCKET.parent}:ro"
HOLDING = (sys.executable, str(HOLDER))


@contextlib.contextmanager
def listening(node: Node) -> Iterator[subprocess.Popen[str]]:
    """The node's listener, until the block ends."""
    listener = node.popen(node.host, [GUARD, "--listen"], stdout=subprocess.DEVNULL)
    try:
        assert eventually(node.place(str(SOCKET)).is_socket), listener.stderr and listener.stderr.read()
        yield listener
    finally:
        listener.terminate()
        listener.wait(timeout=ANSWER_SECONDS)


def network_of(pod: Host) -> str:
    """The option by which podman puts a container into the network of a host, as a pod's plug-in made it."""
    return f"--network=ns:/run/netns/{pod.namespace}"


def in_pod(
    engine: Engine,
    pod: Host | None,
    *options: str,
    command: Sequence[str],
    user: int = IMAGE_USER,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start a command without any privilege, in a pod's own network or in the node's, with the node's socket."""
    network = "--network=host" if pod is None else network_of(pod)
    given = (*RESTRICTED, MOUNTED, network, f"--user={user}", *options)
    return engine.popen(*given, command=command, env=env, stdin=subprocess.PIPE)


def held(engine: Engine, pod: Host | None, *words: str, options: Sequence[str] = (), user: int = IMAGE_USER) -> Held:
    """A lease that holder.py holds in a container."""
    return Held(in_pod(engine, pod, *options, command=[*HOLDING, *words], user=user))
