"""securerunctl metrics: what Prometheus' own parser reads of real runs, and of what users wrote into theirs."""

from __future__ import annotations

import ipaddress
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import init_system
import probe
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, finish, is_alive
from init_system import InitSystem
from users import PrivateMachine

from securerun.ctl import doctor, metrics, setup, status
from securerun.errors import SecurerunError, UsageError
from securerun.finding import Finding
from securerun.firewall.policy import Denial, Layer, Policy
from securerun.guard.records import Record
from securerun.linux import proc

if TYPE_CHECKING or "CI" in os.environ:
    from prometheus_client import parser
else:
    parser = pytest.importorskip("prometheus_client.parser", reason="scripts/setup.sh test installs prometheus-client")

SECURERUNCTL = str(COMMANDS / "securerunctl")
RUN, OTHER = "0123456789ab", "abcdef012345"
LISTEN = (
    "import socket, sys; server = socket.create_server(('', 6000)); print('listening', flush=True); sys.stdin.read()"
)

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parsed(text: str) -> Samples:
    """The samples by name and labels; each family has a type and words, and nothing is there twice."""
    found: Samples = {}
    families = list(parser.text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.type in ("gauge", "counter") and family.documentation, family
        for sample in family.samples:
            assert sample.timestamp is None, "the textfile collector takes no file that has one"
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), sample
            found[sample.name][labels] = sample.value
    return found


def of_runs(*runs: Record) -> Samples:
    """What is told of these runs."""
    return parsed("".join(f"{line}\n" for family in metrics._of_runs(runs) for line in metrics._lines(family)))


def record(run_id: str = RUN, **changes: Any) -> Record:  # noqa: ANN401 - whatever the field holds
    """The record of a run whose launcher and guard are this live process."""
    mine, start = os.getpid(), proc.start_time(os.getpid())
    whole = Record(
        policy=Policy(run_id, (), ()),
        layers=(Layer("shield", ""), Layer("iptables", "")),
        launcher=mine,
        launcher_start=start,
        guard=mine,
        guard_start=start,
        boot_id=proc.boot_id(),
        network=proc.namespace("net"),
        processes=proc.namespace("pid"),
        user=0,
        started=time.time(),
        command="train.py --token hunter2",
    )
    return replace(whole, **changes)


@pytest.fixture
def job(network: Network) -> Iterator[int]:
    """The launcher of a job that listens, on node0, open to node1."""
    node = network["node0"]
    command = [SECURERUNCTL, "exec", "--peers", network["node1"].ipv4, "--", sys.executable, "-c", LISTEN]
    started = node.popen(command, stdin=-1)
    assert started.stdout is not None and started.stdin is not None
    assert started.stdout.readline() == "listening\n"
    yield started.pid
    finish(started, timeout=30)


def told(host: Host) -> Samples:
    done = host.run([SECURERUNCTL, "metrics"])
    assert (done.returncode, done.stderr) == (0, ""), done
    return parsed(done.stdout)


def test_who_is_turned_away_and_guards_that_die_are_counted_by_run(network: Network, job: int) -> None:
    node, _, stranger = network
    (before,) = status.read_runs()
    run = (("run", before.run_id),)
    found = told(node)
    assert found["securerun_runs"] == {
        (("state", "guarding"),): 1,
        (("state", "draining"),): 0,
        (("state", "stale"),): 0,
    }
    assert found["securerun_layers"][("layer", "shield"),] == found["securerun_layers"][("layer", "iptables"),] == 1
    assert found["securerun_layers"][("layer", "namespace"),] == found["securerun_shields_lost"][()] == 0
    assert found["securerun_run_info"] == {(*run, ("state", "guarding"), ("user", "root")): 1}
    assert abs(found["securerun_run_start_time_seconds"][run] - time.time()) < 60
    assert found["securerun_run_denied_packets_total"] == found["securerun_run_guard_restarts_total"] == {run: 0}

    assert not any(probe.reach(stranger, {(node.ipv4, 6000)}).values())
    assert eventually(lambda: told(node)["securerun_run_denied_packets_total"][run] > 0, seconds=10)

    os.kill(before.guard, signal.SIGKILL)
    assert eventually(lambda: not is_alive(before.guard))
    assert eventually(lambda: told(node)["securerun_run_guard_restarts_total"] == {run: 1}, seconds=10)
    found = told(node)
    assert found["securerun_runs"][("state", "guarding"),] == 1
    assert found["securerun_run_denied_packets_total"][run] > 0


def test_a_file_changes_all_at_once_and_can_be_read_by_the_exporter(node: Host, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("of another's")
    file = tmp_path / "textfiles/securerun.prom"
    file.parent.mkdir()
    file.symlink_to(elsewhere)
    done = node.run([SECURERUNCTL, "metrics", "--output", str(file)], umask=0o077)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
    assert elsewhere.read_text() == "of another's"
    assert stat.S_ISREG(file.lstat().st_mode) and stat.S_IMODE(file.lstat().st_mode) == 0o644
    assert parsed(file.read_text())["securerun_runs"][("state", "guarding"),] == 0
    assert [path.name for path in file.parent.iterdir()] == ["securerun.prom"]


def test_what_cannot_be_written_leaves_the_file_that_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "securerun.prom"
    file.write_text("before")

    def disk_is_full(_descriptor: int, _mode: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fchmod", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        metrics._replace(file, b"after")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_the_exporter_would_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\*\.prom"):
        metrics.write(str(tmp_path / "securerun.txt"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/securerun.prom", "there is no directory {}/missing; make it"),
        ("file/securerun.prom", "there is no directory {}/file; make it"),
        ("directory.prom", "{}/directory.prom is a directory; name a file in it"),
        (f"{'x' * 300}.prom", "cannot be written (File name too long)"),
    ],
)
def test_file_that_cannot_be_written_is_named_and_no_other(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory.prom").mkdir()
    with pytest.raises(SecurerunError) as error:
        metrics.write(str(tmp_path / name))
    assert f"--output {tmp_path / name}" in str(error.value) and said.format(tmp_path) in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory.prom", "file"]


def test_findings_are_counted_by_check_less_what_is_the_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding(name, "", "", "") for name in ("umask", "guard", "remains", "remains")]
    monkeypatch.setattr(doctor, "findings", lambda _: tuple(found))
    samples = parsed("".join(f"{line}\n" for family in metrics._of_host() for line in metrics._lines(family)))
    assert samples["securerun_findings"] == {(("check", "guard"),): 1, (("check", "remains"),): 2}
    ((labels, value),) = samples["securerun_info"].items()
    assert dict(labels)["version"] and value == 1


def test_states_of_all_kinds_are_told_and_so_is_a_shield_that_is_lost() -> None:
    gone = proc.start_time(os.getpid()) + 1
    found = of_runs(
        record(RUN, draining=True, void="net_cls", layers=(Layer("iptables", ""),), left_open=((1, 3), (9, 9))),
        record(OTHER, guard_start=gone, key="ab12", nodes_guarded=2, nodes=4, denied_more=5),
    )
    first, second = (("run", RUN),), (("run", OTHER),)
    assert found["securerun_runs"] == {
        (("state", "guarding"),): 0,
        (("state", "draining"),): 1,
        (("state", "stale"),): 1,
    }
    assert found["securerun_layers"][("layer", "iptables"),] == 2
    assert found["securerun_shields_lost"] == {(): 1}
    assert found["securerun_run_ports_left_open"] == {first: 4, second: 0}
    assert found["securerun_run_nodes_guarded"] == {second: 2} and found["securerun_run_nodes"] == {second: 4}
    assert found["securerun_run_denied_packets_total"] == {first: 0, second: 5}


def test_numbers_and_names_of_a_users_own_cannot_break_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "name_of", lambda _: 'a"b\\c\nsecurerun_runs 9')
    source = ipaddress.ip_address("10.0.0.1")
    found = of_runs(
        record(RUN, started=float("inf"), denied=(Denial(source, 1, 10**400),)),
        record(OTHER, started=-(10.0**300), guard_restarts=-1, layers=(Layer("shield", ""), Layer("shield", ""))),
    )
    assert set(found["securerun_runs"].values()) == {0, 2}
    assert found["securerun_run_denied_packets_total"][("run", RUN),] == 2**53
    assert found["securerun_run_guard_restarts_total"][("run", OTHER),] == 0
    assert found["securerun_layers"][("layer", "shield"),] == 2


def test_of_more_runs_than_any_host_has_some_are_a_number() -> None:
    runs = [record(f"{number:012x}") for number in range(metrics._MOST_RUNS + 5)]
    found = of_runs(*runs)
    assert found["securerun_runs_untold"] == {(): 5}
    assert found["securerun_runs"][("state", "guarding"),] == len(runs)
    assert len(found["securerun_run_info"]) == metrics._MOST_RUNS


@pytest.mark.slow
def test_the_timers_unit_writes_what_the_exporter_reads(network: Network) -> None:
    if not init_system.is_possible():
        pytest.skip("there is no systemd")
    node = network["node0"]
    with PrivateMachine() as machine, InitSystem(machine, node) as system:
        system.run(["mkdir", "/run/textfiles"])
        printed = system.run([SECURERUNCTL, "setup", "systemd", "--textfiles", "/run/textfiles"])
        assert (printed.returncode, printed.stderr) == (0, ""), printed
        header = "# /etc/systemd/system/"
        for unit in printed.stdout.split(header)[1:]:
            system.add_unit(unit.partition(". Made by")[0], header + unit)
        system.systemctl("start", "securerun-metrics.timer")
        assert "securerun-metrics.service" in system.systemctl("list-timers", "--all")
        system.systemctl("start", "securerun-metrics.service")
        found = parsed(machine.place("/run/textfiles/securerun.prom").read_text())
        assert found["securerun_runs"][("state", "guarding"),] == 0
        # In there a guard can be had, and a shield hung, as outside.
        assert not {dict(labels)["check"] for labels in found.get("securerun_findings", {})} & {"guard", "shield"}


def test_no_timer_is_printed_for_what_others_could_change(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir(mode=0o777)
    packages.chmod(0o777)
    weak = f"import sysconfig; sysconfig.get_path = lambda _: {str(packages)!r}"
    call = f"{weak}; from securerun.ctl.setup import print_systemd; print_systemd('securerun', '/run/textfiles')"
    done = subprocess.run([sys.executable, "-c", call], check=True, capture_output=True, text=True)
    assert "securerun.socket" in done.stdout and "metrics" not in done.stdout
    assert done.stderr.startswith("securerunctl: the units of metrics are left out: ") and "written by" in done.stderr


@pytest.mark.parametrize("directory", ["textfiles", "/a b", "/a%h", "/a\nUser=0", "/a'"])
def test_a_directory_that_systemd_reads_in_its_own_way_is_refused(directory: str) -> None:
    with pytest.raises(UsageError, match="--textfiles"):
        setup.print_systemd("securerun", directory)


def test_no_command_no_peer_and_no_address_is_told() -> None:
    source = ipaddress.ip_address("10.77.0.9")
    policy = Policy(RUN, (), (ipaddress.ip_network("10.88.0.0/16"),))
    text = "".join(
        line
        for family in metrics._of_runs((record(policy=policy, denied=(Denial(source, 1, 1),)),))
        for line in metrics._lines(family)
    )
    assert not [word for word in ("10.77", "10.88", "train.py", "hunter2") if word in text]
