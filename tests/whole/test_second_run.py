"""Several runs in one process, one after the other and at the same time: each is open to its own peers, or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kernel
import pytest
from hosts import Host, Network, eventually, finish, kill_group, machine_snapshot
from probe import reach
from torchless import needs_torch
from users import GUARD, PrivateMachine

PYTHON = [sys.executable, "-c"]

# Two blocks, one peer each; what is made in them is kept. Goes on when it is told to.
BLOCKS = """
import os, socket, sys
from pathlib import Path
from securerun import guarded, policy

def where():
    return Path("/proc/self/cgroup").read_text()

def say(*words):
    print(*words, flush=True)
    assert sys.stdin.readline()

home, before, kept = where(), dict(os.environ), []
for peer in sys.argv[1:]:
    with guarded(policy(peers=[peer])):
        assert where() != home
        kept.append(socket.create_server(("", 0)))
        say(kept[-1].getsockname()[1])
    assert where() == home, where()
    assert dict(os.environ) == before
    say("out")
"""


@kernel.needing(kernel.FILTERS_THAT_STAY)
@pytest.mark.parametrize("who", ["root", "alice"])
def test_each_of_two_blocks_has_its_own_peers_and_the_process_is_out_of_both(network: Network, who: str) -> None:
    node, first, second = network
    machine = machine_snapshot()
    with PrivateMachine() as private:
        user = private.add_user("alice") if who == "alice" else None
        private.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
        job = private.popen(node, [*PYTHON, BLOCKS, first.ipv4, second.ipv4], user=user, stdin=subprocess.PIPE)
        before = (node.ipv4, _number(job))
        assert (_reaches(first, before), _reaches(second, before)) == (True, False)
        assert _told_to_go_on(job) == "out"
        # The lease is over, with its rules and its record, and what was made in the block stays closed to strangers.
        assert eventually(lambda: not private.runs(), seconds=5)
        assert (_reaches(first, before), _reaches(second, before)) == (True, False)
        after = (node.ipv4, int(_told_to_go_on(job)))
        assert (_reaches(first, after), _reaches(second, after)) == (False, True)
        assert _told_to_go_on(job) == "out"
        assert eventually(lambda: not private.runs(), seconds=5)
        assert (_reaches(first, before), _reaches(second, before)) == (True, False)
        assert (_reaches(first, after), _reaches(second, after)) == (False, True)
        done = finish(job, text_input="\n")
        assert (done.returncode, done.stderr) == (0, "")
    assert eventually(lambda: machine_snapshot() == machine, seconds=2)


def _number(job: subprocess.Popen[str]) -> int:
    assert job.stdout is not None
    return int(job.stdout.readline())


def _told_to_go_on(job: subprocess.Popen[str]) -> str:
    assert job.stdin is not None and job.stdout is not None
    job.stdin.write("\n")
    job.stdin.flush()
    return job.stdout.readline().strip()


def _reaches(host: Host, target: tuple[str, int]) -> bool:
    return reach(host, [target])[target]


# What it starts by way of a server that multiprocessing keeps is in the run of the moment.
FORKSERVER = """
import multiprocessing, sys
from pathlib import Path
from securerun import guarded, policy

def say_where():
    print(Path("/proc/self/cgroup").read_text().split("securerun-")[-1].strip(), flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    for peer in sys.argv[1:]:
        with guarded(policy(peers=[peer])) as guarding:
            say_where()
            child = context.Process(target=say_where)
            child.start()
            child.join()
            print(*(note for note in guarding.notes if "stay outside" in note), flush=True)
"""


def test_what_a_server_of_an_earlier_run_forks_is_in_the_next_one(network: Network, tmp_path: Path) -> None:
    node, first, second = network
    program = tmp_path / "program.py"
    program.write_text(FORKSERVER)
    machine = machine_snapshot()
    done = node.run([sys.executable, str(program), first.ipv4, second.ipv4])
    assert done.returncode == 0, done
    one, of_one, notes, other, of_other, more_notes = done.stdout.splitlines()
    assert (of_one, of_other) == (one, other)
    assert one != other
    assert (notes, more_notes) == ("", "")
    assert eventually(lambda: machine_snapshot() == machine, seconds=2)


# Waits until it is reached, and says by whom.
WAIT = """
import socket, sys
with socket.create_server(("", 7001)) as server:
    server.settimeout(20)
    print("reached by", server.accept()[1][0], flush=True)
sys.exit(sys.argv[1] == "failed")
"""
TWICE = """
import os, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from securerun.run import main, parse_args, run
if __name__ == "__main__":
    script, first, second = sys.argv[1:]
    try:
        main(["--peers", first, script, "failed"])
    except ChildFailedError:
        print("and has failed", flush=True)
    run(parse_args(["--peers", second, script, ""]))
    print(*(name for name in os.environ if name.startswith("SECURERUN")))
"""


# Tries again and again to connect to what it is told.
KNOCK = """
import socket, sys, time
while True:
    try:
        socket.create_connection((sys.argv[1], 7001), timeout=0.5).close()
    except OSError:
        pass
    time.sleep(0.1)
"""


def test_a_second_main_is_open_to_its_own_peers_also_after_one_that_failed(network: Network, tmp_path: Path) -> None:
    node, first, second = network
    script, program = tmp_path / "wait.py", tmp_path / "twice.py"
    script.write_text(WAIT)
    program.write_text(TWICE)
    machine = machine_snapshot()
    knocking = [host.popen([*PYTHON, KNOCK, node.ipv4]) for host in (first, second)]
    try:
        done = node.run([sys.executable, str(program), str(script), first.ipv4, second.ipv4], timeout=90)
    finally:
        for each in knocking:
            kill_group(each)
    said = [f"reached by {first.ipv4}", "and has failed", f"reached by {second.ipv4}", ""]
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done
    for host in (first, second):
        assert done.stderr.count(f"open to {host.ipv4} (--peers)") == 1
    assert "no second lease" not in done.stderr
    assert eventually(lambda: machine_snapshot() == machine, seconds=2)


# Without a shield nothing but the lease closes what it still listens on.
STAYS = """
import socket, sys
from securerun import guarded, policy, run
with guarded(policy(peers=[sys.argv[1]]), scope="ports"):
    kept = socket.create_server(("", 7002))
try:
    with guarded(policy(peers=[sys.argv[2]])):
        print("went on")
except Exception as error:
    print(type(error).__name__, error, flush=True)
run.main(["--peers", sys.argv[2], "--nnodes", "2", "--master-addr", "10.77.0.1", "no such script"])
"""


def test_process_that_cannot_leave_its_run_begins_no_other_and_is_told_what_to_do(network: Network) -> None:
    node, first, second = network
    done = node.run([*PYTHON, STAYS, first.ipv4, second.ipv4])
    assert done.returncode == 78, done
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("securerun: "))
    assert "still listens on port 7002" in line and line.endswith("start each run in a process of its own")
    assert done.stdout == f"PolicyError {line.removeprefix('securerun: ')}\n"
    assert "Traceback" not in done.stderr


# Two at the same time: within a block, and in a thread beside a launch.
TOGETHER = """
import os, sys, threading, time
from pathlib import Path
from securerun import guarded, policy, run
first, second, script, began = sys.argv[1:]
if __name__ == "__main__":
    with guarded(policy(peers=[first])):
        try:
            with guarded(policy(peers=[first, second])):
                print("went on")
        except Exception as error:
            print(type(error).__name__, flush=True)
        with guarded(policy(peers=[first])):
            print("within", flush=True)
    two = ["--nnodes", "1", "--no-python", "sh", "-c"]
    wait = f"touch {began}; while [ -e {began} ]; do sleep 0.1; done"
    launch = threading.Thread(target=run.main, args=(["--peers", first, *two, wait],))
    launch.start()
    while not os.path.exists(began):
        time.sleep(0.1)
    for peers in (["--peers", second], [], ["--peers", first]):
        try:
            run.main([*peers, *two, "echo ran"])
        except SystemExit as ended:
            print(ended.code, flush=True)
    os.remove(began)
    launch.join()
    print(*(name for name in os.environ if name.startswith("SECURERUN")))
"""


@needs_torch
def test_of_two_runs_at_once_in_a_process_the_second_has_the_same_peers_or_is_refused(
    network: Network, tmp_path: Path
) -> None:
    node, first, second = network
    program = tmp_path / "together.py"
    program.write_text(TOGETHER)
    machine = machine_snapshot()
    command = [sys.executable, str(program), first.ipv4, second.ipv4, "", str(tmp_path / "began")]
    done = node.run(command, timeout=90)
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == ["PolicyError", "within", "78", "78", "ran", ""], done
    refused = [line for line in done.stderr.splitlines() if "has not ended and has other peers" in line]
    assert len(refused) == 2
    assert eventually(lambda: machine_snapshot() == machine, seconds=2)


# Two that begin at the same moment, when neither has a lease yet.
AT_ONCE = """
import sys, threading
from securerun import guarded, policy, run
how, *peers = sys.argv[1:]
start, both = threading.Barrier(2), threading.Barrier(2)
ends = []

def block(peer):
    with guarded(policy(peers=[peer])):
        both.wait(20)

def launch(peer):
    run.main(["--peers", peer, "--nnodes", "1", "--master-port", "0", "--no-python", "sleep", "3"])

def begin(peer):
    start.wait()
    try:
        (block if how == "block" else launch)(peer)
        ends.append("ran")
    except threading.BrokenBarrierError:
        ends.append("ran")
    except (Exception, SystemExit) as error:
        ends.append(type(error).__name__)
        both.abort()

if __name__ == "__main__":
    threads = [threading.Thread(target=begin, args=[peer]) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(*sorted(ends))
    with guarded(policy(peers=peers)):
        print("out of it")
"""


@pytest.mark.parametrize(("how", "error"), [("block", "PolicyError"), ("launch", "SystemExit")])
def test_of_two_runs_that_begin_at_the_same_moment_one_is_refused(
    network: Network, tmp_path: Path, how: str, error: str
) -> None:
    """Or each would be open to the other's peers, from the moment that the later one's guard moves the process."""
    node, first, second = network
    program = tmp_path / "at_once.py"
    program.write_text(AT_ONCE)
    machine = machine_snapshot()
    done = node.run([sys.executable, str(program), how, first.ipv4, second.ipv4], timeout=90)
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == [f"{error} ran", "out of it"], done
    assert eventually(lambda: machine_snapshot() == machine, seconds=2)
