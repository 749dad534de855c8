"""A real Slurm cluster on this machine: a slurmctld and one slurmd a node, each on a host of its own.

    with Network("sl0", "sl1", "controller", "stranger") as network:
        with Cluster(network, "controller", ("sl0", "sl1")) as cluster:
            job = cluster.submit("examples/slurm/job.sh", "examples/train.py")
            assert cluster.wait_for_end(job, seconds=60) == "COMPLETED"

Every daemon has a host name of its own besides its network, so that Slurm takes them for different machines. Keys,
sockets, state and spool are in a directory that goes with the cluster: no Slurm that the machine may have is touched.
The nodes' names resolve nowhere, as on clusters whose compute network the name service does not know.

Slurm has several ways to know a job's processes, to signal and to kill them:

    linuxproc   the descendants of slurmstepd, by their parents
    cgroup/v1   a cgroup of version 1's freezer; the default on older systems
    cgroup/v2   a cgroup of version 2; the default on newer ones
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hosts import Argument, Host, Network, cgroup2_mount, end_processes, eventually
from lacking import Lacking
from users import PrivateMachine, User

TOOLS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "unshare")
# slurmd, and what srun listens on in a job's batch step: all that is Slurm's own on a node.
SLURMD_PORT = 6818
FIRST_SRUN_PORT, LAST_SRUN_PORT = 53000, 53063
PORTS = frozenset({SLURMD_PORT, *range(FIRST_SRUN_PORT, LAST_SRUN_PORT + 1)})
# From SIGTERM to SIGKILL when a job is cancelled; 30 by default.
KILL_WAIT_SECONDS = 2
# Where packages put it.
INSTALLED = "/etc/slurm/slurm.conf"
FREEZER = Path("/sys/fs/cgroup/freezer")
_START_SECONDS = 30.0
_END_SECONDS = 15.0
_UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
# slurm.conf(5)
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={controller.name}({controller.ipv4})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdPort={slurmd_port}
SrunPortRange={first_srun_port}-{last_srun_port}
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
SelectType=select/linear
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait={kill_wait}
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
{more}
"""
# cgroup.conf(5)
_CGROUPS = {
    "cgroup/v1": "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n",
    "cgroup/v2": "CgroupPlugin=cgroup/v2\nCgroupMountpoint={mount}\nIgnoreSystemd=yes\n",
}
# In a mount namespace of the daemon's own: the machine's directories are as before.
_INSTALLED = """
for place in slurm munge; do
    mount -t tmpfs -o mode=755 tmpfs /etc/$place
done
cp "$0/slurm.conf" /etc/slurm/
install -m 400 "$0/munge.key" /etc/munge/
exec "$@"
"""


class Cluster:
    """Slurm on hosts of a network, each node called as its host is; a context manager."""

    def __init__(
        self,
        network: Network,
        controller: str,
        nodes: Sequence[str],
        *,
        tracking: str = "linuxproc",
        as_installed: bool = False,
        machines: Mapping[str, PrivateMachine] | None = None,
        more: str = "",
    ) -> None:
        """Of these nodes.

        as_installed: what runs on the nodes finds configuration and keys where packages put them. machines: what each
        host's daemons see, so that it has users and a /run of its own; they find both in them. more: lines of
        slurm.conf.
        """
        self._as_installed = as_installed
        self._machines = machines or {}
        self._more = more
        self._network = network
        self._controller = network[controller]
        self._nodes = [network[node] for node in nodes]
        self._tracking = tracking
        # munged wants a socket that everybody can get at; pytest's directories are for their owner alone.
        self._directory = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._directory.chmod(0o755)
        self._configuration = self._directory / "slurm.conf"
        self._daemons: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Cluster:
        try:
            require_tools()
            self._configure()
            self._start_munged()
            self._start(self._controller, "slurmctld", "-D", "-f", str(self._configuration))
            for node in self._nodes:
                self._start(node, "slurmd", "-D", "-N", node.name, "-f", str(self._configuration), env=self._preload())
            if not eventually(self._is_up, seconds=_START_SECONDS):
                raise RuntimeError(f"the Slurm cluster did not start:\n{self.logs()}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the daemons and whatever of their jobs is left on the hosts."""
        for daemon in self._daemons:
            daemon.terminate()
        eventually(lambda: all(daemon.poll() is not None for daemon in self._daemons), seconds=_END_SECONDS)
        end_processes(self._network)
        self._daemons.clear()
        for place in self._cgroups():
            _remove_cgroups(place)
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """How Slurm's commands find this cluster."""
        return {"SLURM_CONF": str(self._configuration)}

    def run(self, *argv: Argument, env: Mapping[str, str | None] | None = None) -> str:
        """What a command, such as Slurm's own, prints on the controller; CalledProcessError if it fails."""
        return self._controller.run(argv, env={**(env or {}), **self.environment}, check=True).stdout

    def popen(self, user: User, *argv: Argument, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command of a user's on the controller."""
        machine = self._machines[self._controller.name]
        variables = {**(env or {}), **self.environment}
        return machine.popen(self._controller, argv, user=user, env=variables)

    def submit(self, *words: Argument, env: Mapping[str, str | None] | None = None) -> str:
        """sbatch: options, the script and its arguments. Returns the job's id."""
        return self.run("sbatch", "--parsable", *words, env=env).strip()

    def state(self, job: str) -> str:
        """JobState of `scontrol show job`, such as RUNNING or COMPLETED."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.partition("=")[2] for field in fields if field.startswith("JobState="))

    def wait_for_end(self, job: str, *, seconds: float) -> str:
        """The state in which the job ended: COMPLETED, FAILED, CANCELLED, ...; TimeoutError if it goes on."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) in _UNFINISHED:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {state}:\n{self.logs()}")
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        """What the daemons said, for a test that fails."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-4000:]}" for log in sorted(self._directory.glob("*.log")))

    def _configure(self) -> None:
        (self._directory / "state").mkdir()
        nodes = (f"NodeName={node.name} NodeAddr={node.ipv4} CPUs=1" for node in self._nodes)
        self._configuration.write_text(
            _CONFIGURATION.format(
                controller=self._controller,
                directory=self._directory,
                slurmd_port=SLURMD_PORT,
                first_srun_port=FIRST_SRUN_PORT,
                last_srun_port=LAST_SRUN_PORT,
                tracking=self._tracking.partition("/")[0],
                kill_wait=KILL_WAIT_SECONDS,
                nodes="\n".join(nodes),
                more=self._more,
            )
        )
        for machine in self._machines.values():
            machine.write(INSTALLED, self._configuration.read_text())
        if self._tracking in _CGROUPS:
            text = _CGROUPS[self._tracking].format(mount=cgroup2_mount())
            (self._directory / "cgroup.conf").write_text(text)
        for place in self._cgroups():
            place.parent.mkdir(exist_ok=True)  # system.slice, which systemd makes where it is init

    def _cgroups(self) -> Iterator[Path]:
        """Where each slurmd makes its cgroups."""
        for node in self._nodes:
            if self._tracking == "cgroup/v1":
                yield FREEZER / f"slurm_{node.name}"
            elif self._tracking == "cgroup/v2":
                yield _version2() / "system.slice" / f"{node.name}_slurmstepd.scope"

    def _start_munged(self) -> None:
        """One for all: what it protects here is a socket in the file system, which the hosts share."""
        files = {name: self._directory / f"munge.{name}" for name in ("key", "socket", "pid", "seed")}
        files["key"].touch(mode=0o600)
        files["key"].write_bytes(os.urandom(128))
        for machine in self._machines.values():
            machine.place("/etc/munge").mkdir(exist_ok=True)
            machine.place("/etc/munge/munge.key").unlink(missing_ok=True)
            place = machine.place("/etc/munge/munge.key")
            place.touch(mode=0o400)
            place.write_bytes(files["key"].read_bytes())
            os.chown(place, place.parent.stat().st_uid, place.parent.stat().st_gid)
        options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
        # Its origin is written out: its host's name resolves to nothing.
        self._start(self._controller, "munged", "--foreground", "--origin=127.0.0.1", *options)
        if not eventually(files["socket"].exists, seconds=_START_SECONDS):
            raise RuntimeError(f"munged did not start:\n{self.logs()}")

    def _start(self, host: Host, daemon: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Start a daemon in the foreground, on a host that bears its name."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host.name, daemon, *arguments]
        if self._as_installed and daemon == "slurmd":
            installed = ["unshare", "--mount", "sh", "-ec", _INSTALLED, str(self._directory)]
            named = [*installed, *named]
        # Slurm's daemons are where a root shell made by plain `su` does not look.
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        variables = {"PATH": path, **self.environment, **(env or {})}
        with (self._directory / f"{host.name}-{daemon}.log").open("w") as log:
            machine = self._machines.get(host.name)
            if machine is not None:
                started = machine.popen(host, named, env=variables, stdout=log, stderr=subprocess.STDOUT)
            else:
                started = host.popen(named, env=variables, stdout=log, stderr=subprocess.STDOUT)
        self._daemons.append(started)

    def _preload(self) -> dict[str, str]:
        """For slurmd, which takes version 2 only where no hierarchy of version 1 is mounted: hide them from it."""
        if self._tracking != "cgroup/v2" or len(Path("/proc/self/cgroup").read_text().splitlines()) == 1:
            return {}
        library = self._directory / "hide_cgroup1.so"
        if not library.exists():
            source = Path(__file__).with_name("hide_cgroup1.c")
            subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        return {"LD_PRELOAD": str(library)}

    def _is_up(self) -> bool:
        if any(daemon.poll() is not None for daemon in self._daemons):
            raise RuntimeError(f"a daemon of the Slurm cluster ended:\n{self.logs()}")
        found = self._controller.run(["sinfo", "--noheader", "--Node", "--format=%N %T"], env=self.environment).stdout
        return sorted(found.splitlines()) == sorted(f"{node.name} idle" for node in self._nodes)


def require_tools() -> None:
    """Raise Lacking, saying what to do, where there is no Slurm."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        raise Lacking(f"{', '.join(missing)} not found; install slurm-wlm and munge (scripts/setup.sh test does)")


def _version2() -> Path:
    mount = cgroup2_mount()
    if mount is None:
        raise RuntimeError("no cgroup2 is mounted")
    return mount


def _remove_cgroups(place: Path) -> None:
    """Remove a cgroup with those below it, and the one above if it is empty then: slurmd leaves its own."""
    for directory, _, _ in os.walk(place, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()
    if place.parent.name == "system.slice":
        with contextlib.suppress(OSError):
            place.parent.rmdir()
