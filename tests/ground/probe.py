"""What a host can reach: tries TCP ports from inside one host while a job runs on another.

As a class, from a test:

    with Probe(stranger, node0, seconds=60) as probe:
        ...                         # run the job on node0
    assert probe.seen               # (address, port) of all that listened meanwhile
    assert probe.reached == set()   # those that a connect() from the stranger completed to
    probe.connections, probe.appeared   # when it did, and since when they listened

As a program, inside a host (standard library only), speaking one JSON text a line:

    probe.py list                   prints the [address, port] of every TCP listener here
    probe.py watch                  prints [SINCE, [[address, port], ...]] whenever the TCP listeners here change;
                                    what is new was not there yet at SINCE, seconds of the monotonic clock
    probe.py try                    reads lists of [address, port], prints [address, port, "connected"|"refused"|...,
                                    BEGUN] again and again for every target of the last list, new ones at once
    probe.py once                   reads one list, prints one line for each target
    probe.py scan ADDRESS           tries every port, prints those that connect
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the program below runs without the package beside it
    import subprocess

    from hosts import Host

Endpoint = tuple[str, int]

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, net/tcp_states.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_LISTEN = 10
_DIAG_HEADER = 72  # sizeof(struct inet_diag_msg)
_INET_DIAG_SKV6ONLY = 11
# All addresses of both families, as ss writes it: what torch's stores listen on.
_DUAL_STACK = "*"

# An emulated machine has no time for more (tests/ground/kernel_trial.py).
WATCH_SECONDS = float(os.environ.get("PROBE_WATCH_SECONDS", "0.01"))
RETRY_SECONDS = float(os.environ.get("PROBE_RETRY_SECONDS", "0.1"))
CONNECT_SECONDS = 0.5
# Attempts under way at once: bounds open files and, with CONNECT_SECONDS, the rate.
PARALLEL = 256
SCAN_PARALLEL = 900


class Probe:
    """Tries from `origin` every TCP port that listens on `target`, from when it is seen until it closes.

    A context manager; it ends with the block, or by itself after `seconds`. Loopback listeners are left out,
    and so are the ports in `ignore`.

    seen: what listened, as (address, port) to try. results: how often each attempt ended how. appeared: since when
    each listened, once for each time. connections: what was connected to, and when the attempt had begun. dropped: when
    those attempts had begun that nobody answered. All times are of the monotonic clock.
    """

    def __init__(self, origin: Host, target: Host, *, seconds: float = 120, ignore: Iterable[int] = ()) -> None:
        self.seen: set[Endpoint] = set()
        self.results: dict[Endpoint, Counter[str]] = {}
        self.appeared: dict[Endpoint, list[float]] = {}
        self.connections: list[tuple[Endpoint, float]] = []
        self.dropped: dict[Endpoint, list[float]] = {}
        self._origin = origin
        self._target = target
        self._seconds = seconds
        self._ignore = frozenset(ignore)

    def __enter__(self) -> Probe:
        limit = ["--seconds", str(self._seconds)]
        self._watcher = start(self._target, "watch", *limit)
        self._prober = start(self._origin, "try", *limit)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._pass_on, self._collect)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # The watcher ends at its end of input, that ends the prober's, and so on down the line.
        _close_quietly(self._watcher)
        for thread in self._threads:
            thread.join(timeout=10)
        self._watcher.wait(timeout=10)
        self._prober.wait(timeout=10)

    @property
    def reached(self) -> set[Endpoint]:
        """What a connection was completed to, be it once."""
        return {endpoint for endpoint, results in self.results.items() if results["connected"]}

    @property
    def tried(self) -> set[Endpoint]:
        return set(self.results)

    def _pass_on(self) -> None:
        assert self._watcher.stdout is not None and self._prober.stdin is not None
        known: set[Endpoint] = set()
        try:
            for line in self._watcher.stdout:
                since, listeners = json.loads(line)
                targets = targets_of(map(_endpoint, listeners), self._target.addresses)
                targets = {(address, port) for address, port in targets if port not in self._ignore}
                for endpoint in targets - known:
                    self.appeared.setdefault(endpoint, []).append(since)
                known = targets
                self.seen |= targets
                print(json.dumps(sorted(targets)), file=self._prober.stdin, flush=True)
        except BrokenPipeError:
            pass  # the prober's time was up first
        finally:
            _close_quietly(self._prober)

    def _collect(self) -> None:
        assert self._prober.stdout is not None
        for line in self._prober.stdout:
            address, port, result, begun = json.loads(line)
            self.results.setdefault((address, port), Counter())[result] += 1
            if result == "connected":
                self.connections.append(((address, port), begun))
            elif result == "timeout":
                self.dropped.setdefault((address, port), []).append(begun)


def reach(
    origin: Host,
    targets: Iterable[Endpoint],
    *,
    seconds: float = CONNECT_SECONDS,
    around: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> dict[Endpoint, bool]:
    """For each (address, port), whether a connect() from `origin` completes. around: what starts the program."""
    from patience import patient  # where this is a program, it has but itself

    request = json.dumps(sorted(set(targets)))
    program = [*around, *_program("once", "--connect-seconds", str(patient(seconds)))]
    answer = origin.run(program, text_input=request + "\n", check=True, env=env).stdout
    results = (json.loads(line) for line in answer.splitlines())
    return {(address, port): result == "connected" for address, port, result, _ in results}


def scan(origin: Host, address: str, *, seconds: float = CONNECT_SECONDS) -> set[int]:
    """All TCP ports, of 65535, that `origin` can connect to at `address`; takes a few seconds if none is dropped."""
    answer = origin.run(_program("scan", address, "--connect-seconds", str(seconds)), check=True, timeout=180).stdout
    return {json.loads(line)[1] for line in answer.splitlines()}


def listening(host: Host) -> set[Endpoint]:
    """Address and port of every TCP listener of `host`, as they were bound."""
    answer = host.run(_program("list"), check=True).stdout
    return {(address, port) for address, port in map(json.loads, answer.splitlines())}


def start(host: Host, *words: str) -> subprocess.Popen[str]:
    return host.popen(_program(*words), stdin=-1, stdout=-1, stderr=None)


def _program(*words: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), *words]


def _close_quietly(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def targets_of(listeners: Iterable[Endpoint], addresses: Sequence[str]) -> set[Endpoint]:
    """What another host would try to get at `listeners` of a host with these addresses."""
    targets = set()
    for bound, port in listeners:
        for address in addresses:
            everything = "::" if ":" in address else "0.0.0.0"  # noqa: S104 - compared with, not bound
            if bound in (_DUAL_STACK, everything, address, f"::ffff:{address}"):
                targets.add((address, port))
    return targets


def _endpoints(line: str) -> set[Endpoint]:
    return set(map(_endpoint, json.loads(line)))


def _endpoint(words: Sequence[Any]) -> Endpoint:
    address, port = words
    return address, port


def _say(*values: object) -> None:
    print(json.dumps(values), flush=True)


def watch(seconds: float) -> None:
    """Print the listeners of this host whenever they change, until the end of input or of `seconds`."""
    end = time.monotonic() + seconds
    last, looked = None, time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while time.monotonic() < end and not selector.select(WATCH_SECONDS):
            before, looked = looked, time.monotonic()
            now = sorted(listeners_here())
            if now != last:
                _say(before, now)
                last = now


def listeners_here() -> set[Endpoint]:
    """Address and port of every TCP listener in this network namespace.

    Asked over netlink: /proc/net/tcp walks the table of *all* connections, 15 ms each time on a large machine.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as sock:
        return {found for family in (socket.AF_INET, socket.AF_INET6) for found in _dump_listeners(sock, family)}


def _dump_listeners(sock: socket.socket, family: int) -> Iterator[Endpoint]:
    any_socket = bytes(48)
    request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 1 << _LISTEN) + any_socket
    header = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    sock.send(header + request)
    while True:
        answer = sock.recv(1 << 16)
        while answer:
            length, kind = struct.unpack_from("=IH", answer)
            if kind == _NLMSG_ERROR:
                raise OSError("the kernel does not list sockets; is its module tcp_diag there?")
            if kind == _NLMSG_DONE:
                return
            yield parse_listener(answer[16:length])
            answer = answer[_aligned(length) :]


def parse_listener(message: bytes) -> Endpoint:
    """Address and port in a struct inet_diag_msg with its attributes."""
    family = message[0]
    (port,) = struct.unpack_from("!H", message, 4)
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, message[8:12]), port
    address = socket.inet_ntop(socket.AF_INET6, message[8:24])
    if address == "::" and not _attribute(message[_DIAG_HEADER:], _INET_DIAG_SKV6ONLY, b"\0")[0]:
        return _DUAL_STACK, port
    return address, port


def _attribute(attributes: bytes, wanted: int, default: bytes) -> bytes:
    while attributes:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == wanted:
            return attributes[4:length]
        attributes = attributes[_aligned(length) :]
    return default


def _aligned(length: int) -> int:
    return (length + 3) & ~3


class Prober:
    """Tries the targets it was last given, each every RETRY_SECONDS, without waiting for earlier attempts."""

    def __init__(self, connect_seconds: float, parallel: int) -> None:
        self._targets: set[Endpoint] = set()
        self._connect_seconds = connect_seconds
        self._room = asyncio.Semaphore(parallel)
        self._under_way: set[asyncio.Task[None]] = set()

    async def attempt(self, endpoint: Endpoint) -> tuple[str, float]:
        """How it ended, and when it began."""
        async with self._room:
            begun = time.monotonic()
            return await connect(endpoint, self._connect_seconds), begun

    async def report(self, endpoint: Endpoint) -> None:
        _say(*endpoint, *await self.attempt(endpoint))

    def follow(self, targets: set[Endpoint]) -> None:
        """Try these from now on, and no others; the new ones at once, since they may be open for a moment only."""
        before, self._targets = self._targets, targets
        self._try(targets - before)

    async def keep_trying(self) -> None:
        while True:
            self._try(self._targets)
            await asyncio.sleep(RETRY_SECONDS)

    def _try(self, targets: Iterable[Endpoint]) -> None:
        # A slow machine misses a round instead of piling attempts up.
        for endpoint in targets if len(self._under_way) < PARALLEL else ():
            task = asyncio.ensure_future(self.report(endpoint))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)


async def connect(endpoint: Endpoint, seconds: float) -> str:
    """How a connect() ends: connected, refused, timeout, or the name of another error."""
    family = socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, endpoint), seconds)
        except asyncio.TimeoutError:
            # Asked once more: a handshake that ended together with the time counts as a connection.
            return "connected" if _is_connected(sock) else "timeout"
        except ConnectionRefusedError:
            return "refused"
        except OSError as error:
            return error.strerror or type(error).__name__
        return "connected"


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


async def try_until_end_of_input(seconds: float, connect_seconds: float) -> None:
    prober = Prober(connect_seconds, PARALLEL)
    trying = asyncio.ensure_future(prober.keep_trying())
    try:
        await asyncio.wait_for(_follow_targets(prober), seconds)
    except asyncio.TimeoutError:
        pass
    finally:
        trying.cancel()


async def _follow_targets(prober: Prober) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while True:
        line = await reader.readline()
        if not line:
            return
        prober.follow(_endpoints(line.decode()))


async def try_once(endpoints: Iterable[Endpoint], connect_seconds: float) -> None:
    prober = Prober(connect_seconds, PARALLEL)
    await asyncio.gather(*(prober.report(endpoint) for endpoint in endpoints))


async def try_every_port(address: str, connect_seconds: float) -> None:
    prober = Prober(connect_seconds, SCAN_PARALLEL)
    ports = iter(range(1, 65536))

    async def work_off() -> None:
        for port in ports:
            result, _ = await prober.attempt((address, port))
            if result == "connected":
                _say(address, port, "connected")

    await asyncio.gather(*(work_off() for _ in range(SCAN_PARALLEL)))


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("list", "watch", "try", "once", "scan"))
    parser.add_argument("address", nargs="?", help="for scan")
    parser.add_argument("--seconds", type=float, default=120, help="watch and try end after this long (default: 120)")
    parser.add_argument(
        "--connect-seconds", type=float, default=CONNECT_SECONDS, help="how long one connect() may take"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = _parse()
    if options.mode == "list":
        for endpoint in sorted(listeners_here()):
            _say(*endpoint)
    elif options.mode == "watch":
        watch(options.seconds)
    elif options.mode == "try":
        asyncio.run(try_until_end_of_input(options.seconds, options.connect_seconds))
    elif options.mode == "once":
        asyncio.run(try_once(_endpoints(sys.stdin.readline()), options.connect_seconds))
    else:
        asyncio.run(try_every_port(options.address, options.connect_seconds))


if __name__ == "__main__":
    main()
