"""What the machines of the kernel matrix are made of: Debian's kernels and packages, wheels, and this checkout.

All of it is fetched with the machine's own apt and pip into a place of its own, made once and kept there under a name
that says what made it. Nothing is installed on this machine, and nothing of another architecture is run: packages are
unpacked, and what their scripts would have done for a test machine is written down here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkout import CHECKOUT, GROUND
from kernel_cells import KERNELS

PLACE = Path(os.environ.get("SECURERUN_KERNELS") or CHECKOUT / ".kernels")
INITRAMFS_INIT = GROUND / "kernel_initramfs.sh"

# The Debian that the machines run, its Python, and what the tests call.
SUITE = "bookworm"
PYTHON = "3.11"
PACKAGES = (
    *("python3", "iptables", "nftables", "iproute2", "procps", "util-linux", "kmod", "sudo", "passwd", "mawk"),
    *("systemd", "systemd-sysv", "git", "gcc", "libc6-dev", "python3-dev", "findutils", "iputils-ping"),
    *("passt", "slirp4netns"),
)
# Of the newer ones PyPI's wheels for aarch64 want CUDA.
TORCHES = {
    name: os.environ.get("SECURERUN_TORCH", torch)
    for name, torch in {"amd64": "torch==2.13.0", "arm64": "torch==2.9.1"}.items()
}
# pip weighs the conditions of wheels for the machine that it runs on: what torch wants is named for the others.
TORCH_NEEDS = ("filelock", "typing-extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec")
WHEELS = (
    *("typer>=0.12,<0.29", "psutil>=5.9", "pytest>=8.0", "pytest-xdist>=3.6", "hypothesis>=6.100", "PyYAML>=6.0"),
    *("prometheus-client>=0.20", "numpy", "setuptools<80"),
)
SOURCES = ("ClusterShell>=1.9",)
# What the tests of the legacy backend need, and what pip compiles for the machine that it runs on, alone.
COMPILED = ("python-iptables>=1.2.0,<2",)
COMMANDS = {
    "securerun": "securerun.run:command",
    "securerunctl": "securerun.ctl.app:main",
    "securerun-guard": "securerun.guard.program:main",
    "torchrun": "torch.distributed.run:main",
    "pytest": "pytest:console_main",
}
MACHINE_TYPES = {"amd64": "x86_64", "arm64": "aarch64"}

# In the order in which a machine comes to its disks; dependencies are added.
_BOOT_MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "ext4", "virtio_rng", "virtio_console")
# Of a kernel's modules those that a network or a file system of a test can ask for; drivers of devices are left out.
_KEPT_DRIVERS = ("net", "block", "virtio", "char", "md")
_LISTS_SECONDS = 12 * 3600
_ALTERNATIVES = {
    **{
        name: name.replace("tables", "tables-nft", 1)
        for family in ("iptables", "ip6tables")
        for name in (family, f"{family}-save", f"{family}-restore")
    },
    "awk": "mawk",
    "which": "which.debianutils",
}


class LabError(Exception):
    """Something that the machines need is not to be had; the words say what to do."""


@contextlib.contextmanager
def making() -> Iterator[None]:
    """One at a time makes things here."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def key_of(*parts: object) -> str:
    """What made a thing, as a part of its name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The file or directory of this name, made where it is not there yet; half of one never is."""
    place = PLACE / name
    with making():
        if not place.exists():
            print(f"kernels: making {place}", file=sys.stderr, flush=True)
            before = os.umask(0o022)
            try:
                with tempfile.TemporaryDirectory(prefix=".making-", dir=PLACE) as work:
                    make(Path(work) / "made")
                    (Path(work) / "made").rename(place)
            finally:
                os.umask(before)
    return place


class Apt:
    """Debian's packages of one suite and architecture, with lists and a status of its own."""

    def __init__(self, suite: str, architecture: str) -> None:
        self._suite = suite
        self._place = PLACE / "apt" / f"{suite}-{architecture}"
        for name in ("lists/partial", "archives/partial"):
            (self._place / name).mkdir(parents=True, exist_ok=True)
        (self._place / "status").touch()
        (self._place / "sources.list").write_text("".join(f"{line}\n" for line in _sources(suite)))
        places = {
            "Dir::State": "",
            "Dir::State::Lists": "lists",
            "Dir::State::status": "status",
            "Dir::Cache": "",
            "Dir::Cache::archives": "archives",
            "Dir::Log": "",
            "Dir::Etc::SourceList": "sources.list",
        }
        settings = {
            **{name: str(self._place / below) for name, below in places.items()},
            **{f"Dir::Etc::{name}": "/dev/null" for name in ("SourceParts", "Preferences", "PreferencesParts")},
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Debug::NoLocking": "1",
            "Acquire::Retries": "3",
        }
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        updated = self._place / "updated"
        if not updated.exists() or time.time() - updated.stat().st_mtime > _LISTS_SECONDS:
            self._run("apt-get", "update", "-qq")
            updated.touch()

    def newest(self, pattern: str) -> list[str]:
        """The packages whose whole names match, the newest first."""
        names = self._run("apt-cache", "pkgnames").split()
        return sorted((name for name in names if re.fullmatch(pattern, name)), key=_version, reverse=True)

    def fetch(self, package: str, into: Path) -> None:
        """Unpack one package. Raises LabError where the mirror does not have it."""
        with tempfile.TemporaryDirectory(dir=self._place) as work:
            self._run("apt-get", "download", "-qq", package, cwd=Path(work))
            (archive,) = Path(work).glob("*.deb")
            run("dpkg-deb", "-x", archive, into)

    def fetch_newest(self, pattern: str, into: Path, parts: Sequence[str] = ()) -> None:
        """Unpack the newest package that matches and that the mirror has: lists name some that have been replaced.

        parts: what stands for linux-image in the names of others that belong to it, if there are such. Raises LabError.
        """
        for package in self.newest(pattern):
            with contextlib.suppress(LabError):
                for part in parts:
                    for name in self.newest(re.escape(package.replace("linux-image", part))):
                        self.fetch(name, into)
                self.fetch(package, into)
                return
        raise LabError(f"{self._suite} has no package that matches {pattern}")

    def fetch_all(self, packages: Sequence[str], into: Path) -> None:
        """Unpack these, what they need, and what Debian calls essential."""
        wanted = ("install", "--download-only", "--yes", "-qq", "--no-install-recommends", *packages, "?essential")
        self._run("apt-get", *wanted)
        left_out = [f"--exclude=./usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "zoneinfo")]
        for archive in sorted((self._place / "archives").glob("*.deb")):
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as reading:
                # Debian's /bin is a link to usr/bin, also for packages that still have /bin.
                words = ("tar", "-x", "-p", "--keep-directory-symlink", *left_out, "-C", into)
                run(*words, stdin=reading.stdout)
            if reading.returncode:
                raise LabError(f"{archive} cannot be unpacked")
        shutil.rmtree(self._place / "archives")

    def _run(self, tool: str, *words: str, cwd: Path | None = None) -> str:
        return run(tool, *self._options, *words, cwd=cwd)


def _version(package: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", package)]


def _sources(suite: str) -> Iterator[str]:
    """Lines for apt, from the mirrors that this machine's own apt has."""
    base = _mirror(r"/debian/?$") or "http://deb.debian.org/debian"
    security = _mirror(r"/debian-security/?$") or base.removesuffix("/").removesuffix("/debian") + "/debian-security"
    of = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    released = suite.removesuffix("-backports")
    yield f"{of} {base} {released} main"
    yield f"{of} {security} {released}-security main"
    if released != suite:
        yield f"{of} {base} {suite} main"


def _mirror(pattern: str) -> str | None:
    for file in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in file.read_text().splitlines():
                for word in line.split("#")[0].split():
                    if word.startswith(("http://", "https://")) and re.search(pattern, word):
                        return word
    return None


@dataclass(frozen=True)
class KernelFiles:
    """What QEMU and a machine are given of a kernel."""

    release: str
    image: Path
    initramfs: Path
    modules: Path


def debian_kernel(name: str, architecture: str) -> KernelFiles:
    """The newest of Debian's kernels that the mirror has; to have it fetched anew remove its directory."""
    kernel = KERNELS[name]
    made_by = key_of(kernel, _KEPT_DRIVERS, _BOOT_MODULES, INITRAMFS_INIT.read_text())

    def make(place: Path) -> None:
        apt = Apt(kernel.suite, architecture)
        tree = place.parent / "tree"
        # From 7.1 on the image and the modules are packages of their own.
        parts = ("linux-binary", "linux-modules", "linux-base")
        apt.fetch_newest(kernel.pattern.replace("ARCH", architecture), tree, parts)
        (image,) = (*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz"))
        modules = next(path for path in (tree / "lib/modules", tree / "usr/lib/modules") if path.is_dir())
        (of_release,) = modules.iterdir()
        make_kernel(place, architecture, of_release.name, image, of_release)

    return files_of(made(f"kernel-{name}-{architecture}-{made_by}", make))


def own_kernel(directory: Path, architecture: str) -> KernelFiles:
    """A kernel of one's own: a directory with vmlinuz, release, and modules/RELEASE where it is not all built in."""
    missing = [name for name in ("vmlinuz", "release") if not (directory / name).is_file()]
    if missing:
        raise LabError(f"there is no {missing[0]} in {directory}; it needs vmlinuz, release and modules/RELEASE")
    image, release = directory / "vmlinuz", (directory / "release").read_text().strip()
    places = (directory / "modules", directory / "lib/modules", directory / "tree/lib/modules")
    modules = next((place / release for place in places if (place / release).is_dir()), None)
    made_by = key_of(image.resolve(), image.stat().st_mtime_ns, release, modules, INITRAMFS_INIT.read_text())

    def make(place: Path) -> None:
        make_kernel(place, architecture, release, image, modules)

    return files_of(made(f"kernel-own-{architecture}-{made_by}", make))


def files_of(place: Path) -> KernelFiles:
    return KernelFiles(
        (place / "release").read_text().strip(), place / "vmlinuz", place / "initramfs", place / "modules.img"
    )


def make_kernel(place: Path, architecture: str, release: str, image: Path, modules: Path | None) -> None:
    place.mkdir()
    shutil.copy(image, place / "vmlinuz")
    (place / "release").write_text(f"{release}\n")
    with tempfile.TemporaryDirectory(dir=place) as work:
        tree = Path(work) / "lib/modules" / release
        tree.mkdir(parents=True)
        if modules is not None:
            shutil.copytree(modules, tree, symlinks=True, dirs_exist_ok=True, ignore=_of_devices)
            run("depmod", "-b", work, release)
        _make_initramfs(place / "initramfs", architecture, release, Path(work))
        make_image(place / "modules.img", tree.parent, room_mib=16)


def _of_devices(directory: str, names: list[str]) -> list[str]:
    """What is not copied of a kernel's modules."""
    path = Path(directory)
    if path.name == "kernel":
        return [name for name in names if name in ("sound", "samples")]
    if path.name == "drivers" and path.parent.name == "kernel":
        return [name for name in names if name not in _KEPT_DRIVERS]
    if path.name == "net" and path.parent.name == "drivers":
        return [name for name in names if name in ("ethernet", "wireless", "usb", "can", "wan", "phy", "dsa")]
    return [name for name in names if name in ("source", "build")]


def _make_initramfs(file: Path, architecture: str, release: str, tree: Path) -> None:
    """Busybox, the modules on the way to the disks, and an init that mounts them."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        for name in ("bin", "dev", "proc", "sys", "newroot", "modules"):
            (root / name).mkdir()
        shutil.copy(_busybox(architecture), root / "bin/busybox")
        (root / "bin/sh").symlink_to("busybox")
        shutil.copy(INITRAMFS_INIT, root / "init")
        (root / "init").chmod(0o755)
        for number, module in enumerate(_in_order(tree, release)):
            target = root / "modules" / f"{number:03}-{module.name.split('.ko')[0]}.ko"
            unpack = {".xz": ("xz", "-dc"), ".gz": ("gzip", "-dc"), ".zst": ("zstd", "-qdc")}.get(module.suffix)
            with target.open("wb") as into:
                subprocess.run([*(unpack or ("cat",)), module], stdout=into, check=True)
        names = "\n".join(["."] + [str(path.relative_to(root)) for path in sorted(root.rglob("*"))])
        packed = subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet", "--owner=0:0"],
            cwd=root,
            input=names.encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        file.write_bytes(packed)


def _in_order(tree: Path, release: str) -> list[Path]:
    """The modules' files, each after those that it needs."""
    files: list[Path] = []
    for module in _BOOT_MODULES:
        words = ["modprobe", "-d", str(tree), "-S", release, "--show-depends", module]
        shown = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        found = (Path(line.split()[1]) for line in shown.splitlines() if line.startswith("insmod "))
        files += [file for file in found if file not in files]
    return files


def _busybox(architecture: str) -> Path:
    place = PLACE / f"busybox-{SUITE}-{architecture}"
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=PLACE) as work:
            Apt(SUITE, architecture).fetch("busybox-static", Path(work))
            found = next(path for path in (Path(work) / "bin/busybox", Path(work) / "usr/bin/busybox") if path.exists())
            found.rename(place)
    return place


def root_image(architecture: str) -> Path:
    """A disk with Debian on it."""
    made_by = key_of(SUITE, PACKAGES, _ALTERNATIVES, inspect.getsource(_configure))

    def make(file: Path) -> None:
        root = file.parent / "root"
        for name in ("bin", "sbin", "lib", *(["lib64"] if architecture == "amd64" else [])):
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        Apt(SUITE, architecture).fetch_all(PACKAGES, root)
        _configure(root)
        _compile(root / f"usr/lib/python{PYTHON}", root, "/")
        make_image(file, root, room_mib=1500)

    return made(f"root-{SUITE}-{architecture}-{made_by}.img", make)


def _configure(root: Path) -> None:
    """What the packages' scripts would have done, as far as a machine of tests needs it."""
    for name in ("proc", "sys", "dev", "run", "tmp", "srv", "root", "mnt", "usr/lib/modules", "usr/local/bin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
    databases = ("passwd", "group", "shadow", "gshadow")
    (root / "etc/nsswitch.conf").write_text("".join(f"{name}: files\n" for name in databases) + "hosts: files dns\n")
    for name, shadow in (("passwd", "shadow"), ("group", "gshadow")):
        lines = (root / f"etc/{name}").read_text().splitlines()
        more = ":*:19000:0:99999:7:::" if name == "passwd" else ":*::"
        (root / f"etc/{shadow}").write_text("".join(f"{line.split(':')[0]}{more}\n" for line in lines))
        (root / f"etc/{shadow}").chmod(0o600)
    (root / "etc/hostname").write_text("machine\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost machine\n::1 localhost\n")
    for name in ("fstab", "resolv.conf"):
        (root / f"etc/{name}").write_text("")
    (root / "etc/machine-id").write_text(f"{1:032x}\n")
    for name in ("auth", "account", "password", "session", "session-noninteractive"):
        kind = name.partition("-")[0]
        (root / f"etc/pam.d/common-{name}").write_text(f"{kind} required pam_permit.so\n")
    for name, target in _ALTERNATIVES.items():
        there = [root / "usr" / where / name for where in ("sbin", "bin") if (root / "usr" / where / target).exists()]
        for link in there:
            link.symlink_to(target)


def site_image(architecture: str, *, torch: bool) -> Path:
    """A disk with a virtual environment on it, mounted at /srv/site; the checkout is in its path."""
    compiled = COMPILED if _is_like_this_one(architecture) else ()
    made_by = key_of(PYTHON, WHEELS, SOURCES, compiled, COMMANDS, TORCHES[architecture] if torch else None, 1)

    def make(file: Path) -> None:
        site = file.parent / "site"
        packages = site / f"lib/python{PYTHON}/site-packages"
        packages.mkdir(parents=True)
        _install(architecture, packages, WHEELS)
        _pip("--target", str(packages), "--no-deps", *SOURCES, *compiled)
        if torch:
            _install_torch(architecture, packages)
        (packages / "checkout.pth").write_text("/srv/securerun\n")
        shutil.rmtree(packages / "bin", ignore_errors=True)
        (site / "bin").mkdir()
        for name in ("python", "python3"):
            (site / "bin" / name).symlink_to("/usr/bin/python3")
        (site / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
        for name, entry in COMMANDS.items():
            module, function = entry.split(":")
            program = site / "bin" / name
            lines = (
                "#!/srv/site/bin/python3",
                "import sys",
                f"from {module} import {function}",
                f"sys.exit({function}())",
            )
            program.write_text("\n".join(lines) + "\n")
            program.chmod(0o755)
        _compile(site, site, "/srv/site")
        make_image(file, site, room_mib=64)

    return made(f"site-{architecture}{'-torch' if torch else ''}-{made_by}.img", make)


def _install(architecture: str, packages: Path, wheels: Sequence[str], *more: str) -> None:
    machine = MACHINE_TYPES[architecture]
    platforms = [f"--platform={name}_{machine}" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    words = ("--target", str(packages), *platforms, "--python-version", PYTHON, "--implementation", "cp")
    _pip(*words, "--only-binary=:all:", *more, *wheels)


def _install_torch(architecture: str, packages: Path) -> None:
    index = os.environ.get("SECURERUN_TORCH_INDEX")
    more = ("--extra-index-url", index) if index else ()
    if architecture == "amd64":
        _install(architecture, packages, [TORCHES[architecture]], "--upgrade", *more)
    else:
        _install(architecture, packages, [TORCHES[architecture], *TORCH_NEEDS], "--no-deps", *more)


def _pip(*words: str) -> None:
    fixed = (
        "install",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-compile",
        "--root-user-action=ignore",
    )
    run(sys.executable, "-m", "pip", *fixed, *words)


def _compile(tree: Path, root: Path, becomes: str) -> None:
    """Compile Python's files where this Python is of the machines' version: emulated it takes a minute."""
    if _is_of_the_machines_version():
        words = ("-m", "compileall", "-q", "-j", "0", "-s", str(root), "-p", becomes, str(tree))
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _is_of_the_machines_version() -> bool:
    return f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON


def _is_like_this_one(architecture: str) -> bool:
    """Whether what is compiled here runs there."""
    return _is_of_the_machines_version() and platform.machine() == MACHINE_TYPES[architecture]


def product_archive(file: Path, orders: dict[str, str]) -> None:
    """Write a tar of what git tracks here, as it stands here now, and of files below /srv/machine."""
    listed = run("git", "-c", f"safe.directory={CHECKOUT}", "-C", CHECKOUT, "ls-files", "-z")
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "srv/securerun"
        for name in filter(None, listed.split("\0")):
            if (CHECKOUT / name).exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / name, tree / name)
        _compile(tree, tree, "/srv/securerun")
        for name, text in orders.items():
            (Path(work) / "srv/machine").mkdir(exist_ok=True)
            (Path(work) / "srv/machine" / name).write_text(text)
        with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
            archive.add(Path(work) / "srv", "srv", filter=_of_root)


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode &= ~(stat.S_IWGRP | stat.S_IWOTH)
    member.mode |= stat.S_IRGRP | stat.S_IROTH | (0o055 if member.isdir() else 0)
    return member


def make_image(file: Path, tree: Path, *, room_mib: int) -> None:
    """Write a file system of a directory; with as few features as the oldest kernels know."""
    used = int(run("du", "-sm", "--apparent-size", tree).split()[0])
    files = sum(1 for _ in tree.rglob("*"))
    size = used + used // 4 + files // 256 + room_mib
    features = "none,extent,filetype,sparse_super,large_file,dir_index,ext_attr"
    words = ("-q", "-F", "-t", "ext4", "-O", features, "-E", "root_owner=0:0", "-N", str(files * 2 + 20000), "-d", tree)
    run("mke2fs", *words, file, f"{size}M")


def run(*words: object, cwd: Path | None = None, stdin: object = subprocess.DEVNULL) -> str:
    """Run a tool and return its output. Raises LabError with what it complained of."""
    argv = [os.fspath(word) if isinstance(word, Path) else str(word) for word in words]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            stdin=stdin,
            env=environment,
            capture_output=True,
            text=True,
            check=False,  # type: ignore[call-overload]
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is missing; run scripts/setup.sh test") from error
    if done.returncode:
        raise LabError(f"{' '.join(argv)} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return str(done.stdout)
