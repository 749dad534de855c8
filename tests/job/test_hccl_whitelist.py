"""HCCL's own list: what stands in it, who may read it, when it is gone, and which jobs cannot have one."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host, Network, environment, eventually, finish
from torchless import needs_torch

from securerun.errors import PolicyError, PrivilegeError
from securerun.job import hccl_whitelist
from securerun.linux import proc
from securerun.linux.networks import Network as Peers

ADDRESSES = ("10.77.0.1", "10.77.0.2", "fd77::2")

# Makes a list and keeps it until the end of input; FORK has a child go on after the launcher.
HOLD = """
import os, sys
from securerun.job.hccl_whitelist import whitelisted
with whitelisted(("10.77.0.2",), os.environ) as made:
    if "fork" in sys.argv and not os.fork():
        sys.stdin.read()
        os._exit(0)
    print(made.path, flush=True)
    sys.stdin.readline()
"""

# How CANN's HCCL comes to its addresses (externalinput.cc, hccl_whitelist.cc).
AS_HCCL = """
import json, os, pathlib
assert os.environ["HCCL_WHITELIST_DISABLE"] == "0"
path = os.environ["HCCL_WHITELIST_FILE"]
real = os.path.realpath(path)
print(json.dumps({"path": path, "host_ip": json.loads(pathlib.Path(real).read_text())["host_ip"]}))
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, for this process and what it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def networks(*texts: str) -> list[Peers]:
    return [ipaddress.ip_network(text) for text in texts]


def host_ip(path: Path) -> list[str]:
    document = json.loads(path.read_text())
    assert list(document) == ["host_ip"]
    return list(document["host_ip"])


def hold(*arguments: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment({"TMPDIR": os.environ["TMPDIR"]}),
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


# --- the file


def test_the_list_is_there_for_the_block_and_the_environment_as_before_afterwards(place: Path) -> None:
    for before in ({}, {"HCCL_WHITELIST_DISABLE": "1", "HCCL_WHITELIST_FILE": "/etc/mine"}):
        variables = {"OTHER": "1", **before}
        with hccl_whitelist.whitelisted(ADDRESSES, variables) as made:
            assert variables == {
                "OTHER": "1",
                "HCCL_WHITELIST_DISABLE": "0",
                "HCCL_WHITELIST_FILE": str(made.path),
            }
            assert host_ip(made.path) == list(ADDRESSES)
            assert os.path.realpath(made.path) == str(made.path)
        assert variables == {"OTHER": "1", **before}
        assert list(place.iterdir()) == []


def test_nobody_else_can_read_it_whatever_the_umask() -> None:
    before = os.umask(0)
    try:
        with hccl_whitelist.whitelisted(ADDRESSES, {}) as made:
            assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
            assert stat.S_IMODE(made.path.parent.stat().st_mode) == 0o700
            assert made.path.parent.stat().st_uid == os.geteuid()
    finally:
        os.umask(before)


def test_it_goes_with_an_error_too(place: Path) -> None:
    variables: dict[str, str] = {}
    with pytest.raises(ZeroDivisionError), hccl_whitelist.whitelisted(ADDRESSES, variables):
        raise ZeroDivisionError
    assert variables == {}
    assert list(place.iterdir()) == []


def test_it_can_change_while_it_is_read() -> None:
    with hccl_whitelist.whitelisted(ADDRESSES, {}) as made, made.path.open() as reader:
        made.change(["10.77.0.9"])
        assert json.load(reader)["host_ip"] == list(ADDRESSES)
        assert host_ip(made.path) == ["10.77.0.9"]
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o600


def test_what_a_killed_launcher_left_goes_with_the_next(place: Path) -> None:
    process, path = hold()
    assert host_ip(path) == ["10.77.0.2"]
    process.kill()
    process.communicate()
    (place / f"securerun-{os.geteuid()}-empty").mkdir(mode=0o700)  # killed before there was a file in it
    assert path.exists()
    with hccl_whitelist.whitelisted(ADDRESSES, {}) as made:
        assert list(place.iterdir()) == [made.path.parent]
    assert list(place.iterdir()) == []


def test_what_a_job_that_goes_on_may_still_read_stays_until_it_ends(place: Path) -> None:
    """As with a command that returns while its workers go on: `securerunctl exec -- msrun --join=False`."""
    variables = environment()
    with hccl_whitelist.whitelisted(ADDRESSES, variables, may_leave_job=True) as made:
        worker = subprocess.Popen(["sleep", "60"], env=variables)
    try:
        assert host_ip(made.path) == list(ADDRESSES)
        with hccl_whitelist.whitelisted(ADDRESSES, {}):
            assert host_ip(made.path) == list(ADDRESSES)
    finally:
        worker.kill()
        worker.wait()
    with hccl_whitelist.whitelisted(ADDRESSES, environment(), may_leave_job=True):
        pass
    assert list(place.iterdir()) == []


def test_a_job_that_failed_or_was_waited_for_leaves_no_list_to_anyone(place: Path) -> None:
    variables = environment()
    with hccl_whitelist.whitelisted(ADDRESSES, variables):
        left = subprocess.Popen(["sleep", "60"], env=variables)
    try:
        assert list(place.iterdir()) == []
        with pytest.raises(ZeroDivisionError), hccl_whitelist.whitelisted(ADDRESSES, variables, may_leave_job=True):
            raise ZeroDivisionError
        assert list(place.iterdir()) == []
    finally:
        left.kill()
        left.wait()


def test_what_a_live_launcher_has_stays(place: Path) -> None:
    process, path = hold()
    with hccl_whitelist.whitelisted(ADDRESSES, {}):
        assert host_ip(path) == ["10.77.0.2"]
    assert host_ip(path) == ["10.77.0.2"]
    end(process)
    assert list(place.iterdir()) == []


def test_what_a_process_of_a_killed_launcher_may_still_read_stays(place: Path) -> None:
    process, path = hold("fork")
    process.kill()
    with hccl_whitelist.whitelisted(ADDRESSES, {}):
        assert host_ip(path) == ["10.77.0.2"]
    process.communicate()  # the end of input is the child's
    assert eventually(lambda: _sweeps(path))


@pytest.mark.usefixtures("root")
def test_nobody_elses_environment_is_read_for_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others cannot read the list, and may have gigabytes shown as their environment."""
    process, _ = hold()
    process.kill()
    process.communicate()
    other = subprocess.Popen(["sleep", "60"], user=65534)
    asked: list[int] = []
    read = proc.environment

    def environment(pid: int) -> bytes:
        asked.append(pid)
        return read(pid)

    monkeypatch.setattr(proc, "environment", environment)
    try:
        with hccl_whitelist.whitelisted(ADDRESSES, {}):
            assert os.getpid() in asked
            assert other.pid not in asked
    finally:
        other.kill()
        other.wait()


def _sweeps(path: Path) -> bool:
    with hccl_whitelist.whitelisted(ADDRESSES, {}):
        return not path.exists()


def test_launchers_that_come_and_go_at_once_do_not_take_each_others_lists(place: Path) -> None:
    """Each sweeps while others make theirs."""
    program = HOLD.replace("with whitelisted", "for _ in range(40):\n  with whitelisted").replace(
        '    if "fork" in sys.argv and not os.fork():\n        sys.stdin.read()\n        os._exit(0)\n', ""
    )
    program = program.replace("    print(made.path, flush=True)\n    sys.stdin.readline()", "    made.path.read_text()")
    variables = environment({"TMPDIR": str(place)})
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=variables, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert list(place.iterdir()) == []


def test_what_another_sweeps_away_before_it_is_locked_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    swept: list[Path] = []

    def sweep_first(directory: int, operation: int) -> None:
        if not swept:
            (made,) = place.iterdir()
            made.rmdir()
            swept.append(made)
        lock(directory, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    with hccl_whitelist.whitelisted(ADDRESSES, {}) as made:
        assert host_ip(made.path) == list(ADDRESSES)
        assert list(place.iterdir()) == [made.path.parent] != swept


def test_things_of_others_in_the_directory_stay(place: Path) -> None:
    name = f"securerun-{os.geteuid()}-"
    target = place / "target"
    target.mkdir(mode=0o700)
    (target / "hccl-whitelist.json").touch()
    (place / f"{name}link").symlink_to(target)
    (place / f"{name}file").touch()
    open_to_all = place / f"{name}open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / "hccl-whitelist.json").touch()
    full = place / f"{name}full"
    full.mkdir(mode=0o700)
    (full / "mine").touch()
    before = {path: path.is_dir() and sorted(path.iterdir()) for path in place.iterdir()}
    with hccl_whitelist.whitelisted(ADDRESSES, {}):
        pass
    assert {path: path.is_dir() and sorted(path.iterdir()) for path in place.iterdir()} == before


def test_where_no_file_can_be_made_the_user_is_told_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "gone"))
    with pytest.raises(PrivilegeError, match="no file can be made in .*gone .*; set TMPDIR"):
        hccl_whitelist.Whitelist(ADDRESSES)


# --- what stands in it


def test_this_hosts_own_addresses_and_the_peers_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ("127.0.0.1", "10.77.0.1", "fd77::1")
    monkeypatch.setattr("securerun.host.interfaces.own_addresses", lambda: own)
    found = hccl_whitelist.addresses_of(networks("10.77.0.1", "10.77.0.2", "fd77::2"), nodes=2, ranks=8)
    assert found == (*own, "10.77.0.2", "fd77::2")


@pytest.mark.parametrize("network", ["10.77.0.0/24", "10.77.0.2/31", "fd77::/64", "0.0.0.0/0"])
def test_a_network_among_the_peers_is_refused(network: str) -> None:
    with pytest.raises(PolicyError, match=rf"{network} is a network; name each node .* out on all nodes") as error:
        hccl_whitelist.addresses_of(networks("10.77.0.9", network), nodes=2, ranks=8)
    assert error.value.status == 78


@pytest.mark.parametrize(
    ("peers", "nodes", "ranks", "refused"),
    [
        (["10.0.0.2"], 2, 16, False),
        (["10.0.0.2"], 2, 17, True),
        ([], 1, 17, True),
        (["10.0.0.2"], 4, 8, False),  # two nodes an address
        (["10.0.0.2"], 4, 9, True),
        (["10.0.0.2", "10.0.0.3"], 4, 8, False),
        ([], 3, 8, True),  # three containers of this host
    ],
)
def test_a_job_that_would_hang_is_refused(peers: Sequence[str], nodes: int, ranks: int, refused: bool) -> None:
    if not refused:
        assert set(peers) <= set(hccl_whitelist.addresses_of(networks(*peers), nodes, ranks))
        return
    with pytest.raises(PolicyError, match="accepts 16 connections of an address, and this job has .* leave") as error:
        hccl_whitelist.addresses_of(networks(*peers), nodes, ranks)
    assert error.value.status == 78


def test_ranks_as_torch_counts_them() -> None:
    assert hccl_whitelist.ranks_of("4") == 4
    assert hccl_whitelist.ranks_of("cpu") == os.cpu_count()
    assert hccl_whitelist.ranks_of("nonsense") == 0


# --- behind securerun


def launch(node: Host, *options: str, tmp: Path, script: str = AS_HCCL) -> subprocess.Popen[str]:
    program = tmp / "worker.py"
    program.write_text(script)
    return node.popen(
        [jobs.SECURERUN, "--firewall", "off", *options, program],
        env={"TMPDIR": str(tmp)},
    )


@pytest.mark.parametrize("protection", [[], ["--unprotected"]])
def test_the_workers_find_the_list_and_afterwards_it_is_gone(
    network: Network, place: Path, protection: list[str]
) -> None:
    node, peer, _ = network
    done = finish(launch(node, "--hccl-whitelist", *protection, "--peers", ",".join(peer.addresses), tmp=place))
    assert done.returncode == 0, done
    seen = json.loads(done.stdout)
    assert set(seen["host_ip"]) == {*node.addresses, *peer.addresses, "127.0.0.1", "::1"}
    assert f"HCCL accepts 6 addresses by {seen['path']}; every node needs --hccl-whitelist" in done.stderr
    assert not list(place.glob("securerun-*"))


def test_without_the_option_hccl_is_told_nothing(network: Network, place: Path) -> None:
    script = "import os; print([name for name in os.environ if 'WHITELIST' in name])"
    done = finish(launch(network["node0"], tmp=place, script=script))
    assert (done.returncode, done.stdout) == (0, "[]\n"), done


def test_a_job_that_fails_leaves_no_list(network: Network, place: Path) -> None:
    done = finish(launch(network["node0"], "--hccl-whitelist", tmp=place, script="raise SystemExit(3)"))
    assert done.returncode == 1, done
    assert not list(place.glob("securerun-*"))


@needs_torch
def test_a_terminated_launcher_leaves_no_list(network: Network, place: Path) -> None:
    script = "import time; print('up', flush=True); time.sleep(60)"
    job = launch(network["node0"], "--hccl-whitelist", "--grace", "0", tmp=place, script=script)
    assert job.stdout is not None and job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGTERM)
    finish(job)
    assert not list(place.glob("securerun-*"))


def test_the_plan_shows_the_list_and_makes_no_file(network: Network, place: Path) -> None:
    node, peer, _ = network
    done = finish(launch(node, "--hccl-whitelist", "--dry-run", "--peers", peer.ipv4, tmp=place))
    assert done.returncode == 0, done
    _, _, text = done.stdout.partition("# HCCL_WHITELIST_FILE\n")
    assert peer.ipv4 in json.loads(text)["host_ip"]
    assert not list(place.glob("securerun-*"))


def test_a_command_that_returns_while_its_job_goes_on_leaves_it_the_list(network: Network, place: Path) -> None:
    node, peer, _ = network
    worker = f"sleep 3; cat $HCCL_WHITELIST_FILE > {place}/seen"
    options = ["--hccl-whitelist", "--firewall", "off", "--peers", peer.ipv4]
    command = ["sh", "-c", f"nohup sh -c '{worker}' > /dev/null 2>&1 &"]
    done = node.run(
        [COMMANDS / "securerunctl", "exec", *options, "--", *command],
        env={"TMPDIR": str(place)},
    )
    assert done.returncode == 0, done
    assert eventually(lambda: (place / "seen").exists() and bool((place / "seen").read_text()))
    assert peer.ipv4 in host_ip(place / "seen")
    assert eventually(lambda: _is_swept(place))


def _is_swept(place: Path) -> bool:
    with hccl_whitelist.whitelisted(ADDRESSES, {}) as made:
        return list(place.glob("securerun-*")) == [made.path.parent]


def test_neighbours_in_the_list_of_peers_stay_single_addresses(network: Network, place: Path) -> None:
    """10.77.0.8 and 10.77.0.9 are 10.77.0.8/31 to a firewall, which HCCL could not read."""
    options = ["--hccl-whitelist", "--nnodes", "3", "--peers", "10.77.0.8,10.77.0.9", "--dry-run"]
    done = network["node0"].run([jobs.SECURERUN, *options, "--no-python", "true"])
    assert done.returncode == 0, done
    assert '"10.77.0.8", "10.77.0.9"' in done.stdout


def test_inside_of_a_run_the_option_is_said_to_be_the_runs(network: Network, place: Path) -> None:
    node = network["node0"]
    inner = [jobs.SECURERUN, "--hccl-whitelist", "--no-python", "true"]
    done = node.run([COMMANDS / "securerunctl", "exec", "--peers", "10.77.0.2", "--", *inner])
    assert done.returncode == 0, done
    assert "--hccl-whitelist" in done.stderr
    assert not list(place.glob("securerun-*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--peers", "10.77.0.0/24"], "is a network"), (["--nproc-per-node", "17"], "17 ranks on one")],
)
def test_what_hccl_could_not_do_is_refused_with_78(
    network: Network, place: Path, options: list[str], words: str
) -> None:
    done = finish(launch(network["node0"], "--hccl-whitelist", *options, tmp=place))
    assert (done.returncode, done.stdout) == (78, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("securerun: --hccl-whitelist: ") and words in line
