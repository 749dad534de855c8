"""The preflight's checks, each made true and made false on a real kernel; firewalls are in test_preflight_firewalls."""

from __future__ import annotations

import ctypes
import os
import resource
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hosts import Host
from sandbox import NOBODY, apart, cover, cover_directory

from securerun.errors import PolicyError
from securerun.finding import Finding
from securerun.firewall.policy import PortRange
from securerun.preflight import files, inspection, ports, surroundings
from securerun.preflight.checks import Check
from securerun.preflight.scene import Scene

_ADDR_NO_RANDOMIZE = 0x0040000
HCCL = PortRange(60000, 60015, "HCCL")

pytestmark = pytest.mark.usefixtures("root_and_tools")


def scene(
    *command: str,
    umask: int = 0o027,
    environment: Mapping[str, str] | None = None,
    log_dir: str | None = None,
    plan: Sequence[PortRange] = (),
    meeting_port: int | None = None,
    reserved: bool = False,
) -> Scene:
    return Scene(
        umask=umask,
        environment=environment or {},
        command=command,
        log_dir=log_dir,
        ports=tuple(plan),
        meeting_port=meeting_port,
        reserved=reserved,
    )


def made(check: Check, looked_at: Scene) -> list[Finding]:
    return list(check(looked_at))


def the_one(findings: Sequence[Finding], name: str, *words: str) -> Finding:
    """The only finding: of this name, in one line, with these words, a reason and a command."""
    assert [finding.name for finding in findings] == [name], findings
    line = str(findings[0])
    assert "\n" not in line
    assert findings[0].why and findings[0].fix
    for word in words:
        assert word in line, line
    return findings[0]


@pytest.mark.parametrize(("found", "mend"), [(0o022, "umask 0027"), (0o000, "umask 0027"), (0o070, "umask 0077")])
def test_shells_umask_is_told_where_it_is_looser_than_the_jobs(found: int, mend: str) -> None:
    assert the_one(made(surroundings.shells_umask, scene(umask=found)), "umask", f"{found:04o}").fix == mend


@pytest.mark.parametrize("found", [0o027, 0o077, 0o777])
def test_shells_umask_that_is_strict_enough_is_nothing_to_tell(found: int) -> None:
    assert made(surroundings.shells_umask, scene(umask=found)) == []


def test_root_is_told_of_a_launch_and_nobody_else() -> None:
    the_one(made(surroundings.root, scene("train.py")), "root", "running as root", "--run-as")
    assert made(surroundings.root, scene()) == []
    assert apart(lambda: made(surroundings.root, scene("train.py")), user=NOBODY) == []


@pytest.mark.parametrize(("level", "told"), [("0", True), ("1", True), ("2", False)])
def test_address_randomisation_of_the_host(level: str, told: bool) -> None:
    findings = apart(
        lambda: made(surroundings.address_randomisation, scene()),
        before=lambda: cover("/proc/sys/kernel/randomize_va_space", level),
    )
    if told:
        the_one(findings, "aslr", f"randomize_va_space is {level}", "sysctl -w kernel.randomize_va_space=2")
    else:
        assert findings == []


def test_address_randomisation_that_setarch_took_away() -> None:
    def take_away() -> None:
        cover("/proc/sys/kernel/randomize_va_space", "2")
        ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE)

    findings = apart(lambda: made(surroundings.address_randomisation, scene()), before=take_away)
    the_one(findings, "aslr", "setarch -R")


@pytest.mark.parametrize(
    ("version", "told"),
    [("2.5.1", True), ("2.5.1+cpu", True), ("1.13.1", True), ("2.6.0", False), ("2.13.0+cu130", False), (None, False)],
)
def test_torch_before_2_6_is_told_also_where_it_is_not_loaded(tmp_path: Path, version: str | None, told: bool) -> None:
    """A virtual environment of its own, with what pip leaves of such a torch."""
    packages = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (tmp_path / "pyvenv.cfg").touch()
    (packages / "torchvision-0.1.dist-info").mkdir()
    if version:
        (packages / f"torch-{version}.dist-info").mkdir()

    def move_in() -> None:
        sys.executable = str(tmp_path / "bin" / "python")
        sys.modules.pop("torch", None)

    findings = apart(lambda: made(surroundings.torch_release, scene()), before=move_in)
    if told:
        the_one(findings, "torch", f"torch {version} is older than 2.6", "CVE-2025-32434", "pip install")
    else:
        assert findings == []


def test_torch_that_is_loaded_is_the_one_that_counts() -> None:
    import torch

    assert not torch.__version__.startswith("1.")
    assert made(surroundings.torch_release, scene()) == []


@pytest.mark.parametrize(("value", "told"), [("1", True), ("YES", True), ("0", False), ("", False), ("no", False)])
def test_variable_that_lets_code_in_is_told_as_torch_reads_it(value: str, told: bool) -> None:
    findings = made(surroundings.code_in_weights, scene(environment={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": value}))
    assert bool(findings) == told
    if told:
        the_one(findings, "weights-only", "unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


@pytest.mark.parametrize(
    ("limit", "pattern", "place"),
    [
        (resource.RLIM_INFINITY, "core", "its working directory"),
        (4096, "/var/crash/core.%p", "/var/crash"),
        (0, "core", None),
        (resource.RLIM_INFINITY, "|/usr/lib/systemd/systemd-coredump %P", None),
    ],
)
def test_core_dumps_that_land_in_a_directory_are_told(limit: int, pattern: str, place: str | None) -> None:
    def arrange() -> None:
        cover("/proc/sys/kernel/core_pattern", pattern)
        resource.setrlimit(resource.RLIMIT_CORE, (limit, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    findings = apart(lambda: made(surroundings.core_dumps, scene()), before=arrange)
    if place:
        the_one(findings, "core", pattern, place, "ulimit -c 0")
    else:
        assert findings == []


# --- files -------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory whose way from / belongs to root, with a script that is nobody else's either."""
    place = tmp_path / "job"
    place.mkdir(mode=0o750)
    write(place / "train.py", 0o640)
    return place


def write(path: Path, mode: int) -> Path:
    path.write_text("")
    path.chmod(mode)
    return path


def programs(*command: str | Path, **environment: str) -> list[Finding]:
    return made(files.changeable_programs, scene(*map(str, command), environment=environment))


def healthy(place: Path) -> bool:
    return programs(place / "train.py") == []


@pytest.mark.parametrize(
    ("mode", "told"), [(0o550, False), (0o644, False), (0o664, True), (0o642, True), (0o666, True)]
)
def test_script_that_others_can_write_is_told_and_mended(place: Path, mode: int, told: bool) -> None:
    script = write(place / "train.py", mode)
    findings = programs(script, "--lr", "0.1")
    assert bool(findings) == told
    if told:
        finding = the_one(findings, "script", str(script), f"mode {mode:o}")
        subprocess.run(finding.fix, shell=True, check=True)  # noqa: S602 - the very words that a person is told
        assert healthy(place)


@pytest.mark.parametrize(("mode", "told"), [(0o777, True), (0o770, True), (0o1777, False), (0o755, False)])
def test_directory_of_the_script_that_others_can_write_is_told(place: Path, mode: int, told: bool) -> None:
    place.chmod(mode)
    findings = programs(place / "train.py")
    assert bool(findings) == told
    if told:
        the_one(findings, "script", str(place), f"chmod go-w {place}")


def test_another_owner_can_change_the_script_too(place: Path) -> None:
    os.chown(place / "train.py", NOBODY, NOBODY)
    finding = the_one(programs(place / "train.py"), "script", f"belongs to user {NOBODY}")
    subprocess.run(finding.fix, shell=True, check=True)  # noqa: S602
    assert healthy(place)


def test_directory_of_another_user_is_not_to_be_made_roots(place: Path) -> None:
    os.chown(place, NOBODY, NOBODY)
    assert the_one(programs(place / "train.py"), "script", str(place)).fix == f"securerun --run-as {NOBODY}"


def test_a_users_own_files_and_roots_are_his_to_run() -> None:
    script = Path("/var/log/train.py")

    def arrange() -> None:
        cover_directory("/var/log")
        write(script, 0o644)
        os.chown(script, NOBODY, NOBODY)

    def look() -> list[Finding]:
        sys.path[:] = []  # this Python's own may lie where only the tester may look
        return programs(script)

    assert apart(look, before=arrange, user=NOBODY) == []
    the_one(apart(look, before=arrange), "script", f"belongs to user {NOBODY}")


def test_link_is_followed_to_what_it_leads_to(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to(write(place / "train.py", 0o666))
    the_one(programs(tmp_path / "link.py"), "script", str(place / "train.py"))


def test_module_of_dash_m_is_found_and_not_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = place / "package"
    package.mkdir()
    write(package / "__init__.py", 0o640).write_text("raise SystemExit('was run')")
    monkeypatch.chdir(place)
    assert programs("-m", "package.train") == []
    package.chmod(0o777)
    the_one(programs("-m", "package.train"), "script", str(package))
    assert programs("-m", "no_such_module") == []


def test_program_is_looked_for_as_a_shell_does_and_a_missing_one_is_torchs_matter(place: Path) -> None:
    assert programs("sh", "-c", "true") == []
    assert programs("no-such-program") == []
    assert programs(place / "no-such-script.py") == []


def test_files_that_arguments_name_are_looked_at_by_their_kind(place: Path) -> None:
    configuration, key, data = (write(place / name, 0o666) for name in ("model.yaml", "client.pem", "data.bin"))
    found = programs(place / "train.py", "--config", configuration, f"--key={key}", "--data-path", data)
    assert {(finding.name, finding.fix) for finding in found} == {
        ("config", f"chmod go-w {configuration}"),
        ("key", f"chmod go-w {key}"),
    }
    # A directory that all of them are in is told of once.
    place.chmod(0o777)
    the_one(programs(place / "train.py", "--config", configuration), "script", f"chmod go-w {place}")


@pytest.mark.parametrize(("mode", "mend"), [(0o644, "600"), (0o640, "600"), (0o700, "600"), (0o600, ""), (0o400, "")])
def test_key_is_for_its_owner_alone(place: Path, mode: int, mend: str) -> None:
    key = write(place / "id_rsa", mode)
    findings = made(files.open_keys, scene(str(place / "train.py"), str(key)))
    if mend:
        the_one(findings, "key", f"mode {mode:o}", f"chmod {mend} {key}")
    else:
        assert findings == []


def test_rank_table_that_the_environment_names(place: Path) -> None:
    table = write(place / "hccl.json", 0o640)
    assert programs(place / "train.py", RANK_TABLE_FILE=str(table)) == []
    table.chmod(0o660)
    the_one(programs(place / "train.py", RANK_TABLE_FILE=str(table)), "rank-table", str(table))


def test_packages_that_others_can_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = place / "site-packages"
    packages.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages), str(place / "missing"), "/usr/lib/python.zip"])
    assert healthy(place)
    packages.chmod(0o775)
    the_one(programs(place / "train.py"), "site-packages", str(packages))


def test_compiled_extensions_that_others_can_write_are_code(place: Path) -> None:
    extensions = place / "extensions"
    extensions.mkdir(mode=0o750)
    assert programs(place / "train.py", TORCH_EXTENSIONS_DIR=str(extensions)) == []
    extensions.chmod(0o770)
    the_one(programs(place / "train.py", TORCH_EXTENSIONS_DIR=str(extensions)), "extensions", str(extensions))
    usual = place / ".cache" / "torch_extensions"
    usual.mkdir(parents=True)
    usual.chmod(0o777)
    the_one(programs(place / "train.py", HOME=str(place)), "extensions", str(usual))


_DIRECTORIES: list[tuple[str, Callable[[str], Scene]]] = [
    ("--log-dir of the launcher", lambda path: scene("train.py", log_dir=path)),
    *(
        (name, lambda path, name=name: scene("train.py", environment={name: path}))
        for name in (
            *("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "ASCEND_PROCESS_LOG_PATH"),
            *("TORCH_TRACE", "ASCEND_WORK_PATH", "NPU_COLLECT_PATH", "DUMP_GRAPH_PATH", "TORCH_COMPILE_DEBUG_DIR"),
            "ASCEND_CACHE_PATH",
        )
    ),
    ("--profile-save-path", lambda path: scene("train.py", "--profile-save-path", path)),
    ("--tensorboard-dir=", lambda path: scene("train.py", f"--tensorboard-dir={path}")),
]


@pytest.mark.parametrize(("what", "of"), _DIRECTORIES, ids=[what for what, _ in _DIRECTORIES])
def test_directory_is_told_when_it_is_more_open_than_its_row(
    tmp_path: Path, what: str, of: Callable[[str], Scene]
) -> None:
    directory = tmp_path / "a directory"
    directory.mkdir()
    for mode, told in ((0o750, False), (0o700, False), (0o755, True), (0o770, True), (0o751, True)):
        directory.chmod(mode)
        findings = made(files.open_directories, of(str(directory)))
        assert bool(findings) == told, oct(mode)
        if told:
            finding = the_one(findings, "directory", str(directory), f"mode {mode:o}", "750")
            assert finding.fix.endswith(shlex.quote(str(directory)))
    assert made(files.open_directories, of(str(tmp_path / "missing"))) == []


@pytest.mark.parametrize("name", ["config.toml", "guard.toml"])
@pytest.mark.parametrize(("mode", "told"), [(0o644, False), (0o664, True)])
def test_site_files_are_roots_and_nobody_elses(name: str, mode: int, told: bool) -> None:
    path = Path("/etc/securerun") / name

    def arrange() -> None:
        cover_directory("/etc")
        path.parent.mkdir()
        write(path, mode)

    findings = apart(lambda: made(files.changeable_configuration, scene()), before=arrange)
    assert bool(findings) == told
    if told:
        the_one(findings, "config", str(path), f"chmod go-w {path}")


# --- ports -------------------------------------------------------------------------------------------


def test_plan_in_the_kernels_own_range_is_told_until_it_is_reserved(node: Host) -> None:
    wanted = scene(plan=[PortRange(29500, 29500, "master port"), HCCL])

    def reserve() -> None:
        (finding,) = made(ports.unreserved, wanted)
        assert "60000-60015" in finding.what and "29500" not in finding.what
        Path("/proc/sys/net/ipv4/ip_local_reserved_ports").write_text("50000")
        (finding,) = made(ports.unreserved, wanted)
        assert finding.fix == "sysctl -w net.ipv4.ip_local_reserved_ports=50000,60000-60015"
        subprocess.run(finding.fix.split(), check=True, stdout=subprocess.DEVNULL)

    try:
        assert apart(lambda: made(ports.unreserved, wanted), before=reserve, host=node) == []
    finally:
        node.run(["sysctl", "-w", "net.ipv4.ip_local_reserved_ports="], check=True)


def test_lease_reserves_its_ports_so_a_launch_under_one_is_not_told(node: Host) -> None:
    assert apart(lambda: made(ports.unreserved, scene(plan=[HCCL], reserved=True)), host=node) == []
    assert apart(lambda: made(ports.unreserved, scene(plan=[PortRange(29500, 29500, "master port")])), host=node) == []


def test_planned_port_in_use_is_told_with_the_process_that_has_it(node: Host) -> None:
    plan = [PortRange(29500, 29500, "master port"), HCCL]

    def look(meeting_port: int | None = None) -> list[Finding]:
        with socket.create_server(("0.0.0.0", 60003)), socket.create_server(("127.0.0.1", 29400)):  # noqa: S104
            return made(ports.in_use, scene(plan=plan, meeting_port=meeting_port))

    finding = the_one(apart(look, host=node), "port-in-use", "port 60003", "user 0")
    assert finding.what.startswith("port 60003 of the plan is in use by process ")
    assert finding.fix.startswith("kill ")
    assert apart(lambda: made(ports.in_use, scene(plan=plan)), host=node) == []
    # The other agent of the same job may have the job's own store there; nobody else's listener is excused.
    assert apart(lambda: look(60003), host=node) == []
    assert apart(lambda: look(60004), host=node) != []


def test_port_that_nobody_asked_for_is_told_without_advice_to_kill(node: Host) -> None:
    """As the doctor looks, on a host of HCCL's; at a launch it is the guard that tells."""
    default = PortRange(60000, 60015, "HCCL (default range)")

    def look(*plan: PortRange) -> list[Finding]:
        with socket.create_server(("0.0.0.0", 60003)):  # noqa: S104
            return made(ports.in_use, scene(plan=plan))

    finding = the_one(apart(lambda: look(default), host=node), "port-in-use", "port 60003", "HCCL's default range")
    assert finding.fix.startswith("export HCCL_IF_BASE_PORT=") and "kill" not in str(finding)
    assert "kill" in str(the_one(apart(lambda: look(default, HCCL), host=node), "port-in-use", "of the plan"))


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_planned_port_that_a_connection_has_for_its_own_is_told(
    node: Host, family: socket.AddressFamily, address: str
) -> None:
    """What happens to HCCL's default ports on hosts that reserve nothing."""

    def look(port: int) -> list[Finding]:
        with socket.create_server((address, 29400), family=family), socket.socket(family) as connection:
            connection.bind((address, port))
            connection.connect((address, 29400))
            return made(ports.in_use, scene(plan=[HCCL]))

    finding = the_one(apart(lambda: look(60015), host=node), "port-in-use", "port 60015", "of user 0", "kill ")
    assert "is the source of a connection of process " in finding.what
    assert apart(lambda: look(60016), host=node) == apart(lambda: look(59999), host=node) == []


def test_planned_port_of_another_user_is_told_without_a_process_that_cannot_be_seen(node: Host) -> None:
    listener = node.popen([sys.executable, "-c", _LISTEN], stdin=subprocess.PIPE)
    assert listener.stdout is not None and listener.stdin is not None
    assert listener.stdout.readline() == "listens\n"
    try:
        excused = scene(plan=[HCCL], meeting_port=60000)
        finding = the_one(
            apart(lambda: made(ports.in_use, excused), host=node, user=NOBODY), "port-in-use", "of user 0"
        )
        assert "by a process" in finding.what and "ss -Hatnp" in finding.fix
    finally:
        listener.stdin.close()
        listener.wait(timeout=10)


_LISTEN = "import socket, sys; s = socket.create_server(('', 60000)); print('listens', flush=True); sys.stdin.read()"


# --- remains -----------------------------------------------------------------------------------------


def test_worker_whose_launcher_is_gone_is_told_and_others_are_not(tmp_path: Path) -> None:
    """In a pid namespace of its own, whose first process takes orphans over."""
    look = (
        "from securerun.preflight import remains\nfrom securerun.preflight.scene import Scene\n"
        "for finding in remains.orphans(Scene(0o027, {})): print(finding.name, finding.what, finding.fix, sep='|')"
    )
    script = (
        "(TORCHELASTIC_RUN_ID=old sleep 61 &)\n(sleep 62 &)\n(TORCHELASTIC_RUN_ID_X=1 sleep 63 &)\n"
        '"$0" -c "$1"; status=$?; exit $status'
    )
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script]
    done = subprocess.run(
        [*command, sys.executable, look],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done
    told = done.stdout.splitlines()
    assert [line for line in told if "sleep 61" in line], done
    assert not [line for line in told if "sleep 62" in line or "sleep 63" in line], done
    assert all(line.startswith("remains|process ") and "|kill " in line for line in told), done


# --- what is made of findings -------------------------------------------------------------------------


def test_findings_are_a_line_each_and_strict_refuses_all_at_once() -> None:
    findings = [Finding("a", "this", "because", "mend it"), Finding("b", "evil\n\x1b[2J", "of that", "mend that")]
    said = [str(finding) for finding in findings]
    assert said == ["this: because; fix: `mend it`", "evil\\n\\x1b[2J: of that; fix: `mend that`"]
    with pytest.raises(PolicyError, match="--preflight strict: 2 findings, so nothing was started") as refused:
        inspection.require_none(findings)
    assert refused.value.status == 78
    assert str(refused.value).splitlines()[:2] == said
    inspection.require_none(())
