"""A job of one node in a network of its own: nothing to install, nobody with privilege to ask, nobody can connect."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from apart import CONTROL, EXEC, LISTENER, SECURERUN, Job, make_ordinary, name_of, ours
from hosts import Host, Network, eventually, is_alive
from probe import reach
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
    "import socket\n"
    "end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "end.bind(('127.0.0.53', 53))\n"
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


def test_names_are_asked_of_a_server_on_the_hosts_loopback(ground: Ground) -> None:
    """As with systemd-resolved: in there 127.0.0.53 is the job's own loopback."""
    machine, node, _, alice, _ = ground
    files = {"/etc/nsswitch.conf": "hosts: dns\n", "/etc/resolv.conf": "nameserver 127.0.0.53\noptions timeout:2\n"}
    before = {name: machine.place(name).read_text() for name in files}
    for name, text in files.items():
        machine.write(name, text)
    server = node.popen([sys.executable, "-c", _NAME_SERVER])
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    look = "import socket; print(socket.gethostbyname('data.example'), open('/etc/resolv.conf').read())"
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", look], user=alice)
    assert machine.place("/etc/resolv.conf").read_text() == files["/etc/resolv.conf"]
    for name, text in before.items():
        machine.write(name, text)
    assert done.stdout.split() == ["192.0.2.7", "nameserver", "169.254.1.1", "options", "timeout:2"], done


def test_proxy_on_the_hosts_loopback_is_reached_and_nothing_else_there(ground: Ground) -> None:
    machine, node, _, alice, _ = ground
    serve(node, 7010, "127.0.0.1")
    serve(node, 7011, "127.0.0.1")
    proxies = {"http_proxy": "http://localhost:7010", "HTTPS_PROXY": f"http://{node.ipv4}:7011"}
    command = [*EXEC, "--", sys.executable, "-c", _CONNECT, "127.0.0.1", "7010", "127.0.0.1", "7011"]
    done = machine.run(node, command, user=alice, env=proxies)
    assert done.stdout.split() == ["127.0.0.1", "ConnectionRefusedError"], done
    assert "localhost:7010, which http_proxy names, leads to that port of this host's loopback" in done.stderr
    assert f"HTTPS_PROXY: {node.ipv4}:7011 is on this host, which cannot be reached from in there" in done.stderr


def test_slirp4netns_takes_its_place_where_there_is_no_pasta(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    serve(other, 7012, other.ipv4)
    machine.run(node, ["sh", "-c", "mount --bind /dev/null /usr/bin/pasta"])
    try:
        command = [*EXEC, "--", sys.executable, "-c", _CONNECT, other.ipv4, "7012"]
        done = machine.run(node, command, user=alice)
    finally:
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
        (pasta,) = (pid for pid in job.keepers() if name_of(pid) != "securerun-keep")
        os.kill(pasta, signal.SIGKILL)
        look = job.entered(sys.executable, "-c", _CONNECT, other.ipv4, "7004")
        assert eventually(lambda: machine.run(node, look, user=alice).stdout == f"{node.ipv4}\n", seconds=10)
        assert "pasta has ended" in job.end().stderr


def test_keeper_that_is_killed_opens_nothing_and_is_told_of(ground: Ground) -> None:
    machine, node, other, alice, _ = ground
    with Job(machine, node, alice) as job:
        (keeper,) = (pid for pid in job.keepers() if name_of(pid) == "securerun-keep")
        os.kill(keeper, signal.SIGKILL)
        assert eventually(lambda: not job.keepers())
        outside = [(address, job.port) for address in node.addresses]
        assert reach(other, outside) == dict.fromkeys(outside, False)
        done = job.end()
    assert done.returncode == 0
    assert "the keeper of this job's network was killed" in done.stderr


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
    """More than would wait at its place: each is let go at once."""
    machine, node, _, alice, _ = ground
    look = (
        "import os\nfrom securerun.protection import enclosing\n"
        "print(sum(enclosing.find(os.environ) is not None for _ in range(300)))"
    )
    done = machine.run(node, [*EXEC, "--", sys.executable, "-c", look], user=alice)
    assert done.stdout == "300\n", done


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
