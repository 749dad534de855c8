"""Nodes with a real container engine: podman, and docker.io with its own containerd, both on runc.

    with Network("node0", "stranger") as network, Node(network["node0"]) as node:
        podman = node.podman()
        done = podman.run("--network=host", "--cap-add=NET_ADMIN", command=["securerun", "train.py"])

A node is a private machine (users.py) whose cgroup file system is version 2, at /sys/fs/cgroup, whatever the tester's
machine has, and whose root is a cgroup of its own: when the block ends, or the tester, all below it is killed and
removed. Containers see the node's /usr, the Python of the tests, the checkout and, in /etc, what programs look up; all
of it read-only. Their image is made on the spot and has nothing but names in it.

The engines' defaults are theirs (capabilities, seccomp, namespaces) but for what this needs to run inside a machine
that is a container or lacks controllers itself: cgroupfs as manager and no limit of pids.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cgroups import end_all
from checkout import COMMANDS
from hosts import Argument, Host, Stream, cgroup2_mount, eventually, finish
from lacking import Lacking
from users import PrivateMachine, needed_paths, outermost

TOOLS = {"podman": "podman", "docker": "docker.io", "dockerd": "docker.io", "runc": "runc", "catatonit": "catatonit"}
ENGINES = ("podman", "docker")
IMAGE = "localhost/securerun-tests:1"
# A user without a name on the node, as images have them.
IMAGE_USER = 1000
_CGROUPS = "/sys/fs/cgroup"
_PLACE = "/run/engines"
_DOCKER_SOCKET = f"unix://{_PLACE}/docker.sock"
# Not /usr/local/bin, where a developer's machine may have another client.
_PODMAN, _DOCKER, _DOCKERD = "/usr/bin/podman", "/usr/bin/docker", "/usr/sbin/dockerd"
_PODMAN_CONFIGURATION = """
[containers]
pids_limit = 0
default_ulimits = []
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
init_path = "/usr/bin/catatonit"
"""
# What a program of /usr looks up. Names of alternatives are links of Debian's.
_LOOKED_UP = ("alternatives", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "nsswitch.conf", "passwd")
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64"}
# sbin is a directory: docker puts its init there.
_DIRECTORIES = ("dev", "etc", "home", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var")
_CONTAINER_PATH = f"{COMMANDS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a container is given for the shield, beside CAP_NET_ADMIN and one of CAP_BPF and CAP_SYS_ADMIN.
HOSTS_CGROUPS = ("--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw")
_START_SECONDS = 20.0
_NAME = "--name="
_END_SECONDS = 5.0
_numbers = itertools.count()


class Node(PrivateMachine):
    """A private machine with a pure cgroup version 2, in one host of a network, that runs containers."""

    def __init__(self, host: Host, *more: Path) -> None:
        super().__init__(*more)
        self.host = host
        self.stranger: Host | None = None
        self._more = more
        self._root: Path | None = None
        self._engines: dict[str, Engine] = {}

    def __enter__(self) -> Node:
        require_tools()
        super().__enter__()
        return self

    def podman(self) -> Engine:
        """This node's podman, with the image."""
        return self._engine("podman")

    def docker(self) -> Engine:
        """This node's docker, with its daemon running, and the image."""
        return self._engine("docker")

    def engine(self, name: str) -> Engine:
        """One of ENGINES."""
        return self._engine(name)

    @property
    def cgroup(self) -> Path:
        """Where the tester sees the root of this node's cgroups."""
        assert self._root is not None, "used outside of its block"
        return self._root

    def close(self) -> None:
        """End all of it, containers included; may be called again."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        try:
            super().close()
        finally:
            if self._root is not None:
                _remove(self._root)
                self._root = None

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            engine = Docker(self) if name == "docker" else Podman(self)
            self._engines[name] = engine
            engine.start()
        return self._engines[name]

    def _holding(self) -> list[str]:
        mount = cgroup2_mount()
        if mount is None:
            raise RuntimeError("no cgroup version 2 is mounted: `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`")
        self._root = mount / f"sr-node-{os.getpid()}-{next(_numbers)}"
        self._root.mkdir()
        # Whoever kills the tester ends all of the node: the holder's input ends, and it ends its own cgroup.
        script = f"echo; while read -r _; do :; done; echo 1 > {_CGROUPS}/cgroup.kill"
        unshare = ["unshare", "--mount", "--cgroup", "--propagation", "slave", "--", "sh", "-c"]
        make = f"umount -R {_CGROUPS} && mount -n -t cgroup2 cgroup2 {_CGROUPS} && mkdir {_CGROUPS}/system || exit"
        joined = ["sh", "-ec", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(self._root)]
        return [*joined, *unshare, f"{make}; {script}"]

    def _entrance(self) -> list[str]:
        """In the node's namespaces, and in a cgroup beside its containers, as its services are."""
        entered = [
            "nsenter",
            f"--mount=/proc/{self._holder_pid}/ns/mnt",
            f"--cgroup=/proc/{self._holder_pid}/ns/cgroup",
        ]
        joined = ["sh", "-ec", 'echo $$ > "$0"; exec "$@"', f"{_CGROUPS}/system/cgroup.procs"]
        # A process joins before it enters: what it can write from where it is.
        outside = ["sh", "-ec", 'echo $$ > "$0"; exec "$@"', str(self.cgroup / "cgroup.procs")]
        return [*outside, *entered, "--", *joined]

    def _make_system_directories(self) -> None:
        super()._make_system_directories()
        # podman keeps its locks there.
        self._mount("-t", "tmpfs", "tmpfs", "/dev/shm")  # noqa: S108 - the name of the mount


class Engine:
    """How containers are started on a node. Options are those that podman and docker have in common."""

    privileged: tuple[str, ...] = ("--privileged",)
    """Options that give a container all that root of this machine has."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._named: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        """Make it ready, and its image."""
        raise NotImplementedError

    def close(self) -> None:
        """End what it started for itself."""

    def call(self, *words: str, check: bool = True) -> str:
        """Run a command of the engine's own to its end; returns what it printed."""
        done = self.node.run(self.node.host, [*self._client(), *words], timeout=_START_SECONDS)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def command(
        self,
        *options: str,
        command: Sequence[Argument],
        env: Mapping[str, str] | None = None,
    ) -> list[str]:
        """`engine run` of `command`, for `Node.popen`."""
        seen = [f"--volume={path}:{path}:ro" for path in ("/usr", *self._seen())]
        variables = {"PATH": _CONTAINER_PATH, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", **(env or {})}
        told = [f"--env={name}={value}" for name, value in {"PYTHONUNBUFFERED": "1", **variables}.items()]
        fixed = ["run", "--rm", "--interactive", "--workdir=/tmp", *self._needed(), *seen, *told]
        return [*self._client(), *fixed, *options, IMAGE, *(os.fspath(word) for word in command)]

    def popen(
        self,
        *options: str,
        command: Sequence[Argument],
        env: Mapping[str, str] | None = None,
        stdin: Stream = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Start a container; what it prints and how it ends is the process' own."""
        name = next((option[len(_NAME) :] for option in options if option.startswith(_NAME)), "")
        told = [*options, *self._told_of(name)] if name else options
        process = self.node.popen(self.node.host, self.command(*told, command=command, env=env), stdin=stdin)
        self._named[name] = process
        return process

    def run(
        self,
        *options: str,
        command: Sequence[Argument],
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        text_input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end."""
        stdin = subprocess.DEVNULL if text_input is None else subprocess.PIPE
        process = self.popen(*options, command=command, env=env, stdin=stdin)
        return finish(process, timeout=timeout, text_input=text_input)

    def pid_of(self, name: str) -> int:
        """The pid, seen from the tester, of the first process of a container that runs by this name."""
        found = ""

        def runs() -> bool:
            nonlocal found
            if not self._may_be_asked_for(name):
                return False
            found = self.call("inspect", "--format={{.State.Pid}}", name, check=False).strip()
            return found not in ("", "0")

        assert eventually(runs, seconds=_START_SECONDS), f"there is no container {name}: {self._what_became_of(name)}"
        return int(found)

    def _what_became_of(self, name: str) -> str:
        process = self._named.get(name)
        if process is None:
            return "none was started"
        return "it is still being started" if process.poll() is None else str(finish(process))

    def cgroup_of(self, name: str) -> str:
        """The cgroup of that process below the root of the node's, without a slash before it."""
        listed = Path(f"/proc/{self.pid_of(name)}/cgroup").read_text()
        place = listed.split("0::")[1].splitlines()[0]
        return place.partition(f"/{self.node.cgroup.name}/")[2]

    def pids_in(self, name: str) -> list[int]:
        """The processes of a container, seen from the tester: those of its pid namespace, in whichever cgroup."""
        found, wanted = [], os.readlink(f"/proc/{self.pid_of(name)}/ns/pid")  # noqa: PTH115 - no path
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended while we looked
                if os.readlink(directory / "ns/pid") == wanted:  # noqa: PTH115
                    found.append(int(directory.name))
        return found

    def kill(self, name: str) -> None:
        """SIGKILL to a container's first process, and by the kernel to all others in it."""
        os.kill(self.pid_of(name), signal.SIGKILL)

    def _client(self) -> list[str]:
        raise NotImplementedError

    def _needed(self) -> list[str]:
        return []

    def _told_of(self, name: str) -> list[str]:
        """More options for a container with a name; called before it is started."""
        return []

    def _may_be_asked_for(self, name: str) -> bool:
        return True

    def _seen(self) -> list[Path]:
        return outermost(path for path in needed_paths(self.node._more) if Path("/usr") not in (path, *path.parents))

    def _write_image(self) -> str:
        path = f"{_PLACE}/image.tar"
        self.node.place(path).write_bytes(_image(self.node.place("/etc")))
        return path


class Podman(Engine):
    """podman: no daemon, one conmon a container."""

    def start(self) -> None:
        """Configure it, and import the image."""
        self.node.place(_PLACE).mkdir(exist_ok=True)
        self.node.write(f"{_PLACE}/containers.conf", _PODMAN_CONFIGURATION)
        self.call("import", self._write_image(), IMAGE)

    def _told_of(self, name: str) -> list[str]:
        path = self._pid_file(name)
        self.node.place(path).unlink(missing_ok=True)
        return [f"--pidfile={path}"]

    def _may_be_asked_for(self, name: str) -> bool:
        """Not before it is made: where another podman is asked meanwhile, one start in three fails in a user namespace.

        runc is denied to mount the container's root then (Debian 12: podman 4.3, runc 1.1).
        """
        return name not in self._named or self.node.place(self._pid_file(name)).exists()

    def _pid_file(self, name: str) -> str:
        return f"{_PLACE}/{name}.pid"

    def _client(self) -> list[str]:
        places = [f"--root={_PLACE}/podman", f"--runroot={_PLACE}/podman-run", f"--tmpdir={_PLACE}/podman-tmp"]
        configured = ["env", f"CONTAINERS_CONF={_PLACE}/containers.conf"]
        return [*configured, _PODMAN, *places, "--storage-driver=vfs", "--log-level=error"]


class Docker(Engine):
    """dockerd with all that it keeps below /run of the node, no bridge and no firewall rules."""

    # --privileged asks for capabilities that root of this machine may lack.
    privileged = (
        *(f"--cap-add={name}" for name in ("NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE")),
        *("--security-opt=seccomp=unconfined", "--security-opt=systempaths=unconfined"),
        *HOSTS_CGROUPS,
    )

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._daemon: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the daemon, and import the image."""
        self.node.place(_PLACE).mkdir(exist_ok=True)
        places = [f"--data-root={_PLACE}/docker", f"--exec-root={_PLACE}/docker-run"]
        more = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"]
        self.node.write(f"{_PLACE}/daemon.json", "{}")
        configured = [f"--config-file={_PLACE}/daemon.json", f"--pidfile={_PLACE}/docker.pid", "--storage-driver=vfs"]
        log = self.node.place(f"{_PLACE}/dockerd.log")
        with log.open("w") as written:
            self._daemon = self.node.popen(
                self.node.host,
                [_DOCKERD, *places, *more, *configured, f"--host={_DOCKER_SOCKET}"],
                stdout=written,
                stderr=subprocess.STDOUT,
            )
        # By itself `docker version` says something of the client, whether the daemon answers or not.
        asked = ("version", "--format", "{{.Server.Version}}")
        if not eventually(lambda: bool(self.call(*asked, check=False).strip()), seconds=_START_SECONDS):
            raise RuntimeError(f"dockerd does not answer: {log.read_text()[-2000:]}")
        self.call("import", self._write_image(), IMAGE)

    def close(self) -> None:
        """End the daemon as an administrator does: it ends its containers and its containerd."""
        if self._daemon is not None:
            self._daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._daemon.wait(timeout=_END_SECONDS)
            self._daemon = None

    def _client(self) -> list[str]:
        return ["env", f"DOCKER_CONFIG={_PLACE}/docker-client", _DOCKER, f"--host={_DOCKER_SOCKET}"]


def require_tools() -> None:
    """Raise Lacking, saying what to do, where no containers can be made."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=path) is None}
    if missing:
        raise Lacking(f"install {', '.join(sorted(missing))} (scripts/setup.sh test does)")


def _image(etc: Path) -> bytes:
    """A root file system of names: where things are mounted, what is looked up in /etc, and a user."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name in _DIRECTORIES:
            _add(archive, name, tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
        for name, target in _LINKS.items():
            _add(archive, name, tarfile.SYMTYPE, target=target)
        for name in _LOOKED_UP:
            if (etc / name).exists():
                archive.add(etc / name, f"etc/{name}")
    return written.getvalue()


def _add(archive: tarfile.TarFile, name: str, kind: bytes, *, target: str = "", mode: int = 0o755) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.mode = kind, target, mode
    archive.addfile(entry)


def _remove(root: Path) -> None:
    """Kill what is in a node's cgroups, and remove them."""
    end_all(root)
    assert eventually(lambda: _removed(root), seconds=_END_SECONDS), f"{root} is still in use"


def _removed(root: Path) -> bool:
    with contextlib.suppress(OSError):
        for directory in _deepest_first(root):
            directory.rmdir()
    return not root.exists()


def _deepest_first(root: Path) -> Iterable[Path]:
    return [Path(directory) for directory, _, _ in os.walk(root, topdown=False)]
