"""Launchers in user namespaces, and with no_new_privs: what is so is said, and the ways that are named work."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroups import in_child
from checkout import COMMANDS
from conversation import socket_unit
from hosts import Network, eventually, finish
from probe import reach
from users import GUARD, PrivateMachine, User

from securerun.linux import libc, proc
from securerun.protection import ways

EXEC = (str(COMMANDS / "securerunctl"), "exec", "--preflight", "off")
ALONE = (*EXEC, "--peers", "localhost")
OUTSIDE = "securerunctl exec -- unshare -Ur torchrun …"
NAMESPACES = (("unshare", "-Ur"), ("unshare", "-U", "--map-current-user"), ("unshare", "-U"))
NO_NEW_PRIVILEGES = ("setpriv", "--no-new-privs")
LISTENER = (
    "import signal, socket\n"
    "listener = socket.create_server(('::', 0), family=socket.AF_INET6, dualstack_ipv6=True)\n"
    "print(listener.getsockname()[1], flush=True)\n"
    "signal.pause()\n"
)
# As `unshare --user` does it, with nobody mapped (linux/sched.h).
_CLONE_NEWUSER = 0x10000000


@pytest.fixture
def machine(network: Network) -> Iterator[PrivateMachine]:
    with PrivateMachine() as machine:
        yield machine


@pytest.fixture
def alice(machine: PrivateMachine) -> User:
    user = machine.add_user("alice")
    machine.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
    return user


def require_closed_to_strangers_alone(
    network: Network, machine: PrivateMachine, alice: User, command: list[str]
) -> str:
    """Start a command that listens; return what securerun said."""
    node, peer, stranger = network
    job = machine.popen(node, command, user=alice, stdin=subprocess.PIPE)
    assert job.stdout is not None
    line = job.stdout.readline()
    assert line, finish(job, timeout=20).stderr
    target = (node.ipv4, int(line))
    assert reach(peer, [target]) == {target: True}
    assert reach(stranger, [target]) == {target: False}
    os.kill(job.pid, signal.SIGTERM)
    said = finish(job, timeout=30).stderr
    assert "every TCP port of this job closed to all others by shield" in said
    assert eventually(lambda: not machine.records())
    return said


# What is so


@pytest.mark.parametrize("namespace", NAMESPACES, ids=" ".join)
@pytest.mark.parametrize("who", ["alice", "root"])
def test_in_a_user_namespace_the_refusal_names_the_way_that_works(
    network: Network, machine: PrivateMachine, alice: User, namespace: tuple[str, ...], who: str
) -> None:
    user = alice if who == "alice" else None
    done = machine.run(network["node0"], [*namespace, *ALONE, "--", "true"], user=user)
    assert (done.returncode, done.stdout) == (77, ""), done
    assert "no guard is available in this user namespace, so nothing was started" in done.stderr
    assert OUTSIDE in done.stderr
    assert "sudo gives no privilege over the host in a user namespace" in done.stderr
    for wrong in ("sudo is not installed", "as root with", "run as root", "setup sudoers", "user nobody", "65534"):
        assert wrong not in done.stderr, done.stderr


def test_plan_and_doctor_say_it_too(network: Network, machine: PrivateMachine, alice: User) -> None:
    node = network["node0"]
    plan = machine.run(node, ["unshare", "-Ur", *ALONE, "--dry-run", "true"], user=alice).stdout
    (line,) = (line for line in plan.splitlines() if line.startswith("guard "))
    assert "root is not root of the host" in line and line.endswith(f"start it outside: {OUTSIDE}")
    text = machine.run(node, ["unshare", "-Ur", EXEC[0], "doctor", "--json"], user=alice).stdout
    document = json.loads(text)
    host = {ability["name"]: ability for ability in document["host"]}
    assert host["capabilities"]["works"] is False and host["shield"]["works"] is None
    for name in ("capabilities", "guard directly", "guard by sudo"):
        assert host[name]["mend"] == OUTSIDE, host[name]
    (guard,) = (finding for finding in document["findings"] if finding["name"] == "guard")
    assert guard["mend"] == OUTSIDE
    for wrong in ("run as root", "not installed; ", "docker run"):
        assert wrong not in text


def test_a_mapped_root_is_not_told_that_its_job_runs_as_root(
    network: Network, machine: PrivateMachine, alice: User
) -> None:
    node, command = network["node0"], ["unshare", "-Ur", EXEC[0], "exec", "--peers", "localhost", "--dry-run"]
    for user, told in ((alice, False), (None, True)):
        done = machine.run(node, [*command, "--preflight", "warn", "true"], user=user)
        assert ("running as root, and so is the job" in done.stderr) is told, done.stderr


def test_records_are_not_asked_for_as_root_by_a_mapped_root(
    network: Network, machine: PrivateMachine, alice: User
) -> None:
    """With a network of its own it may have a guard, which cannot write to the host's /run."""
    done = machine.run(network["node0"], ["unshare", "-Urn", *ALONE, "--", "true"], user=alice)
    assert done.returncode == 77
    assert "run as root of the host, outside of this user namespace" in done.stderr


def test_with_no_new_privileges_sudo_is_barred_and_not_advised(
    network: Network, machine: PrivateMachine, alice: User
) -> None:
    done = machine.run(network["node0"], [*NO_NEW_PRIVILEGES, *ALONE, "--", "true"], user=alice)
    assert done.returncode == 77
    assert "sudo cannot give privilege here, since no_new_privs is set" in done.stderr
    assert "securerunctl setup systemd" in done.stderr and "setup sudoers" not in done.stderr
    text = machine.run(network["node0"], [*NO_NEW_PRIVILEGES, EXEC[0], "doctor", "--json"], user=alice).stdout
    (by_sudo,) = (one for one in json.loads(text)["host"] if one["name"] == "guard by sudo")
    assert "no_new_privs" in by_sudo["what"] and by_sudo["mend"] == "securerunctl setup systemd"


@pytest.mark.usefixtures("root")
def test_a_sudo_that_is_mounted_nosuid_is_barred() -> None:
    script = (
        "from securerun.protection import ways; print(ways.sudo_program().parent, ways._obstacle_to_sudo(), sep=': ')"
    )
    mount = (
        "for place in /usr/bin /usr/local/bin; do mount --bind $place $place; mount -o remount,bind,nosuid $place; done"
    )
    argv = ["unshare", "--mount", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    place, _, obstacle = done.stdout.strip().partition(": ")
    assert obstacle == f"sudo cannot give privilege here, since {place} is mounted nosuid"


def test_a_user_without_a_number_is_nobody_to_become(network: Network, machine: PrivateMachine, alice: User) -> None:
    done = machine.run(network["node0"], ["unshare", "-Ur", *ALONE, "--run-as", "alice", "--", "true"], user=alice)
    assert done.returncode == 77
    assert "--run-as alice: that user has no number in this user namespace" in done.stderr


def test_slurms_commands_of_the_hosts_root_are_asked_by_a_mapped_root_too(
    network: Network, machine: PrivateMachine, alice: User
) -> None:
    """Or Slurm's nodes would have no address there."""
    script = "import pathlib\nfrom securerun.linux import slurm\nprint(slurm._may_run(pathlib.Path('/usr/bin/env')))"
    done = machine.run(network["node0"], ["unshare", "-Ur", sys.executable, "-c", script], user=alice)
    assert done.stdout == "True\n", done


@pytest.mark.parametrize("namespace", NAMESPACES[:2], ids=" ".join)
def test_hosts_files_are_roots_there_too(
    network: Network, machine: PrivateMachine, alice: User, namespace: tuple[str, ...]
) -> None:
    """Root's files have the number of nobody there: what the site says of kinds counts, and no finding names them."""
    node = network["node0"]
    machine.write("/etc/securerun/kinds", "*.weights data\n")
    machine.run(node, ["sh", "-c", "umask 0077; mkdir -p d; echo 'print(1)' > d/t.py; chmod 500 d/t.py"], user=alice)
    for path, status in (("d", 0), ("/etc/hostname", 1)):
        done = machine.run(node, [*namespace, EXEC[0], "audit", path], user=alice)
        assert done.returncode == status, done
        assert "belongs to" not in done.stdout + done.stderr and "65534" not in done.stdout + done.stderr, done
    with socket_unit(machine, node):
        job = [EXEC[0], "exec", "--report", "run.json", "--peers", "localhost", "--", "python", "d/t.py"]
        done = machine.run(node, [*namespace, *job], user=alice)
    assert (done.returncode, done.stdout) == (0, "1\n"), done
    assert "65534" not in done.stderr and "belongs to" not in done.stderr


# What works


def test_job_in_a_user_namespace_is_guarded_from_outside(
    network: Network, machine: PrivateMachine, alice: User
) -> None:
    inside = ["unshare", "-Ur", sys.executable, "-c", LISTENER]
    require_closed_to_strangers_alone(network, machine, alice, [*EXEC, "--peers", network["node1"].ipv4, "--", *inside])


def test_launcher_in_a_user_namespace_relies_on_the_run_around_it(
    network: Network, machine: PrivateMachine, alice: User
) -> None:
    done = machine.run(network["node0"], [*ALONE, "--", "unshare", "-Ur", *ALONE, "--", "echo", "ran"], user=alice)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert "no second lease is taken\n" in done.stderr


@pytest.mark.parametrize("before", [*NAMESPACES, NO_NEW_PRIVILEGES], ids=" ".join)
def test_hosts_socket_gives_a_guard_in_a_user_namespace(
    network: Network, machine: PrivateMachine, alice: User, before: tuple[str, ...]
) -> None:
    with socket_unit(machine, network["node0"]):
        listener = [sys.executable, "-c", LISTENER]
        said = require_closed_to_strangers_alone(
            network, machine, alice, [*before, *EXEC, "--peers", network["node1"].ipv4, "--", *listener]
        )
    assert "guard started by the socket /run/securerun.sock" in said


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("mode", "owner", "in_namespace", "believed"),
    [
        (0o755, 0, True, True),
        (0o775, 0, True, False),
        (0o1777, 0, True, False),
        (0o755, 0, False, False),
    ],
)
def test_socket_of_somebody_without_a_number_is_believed_only_where_nobody_else_could_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, in_namespace: bool, believed: bool
) -> None:
    place = tmp_path / "run"
    place.mkdir()
    monkeypatch.setattr(ways, "SOCKET", place / "securerun.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(ways.SOCKET))
    os.chown(place, owner, owner)
    place.chmod(mode)

    def work() -> bool:
        if in_namespace:
            libc.check(libc.library.unshare(_CLONE_NEWUSER))
            assert not proc.is_in_first_user_namespace() and not proc.governs_network()
        return ways._only_root_put_it_there()

    assert in_child(work) is believed


def test_who_made_a_network_governs_it() -> None:
    assert proc.is_in_first_user_namespace() == (proc.outer_user(2**32 - 2) == 2**32 - 2)
    script = (
        "from securerun.linux import proc; print(proc.governs_network(), proc.outer_user(0) == {}, proc.outer_user(7))"
    )
    for option, governs in (("-Urn", True), ("-Ur", False)):
        argv = ["unshare", option, sys.executable, "-c", script.format(os.getuid())]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert done.stdout == f"{governs} True None\n"
