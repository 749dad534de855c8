"""Two users of one site, on the same hosts, with the same words: by the site's key neither comes to the other's job."""

from __future__ import annotations

import subprocess
import sys

import kernel
import pytest
from attacking import Ground
from checkout import COMMANDS
from hosts import Host, finish
from users import User

SITE_KEY, SITE = "/etc/securerun/site.key", "0123456789abcdef" * 4
EXEC = (str(COMMANDS / "securerunctl"), "exec")
PORT = 7000
SAME_MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NNODES": "2"}
JOB = f"""
import socket, sys
listener = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
sys.stdin.read()
"""
# Prints the addresses that it comes to.
CALLER = """
import socket, sys, time
tried = {}
for address in sys.argv[1:]:
    tried[address] = made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    made.setblocking(False)
    made.connect_ex((address, 7000))
time.sleep(1.5)  # a SYN that was lost is sent again after one
for address, made in tried.items():
    try:
        made.getpeername()
        print(address)
    except OSError:
        pass
"""


@pytest.fixture
def site(ground: Ground) -> Ground:
    kernel.require(kernel.TAGS)
    ground.machine.write(SITE_KEY, SITE, mode=0o400)
    return ground


def reached(ground: Ground, user: User, host: Host, *addresses: str, guarded: bool = True) -> list[str]:
    """To which of these addresses a job of a user's on a host comes, or else any process of theirs."""
    program = [sys.executable, "-c", CALLER, *addresses]
    command = [*EXEC, "--firewall", "off", "--", *program] if guarded else program
    done = finish(ground.machine.popen(host, command, user=user, env=SAME_MEETING if guarded else None))
    assert done.returncode == 0, done
    return done.stdout.split()


def test_no_other_user_comes_to_a_job_from_either_of_its_hosts(site: Ground) -> None:
    node, peer, alice, bob = site.node, site.peer, site.alice, site.bob
    command = [*EXEC, "--loopback", "job", "--", sys.executable, "-c", JOB]
    job = site.machine.popen(node, command, user=alice, env=SAME_MEETING, stdin=subprocess.PIPE)
    assert job.stdout is not None and job.stdout.readline() == "listening\n", finish(job)
    outside, inside = (node.ipv4, node.ipv6), (node.ipv4, node.ipv6, "127.0.0.1", "::1")
    assert reached(site, alice, peer, *outside) == [*outside]
    assert reached(site, bob, peer, *outside) == []
    assert reached(site, alice, peer, *outside, guarded=False) == []
    # On the job's own host, by whatever address.
    assert reached(site, bob, node, *inside) == []
    assert reached(site, alice, node, *inside, guarded=False) == []
    done = finish(job, text_input="")
    assert done.returncode == 0 and SITE not in done.stderr
    assert f"{peer.ipv4} → {PORT}" in done.stderr  # who was turned away is told
