"""securerunctl doctor: what is to be mended, what a host can do, and that nothing of the looking stays."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel
import pytest
from checkout import COMMANDS
from containers import DOCKER_CAPABILITIES, READ_ONLY_CGROUPS, WRITABLE_CGROUPS, container
from hosts import Host, Network, eventually, machine_snapshot
from jobs import kill_with_guard
from sandbox import apart, cover
from users import GUARD, PrivateMachine

from securerun.ctl import doctor
from securerun.preflight import abilities

SECURERUNCTL = str(COMMANDS / "securerunctl")
_TUN = Path("/dev/net/tun")
_ABILITIES = (
    *("kernel", "capabilities", "cgroup", "shield", "key", "iptables", "nftables", "legacy", "reserved-ports"),
    *("guard directly", "guard by sudo", "guard by systemd"),
    "own-network",
)


def understood(text: str) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
    """The abilities by name, and the findings, of what --json prints, after a look at every field."""
    document = json.loads(text)
    assert list(document) == ["findings", "host"]
    for finding in document["findings"]:
        assert list(finding) == ["name", "what", "why", "mend"]
        assert all(isinstance(value, str) and value for value in finding.values()), finding
    for ability in document["host"]:
        assert list(ability) == ["name", "works", "what", "mend"]
        assert ability["works"] in (True, False, None) and ability["what"]
        assert ability["mend"] or ability["works"] is not False, ability
    assert tuple(ability["name"] for ability in document["host"]) == _ABILITIES
    return {ability["name"]: ability for ability in document["host"]}, document["findings"]


def examined(host: Host, *command: str, umask: int = 0o027, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = host.run([*command, SECURERUNCTL, "doctor", "--json"], umask=umask, env=env)
    assert done.stderr == "", done
    return done.returncode, done.stdout


def test_root_can_do_everything_and_nothing_of_the_trial_stays(node: Host) -> None:
    before, machine = node.snapshot(), machine_snapshot()
    status, text = examined(node, umask=0o022)
    host, findings = understood(text)
    assert {name for name, ability in host.items() if ability["works"] is False} <= {
        "guard by systemd",
        "guard by sudo",
        "key",  # nobody made one
        *(() if any(map(shutil.which, ("pasta", "slirp4netns"))) and _TUN.exists() else ("own-network",)),
    }
    assert "proven" in host["shield"]["what"]
    known = "nodes can be known by a key" if not kernel.lack_of(kernel.TAGS) else "nodes cannot be known by a key"
    assert known in host["shield"]["what"]
    assert host["kernel"]["what"].startswith(f"Linux {os.uname().release}")
    assert status == 1
    (umask,) = (finding for finding in findings if finding["name"] == "umask")
    assert (umask["what"], umask["mend"]) == ("the shell's umask is 0022", "umask 0027")
    # The guard that answered takes note of the end of its input.
    assert eventually(lambda: (node.snapshot(), machine_snapshot()) == (before, machine), seconds=5)
    assert eventually(lambda: not node.processes(), seconds=5)


def test_text_has_the_same_as_json_in_lines(node: Host) -> None:
    done = node.run([SECURERUNCTL, "doctor"], umask=0o022)
    assert (done.returncode, done.stderr) == (1, ""), done
    host, _, findings = done.stdout.partition("\n\n")
    assert [line.split("  ")[0].strip() for line in host.splitlines()] == [*_ABILITIES]
    assert "umask: the shell's umask is 0022: " in findings
    assert all("fix: `" in line for line in findings.splitlines())


def test_doctor_says_where_the_key_is_of_and_nothing_of_it(node: Host, tmp_path: Path) -> None:
    env, secret = {"HOME": str(tmp_path)}, "0123456789abcdef" * 4

    def ability(*, to_be_mended: bool = False) -> dict[str, Any]:
        status, text = examined(node, umask=0o027, env=env)
        assert secret not in text
        host, findings = understood(text)
        assert ("key" in {finding["name"] for finding in findings}) is to_be_mended
        assert status == int(to_be_mended) or len(findings) > to_be_mended
        return host["key"]

    none = ability()
    assert none["works"] is False and none["mend"] == "securerunctl setup key"
    key = tmp_path / ".config/securerun/key"
    key.parent.mkdir(parents=True)
    key.touch(0o600)
    key.write_text(secret)
    assert ability()["works"] is True and str(key) in ability()["what"]
    key.chmod(0o640)
    bad = ability(to_be_mended=True)
    assert bad["works"] is False and "mode 640" in bad["what"]


def test_status_is_0_where_nothing_is_to_be_mended(node: Host, capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> tuple[int, str]:
        os.umask(0o077)
        os.environ.clear()
        status = doctor.examine(as_json=True)
        return status, capsys.readouterr().out

    def arrange() -> None:
        cover("/proc/sys/kernel/randomize_va_space", "2")
        cover("/proc/sys/kernel/core_pattern", "|/bin/true")
        # Workers of other tests that were killed this moment are none of this one's.
        cover("/proc/1/cmdline", "python")

    status, text = apart(look, before=arrange, host=node)
    assert (status, understood(text)[1]) == (0, []), text


@pytest.mark.parametrize(("variable", "told"), [("HCCL_IF_BASE_PORT", True), ("NCCL_DEBUG", False)])
def test_ports_of_hccl_count_where_there_is_a_word_of_it(node: Host, variable: str, told: bool) -> None:
    _, findings = understood(examined(node, env={variable: "60000"})[1])
    found = [finding for finding in findings if finding["name"] == "unreserved-ports"]
    assert bool(found) == told
    if told:
        assert found[0]["mend"] == "sysctl -w net.ipv4.ip_local_reserved_ports=60000-60015"


def test_rules_that_turn_this_networks_hosts_away_are_found(node: Host) -> None:
    node.run(
        ["nft", "-f", "-"], text_input="table inet a { chain b { type filter hook input priority 0; policy drop; }; }"
    )
    try:
        status, text = examined(node)
    finally:
        node.run(["nft", "flush", "ruleset"], check=True)
    found = [finding["what"] for finding in understood(text)[1] if finding["name"] == "firewall"]
    assert status == 1 and any(
        "chain b of nft (table inet a) turns 10.77.0.254 and 1 more away" in what for what in found
    ), text


def test_run_that_was_killed_with_its_guard_is_found_until_it_is_cleaned(node: Host) -> None:
    script = (
        "import signal\nfrom securerun import guarded\nfrom securerun.firewall.policy import Policy\n"
        "from securerun.guard import records\n"
        "with guarded(Policy('0123456789ab', (), ())):\n"
        "    (run,) = records.read_host()\n"
        "    print(run.guard, flush=True)\n    signal.pause()\n"
    )
    launcher = node.popen([str(COMMANDS / "python"), "-c", script])
    assert launcher.stdout is not None
    guard = int(launcher.stdout.readline())
    kill_with_guard(launcher, guard)
    status, text = examined(node)
    found = [finding for finding in understood(text)[1] if "0123456789ab" in finding["what"]]
    assert status == 1 and [(one["name"], one["mend"]) for one in found] == [("remains", "securerunctl clean")], text
    assert node.run([SECURERUNCTL, "clean"]).returncode == 0
    assert "0123456789ab" not in examined(node)[1]


@pytest.fixture
def machine(network: Network) -> Iterator[PrivateMachine]:
    with PrivateMachine() as machine:
        yield machine


@pytest.mark.parametrize("way", ["none", "sudo"])
def test_ordinary_user_learns_whether_a_guard_is_to_be_had(network: Network, machine: PrivateMachine, way: str) -> None:
    node, alice = network["node0"], machine.add_user("alice")
    if way == "sudo":
        machine.allow_sudo(f"alice ALL=(root) NOPASSWD:NOSETENV: {GUARD}")
    done = machine.run(node, [SECURERUNCTL, "doctor", "--json"], user=alice)
    host, findings = understood(done.stdout)
    assert done.stderr == ""
    assert host["shield"]["works"] is None and host["capabilities"]["works"] is False
    assert host["guard directly"]["works"] is False
    assert host["guard by sudo"]["works"] is (way == "sudo")
    guards = [finding for finding in findings if finding["name"] == "guard"]
    assert bool(guards) == (way == "none")
    if guards:
        assert done.returncode == 1 and guards[0]["mend"] == "securerunctl setup sudoers"
        assert host["guard by sudo"]["mend"] == "securerunctl setup sudoers"
    assert machine.records() is None


@pytest.mark.parametrize(
    ("capabilities", "mount", "shield"),
    [
        (DOCKER_CAPABILITIES, READ_ONLY_CGROUPS, False),
        (f"{DOCKER_CAPABILITIES},+net_admin", READ_ONLY_CGROUPS, False),
        (f"{DOCKER_CAPABILITIES},+net_admin,+bpf", WRITABLE_CGROUPS, True),
    ],
    ids=["default", "net_admin", "bpf"],
)
def test_container_learns_what_it_must_be_given(node: Host, capabilities: str, mount: str, shield: bool) -> None:
    done = node.run(container(capabilities, mount, SECURERUNCTL, "doctor", "--json"), timeout=60)
    host, findings = understood(done.stdout)
    assert host["shield"]["works"] is shield, host
    assert host["capabilities"]["works"] is shield
    assert ("shield" in {finding["name"] for finding in findings}) is not shield
    assert host["reserved-ports"]["works"] in (True, False)
    if not shield:
        assert "docker run" in host["shield"]["mend"]
        assert "/sys/fs/cgroup:rw" in host["shield"]["mend"]


def test_torch_is_not_imported(node: Host, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import sys; sys.exit('torch was imported')")
    done = node.run([SECURERUNCTL, "doctor"], env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode in (0, 1) and "torch was imported" not in done.stderr, done


@pytest.mark.usefixtures("root")
def test_command_for_a_container_has_its_guard_looked_for_where_it_mounts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = "-v /run/securerun.d:/run/securerun.d:ro"
    monkeypatch.delenv("SECURERUN_SOCKET", raising=False)
    assert abilities._fix_of_privilege().startswith(f"docker run {mount}")
    monkeypatch.setenv("SECURERUN_SOCKET", "/run/o")
    fix = abilities._fix_of_privilege()
    assert fix.startswith(f"docker run -e SECURERUN_SOCKET=/run/securerun.d/guard.sock {mount}")
