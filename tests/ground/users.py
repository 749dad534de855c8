"""Ordinary users, sudo and the system's places of securerun, without changing the machine.

    with PrivateMachine() as machine:
        alice = machine.add_user("alice")
        machine.allow_sudo(alice, f"NOPASSWD: {GUARD}")
        job = machine.popen(node0, [jobs.SECURERUN, machine.write(alice, "train.py", "...")], user=alice)
        done = finish(job, timeout=60)

What runs in it sees its own /etc, /run, /var/log and /dev in a mount namespace; network namespaces are those of
`hosts.Network`. The users are real: they have an account and a home, and the kernel knows them by their user id. All
of it goes with the block, and with the tester if he is killed: it lives in memory that belongs to the namespace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Callable

from cgroups import Cgroup, end_all, new_cgroup
from checkout import CHECKOUT, COMMANDS
from hosts import FAREWELL_SECONDS, NAMESPACES, Argument, Host, Stream, eventually, finish, kill_group, names_in
from lacking import Lacking
from process_table import name_of, signal_if, users_of

import securerun

TOOLS = ("unshare", "nsenter", "setpriv", "useradd", "sudo", "visudo", "systemd-socket-activate")
GUARD_NAME = "securerun-guard"
GUARD = str(COMMANDS / GUARD_NAME)
CONFIGURATION = "/etc/securerun/guard.toml"
SUDOERS = "/etc/sudoers.d/securerun"
RECORDS = "/run/securerun"
_HOMES = "/run/home"
# Where a directory is made ready before it takes the place of another.
_NEXT = "/var/log/.next"
# Of each test run others: what a user ends with `kill -9 -1` is all of his, also in the run beside this one.
FIRST_USER = 10_000 + os.getpid() % 5_000 * 10
_NODES = ("full", "null", "ptmx", "random", "tty", "urandom", "zero")
_DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How long processes that have been told to end may still be in a cgroup before they are killed.
_LEAVE_SECONDS = 2.0
# Scripts are; interpreters and compiled tools are not.
_SMALL_BYTES = 65536
_SEARCH, _READ_AND_SEARCH = 0o001, 0o005


@dataclass(frozen=True)
class User:
    """An account of one private machine. home: its directory there, which belongs to it and which others may read."""

    name: str
    uid: int
    gid: int
    home: str

    @property
    def environment(self) -> dict[str, str]:
        """What a user has after logging in, with the virtual environment of the tests activated."""
        return {
            "HOME": self.home,
            "LANG": "C.UTF-8",
            "LOGNAME": self.name,
            "PATH": f"{COMMANDS}:{_SYSTEM_PATH}",
            "SHELL": "/bin/sh",
            "USER": self.name,
            # As `hosts.environment` has it for root's jobs.
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }


class PrivateMachine:
    """The machine with private system directories, and users of its own. A context manager.

    more: what its users are to read besides what they need for Python, torch, securerun and the tests' own programs.
    """

    def __init__(self, *more: Path) -> None:
        self._needed = needed_paths(more)
        self._holder: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._users = 0

    def __enter__(self) -> PrivateMachine:
        require_tools()
        try:
            self._hold()
            self._make_system_directories()
            self._open_the_way_to(self._needed)
            self._keep_programs_to_root()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs in it, guards last, so that they can tidy up; may be called again."""
        if self._holder is None:
            return
        for process in self._started:
            kill_group(process)
        eventually(lambda: not self._end(lambda pid: name_of(pid) != GUARD_NAME), seconds=FAREWELL_SECONDS)
        eventually(lambda: not self.processes(), seconds=FAREWELL_SECONDS)
        eventually(lambda: not self._end(lambda _: True), seconds=FAREWELL_SECONDS)
        self._holder.communicate()
        self._holder = None

    def end_users(self) -> None:
        """End all that runs as one of the machine's users."""
        eventually(lambda: not self._end(lambda pid: users_of(pid)[:1] >= [FIRST_USER]), seconds=FAREWELL_SECONDS)

    def add_user(self, name: str, *, groups: Sequence[str] = ()) -> User:
        """Make an account with a group of its own name and a home; `groups` are made where they are missing."""
        for group in groups:
            self._system("groupadd", "--force", group)
        number = FIRST_USER + self._users
        self._users += 1
        home = f"{_HOMES}/{name}"
        more = ["--groups", ",".join(groups)] if groups else []
        self._system(
            "useradd", "--uid", str(number), "--user-group", *more, "--home-dir", home, "--no-create-home", name
        )
        user = User(name, number, number, home)
        place = self.place(home)
        place.mkdir(parents=True)
        os.chown(place, user.uid, user.gid)
        return user

    def allow_sudo(self, rule: str) -> None:
        """Make `rule` the machine's only addition to sudoers, as an administrator does, after visudo has read it."""
        self.write(SUDOERS, rule + "\n", mode=0o440)
        self._system("visudo", "-c")

    def configure(self, text: str) -> None:
        """Write the guard's site configuration."""
        self.write(CONFIGURATION, text)

    def write(self, path: str, text: str, *, owner: User | None = None, mode: int = 0o644) -> str:
        """Write a file, absolute or in the home of its owner, with the directories that it needs; returns its path."""
        full = PurePosixPath(owner.home if owner else "/", path)
        place = self.place(full)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)
        if owner is not None:
            os.chown(place, owner.uid, owner.gid)
        return str(full)

    def place(self, path: str | PurePath) -> Path:
        """Where the tester finds what the machine has at `path`. Absolute links there lead out of the machine."""
        return Path(f"/proc/{self._holder_pid}/root", str(path).lstrip("/"))

    def records(self) -> frozenset[str] | None:
        """The names in the machine's /run/securerun; None where there is no such directory."""
        return names_in(self.place(RECORDS))

    def runs(self) -> frozenset[str]:
        """The names of the runs' records, without what lies beside them."""
        return frozenset(name for name in self.records() or () if name.endswith(".json"))

    def command(
        self,
        argv: Sequence[Argument],
        *,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        cgroup: Cgroup | None = None,
    ) -> list[str]:
        """`argv` as it is run in this machine, to be started in any host; the pid stays that of `argv`.

        user: with nothing but his own environment and in his home; None is root with the tester's, in `/`. env adds
        to the environment.
        """
        words = self._entrance()
        if cgroup is not None:
            words += ["sh", "-ec", 'echo $$ > "$0"; exec "$@"', str(cgroup.path / "cgroup.procs")]
        variables = dict(env or {})
        clean = []
        if user is not None:
            words += ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--init-groups", "--inh-caps=-all", "--"]
            variables = {**user.environment, **variables}
            clean = ["--ignore-environment"]
        directory = f"--chdir={cwd or (user.home if user else '/')}"
        words += ["env", *clean, directory, *(f"{name}={value}" for name, value in variables.items())]
        return words + [os.fspath(word) for word in argv]

    def popen(
        self,
        host: Host,
        argv: Sequence[Argument],
        *,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        cgroup: Cgroup | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = subprocess.PIPE,
        stderr: Stream = subprocess.PIPE,
        umask: int = -1,
    ) -> subprocess.Popen[str]:
        """Start `argv` in a host of `hosts.Network`, as `command` has it, in a session and process group of its own."""
        words = self.command(argv, user=user, env=env, cwd=cwd, cgroup=cgroup)
        process = host.popen(words, stdin=stdin, stdout=stdout, stderr=stderr, umask=umask)
        self._started.append(process)
        return process

    def run(
        self,
        host: Host,
        argv: Sequence[Argument],
        *,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        cgroup: Cgroup | None = None,
        timeout: float = 60,
        text_input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` in a host to its end. Raises subprocess.TimeoutExpired, after ending its process group."""
        stdin = subprocess.DEVNULL if text_input is None else subprocess.PIPE
        process = self.popen(host, argv, user=user, env=env, cwd=cwd, cgroup=cgroup, stdin=stdin)
        return finish(process, timeout=timeout, text_input=text_input)

    def processes(self) -> dict[int, str]:
        """Pid and command line of all that runs in this machine, whoever its parent and its user are now."""
        wanted = os.stat(f"/proc/{self._holder_pid}/ns/mnt").st_ino  # noqa: PTH116 - one look, not two
        found: dict[int, str] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended while we looked
                if (directory / "ns/mnt").stat().st_ino == wanted:
                    command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(directory.name)] = command.decode(errors="replace").strip()
        found.pop(self._holder_pid, None)
        return found

    def _entrance(self) -> list[str]:
        """What a command of this machine begins with."""
        return ["nsenter", f"--mount=/proc/{self._holder_pid}/ns/mnt", "--"]

    @property
    def _holder_pid(self) -> int:
        assert self._holder is not None, "used outside of its block"
        return self._holder.pid

    def _hold(self) -> None:
        """A process whose mount namespace is this machine; it ends with its input, and so with the tester.

        What is mounted here stays here; what others mount outside is seen, as are later network namespaces.
        """
        self._holder = subprocess.Popen(
            self._holding(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            raise RuntimeError("no mount namespace can be made; run this as root, in a container with --privileged")

    def _holding(self) -> list[str]:
        return ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", "echo; exec cat"]

    def _make_system_directories(self) -> None:
        """Private /var/log, /run, /etc and /dev, with what has to be there."""
        self._mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/var/log")
        with self._replaced("/run"):
            if NAMESPACES.is_dir():
                self._bind(NAMESPACES, Path("/run"))
        with self._replaced("/etc") as etc:
            # Once more where something goes away meanwhile: the machine's own package manager may be at work.
            copy = f"cp --archive /etc/. {_NEXT}"
            self._system("sh", "-c", f"{copy} 2> /dev/null || {copy}")
            _name_this_host(etc / "hosts")
        with self._replaced("/dev") as devices:
            self._fill_devices(devices)

    def _fill_devices(self, devices: Path) -> None:
        """As in a container: what every program expects, and no log socket, unless a test puts one there."""
        for name in _NODES:
            os.mknod(devices / name, stat.S_IFCHR | 0o666, os.stat(f"/dev/{name}").st_rdev)  # noqa: PTH116
            (devices / name).chmod(0o666)
        for name, target in {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
            (devices / name).symlink_to(f"/proc/self/{target}")
        for name in ("pts", "shm"):
            self._bind(Path("/dev", name), Path("/dev"))

    def _open_the_way_to(self, needed: Sequence[Path]) -> None:
        """Replace each directory that others may not search, on the way to what they need, by one that they may.

        What is needed is found in it again, and nothing else; so root's home stays closed around an interpreter there.
        """
        for path in needed:
            for directory in (*reversed(path.parents), path):
                if self._is_open(directory, _SEARCH if directory != path else _READ_AND_SEARCH):
                    continue
                if any(other == directory or other in directory.parents for other in needed):
                    self._cover(directory, self._entries(directory))
                else:
                    self._cover(directory, outermost(other for other in needed if directory in other.parents))

    def _entries(self, directory: Path) -> list[Path]:
        return [directory / name for name in os.listdir(self.place(directory))]

    def _is_open(self, path: Path, wanted: int) -> bool:
        status = self.place(path).lstat()
        return not stat.S_ISDIR(status.st_mode) or status.st_mode & wanted == wanted

    def _keep_programs_to_root(self) -> None:
        """What a guard is started from is root's alone here, whatever umask the checkout was made with."""
        package = Path(securerun.__file__).parent
        with self._replaced(package):
            self._system("cp", "--recursive", f"{package}/.", _NEXT)
            self._system("chmod", "--recursive", "u=rwX,go=rX", _NEXT)
        if any(_may_be_changed(path) for path in (COMMANDS, *COMMANDS.glob("securerun*"))):
            self._cover(COMMANDS, self._entries(COMMANDS))

    def _cover(self, directory: Path, entries: Iterable[Path]) -> None:
        """In place of a directory, one of root's that all may search, with these entries of it or below it."""
        with self._replaced(directory) as new:
            for entry in entries:
                seen, place = self.place(entry), new / entry.relative_to(directory)
                place.parent.mkdir(parents=True, exist_ok=True)
                if seen.is_symlink():
                    place.symlink_to(seen.readlink())
                elif seen.is_file() and seen.stat().st_size < _SMALL_BYTES:
                    shutil.copyfile(seen, place)
                    place.chmod(stat.S_IMODE(seen.stat().st_mode) & 0o755 | 0o444)
                else:
                    self._bind(entry, directory)

    @contextlib.contextmanager
    def _replaced(self, directory: Path | str) -> Iterator[Path]:
        """An empty directory to fill, which then stands in place of another; until then that one is still seen."""
        self.place(_NEXT).mkdir()
        self._mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", _NEXT)
        yield self.place(_NEXT)
        self._mount("--move", _NEXT, os.fspath(directory))
        self.place(_NEXT).rmdir()

    def _bind(self, entry: Path, replaced: Path) -> None:
        """Have `entry` at its place in what is to replace a directory above it."""
        new = Path(_NEXT) / entry.relative_to(replaced)
        if self.place(entry).is_dir():
            self.place(new).mkdir(parents=True)
        else:
            self.place(new.parent).mkdir(parents=True, exist_ok=True)
            self.place(new).touch()
        self._mount("--rbind", os.fspath(entry), os.fspath(new))

    def _mount(self, *words: str) -> None:
        # The table of mounts in /run is not ours to write, and /run itself is being replaced.
        self._system("mount", "--no-mtab", *words)

    def _system(self, *argv: str) -> None:
        """Run a system command in the machine, as root. Raises RuntimeError with what it said when it fails."""
        words = self.command(argv)
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")

    def _end(self, whom: Callable[[int], bool]) -> list[int]:
        """Kill those that run in this machine; returns whom, so that it can be asked until there is nobody."""
        found = [pid for pid in self.processes() if whom(pid)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                signal_if(pid, signal.SIGKILL, lambda pid=pid: pid in self.processes() and whom(pid))  # type: ignore[misc]
        return found


@contextlib.contextmanager
def delegated_cgroup(user: User) -> Iterator[Cgroup]:
    """A cgroup of the user's own, as a batch system or systemd delegates it (cgroup-v2.rst, Delegation)."""
    with new_cgroup() as cgroup:
        for path in (cgroup.path, *(cgroup.path / name for name in _DELEGATED)):
            os.chown(path, user.uid, user.gid)
        try:
            yield cgroup
        finally:
            eventually(lambda: _removed_below(cgroup.path), seconds=_LEAVE_SECONDS)
            end_all(cgroup.path)
            eventually(lambda: _removed_below(cgroup.path))


def require_tools() -> None:
    """Raise Lacking, saying what to do, where no users can be made."""
    if os.geteuid() != 0:
        raise Lacking("mount namespaces and users need root; run this as root")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None]
    if missing:
        raise Lacking(
            f"{', '.join(missing)} not found; install passwd, sudo, systemd and util-linux (scripts/setup.sh test does)"
        )


def needed_paths(more: Iterable[Path]) -> list[Path]:
    """What users need to run Python, torch, securerun and the tests' own programs, and more; those above come first."""
    interpreters = [Path(sys.executable)]
    while interpreters[-1].is_symlink():
        interpreters.append(interpreters[-1].parent / interpreters[-1].readlink())
    package = Path(securerun.__file__).parent
    trees = [Path(sys.prefix), Path(sys.base_prefix), CHECKOUT, package, *more]
    paths = {Path(os.path.normpath(path)) for path in (*interpreters, *trees)}
    return sorted(paths | {path.resolve() for path in paths}, key=lambda path: len(path.parts))


def outermost(paths: Iterable[Path]) -> list[Path]:
    """Without those that are found below another of them."""
    found: list[Path] = []
    for path in sorted(paths, key=lambda path: len(path.parts)):
        if not any(other in path.parents for other in found):
            found.append(path)
    return found


def _may_be_changed(path: Path) -> bool:
    """Whether another than root may write there (for a link its target counts)."""
    status = path.stat()
    return status.st_uid != 0 or bool(status.st_mode & 0o022)


def _name_this_host(hosts: Path) -> None:
    """sudo looks its host's name up, and no name server answers in the hosts of the tests."""
    name = os.uname().nodename
    if name not in hosts.read_text().split():
        with hosts.open("a") as file:
            file.write(f"127.0.0.1 {name}\n")


def _removed_below(directory: Path) -> bool:
    """Whether the cgroups that a user made below his own could be removed, the deepest first."""
    try:
        for path, _, _ in os.walk(directory, topdown=False):
            if path != str(directory):
                Path(path).rmdir()
    except OSError:
        return False
    return True
