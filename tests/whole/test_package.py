"""What scripts/package.sh builds: packages that hold what they should, install, and work once installed.

A wheel and an sdist of all of it, a .deb and an .rpm of the guard alone, and the image that scripts/image.sh makes.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import engines
import node_guard
import probe
import pytest
from checkout import CHECKOUT
from debian_root import Root, image_base
from hosts import Host, Network, environment, eventually
from lacking import Lacking
from test_house import LOADED_BY_THE_GUARD, LOADED_OF_SLURM, LOADED_WHILE_WAITING, LOADED_WITH_A_KEY

from securerun.guard import program

pytestmark = pytest.mark.slow

VERSION = "0.2.0.dev0"
# Where pip reaches no index, and where the tests run in a copy of a checkout that git knows nothing of.
_CANNOT = ("No matching distribution found", "run this in a checkout")
_SECONDS = 300


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that a wheel and an sdist of this checkout were built into."""
    into = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [CHECKOUT / "scripts/package.sh", into],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        umask=0o077,
    )
    if any(words in done.stderr for words in _CANNOT):
        raise Lacking(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    return into


@pytest.fixture(scope="module")
def wheel(packages: Path) -> Path:
    (found,) = packages.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(packages: Path) -> Path:
    (found,) = packages.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module", params=["deb", "rpm"])
def guard_package(request: pytest.FixtureRequest, packages: Path) -> Path:
    """The package of the guard alone, of each kind that this machine can build."""
    found = [*packages.glob(f"securerun-guard*.{request.param}")]
    if not found:
        raise Lacking(f"what builds a .{request.param} is not installed; scripts/setup.sh test installs it")
    (package,) = found
    return package


@dataclass(frozen=True)
class Installed:
    """A virtual environment that securerun was installed in, and a directory that is no checkout."""

    commands: Path
    elsewhere: Path

    def run(self, *command: str | Path, said: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run one of its commands to its end, with `said` on its standard input."""
        name, *arguments = command
        done = subprocess.run(
            [self.commands / name, *arguments],
            cwd=self.elsewhere,
            env=environment({"GLOO_SOCKET_IFNAME": None}),  # this is no host of `hosts.Network`
            input=said,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        assert done.returncode == status, (command, done.stdout, done.stderr)
        return done


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """securerun, installed by pip in a fresh virtual environment; what it depends on is that of these tests."""
    package: Path = request.getfixturevalue(request.param)
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", str(package)], check=True, timeout=_SECONDS)
    # The tests' own securerun is editable, so a .pth file leads to it: of this directory none is read.
    (own,) = place.glob("lib/python3*/site-packages")
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "train.py").write_text("print('trained')\n")
    return Installed(place / "bin", elsewhere)


def tracked() -> set[str]:
    """The files that git tracks in this checkout."""
    git = ["git", "-c", f"safe.directory={CHECKOUT}", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout
    return set(filter(None, listed.split("\0")))


def test_the_wheel_holds_the_package_with_all_its_files_and_nothing_else(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in held if name.startswith(f"securerun-{VERSION}.dist-info/")}
    pages = {name for name in held if name.startswith(f"securerun-{VERSION}.data/data/share/man/")}
    assert {PurePosixPath(name).name for name in pages} == {"securerun.1", "securerunctl.1", "securerun-guard.8"}
    assert held - metadata - pages == {name for name in tracked() if name.startswith("securerun/")}
    assert {PurePosixPath(name).name for name in metadata} >= {"LICENSE", "METADATA", "entry_points.txt"}


def test_the_sdist_is_the_checkout(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
    held = {member.name.partition("/")[2]: member for member in members}
    made = {name for name in held if name == "PKG-INFO" or name.startswith("securerun.egg-info/")}
    assert held.keys() - made == tracked()
    assert {"LICENSE", "README.md", "SECURITY.md", "docs/glossary.md", "tests/whole/test_package.py"} <= held.keys()
    for name, member in held.items():
        runs = name not in made and os.access(CHECKOUT / name, os.X_OK)
        assert stat.S_IMODE(member.mode) == (0o755 if runs else 0o644), name


def test_it_is_of_the_version_that_the_checkout_says(installed: Installed) -> None:
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    assert setup["metadata"]["version"] == VERSION
    done = installed.run("python", "-c", "from importlib.metadata import version; print(version('securerun'))")
    assert done.stdout.strip() == VERSION


def test_what_runs_is_what_was_installed(installed: Installed) -> None:
    done = installed.run("python", "-c", "import securerun; print(securerun.__file__)")
    assert Path(done.stdout).is_relative_to(installed.commands.parent)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("securerun", "--help"), "--peers"),
        (("securerun", "--dry-run", "train.py"), "umask"),
        (("python", "-m", "securerun", "--help"), "--peers"),
        (("python", "-m", "securerun.launch", "--help"), "--peers"),
        (("securerunctl", "--help"), "status"),
        (("securerunctl", "status", "--json"), '"runs"'),
        (("securerunctl", "audit", "--print-kinds"), "securerun"),
        (("securerunctl", "plan", "--format", "sh", "--", "--master-port", "6000", "train.py"), "iptables"),
        (("securerunctl", "setup", "completion", "bash"), "complete"),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_each_command_works(installed: Installed, command: tuple[str, ...], words: str) -> None:
    assert words in installed.run(*command).stdout


def test_a_guard_of_what_was_installed_has_a_job_guarded(installed: Installed, root_and_tools: None) -> None:
    """The guard's interpreter looks at no site-packages by itself; it gets the package from there all the same."""
    with Network("alone") as network:
        job = ["exec", "--peers", "10.77.0.2", "--", "python3", "train.py"]
        done = network["alone"].run([installed.commands / "securerunctl", *job], cwd=installed.elsewhere)
    assert done.returncode == 0 and "trained" in done.stdout, done
    assert "closed to all others by shield" in done.stderr and "guard started directly" in done.stderr, done


def test_the_guards_own_command_begins_there(installed: Installed, root_and_tools: None) -> None:
    assert "securerunctl setup" in installed.run("securerun-guard", "--unknown", status=2).stderr
    assert '"ready"' in installed.run("securerun-guard").stdout


# The guard alone


class Machine:
    """A Debian, and how a package of one kind is installed there and removed."""

    def __init__(self, place: Path, package: Path, host: Host) -> None:
        self.root = Root(place, shown=[Path(sysconfig.get_path("purelib"))])
        self.package = package
        self.host = host
        self.rules_before = host.snapshot()

    def install(self) -> None:
        if self.package.suffix == ".deb":
            shutil.copy(self.package, self.root.place / "root")
            self.run("dpkg", "--install", f"/root/{self.package.name}")
            (self.root.place / "root" / self.package.name).unlink()
        else:
            self._rpm("--upgrade", "--replacepkgs", str(self.package))

    def remove(self) -> None:
        if self.package.suffix == ".deb":
            self.run("dpkg", "--purge", "securerun-guard")
        else:
            self._rpm("--erase", "securerun-guard")

    def run(self, *argv: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        return self.root.run(self.host, argv, status=status)

    def environment_of_a_user(self, wheel: Path) -> tuple[str, list[str], str]:
        """alice's Python, whose environment has the wheel; what makes alice of root; and a program: securerunctl.

        She may have the package's guard by sudo.
        """
        home = self.root.place / "home/alice"
        as_alice = ["setpriv", "--reuid=alice", "--regid=alice", "--init-groups", "env", "HOME=/home/alice"]
        if not home.exists():
            self.run("useradd", "--create-home", "--groups", "securerun", "alice")
            rule = self.root.place / "etc/sudoers.d/securerun"
            shutil.copy(self.root.place / "usr/share/securerun-guard/sudoers", rule)
            rule.chmod(0o440)
            self.run("visudo", "--check")
            self.run(*as_alice, "python3", "-m", "venv", "--without-pip", "/home/alice/venv")
            (packages,) = home.glob("venv/lib/python3*/site-packages")
            shutil.unpack_archive(wheel, packages, "zip")
            (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        program = "import sys; from securerun.ctl.app import main; sys.argv[0] = 'securerunctl'; main()"
        return "/home/alice/venv/bin/python", as_alice, program

    def _rpm(self, *words: str) -> None:
        done = self.host.run(["rpm", "--root", str(self.root.place), "--nodeps", *words], cwd=Path("/"))
        assert done.returncode == 0 and "failed" not in done.stderr, done


@pytest.fixture(scope="module")
def machine(guard_package: Path, tmp_path_factory: pytest.TempPathFactory, root_and_tools: None) -> Iterator[Machine]:
    """A Debian without the package, on a host of its own."""
    with Network("alone") as network:
        yield Machine(tmp_path_factory.mktemp("machine"), guard_package, network["alone"])


def files_of(package: Path) -> dict[str, str]:
    """The files of a package, with the mode and the owner of each."""
    if package.suffix == ".deb":
        words = ["dpkg-deb", "--contents", str(package)]
        lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
        parts = [line.split() for line in lines]
        return {part[5][1:]: f"{part[0]} {part[1]}" for part in parts if not part[0].startswith("d")}
    words = [
        "rpm",
        "--query",
        "--package",
        "--queryformat",
        "[%{FILEMODES:perms} %{FILEUSERNAME}/%{FILEGROUPNAME} %{FILENAMES}\n]",
    ]
    lines = subprocess.run([*words, str(package)], check=True, capture_output=True, text=True).stdout.splitlines()
    parts = [line.split() for line in lines]
    return {part[2]: f"{part[0]} {part[1]}" for part in parts if not part[0].startswith("d")}


def test_the_guards_package_holds_what_it_loads_and_no_launcher(guard_package: Path) -> None:
    held = files_of(guard_package)
    assert held.pop("/usr/sbin/securerun-guard") == "-rwxr-xr-x root/root"
    assert set(held.values()) == {"-rw-r--r-- root/root"}
    modules = {name.removeprefix("/usr/lib/securerun/") for name in held if name.endswith(".py")}
    wings = (LOADED_BY_THE_GUARD, LOADED_WHILE_WAITING, LOADED_OF_SLURM, LOADED_WITH_A_KEY)
    needed = {
        str(PurePosixPath("securerun", wing, f"{name}.py"))
        for one in wings
        for wing in one
        for name in one[wing].split()
    }
    assert needed <= modules
    tops = {PurePosixPath(name).parts[1] for name in modules}
    assert tops == {"__init__.py", "errors.py", "lines.py", "site_file.py", "text.py", "guard", "firewall", "linux"}
    rest = {PurePosixPath(name).name for name in held if not name.endswith(".py")}
    assert rest == {
        *("securerun.socket", "securerun@.service", "securerun.slice", "sudoers", "copyright"),
        *("securerun.1.gz", "securerunctl.1.gz", "securerun-guard.8.gz"),
    }


def test_the_installed_guard_answers_and_goes_with_its_package(machine: Machine) -> None:
    before = machine.root.files()
    machine.install()
    assert "securerunctl setup" in machine.run("securerun-guard", "--unknown", status=2).stderr
    assert '"ready"' in machine.run("sh", "-c", "true | securerun-guard").stdout
    assert machine.run("getent", "group", "securerun").stdout.startswith("securerun:")
    compiled = [*machine.root.place.glob("usr/lib/securerun/securerun/guard/__pycache__/server.*.pyc")]
    assert compiled, "every guard would compile all that it loads"
    machine.install()  # once more, as an upgrade is
    machine.remove()
    changed = {name for name, what in machine.root.files().items() if before.get(name) != what}
    assert not [name for name in changed if "securerun" in name], changed
    assert not before.keys() - machine.root.files().keys()


def test_a_launcher_of_a_wheel_in_an_environment_of_a_users_has_the_packages_guard(
    machine: Machine, wheel: Path
) -> None:
    machine.install()
    python, as_alice, exec_ = machine.environment_of_a_user(wheel)
    job = ["exec", "--firewall", "off", "--peers", "10.77.0.2", "--", "echo", "trained"]
    done = machine.run(*as_alice, python, "-c", exec_, *job)
    assert "trained" in done.stdout and "guard started by sudo" in done.stderr, done
    assert "closed to all others by shield" in done.stderr, done
    # A Python that users share has a guard of root's too, which sudo does not permit.
    machine.run("cp", "--archive", "/home/alice/venv", "/opt/venv")
    machine.run("chown", "--recursive", "root:root", "/opt/venv")
    shutil.copy(machine.root.place / "usr/sbin/securerun-guard", machine.root.place / "opt/venv/bin/securerun-guard")
    done = machine.run(*as_alice, "/opt/venv/bin/python", "-c", exec_, *job)
    assert "trained" in done.stdout and "guard started by sudo" in done.stderr, done
    machine.remove()


def test_a_guard_that_runs_goes_on_to_its_jobs_end_without_its_package(machine: Machine, wheel: Path) -> None:
    machine.install()
    python, as_alice, exec_ = machine.environment_of_a_user(wheel)
    ends, records = machine.root.place / "tmp/end", machine.root.place.parent / "run/securerun"
    waits = "echo begun; while [ ! -e /tmp/end ]; do sleep 0.1; done; echo trained"
    job = [*as_alice, python, "-c", exec_, "exec", "--peers", "10.77.0.2", "--", "sh", "-c", waits]
    started = machine.host.popen(machine.root.command(job, {}), cwd=Path("/"))
    try:
        assert started.stdout is not None and started.stdout.readline() == "begun\n", started.communicate()
        assert [*records.glob("*.json")]
        machine.remove()
    finally:
        ends.touch()
        output, errors = started.communicate(timeout=30)
    assert (started.returncode, output) == (0, "trained\n"), errors
    assert "guard" not in errors.partition("trained")[2], errors
    assert eventually(lambda: not [*records.glob("*.json")]), "what the guard left"
    assert machine.host.snapshot() == machine.rules_before


# The image of the guard

IMAGE = f"localhost/securerun-guard:{VERSION}"


@pytest.fixture(scope="module")
def image(wheel: Path, tmp_path_factory: pytest.TempPathFactory, root_and_tools: None) -> Path:
    """The file that holds the image; the Debian in it is kept where the machines of the kernel matrix are kept."""
    into = tmp_path_factory.mktemp("image")
    variables = {**os.environ, "SECURERUN_IMAGE_BASE": str(image_base())}
    make = [CHECKOUT / "scripts/image.sh", wheel, into]
    subprocess.run(make, check=True, env=variables, timeout=_SECONDS, umask=0o077)
    (file,) = into.iterdir()
    return file


def test_the_image_is_what_it_says(image: Path) -> None:
    with tarfile.open(image) as archive:
        files = {name: archive.extractfile(name) for name in archive.getnames()}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    for name, content in contents.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"
    (described,) = json.loads(contents["index.json"])["manifests"]
    manifest = json.loads(contents[f"blobs/sha256/{described['digest'].partition(':')[2]}"])
    (of_docker,) = json.loads(contents["manifest.json"])
    assert of_docker["RepoTags"] == [IMAGE]
    assert [f"blobs/sha256/{layer['digest'][7:]}" for layer in manifest["layers"]] == of_docker["Layers"]


def test_the_image_is_the_same_from_the_same_debian_and_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    debian = tmp_path / "debian.tar"
    with tarfile.open(debian, "w") as archive:
        archive.add(CHECKOUT / "LICENSE", "LICENSE")
    made = []
    for name in ("one", "two"):
        into = tmp_path / name
        into.mkdir()
        script = str(CHECKOUT / "scripts/guard_image.py")
        subprocess.run([sys.executable, script, str(debian), str(wheel), str(into)], check=True, timeout=_SECONDS)
        (file,) = into.iterdir()
        made.append(file.read_bytes())
    assert made[0] == made[1]


def load(image: Path, engine: engines.Engine) -> None:
    """Have an engine take the image, and keep the file no longer than that."""
    place = engine.node.place("/run/guard.tar")
    shutil.copy(image, place)
    engine.call("load", "--input", "/run/guard.tar")
    place.unlink()


@pytest.mark.parametrize("name", engines.ENGINES)
def test_engines_take_the_image_and_have_a_guard_by_it(image: Path, name: str) -> None:
    with Network("alone") as network, engines.Node(network["alone"]) as node:
        engine = node.engine(name)
        load(image, engine)
        entry = json.loads(engine.call("inspect", "--format={{json .Config.Entrypoint}}", IMAGE))
        assert entry == ["/usr/sbin/securerun-guard", "--listen"]

        def said(script: str) -> subprocess.CompletedProcess[str]:
            options = ["--rm", "--network=none", "--cap-add=NET_ADMIN", "--entrypoint=/bin/sh"]
            return node.run(node.host, [*engine._client(), "run", *options, IMAGE, "-c", script], timeout=120)

        done = said("true | securerun-guard | cat; iptables --version")
        assert '"ready"' in done.stdout and "iptables v1" in done.stdout, done
        # Without a log of the node's, what a guard did is in the container's.
        done = said("echo nonsense | securerun-guard | cat")
        assert "securerun-guard[" in done.stderr and "refused to user 0" in done.stderr, done


def test_the_images_guard_serves_a_pod_without_privilege(image: Path) -> None:
    """As the DaemonSet of `securerunctl setup kubernetes` has it, by the image's own entry point."""
    of_node = ("--pid=host", "--network=host", "--cgroupns=host", "--privileged")
    mounts = ("--volume=/run:/run:rw", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw")
    with Network("node0", "pod0", "pod1", "stranger") as network, engines.Node(network["node0"]) as node:
        podman = node.podman()
        load(image, podman)
        guard = node.popen(node.host, [*podman._client(), "run", "--rm", *of_node, *mounts, IMAGE])
        assert eventually(node.place(str(program.SOCKET)).is_socket, seconds=20), guard.stderr and guard.stderr.read()
        holder = node_guard.held(podman, network["pod0"], "--peers", network["pod1"].ipv4, "--listen", "7001")
        assert holder.start.get("guarding") == ["shield"], holder.start
        target = (network["pod0"].ipv4, 7001)
        assert probe.reach(network["stranger"], [target]) == {target: False}
        assert probe.reach(network["pod1"], [target]) == {target: True}
        holder.let_go()
