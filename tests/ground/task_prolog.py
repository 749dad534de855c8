"""A task's prolog as Slurm would start it, any number of times, and somebody at the socket who answers as guards do.

For what its start takes: no job is guarded, and the one who answers is root, as whoever listens there has to be.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from securerun.firewall.policy import Layer
from securerun.guard import program
from securerun.guard.protocol import VERSIONS, Guarding, Ready, encode

COMMAND = program.of_slurm("task-prolog")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost=controller(10.77.0.3)
NodeName=sl0 NodeAddr=10.77.0.1
NodeName=sl1 NodeAddr=10.77.0.2
"""


@contextlib.contextmanager
def environment(place: Path) -> Iterator[dict[str, str]]:
    """The environment in which COMMAND has a guard and two nodes. place: a directory of its own."""
    configuration, path = place / "slurm.conf", place / "guard.sock"
    configuration.write_text(_CONFIGURATION)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=_answer, args=(listener,), daemon=True).start()
        try:
            yield {
                "PATH": os.defpath,
                "SECURERUN_SOCKET": str(path),
                "SLURM_CONF": str(configuration),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "sl[0-1]",
                "SLURM_SCRIPT_CONTEXT": "prolog_task",
            }
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _answer(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # until nobody listens any more
        while True:
            connection = listener.accept()[0]
            with connection, connection.makefile("rb") as orders:
                connection.sendall(encode(Ready(os.getpid(), VERSIONS)))
                if orders.readline():
                    connection.sendall(encode(Guarding((Layer("shield", "socket filter"),))))
