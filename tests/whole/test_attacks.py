"""Attacks of an ordinary user on the guard, each with a real user, real sudo and a real socket of systemd's.

Whoever attacks knows all of securerun, speaks to the guard in bytes of his own choice, and may start it as he likes.
Nothing happens to the host, to root or to another user; what he does to his own job is his own affair.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kernel
import pytest
from attacking import Ground, cgroup_of, pid_taken, program, server
from checkout import CHECKOUT
from conversation import WAYS, Conversation, guards, log_of, order
from hosts import eventually, finish, is_alive
from probe import Probe, reach
from process_table import name_of, status_of
from users import CONFIGURATION, GUARD, RECORDS, delegated_cgroup

from securerun.guard.documents import ProtocolError
from securerun.guard.protocol import decode

_CAP_SYS_RESOURCE = 24


# --- what is asked for ---


@pytest.mark.parametrize("way", WAYS)
def test_port_22_and_every_other_of_the_system_is_refused(ground: Ground, way: str) -> None:
    for ports in ([22], [(22, 1024)], [(1, 65535)], [29500, 1023]):
        assert "may not be named" in ground.refusal(ground.alice, order(ports=ports), way)
    for ports in ([0], [65536], [(29501, 29500)], [-1], [2**70]):
        assert "did not understand" in ground.refusal(ground.alice, order(ports=ports), way)


@pytest.mark.parametrize(
    "peers",
    [
        ["0.0.0.0/0"],
        ["::/0"],
        ["0.0.0.0/1", "128.0.0.0/1"],
        ["::ffff:0:0/96"],
        ["8000::/1", "::/1"],
        ["10.0.0.1", "64.0.0.0/2"],
        [f"{first}.0.0.0/8" for first in range(256)],
        [f"{first:x}00::/8" for first in range(256)],
    ],
    ids=lambda peers: ",".join(peers)[:30],
)
def test_the_whole_world_is_no_peer(ground: Ground, peers: list[str]) -> None:
    for way in WAYS:
        assert ground.refusal(ground.alice, order(peers=peers), way)


@pytest.mark.parametrize("way", WAYS)
def test_ten_million_peers_are_refused_before_all_are_heard(ground: Ground, way: str) -> None:
    """As one line without an end: the guard reads no more than its limit, and keeps no more."""
    talk = ground.talk(ground.alice, way)
    guard = talk.hear()["ready"]["pid"]
    talk.say(json.dumps(order()).partition('"peers": [')[0].encode() + b'"peers": [')
    block = b"".join(b'"10.0.%d.%d",' % (number >> 8, number & 255) for number in range(2000))
    peak, sent = 0, 0
    while sent < 10_000_000 and talk.say(block):
        peak, sent = max(peak, _peak_kilobytes(guard)), sent + 2000
    verdict = talk.hear_verdict()
    talk.hang_up()
    assert "more than 8388608 bytes" in str(verdict), verdict
    assert 0 < sent < 1_000_000
    assert 0 < peak < 60_000


def test_one_peer_more_than_the_limit_is_refused(ground: Ground) -> None:
    peers = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(100_001)]
    assert "list of at most 100000" in ground.refusal(ground.alice, order(peers=peers))


_RULE = "\n-A INPUT -j ACCEPT"


@pytest.mark.parametrize(
    "asked",
    [
        {"peers": [f"fe80::1%x{_RULE}/128"]},
        {"peers": ["fe80::1%eth0/128"]},
        {"peers": [f"10.0.0.1{_RULE}"]},
        {"peers": ["10.0.0.1/24"]},
        {"interfaces": [f"eth0{_RULE}"]},
        {"interfaces": ['eth0" accept; } #']},
        {"interfaces": ["eth0 -j ACCEPT"]},
        {"interfaces": ["-o"]},
        {"run_id": f"0123456789a{_RULE}"},
        {"run_id": "../../../../etc/passwd"},
        {"run_id": ""},
        {"command": "train.py\n\x1b[2J"},
        {"command": "\ud800"},
        {"firewall": "/home/alice/iptables"},
        {"scope": "none"},
        {"grace": float("inf")},
        {"grace": -1},
        {"version": 2},
    ],
    ids=str,
)
def test_text_that_is_meant_for_another_program_is_refused(ground: Ground, asked: dict[str, Any]) -> None:
    assert "did not understand" in ground.refusal(ground.alice, order(**asked))
    assert "\n-A" not in log_of(ground.machine) and "\x1b" not in log_of(ground.machine)


def test_purpose_of_a_port_never_reaches_a_rule(ground: Ground) -> None:
    document = order(peers=[ground.peer.ipv4])
    document["order"]["policy"]["ports"][0]["purpose"] = f'x" -j ACCEPT{_RULE}\x1b[2J'
    talk = ground.talk(ground.alice, "socket")
    talk.say(document)
    assert talk.hear_verdict()
    rules = "\n".join(ground.node.snapshot().values())
    talk.hang_up()
    assert "-j ACCEPT" not in rules and "\x1b" not in rules


@pytest.mark.parametrize("field", ["pid", "user", "cgroup", "path", "launcher", "guard", "directory", "argv", "netns"])
def test_orders_cannot_name_a_process_or_a_place(ground: Ground, field: str) -> None:
    """Another user's pid, a cgroup path with `..` or a link: no field takes one, and none is passed over in silence."""
    values: tuple[object, ...] = (1, os.getpid(), "/..", "/sys/fs/cgroup/../../etc", "/proc/1/root", None, [], {})
    for value in values:
        beside, outside, inside, in_port = order(), order(), order(), order()
        beside[field] = value
        outside["order"][field] = value
        inside["order"]["policy"][field] = value
        in_port["order"]["policy"]["ports"][0][field] = value
        for document in (beside, outside, inside, in_port):
            with pytest.raises(ProtocolError):
                decode(json.dumps(document).encode())
    document = order()
    document["order"][field] = values[1]
    assert "did not understand" in ground.refusal(ground.alice, document)


def test_accept_that_opens_what_the_administrator_closed_is_refused(ground: Ground) -> None:
    assert "--accept" in ground.refusal(ground.alice, order(accept=True))


# --- whom the guard serves ---


@pytest.mark.parametrize("new", ["alice", "bob", "root"])
@pytest.mark.parametrize("way", WAYS)
def test_pid_that_is_used_again_before_the_order_is_nobodys(ground: Ground, way: str, new: str) -> None:
    """Its user, or a friend, holds the pipes on; the order comes when the number belongs to another process."""
    user = {"alice": ground.alice.uid, "bob": ground.bob.uid, "root": 0}[new]
    talk = ground.talk(ground.alice, way, apart=True)
    assert talk.hear()["ready"]
    talk.process.kill()
    talk.process.wait()
    with pid_taken(ground, talk.pid, user):
        talk.say(order())
        verdict = talk.hear_verdict()
        talk.hang_up()
    assert "guarding" not in verdict


# That an own later process has the number is seen by the hold alone; another's by its user.
@pytest.mark.parametrize("new", [pytest.param("alice", marks=kernel.needing(kernel.PEER_PIDFDS)), "bob", "root"])
def test_pid_that_is_used_again_before_the_guard_starts_is_nobodys(ground: Ground, new: str) -> None:
    """systemd is slow: whoever connected has ended, and the number is used again, when its guard looks."""
    user = {"alice": ground.alice.uid, "bob": ground.bob.uid, "root": 0}[new]
    place = f"{ground.alice.home}/slow.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(ground.machine.place(place)))
        ground.machine.place(place).chmod(0o666)
        listener.listen()
        talk = Conversation(ground.machine, ground.node, ground.alice, "socket", socket=place, apart=True)
        connection, _ = listener.accept()
        talk.process.kill()
        talk.process.wait()
        with pid_taken(ground, talk.pid, user):
            guard = ground.popen(None, [GUARD, "--socket"], stdin=connection.fileno(), stdout=connection.fileno())
            connection.close()
            talk.say(order())
            verdict = talk.hear_verdict()
            talk.hang_up()
            assert "guarding" not in verdict, verdict
            guard.wait(timeout=20)


@pytest.mark.parametrize("way", WAYS)
def test_process_that_becomes_a_program_of_roots_is_not_served(ground: Ground, way: str) -> None:
    """With its order, the guard would take root's program into a cgroup of the attacker's choice, and end it."""
    rules = [f'{ground.alice.name} ALL=(root) NOPASSWD:NOSETENV: {GUARD} "", /bin/sleep']
    ground.machine.allow_sudo("\n".join(rules))
    talk = ground.talk(ground.alice, way, apart=True, env={"BECOME": "exec sudo -n /bin/sleep 600"})
    assert talk.hear()["ready"]
    before = cgroup_of(talk.pid)
    os.kill(talk.pid, signal.SIGUSR1)
    assert eventually(lambda: name_of(talk.pid) == "sudo")
    talk.say(order())
    verdict = talk.hear_verdict()
    assert is_alive(talk.pid) and cgroup_of(talk.pid) == before
    talk.process.kill()
    talk.hang_up()
    for pid, command in ground.machine.processes().items():
        if command == "/bin/sleep 600":
            os.kill(pid, signal.SIGKILL)
    assert "refused" in verdict, verdict


@pytest.mark.parametrize("separator", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"], ids=ascii)
def test_name_of_a_process_says_nothing_about_its_user(ground: Ground, separator: str) -> None:
    """The name stands in /proc/PID/status above the user ids, and its owner chooses it."""
    for line in ("Uid:\t0\t0", "Gid:\t0"):
        for way in WAYS:
            talk = ground.talk(ground.alice, way, env={"NAME": f"x{separator}{line}"})
            talk.say(order(ports=[22]))
            assert f"user {ground.alice.uid}" in talk.hear_verdict()["refused"]["message"]
            talk.hang_up()


def test_caller_in_another_network_is_refused(ground: Ground) -> None:
    """A guard of the host's cannot close ports of a container, and must not close the host's in their place."""
    talk = Conversation(ground.machine, ground.peer, ground.alice, "socket")
    talk.say(order())
    verdict = talk.hear_verdict()
    talk.hang_up()
    assert "another network namespace" in verdict["refused"]["message"]


def test_guard_by_sudo_takes_no_socket_and_no_word_about_whom_it_serves(ground: Ground) -> None:
    """Who calls through sudo could hand over a socket to which somebody else connected, or another user's id."""
    for more in (["--socket"], ["--help"], ["0"]):
        assert ground.run(ground.alice, ["sudo", "-n", GUARD, *more]).returncode == 1
    assert ground.run(ground.alice, ["sudo", "-n", "SUDO_UID=0", GUARD]).returncode == 1
    ground.machine.allow_sudo(f"alice ALL=(root) NOPASSWD:SETENV: {GUARD}")  # a careless rule
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(json.dumps(order()).encode() + b"\n")
        ours.shutdown(socket.SHUT_WR)
        waiting = ["sh", "-c", 'sudo -n "$0" --socket; exit $?', GUARD]
        guard = ground.popen(ground.alice, waiting, stdin=theirs.fileno(), stdout=theirs.fileno())
        assert guard.wait(timeout=20) == 77
        theirs.close()
        assert "takes no socket" in ours.recv(65536).decode()
    talk = ground.talk(ground.alice, "sudo", env={"SUDO_UID": "0", "SUDO_USER": "root"})
    talk.say(order(ports=[22]))
    assert f"user {ground.alice.uid}" in talk.hear_verdict()["refused"]["message"]
    talk.hang_up()


# --- how the guard is spoken to ---


@pytest.mark.parametrize("way", WAYS)
def test_caller_that_never_closes_its_end_is_known_to_have_ended(ground: Ground, way: str) -> None:
    talk = ground.talk(ground.alice, way, apart=True)
    talk.say(order())
    assert "guarding" in talk.hear_verdict()
    talk.process.kill()
    talk.process.wait()
    assert eventually(lambda: not guards(ground.machine), seconds=5)
    assert eventually(lambda: ground.machine.records() is None, seconds=5)
    talk.hang_up()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("said", [b"", b"{", b'{"order":', b"\n", b"\0" * 100_000], ids=lambda said: repr(said[:10]))
def test_caller_that_closes_its_end_at_once_leaves_nothing(ground: Ground, way: str, said: bytes) -> None:
    talk = ground.talk(ground.alice, way, apart=True)
    talk.say(said)
    assert talk.process.stdin is not None
    talk.process.stdin.close()
    assert eventually(lambda: not guards(ground.machine), seconds=10)
    talk.process.kill()


@pytest.mark.parametrize(
    "said",
    [b"nonsense\n", b'{"report": {}}\n', b'{"peers": {"networks": ["10.77.0.3/8"]}}\n', order(run_id="0123456789ab")],
    ids=["nonsense", "report", "peers", "order"],
)
def test_launcher_that_says_what_it_must_not_is_believed_no_more(ground: Ground, said: bytes | dict[str, Any]) -> None:
    """Its job is guarded to its end, as that of a launcher that is gone."""
    talk = ground.talk(ground.alice, "sudo")
    talk.say(order(peers=[ground.peer.ipv4]))
    assert "guarding" in talk.hear_verdict()
    talk.say(said)
    assert eventually(lambda: "sent what it must not" in log_of(ground.machine))
    talk.say({"peers": {"networks": [ground.stranger.ipv4]}})
    time.sleep(0.2)
    assert "peer networks now" not in log_of(ground.machine)
    talk.hang_up()


@pytest.mark.parametrize("way", WAYS)
def test_peers_that_the_site_forbids_are_not_let_in_later_either(ground: Ground, way: str) -> None:
    ground.machine.configure('peers = ["10.77.0.2/32"]\n')
    target = (ground.node.ipv4, 29500)
    with server(ground, ground.alice, 29500):
        talk = ground.talk(ground.alice, way)
        talk.say(order(peers=[ground.peer.ipv4]))
        assert "guarding" in talk.hear_verdict()
        talk.say({"peers": {"networks": [ground.stranger.ipv4]}})
        (words,) = talk.hear()["notice"]["words"]
        assert ground.stranger.ipv4 in words and "may not be named a peer" in words
        assert "peer networks now" not in log_of(ground.machine)
        assert reach(ground.stranger, [target]) == {target: False}
        assert reach(ground.peer, [target]) == {target: True}
        talk.release()


# The guard's patience is minutes; here it is a second.
_IMPATIENT = """
import sys
sys.path.append(sys.argv[1])
from securerun.guard import server
server._PATIENCE_SECONDS = server._ORDER_SECONDS = 1.0
sys.exit(server.main([]))
"""


@pytest.mark.parametrize("drops", [(), (b"{",), (b"{", *([b" "] * 200))], ids=["nothing", "one byte", "byte by byte"])
def test_caller_that_says_its_order_for_ever_is_not_waited_for(ground: Ground, drops: Sequence[bytes]) -> None:
    command = ["sh", "-c", '"$@"; exit $?', "sh", *program(_IMPATIENT, str(CHECKOUT))]
    guard = ground.popen(None, command, stdin=subprocess.PIPE)
    assert guard.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        for drop in drops:
            os.write(guard.stdin.fileno(), drop)
            time.sleep(0.05)
    assert eventually(lambda: "kept its guard waiting" in log_of(ground.machine), seconds=10)
    assert eventually(lambda: not guards(ground.machine))


def test_caller_that_dawdles_keeps_nobody_else_waiting(ground: Ground) -> None:
    slow = [ground.talk(ground.alice, way) for way in WAYS for _ in range(5)]
    for talk in slow:
        talk.say(b'{"order": {"version"')
    quick = ground.guarded(ground.bob, "sudo")
    quick.release()
    for talk in slow:
        talk.hang_up()


# Starts a guard whose answers go into a pipe that is full and that nobody reads; ends when it is told to.
_DEAF = """
import fcntl, os, subprocess, sys
reading, writing = os.pipe()
fcntl.fcntl(writing, 1031, 4096)  # F_SETPIPE_SZ
os.write(writing, b"x" * 4096)
guard = subprocess.Popen(["sudo", "-n", sys.argv[1]], stdin=subprocess.PIPE, stdout=writing)
guard.stdin.write(sys.argv[2].encode() + b"\\n")
guard.stdin.flush()
sys.stdin.read()
"""


def test_caller_that_never_reads_the_answers_is_guarded_and_forgotten_like_any_other(ground: Ground) -> None:
    deaf = ground.popen(ground.alice, program(_DEAF, GUARD, json.dumps(order())), stdin=subprocess.PIPE)
    assert eventually(lambda: "guarding" in log_of(ground.machine), seconds=20)
    assert "/securerun-" in cgroup_of(deaf.pid)
    assert deaf.stdin is not None
    deaf.stdin.close()
    deaf.wait(timeout=10)


# Shares the guard's input, and takes from it what was meant for the guard, at the moment when the guard looks.
_THIEF = """
import os, select, subprocess, sys, time
reading, writing = os.pipe()
guard = subprocess.Popen(["sudo", "-n", sys.argv[1]], stdin=reading, stdout=subprocess.PIPE)
if not os.fork():
    os.setsid()
    sys.stdin.readline()
    mine = os.open(f"/proc/self/fd/{reading}", os.O_RDONLY | os.O_NONBLOCK)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        os.write(writing, b" ")
        try:
            os.read(mine, 1)
        except BlockingIOError:
            pass
    print("stolen", flush=True)
    time.sleep(600)
os.write(writing, sys.argv[2].encode() + b"\\n")
guard.stdout.readline()
print(guard.stdout.readline().decode(), end="", flush=True)
time.sleep(600)
"""


def test_caller_that_steals_what_he_sent_does_not_hang_the_guard(ground: Ground) -> None:
    """His pipe is his, also the end that the guard reads; one that waited there would see nothing else any more."""
    thief = ground.popen(ground.alice, program(_THIEF, GUARD, json.dumps(order())), stdin=subprocess.PIPE)
    assert thief.stdout is not None and thief.stdin is not None
    assert "guarding" in thief.stdout.readline()
    thief.stdin.write("now\n")
    thief.stdin.flush()
    assert thief.stdout.readline() == "stolen\n"
    thief.kill()
    thief.wait()
    assert eventually(lambda: not guards(ground.machine), seconds=5)


@pytest.mark.parametrize(
    "streams",
    ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-", "</dev/zero", "</dev/null", ">/dev/full </dev/null", "<.", "</dev/full"],
)
def test_guard_without_the_streams_it_needs_does_nothing(ground: Ground, streams: str) -> None:
    started = ground.popen(ground.alice, ["sh", "-c", f'sudo -n "$0" {streams}; exit $?', GUARD])
    started.communicate(timeout=20)
    assert started.returncode in (0, 1, 2, 77, 78), started.returncode


# --- what it is started with ---

_EVIL_C = r"""
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void begin(void) {
    if (geteuid() == 0) close(open("%s/root was here: preload", O_CREAT | O_WRONLY, 0644));
}
"""
_EVIL_PYTHON = """
import os
if os.geteuid() == 0:
    open({place!r} + "/root was here: " + {name!r}, "w").close()
"""
_EVIL_SHELL = """#!/bin/sh
[ "$(/usr/bin/id -u)" = 0 ] && echo > "{place}/root was here: {name}"
exit 0
"""
_MODULES = ("sitecustomize", "usercustomize", "socket", "json", "ctypes", "ipaddress", "re", "securerun")
_PROGRAMS = ("iptables", "iptables-restore", "ip6tables-restore", "nft", "sh", "modprobe", "python3", "sudo", "env")


@pytest.fixture
def evil(ground: Ground, tmp_path: Path) -> dict[str, str]:
    """An environment of alice's in which every name that a program may look up leads to code of hers."""
    home = ground.alice.home
    for name in _MODULES:
        ground.machine.write(f"evil/{name}.py", _EVIL_PYTHON.format(place=home, name=name), owner=ground.alice)
    for name in _PROGRAMS:
        text = _EVIL_SHELL.format(place=home, name=name)
        ground.machine.write(f"evil/{name}", text, owner=ground.alice, mode=0o755)
    source, library = tmp_path / "evil.c", tmp_path / "evil.so"
    source.write_text(_EVIL_C % home)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    for name in ("evil.so", "libxt_comment.so", "libxt_tcp.so", "libnftables.so.1"):
        ground.machine.place(f"{home}/evil/{name}").write_bytes(library.read_bytes())
    return {
        "PYTHONPATH": f"{home}/evil",
        "PYTHONSTARTUP": f"{home}/evil/sitecustomize.py",
        "PYTHONHOME": f"{home}/evil",
        "PYTHONUSERBASE": f"{home}/evil",
        "PYTHONINSPECT": "1",
        "PYTHONBREAKPOINT": "sitecustomize.hook",
        "PATH": f"{home}/evil:/usr/bin:/bin:/usr/sbin:/sbin",
        "LD_PRELOAD": f"{home}/evil/evil.so",
        "LD_LIBRARY_PATH": f"{home}/evil",
        "XTABLES_LIBDIR": f"{home}/evil",
        "GCONV_PATH": f"{home}/evil",
        "MODPROBE_OPTIONS": f"-d {home}/evil",
        "BASH_ENV": f"{home}/evil/sh",
        "ENV": f"{home}/evil/sh",
        "IFS": "/",
        "TMPDIR": f"{home}/evil",
        "SECURERUN_ACCEPT": "true",
        "SUDO_UID": "0",
    }


def _pwned(ground: Ground) -> list[str]:
    return [name for name in os.listdir(ground.machine.place(ground.alice.home)) if name.startswith("root was here")]


@pytest.mark.parametrize("way", WAYS)
def test_environment_has_no_say_in_the_guard(ground: Ground, evil: dict[str, str], way: str) -> None:
    """PYTHONPATH with sitecustomize.py, PATH, LD_PRELOAD with a library, IFS, and a directory full of stand-ins."""
    talk = ground.talk(ground.alice, way, env=evil, cwd=f"{ground.alice.home}/evil")
    answer = talk.hear()
    assert "ready" in answer, (answer, talk.errors(), talk.process.poll())
    guard = answer["ready"]["pid"]
    kept = dict(word.split(b"=", 1) for word in _environ(guard).split(b"\0") if word)
    talk.say(order(peers=[ground.peer.ipv4]))
    assert talk.hear_verdict()["guarding"]["layers"][1]["backend"] == "iptables"
    talk.release()
    assert _pwned(ground) == []
    assert kept == ({b"SUDO_UID": str(ground.alice.uid).encode()} if way == "sudo" else {})


@pytest.mark.parametrize("variable", ["LD_PRELOAD", "PYTHONPATH", "PATH"])
def test_the_stand_ins_would_have_left_a_mark(ground: Ground, evil: dict[str, str], variable: str) -> None:
    """The control: root with one of these variables runs alice's code."""
    look = ["sh", "-c", "exec env iptables"] if variable == "PATH" else [sys.executable, "-c", ""]
    assert _pwned(ground) == []
    ground.machine.run(ground.node, look, env={variable: evil[variable]})
    assert _pwned(ground) != []


def test_roots_own_environment_has_no_say_in_what_the_guard_runs(ground: Ground, evil: dict[str, str]) -> None:
    """Root's PATH may name a directory that others write to; a guard takes programs from the system's places."""
    env = {name: evil[name] for name in ("PATH", "XTABLES_LIBDIR", "MODPROBE_OPTIONS", "SUDO_UID")}
    talk = Conversation(ground.machine, ground.node, None, "direct", env=env)
    talk.say(order(peers=[ground.peer.ipv4]))
    assert talk.hear_verdict()["guarding"]["layers"][1]["backend"] == "iptables"
    talk.release()
    assert _pwned(ground) == []


@pytest.mark.parametrize(
    "before",
    [
        "ulimit -S -t 1",
        "ulimit -t 1",
        "ulimit -S -f 0",
        "ulimit -f 0",
        "ulimit -S -v 300000",
        "ulimit -S -n 20",
        "ulimit -n 20",
        "ulimit -S -s 1000",
        "ulimit -c unlimited",
        "umask 0",
        "trap '' TERM INT HUP QUIT USR1 USR2 ALRM CHLD PIPE XCPU XFSZ SEGV",
        "renice -n 19 $$ > /dev/null; taskset -p 1 $$ > /dev/null; echo 1000 > /proc/self/oom_score_adj",
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_limits_and_signals_of_the_caller_do_not_bind_the_guard(ground: Ground, way: str, before: str) -> None:
    """A guard that a limit ends, or that a signal is kept from, would leave what it installed behind."""
    talk = ground.talk(ground.alice, way, before=before)
    answer = talk.hear()
    if "refused" in answer and not _may_raise_limits():
        assert "limit" in answer["refused"]["message"]
        talk.hang_up()
        return
    guard = answer["ready"]["pid"]
    limits, status = Path(f"/proc/{guard}/limits").read_text(), status_of(guard)
    for limit in ("Max cpu time", "Max file size", "Max address space"):
        assert "unlimited" in next(line for line in limits.splitlines() if line.startswith(limit)), limits
    assert int(status["SigBlk"], 16) == 0
    ignored = int(status["SigIgn"], 16)
    assert not any(ignored >> number - 1 & 1 for number in (signal.SIGALRM, signal.SIGCHLD, signal.SIGXCPU))
    assert status["Umask"] == "0077"
    assert os.getpriority(os.PRIO_PROCESS, guard) == 0
    assert Path(f"/proc/{guard}/oom_score_adj").read_text() == "0\n"
    assert os.sched_getaffinity(guard) == os.sched_getaffinity(0)
    assert Path(f"/proc/{guard}/cwd").readlink() == Path("/")
    talk.say(order(peers=[ground.peer.ipv4]))
    verdict = talk.hear_verdict()
    assert [layer["backend"] for layer in verdict["guarding"]["layers"]][1:] == ["iptables"], verdict
    talk.release()


@pytest.mark.parametrize("way", WAYS)
def test_guard_holds_no_privilege_that_it_does_not_need(ground: Ground, way: str) -> None:
    talk = ground.guarded(ground.alice, way)
    (guard,) = guards(ground.machine)
    status = status_of(guard)
    # capabilities(7): DAC_OVERRIDE, KILL, NET_ADMIN, NET_RAW, SYS_PTRACE, SYS_ADMIN, SYS_RESOURCE, BPF
    needed = sum(1 << number for number in (1, 5, 12, 13, 19, 21, 24, 39))
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status[name], 16) & ~needed == 0, (name, status[name])
    assert (status["CapInh"], status["CapAmb"]) == ("0" * 16, "0" * 16)
    assert status["NoNewPrivs"] == "1"
    assert set(status["Groups"].split()) <= {"0"}
    talk.release()


# --- ending it ---

_EACH_SIGNAL = """
import os, signal, sys
refused = 0
for pid in map(int, sys.argv[1:]):
    for number in signal.valid_signals():
        try:
            os.kill(pid, number)
        except PermissionError:
            refused += 1
    for name in ("mem", "environ", "fd/0", "root", "cwd"):
        try:
            os.readlink(f"/proc/{pid}/{name}") if "/" in name or len(name) > 3 and name != "environ" else None
            open(f"/proc/{pid}/{name}", "rb").close()
            print("opened", name)
        except PermissionError:
            refused += 1
print(refused)
"""


@pytest.mark.parametrize("way", WAYS)
def test_user_cannot_signal_or_look_into_his_own_guard(ground: Ground, way: str) -> None:
    talk = ground.guarded(ground.alice, way)
    (guard,) = guards(ground.machine)
    done = ground.run(ground.alice, program(_EACH_SIGNAL, str(guard)))
    assert done.stdout == f"{len(signal.valid_signals()) + 5}\n", done
    assert is_alive(guard)
    talk.release()


@pytest.mark.parametrize("way", WAYS)
def test_guard_outlives_everything_that_its_user_can_kill(ground: Ground, way: str) -> None:
    """`kill -9 -1`, which takes the sudo in between as well, and `pkill -9 python`, with which some scripts begin."""
    talk = ground.guarded(ground.alice, way)
    (guard,) = guards(ground.machine)
    ground.run(ground.alice, ["sh", "-c", "pkill -9 -f -x '.*securerun.*'; pkill -9 guard; kill -9 -1"])
    assert talk.process.wait(timeout=10) == -signal.SIGKILL
    assert eventually(lambda: not is_alive(guard), seconds=5)
    assert log_of(ground.machine).count(": released") == 1


def test_sudo_that_is_killed_at_any_moment_leaves_nothing(ground: Ground) -> None:
    """The process of sudo's that waits for the guard can be killed by the user who called it."""
    for moment in range(12):
        talk = ground.talk(ground.alice, "sudo")
        talk.say(order())
        time.sleep(moment * 0.02)
        ground.run(ground.alice, ["pkill", "-9", "-x", "sudo"])
        talk.hear_verdict()
        talk.hang_up()


# A subtree's owner can write everything in the directories that he made himself, cgroup.kill and cgroup.freeze too.
_MOVE_INWARDS = 'mkdir "$C/inner"; echo $$ > "$C/inner/cgroup.procs"'


@kernel.needing(kernel.KILLING_CGROUPS, kernel.FREEZING_CGROUPS)
@pytest.mark.parametrize("way", WAYS)
def test_cgroup_that_is_delegated_to_the_user_does_not_hold_the_guard(ground: Ground, way: str) -> None:
    """In his own subtree a user may freeze and kill root's processes: the guard is not there."""
    with delegated_cgroup(ground.alice) as cgroup:
        talk = ground.talk(ground.alice, way, before=_MOVE_INWARDS, cgroup=cgroup, env={"C": str(cgroup.path)})
        talk.say(order())
        assert "guarding" in talk.hear_verdict()
        (guard,) = guards(ground.machine)
        assert f"/{cgroup.path.name}" in cgroup_of(talk.pid)
        assert f"/{cgroup.path.name}" not in cgroup_of(guard)
        take = f"mkdir {cgroup.path}/trap; echo {guard} > {cgroup.path}/trap/cgroup.procs"
        assert ground.run(ground.alice, ["sh", "-c", take]).returncode != 0
        for text in ("1 > $C/inner/cgroup.freeze", "0 > $C/inner/cgroup.freeze", "1 > $C/inner/cgroup.kill"):
            assert ground.run(ground.alice, ["sh", "-c", f"echo {text}"], env={"C": str(cgroup.path)}).returncode == 0
            time.sleep(0.1)
        assert talk.process.wait(timeout=10) == -signal.SIGKILL
        assert eventually(lambda: not is_alive(guard), seconds=5)
    assert log_of(ground.machine).count(": released") == 1


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("cgroup.kill", marks=kernel.needing(kernel.KILLING_CGROUPS)),
        pytest.param("cgroup.freeze", marks=kernel.needing(kernel.FREEZING_CGROUPS)),
    ],
)
def test_guard_that_is_killed_while_it_starts_leaves_nothing(ground: Ground, what: str) -> None:
    """Until it has left the user's subtree a guard can be stopped there; until then it has done nothing."""
    for moment in range(10):
        with delegated_cgroup(ground.alice) as cgroup:
            env = {"C": str(cgroup.path)}
            talk = ground.talk(ground.alice, "sudo", before=_MOVE_INWARDS, cgroup=cgroup, env=env)
            talk.say(order())
            time.sleep(moment * 0.02)
            do = f"while ! echo 1 > $C/inner/{what}; do :; done; sleep 0.1; echo 0 > $C/inner/cgroup.freeze"
            assert ground.run(ground.alice, ["sh", "-c", do], env=env).returncode == 0
            talk.hear_verdict()
            talk.hang_up()


# --- cgroups that the caller is in ---


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "x (deleted)",
        "0::",
        "..x",
        "...",
        "-n",
        "$(id)",
        "x\\040y",
        "\x1b[2Jx",
        "\udcff\udcfe",
        "ü" * 100,
        "x\x0c0::",
        "x\r0::",
        "x\x850::",
        "x\u20280::",
        "securerun-0123456789ab",
        "securerun-0123456789ab (deleted)",
        "cgroup.procs.x",
    ],
    ids=ascii,
)
def test_name_of_the_callers_cgroup_is_only_a_name(ground: Ground, name: str) -> None:
    """He names the directories of his own subtree; the guard's is made in the one he is in, or nothing happens."""
    with delegated_cgroup(ground.alice) as cgroup:
        before = 'mkdir -- "$C/$N" && echo $$ > "$C/$N/cgroup.procs"'
        talk = ground.talk(ground.alice, "socket", before=before, cgroup=cgroup, env={"C": str(cgroup.path), "N": name})
        talk.say(order(run_id="0123456789ab"))
        verdict = talk.hear_verdict()
        there = os.fsencode(f"/{cgroup.path.name}/{name}/securerun-0123456789ab")
        place = Path(f"/proc/{talk.pid}/cgroup").read_bytes()
        assert "guarding" in verdict or "refused" in verdict, (verdict, log_of(ground.machine))
        if "shield" in str(verdict):
            assert there in place
        talk.hang_up()
    assert "\x1b" not in log_of(ground.machine)


# Takes away the guard's directory, and puts one of the user's own in its place, as fast as it can.
_SWAP = """
import os, sys, time
place = sys.argv[1]
swapped = 0
print(flush=True)
end = time.monotonic() + 20
while time.monotonic() < end and os.path.isdir(os.path.dirname(place)):
    try:
        os.rmdir(place)
        os.mkdir(place)
        os.rmdir(place)
    except OSError:
        pass
"""


def test_directory_that_is_swapped_under_the_guard_shields_nobody_by_mistake(ground: Ground) -> None:
    for _ in range(10):
        run_id = secrets.token_hex(6)
        with delegated_cgroup(ground.alice) as cgroup:
            swapper = ground.popen(ground.alice, program(_SWAP, f"{cgroup.path}/securerun-{run_id}"))
            assert swapper.stdout is not None
            swapper.stdout.readline()
            talk = ground.talk(ground.alice, "socket", cgroup=cgroup)
            talk.say(order(run_id=run_id))
            verdict = talk.hear_verdict()
            if "shield" in str(verdict.get("guarding", {}).get("layers")):
                assert cgroup_of(talk.pid).endswith(f"/securerun-{run_id}")
                assert (cgroup.path / f"securerun-{run_id}").stat().st_uid == 0
            assert "guarding" in verdict or "refused" in verdict, (verdict, log_of(ground.machine))
            talk.hang_up()
            swapper.kill()
            swapper.wait()


# Removes a directory as soon as it may.
_REMOVE = """
import os, sys
print(flush=True)
while True:
    try:
        os.rmdir(sys.argv[1])
        sys.exit()
    except FileNotFoundError:
        sys.exit()  # the guard was first
    except OSError:
        pass
"""


@pytest.mark.parametrize("way", WAYS)
def test_directory_that_its_user_removes_as_soon_as_it_is_empty_leaves_nothing_else(ground: Ground, way: str) -> None:
    """As a batch system does which tidies up its own tree."""
    for _ in range(3):
        run_id = secrets.token_hex(6)
        with delegated_cgroup(ground.alice) as cgroup:
            talk = ground.talk(ground.alice, way, cgroup=cgroup)
            talk.say(order(run_id=run_id))
            assert "guarding" in talk.hear_verdict()
            remover = ground.popen(ground.alice, program(_REMOVE, f"{cgroup.path}/securerun-{run_id}"))
            assert remover.stdout is not None
            remover.stdout.readline()
            talk.hang_up()
            remover.wait(timeout=10)


# bpf(2) with a descriptor of the cgroup: detach, query, and look for programs by id.
_DETACH = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, data):
    data = ctypes.create_string_buffer(data, 128)
    return libc.syscall(321 if os.uname().machine == "x86_64" else 280, command, data, 128)
found = 0
directory = 3
for kind in (0, 1):  # BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET_EGRESS
    for program in (0, *range(3, 64)):
        found += bpf(9, struct.pack("=IIII", directory, program, kind, 0)) == 0  # BPF_PROG_DETACH
        found += bpf(8, struct.pack("=IIII", directory, program, kind, 2)) == 0  # BPF_PROG_ATTACH, ALLOW_MULTI
    found += bpf(16, struct.pack("=II", directory, kind)) == 0  # BPF_PROG_QUERY
for number in range(1, 5000):
    for command in (13, 14, 30):  # BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID, BPF_LINK_GET_FD_BY_ID
        found += bpf(command, struct.pack("=III", number, 0, 0)) >= 0
for name in ("cgroup.procs", "cgroup.kill", "cgroup.freeze", "cgroup.subtree_control", "cgroup.type"):
    try:
        os.close(os.open(name, os.O_WRONLY, dir_fd=directory))
        found += 1
    except OSError:
        pass
print(found)
"""


@pytest.mark.parametrize("way", WAYS)
def test_shield_cannot_be_detached_by_its_user(ground: Ground, way: str) -> None:
    """Not even where he has a descriptor of the job's cgroup and owns the directory above it."""
    if way == "socket":
        ground.machine.allow_sudo("# nobody")
    with delegated_cgroup(ground.alice) as cgroup:
        job = ground.holder(ground.alice, "--peers", ground.peer.ipv4, "--firewall", "off", cgroup=cgroup)
        target = (ground.node.ipv4, 60000)
        with Probe(ground.stranger, ground.node) as probe:
            assert eventually(lambda: target in probe.tried)
            descriptor = os.open(cgroup.path / f"securerun-{job.run_id}", os.O_RDONLY | os.O_DIRECTORY)
            for user in (ground.alice, ground.bob):
                command = ["sh", "-c", 'exec "$@" 3<&0 < /dev/null', "sh", *program(_DETACH)]
                detaching = ground.popen(user, command, stdin=descriptor)
                done = finish(detaching)
                assert done.stdout == "0\n", done
            os.close(descriptor)
            assert reach(ground.peer, [target]) == {target: True}
        assert probe.reached == set()
        job.let_go()


# --- other users ---


@pytest.mark.parametrize("way", WAYS)
def test_run_of_another_user_cannot_be_taken_over_by_its_id(ground: Ground, way: str) -> None:
    """The id is no secret: it is in the rules, and on the other's terminal."""
    target = (ground.node.ipv4, 60000)
    bobs = ground.holder(ground.bob, "--peers", ground.peer.ipv4)
    for adopt in (False, True):
        talk = ground.talk(ground.alice, way)
        talk.say(order(run_id=bobs.run_id, peers=[ground.stranger.ipv4], adopt=adopt))
        assert "refused" in talk.hear_verdict()
        talk.hang_up()
    assert reach(ground.stranger, [target]) == {target: False}
    assert reach(ground.peer, [target]) == {target: True}
    bobs.let_go()


def test_run_cannot_be_taken_over_while_its_guard_is_being_replaced(ground: Ground) -> None:
    target = (ground.node.ipv4, 60000)
    with Probe(ground.stranger, ground.node) as probe:
        bobs = ground.holder(ground.bob, "--peers", ground.peer.ipv4)
        assert eventually(lambda: target in probe.tried)
        talks = [ground.talk(ground.alice, "socket") for _ in range(8)]
        for talk in talks:
            assert talk.hear()["ready"]
        os.kill(_record(ground, bobs.run_id)["guard"], signal.SIGKILL)
        for talk in talks:
            talk.say(order(run_id=bobs.run_id, peers=[ground.stranger.ipv4], adopt=True))
        for talk in talks:
            assert "refused" in talk.hear_verdict()
            talk.hang_up()
        assert eventually(lambda: _record(ground, bobs.run_id)["guard"] in guards(ground.machine))
        assert reach(ground.peer, [target]) == {target: True}
        bobs.let_go()
    assert probe.reached == set()


def test_users_cannot_see_or_end_each_others_runs(ground: Ground) -> None:
    bobs = ground.holder(ground.bob)
    look = f"ls {RECORDS}; cat {RECORDS}/*.json; touch {RECORDS}/x; rm -rf {RECORDS}; cat /var/log/securerun.log"
    done = ground.run(ground.alice, ["sh", "-c", look])
    assert done.stdout == "", done
    place = f"/sys/fs/cgroup/unified/securerun-{bobs.run_id}"
    end = f"kill -9 {bobs.process.pid}; rmdir {place}; echo 1 > {place}/cgroup.kill; echo 1 > {place}/cgroup.freeze"
    assert ground.run(ground.alice, ["sh", "-c", end], env={"SECURERUN_RUN_ID": bobs.run_id}).returncode != 0
    assert bobs.process.poll() is None
    assert ground.machine.runs() == {f"{bobs.run_id}.json"}
    bobs.let_go()
    assert ground.machine.place("/var/log/securerun.log").stat().st_mode & 0o777 == 0o640


def test_no_user_has_more_runs_than_the_site_allows(ground: Ground) -> None:
    ground.machine.configure("runs_per_user = 2\n")
    talks = [ground.guarded(ground.alice, way) for way in WAYS]
    for way in WAYS:
        third = ground.talk(ground.alice, way)
        third.say(order())
        assert "which allows 2" in third.hear_verdict()["refused"]["message"]
        third.hang_up()
    talks += [ground.guarded(ground.bob, "socket")]
    for talk in talks:
        talk.release()
    assert eventually(lambda: ground.machine.records() is None)
    ground.guarded(ground.alice, "sudo").release()


def test_many_runs_asked_for_at_once_are_counted_one_by_one(ground: Ground) -> None:
    ground.machine.configure("runs_per_user = 2\n")
    talks = [ground.talk(ground.alice, "socket") for _ in range(8)]
    for talk in talks:
        assert talk.hear()["ready"]
    for talk in talks:
        talk.say(order())
    verdicts = [talk.hear_verdict() for talk in talks]
    for talk in talks:
        talk.hang_up()
    assert sum("guarding" in verdict for verdict in verdicts) == 2, verdicts


def test_many_peers_of_one_user_do_not_keep_another_waiting(ground: Ground) -> None:
    """Neither while they are installed nor, which took longest once, while they are removed rule by rule."""
    peers = [f"10.{number >> 7}.{(number & 127) * 2}.1" for number in range(1000)]
    alices = [ground.talk(ground.alice, "sudo") for _ in range(4)]
    for number, talk in enumerate(alices):
        talk.say(order(peers=peers, ports=[29500 + number]))
    bobs = ground.guarded(ground.bob, "sudo", ports=[40000])
    for talk in alices:
        assert "guarding" in talk.hear_verdict()
        talk.release()
    assert eventually(lambda: len(guards(ground.machine)) == 1, seconds=5)
    bobs.release()


def test_more_peers_than_the_site_allows_are_refused(ground: Ground) -> None:
    peers = [f"10.{number >> 7}.{(number & 127) * 2}.1" for number in range(5000)]
    assert "peers" in ground.refusal(ground.alice, order(peers=peers))


@pytest.mark.parametrize("address", ["", "10.77.0.1"])
def test_port_that_somebody_else_serves_on_is_not_closed(ground: Ground, address: str) -> None:
    target = (ground.node.ipv4, 8080)
    for user in (ground.bob, None):
        with server(ground, user, 8080, address):
            for way in WAYS:
                assert "is in use by user" in ground.refusal(ground.alice, order(ports=[(8000, 8100)]), way)
            assert reach(ground.stranger, [target]) == {target: True}
    with server(ground, ground.bob, 8080, "127.0.0.1"), server(ground, ground.alice, 8081):
        ground.guarded(ground.alice, "sudo", ports=[(8080, 8081)]).release()


def test_jobs_of_two_users_with_one_range_of_ports_do_not_disturb_each_other(ground: Ground) -> None:
    first, second = (ground.node.ipv4, 60000), (ground.node.ipv4, 60001)
    alices = ground.holder(ground.alice, "--peers", ground.peer.ipv4)
    bobs = ground.holder(ground.bob, "--peers", ground.stranger.ipv4, "--listen", "60001")
    assert reach(ground.peer, [first, second]) == {first: True, second: False}
    assert reach(ground.stranger, [first, second]) == {first: False, second: True}
    alices.let_go()
    assert reach(ground.peer, [first, second]) == {first: False, second: False}
    bobs.let_go()


@pytest.mark.parametrize("bare_first", [True, False])
def test_peers_of_one_user_are_not_let_to_a_job_of_another_that_has_no_shield(ground: Ground, bare_first: bool) -> None:
    """The pass rules of all runs come before any drop, so a run's peers pass for its ports whosoever they are."""
    bare = order(scope="ports", peers=[ground.peer.ipv4])
    shielded = order(peers=[ground.stranger.ipv4])
    first, second = (bare, shielded) if bare_first else (shielded, bare)
    bobs, alices = ground.talk(ground.bob, "sudo"), ground.talk(ground.alice, "sudo")
    bobs.say(first)
    assert "guarding" in bobs.hear_verdict()
    alices.say(second)
    assert "choose other ports" in alices.hear_verdict()["refused"]["message"]
    alices.hang_up()
    bobs.release()


def test_port_that_appears_later_does_not_let_peers_to_another_users_job(ground: Ground) -> None:
    """In scope `ports` a guard closes each new port of its job: to all but that job's own peers."""
    target = (ground.node.ipv4, 60000)
    with Probe(ground.stranger, ground.node) as probe:
        bobs = ground.holder(ground.bob, "--scope", "ports", "--peers", ground.peer.ipv4)
        assert eventually(lambda: target in probe.tried)
        alices = ground.talk(
            ground.alice, "sudo", before=f"{sys.executable} -I -c '{_LISTEN_ON_IPV6}' {ground.node.ipv6} 60000 &"
        )
        alices.say(order(scope="ports", ports=[29500], peers=[ground.stranger.ipv4]))
        assert alices.hear_verdict()
        time.sleep(2)  # a look at the job's listeners every 0.2 s
        alices.hang_up()
        bobs.let_go()
    assert target not in probe.reached


_LISTEN_ON_IPV6 = """
import socket, sys, time
time.sleep(1)
server = socket.socket(socket.AF_INET6)
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind((sys.argv[1], int(sys.argv[2])))
server.listen()
time.sleep(600)
"""


# --- what is found on the disk ---


@contextlib.contextmanager
def planted(ground: Ground, commands: str) -> Iterator[None]:
    """Root's own commands in the block's place of records, which is removed afterwards."""
    done = ground.machine.run(ground.node, ["sh", "-ec", commands])
    assert done.returncode == 0, done
    yield
    ground.machine.run(ground.node, ["rm", "-rf", RECORDS])


@pytest.mark.parametrize(
    "plant",
    [
        f"ln -s {{home}} {RECORDS}",
        f"mkdir {RECORDS}; chown alice {RECORDS}",
        f"mkdir {RECORDS}; chmod 777 {RECORDS}",
        f"mkdir {RECORDS}; chmod 770 {RECORDS}; chgrp alice {RECORDS}",
        f"touch {RECORDS}",
        f"mkfifo {RECORDS}",
    ],
)
def test_records_in_a_place_that_others_control_are_not_used(ground: Ground, plant: str) -> None:
    with planted(ground, plant.format(home=ground.alice.home)):
        for way in WAYS:
            assert RECORDS in ground.refusal(ground.alice, order(), way)
        assert not [name for name in os.listdir(ground.machine.place(ground.alice.home)) if "json" in name]


_PLANTED = {
    "a link to a file of root's": "ln -s /etc/precious {record}",
    "a link in the place of what is being written": "ln -s /etc/precious {partial}",
    "a fifo": "mkfifo {record} {partial}",
    "a directory": "mkdir -p {record}/x {partial}/x",
    "a device": "mknod {record} c 1 5",
    "a file of 100 MB": "truncate -s 100M {record}",
    "deep JSON": "head -c 100000 /dev/zero | tr '\\0' '[' > {record}",
    "half a record": 'echo \'{{"policy": {{"run_id"\' > {record}',
    "no text": "head -c 4096 /dev/urandom > {record}",
}


@pytest.mark.parametrize("what", _PLANTED)
@pytest.mark.parametrize("own", [True, False], ids=["of this run", "of another"])
def test_what_is_planted_among_the_records_is_neither_followed_nor_believed(
    ground: Ground, what: str, own: bool
) -> None:
    """However it came there: a full disk, another version, an administrator's mistake."""
    ground.machine.write("/etc/precious", "precious\n")
    run_id = "0123456789ab"
    names = {"record": f"{RECORDS}/{run_id}.json", "partial": f"{RECORDS}/.{run_id}.json.partial"}
    with planted(ground, f"mkdir -m 700 {RECORDS}; {_PLANTED[what].format(**names)}"):
        for way in WAYS:
            talk = ground.talk(ground.alice, way)
            talk.say(order(run_id=run_id if own else None))
            verdict = talk.hear_verdict()
            assert "guarding" in verdict or "refused" in verdict, (verdict, log_of(ground.machine))
            talk.hang_up()
            assert eventually(lambda: not guards(ground.machine))
        assert ground.machine.place("/etc/precious").read_text() == "precious\n"


@pytest.mark.parametrize("cgroup", ["/", "/..", "/{bobs}", "/{bobs}/../{bobs}", "/../{bobs}/securerun-0123456789ab"])
def test_record_that_names_a_cgroup_of_others_does_not_end_what_is_in_it(ground: Ground, cgroup: str) -> None:
    with delegated_cgroup(ground.bob) as bobs:
        process = ground.popen(ground.bob, ["sleep", "600"], cgroup=bobs)
        assert eventually(lambda: name_of(process.pid) == "sleep")
        talk = ground.guarded(ground.alice, "sudo")
        (name,) = ground.machine.runs()
        record = json.loads(ground.machine.place(f"{RECORDS}/{name}").read_text())
        talk.release()
        assert eventually(lambda: ground.machine.records() is None)
        record["policy"]["run_id"], record["cgroup"] = "0123456789ab", cgroup.format(bobs=bobs.path.name)
        hostile = ground.machine.write("/etc/securerun/record", json.dumps(record))
        with planted(ground, f"mkdir -m 700 {RECORDS}; cp {hostile} {RECORDS}/0123456789ab.json"):
            ground.guarded(ground.alice, "sudo").release()
            assert eventually(lambda: not guards(ground.machine))
        assert bobs.path.is_dir() and cgroup_of(process.pid) == f"/{bobs.path.name}"
        assert process.poll() is None
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "spoil",
    [
        f"chown alice {CONFIGURATION}",
        f"chmod 666 {CONFIGURATION}",
        f"chgrp alice {CONFIGURATION}; chmod 664 {CONFIGURATION}",
        "chown alice /etc/securerun",
        "chmod 777 /etc/securerun",
        f"mv {CONFIGURATION} {{home}}/mine; ln -s {{home}}/mine {CONFIGURATION}",
        "mv /etc/securerun {home}/mine; ln -s {home}/mine /etc/securerun",
    ],
)
def test_site_policy_that_another_than_root_could_write_is_ignored_and_said_so(ground: Ground, spoil: str) -> None:
    ground.machine.configure('ports = ["1-65535"]\npeers = ["0.0.0.0/0", "::/0"]\naccept = true\n')
    ground.guarded(ground.alice, "sudo", ports=[1023]).release()
    assert eventually(lambda: ground.machine.records() is None)
    ground.machine.run(ground.node, ["sh", "-ec", spoil.format(home=ground.alice.home)])
    for way in WAYS:
        assert "may not be named" in ground.refusal(ground.alice, order(ports=[1023]), way)
    assert log_of(ground.machine).count(f"{CONFIGURATION} is ignored") == len(WAYS)


# --- what tests look at ---


def _record(ground: Ground, run_id: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(ground.machine.place(f"{RECORDS}/{run_id}.json").read_text())
    return document


def _environ(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def _peak_kilobytes(pid: int) -> int:
    """The most memory that a process has had; 0 when it has gone."""
    with contextlib.suppress(OSError, KeyError):
        return int(status_of(pid)["VmHWM"].split()[0])
    return 0


def _may_raise_limits() -> bool:
    return bool(int(status_of(os.getpid())["CapEff"], 16) >> _CAP_SYS_RESOURCE & 1)
