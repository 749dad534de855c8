"""A bare Debian in a directory of its own, for what is installed by packages.

    root = Root(tmp_path)
    root.run(host, ["dpkg", "--install", "/tmp/package.deb"])

It is the Debian of the guard's image, and sudo; made once by mmdebstrap, and kept where the machines of the kernel
matrix are kept. What runs in it has its /usr, /etc and users, a /run of its own, and the host's network, pids and
cgroups.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import kernel_lab
from checkout import CHECKOUT
from hosts import Argument, Host
from lacking import Lacking, needed

_MAKE_IMAGE = CHECKOUT / "scripts/image.sh"
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


def image_base() -> Path:
    """The Debian of the guard's image, as a tar. Raises Lacking."""
    needed("mmdebstrap")

    def make(file: Path) -> None:
        words = [str(_MAKE_IMAGE), "--base", str(file)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise Lacking(f"mmdebstrap could not make a Debian: {done.stderr.strip().splitlines()[-1:]}")

    return kernel_lab.made(f"image-{kernel_lab.key_of(_MAKE_IMAGE.read_text())}.tar", make)


def _base() -> Path:
    """The Debian that all are copies of. Raises Lacking."""
    tar = image_base()

    def make(place: Path) -> None:
        place.mkdir()
        subprocess.run(["tar", "-x", "-p", "-C", place, "-f", tar], check=True)
        architecture = subprocess.run(
            ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
        ).stdout
        unpacked = place.parent / "sudo"
        kernel_lab.Apt(kernel_lab.SUITE, architecture.strip()).fetch("sudo", unpacked)
        for part in ("etc", "usr"):
            subprocess.run(["cp", "--archive", f"{unpacked / part}/.", place / part], check=True)
        (place / "etc/sudoers").chmod(0o440)  # as its package's script does

    try:
        return kernel_lab.made(f"packages-{tar.stem}", make)
    except kernel_lab.LabError as error:
        raise Lacking(str(error)) from error
