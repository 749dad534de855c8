"""A real systemd as process 1, in namespaces of its own on a private machine, with the units that securerun prints.

    with InitSystem(machine, host) as system:
        system.popen(["python", "train.py"], user=alice)
        system.systemctl("daemon-reexec")

It has the machine's /etc, /run and users, the host's network, and pids, mounts and cgroups of its own. Its units are
securerun's and the bare targets that they need: none of the services that a system starts, since those of this machine
would set its sysctls and clean its /tmp.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cgroups import new_cgroup
from checkout import COMMANDS
from hosts import Argument, Host, Stream, eventually, finish
from process_table import name_of
from users import PrivateMachine, User

PROGRAM = Path("/lib/systemd/systemd")
_UNITS = "/etc/systemd/for-securerun"
_BOOT = "test.target"
_TARGETS = ("basic", "paths", "shutdown", "slices", "sockets", "sysinit", "timers")

_START = f"""
mount -t proc proc /proc
mkdir /run/proc
mount -t proc proc /run/proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind /run/proc/sys/net /proc/sys/net
umount -l /run/proc
rmdir /run/proc
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env --ignore-environment container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH={_UNITS} SYSTEMD_GENERATOR_PATH=/nonexistent SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nonexistent \
    {PROGRAM} --system --unit={_BOOT} --show-status=0 --log-target=null
"""


class InitSystem:
    """A system that is up, with securerun's socket open to the group securerun. A context manager.

    cgroup: the root of its hierarchy, as the tester sees it.
    """

    def __init__(self, machine: PrivateMachine, host: Host) -> None:
        self._machine = machine
        self._host = host
        self._undo = ExitStack()

    def __enter__(self) -> InitSystem:
        try:
            self.cgroup = self._undo.enter_context(new_cgroup()).path
            self._undo.callback(self._remove_cgroups)
            self._write_units()
            self._process = self._start()
            self._undo.callback(self._end)
            assert eventually(self._machine.place("/run/securerun.sock").is_socket), "systemd opens no socket"
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def init(self) -> int:
        """Its process 1, as the tester sees it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        (pid,) = map(int, children)
        return pid

    def popen(
        self,
        argv: Sequence[Argument],
        *,
        user: User | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Start something as a session of a user's, in a cgroup of user.slice; None is root, in the same place."""
        session = self.cgroup / "user.slice"
        session.mkdir(exist_ok=True)
        become = []
        if user is not None:
            groups = self._machine.run(self._host, ["id", "-G", user.name]).stdout.strip().replace(" ", ",")
            become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", f"--groups={groups}", "--"]
        environment = user.environment if user is not None else {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        inside = ["nsenter", f"--target={self.init}", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--wd=/", "--"]
        variables = [f"{name}={value}" for name, value in environment.items()]
        enter = ["sh", "-ec", 'echo $$ > "$0"; exec "$@"', str(session / "cgroup.procs")]
        words = [*enter, *inside, "env", "--ignore-environment", *variables, *become, *argv]
        return self._host.popen(words, stdin=stdin, stdout=stdout)

    def run(self, argv: Sequence[Argument], *, user: User | None = None) -> subprocess.CompletedProcess[str]:
        """Run something to its end."""
        return finish(self.popen(argv, user=user), timeout=30)

    def systemctl(self, *words: str) -> str:
        """What systemctl says, as root; fails with what it complains of."""
        done = self.run(["systemctl", "--no-pager", *words])
        assert done.returncode == 0, done.stderr or done.stdout
        return done.stdout

    def add_unit(self, name: str, text: str) -> None:
        """Write a unit, and have systemd read it."""
        self._machine.write(f"{_UNITS}/{name}", text)
        self.systemctl("daemon-reload")

    def guards(self) -> list[str]:
        """The units of the guards that run, those that are told to stop among them."""
        listed = self.systemctl("list-units", "--plain", "--no-legend", "--state=active,deactivating", "securerun@*")
        return [line.split()[0] for line in listed.splitlines()]

    def _write_units(self) -> None:
        printed = self._machine.run(self._host, [COMMANDS / "securerunctl", "setup", "systemd"])
        assert printed.returncode == 0, printed.stderr
        header = "# /etc/systemd/system/"
        for unit in printed.stdout.split(header)[1:]:
            self._machine.write(f"{_UNITS}/{unit.partition('. Made by')[0]}", header + unit)
        self._machine.write(f"{_UNITS}/{_BOOT}", "[Unit]\nWants=securerun.socket\n")
        for target in _TARGETS:
            self._machine.write(f"{_UNITS}/{target}.target", "[Unit]\nDefaultDependencies=no\n")

    def _start(self) -> subprocess.Popen[str]:
        new = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc"]
        # The cgroup is the hierarchy's root for whoever makes the namespace in it.
        enter = ["sh", "-ec", 'echo $$ > "$0"; exec "$@"', str(self.cgroup / "cgroup.procs")]
        process = self._machine.popen(self._host, [*enter, *new, "sh", "-ec", _START], stderr=subprocess.PIPE)
        booted = eventually(lambda: process.poll() is not None or self._is_booting(process))
        assert booted and process.poll() is None, finish(process).stderr
        return process

    def _is_booting(self, process: subprocess.Popen[str]) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return name_of(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())) == "systemd"
        return False

    def _end(self) -> None:
        """All that is in a pid namespace goes with its first process."""
        self._process.kill()
        self._process.wait()

    def _remove_cgroups(self) -> None:
        assert eventually(self._has_no_cgroups)

    def _has_no_cgroups(self) -> bool:
        with contextlib.suppress(OSError):
            for place, _, _ in os.walk(self.cgroup, topdown=False):
                if place != str(self.cgroup):
                    Path(place).rmdir()
            return True
        return False


def is_possible() -> bool:
    """Whether there is a systemd to be started."""
    return PROGRAM.exists() and shutil.which("systemctl") is not None
