"""A job of one node in a network of its own: nothing to install, nobody with privilege to ask, nobody can connect."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from apart import CONTROL, EXEC, LISTENER, SECURERUN, Job, make_ordinary, name_of, ours, parent_of
from hosts import Host, Network, eventually, finish, is_alive, kill_group
from patience import patient
from probe import reach
from terminals import Seat
from users import GUARD, SUDOERS, PrivateMachine, User

_SAYS = "in a network of its own; out by pasta; nobody can connect, from another host or from this one"
_CONNECT = (
    "import socket, sys\n"
    "for host, port in zip(sys.argv[1::2], sys.argv[2::2]):\n"
    "    try:\n"
    "        with socket.create_connection((host, int(port)), timeout=5) as end:\n"
    "            print(end.recv(100).decode(), end='')\n"
    "    except OSError as error:\n"
    "        print(type(error).__name__)\n"
)
# Tells whoever connects where they come from.
_SERVER = (
    "import socket, sys, threading\n"
    "def serve(listener):\n"
    "    while True:\n"
    "        end, source = listener.accept()\n"
    "        end.sendall(f'{source[0]}\\n'.encode())\n"
    "        end.close()\n"
    "for host in sys.argv[2:]:\n"
    "    family = socket.AF_INET6 if ':' in host else socket.AF_INET\n"
    "    listener = socket.create_server((host, int(sys.argv[1])), family=family)\n"
    "    threading.Thread(target=serve, args=(listener,)).start()\n"
    "print('ready', flush=True)\n"
)
# Answers every question with 192.0.2.7.
_NAME_SERVER = (
    "import socket, sys\n"
    "end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "end.bind((sys.argv[1], 53))\n"
    "print('ready', flush=True)\n"
    "while True:\n"
    "    asked, source = end.recvfrom(512)\n"
    "    question = asked[12:]\n"
    "    rest = question[question.index(0) + 5:]\n"
    "    question = question[:len(question) - len(rest)]\n"
    "    answer = bytes.fromhex('c00c000100010000003c0004c0000207')\n"
    "    head = asked[:2] + bytes.fromhex('8180') + bytes.fromhex('0001000100000000')\n"
    "    end.sendto(head + question + answer, source)\n"
)
# Has unshare(2) refused with EPERM from here on, by a filter of classic BPF, and becomes what its arguments say.
_FILTER = (
    "import ctypes, os, platform, struct, sys\n"
    "number = {'x86_64': 272, 'aarch64': 97}[platform.machine()]\n"
    "rules = (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)\n"
    "code = b''.join(struct.pack('=HBBI', *rule) for rule in rules)\n"
    "text = ctypes.create_string_buffer(code)\n"
    "program = struct.pack('HxxxxxxP', 4, ctypes.addressof(text))\n"
    "libc = ctypes.CDLL(None)\n"
    "assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0) == 0\n"
    "os.execvp(sys.argv[1], sys.argv[1:])\n"
)


class Ground(NamedTuple):
    machine: PrivateMachine
    node: Host
    other: Host
    alice: User
    bob: User


@pytest.fixture(scope="module")
def ground(root_and_tools: None) -> Iterator[Ground]:
    with Network("node0", "node1") as network, PrivateMachine() as machine:
        make_ordinary(machine)
        node, other = network
        alice, bob = machine.add_user("alice", groups=("devices",)), machine.add_user("bob")
        yield Ground(machine, node, other, alice, bob)


@pytest.fixture(autouse=True)
def _nobody_is_left(ground: Ground) -> Iterator[None]:
    yield
    assert eventually(lambda: not ours(ground.machine), seconds=5), ground.machine.processes()


def serve(host: Host, port: int, *addresses: str) -> None:
    process = host.popen([sys.executable, "-c", _SERVER, str(port), *addresses])
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


# Who can connect


def test_nobody_connects_to_a_job_but_who_enters_its_network(ground: Ground) -> None:
    machine, node, other, alice, bob = ground
    with Job(machine, node, alice) as job:
        outside = [(address, job.port) for address in node.addresses]
        assert reach(other, outside) == dict.fromkeys(outside, False)
        here = [str(word) for address in ("127.0.0.1", "::1", *node.addresses) for word in (address, job.port)]
        for user in (bob, alice, None):
            assert (
                machine.run(node, [sys.executable, "-c", _CONNECT, *here], user=user).stdout.split()
                == ["ConnectionRefusedError"] * 4
            )
        entered = machine.run(
            node,
            job.entered(sys.executable, "-c", _CONNECT.replace(".recv(100)", ".send(b'') or b'in\\n'"), *here),
            user=alice,
        )
        assert entered.stdout == "in\n" * 4, entered
        done = job.end()
    assert done.returncode == 0, done
    assert _SAYS in done.stderr


def test_job_has_its_users_number_and_no_capability(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    look = "id -u; id -g; grep -h ^Cap /proc/self/status | cut -f2 | sort -u; unshare -Urn id -u; touch made"
    done = machine.run(node, [*EXEC, "--", "sh", "-c", look], user=alice)
    assert (done.returncode, done.stdout.split()) == (0, [str(alice.uid), str(alice.gid), "0" * 16, "0"]), done
    assert machine.place(f"{alice.home}/made").stat().st_uid == alice.uid


def test_group_opens_what_it_opens_outside(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    device = machine.place("/dev/npu0")
    os.mknod(device, 0o020660, os.makedev(1, 3))
    device.chmod(0o660)
    os.chown(device, 0, _group(machine, "devices"))
    done = machine.run(node, [*EXEC, "--", "sh", "-c", ": > /dev/npu0 && id -G"], user=alice)
    device.unlink()
    assert (done.returncode, set(done.stdout.split())) == (0, {str(alice.gid), "65534"}), done


def _group(machine: PrivateMachine, name: str) -> int:
    lines = machine.place("/etc/group").read_text().splitlines()
    return next(int(line.split(":")[2]) for line in lines if line.startswith(f"{name}:"))


# The way out


def test_job_connects_to_other_hosts_as_this_one_does_and_not_to_the_hosts_loopback(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7001, *other.addresses)
    serve(node, 7002, "127.0.0.1", "::1", *node.addresses)
    targets = [str(word) for host in other.addresses for word in (host, 7001)]
    targets += [str(word) for host in ("127.0.0.1", "::1", *node.addresses) for word in (host, 7002)]
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", _CONNECT, *targets], user=alice)
    assert done.stdout.split() == [*node.addresses, *["ConnectionRefusedError"] * 4], done


@pytest.mark.parametrize("server", ["127.0.0.53", "10.77.0.1"])
def test_names_are_asked_of_a_server_on_this_host(ground: Ground, server: str) -> None:
    """As systemd-resolved is, or one that this host has for its containers: in there both addresses are the job's."""
    machine, node, _, alice, _ = ground
    text = f"nameserver {server}\noptions timeout:2\n"
    before = machine.place("/etc/resolv.conf").read_text()
    machine.write("/run/systemd/resolve/stub-resolv.conf", text)
    machine.run(node, ["ln", "-sf", "../run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf"])
    machine.write("/etc/nsswitch.conf", "hosts: dns\n")
    serving = node.popen([sys.executable, "-c", _NAME_SERVER, server])
    assert serving.stdout is not None and serving.stdout.readline() == "ready\n"
    look = "import socket; print(socket.gethostbyname('data.example'), open('/etc/resolv.conf').read())"
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", look], user=alice)
    assert machine.run(node, ["cat", "/etc/resolv.conf"]).stdout == text
    machine.run(node, ["rm", "/etc/resolv.conf"])
    machine.write("/etc/resolv.conf", before)
    make_ordinary(machine)
    assert done.stdout.split() == ["192.0.2.7", "nameserver", "169.254.1.1", "options", "timeout:2"], done


def test_proxy_on_the_hosts_loopback_is_reached_and_nothing_else_there(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    serve(node, 7010, "127.0.0.1")
    serve(node, 7011, "127.0.0.1")
    proxies = {"http_proxy": "http://localhost:7010", "HTTPS_PROXY": f"http://{node.ipv4}:7011"}
    proxies["https_proxy"] = "http://127.0.0.1:7010"
    # By a name that only this host knows, which is at the same place.
    serve(node, 7014, "127.0.0.1")
    machine.write("/etc/hosts", f"{machine.place('/etc/hosts').read_text()}\n127.0.0.1 proxy.local\n")
    proxies["all_proxy"] = "socks5://proxy.local:7014"
    command = [*EXEC, "--", sys.executable, "-c", _CONNECT, "127.0.0.1", "7010", "127.0.0.1", "7011"]
    done = machine.run(node, [*command, "proxy.local", "7014"], user=alice, env=proxies)
    assert done.stdout.split() == ["127.0.0.1", "ConnectionRefusedError", "127.0.0.1"], done
    assert "localhost:7010, which http_proxy names, leads to that port of this host's loopback" in done.stderr
    assert f"HTTPS_PROXY: {node.ipv4}:7011 is on this host, which cannot be reached from in there" in done.stderr


def test_slirp4netns_takes_its_place_where_there_is_no_pasta(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7012, other.ipv4)
    machine.run(node, ["sh", "-c", "mount --bind /dev/null /usr/bin/pasta"])
    # As OpenVPN has one; slirp4netns' own has that name where nobody says otherwise.
    node.run(["sh", "-ec", "ip link add tap0 type bridge; ip addr add 10.66.0.1/24 dev tap0"], check=True)
    try:
        command = [*EXEC, "--", sys.executable, "-c", _CONNECT, other.ipv4, "7012"]
        done = machine.run(node, command, user=alice)
    finally:
        node.run(["ip", "link", "del", "tap0"])
        machine.run(node, ["umount", "/usr/bin/pasta"])
    assert done.stdout == f"{node.ipv4}\n", done
    assert "in a network of its own; out by slirp4netns" in done.stderr


def test_without_a_way_out_who_asks_for_it_by_name_is_told_and_nobody_else_gets_it(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7013, other.ipv4)
    make_ordinary(machine, mode=0o600)
    command = [sys.executable, "-c", _CONNECT, other.ipv4, "7013"]
    done = machine.run(node, [*EXEC, "--scope", "namespace", "--", *command], user=alice)
    refused = machine.run(node, [*EXEC, "--", *command], user=alice)
    make_ordinary(machine)
    assert (done.returncode, done.stdout) == (0, "OSError\n"), done
    assert "this job has no way out of its network: /dev/net/tun may not be opened by this user" in done.stderr
    assert refused.returncode == 77
    assert "in a network of its own: /dev/net/tun may not be opened by this user" in refused.stderr
    assert "for a job of one node it takes no guard: chmod 666 /dev/net/tun" in refused.stderr


# Lifetime


def test_job_that_is_killed_leaves_nothing(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    leave = (
        "import subprocess\n"
        "subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "subprocess.Popen(['unshare', '-Urn', 'sleep', '601'], start_new_session=True)\n" + LISTENER
    )
    with Job(machine, node, alice, "--grace", "0.5", script=leave) as job:
        os.kill(job.pid, signal.SIGKILL)
        assert eventually(lambda: not is_alive(job.worker), seconds=5)
        assert eventually(lambda: not [one for one in machine.processes().values() if "sleep 60" in one], seconds=5)


def test_what_a_job_that_ended_well_leaves_goes_on_behind_the_same_wall(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7003, other.ipv4)
    left = f'sleep 1; {sys.executable} -c "$0" {other.ipv4} 7003 > heard'
    script = f"import subprocess; subprocess.Popen(['sh', '-c', {left!r}, {_CONNECT!r}], start_new_session=True)"
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", script], user=alice)
    assert done.returncode == 0, done
    heard = machine.place(f"{alice.home}/heard")
    assert eventually(lambda: heard.exists() and heard.read_text() == f"{node.ipv4}\n", seconds=10)


def test_way_out_that_is_killed_is_replaced(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7004, other.ipv4)
    with Job(machine, node, alice) as job:
        os.kill(job.way_out(), signal.SIGKILL)
        look = job.entered(sys.executable, "-c", _CONNECT, other.ipv4, "7004")
        assert eventually(lambda: machine.run(node, look, user=alice).stdout == f"{node.ipv4}\n", seconds=10)
        assert "pasta has ended" in job.end().stderr


def test_keeper_that_is_killed_is_replaced_and_opens_nothing(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7005, other.ipv4)
    with Job(machine, node, alice) as job:
        os.kill(job.keeper(), signal.SIGKILL)
        outside = [(address, job.port) for address in node.addresses]
        assert reach(other, outside) == dict.fromkeys(outside, False)
        look = job.entered(sys.executable, "-c", _CONNECT, other.ipv4, "7005")
        assert eventually(lambda: machine.run(node, look, user=alice).stdout == f"{node.ipv4}\n", seconds=10)
        (run,) = json.loads(machine.run(node, [CONTROL, "status", "--json"], user=alice).stdout)["runs"]
        assert (run["state"], run["guard_pid"]) == ("guarding", job.keeper())
        done = job.end()
    assert done.returncode == 0
    assert "pasta has ended (its keeper was killed); another was started" in done.stderr


def test_all_keepers_that_are_killed_open_nothing_and_are_told_of(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    with Job(machine, node, alice) as job:
        # The one that stands by goes first, or it would start another.
        for keeper in (parent_of(job.keeper()), job.keeper()):
            os.kill(keeper, signal.SIGKILL)
        assert eventually(lambda: not job.keepers())
        outside = [(address, job.port) for address in node.addresses]
        assert reach(other, outside) == dict.fromkeys(outside, False)
        done = job.end()
    assert done.returncode == 0
    assert "the keeper of this job's network was killed" in done.stderr


def test_launcher_and_keeper_that_are_killed_at_once_leave_nothing(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    with Job(machine, node, alice, "--grace", "0.5") as job:
        keeper = job.keeper()
        for pid in (job.pid, keeper):
            os.kill(pid, signal.SIGSTOP)
        for pid in (job.pid, keeper):
            os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not is_alive(job.worker) and not job.keepers(), seconds=8), machine.processes()


def test_way_out_that_dies_again_and_again_is_given_up_and_told_of(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    with Job(machine, node, alice) as job:
        killed: set[int] = set()
        while len(killed) < 6:
            way_out = job.way_out(but=killed)
            killed.add(way_out)
            os.kill(way_out, signal.SIGKILL)
        assert eventually(lambda: {name_of(pid) for pid in job.keepers()} == {"securerun-keep"}, seconds=5)
        outside = [(address, job.port) for address in node.addresses]
        assert reach(other, outside) == dict.fromkeys(outside, False)
        done = job.end()
    assert done.returncode == 0 and "the job has no way out; nobody can connect" in done.stderr, done


def test_way_out_of_what_a_job_left_is_replaced_too(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7006, other.ipv4)
    script = (
        "import subprocess as s\n"
        "print(s.Popen(['sleep', '600'], stdout=s.DEVNULL, stderr=s.DEVNULL, start_new_session=True).pid)"
    )
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", script], user=alice)
    left = int(done.stdout)
    try:
        (before,) = (pid for pid in ours(machine) if name_of(pid) != "securerun-keep")
        os.kill(before, signal.SIGKILL)
        look = [f"--target={left}", "--user", "--net", "--preserve-credentials", "--", sys.executable, "-c", _CONNECT]
        enter = ["nsenter", *look, other.ipv4, "7006"]
        assert eventually(lambda: machine.run(node, enter, user=alice).stdout == f"{node.ipv4}\n", seconds=10)
    finally:
        os.kill(left, signal.SIGKILL)


# The launcher


def test_new_user_trains_with_nothing_set_up(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    from jobs import TRAIN

    done = machine.run(
        node, [SECURERUN, "--preflight", "off", "--nproc-per-node", "2", str(TRAIN), "--epochs", "2"], user=alice
    )
    assert done.returncode == 0, done
    assert _SAYS in done.stderr and "2 workers, all-reduce right" in done.stdout


# What is told of it


def test_status_and_matrix_show_a_users_own_runs(ground: Ground) -> None:
    machine, node, _, alice, bob = ground
    with Job(machine, node, alice) as job:
        shown = machine.run(node, [CONTROL, "status", "--json"], user=alice)
        (run,) = json.loads(shown.stdout)["runs"]
        assert (run["pid"], run["user"], run["state"], run["peers"]) == (job.pid, "alice", "guarding", []), run
        assert run["layers"] == [{"backend": "namespace", "name": "out by pasta"}]
        assert json.loads(machine.run(node, [CONTROL, "status", "--json"], user=bob).stdout)["runs"] == []
        (seen,) = json.loads(machine.run(node, [CONTROL, "status", "--json"]).stdout)["runs"]
        assert seen["run_id"] == run["run_id"]
        matrix = machine.run(node, [CONTROL, "matrix", "--format", "json"], user=alice)
        assert f"*:{job.port}" in matrix.stdout, matrix


def test_report_says_that_it_was_protected_and_by_what(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    done = machine.run(node, [*EXEC, "--report", "run.json", "--", "true"], user=alice)
    assert done.returncode == 0, done
    report = json.loads(machine.place(f"{alice.home}/run.json").read_text())
    assert (report["protected"], report["guard"], report["outcome"]) == (True, None, "ended well")
    assert report["layers"] == [{"backend": "namespace", "name": "out by pasta"}]
    assert any(event["text"] == "in a network of its own; out by pasta" for event in report["timeline"])


def test_doctor_and_the_plan_say_whether_it_can_be_had(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    host = json.loads(machine.run(node, [CONTROL, "doctor", "--json"], user=alice).stdout)["host"]
    (ability,) = (one for one in host if one["name"] == "own-network")
    assert ability["works"] is True and "out by pasta" in ability["what"]
    plan = machine.run(node, [*EXEC, "--dry-run", "--", "true"], user=alice).stdout
    assert "without one, this job goes into a network of its own, out by pasta" in plan


def test_launcher_inside_relies_on_the_run_around_it(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    done = machine.run(node, [*EXEC, "--", *EXEC, "--", "echo", "ran"], user=alice)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert "guards this process already, so no second lease is taken" in done.stderr
    assert done.stderr.count("in a network of its own") == 1


# Why it may not be had


def refused(ground: Ground, *before: str) -> str:
    """Start a job that is to have a network of its own and cannot; return what is said."""
    machine, node, _, alice, _ = ground
    done = machine.run(node, [*before, *EXEC, "--", "touch", "started"], user=alice)
    assert (done.returncode, machine.place(f"{alice.home}/started").exists()) == (77, False), done
    assert "no guard is available" in done.stderr
    return next(line for line in done.stderr.splitlines() if "Tried:" in line)


def test_kernel_that_permits_no_user_namespace_is_named(ground: Ground) -> None:
    """In a user namespace of its own the limit is that of whoever is in it (namespaces(7))."""
    limit = ("unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh")
    assert "in a network of its own: user.max_user_namespaces is 0" in refused(ground, *limit)


def test_seccomp_filter_of_a_container_is_named(ground: Ground) -> None:
    filtered = (sys.executable, "-c", _FILTER)
    assert "in a network of its own: a seccomp filter, as containers have one, forbids" in refused(ground, *filtered)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone is 0"),
        ("apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns is 1"),
    ],
)
def test_distributions_own_switches_are_named(ground: Ground, setting: str, value: str, says: str) -> None:
    """This kernel has neither: they are put in its place, and a filter refuses as they do."""
    machine = ground.machine
    machine.write(f"/run/kernel/{setting}", f"{value}\n")
    machine._mount("--bind", "/run/kernel", "/proc/sys/kernel")  # hides what else is there
    try:
        assert f"in a network of its own: {says}" in refused(ground, sys.executable, "-c", _FILTER)
    finally:
        machine._system("umount", "/proc/sys/kernel")
        machine.place(f"/run/kernel/{setting}").unlink()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--public", "8080"), "in a network of its own: --public is for those who connect"),
        (("--firewall", "iptables"), "in a network of its own: --firewall is for those who connect"),
    ],
)
def test_options_for_those_who_connect_keep_a_job_out_of_it(
    ground: Ground, arguments: tuple[str, ...], says: str
) -> None:
    machine, node, _, alice, _ = ground
    done = machine.run(node, [*EXEC, *arguments, "--", "true"], user=alice)
    assert (done.returncode, says in done.stderr) == (77, True), done
    done = machine.run(node, [*EXEC, "--scope", "namespace", *arguments, "--", "true"], user=alice)
    assert done.returncode == 78 and "nobody can connect to a job in a network of its own" in done.stderr, done


def test_jobs_of_several_nodes_are_never_put_into_it(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    several = ["--nnodes", "2", "--master-addr", node.ipv4, "--peers", "localhost", "no.py"]
    done = machine.run(node, [SECURERUN, *several], user=alice)
    assert done.returncode == 77 and "in a network of its own" not in done.stderr, done
    done = machine.run(node, [SECURERUN, "--scope", "namespace", *several], user=alice)
    assert done.returncode == 78, done
    assert "--scope namespace: --nnodes 2, and nobody can connect to a job in a network of its own" in done.stderr
    done = machine.run(node, [CONTROL, "exec", "--scope", "namespace", "--", "true"], user=alice, env={"NNODES": "2"})
    assert done.returncode == 78 and "it is of 2 nodes" in done.stderr, done


def test_python_program_that_runs_is_told_what_to_do(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    script = "import securerun\nwith securerun.guarded(securerun.policy(peers='localhost')): print('started')"
    done = machine.run(node, [sys.executable, "-c", script], user=alice)
    assert done.stdout == "" and "securerunctl exec --scope namespace -- python" in done.stderr, done


def test_many_launchers_inside_find_the_run_around_them(ground: Ground) -> None:
    """More than may wait at its place, also where the launcher gets no processor for a moment."""
    machine, node, _, alice, _ = ground
    look = (
        "import os, signal, subprocess\nfrom securerun.protection import enclosing\n"
        "launcher = os.getppid()\n"
        "os.kill(launcher, signal.SIGSTOP)\n"
        "subprocess.Popen(['sh', '-c', f'sleep 0.4; kill -CONT {launcher}'])\n"
        "print(sum(enclosing.find(os.environ) is not None for _ in range(300)))"
    )
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", look], user=alice)
    assert done.stdout == "300\n", done


def test_launcher_without_descriptors_for_a_moment_is_found_by_those_inside_then(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    look = (
        "import os, resource, time\nfrom securerun.protection import enclosing\n"
        "limits = resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)\n"
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, limits[1]))\n"
        "enclosing.find(os.environ)\n"
        "time.sleep(0.4)\n"
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, limits)\n"
        "print(sum(enclosing.find(os.environ) is not None for _ in range(300)))"
    )
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", look], user=alice)
    assert (done.stdout, "Traceback" in done.stderr) == ("300\n", False), done


def test_run_is_not_believed_outside_of_its_network(ground: Ground) -> None:
    """sbatch, ssh and docker copy the variables; the network they do not."""
    machine, node, _, alice, _ = ground
    look = "import os; from securerun.protection import enclosing; print(enclosing.find(os.environ))"
    with Job(machine, node, alice) as job:
        lines = machine.place("/proc") / str(job.worker) / "environ"
        env = dict(one.split("=", 1) for one in lines.read_text().split("\0") if one.startswith("SECURERUN_"))
        assert "SECURERUN_RUN_ID" in env
        for before in ((), ("unshare", "-Urn")):
            done = machine.run(node, [*before, sys.executable, "-c", look], user=alice, env=env)
            assert done.stdout == "None\n", done


def test_guard_that_is_there_is_taken_and_a_network_of_ones_own_only_by_name(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    machine.allow_sudo(f"alice ALL=(root) NOPASSWD:NOSETENV: {GUARD}")
    try:
        guarded = machine.run(node, [*EXEC, "--", "true"], user=alice)
        apart = machine.run(node, [*EXEC, "--scope", "namespace", "--", "true"], user=alice)
    finally:
        machine.place(SUDOERS).unlink()
    assert guarded.returncode == 0 and "guard started by sudo" in guarded.stderr, guarded
    assert apart.returncode == 0 and _SAYS in apart.stderr, apart
    assert "guard started" not in apart.stderr


def test_root_may_ask_for_it_by_name(ground: Ground) -> None:
    look = "id -u; grep -h ^Cap /proc/self/status | cut -f2 | sort -u"
    done = ground.machine.run(ground.node, [*EXEC, "--scope", "namespace", "--", "sh", "-c", look])
    assert (done.returncode, done.stdout.split()) == (0, ["0", "0" * 16]), done
    assert _SAYS in done.stderr


def test_workers_may_trace_their_own_and_share_memory(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    script = (
        "import multiprocessing as m, os\n"
        "def work(queue, memory): queue.put((os.getppid(), bytes(memory.buf[:2])))\n"
        "if __name__ == '__main__':\n"
        "    from multiprocessing.shared_memory import SharedMemory\n"
        "    memory, queue = SharedMemory(create=True, size=10), m.get_context('spawn').Queue()\n"
        "    memory.buf[:2] = b'hi'\n"
        "    child = m.get_context('spawn').Process(target=work, args=(queue, memory)); child.start()\n"
        "    print(queue.get() == (os.getpid(), b'hi'), len(os.listdir(f'/proc/{child.pid}/fd')) > 0)\n"
        "    child.join(); memory.unlink()\n"
    )
    machine.write("share.py", script, owner=alice)
    done = machine.run(node, [*EXEC, "--", sys.executable, "share.py"], user=alice)
    assert done.stdout == "True True\n", done


def test_program_that_goes_on_after_its_job_stays_in_its_network(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    script = "from securerun.run import main; main(['--scope', 'namespace', 'no.py'])"
    done = machine.run(node, [sys.executable, "-c", script], user=alice)
    assert done.returncode == 2 and "a program that goes on after the job would stay" in done.stderr, done


def test_python_program_that_asks_for_a_lease_inside_relies_on_the_run_around_it(ground: Ground) -> None:
    """As who was told to start such a program by `securerunctl exec` has it."""
    machine, node, _, alice, _ = ground
    script = (
        "import securerun\n"
        "for peers in ('localhost', '10.77.0.2'):\n"
        "    with securerun.guarded(securerun.policy(peers=peers)) as guarding: print(*guarding.layers)\n"
    )
    done = machine.run(node, [*EXEC, "--scope", "namespace", "--", sys.executable, "-c", script], user=alice)
    assert done.returncode == 1 and done.stdout.startswith("namespace (of run"), done
    assert len(done.stdout.splitlines()) == 1 and "to which nobody can connect: neither can peers" in done.stderr


def test_who_asks_for_it_by_name_says_that_the_command_is_of_one_node(ground: Ground) -> None:
    """Nothing has to name peers, and those that a shell names for all of its jobs are none."""
    machine, node, _, alice, _ = ground
    by_name = [CONTROL, "exec", "--scope", "namespace"]
    command = ["--report", "named.json", "--", "true"]
    done = machine.run(node, [*by_name, *command], user=alice, env={"SECURERUN_PEERS": "10.77.0.2"})
    assert (done.returncode, _SAYS in done.stderr) == (0, True), done
    assert json.loads(machine.place(f"{alice.home}/named.json").read_text())["launch"]["policy"]["peers"] == []
    planned = machine.run(node, [*by_name, "--dry-run", "--", "true"], user=alice)
    assert planned.returncode == 0 and "namespace: a network of its own" in planned.stdout, planned


# Hosts of other kinds


def test_job_finds_another_interface_of_its_host_by_name(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    commands = ("ip link add ib0 type veth peer name ib1", "ip addr add 10.88.0.1/24 dev ib0", "ip link set ib0 up")
    node.run(["sh", "-ec", "; ".join(commands)], check=True)
    look = (
        "import socket\n"
        "listener = socket.create_server(('10.88.0.1', 0))\n"
        "listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'')\n"
        "end = socket.create_connection(listener.getsockname(), timeout=5)\n"
        "print(sorted(name for _, name in socket.if_nameindex()), end.getpeername()[0])\n"
    )
    named = ["--interface", "ib0", "--", sys.executable, "-c", look]
    try:
        done = machine.run(node, [*EXEC, *named], user=alice, env={"GLOO_SOCKET_IFNAME": "ib0"})
    finally:
        node.run(["ip", "link", "del", "ib0"], check=True)
    assert done.stdout == "['eth0', 'ib0', 'lo'] 10.88.0.1\n", done
    assert "Traceback" not in done.stderr and _SAYS in done.stderr


@pytest.fixture(scope="module")
def others(ground: Ground) -> Iterator[tuple[Host, Host, Host]]:
    """Hosts with a default route, without IPv6, and without any address."""
    with Network("routed", "four", "alone") as network:
        routed, four, alone = network
        routed.run(["ip", "route", "add", "default", "via", four.ipv4], check=True)
        without = "ip addr add 192.0.2.9/32 dev lo; sysctl -qw net.ipv6.conf.all.disable_ipv6=1"
        four.run(["sh", "-ec", without], check=True)
        alone.run(["ip", "link", "del", "eth0"], check=True)
        yield routed, four, alone


def test_hosts_default_route_is_the_jobs_and_one_that_it_has_not_is_none(
    ground: Ground, others: tuple[Host, Host, Host]
) -> None:
    machine, node, _, alice, _ = ground
    routed, four, _ = others
    serve(four, 7020, "192.0.2.9")
    command = [*EXEC, "--", sys.executable, "-c", _CONNECT, "192.0.2.9", "7020"]
    done = machine.run(routed, command, user=alice)
    assert done.stdout == f"{routed.ipv4}\n", done
    # At once, as outside: nobody waits for a time-out.
    assert machine.run(node, command, user=alice).stdout == "OSError\n"


@pytest.mark.parametrize(
    "more",
    [
        pytest.param("ip route add 192.0.2.8/29 via {far}", id="a route"),
        pytest.param("ip addr add 192.0.2.10/29 dev eth0", id="a second address"),
        pytest.param("{first}; ip route add 192.0.2.8/29 via {far}", id="a first address of another network"),
        pytest.param("{first}; ip route add default via {far}", id="a default route that is not of the first address"),
        pytest.param("{link}; ip route add default via {far}", id="a first address that is for its link"),
    ],
)
def test_job_reaches_all_networks_that_its_host_reaches(ground: Ground, more: str) -> None:
    """Also where only a route leads there, or an interface has several addresses: pasta is told which."""
    machine, _, _, alice, _ = ground
    with Network("near", "far") as network:
        near, far = network
        first = f"ip addr flush dev eth0; ip addr add 172.20.0.1/24 dev eth0; ip addr add {near.ipv4}/24 dev eth0"
        link = first.replace("172.20.0.1/24", "169.254.7.7/16 scope link")
        near.run(["sh", "-ec", more.format(far=far.ipv4, first=first, link=link)], check=True)
        far.run(["ip", "addr", "add", "192.0.2.9/29", "dev", "eth0"], check=True)
        serve(far, 7022, "192.0.2.9", far.ipv4)
        targets = "192.0.2.9", "7022", far.ipv4, "7022"
        command = [sys.executable, "-c", _CONNECT, *targets]
        outside, inside = (machine.run(near, words, user=alice) for words in (command, [*EXEC, "--", *command]))
    assert "Error" not in outside.stdout
    assert inside.stdout == outside.stdout, inside


def test_address_of_the_hosts_that_is_only_for_its_link_leads_to_the_job_itself(ground: Ground) -> None:
    machine, _, _, alice, _ = ground
    with Network("linked") as network:
        (node,) = network
        more = "ip addr add 169.254.7.7/16 scope link dev eth0; ip addr add 169.254.8.8/16 scope link dev eth0"
        node.run(["sh", "-ec", more], check=True)
        serve(node, 7023, "169.254.7.7", "169.254.8.8")
        command = [sys.executable, "-c", _CONNECT, "169.254.7.7", "7023", "169.254.8.8", "7023"]
        done = machine.run(node, [*EXEC, "--", *command], user=alice)
    assert done.stdout.split() == ["ConnectionRefusedError"] * 2, done


def test_address_of_the_last_of_many_interfaces_leads_to_the_job_itself(ground: Ground) -> None:
    """As hosts of containers have them."""
    machine, _, _, alice, _ = ground
    with Network("crowded", "beyond") as network:
        node, other = network
        names = "for one in $(seq 70); do ip link add d$one type bridge; ip link set d$one up"
        more = f"{names}; ip addr add 172.21.0.$one/32 dev d$one; done"
        node.run(["sh", "-ec", more], check=True)
        serve(node, 7024, "172.21.0.70")
        serve(other, 7024, other.ipv4)
        command = [sys.executable, "-c", _CONNECT, "172.21.0.70", "7024", other.ipv4, "7024"]
        done = machine.run(node, [*EXEC, "--", *command], user=alice)
    assert done.stdout.split() == ["ConnectionRefusedError", node.ipv4], done


def test_host_without_ipv6_is_enough(ground: Ground, others: tuple[Host, Host, Host]) -> None:
    machine, _, _, alice, _ = ground
    routed, four, _ = others
    serve(routed, 7021, routed.ipv4)
    done = machine.run(four, [*EXEC, "--", sys.executable, "-c", _CONNECT, routed.ipv4, "7021"], user=alice)
    assert done.stdout == f"{four.ipv4}\n", done


def test_host_without_a_network_has_none_to_miss(ground: Ground, others: tuple[Host, Host, Host]) -> None:
    machine, _, _, alice, _ = ground
    done = machine.run(others[2], [*EXEC, "--", "echo", "ran"], user=alice)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert "in a network of its own; without a way out; nobody can connect" in done.stderr
    assert "this host has no address but its loopback's" in done.stderr


# What goes on working


def test_interrupt_ends_a_job_that_writes_to_tee_and_all_of_it_is_written(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    words = shlex.join([*EXEC, "--", "sh", "-c", "trap 'echo told; exit 3' INT; echo up; while :; do sleep 0.1; done"])
    pipeline = f"{words} 2>&1 | tee -i log; echo status ${{PIPESTATUS[0]}}"
    with Seat(node, machine.command(["bash", "-c", f"trap : INT; {pipeline}"], user=alice)) as terminal:
        terminal.show("up\r\n")
        terminal.type("\x03")
        terminal.show("status 3")
        assert terminal.end() == 0
    log = machine.place(f"{alice.home}/log").read_text()
    assert _SAYS in log and "up\ntold\n" in log, log


def test_launcher_that_was_given_a_thousand_open_files_starts_its_job(ground: Ground) -> None:
    """select(2) knows no descriptor beyond 1023."""
    machine, node, _, alice, _ = ground
    opened = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
        "for _ in range(1100):\n"
        "    os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", opened, *EXEC, "--", "echo", "ran"]
    done = machine.run(node, command, user=alice)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done
    assert _SAYS in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("-n 10", "for a job of one node it takes no guard: ulimit -n, and start it again with more"),
        ("-f 0", "/etc/resolv.conf of its own, since it names a server on this host, and cannot have it: File too"),
    ],
)
def test_limit_of_the_users_that_is_in_the_way_is_named(ground: Ground, limit: str, says: str) -> None:
    machine, node, _, alice, _ = ground
    before = machine.place("/etc/resolv.conf").read_text()
    machine.write("/etc/resolv.conf", "nameserver 127.0.0.53\n")
    done = machine.run(node, ["sh", "-c", f"ulimit {limit}; exec {shlex.join([*EXEC, '--', 'true'])}"], user=alice)
    machine.write("/etc/resolv.conf", before)
    assert done.returncode == 77, done
    assert says in done.stderr and "a chroot" not in done.stderr, done


def test_files_of_root_that_were_open_at_the_start_stay_open(ground: Ground) -> None:
    """As a batch system leaves them: the job may not open them, and writes to them."""
    machine, node, _, alice, _ = ground
    secret = machine.place(machine.write("/run/secret", "of root\n", mode=0o600))
    command = [*EXEC, "--", "sh", "-c", "read line; echo $line too"]
    with secret.open("a") as log, secret.open() as words:
        job = machine.popen(node, command, user=alice, stdin=words, stdout=log)
        assert finish(job, timeout=30).returncode == 0
    assert secret.read_text() == "of root\nof root too\n"


def test_page_of_a_report_says_by_what_it_was_protected(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    done = machine.run(node, [*EXEC, "--report", "run.html", "--", "true"], user=alice)
    assert done.returncode == 0, done
    page = machine.place(f"{alice.home}/run.html").read_text()
    assert "none needed: in a network of its own, out by pasta" in page


# Enemies


def test_program_of_somebody_elses_is_no_way_out(ground: Ground) -> None:
    machine, node, other, alice, bob = ground
    serve(other, 7030, other.ipv4)
    machine.run(node, ["sh", "-ec", "install -o $0 -D /usr/bin/passt $1/bin/pasta", str(bob.uid), bob.home])
    machine.run(node, ["sh", "-ec", "install -o $0 -D /usr/bin/passt $1/bin/pasta", str(alice.uid), alice.home])
    hidden = ("/usr/bin/pasta", "/usr/bin/slirp4netns")
    for program in hidden:
        machine.run(node, ["mount", "--bind", "/dev/null", program])
    command = [*EXEC, "--", sys.executable, "-c", _CONNECT, other.ipv4, "7030"]
    try:
        path = alice.environment["PATH"]
        refused = machine.run(node, command, user=alice, env={"PATH": f"{bob.home}/bin:.:{path}"})
        own = machine.run(node, command, user=alice, env={"PATH": f"{path}:{alice.home}/bin"})
    finally:
        for program in hidden:
            machine.run(node, ["umount", program])
    assert refused.returncode == 77, refused
    assert f"{bob.home}/bin/pasta is not taken, since {bob.home} belongs to user {bob.uid}" in refused.stderr
    assert own.stdout == f"{node.ipv4}\n", own


def test_silent_strangers_at_the_places_of_runs_keep_nobody_waiting(ground: Ground) -> None:
    machine, node, _, alice, bob = ground
    squat = (
        "import socket, sys\n"
        "ends = []\n"
        "for number in range(300):\n"
        "    ends.append(socket.socket(socket.AF_UNIX)); ends[-1].bind(f'\\0securerun-own-network-{number:012x}')\n"
        "    ends[-1].listen(number % 2)\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    stranger = machine.popen(node, [sys.executable, "-c", squat], user=bob, stdin=subprocess.PIPE)
    assert stranger.stdout is not None and stranger.stdout.readline() == "ready\n"
    try:
        with Job(machine, node, alice) as job:
            for user in (alice, None):
                begun = time.monotonic()
                (run,) = json.loads(machine.run(node, [CONTROL, "status", "--json"], user=user).stdout)["runs"]
                assert (run["pid"], time.monotonic() - begun < patient(5)) == (job.pid, True)
    finally:
        kill_group(stranger)
