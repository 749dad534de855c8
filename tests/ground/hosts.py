"""Hosts made of network namespaces: the ground that everything is tried on.

    with Network("node0", "node1", "stranger") as network:
        node0, node1, stranger = network
        before = node0.snapshot()
        job = node0.popen(["torchrun", ...], env={"MASTER_PORT": "29500"})
        done = finish(job, timeout=60)

Each host has an `eth0` with 10.77.0.N and fd77::N, N counting from 1, on a bridge that lives in a
namespace of its own. Nothing is made in the machine's own network namespace, and when the block ends,
however it ends, the hosts and all that still runs in them are gone.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable, Union

import probe
from lacking import Lacking
from patience import patient
from process_table import fields_of, signal_if
from torchless import skip_if_missed

Argument = Union[str, "os.PathLike[str]"]
Stream = Union[int, IO[str], None]
Endpoint = tuple[str, int]

NAMESPACES = Path("/run/netns")
RECORDS = Path("/run/securerun")
TOOLS = ("ip", "nsenter")
DEFAULT_HOSTS = ("node0", "node1", "stranger")
# The guard of a launcher that was killed gets this long to tidy up before it is killed as well.
FAREWELL_SECONDS = 5.0

# A variable of the tester's own launch or shell must not steer the jobs that the tests start.
_FOREIGN_VARIABLE = re.compile(
    r"(PET|SECURERUN|HCCL|NCCL|GLOO|TORCH|TORCHELASTIC|SLURM|PBS|LSB|VC|MA|ASCEND)_.*"
    r"|MASTER_ADDR|MASTER_PORT|WORLD_SIZE|RANK|LOCAL_RANK|NNODES|NODE_RANK|PYTHON(PATH|HOME|STARTUP)"
)

_numbers = itertools.count()


def hear_signals() -> None:
    """Take back what the tester's own launch ignores (nohup, a script's `&`): the jobs of the tests inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


class Network:
    """Hosts on one bridge; a context manager, and an iterator over its hosts in the order they were named."""

    def __init__(self, *names: str) -> None:
        prefix = f"sr{os.getpid()}-{next(_numbers)}-"
        self._owner = os.getpid()
        self._bridge = f"{prefix}bridge"
        self.hosts = {
            name: Host(name, f"{prefix}{name}", number) for number, name in enumerate(names or DEFAULT_HOSTS, 1)
        }

    def __enter__(self) -> Network:
        require_root_and_tools()
        atexit.register(self.close)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self._bridge, *(host.namespace for host in self))

    def close(self) -> None:
        """End what still runs in the hosts and remove them; may be called again, and by atexit."""
        if os.getpid() != self._owner:  # a child that a test forked also runs atexit
            return
        atexit.unregister(self.close)
        end_processes(self)
        for namespace in self.namespaces:
            if (NAMESPACES / namespace).exists():
                _ip("netns", "delete", namespace)

    def _build(self) -> None:
        _make_namespace(self._bridge)
        _ip_batch(self._bridge, "link add br0 type bridge", "link set br0 up")
        for host in self:
            _make_namespace(host.namespace)
            # Both ends are born in their namespaces: the machine's own never sees an interface.
            _ip_batch(
                self._bridge,
                f"link add {host.name} type veth peer name eth0 netns {host.namespace}",
                f"link set {host.name} master br0 up",
            )
            _ip_batch(
                host.namespace,
                f"addr add {host.ipv4}/24 dev eth0",
                f"addr add {host.ipv6}/64 dev eth0 nodad",
                "link set eth0 up",
            )


class Host:
    """One network namespace. Made by `Network`, not by itself."""

    def __init__(self, name: str, namespace: str, number: int) -> None:
        self.name = name
        self.namespace = namespace
        self.ipv4 = f"10.77.0.{number}"
        self.ipv6 = f"fd77::{number:x}"
        self._started: list[subprocess.Popen[str]] = []

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.ipv4} {self.ipv6}>"

    @property
    def addresses(self) -> tuple[str, str]:
        """The IPv4 and the IPv6 address that other hosts know it by."""
        return (self.ipv4, self.ipv6)

    def command(self, argv: Sequence[Argument]) -> list[str]:
        """`argv` as it is run in this host. Only the network changes: /sys/fs/cgroup stays visible."""
        return ["nsenter", f"--net={NAMESPACES / self.namespace}", "--", *(os.fspath(word) for word in argv)]

    def popen(
        self,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = subprocess.PIPE,
        stderr: Stream = subprocess.PIPE,
        umask: int = -1,
        user: str | None = None,
    ) -> subprocess.Popen[str]:
        """Start `argv` in this host, in a session and process group of its own; its pid is `argv`'s own.

        env adds to `environment()`; a value of None takes a variable away. `user` is for commands that
        need no privilege: it becomes that user inside the host.
        """
        become = [] if user is None else _become(user)
        process = subprocess.Popen(
            self.command([*become, *argv]),
            env=environment(env),
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            umask=umask,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[Argument],
        *,
        timeout: float = 60,
        check: bool = False,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
        umask: int = -1,
        text_input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` in this host to its end and return its status, output and errors.

        Raises subprocess.TimeoutExpired, with what was printed until then, after ending its process group.
        Raises subprocess.CalledProcessError for a status other than 0 if `check`.
        """
        stdin = subprocess.DEVNULL if text_input is None else subprocess.PIPE
        done = finish(
            self.popen(argv, env=env, cwd=cwd, user=user, umask=umask, stdin=stdin),
            timeout=timeout,
            text_input=text_input,
        )
        if check and done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
        return done

    def listening(self) -> set[Endpoint]:
        """Address and port of every TCP listener of this host, as they were bound.

        `*` is all addresses of both families, `0.0.0.0` all of IPv4, `::` all of IPv6 alone.
        """
        return probe.listening(self)

    def targets(self) -> set[Endpoint]:
        """Address and port of every TCP listener of this host, as another host would try them."""
        return probe.targets_of(self.listening(), self.addresses)

    def processes(self) -> dict[int, str]:
        """Pid and command line of all that runs in this host, whoever its parent is now."""
        try:
            wanted = (NAMESPACES / self.namespace).stat()
        except FileNotFoundError:
            return {}
        found: dict[int, str] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                there = (directory / "ns/net").stat()
                if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                    command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(directory.name)] = command.decode(errors="replace").strip()
            except OSError:
                continue  # it ended while we looked, or is a zombie, which has no namespaces
        return found

    def snapshot(self, *, legacy: bool = False) -> dict[str, str]:
        """What a firewall or a launcher may have changed in this host, comparable as text.

        Counters and comments are left out. A tool that the machine lacks gives an empty text. `legacy`
        asks the legacy tables too: looking at them registers them in the kernel, so only on request.
        """
        tools = ["iptables-save", "ip6tables-save"]
        tools += ["iptables-legacy-save", "ip6tables-legacy-save"] if legacy else []
        state = {tool: _without_counters(self._output_of([tool])) for tool in tools}
        state["nft"] = _without_counters(self._output_of(["nft", "-s", "list", "ruleset"]))
        state["reserved ports"] = self._output_of(["cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"])
        return state

    def _output_of(self, argv: list[str]) -> str:
        return self.run(argv, check=True).stdout if shutil.which(argv[0]) else ""


@dataclass(frozen=True)
class MachineState:
    """What a job may have left on the machine, outside of any network namespace.

    cgroups: securerun's directories below the cgroup2 mount, and those in them; None where none is mounted.
    records: the names in /run/securerun; None where there is no such directory.
    """

    cgroups: frozenset[str] | None
    records: frozenset[str] | None


def machine_snapshot() -> MachineState:
    mount = cgroup2_mount()
    return MachineState(
        cgroups=None if mount is None else frozenset(_directories_below(mount)),
        records=names_in(RECORDS),
    )


def names_in(directory: Path) -> frozenset[str] | None:
    """The names in a directory; None where there is none, as there may be none from one moment to the next."""
    try:
        return frozenset(os.listdir(directory))
    except FileNotFoundError:
        return None


def cgroup2_mount() -> Path | None:
    """Where cgroup version 2 is mounted, of several mounts the last; None if nowhere."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            found = Path(fields.split()[4].replace("\\040", " "))
    return found


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The tester's environment without what steers launchers, for gloo on eth0; then `changes`."""
    variables = {name: value for name, value in os.environ.items() if not _FOREIGN_VARIABLE.fullmatch(name)}
    # The machine's host name resolves to no address of the host: gloo would listen on the loopback.
    variables.update(GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    for name, value in (changes or {}).items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    return variables


class TookTooLong(subprocess.TimeoutExpired):
    """A command, or the nodes of one job, were ended; what they had said by then is part of the message."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{_text(self.output)}\n{_text(self.stderr)}"


def finish(
    process: subprocess.Popen[str], *, timeout: float = 60, text_input: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Wait until `process` has ended and its output is closed; past `timeout`, end its group, TookTooLong."""
    try:
        output, errors = process.communicate(text_input, timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process)
        try:
            output, errors = process.communicate(timeout=1)
        except subprocess.TimeoutExpired as late:  # something outside of the group holds the pipes
            output, errors = _text(late.stdout), _text(late.stderr)
        raise TookTooLong(process.args, timeout, output, errors) from None
    skip_if_missed(errors or "")
    return subprocess.CompletedProcess(process.args, process.returncode, output or "", errors or "")


def finish_all(
    processes: Sequence[subprocess.Popen[str]], *, timeout: float = 60
) -> list[subprocess.CompletedProcess[str]]:
    """`finish` for the nodes of one job at once: none waits for room in a pipe that nobody reads."""
    with ThreadPoolExecutor(len(processes)) as readers:
        ended = [readers.submit(finish, process, timeout=timeout) for process in processes]
    late = next((error for each in ended if isinstance(error := each.exception(), TookTooLong)), None)
    if late is None:
        return [each.result() for each in ended]
    # Why one waits for ever is often said by another.
    said = [each.exception() or each.result() for each in ended]
    output, errors = ("\n".join(str(getattr(each, name, "")) for each in said) for name in ("stdout", "stderr"))
    raise TookTooLong(late.cmd, timeout, output, errors)


def terminate_all(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End by SIGTERM what would go on, such as the nodes of one job, and wait for that."""
    for process in processes:
        process.terminate()
    finish_all(processes, timeout=30)


def hear(process: subprocess.Popen[str], words: str, *, seconds: float = 30) -> str:
    """What a process said on standard error until a line had these words, it had ended, or so long had passed.

    Nothing that it says after that is lost: `finish` has it.
    """
    assert process.stderr is not None
    descriptor, said, end = process.stderr.fileno(), b"", time.monotonic() + patient(seconds)
    while words.encode() not in said[: said.rfind(b"\n") + 1]:
        if not select.select([descriptor], [], [], max(0, end - time.monotonic()))[0]:
            break
        more = os.read(descriptor, 1 << 16)
        if not more:
            break
        said += more
    skip_if_missed(said.decode(errors="replace"))
    return said.decode(errors="replace")


def eventually(condition: Callable[[], bool], *, seconds: float = 10) -> bool:
    """Whether `condition` became true within `seconds`; asked every 20 ms."""
    end = time.monotonic() + patient(seconds)
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_alive(pid: int) -> bool:
    """Whether `pid` still runs; one that has ended and that nobody has reaped does not."""
    try:
        return fields_of(pid)[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL the process group of a process that we started and have not reaped, so the number is still its own."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone, or not yet in a group of its own
            process.kill()


def end_processes(network: Network) -> None:
    """End all that was started in the hosts, and what that left behind in them.

    A process can only be in one of these namespaces because we, or a child of ours, started it there.
    """
    for host in network:
        for process in host._started:
            kill_group(process)
    if not eventually(lambda: not _running(network), seconds=FAREWELL_SECONDS):
        for pid, host in _running(network).items():
            _kill_in_host(pid, host)
        eventually(lambda: not _running(network), seconds=FAREWELL_SECONDS)
    for host in network:
        for process in host._started:
            _release(process)
        host._started.clear()


def require_root_and_tools() -> None:
    """Raise Lacking, saying what to do, where no hosts can be made."""
    if os.geteuid() != 0:
        raise Lacking("network namespaces need root; run this as root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise Lacking(f"{', '.join(missing)} not found; install iproute2 and util-linux (scripts/setup.sh does)")


def _become(user: str) -> list[str]:
    account = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--init-groups", "--"]


def _running(network: Network) -> dict[int, Host]:
    return {pid: host for host in network for pid in host.processes()}


def _kill_in_host(pid: int, host: Host) -> None:
    """Kill `pid` if it is in `host` *after* it was pinned down: the number may have passed to another meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        signal_if(pid, signal.SIGKILL, lambda: pid in host.processes())


def _release(process: subprocess.Popen[str]) -> None:
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # what was still to be written to a process that is gone
                pipe.close()


def _make_namespace(namespace: str) -> None:
    _ip("netns", "add", namespace)
    _ip_batch(namespace, "link set lo up")
    # Addresses are usable at once, the link-local ones too: no duplicate address detection.
    settings = {"disable_ipv6": 0, "accept_dad": 0, "accept_ra": 0}
    script = "; ".join(
        f"echo {value} > /proc/sys/net/ipv6/conf/{scope}/{setting}"
        for setting, value in settings.items()
        for scope in ("all", "default")
    )
    subprocess.run(["nsenter", f"--net={NAMESPACES / namespace}", "sh", "-ec", script], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


def _ip_batch(namespace: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], check=True, text=True, input="\n".join(lines) + "\n")


def _without_counters(rules: str) -> str:
    lines = (re.sub(r"\[\d+:\d+\]", "", line).rstrip() for line in rules.splitlines())
    return "\n".join(line for line in lines if not line.startswith("#"))


def _directories_below(root: Path) -> Iterator[str]:
    for directory, names, _ in os.walk(root):
        for name in names:
            path = str((Path(directory) / name).relative_to(root))
            if "securerun-" in path:
                yield path


def _text(captured: str | bytes | None) -> str:
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""
