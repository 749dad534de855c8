"""The job's ports in net.ipv4.ip_local_reserved_ports: there while it runs, and nothing of the list lost or left.

Every list is one of a network namespace that the test made; the machine's own is never written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Callable

import cgroups
import namespaces
import pytest
from checkout import COMMANDS
from holding import HOLDER, Held
from hosts import RECORDS, Host, Network, eventually, is_alive, machine_snapshot

from securerun.firewall.policy import Policy, PortRange
from securerun.guard import reaper, records, reserved, run_directory
from securerun.guard.records import Record
from securerun.linux import port_ranges, proc
from securerun.linux.port_ranges import ReservationUnavailable

pytestmark = pytest.mark.usefixtures("root")

OTHERS = "1234,9000-9100,60010-60020"
HCCL = ((60000, 60015),)
ONE, TWO = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


# --- one list, without guards: each test in a child with a network namespace of its own


def alone(work: Callable[[int], object], place: Path, others: str = OTHERS) -> None:
    """Do the work where nothing but `others` is reserved, with the descriptor of a directory for records."""

    def there() -> None:
        cgroups.leave_for_a_new_network()
        write(others)
        directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        work(directory)

    cgroups.in_child(there)


def listed() -> str:
    return port_ranges.LIST.read_text().strip()


def write(ports: str) -> None:
    """What `sysctl -w` does: a list of one's own in place of what is there."""
    port_ranges.LIST.write_text(ports + "\n")


def run(run_id: str = ONE, ports: Sequence[tuple[int, int]] = HCCL, **changes: object) -> Record:
    """The record of a run whose launcher and guard are gone."""
    own = os.getpid()
    whole = Record(
        policy=Policy(run_id, tuple(PortRange(first, last, "planned") for first, last in ports), ()),
        layers=(),
        launcher=own,
        launcher_start=proc.start_time(own) + 1,
        guard=own,
        guard_start=proc.start_time(own) + 1,
        boot_id=proc.boot_id(),
        network=proc.namespace("net"),
        processes=proc.namespace("pid"),
        user=0,
        started=0.0,
        command="",
        reserved=tuple(ports),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def begin(directory: int, record: Record) -> None:
    run_directory.write(directory, record)
    reserved.settle(directory)


def is_reaped(directory: int) -> bool:
    """Whether every run is reaped; anybody's process that starts just then, here or elsewhere, may put one off."""
    return eventually(lambda: list(reaper.reap_all(directory, 0)) == [])


def end(directory: int, run_id: str = ONE) -> None:
    reserved.give_back(directory, run_id)
    run_directory.remove(directory, run_id)


def test_the_ports_of_a_run_are_added_to_what_is_there_and_taken_away_again(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        assert listed() == "0,1234,9000-9100,60000-60020"
        end(directory)
        assert listed() == OTHERS
        assert os.listdir(directory) == []

    alone(work, tmp_path)


def test_an_empty_list_is_empty_again(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        assert listed() == "0,60000-60015"
        end(directory)
        assert listed() == ""

    alone(work, tmp_path, others="")


def test_what_others_have_reserved_already_is_left_alone(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        assert listed() == "60000-60100"
        assert not reserved.ledgers(directory)
        end(directory)
        assert listed() == "60000-60100"

    alone(work, tmp_path, others="60000-60100")


def test_a_port_of_two_runs_goes_with_the_last_of_them(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        for first, last in ((ONE, TWO), (TWO, ONE)):
            begin(directory, run(ONE, [(60000, 60015)]))
            begin(directory, run(TWO, [(29500, 29500), (60008, 60031)]))
            assert listed() == "0,1234,9000-9100,29500,60000-60031"
            end(directory, first)
            remaining = "60000-60020" if last == ONE else "29500,60008-60031"
            assert listed() == f"0,1234,9000-9100,{remaining}"
            end(directory, last)
            assert listed() == OTHERS

    alone(work, tmp_path)


@pytest.mark.parametrize(
    "theirs", ["", "7777", "60005", "60000-60015", "60000-60050", "1234,9000-9100,60010-60020", "1024-65535"]
)
def test_a_list_that_somebody_set_meanwhile_is_his_to_the_last_port(tmp_path: Path, theirs: str) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        write(theirs)
        end(directory)
        assert listed() == theirs

    alone(work, tmp_path)


@pytest.mark.parametrize("theirs", ["7777", "60005", "60000-60050"])
def test_a_list_that_somebody_set_is_his_also_when_other_runs_came_afterwards(tmp_path: Path, theirs: str) -> None:
    def work(directory: int) -> None:
        for first, last in ((ONE, TWO), (TWO, ONE)):
            write(OTHERS)
            begin(directory, run(ONE))
            write(theirs)
            begin(directory, run(TWO))
            assert reserved.are_reserved(HCCL)
            end(directory, first)
            assert reserved.are_reserved(HCCL)
            end(directory, last)
            assert listed() == theirs

    alone(work, tmp_path)


def test_what_somebody_adds_meanwhile_stays(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        write(f"{listed()},60100-60110,7777")
        end(directory)
        assert listed() == "1234,7777,9000-9100,60010-60020,60100-60110"

    alone(work, tmp_path)


def test_what_somebody_takes_out_meanwhile_comes_back_for_the_jobs_life_only(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        write("0,1234,60000-60003")
        assert not reserved.are_reserved(HCCL)
        reserved.settle(directory)
        assert listed() == "0,1234,60000-60015"
        end(directory)
        assert listed() == "1234"

    alone(work, tmp_path)


def test_long_lists_of_others_are_kept_whole(tmp_path: Path) -> None:
    """A list of more than a page is written in pieces, none of which may cut a number."""
    theirs = ",".join(str(port) for port in range(1025, 20000, 2))

    def work(directory: int) -> None:
        for piece in range(0, len(theirs.split(",")), 400):
            words = theirs.split(",")[piece : piece + 400]
            descriptor = os.open(port_ranges.LIST, os.O_WRONLY)
            os.pwrite(descriptor, ",".join(words).encode(), piece)
            os.close(descriptor)
        assert cat() == theirs
        begin(directory, run(ports=[(port, port) for port in range(30000, 32000, 2)]))
        assert len(cat().split(",")) == len(theirs.split(",")) + 1000 + 1
        end(directory)
        assert cat() == theirs

    def cat() -> str:
        return subprocess.run(["cat", port_ranges.LIST], capture_output=True, text=True, check=True).stdout.strip()

    alone(work, tmp_path, others="")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(8))
def test_killed_at_any_step_the_next_look_makes_it_right(tmp_path: Path, step: int, when: str) -> None:
    """With a second run that wants some of the same ports, both for the one that comes and for the one that goes."""

    class Killed(BaseException):
        pass

    def killed_at(wanted: int) -> Callable[[], None]:
        """Have the step of that number be the last, of all steps that leave a trace; returns how to take that back."""
        steps = iter(range(1000))
        originals = [(os, "pwrite"), (os, "unlink"), (os, "replace")]
        saved = [(place, name, getattr(place, name)) for place, name in originals]

        def wrap(original: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                last = next(steps) == wanted
                if last and when == "before":
                    raise Killed
                result = original(*arguments, **options)
                if last:
                    raise Killed
                return result

            return call

        for place, name, original in saved:
            setattr(place, name, wrap(original))

        def take_back() -> None:
            for place, name, original in saved:
                setattr(place, name, original)

        return take_back

    def work(directory: int) -> None:
        begin(directory, run(TWO, [(60008, 60031)]))
        run_directory.write(directory, run(ONE, [(29500, 29500), *HCCL]))
        attempt(step, lambda: reserved.settle(directory))
        attempt(step, lambda: reserved.give_back(directory, ONE))
        end(directory, ONE)
        assert listed() == "0,1234,9000-9100,60008-60031"
        attempt(step, lambda: reserved.give_back(directory, TWO))
        end(directory, TWO)
        assert listed() == OTHERS
        assert reserved.ledgers(directory) == ()

    def attempt(wanted: int, change: Callable[[], None]) -> None:
        take_back = killed_at(wanted)
        with contextlib.suppress(Killed):
            change()
        take_back()

    alone(work, tmp_path)


def test_a_dead_run_is_reaped_in_its_own_network_only(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        resident = subprocess.Popen(["sleep", "60"])
        cgroups.leave_for_a_new_network()
        write("60000-60015")
        assert is_reaped(directory)
        assert listed() == "60000-60015"
        assert len(os.listdir(directory)) == 2
        namespaces.enter(home, namespaces.NETWORK)
        resident.kill()
        assert listed() == "0,1234,9000-9100,60000-60020"
        assert is_reaped(directory)
        assert listed() == OTHERS
        assert os.listdir(directory) == []

    alone(work, tmp_path)


def test_the_ledger_of_a_network_that_is_gone_goes_with_its_runs(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        begin(directory, run())
        begin(directory, run(TWO))
        cgroups.leave_for_a_new_network()
        write("60000-60015")
        assert is_reaped(directory)
        assert os.listdir(directory) == []
        assert listed() == "60000-60015"

    alone(work, tmp_path)


def test_a_run_and_a_ledger_of_another_boot_say_nothing_of_this_one(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        before = run(boot_id="an earlier boot")
        run_directory.write(directory, before)
        (ledger,) = (f"reserved-{before.network}.ledger",)
        run_directory.write_document(directory, ledger, {"boot_id": before.boot_id, "ports": "0,60010-60020"})
        write(f"0,{OTHERS}")
        assert is_reaped(directory)
        assert os.listdir(directory) == []
        assert listed() == f"0,{OTHERS}"

    alone(work, tmp_path)


def test_all_runs_together_leave_the_host_half_of_its_own_ports(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("60000 60199")
        planned = [PortRange(1024, 65535, "added with --ports"), PortRange(60000, 60015, "HCCL")]
        choice = reserved.choose(directory, planned, ONE)
        assert (choice.reserved, choice.left_out) == (HCCL, (planned[0],))
        begin(directory, run(ports=choice.reserved))
        too_many, most = PortRange(60016, 60101, "more"), PortRange(60016, 60099, "more")
        assert reserved.choose(directory, [too_many], TWO).left_out == (too_many,)
        assert reserved.choose(directory, [most], TWO).left_out == ()
        assert reserved.choose(directory, [too_many], ONE).left_out == ()

    alone(work, tmp_path, others="")


def test_a_list_that_cannot_be_written_is_said_and_nothing_is_kept_for_ours(tmp_path: Path) -> None:
    def work(directory: int) -> None:
        read_only()
        with pytest.raises(ReservationUnavailable, match="ip_local_reserved_ports cannot be written: Read-only"):
            begin(directory, run())
        assert reserved._ours(directory, port_ranges.reserved()) == frozenset()
        begin(directory, run(ports=[(9000, 9010)]))  # there already

    alone(work, tmp_path)


def read_only() -> None:
    """/proc/sys as in a container: read-only, for this process."""
    namespaces.leave(namespaces.MOUNTS)
    for command in (
        ["mount", "--make-rprivate", "/"],
        ["mount", "--bind", "/proc/sys", "/proc/sys"],
        ["mount", "-o", "remount,ro,bind", "/proc/sys"],
    ):
        subprocess.run(command, check=True)


def test_records_of_guards_that_reserved_nothing_are_read() -> None:
    document = run().document()
    assert records.understood(document).reserved == HCCL
    del document["reserved"]
    assert records.understood(document).reserved == ()


@pytest.mark.parametrize("wrong", [[[60015, 60000]], [[0, 5]], [[1, 65536]], [["1", "2"]], [[1]], [1], "1-2", None])
def test_a_record_with_other_ports_is_none_of_ours(tmp_path: Path, wrong: object) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    run_directory.write_document(directory, f"{ONE}.json", {**run().document(), "reserved": wrong})
    assert records.read_all(directory) == ()
    os.close(directory)


# --- real guards


@pytest.fixture
def node(network: Network) -> Iterator[Host]:
    """A host on which others have reserved ports; what they have, they have again at the end."""
    node = network["node0"]
    reserve(node, OTHERS)
    before, machine = node.snapshot(), machine_snapshot()
    yield node
    eventually(lambda: node.snapshot() == before and machine_snapshot() == machine, seconds=2)
    assert node.snapshot() == before
    assert machine_snapshot() == machine


def reserve(node: Host, ports: str) -> None:
    with cgroups.inside(node):
        write(ports)


def list_of(node: Host) -> str:
    with cgroups.inside(node):
        return listed()


def hold(node: Host, *options: str, through: Sequence[str] = ()) -> Held:
    command = [*through, sys.executable, str(HOLDER), "--firewall", "off", *options]
    return Held(node.popen(command, stdin=subprocess.PIPE))


def kill_all(holder: Held) -> None:
    """SIGKILL launcher and guard; held still first, the launcher cannot start another guard in between."""
    guard = record_of(holder).guard
    os.kill(holder.process.pid, signal.SIGSTOP)
    os.kill(guard, signal.SIGKILL)
    holder.process.kill()
    holder.process.wait()
    assert eventually(lambda: not is_alive(guard))


def record_of(holder: Held) -> Record:
    return next(record for record in records.read_host() if record.run_id == holder.run_id)


def test_the_list_names_the_ports_from_before_the_job_until_after_it(node: Host) -> None:
    holder = hold(node)
    assert list_of(node) == "0,1234,9000-9100,60000-60020"
    holder.let_go()
    assert eventually(lambda: list_of(node) == OTHERS, seconds=2)


def test_nobody_is_given_a_port_of_the_job_by_chance(node: Host) -> None:
    """Of 32 ports that the kernel hands out, the job has the lower half."""
    with cgroups.inside(node):
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("61000 61031")
    assert len(given(node)) == 32
    holder = hold(node, "--ports", "61000-61015", "--listen", "61000")
    assert given(node) == set(range(61016, 61032))
    holder.let_go()


def given(node: Host) -> set[int]:
    """The ports that a program gets which lets the kernel choose until there are none left."""
    program = """
import socket
held = []
try:
    while True:
        held.append(socket.create_server(("0.0.0.0", 0)))
except OSError:
    print(*(one.getsockname()[1] for one in held))
"""
    return {int(port) for port in node.run([sys.executable, "-c", program], check=True).stdout.split()}


def test_jobs_that_come_and_go_at_once_leave_what_was_there(node: Host) -> None:
    def job(number: int) -> None:
        first = 60000 + 4 * number
        hold(node, "--ports", f"{first}-{first + 15}", "--listen", str(first)).let_go()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(job, range(9)))
    assert eventually(lambda: list_of(node) == OTHERS, seconds=2)


def test_a_list_that_is_set_while_the_job_runs_gets_the_jobs_ports_again(node: Host) -> None:
    holder = hold(node)
    reserve(node, "7777")
    assert eventually(lambda: list_of(node) == "0,7777,60000-60015")
    reserve(node, OTHERS)
    assert eventually(lambda: list_of(node) == "0,1234,9000-9100,60000-60020")
    holder.let_go()


def test_a_guard_that_dies_leaves_the_ports_to_the_next(node: Host) -> None:
    holder = hold(node)
    os.kill(record_of(holder).guard, signal.SIGKILL)
    holder.hear_of("another has taken over")
    assert list_of(node) == "0,1234,9000-9100,60000-60020"
    holder.let_go()


def test_what_a_double_kill_leaves_goes_with_securerunctl_clean(network: Network, node: Host) -> None:
    reserve(network["node1"], "60000-60015")
    kill_all(hold(node))
    assert list_of(node) == "0,1234,9000-9100,60000-60020"
    elsewhere = network["node1"].run([COMMANDS / "securerunctl", "clean"])
    assert elsewhere.returncode == 1, elsewhere
    assert list_of(network["node1"]) == "60000-60015"
    done = node.run([COMMANDS / "securerunctl", "clean"])
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "reserved ports" in done.stdout
    assert list_of(node) == OTHERS
    assert not RECORDS.exists()


def test_what_a_double_kill_leaves_goes_with_the_next_run(node: Host) -> None:
    kill_all(hold(node))
    holder = hold(node, "--ports", "60008-60031", "--listen", "60008")
    assert list_of(node) == "0,1234,9000-9100,60008-60031"
    holder.let_go()


def test_a_refused_order_leaves_the_list_alone(node: Host) -> None:
    through = ["setpriv", "--bounding-set=-all,+net_admin,+setpcap", "--inh-caps=-all"]
    holder = hold(node, "--scope", "process", through=through)
    assert "refused" in holder.start
    assert holder.process.wait(timeout=30) == 77
    assert list_of(node) == OTHERS


def test_where_proc_sys_is_read_only_the_job_runs_and_the_user_is_told(node: Host) -> None:
    script = 'mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; exec "$@"'
    holder = hold(node, through=["unshare", "--mount", "sh", "-ec", script, "sh"])
    (note,) = holder.start["notes"]
    assert "60000-60015" in note and "ip_local_reserved_ports" in note and "Read-only" in note
    assert list_of(node) == OTHERS
    holder.let_go()


def test_a_plan_of_nearly_all_ports_is_closed_and_not_reserved(node: Host) -> None:
    holder = hold(node, "--ports", "1024-65535")
    assert any("1024-65535 are not reserved" in note for note in holder.start["notes"])
    assert list_of(node) == OTHERS
    holder.let_go()
