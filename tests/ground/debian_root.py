"""A bare Debian in a directory of its own, for what is installed by packages.

    root = Root(tmp_path)
    root.run(host, ["dpkg", "--install", "/tmp/package.deb"])

It is made once by mmdebstrap, and kept where the machines of the kernel matrix are kept. What runs in it has its /usr,
/etc and users, a /run of its own, and the host's network, pids and cgroups.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import kernel_lab
from hosts import Argument, Host

PACKAGES = ("python3", "sudo", "passwd", "iptables")
_SECONDS = 900

_ENTER = """
root=$1 run=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount --bind "$run" "$root/run"
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --bind -o ro "$1" "$root$1"
    shift
done
shift
exec chroot "$root" "$@"
"""


class NoDebian(Exception):
    """There is no mmdebstrap, or nothing that it could fetch; the words say which."""


class Root:
    """A Debian that is one test's own. shown: directories of this machine that are found in it as well."""

    def __init__(self, place: Path, shown: Sequence[Path] = ()) -> None:
        self.place = place / "root"
        self._run = place / "run"
        self._run.mkdir(mode=0o755)
        self._shown = [str(path) for path in shown]
        subprocess.run(["cp", "--archive", _base(), self.place], check=True)
        (self.place / "root").chmod(0o755)  # what is shown may be below it

    def command(self, argv: Sequence[Argument], env: Mapping[str, str]) -> list[str]:
        """The command line by which something runs in here, as root."""
        inside = ["unshare", "--mount", "sh", "-ec", _ENTER, "sh", str(self.place), str(self._run), *self._shown, "--"]
        variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **env}
        return [
            *inside,
            "env",
            "-i",
            *(f"{name}={value}" for name, value in variables.items()),
            *(os.fspath(word) for word in argv),
        ]

    def run(
        self, host: Host, argv: Sequence[Argument], *, status: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run something in here to its end, in a host of `hosts.Network`."""
        done = host.run(self.command(argv, env or {}), cwd=Path("/"))
        assert done.returncode == status, done
        return done

    def files(self) -> dict[str, tuple[int, int, str]]:
        """Mode, owner and, of a link, where it leads, of everything in it but what is compiled and what is logged."""
        found = {}
        for path in self.place.rglob("*"):
            name = str(path.relative_to(self.place))
            if not name.startswith(("var/lib/dpkg", "var/log", "var/cache", "var/lib/rpm", "usr/lib/sysimage")):
                status = path.lstat()
                found[name] = (status.st_mode, status.st_uid, str(path.readlink()) if path.is_symlink() else "")
        return found


def _base() -> Path:
    """The Debian that all are copies of. Raises NoDebian."""
    if shutil.which("mmdebstrap") is None:
        raise NoDebian("mmdebstrap is not installed; scripts/setup.sh test installs it")
    return kernel_lab.made(f"packages-{kernel_lab.SUITE}-{kernel_lab.key_of(PACKAGES, 1)}", _make)


def _make(place: Path) -> None:
    options = ["--quiet", "--mode=root", "--variant=essential", f"--include={','.join(PACKAGES)}", "--skip=check/qemu"]
    command = ["mmdebstrap", *options, kernel_lab.SUITE, str(place), *kernel_lab._sources(kernel_lab.SUITE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise NoDebian(f"mmdebstrap could not make a Debian: {done.stderr.strip().splitlines()[-1:]}")
