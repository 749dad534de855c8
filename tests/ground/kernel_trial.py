"""What is tried in a machine of the kernel matrix, as root, in the machine itself:

    kernel_trial.py [--torch PART]... [--seconds N] [--tests WORD]... PART...

    truth    what a stranger reaches of a guarded process' ports, and whether doctor says so
    chains   the same of each backend of the port chains by itself
    one      a run of one node: its status, its output
    two      a run of two nodes, and a stranger who tries every port of both
    kills    kill -9 of the guard, then of the launcher, in the middle of a job
    socket   an ordinary user's run, by systemd's socket unit
    tests    the suite's tests of the words given, by pytest
    net_cls  net_cls comes into use in the middle of a job, beside it and in it
    left     nothing is left: no rule, cgroup, record, reserved port or guard

Writes one JSON document, {PART: {"ok": ..., "says": ..., "seconds": ...}}, to /srv/machine/out after each part.
`says` has the figures, or why not. Every part but the last also looks whether it left something.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkout import CHECKOUT, COMMANDS, GROUND
from hosts import (
    RECORDS,
    Host,
    Network,
    cgroup2_mount,
    eventually,
    finish,
    finish_all,
    kill_group,
    machine_snapshot,
    names_in,
)
from kernel_cells import DOCUMENT
from probe import Probe

OUT = Path("/srv/machine/out")
JOB = str(GROUND / "kernel_job.py")
EXEC = (str(COMMANDS / "securerunctl"), "exec")
PORT = 29500
BACKENDS = ("iptables", "nftables")
REFUSED = (77, 78)
# Emulated: what takes 0.1 s elsewhere takes one or two here.
_CLEAN_SECONDS, _START_SECONDS, _RUN_SECONDS = 30.0, 120.0, 300.0
_PROBE_SECONDS = 3600.0
_PATIENCE = "8"  # tests/ground/patience.py
# What scope `ports` promises, and how much later than a port a probe of an emulated machine may see it.
_SEEN_SECONDS, _SLACK_SECONDS = 0.2, 5.0
# As a guard does for itself: the tests' own cgroups are of version 2.
WITH_VERSION_2 = (
    *(
        "unshare",
        "--mount",
        "sh",
        "-ec",
        '[ -n "$(findmnt -t cgroup2)" ] || mount -t cgroup2 none /mnt; exec "$@"',
        "sh",
    ),
)
_GUARD = "securerun.guard.server"
_RECORDED_SECONDS = 3.0
_KEPT, _LOST = "the shield held", "the shield was switched off and the scope was ports at once"


class No(Exception):
    """A part is not as it must be; the words are for the table."""


def require(condition: bool, words: str) -> None:
    if not condition:
        raise No(words)


@dataclass(frozen=True)
class Asked:
    torch: frozenset[str]
    seconds: float
    tests: tuple[str, ...]


# What is true of a job.


@dataclass(frozen=True)
class Seen:
    """What a stranger got of a job's ports. opened: the longest that one was open to him after it had appeared."""

    tried: int
    reached: int
    opened: float
    planned_reached: bool

    @classmethod
    def by(cls, probes: Sequence[Probe]) -> Seen:
        reached = [endpoint for probe in probes for endpoint in probe.reached]
        ages = [
            begun - max(since for since in probe.appeared[endpoint] if since <= begun)
            for probe in probes
            for endpoint, begun in probe.connections
            if any(since <= begun for since in probe.appeared.get(endpoint, ()))
        ]
        tried = sum(len(probe.tried) for probe in probes)
        return cls(tried, len(reached), max(ages, default=0.0), any(port == PORT for _, port in reached))

    def __str__(self) -> str:
        opened = f", the longest for {self.opened:.1f} s" if self.reached else ""
        return f"a stranger reached {self.reached} of {self.tried} ports{opened}"

    def require_kept(self, errors: str) -> None:
        """What was said at the start holds: every port, or each within 0.2 s and the planned ones from the start."""
        require(self.tried > 0, "the stranger saw no port to try")
        if is_shielded(errors):
            require(self.reached == 0, f"closed by the shield, was said, and {self}")
            return
        require("scope ports" in errors, f"neither shield nor scope ports was said: {words_of(errors)}")
        require(not self.planned_reached, f"the planned port {PORT} was reached")
        limit = _SEEN_SECONDS + _SLACK_SECONDS
        require(self.opened <= limit, f"scope ports, and {self}")


def is_shielded(errors: str) -> bool:
    return "closed to all others by shield" in errors


def words_of(errors: str) -> str:
    """securerun's own last words."""
    lines = [line for line in errors.splitlines() if line.startswith(("securerun", "Traceback"))]
    return "; ".join(lines[-3:]) or errors.strip()[-300:] or "no word"


def why_no_shield(errors: str) -> str:
    """What was said at the start about it."""
    lines = [line for line in errors.splitlines() if "no shield" in line or "without a shield" in line]
    return re.sub(r"^securerun\w*: (run \w+: )?", "", lines[0]) if lines else "no shield"


@contextlib.contextmanager
def hosts() -> Iterator[tuple[Host, Host, Host]]:
    """A node, a peer and a stranger, who are afterwards as they were before. All parts have the same, as long as so."""
    network, before = _ground()
    try:
        node, peer, stranger = network
        yield node, peer, stranger
        eventually(_no_record, seconds=_CLEAN_SECONDS)  # asked often, which looking at rules is too slow for
        after = eventually(lambda: [host.snapshot() for host in network] == before, seconds=_CLEAN_SECONDS)
        require(after, "left on a host: " + "; ".join(differences(before, [host.snapshot() for host in network])))
    except BaseException:
        network.close()
        _ground.cache_clear()
        raise


@functools.cache
def _ground() -> tuple[Network, list[dict[str, str]]]:
    """Hosts, which go with this process, and what there is on them; emulated it takes a while to make them."""
    network = Network("node", "peer", "stranger").__enter__()
    return network, [host.snapshot() for host in network]


def differences(before: Sequence[dict[str, str]], after: Sequence[dict[str, str]]) -> Iterator[str]:
    for old, new in zip(before, after):
        for name, text in new.items():
            more = set(text.splitlines()) ^ set(old[name].splitlines())
            if more:
                yield f"{name}: {' | '.join(sorted(more))[:200]}"


def guarded(peers: str, *options: str) -> list[str]:
    """What stands before a command that is to be guarded."""
    return [*EXEC, "--peers", peers, *options, "--"]


class Listening:
    """A job that opens one port after the other on a host, and a stranger who tries them. A context manager.

    The job goes on until `end`; then it is known how it ended.
    """

    def __init__(self, stranger: Host, node: Host, before: Sequence[str]) -> None:
        self._node = node
        self._before = before
        self.probe = trying(stranger, node)

    def __enter__(self) -> Listening:
        self._place = tempfile.TemporaryDirectory()
        Path(self._place.name).chmod(0o755)
        self.probe.__enter__()
        self._end = Path(self._place.name) / "end"
        self.process = self._node.popen([*self._before, sys.executable, JOB, "listen", str(self._end)], cwd=Path("/"))
        return self

    def __exit__(self, *_: object) -> None:
        self._end.touch()
        self.probe.__exit__()
        self._place.cleanup()

    def wait_for_more_ports(self, number: int = 3) -> None:
        """Until the stranger has tried that many more, or the job has ended."""
        wanted = len(self.probe.tried) + number
        eventually(lambda: self.process.poll() is not None or len(self.probe.tried) >= wanted, seconds=_RUN_SECONDS)

    def end(self) -> subprocess.CompletedProcess[str]:
        self._end.touch()
        return finish(self.process, timeout=_RUN_SECONDS)

    @property
    def seen(self) -> Seen:
        return Seen.by([self.probe])


def trying(origin: Host, target: Host) -> Probe:
    return Probe(origin, target, seconds=_PROBE_SECONDS)


# The parts.


def truth(asked: Asked) -> str:
    """The job first, as on a host where nobody has asked doctor: what doctor looks at may mend it."""
    with hosts() as (node, peer, stranger):
        with Listening(stranger, node, ()) as open_to_all:
            open_to_all.wait_for_more_ports()
            open_to_all.end()
        require(open_to_all.seen.reached > 0, "the stranger reaches nothing even without securerun: he proves nothing")
        return what_is_said_is_true(node, peer, stranger)


def chains(asked: Asked) -> str:
    """Each backend by itself is there and closes where doctor says so, and is refused where not."""
    with hosts() as (node, peer, stranger):
        doctor = abilities(node)
        held = [backend for backend in BACKENDS if chains_hold(node, peer, stranger, backend, doctor[backend])]
        return ", ".join(held) or "none"


def what_is_said_is_true(node: Host, peer: Host, stranger: Host) -> str:
    """What a job says at its start, what a stranger gets of it, and what doctor says then, are the same."""
    with Listening(stranger, node, guarded(peer.ipv4)) as job:
        job.wait_for_more_ports(4)
        done = job.end()
    say(f"the job: {done.returncode}, {job.seen}; {words_of(done.stderr)}")
    doctor = abilities(node)
    shield = doctor["shield"]
    if done.returncode in REFUSED:
        require(not shield["works"], f"doctor says shield, the job was refused: {words_of(done.stderr)}")
        return f"no shield, refused: {words_of(done.stderr)}"
    require(done.returncode == 0, f"the job ended with status {done.returncode}: {words_of(done.stderr)}")
    job.seen.require_kept(done.stderr)
    agreed = bool(shield["works"]) == is_shielded(done.stderr)
    require(agreed, f"doctor says {shield['what']!r}, and the job {words_of(done.stderr)}")
    return f"{'shield' if shield['works'] else 'no shield: ' + shield['what']}; {job.seen}"


def abilities(node: Host) -> dict[str, dict[str, Any]]:
    """What doctor says, by name. Asked once: emulated it takes a quarter of a minute, and no part changes it."""
    if not _abilities:
        answer = node.run([COMMANDS / "securerunctl", "doctor", "--json"], timeout=_RUN_SECONDS)
        require(answer.returncode in (0, 1) and answer.stdout.startswith("{"), f"doctor: {words_of(answer.stderr)}")
        _abilities.update((one["name"], one) for one in json.loads(answer.stdout)["host"])
        for one in _abilities.values():
            say(f"doctor: {one['name']}: {one['works']}, {one['what']}")
    return _abilities


_abilities: dict[str, dict[str, Any]] = {}


def chains_hold(node: Host, peer: Host, stranger: Host, backend: str, said: dict[str, Any]) -> bool:
    """Port chains alone close the planned port to the stranger and not to the peer, if doctor says so."""
    before = guarded(peer.ipv4, "--scope", "ports", "--firewall", backend, "--ports", str(PORT))
    process = node.popen([*before, sys.executable, JOB, "serve", str(PORT), "0"])
    with trying(stranger, node) as probe:
        if eventually(lambda: process.poll() is not None or knows(probe), seconds=_START_SECONDS):
            time.sleep(1)  # for the stranger
        if process.poll() is None:
            peer.run([sys.executable, JOB, "join", node.ipv4, str(PORT), "0"], timeout=_RUN_SECONDS)
    done = finish(process, timeout=_RUN_SECONDS)
    say(f"{backend}: {done.returncode}, doctor {said['works']}; {words_of(done.stderr)}")
    if not said["works"]:
        require(done.returncode in REFUSED, f"doctor says no {backend}, and a job with it had status {done.returncode}")
        return False
    require(done.returncode == 0, f"doctor says {backend}, and a job with it: {words_of(done.stderr)}")
    gained = [(endpoint, begun) for endpoint, begun in probe.connections if endpoint[1] == PORT]
    require(not gained, f"the stranger reached {PORT} behind {backend} alone: {gained}, it appeared {probe.appeared}")
    return True


def knows(probe: Probe) -> bool:
    """Whether the planned port listens."""
    return any(port == PORT for _, port in probe.seen)


def one(asked: Asked) -> str:
    with hosts() as (node, _, stranger):
        if "one" not in asked.torch:
            job = ["sh", "-c", "echo out; echo err >&2; exit 7"]
            done = node.run([*guarded("localhost"), *job], timeout=_RUN_SECONDS)
            require(
                (done.returncode, done.stdout) == (7, "out\n"), f"status {done.returncode}: {words_of(done.stderr)}"
            )
            return "status and output are the command's"
        train = [str(CHECKOUT / "examples/train.py"), "--epochs", "2"]
        launch = [str(COMMANDS / "securerun"), "--nproc-per-node", "1", *train]
        with trying(stranger, node) as probe:
            done = finish(node.popen(launch), timeout=asked.seconds)
        require(done.returncode == 0, f"status {done.returncode}: {words_of(done.stderr)}")
        require("loss" in done.stdout, f"no loss was printed: {done.stdout[-200:]}")
        require(not probe.reached or not is_shielded(done.stderr), str(Seen.by([probe])))
        return f"torch {torch_version()} trained; {Seen.by([probe])}"


def torch_version() -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def two(asked: Asked) -> str:
    with hosts() as (node0, node1, stranger):
        peers = ",".join((*node0.addresses, *node1.addresses))
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(trying(stranger, node)) for node in (node0, node1)]
            if "two" in asked.torch:
                started = [node.popen(torch_on(rank, node0, peers)) for rank, node in enumerate((node0, node1))]
            else:
                meeting = ((node0, ["serve", str(PORT), "3"]), (node1, ["join", node0.ipv4, str(PORT), "3"]))
                started = [
                    node.popen([*guarded(peers, "--ports", str(PORT)), sys.executable, JOB, *words])
                    for node, words in meeting
                ]
            done = finish_all(started, timeout=asked.seconds if "two" in asked.torch else _RUN_SECONDS)
        ends = [node.returncode for node in done]
        require(ends == [0, 0], f"status {ends}: {'; '.join(words_of(node.stderr) for node in done)}")
        seen = Seen.by(probes)
        for node in done:
            seen.require_kept(node.stderr)
        shield = "" if is_shielded(done[0].stderr) else f"; {why_no_shield(done[0].stderr)}"
        return f"{'torch trained on both' if 'two' in asked.torch else 'they met'}; {seen}{shield}"


def torch_on(rank: int, master: Host, peers: str) -> list[str]:
    where = [f"--node-rank={rank}", f"--master-addr={master.ipv4}", f"--master-port={PORT}"]
    train = [str(CHECKOUT / "examples/train.py"), "--epochs", "2"]
    return [str(COMMANDS / "securerun"), "--nnodes=2", *where, f"--peers={peers}", "--nproc-per-node=1", *train]


def kills(asked: Asked) -> str:
    with hosts() as (node, peer, stranger):
        with Listening(stranger, node, guarded(peer.ipv4, "--ports", str(PORT))) as job:
            job.wait_for_more_ports(2)
            first = guards()
            require(bool(first), "no record names a guard")
            for guard in first:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(guard, signal.SIGKILL)
            taken_over = eventually(lambda: bool(guards() - first), seconds=_START_SECONDS)
            job.wait_for_more_ports(2)
            done = job.end()
        require(taken_over, f"no guard took over: {words_of(done.stderr)}")
        require(done.returncode == 0, f"after the guard's end status {done.returncode}: {words_of(done.stderr)}")
        seen = job.seen
        require(seen.reached == 0 or not is_shielded(done.stderr), f"while its guard was killed {seen}")
        with Listening(stranger, node, guarded(peer.ipv4)) as job:
            job.wait_for_more_ports(1)
            job.process.kill()
            job.process.communicate()
            gone = eventually(lambda: JOB not in str(node.processes()), seconds=_CLEAN_SECONDS)
        require(gone, f"after the launcher's end there are {', '.join(node.processes().values())}")
        return f"another guard took over, {seen}; after the launcher's end nothing ran on"


def guards() -> set[int]:
    """Those that the records name; asked for often, and /proc is long when emulated."""
    return {record["guard"] for record in records()}


def records() -> list[dict[str, Any]]:
    """Those of the runs that there are. They are replaced, never half written."""
    found = []
    for file in RECORDS.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found.append(json.loads(file.read_text()))
    return found


def socket(asked: Asked) -> str:
    """The units as they are printed, in a real systemd, for an ordinary user on this machine's own network."""
    if Path("/proc/1/comm").read_text().strip() != "systemd":
        raise No("systemd is not the init of this machine")
    install_units()
    machine = Host("machine", "machine", 9)
    _quietly("ip", "netns", "attach", "machine", "1")
    try:
        with Network("stranger") as network:
            connect_to(network, machine)
            stranger = network["stranger"]
            listed = machine.snapshot()
            alice = ["setpriv", "--reuid=alice", "--regid=alice", "--init-groups", "--reset-env", "--"]
            with Listening(stranger, machine, [*alice, *guarded("192.0.2.1")]) as job:
                job.wait_for_more_ports()
                done = job.end()
            require(done.returncode == 0, f"status {done.returncode}: {words_of(done.stderr)}")
            require("systemd" in done.stderr, f"its guard came another way: {words_of(done.stderr)}")
            job.seen.require_kept(done.stderr)
            as_before = eventually(lambda: machine.snapshot() == listed, seconds=_CLEAN_SECONDS)
            require(as_before, f"left: {'; '.join(differences([listed], [machine.snapshot()]))}")
            return f"alice, by the socket: {job.seen}"
    finally:
        _quietly("ip", "netns", "delete", "machine")


def install_units() -> None:
    _quietly("groupadd", "-f", "securerun")
    subprocess.run(["useradd", "-m", "-G", "securerun", "alice"], check=False, capture_output=True)
    printed = _quietly(str(COMMANDS / "securerunctl"), "setup", "systemd", "--group", "securerun")
    header = "# /etc/systemd/system/"
    for unit in printed.split(header)[1:]:
        Path("/etc/systemd/system", unit.partition(". Made by")[0]).write_text(header + unit)
    _quietly("systemctl", "daemon-reload")
    _quietly("systemctl", "start", "securerun.socket")


def connect_to(network: Network, machine: Host) -> None:
    """The machine's own network gets an eth0 on the bridge."""
    bridge = network.namespaces[0]
    _quietly("ip", "-n", bridge, "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", "machine")
    _quietly("ip", "-n", bridge, "link", "set", "uplink", "master", "br0", "up")
    _quietly("ip", "addr", "add", f"{machine.ipv4}/24", "dev", "eth0")
    _quietly("ip", "addr", "add", f"{machine.ipv6}/64", "dev", "eth0", "nodad")
    _quietly("ip", "link", "set", "eth0", "up")


def tests(asked: Asked) -> str:
    tally = OUT / "tally"
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "kernel_tally",
        "--tb=short",
        *asked.tests,
    ]
    with (OUT / "pytest").open("w") as output:
        process = subprocess.Popen(
            [*WITH_VERSION_2, CHECKOUT / "scripts/isolated.sh", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                "KERNEL_TALLY": str(tally),
                # hypothesis's plugin imports all of hypothesis, which takes half a minute of an emulated processor.
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "PYTHONPATH": str(GROUND),
                "SECURERUN_TESTS_PATIENCE": _PATIENCE,
            },
            cwd=CHECKOUT,
            text=True,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=asked.seconds)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            kill_group(process)
            process.wait()
    return judgement(tally, status, asked.seconds)


def judgement(tally: Path, status: int | None, seconds: float) -> str:
    """Figures of a run of pytest's. Raises No where a test failed or the time was up."""
    ended = [json.loads(line) for line in tally.read_text().splitlines()] if tally.exists() else []
    count = Counter("failed" if one["outcome"] == "error" else one["outcome"] for one in ended)
    failed = [one["test"] for one in ended if one["outcome"] in ("failed", "error")]
    reasons = Counter(one["why"] for one in ended if one["outcome"] == "skipped")
    figures = f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"
    for reason, number in reasons.most_common():
        say(f"skipped {number}: {reason}")
    skips = "".join(f"; skipped {number}: {reason}" for reason, number in reasons.most_common(8))
    if status is None:
        raise No(f"{figures}, and then {seconds:.0f} s were over{skips}")
    if failed:
        names = ", ".join(sorted({name.removeprefix("tests/") for name in failed}))
        raise No(f"{figures}: {names[:1500]}{skips}")
    if status:
        tail = (OUT / "pytest").read_text(errors="replace").strip().splitlines()[-5:]
        raise No(f"{figures}, and pytest ended with status {status}: {' | '.join(tail)}")
    return figures + skips


def net_cls(asked: Asked) -> str:
    """Version 1's net_cls comes into use in the middle of a job, beside it and then in it."""
    report = OUT / "report.json"
    report.unlink(missing_ok=True)
    with hosts() as (node, peer, stranger):
        options = ("--ports", str(PORT), "--report", str(report))
        with Listening(stranger, node, guarded(peer.ipv4, *options)) as job:
            job.wait_for_more_ports(2)
            with classid() as give_it_to:
                job.wait_for_more_ports(4)
                for pid, command in node.processes().items():
                    if JOB in command:
                        give_it_to(pid)
                job.wait_for_more_ports(4)
                # It is said first, and recorded once the host's lock is to be had.
                eventually(lambda: bool(voids_recorded()), seconds=_RECORDED_SECONDS)
                recorded = voids_recorded()
                done = job.end()
        seen, words = job.seen, words_of(done.stderr)
        require(done.returncode == 0, f"status {done.returncode}: {words}")
        require(seen.tried > 0, "the stranger saw no port to try")
        in_time = not seen.planned_reached and seen.opened <= _SEEN_SECONDS + _SLACK_SECONDS
        require(in_time, f"{seen}: {words}")
        shield = what_became_of_the_shield(done.stderr, recorded, report.read_text())
        require(seen.reached == 0 or shield == _LOST, f"{shield}, was said, and {seen}: {words}")
        after = what_is_said_is_true(node, peer, stranger)
        return f"{shield}; {seen}; a job after it: {after}"


def voids_recorded() -> list[str]:
    """Why the shields of the runs that are recorded now hold no more."""
    return [record["void"] for record in records() if record.get("void")]


def what_became_of_the_shield(errors: str, recorded: Sequence[str], report: str) -> str:
    """As the job's own lines say it. Raises No unless the run's record, and its report, say the same."""
    said = "the shield holds no more" in errors and "scope is ports now" in errors
    shield = _LOST if said else _KEPT if is_shielded(errors) else "the job never had a shield"
    for place, says in (("record", bool(recorded)), ("report", "the shield holds no more" in report)):
        require(
            says == said, f"{shield}, says the job, and its {place} says {'that' if says else 'nothing'} of its end"
        )
    return shield


@contextlib.contextmanager
def classid() -> Iterator[Callable[[int], None]]:
    """A cgroup of net_cls with a class, and a process in it; yields what moves another there."""
    lines = (line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    places = [Path(head.split()[4]) for head, tail in lines if tail.startswith("cgroup ") and "net_cls" in tail]
    require(bool(places), "net_cls is not mounted")
    place = places[0] / "somebody"
    place.mkdir()
    unrelated = subprocess.Popen(["sleep", "600"])

    def give_it_to(pid: int) -> None:
        (place / "cgroup.procs").write_text(str(pid))

    try:
        (place / "net_cls.classid").write_text("0x100001")
        give_it_to(unrelated.pid)
        yield give_it_to
    finally:
        unrelated.kill()
        unrelated.wait()
        require(eventually(lambda: _removed(place), seconds=_CLEAN_SECONDS), f"{place} is still in use")


def _removed(place: Path) -> bool:
    with contextlib.suppress(OSError):
        place.rmdir()
    return not place.exists()


def left(asked: Asked) -> str:
    gone = eventually(lambda: not remains(), seconds=_CLEAN_SECONDS)
    require(gone, f"left: {'; '.join(remains())}")
    return "no rule, cgroup, record, reserved port or guard"


def remains() -> list[str]:
    """What there is of securerun's on the machine, wherever its cgroups are mounted or not."""
    found = [f"record {name}" for name in machine_snapshot().records or ()]
    found += [f"cgroup {name}" for name in cgroups_of_version_2() if "securerun-" in name]
    found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob("*/**/securerun-*") if path.is_dir()]
    for tool in ("iptables-save", "ip6tables-save"):
        found += [line for line in _quietly(tool).splitlines() if "SECURERUN" in line.upper()]
    found += [line.strip() for line in _quietly("nft", "list", "tables").splitlines() if "securerun" in line]
    reserved = Path("/proc/sys/net/ipv4/ip_local_reserved_ports").read_text().strip()
    found += [f"reserved ports {reserved}"] if reserved else []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if _GUARD in command.read_text(errors="replace"):
                found.append(f"guard {command.parent.name}")
    return sorted(set(found))


def cgroups_of_version_2() -> list[str]:
    """Where nothing is mounted, a mount that nobody else sees: a guard's own is of the same hierarchy."""
    if cgroup2_mount() is not None:
        return sorted(machine_snapshot().cgroups or ())
    look = "mount -t cgroup2 none /mnt && find /mnt -type d"
    return _quietly("unshare", "--mount", "sh", "-c", look).splitlines()


def _quietly(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    require(done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


PARTS: dict[str, Callable[[Asked], str]] = {
    part.__name__: part for part in (truth, chains, one, two, kills, socket, tests, net_cls, left)
}


def say(words: str) -> None:
    print(words, flush=True)
    _to_console(f"machine: {words}")


def _to_console(line: str) -> None:
    with contextlib.suppress(OSError), Path("/dev/console").open("w") as console:
        console.write(f"{line}\n")


def try_part(name: str, asked: Asked) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        ok, says = True, PARTS[name](asked)
        if name != "left":
            ok, says = (True, says) if eventually(_no_record, seconds=_CLEAN_SECONDS) else (False, "a record is left")
    except No as no:
        ok, says = False, str(no)
    except Exception as error:
        import traceback

        traceback.print_exc(file=sys.stdout)
        ok, says = False, f"{type(error).__name__}: {error}"[:600]
    seconds = round(time.monotonic() - begun, 1)
    say(f"{name}: {'yes' if ok else 'NO'}, {says} ({seconds} s)")
    return {"ok": ok, "says": says, "seconds": seconds}


def _no_record() -> bool:
    return not names_in(RECORDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS))
    parser.add_argument(
        "--torch", action="append", default=[], choices=("one", "two"), help="not light, but torch's own"
    )
    parser.add_argument(
        "--seconds", type=float, default=_RUN_SECONDS, help="for each of torch's runs, and for the tests"
    )
    parser.add_argument("--tests", action="append", default=[])
    options = parser.parse_args()
    os.environ.update(PROBE_WATCH_SECONDS="0.1", PROBE_RETRY_SECONDS="0.5")
    asked = Asked(frozenset(options.torch), options.seconds, tuple(options.tests))
    document: dict[str, Any] = {"release": platform.release(), "machine": platform.machine(), "parts": {}}
    for name in options.parts:
        document["parts"][name] = try_part(name, asked)
        OUT.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document)
        (OUT / "document").write_text(text)
        # A machine that is cut off later has said so much.
        _to_console(f"{DOCUMENT}{text}")


if __name__ == "__main__":
    main()
