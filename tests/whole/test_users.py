"""The ground of the guard's tests: users and system directories that are real inside and not there outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import CHECKOUT, COMMANDS, GROUND
from hosts import Host, Network, eventually, is_alive
from torchless import needs_torch
from users import GUARD, PrivateMachine, User, delegated_cgroup

_SYSTEM = ("/dev", "/etc", "/etc/sudoers.d", "/run", "/root", "/var/log")


@pytest.fixture
def machine(network: Network) -> Iterator[PrivateMachine]:
    with PrivateMachine() as private:
        yield private


@pytest.fixture
def node(network: Network) -> Host:
    return next(iter(network))


@pytest.fixture
def alice(machine: PrivateMachine) -> User:
    return machine.add_user("alice", groups=("training",))


@needs_torch
def test_users_are_real_and_have_python_torch_and_the_hosts_network(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    look = "import os, importlib.util as i; print(os.getresuid(), os.getcwd(), bool(i.find_spec('torch')))"
    done = machine.run(node, ["python", "-c", look], user=alice)
    assert done.stdout == f"{(alice.uid,) * 3} {alice.home} True\n", done
    assert set(machine.run(node, ["id", "-Gn"], user=alice).stdout.split()) == {"alice", "training"}
    capabilities = machine.run(node, ["grep", "-E", "^Cap(Inh|Prm|Eff|Amb)", "/proc/self/status"], user=alice).stdout
    assert {line.split()[1] for line in capabilities.splitlines()} == {"0" * 16}
    assert f"{node.ipv4}/24" in machine.run(node, ["ip", "-brief", "address"], user=alice).stdout
    assert machine.run(node, ["sh", "-c", "echo $0 $IFS $KEPT"], user=alice, env={"KEPT": "kept"}).stdout == "sh kept\n"


def test_users_can_change_nothing_that_a_guard_is_started_from(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    find = ["find", str(CHECKOUT / "securerun"), str(COMMANDS), "(", "-not", "-user", "0", "-o", "-writable", ")"]
    done = machine.run(node, [*find, "-not", "-type", "l"], user=alice)
    assert (done.returncode, done.stdout) == (0, ""), done
    assert Path(GUARD).is_file()


def test_sudo_lets_users_do_what_the_rule_says_and_nothing_else(
    machine: PrivateMachine, node: Host, alice: User
) -> None:
    assert machine.run(node, ["sudo", "-n", "/usr/bin/id", "-u"], user=alice).returncode == 1
    machine.allow_sudo(f"{alice.name} ALL=(root) NOPASSWD: /usr/bin/id")
    assert machine.run(node, ["sudo", "-n", "/usr/bin/id", "-u"], user=alice).stdout == "0\n"
    assert machine.run(node, ["sudo", "-n", "/usr/bin/whoami"], user=alice).returncode == 1
    with pytest.raises(RuntimeError, match="syntax error"):
        machine.allow_sudo("alice may do as she likes")


def test_users_own_the_cgroups_that_are_delegated_to_them(machine: PrivateMachine, node: Host, alice: User) -> None:
    with delegated_cgroup(alice) as cgroup:
        move = 'mkdir "$0/inner" && echo $$ > "$0/inner/cgroup.procs" && grep ^0:: /proc/self/cgroup'
        done = machine.run(node, ["sh", "-c", move, str(cgroup.path)], user=alice, cgroup=cgroup)
        assert done.stdout.endswith(f"/{cgroup.path.name}/inner\n"), done
    assert not cgroup.path.exists()


def test_private_machine_does_not_show_outside_and_all_of_it_ends_with_its_block(network: Network) -> None:
    node, before = next(iter(network)), _machine()
    with PrivateMachine() as machine:
        alice = machine.add_user("alice")
        machine.allow_sudo("alice ALL=(root) NOPASSWD: /usr/bin/id")
        machine.configure("users = []\n")
        machine.write("/run/securerun/planted", "")
        machine.write("/var/log/securerun.log", "")
        os.mknod(machine.place("/dev/log"))
        assert machine.records() == frozenset({"planted"})
        daemon = ["sh", "-c", "setsid sleep 600 > /dev/null 2>&1 & echo $!"]
        sleeper = int(machine.run(node, daemon, user=alice).stdout)
        assert sleeper in machine.processes()
        assert _machine() == before
    assert not is_alive(sleeper)
    assert _machine() == before


def test_private_machine_goes_with_a_tester_who_is_killed(network: Network) -> None:
    make = "import users; m = users.PrivateMachine().__enter__(); print(m._holder.pid, flush=True); input()"
    tester = subprocess.Popen(
        [sys.executable, "-c", make],
        cwd=GROUND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tester.stdout is not None and tester.stdin is not None
    holder = int(tester.stdout.readline())
    assert is_alive(holder)
    tester.kill()
    tester.wait()
    tester.stdin.close()
    tester.stdout.close()
    assert eventually(lambda: not is_alive(holder))


def test_what_is_needed_behind_closed_directories_is_open_inside_alone(network: Network, tmp_path: Path) -> None:
    closed, needed = tmp_path / "home", tmp_path / "home/closed too/needed"
    (needed / "below").mkdir(parents=True)
    for name in ("secret", "closed too/secret", "closed too/needed/file", "closed too/needed/below/file"):
        (closed / name).write_text(name)
    for directory in (closed, closed / "closed too", needed):
        directory.chmod(0o700)
    with PrivateMachine(needed) as machine:
        alice = machine.add_user("alice")
        done = machine.run(next(iter(network)), ["find", str(closed), "-type", "f", "-readable"], user=alice)
        assert sorted(done.stdout.splitlines()) == [str(needed / "below/file"), str(needed / "file")], done
    assert (closed.stat().st_mode & 0o777, needed.stat().st_mode & 0o777) == (0o700, 0o700)
    assert (needed / "below/file").read_text() == "closed too/needed/below/file"


def _machine() -> tuple[object, ...]:
    """What the machine has where a private one has its own."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    names = {place: frozenset(os.listdir(place)) for place in _SYSTEM if Path(place).is_dir()}
    return (names, Path("/etc/passwd").read_text(), len([mount for mount in mounts if "netns" not in mount]))
