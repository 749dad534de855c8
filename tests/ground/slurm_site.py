"""A site of Slurm's whose nodes have what `securerunctl setup slurm` prints: socket, TaskProlog, Prolog and Epilog.

    with Site() as site, site.cluster("linuxproc", "task-prolog") as cluster:
        job = cluster.popen(site.alice, "srun", "--nodes=2", "python", "train.py")

Each node is a machine of its own, with a /run and a log, and the same two users.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkout import COMMANDS
from conversation import guards, log_of, socket_unit
from hosts import Host, Network, eventually
from slurm import Cluster
from users import PrivateMachine, User

from securerun.guard import program

NODES = ("sl0", "sl1")
_PROGRAMS = ("task-prolog", "prolog", "epilog")
_KEYS = {"task-prolog": "TaskProlog", "prolog": "Prolog", "epilog": "Epilog"}


class Site:
    """Two nodes, a controller and a stranger; a context manager."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Site:
        self.network = self._stack.enter_context(Network(*NODES, "controller", "stranger", "login"))
        self.machines = {node: self._stack.enter_context(PrivateMachine()) for node in NODES}
        users = [[machine.add_user(name) for name in ("alice", "bob")] for machine in self.machines.values()]
        self.alice, self.bob = users[0]
        for machine in self.machines.values():
            with machine.place("/etc/hosts").open("a") as hosts:
                hosts.writelines(f"{host.ipv4} {host.name}\n" for host in (*self.nodes, self.network["controller"]))
        assert users[0] == users[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def nodes(self) -> list[Host]:
        return [self.network[node] for node in NODES]

    @property
    def stranger(self) -> Host:
        return self.network["stranger"]

    @contextlib.contextmanager
    def cluster(
        self, tracking: str, *programs: str, flags: str = "Alloc", sockets: bool = True, options: Sequence[str] = ()
    ) -> Iterator[Cluster]:
        """Slurm, with these programs configured. options: of the Prolog."""
        keys = "".join(f"{_KEYS[name]}=/etc/slurm/{name}.sh\n" for name in programs)
        machines = {**self.machines, "controller": self.machines[NODES[0]]}
        with contextlib.ExitStack() as stack:
            for node, machine in self.machines.items():
                for name in _PROGRAMS:
                    command = program.of_slurm(name, *(options if name == "prolog" else ()))
                    machine.write(f"/etc/slurm/{name}.sh", f"#!/bin/sh\nexec {shlex.join(command)}\n", mode=0o755)
                if sockets:
                    stack.enter_context(socket_unit(machine, self.network[node]))
            more = f"PrologFlags={flags}\n{keys}"
            yield stack.enter_context(
                Cluster(self.network, "controller", NODES, tracking=tracking, machines=machines, more=more)
            )

    @contextlib.contextmanager
    def place(self, *users: User) -> Iterator[Path]:
        """A directory that all nodes share, as a file system of a cluster's, and its users may write to."""
        place = Path(tempfile.mkdtemp(prefix="shared-"))
        place.chmod(0o777)
        try:
            yield place
        finally:
            shutil.rmtree(place)

    def runs(self, node: str, user: User | None = None) -> list[dict[str, Any]]:
        """What `securerunctl status` tells on a node."""
        machine = self.machines[node]
        done = machine.run(self.network[node], [COMMANDS / "securerunctl", "status", "--json"], user=user)
        assert done.returncode == 0, done
        found: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
        return found

    def log(self) -> str:
        """What guards said on all nodes."""
        return "\n".join(f"== {node}\n{log_of(machine)}" for node, machine in self.machines.items())

    def is_clean(self) -> bool:
        """Whether no guard and no record is left, some moments after what ended them."""
        machines = self.machines.values()
        return eventually(lambda: not any(guards(each) or each.records() for each in machines), seconds=15)
