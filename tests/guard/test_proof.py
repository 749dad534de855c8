"""A shield that something may switch off while the job runs: proven again and again, and not relied on after a no.

What switches filters off on other kernels is done here by taking them off; that the kernel may do it, by not telling
the guard that it does not (ground/net_cls.py).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cgroups import in_child
from checkout import COMMANDS
from holding import HOLDER, Held, held
from hosts import RECORDS, Host, Network, eventually, is_alive
from net_cls import (
    FROM_WITHIN,
    UNTOLD,
    cgroup_in,
    cgroups_of,
    doubted,
    hierarchy,
    is_proven_again,
    job_cgroup_of,
    room_of,
    switch_all_off,
    switch_off,
)
from patience import patient
from probe import reach

from securerun.firewall import selftest
from securerun.linux import net_cgroups
from securerun.linux.bpf import AttachType

CTL = str(COMMANDS / "securerunctl")
# What is promised of scope `ports`, twice: the tests have two processors for all of it.
CLOSED_SECONDS = patient(0.4)


def recorded(run_id: str) -> dict[str, object]:
    document: dict[str, object] = json.loads((RECORDS / f"{run_id}.json").read_text())
    return document


def backends_of(run_id: str) -> list[str]:
    layers = recorded(run_id)["layers"]
    assert isinstance(layers, list)
    return [layer["backend"] for layer in layers]


def is_closed(stranger: Host, node: Host, port: int) -> bool:
    targets = [(node.ipv4, port), (node.ipv6, port)]
    return not any(reach(stranger, targets).values())


def is_closed_soon(stranger: Host, node: Host, port: int) -> bool:
    time.sleep(CLOSED_SECONDS)
    return is_closed(stranger, node, port)


def test_stranger_gets_to_no_port_when_filters_cease_to_run_in_the_middle_of_a_job(network: Network) -> None:
    """From then on the job is in scope `ports`: said to the launcher and the log, in the record and by status."""
    node, peer, stranger = network
    with doubted(node, "--listen", "7001", "--peers", f"{peer.ipv4},{peer.ipv6}") as holder:
        assert holder.start["guarding"] == ["shield", "iptables"]
        assert eventually(lambda: is_proven_again(holder.run_id))
        assert is_closed(stranger, node, 7001)
        switch_all_off(holder.run_id)
        line = holder.hear_of("the shield holds no more")["news"]
        assert "scope is ports now" in line and "net_cls or net_prio" in line
        assert is_closed_soon(stranger, node, 7001)
        assert reach(peer, [(node.ipv4, 7001)]) == {(node.ipv4, 7001): True}
        holder.say("listen 7002")
        assert is_closed_soon(stranger, node, 7002)
        assert eventually(lambda: backends_of(holder.run_id) == ["iptables"])
        assert "came into use" in str(recorded(holder.run_id)["void"])
        shown = node.run([CTL, "status"], check=True).stdout
        assert "holds no more: net_cls or net_prio" in shown and "closed by shield" not in shown
        assert json.loads(node.run([CTL, "status", "--json"], check=True).stdout)["runs"][0]["void"]
        assert not room_of(holder.run_id).exists()


def test_proof_beside_a_job_forbids_it_nothing_and_goes_with_it(network: Network) -> None:
    node, peer, stranger = network
    with doubted(node, "--listen", "7001", "--peers", peer.ipv4) as holder:
        assert eventually(lambda: is_proven_again(holder.run_id))
        assert reach(peer, [(node.ipv4, 7001)]) == {(node.ipv4, 7001): True}
        assert is_closed(stranger, node, 7001)
        (inside,) = (room_of(holder.run_id) / "cgroup.procs").read_text().split()
        assert inside not in (job_cgroup_of(holder.run_id) / "cgroup.procs").read_text().split()
        holder.let_go()
        assert eventually(lambda: not room_of(holder.run_id).exists() and not is_alive(int(inside)), seconds=2)


@pytest.mark.skipif(net_cgroups.may_void_filters(), reason="this kernel does not say that nothing switches filters off")
def test_kernel_that_says_that_nothing_switches_filters_off_is_believed(network: Network) -> None:
    with held(network["node0"]) as holder:
        time.sleep(0.3)
        assert not room_of(holder.run_id).exists()


def test_without_port_chains_a_job_that_insists_on_the_shield_is_ended(network: Network) -> None:
    node = network["node0"]
    script = "import sys, time; print('ready', flush=True); time.sleep(60)"
    command = [CTL, "exec", "--scope", "process", "--firewall", "off", "--peers", "10.77.0.2", "--"]
    job = node.popen([*UNTOLD, *command, sys.executable, "-c", script])
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    (record,) = RECORDS.glob("*.json")
    assert eventually(lambda: is_proven_again(record.stem))
    switch_all_off(record.stem)
    assert job.wait(timeout=20) == 77
    assert job.stderr is not None
    assert "--scope process was asked for, and the shield holds no more" in job.stderr.read()


def test_without_port_chains_a_job_goes_on_open_and_says_so(network: Network) -> None:
    node, _, stranger = network
    with doubted(node, "--listen", "7001", "--firewall", "off") as holder:
        assert eventually(lambda: is_proven_again(holder.run_id))
        switch_all_off(holder.run_id)
        assert "every port of this job is open to every host" in holder.hear_of("the shield holds no more")["news"]
        assert "7001" in holder.hear_of("is open to every host: the shield holds no more")["news"]
        assert not is_closed(stranger, node, 7001)
        assert eventually(lambda: recorded(holder.run_id)["left_open"] == [[7001, 7001]])


def test_where_net_cls_is_there_every_listener_is_closed_twice_from_the_start(network: Network, tmp_path: Path) -> None:
    """Whatever switches the shield off has nothing to open then, noticed or not."""
    node, peer, stranger = network
    with hierarchy(tmp_path / "v1"), doubted(node, "--listen", "7001", "--peers", peer.ipv4) as holder:
        assert "the port chains close each port of this job as well" in " ".join(holder.start["notes"])
        switch_off(job_cgroup_of(holder.run_id), AttachType.CGROUP_INET_INGRESS)
        assert is_closed_soon(stranger, node, 7001)
        holder.say("listen 7002")
        assert is_closed_soon(stranger, node, 7002)
        assert reach(peer, [(node.ipv4, 7001), (node.ipv4, 7002)]) == {(node.ipv4, 7001): True, (node.ipv4, 7002): True}
        assert backends_of(holder.run_id) == ["shield", "iptables"]


def test_net_cls_that_comes_while_a_job_runs_has_its_listeners_closed_twice(network: Network, tmp_path: Path) -> None:
    node, _, stranger = network
    if not eventually(lambda: not cgroups_of("net_cls") and not cgroups_of("net_prio")):
        pytest.skip("another has net_cls or net_prio in use on this machine")
    with doubted(node, "--listen", "7001") as holder:
        assert eventually(lambda: is_proven_again(holder.run_id))
        with hierarchy(tmp_path / "v1"):
            holder.hear_of("net_cls or net_prio of cgroup version 1 is here now")
            switch_off(job_cgroup_of(holder.run_id), AttachType.CGROUP_INET_INGRESS)
            assert is_closed_soon(stranger, node, 7001)
            holder.let_go()


@pytest.mark.parametrize("controller", ["net_cls", "net_prio"])
def test_process_of_the_job_that_comes_into_another_cgroup_of_either_is_noticed(
    network: Network, tmp_path: Path, controller: str
) -> None:
    node = network["node0"]
    with hierarchy(tmp_path / "v1", controller) as place, doubted(node, "--listen", "7001") as holder:
        moved = cgroup_in(place)
        (moved / "cgroup.procs").write_text(str(holder.process.pid))
        line = holder.hear_of("the shield holds no more")["news"]
        assert f"process {holder.process.pid} of the job is in {controller}:/{moved.name} now" in line
        assert eventually(lambda: backends_of(holder.run_id) == ["iptables"])
        holder.let_go()


def test_launcher_in_a_cgroup_of_its_own_is_proven_there(network: Network, tmp_path: Path) -> None:
    node = network["node0"]
    with hierarchy(tmp_path / "v1") as place:
        before = (*FROM_WITHIN, str(cgroup_in(place)))
        with doubted(node, "--listen", "7001", before=before) as holder:
            assert holder.start["guarding"] == ["shield", "iptables"]
            assert eventually(lambda: is_proven_again(holder.run_id))
            time.sleep(0.5)
            assert backends_of(holder.run_id) == ["shield", "iptables"]
            holder.let_go()


def test_shield_is_proven_where_the_launcher_is_and_not_where_the_guard_is(network: Network, tmp_path: Path) -> None:
    """A guard goes to the top; here a rule of the host's tells by the class of the launcher's cgroup who sends."""
    node = network["node0"]
    forbidden = "meta l4proto udp meta cgroup 0x100001 drop"
    rule = f"table inet t {{ chain o {{ type filter hook output priority 0; {forbidden}; }}; }}"
    with hierarchy(tmp_path / "v1") as place:
        node.run(["nft", "-f", "-"], text_input=rule, check=True)
        before = (*FROM_WITHIN, str(cgroup_in(place, 0x100001)))
        with doubted(node, "--listen", "7001", before=before) as holder:
            assert holder.start["guarding"] == ["iptables"]
            assert "something forbids UDP over the loopback already" in " ".join(holder.start["notes"])
            holder.let_go()
        node.run(["nft", "delete", "table", "inet", "t"], check=True)


def test_guard_that_takes_over_goes_on_proving(network: Network) -> None:
    node, _, stranger = network
    with doubted(node, "--listen", "7001") as holder:
        assert eventually(lambda: is_proven_again(holder.run_id))
        guard = int(str(recorded(holder.run_id)["guard"]))
        os.kill(guard, signal.SIGKILL)
        holder.hear_of("another has taken over")
        assert eventually(lambda: is_proven_again(holder.run_id))
        switch_all_off(holder.run_id)
        holder.hear_of("the shield holds no more")
        assert is_closed_soon(stranger, node, 7001)
        os.kill(int(str(recorded(holder.run_id)["guard"])), signal.SIGKILL)
        holder.hear_of("another has taken over")
        assert eventually(lambda: "shield" not in backends_of(holder.run_id) and recorded(holder.run_id)["void"] != "")
        assert is_closed(stranger, node, 7001)


def test_nothing_is_left_of_a_run_whose_guard_was_replaced_when_its_job_has_ended(network: Network) -> None:
    with doubted(network["node0"]) as holder:
        assert eventually(lambda: is_proven_again(holder.run_id))
        os.kill(int(str(recorded(holder.run_id)["guard"])), signal.SIGKILL)
        holder.hear_of("another has taken over")
        assert eventually(lambda: is_proven_again(holder.run_id))
    assert eventually(lambda: not (RECORDS / f"{holder.run_id}.json").exists(), seconds=patient(5))
    assert not room_of(holder.run_id).exists()


@pytest.mark.parametrize("with_its_child", [False, True], ids=["guard", "guard and its child"])
def test_proof_of_a_run_that_was_killed_whole_is_gone(network: Network, with_its_child: bool) -> None:
    node = network["node0"]
    holder = Held(node.popen([*UNTOLD, sys.executable, HOLDER], stdin=subprocess.PIPE))
    assert eventually(lambda: is_proven_again(holder.run_id))
    guard = int(str(recorded(holder.run_id)["guard"]))
    (child,) = (room_of(holder.run_id) / "cgroup.procs").read_text().split()
    os.kill(holder.process.pid, signal.SIGSTOP)
    for pid in [int(child)] * with_its_child + [guard]:
        os.kill(pid, signal.SIGKILL)
    os.kill(holder.process.pid, signal.SIGKILL)
    holder.process.wait()
    if with_its_child:
        assert room_of(holder.run_id).exists()
        assert eventually(lambda: not is_alive(guard))
        node.run([CTL, "clean"], check=True)
    assert eventually(lambda: not room_of(holder.run_id).exists(), seconds=2)
    node.run([CTL, "clean"], check=True)


@pytest.mark.parametrize("when", ["before it has answered", "before the answer is read"])
def test_child_whose_guard_dies_in_the_middle_of_a_question_does_what_is_left_to_do(tmp_path: Path, when: str) -> None:
    left = tmp_path / "left"
    left.mkdir()
    near, far = socket.socketpair()
    child = os.fork()
    if child == 0:
        slowly = 0.5 if when == "before it has answered" else 0.0
        try:
            selftest._live(-1, (), far, left.rmdir, (), lambda: time.sleep(slowly))
        finally:
            os._exit(0)
    with near, far:
        assert len(near.recv(4)) == 4  # that it could not enter
        near.send(b"?")
        if when == "before the answer is read":
            assert select.select([near], [], [], patient(5))[0]
    os.waitpid(child, 0)
    assert not left.exists()


def answer_to_a_guard_with_descriptors(number: int) -> int | None:
    """What the child of a proof says first to a guard that holds so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    for _ in range(number):
        os.open(os.devnull, os.O_RDONLY)
    sender = selftest.Sender(-1)
    try:
        return sender.answer_within(patient(5))
    finally:
        sender.end()


def test_guard_of_a_job_deep_down_hears_the_child_of_its_proof() -> None:
    """It holds a descriptor of each cgroup above its job's, and select(2) knows no number beyond 1023."""
    assert in_child(lambda: answer_to_a_guard_with_descriptors(1100)) == errno.EBADF


def test_child_of_the_proof_that_is_killed_is_replaced_and_that_is_no_no(network: Network) -> None:
    node = network["node0"]
    with doubted(node) as holder:
        assert eventually(lambda: is_proven_again(holder.run_id))
        (child,) = (room_of(holder.run_id) / "cgroup.procs").read_text().split()
        os.kill(int(child), signal.SIGKILL)

        def is_another() -> bool:
            room = room_of(holder.run_id)
            return is_proven_again(holder.run_id) and (room / "cgroup.procs").read_text().split() not in ([], [child])

        assert eventually(is_another, seconds=3)
        assert backends_of(holder.run_id) == ["shield", "iptables"]
