"""Where guards say what they did: in a real journal with fields, and elsewhere when nobody listens there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import journal
import pytest
from checkout import COMMANDS
from conversation import socket_unit
from hosts import Network, eventually
from users import PrivateMachine

from securerun.guard import log

RUN = "0123456789ab"
PROGRAM = "securerun-guard"
SECURERUNCTL = str(COMMANDS / "securerunctl")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory that has the places of the log, none of which is there yet."""
    monkeypatch.setattr(log, "JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setattr(log, "SYSTEM_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(log, "FILE", tmp_path / "securerun.log")
    return tmp_path


def listener(place: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end.bind(str(place))
    end.settimeout(5)
    return end


def test_lines_of_a_run_are_found_in_the_journal_by_run_user_and_peer(network: Network) -> None:
    if not journal.is_possible():
        pytest.skip("there is no systemd-journald")
    node = network["node0"]
    with PrivateMachine() as machine, journal.journal(machine, node):
        command = [SECURERUNCTL, "exec", "--peers", "10.77.0.2,10.88.0.0/16", "--", "true"]
        done = machine.run(node, command, env={"SECURERUN_FIREWALL": "off"})
        assert done.returncode == 0, done
        run_id = done.stderr.partition("run ")[2].partition(":")[0]

        def mine(*more: str) -> list[dict[str, Any]]:
            return journal.entries(machine, node, f"RUN_ID={run_id}", *more)

        assert eventually(lambda: [*map(words, mine())][-1:] == [f"run {run_id}: released"]), mine()
        first, *_ = found = mine("USER=0", "PEERS=10.88.0.0/16")
        assert len(found) == len(journal.entries(machine, node, f"SYSLOG_IDENTIFIER={PROGRAM}")) == 2
        assert words(first).startswith(f"run {run_id} of user 0, process ") and "guarding by shield" in words(first)
        assert first["PEERS"] == ["10.77.0.2/32", "10.88.0.0/16"]
        assert (first["PRIORITY"], first["SYSLOG_FACILITY"], first["_TRANSPORT"]) == ("5", "10", "journal")
        assert first["SYSLOG_PID"] == first["_PID"]
        assert not machine.place("/var/log/securerun.log").exists()


def test_refusal_is_found_in_the_journal_by_its_user(network: Network) -> None:
    if not journal.is_possible():
        pytest.skip("there is no systemd-journald")
    node = network["node0"]
    with PrivateMachine() as machine, journal.journal(machine, node):
        alice = machine.add_user("alice", groups=["securerun"])
        machine.configure("users = []\n")
        with socket_unit(machine, node):
            done = machine.run(node, [SECURERUNCTL, "exec", "--peers", "10.77.0.2", "--", "true"], user=alice)
        assert done.returncode == 77, done
        found = eventually(lambda: bool(journal.entries(machine, node, f"USER={alice.uid}")))
        assert found and words(journal.entries(machine, node, f"USER={alice.uid}")[0]).startswith("refused to user ")


def words(entry: dict[str, object]) -> str:
    return str(entry["MESSAGE"])


def test_what_users_choose_makes_no_field_and_no_second_entry(places: Path) -> None:
    with listener(places / "journal") as end:
        log.note(
            PROGRAM, "said\nPRIORITY=0\n\nMESSAGE=forged\x00", {"RUN_ID": [RUN], "PEERS": ["a\nUSER=0", "b" * 500]}
        )
        sent = end.recv(65536).decode()
    written = [line.partition("=")[::2] for line in sent.splitlines()]
    assert [name for name, _ in written] == [
        *("MESSAGE", "PRIORITY", "SYSLOG_FACILITY", "SYSLOG_IDENTIFIER", "SYSLOG_PID", "RUN_ID", "PEERS", "PEERS"),
    ]
    assert written[0][1] == r"said\nPRIORITY=0\n\nMESSAGE=forged\x00" and written[1][1] == "5"
    assert written[-1][1] == "b" * 64


def test_an_entry_is_short_however_many_peers_there_are(places: Path) -> None:
    with listener(places / "journal") as end:
        log.note(PROGRAM, "x" * 100_000, {"PEERS": [f"2001:db8::{number:x}/128" for number in range(100_000)]})
        sent = end.recv(1 << 20)
    assert len(sent) < 8192 and sent.count(b"PEERS=") == log.MOST_VALUES


@pytest.mark.parametrize("stuck", [("journal",), ("journal", "log")])
def test_a_journal_that_reads_nothing_is_not_waited_for(places: Path, stuck: tuple[str, ...]) -> None:
    ends = [listener(places / name) for name in stuck]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as filling:
        for name in stuck:
            with pytest.raises(BlockingIOError):
                while True:
                    filling.sendto(b"x", str(places / name))
    if "log" not in stuck:
        ends.append(listener(places / "log"))
    began = time.monotonic()
    log.note(PROGRAM, "said")
    assert time.monotonic() - began < 1
    if "log" in stuck:
        assert (places / "securerun.log").read_text().endswith(": said\n")
    else:
        assert ends[-1].recv(4096).endswith(b": said")
    for end in ends:
        end.close()


def _said_to(stderr: int, places: Path) -> None:
    """Have a process of its own log where no place of a log is, with this as its standard error."""
    call = (
        "import sys; from pathlib import Path; from securerun.guard import log; "
        "log.JOURNAL = log.SYSTEM_LOG = '/nonexistent/log'; log.FILE = Path('/nonexistent/securerun.log'); "
        "log.note('securerun-guard', 'said', {'RUN_ID': ['0123456789ab']})"
    )
    subprocess.run([sys.executable, "-c", call], check=True, stderr=stderr, timeout=20)


def test_where_there_is_no_log_at_all_standard_error_has_the_line(places: Path) -> None:
    read, write = os.pipe()
    _said_to(write, places)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as said:
        assert said.read().endswith(": said\n")


def test_standard_error_that_nobody_reads_is_not_waited_for(places: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    _said_to(write, places)
    os.close(read)
    os.close(write)
