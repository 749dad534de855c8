"""Host files that change while the job runs: who is added may connect, and what is no host file changes nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, finish, finish_all
from probe import reach

from securerun.errors import PolicyError
from securerun.job import hostfile, peers, renewal
from securerun.job.job import Endpoint, Job
from securerun.job.peers import Peers
from securerun.job.renewal import Renewal
from securerun.options import Options

JOB = Job("static", Endpoint("10.0.0.1", 29500), 2, 2, 0, ("train.py",))
NAMES = {"node1": ["10.0.0.11"], "node2": ["10.0.0.12"]}


def resolve(name: str) -> list[str]:
    if name not in NAMES:
        raise OSError("no such name")
    return NAMES[name]


class Watched:
    """A job whose peers are in a host file, which is looked at again at once instead of after seconds."""

    def __init__(self, text: str) -> None:
        self.found = peers.find_peers(Options(peers=text), JOB, resolve, {})
        self.changes: list[Peers] = []
        self.said: list[str] = []
        self.renewal = Renewal(self.found, lambda _, now: self.changes.append(now), self.said.append)

    @property
    def addresses(self) -> set[str]:
        """Who may connect now."""
        return {str(network) for network in (self.changes or [self.found])[-1].listed}


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    again = peers.again
    monkeypatch.setattr(peers, "again", lambda found: again(found, resolve))
    for name in ("LEAST_SECONDS", "_SETTLING_SECONDS"):
        monkeypatch.setattr(renewal, name, 0.02)
    monkeypatch.setattr(renewal, "MOST_SECONDS", 0.04)
    monkeypatch.setattr(renewal, "_SECONDS_A_NAME", 0.0)


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("10.0.0.1\n")
    return path


@pytest.fixture
def watched(hosts: Path) -> Iterator[Watched]:
    made = Watched(f"@{hosts}")
    with made.renewal:
        yield made


ONE, TWO = {"10.0.0.1/32"}, {"10.0.0.1/32", "10.0.0.2/32"}


def test_a_line_that_is_added_counts(watched: Watched, hosts: Path) -> None:
    with hosts.open("a") as file:
        file.write("10.0.0.2\nnode1\n")
    assert eventually(lambda: watched.addresses == {*TWO, "10.0.0.11/32"})
    assert watched.said == []


def test_a_line_that_is_taken_away_does_not_count_any_more(watched: Watched, hosts: Path) -> None:
    hosts.write_text("10.0.0.1\nnode1\n")
    assert eventually(lambda: watched.addresses == {*ONE, "10.0.0.11/32"})
    hosts.write_text("10.0.0.1\n")
    assert eventually(lambda: watched.addresses == ONE)


def test_a_file_that_is_put_in_its_place_counts(watched: Watched, hosts: Path, tmp_path: Path) -> None:
    other = tmp_path / "new"
    other.write_text("10.0.0.1\n10.0.0.2\n")
    other.rename(hosts)
    assert eventually(lambda: watched.addresses == TWO)


def test_what_a_link_leads_to_now_counts(tmp_path: Path) -> None:
    for name, text in (("old", "10.0.0.1\n"), ("new", "10.0.0.1\n10.0.0.2\n")):
        (tmp_path / name).write_text(text)
    link = tmp_path / "hosts"
    link.symlink_to("old")
    made = Watched(f"@{link}")
    with made.renewal:
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(link)
        assert eventually(lambda: made.addresses == TWO)


def test_the_directory_that_the_job_goes_to_is_not_where_the_file_is(
    hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hosts.parent)
    made = Watched("@hosts")
    with made.renewal:
        monkeypatch.chdir("/")
        hosts.write_text("10.0.0.1\n10.0.0.2\n")
        assert eventually(lambda: made.addresses == TWO)


def broken(hosts: Path, how: str) -> None:
    if how == "fifo":
        os.mkfifo(hosts.with_name("fifo"))
        hosts.with_name("fifo").rename(hosts)
    elif how == "directory":
        hosts.unlink()
        hosts.mkdir()
    elif how == "gone":
        hosts.unlink()
    elif how == "large":
        with hosts.open("ab") as file:
            file.truncate(hostfile.MOST_BYTES + 1)
    else:
        hosts.write_text(how)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("", "names no host"),
        ("# nobody\n", "names no host"),
        ("10.0.0.1\n10.0.0.\n", "line 2"),
        ("10.0.0.1\n10.0.0.2 and others\n", "no name=value"),
        ("10.0.0.1\nany\n", "'any' is no host"),
        ("10.0.0.1\n0.0.0.0/0\n", "every host"),
        ("0.0.0.0/1\n128.0.0.0/1\n", "together are every host"),
        ("10.0.0.1\nnode[0-999999]\n", "node[0-999999]"),
        ("10.0.0.1\n\0", "no text"),
        ("large", "larger than 16 MB"),
        ("gone", "No such file"),
        ("directory", "no regular file"),
        ("fifo", "no regular file"),
    ],
)
def test_what_is_no_host_file_changes_nothing_and_is_said_once(
    watched: Watched, hosts: Path, how: str, words: str
) -> None:
    broken(hosts, how)
    assert eventually(lambda: bool(watched.said))
    time.sleep(0.2)
    (line,) = watched.said
    assert line.startswith(f"--peers @{hosts}") and words in line, line
    assert line.endswith("; until that is right, the peers stay as they are")
    assert watched.changes == []


def test_a_file_that_is_right_again_counts(watched: Watched, hosts: Path) -> None:
    hosts.write_text("")
    assert eventually(lambda: bool(watched.said))
    hosts.write_text("10.0.0.1\n10.0.0.2\n")
    assert eventually(lambda: watched.addresses == TWO)


def test_what_is_written_just_now_does_not_count(
    watched: Watched, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10.0.0.12, the first part may have been written: another host's address."""
    monkeypatch.setattr(renewal, "_SETTLING_SECONDS", 0.5)
    hosts.write_text("10.0.0.1\n10.0.0.2")
    time.sleep(0.25)
    with hosts.open("a") as file:
        file.write("2\n")
    assert eventually(lambda: watched.addresses == {"10.0.0.1/32", "10.0.0.22/32"})
    assert len(watched.changes) == 1


def test_what_the_list_itself_names_stays(hosts: Path) -> None:
    hosts.write_text("10.0.0.1\nnode1\n10.0.0.7\n")
    made = Watched(f"node1,10.0.0.7,@{hosts}")
    with made.renewal:
        hosts.write_text("10.0.0.1\n10.0.0.2\n")
        assert eventually(lambda: made.addresses == {*TWO, "10.0.0.7/32", "10.0.0.11/32"})


def test_a_new_name_without_an_address_is_asked_for_again(
    watched: Watched, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts.write_text("10.0.0.1\n10.0.0.2\nnode9\n")
    assert eventually(lambda: watched.addresses == TWO)
    monkeypatch.setitem(NAMES, "node9", ["10.0.0.19"])
    assert eventually(lambda: watched.addresses == {*TWO, "10.0.0.19/32"})


def test_a_batch_systems_file_is_read_again_too(hosts: Path) -> None:
    found = peers.find_peers(Options(), JOB, resolve, {"PBS_NODEFILE": str(hosts)})
    changes: list[Peers] = []
    said: list[str] = []
    with Renewal(found, lambda _, now: changes.append(now), said.append):
        hosts.write_text("10.0.0.1\n10.0.0.2\n")
        assert eventually(lambda: [set(map(str, now.listed)) for now in changes] == [TWO])
        hosts.write_text("10.0.0.1\n10.0.0.0/8\n")
        assert eventually(lambda: "10.0.0.0/8 is a network, not a node" in "".join(said))
    assert len(changes) == 1


# --- nothing waits for a file


def test_a_pipe_that_nobody_writes_to_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "SECONDS", 0.2)
    os.mkfifo(tmp_path / "hosts")
    with pytest.raises(PolicyError, match=r"the host file cannot be read \(no end of it within 0.2 s\)"):
        Watched(f"@{tmp_path / 'hosts'}")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """As `--peers @<(scontrol show hostnames)` gives one."""
    os.mkfifo(tmp_path / "hosts")
    threading.Thread(target=(tmp_path / "hosts").write_text, args=("10.0.0.1\n10.0.0.2\n",)).start()
    made = Watched(f"@{tmp_path / 'hosts'}")
    assert made.addresses == TWO
    before = threading.active_count()
    with made.renewal:
        assert threading.active_count() == before


def test_a_file_server_that_is_away_holds_nothing_up_and_is_asked_once(
    watched: Watched, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostfile, "SECONDS", 0.1)
    is_back = threading.Event()
    whole = hostfile.Reading._whole
    begun = []

    def wait(reading: hostfile.Reading) -> bytes:
        begun.append(reading)
        is_back.wait(30)
        return whole(reading)

    monkeypatch.setattr(hostfile.Reading, "_whole", wait)
    assert eventually(lambda: "no end of it within" in "".join(watched.said))
    time.sleep(0.3)
    assert (len(begun), len(watched.said)) == (1, 1)
    hosts.write_text("10.0.0.1\n10.0.0.2\n")
    is_back.set()
    assert eventually(lambda: watched.addresses == TWO)


# --- on the wire

EXEC = (str(COMMANDS / "securerunctl"), "exec")
PORT = 7000
LISTENER = f"""
import socket, sys
listener = socket.create_server(("", {PORT}))
print("listening", flush=True)
sys.stdin.read()
"""


def may_connect(origin: Host, target: Host) -> bool:
    return all(reach(origin, [(target.ipv4, PORT)]).values())


@contextlib.contextmanager
def listening(node: Host, *options: str) -> Iterator[subprocess.Popen[str]]:
    job = node.popen([*EXEC, *options, "--", sys.executable, "-c", LISTENER], stdin=subprocess.PIPE)
    try:
        assert job.stdout is not None and job.stdout.readline() == "listening\n"
        yield job
    finally:
        job.kill()
        finish(job)


def test_who_is_added_to_the_file_of_a_running_job_may_connect(network: Network, tmp_path: Path) -> None:
    node, peer, stranger = network
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{node.ipv4}\n")
    with listening(node, "--peers", f"@{hosts}", "--ports", str(PORT)) as job:
        assert not may_connect(peer, node)
        with hosts.open("a") as file:
            file.write(f"{peer.ipv4}\n")
        assert eventually(lambda: may_connect(peer, node), seconds=30)
        assert not may_connect(stranger, node)
        done = finish(job, text_input="")
    assert f"securerun: --peers @{hosts} has other hosts: {peer.ipv4} may connect now\n" in done.stderr


@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_a_node_that_adds_its_line_after_the_start_trains(network: Network, tmp_path: Path, kind: str) -> None:
    node, late, _ = network
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{node.ipv4}\n")

    def start(one: Host, rank: int) -> subprocess.Popen[str]:
        options = ["--nnodes", "2", "--nproc-per-node", "1", *jobs.rendezvous(kind, one, rank, node)]
        script = [str(jobs.TRAIN), "--groups", "1", "--epochs", "2"]
        return one.popen([jobs.SECURERUN, "--peers", f"@{hosts}", *options, *script])

    first = start(node, 0)
    # It is turned away until node0 has read of it.
    time.sleep(4)
    with hosts.open("a") as file:
        file.write(f"{late.ipv4}\n")
    for done in finish_all([first, start(late, 1)], timeout=90):
        assert done.returncode == 0, done
