"""Hold a lease and one listener, until the end of input; what is printed is one JSON object a line.

A line of input names the peers from then on, with commas between, or, `listen PORT [ADDRESS]`, one more to listen on.

    holder.py [--peers A,B] [--ports FIRST-LAST] [--purpose TEXT] [--listen PORT] [--firewall B] [--scope S]
              [--loopback job] [--interface NAMES] [--public PORTS] [--listen-elsewhere]
              [--key SECRET [--require-key]]

{"guarding": [BACKEND, ...], "notes": [...]} once the lease stands and the port listens, {"news": TEXT} for what the
guard says later. `--listen-elsewhere` makes the listening socket in another cgroup than the job's, as a host does on
which net_cls is in use: the shield does not see it.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import secrets
import socket
import sys
from pathlib import Path

from hosts import cgroup2_mount

from securerun.errors import SecurerunError
from securerun.firewall.job_key import JobSecret
from securerun.firewall.policy import Policy, PortRange, Purpose
from securerun.guard.protocol import KeyOrder, Notice, Order
from securerun.job.public import openings
from securerun.linux.networks import Network, collapse
from securerun.protection.client import Guard


def main() -> None:
    options = parse()
    first, _, last = options.ports.partition("-")
    public = openings(options.public, "--public") if options.public else ()
    policy = Policy(
        secrets.token_hex(6),
        (
            PortRange(int(first), int(last or first), options.purpose),
            *(PortRange(one.first, one.last, Purpose.PUBLIC) for one in public if not one.is_for_all),
        ),
        networks(options.peers),
        tuple(options.interface.split(",")) if options.interface else (),
        close_loopback=options.loopback == "job",
        public=public,
    )
    guard = Guard()
    try:
        key = None
        if options.key:
            key = KeyOrder(required=options.require_key, secret=JobSecret(bytes.fromhex(options.key)))
        order = Order(policy, options.firewall, options.scope, grace=0.5, command="holder", key=key)
        guarding = guard.guard(order, tell)
        listener = listen_elsewhere(options.listen) if options.listen_elsewhere else listen(options.listen)
        layers = [layer.backend for layer in guarding.layers]
        more = {"secret": guarding.secret_path} if options.key else {}
        say(guarding=layers, notes=guarding.notes, run_id=policy.run_id, **more)
        listeners = [listener]
        for line in sys.stdin:
            if line.startswith("listen "):
                listeners.append(listen(*line.split()[1:]))
            else:
                guard.change_peers(networks(line.strip()))
        for listener in listeners:
            listener.close()
        guard.release(failed=False)
    except SecurerunError as error:
        say(refused=str(error))
        sys.exit(error.status)


def networks(text: str) -> tuple[Network, ...]:
    return collapse(ipaddress.ip_network(peer) for peer in text.split(",") if peer)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--interface", default="")
    parser.add_argument("--peers", default="")
    parser.add_argument("--ports", default="60000-60015")
    parser.add_argument("--purpose", default="planned")
    parser.add_argument("--listen", type=int, default=60000)
    parser.add_argument("--firewall", default="auto")
    parser.add_argument("--scope", default="auto")
    parser.add_argument("--loopback", default="any")
    parser.add_argument("--public", default="")
    parser.add_argument("--key", default="")
    parser.add_argument("--require-key", action="store_true")
    parser.add_argument("--listen-elsewhere", action="store_true")
    return parser.parse_args()


def listen(port: int | str, address: str = "") -> socket.socket:
    if address:
        return socket.create_server((address, int(port)))
    port = int(port)
    return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)


def listen_elsewhere(port: int) -> socket.socket:
    mount = cgroup2_mount()
    assert mount is not None
    here = Path("/proc/self/cgroup").read_text().split("0::")[1].splitlines()[0].lstrip("/")
    (mount / "cgroup.procs").write_text(str(os.getpid()))
    try:
        return listen(port)
    finally:
        (mount / here / "cgroup.procs").write_text(str(os.getpid()))


def tell(notice: Notice) -> None:
    for words in (*notice.words, *(str(denial) for denial in notice.denied)):
        say(news=words)


def say(**fields: object) -> None:
    # In one piece: print() writes the end of the line by itself, and two threads speak.
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
