"""How long 10,000 Slurm hosts take, from a folded node list and a rank table to a policy, with a local name service.

Runs as root, in network and mount namespaces of its own, where a small name server is all that answers. Each
measurement is a new process, as a launch is, and is compared to asking the same name server for the same names one
after the other. Prints one JSON text; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from findings import Finding, finding, report

GOAL_SECONDS, GOAL_HOSTS = 2.0, 10_000
DEVICES = 8
INSIDE = "--inside"
NAME_SERVER = ("127.0.0.1", 53)
# What glibc reads before it asks a name server.
SETTINGS = {
    "/etc/resolv.conf": "nameserver 127.0.0.1\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",
}
_ADDRESS_RECORD, _HEADER = 1, struct.Struct("!6H")


def address_of(number: int) -> str:
    """Every other address, so that no two hosts are one network."""
    number *= 2
    return f"10.{20 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def node_list(hosts: int) -> str:
    return f"cn[00001-{hosts:05}]"


def rank_table(hosts: int) -> dict[str, object]:
    """As MindCluster writes it for a super node: version 1.2, eight devices a server."""
    servers = [
        {
            "server_id": f"node-{number}",
            "host_ip": address_of(number),
            "device": [
                {
                    "device_id": str(device),
                    "super_device_id": str(number * DEVICES + device),
                    "device_ip": f"192.168.{number & 255}.{device + 1}",
                    "device_port": "16666",
                    "host_port": str(16700 + device),
                    "rank_id": str((number - 1) * DEVICES + device),
                }
                for device in range(DEVICES)
            ],
        }
        for number in range(1, hosts + 1)
    ]
    return {"status": "completed", "version": "1.2", "server_count": str(hosts), "server_list": servers}


def serve_names() -> None:
    """A name server (RFC 1035) that knows cnNNNNN and has one A record, and no other, for each."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    server.bind(NAME_SERVER)
    print("ready", flush=True)
    while True:
        query, client = server.recvfrom(512)
        end = query.index(b"\0", 12) + 5
        kind = query[end - 3]
        is_known = kind == _ADDRESS_RECORD and query[13:15] == b"cn"
        header = query[:2] + b"\x81\x80" + struct.pack("!4H", 1, int(is_known), 0, 0)
        answer = b""
        if is_known:
            packed = socket.inet_aton(address_of(int(query[15 : 13 + query[12]])))
            answer = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + packed
        server.sendto(header + query[12:end] + answer, client)


def to_policy() -> dict[str, float]:
    """The steps of a launch (securerun.run) that this is about; the seconds that each takes."""
    start = time.perf_counter()
    from securerun.firewall.policy import Policy
    from securerun.job import peers, ports
    from securerun.job.job import Endpoint, Job
    from securerun.options import Options

    hosts = int(os.environ["HOSTS"])
    job = Job("c10d", Endpoint("cn00001", 29400), hosts, hosts, 0, ("train.py",))
    imported = time.perf_counter()
    found = peers.find_peers(Options(), job)
    resolved = time.perf_counter()
    planned = ports.plan_ports(job, os.environ, None, known=found.ports)
    policy = Policy("0123456789ab", planned, found.networks)
    end = time.perf_counter()
    assert found.source == "Slurm (SLURM_JOB_NODELIST)" and not found.warnings, found
    assert sum(network.num_addresses for network in policy.peers) == hosts
    assert any(port.purpose == "HCCL (rank table)" for port in policy.ports)
    return {
        "import": imported - start,
        "peers": resolved - imported,
        "policy": end - resolved,
        "seconds": end - start,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_sequence() -> dict[str, float]:
    """The same names, one after the other."""
    start = time.perf_counter()
    for number in range(1, int(os.environ["HOSTS"]) + 1):
        socket.getaddrinfo(f"cn{number:05}", None, type=socket.SOCK_STREAM)
    return {"seconds": time.perf_counter() - start}


STEPS = {"to_policy": to_policy, "in_sequence": in_sequence}


@contextlib.contextmanager
def name_service(directory: Path) -> Iterator[None]:
    subprocess.run(["/usr/bin/env", "ip", "link", "set", "lo", "up"], check=True)
    for name, text in SETTINGS.items():
        own = directory / Path(name).name
        own.write_text(text)
        if Path(name).exists():
            subprocess.run(["/usr/bin/env", "mount", "--bind", own, Path(name).resolve()], check=True)
    command = [sys.executable, __file__, INSIDE, "serve_names"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()


def measure_all(hosts: int, runs: int, into: str) -> None:
    """In the namespaces: measure, and write what was found."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        table = directory / "hccl.json"
        table.write_text(json.dumps(rank_table(hosts)))
        environment = {
            **os.environ,
            "HOSTS": str(hosts),
            "SLURM_JOB_NODELIST": node_list(hosts),
            "RANK_TABLE_FILE": str(table),
        }
        with name_service(directory):
            measured = {step: [run(step, environment) for _ in range(runs)] for step in STEPS}
    report("peers", list(found_in(measured, hosts)), into or None)


def found_in(measured: dict[str, list[dict[str, float]]], hosts: int) -> Iterator[Finding]:
    """Each step of a launch that this is about, and the whole beside asking for one name after the other."""
    ours = measured["to_policy"]
    for step, words in (
        ("import", "importing"),
        ("peers", "finding and resolving the peers"),
        ("policy", "the policy"),
    ):
        what = f"{words}, {hosts} hosts of a Slurm list and a rank table"
        yield finding(f"peers.step.{step}", what, "s", [one[step] for one in ours])
    words = f"{hosts} names asked for one after the other"
    sequence = finding("peers.in_sequence", words, "s", [one["seconds"] for one in measured["in_sequence"]])
    yield sequence
    seconds = [one["seconds"] for one in ours]
    what = f"from a folded list of {hosts} hosts and their rank table to a policy"
    yield finding("peers.to_policy", what, "s", seconds, goal=GOAL_SECONDS if hosts == GOAL_HOSTS else None)
    yield finding("peers.against_sequence", what, "s", seconds, against=sequence)
    yield finding("peers.memory", "most memory of that process", "MiB", [one["peak_rss_mb"] for one in ours])


def run(step: str, environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, INSIDE, step], env=environment, stdout=subprocess.PIPE, check=True, timeout=120
    )
    found: dict[str, float] = json.loads(done.stdout)
    print(f"{step}: {found}", file=sys.stderr)
    return found


def main() -> None:
    if sys.argv[1:2] == [INSIDE]:
        inside(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=10_000, help="hosts of the job (default: 10000)")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each kind (default: 5)")
    parser.add_argument("--quick", action="store_true", help="1000 hosts, once: is it right, not how fast is it")
    parser.add_argument("--json", default="", metavar="FILE", help="write there (default: standard output)")
    options = parser.parse_args()
    if options.quick:
        options.hosts, options.runs = 1000, 1
    if not 1 <= options.hosts <= 65_000 or not 1 <= options.runs <= 100:
        parser.error("--hosts must be between 1 and 65000, --runs between 1 and 100")
    command = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, __file__, INSIDE]
    words = [*command, "measure_all", str(options.hosts), str(options.runs), options.json]
    sys.exit(subprocess.run(["/usr/bin/env", *words], check=False).returncode)


def inside(words: list[str]) -> None:
    if words[0] == "serve_names":
        serve_names()
    elif words[0] == "measure_all":
        measure_all(int(words[1]), int(words[2]), words[3])
    else:
        print(json.dumps(STEPS[words[0]]()))


if __name__ == "__main__":
    main()
