"""HCCL's default ports on hosts where others have them: nobody asked for them, and nobody is harmed or refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jobs
import kernel
import pytest
from attacking import Ground, server
from checkout import COMMANDS
from conversation import Conversation, order
from hosts import eventually
from probe import reach

DEFAULT = "HCCL (default range)"
STORE = {"first": 29500, "last": 29500, "purpose": "master port (static rendezvous)"}


def hccl(purpose: str = DEFAULT, first: int = 60000, last: int = 60015) -> dict[str, Any]:
    return {"first": first, "last": last, "purpose": purpose}


def asked(*ports: dict[str, Any], **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever an order has
    """An order for a port of its own and these."""
    document = order(**changes)
    document["order"]["policy"]["ports"] = [STORE, *ports]
    return document


@contextlib.contextmanager
def backend_of_root(ground: Ground, backend: str) -> Iterator[None]:
    """Which backend a host uses is root's to say: a run of root's uses it."""
    talk = Conversation(ground.machine, ground.node, None, "direct")
    talk.say(order(ports=[30000], firewall=backend))
    assert "guarding" in talk.hear_verdict()
    yield
    talk.release()


def recorded(ground: Ground, run_id: str) -> list[str]:
    """The ports of a run's plan as its record has them."""
    document = json.loads(ground.machine.place(f"/run/securerun/{run_id}.json").read_text())
    return [f"{port['first']}-{port['last']}" for port in document["policy"]["ports"]]


def is_open(ground: Ground, port: int = 60003) -> bool:
    return reach(ground.stranger, [(ground.node.ipv4, port)])[ground.node.ipv4, port]


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES])
@pytest.mark.parametrize("scope", ["auto", "ports"])
def test_listener_of_another_user_stays_open_and_refuses_nobody(ground: Ground, backend: str, scope: str) -> None:
    document = asked(hccl(), firewall=backend, scope=scope)
    for user in (ground.bob, None):
        with backend_of_root(ground, backend), server(ground, user, 60003):
            talk = ground.talk(ground.alice, "sudo")
            talk.say(document)
            verdict = talk.hear_verdict()
            assert verdict["guarding"]["left_out"] == [[60003, 60003]], verdict
            (note,) = [note for note in verdict["guarding"]["notes"] if "60003" in note]
            whose = user.uid if user else 0
            assert "HCCL" in note and f"user {whose} listens there" in note and "\n" not in note
            plan = recorded(ground, document["order"]["policy"]["run_id"])
            assert plan == ["29500-29500", "60000-60002", "60004-60015"]
            assert is_open(ground)
            talk.release()
        assert eventually(lambda: not ground.machine.runs())


def test_ports_beside_the_one_that_is_left_out_are_closed(ground: Ground) -> None:
    with server(ground, ground.bob, 60003):
        options = ("--ports", "60000-60015", "--purpose", DEFAULT, "--scope", "ports")
        holder = ground.holder(ground.alice, *options, "--listen", "60004")
        assert not is_open(ground, 60004) and is_open(ground)
        holder.let_go()


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES])
@pytest.mark.parametrize("scope", ["auto", "ports"])
def test_who_listens_there_later_is_let_be_as_well(ground: Ground, backend: str, scope: str) -> None:
    """That is the race, too: between the guard's look and its rules somebody may begin to listen."""
    options = ("--ports", "60000-60015", "--purpose", DEFAULT, "--scope", scope, "--firewall", backend)
    with backend_of_root(ground, backend):
        holder = ground.holder(ground.alice, *options, "--listen", "60004")
        with server(ground, ground.bob, 60003):
            line = holder.hear_of("60003")["news"]
            assert "HCCL" in line and f"user {ground.bob.uid} listens there" in line
            assert is_open(ground) and not is_open(ground, 60004)
            assert recorded(ground, holder.run_id) == ["60000-60002", "60004-60015"]
        holder.let_go()


def test_port_on_which_the_job_listens_itself_is_not_opened_by_whoever_listens_beside_it(ground: Ground) -> None:
    """Where there is no shield behind it: another user cannot open a job's port by another address of the host."""
    ground.node.run(["ip", "address", "add", "10.77.0.99/24", "dev", "eth0"], check=True)
    try:
        options = ("--ports", "60000-60015", "--purpose", DEFAULT, "--scope", "ports", "--listen", "7000")
        holder = ground.holder(ground.alice, *options)
        holder.say(f"listen 60003 {ground.node.ipv4}")
        time.sleep(0.5)
        with server(ground, ground.bob, 60003, "10.77.0.99"), server(ground, ground.bob, 60005):
            holder.hear_of("60005")
            assert is_open(ground, 60005) and not is_open(ground)
        holder.let_go()
    finally:
        ground.node.run(["ip", "address", "del", "10.77.0.99/24", "dev", "eth0"], check=True)


@pytest.mark.parametrize("purpose", ["HCCL", "added with --ports", "HCCL (rank table)"])
def test_ports_that_are_asked_for_are_refused_as_ever(ground: Ground, purpose: str) -> None:
    with server(ground, ground.bob, 60003):
        for ports in ((hccl(purpose),), (hccl(), hccl(purpose, 60002, 60004))):
            assert "port 60003 is in use by user" in ground.refusal(ground.alice, asked(*ports))


@pytest.mark.parametrize(("first", "second"), [("ports", "auto"), ("auto", "ports"), ("ports", "ports")])
def test_jobs_of_two_users_share_the_default_range_with_other_peers_and_no_shield(
    ground: Ground, first: str, second: str
) -> None:
    bobs, alices = ground.talk(ground.bob, "sudo"), ground.talk(ground.alice, "sudo")
    bobs.say(asked(hccl(), scope=first, peers=[ground.peer.ipv4]))
    verdict = bobs.hear_verdict()
    assert verdict["guarding"].get("left_out") is None, verdict
    document = asked(hccl(), scope=second, peers=[ground.stranger.ipv4])
    document["order"]["policy"]["ports"][0] = {**STORE, "first": 29501, "last": 29501}
    alices.say(document)
    verdict = alices.hear_verdict()
    assert verdict["guarding"]["left_out"] == [[60000, 60015]], verdict
    assert any("HCCL" in note and f"of user {ground.bob.uid}" in note for note in verdict["guarding"]["notes"])
    assert recorded(ground, document["order"]["policy"]["run_id"]) == ["29501-29501"]
    alices.release()
    bobs.release()


@pytest.mark.parametrize("limit", ['ports = ["20000-40000"]', "ports_per_run = 4", 'ports = ["20000-60003"]'])
def test_what_the_site_does_not_let_a_user_name_is_left_out(ground: Ground, limit: str) -> None:
    ground.machine.configure(limit + "\n")
    talk = ground.talk(ground.alice, "sudo")
    talk.say(asked(hccl()))
    verdict = talk.hear_verdict()
    left_out = [[60004, 60015]] if "60003" in limit else [[60000, 60015]]
    assert verdict["guarding"]["left_out"] == left_out, verdict
    (note,) = [note for note in verdict["guarding"]["notes"] if "HCCL" in note]
    assert "/etc/securerun/guard.toml" in note
    talk.release()
    if "per_run" in limit:
        assert "more than the 4 that a run may name" in ground.refusal(ground.alice, asked(hccl("HCCL")))
    else:
        assert "may not be named" in ground.refusal(ground.alice, asked(hccl("HCCL")))


@pytest.mark.parametrize("backend", ["iptables", kernel.OWNED_NFTABLES])
def test_job_without_a_shield_whose_whole_plan_is_left_out_has_its_ports_closed(ground: Ground, backend: str) -> None:
    options = ("--ports", "60003", "--purpose", DEFAULT, "--scope", "ports", "--firewall", backend)
    with backend_of_root(ground, backend), server(ground, ground.bob, 60003):
        holder = ground.holder(ground.alice, *options, "--listen", "7000")
        assert eventually(lambda: not is_open(ground, 7000), seconds=5)
        assert is_open(ground)
        holder.let_go()


def test_who_calls_any_port_a_default_one_closes_none_of_others(ground: Ground) -> None:
    with server(ground, ground.bob, 8080), server(ground, None, 22):
        talk = ground.talk(ground.alice, "socket")
        talk.say(asked(hccl(DEFAULT, 1, 65535)))
        verdict = talk.hear_verdict()
        assert verdict["guarding"]["left_out"] == [[1, 29499], [29501, 65535]], verdict
        assert is_open(ground, 8080) and is_open(ground, 22)
        talk.release()
        talk = ground.talk(ground.alice, "socket")
        talk.say(asked(hccl(DEFAULT, 8080, 8081), hccl(DEFAULT, 22, 22)))
        assert talk.hear_verdict()["guarding"]["left_out"] == [[22, 22], [8080, 8080]]
        assert is_open(ground, 8080) and is_open(ground, 22)
        talk.release()


def test_guard_that_takes_over_leaves_out_what_was_left_out(ground: Ground) -> None:
    options = ("--ports", "60000-60015", "--purpose", DEFAULT, "--listen", "60004")
    with server(ground, ground.bob, 60003):
        holder = ground.holder(ground.alice, *options)
        record = json.loads(ground.machine.place(f"/run/securerun/{holder.run_id}.json").read_text())
        os.kill(record["guard"], signal.SIGKILL)
        holder.hear_of("another has taken over")
        assert is_open(ground) and not is_open(ground, 60004)
        assert recorded(ground, holder.run_id) == ["60000-60002", "60004-60015"]
        holder.let_go()


def test_launch_says_in_one_line_what_is_left_out_and_tells_the_plan_that_is_in_force(ground: Ground) -> None:
    report = f"{ground.alice.home}/run.json"
    status = f"{COMMANDS}/securerunctl status --json"
    with server(ground, ground.bob, 60003):
        command = [
            str(COMMANDS / "securerunctl"),
            "exec",
            "--peers",
            "localhost",
            "--report",
            report,
            "--",
            "sh",
            "-c",
            status,
        ]
        done = ground.run(ground.alice, command)
    assert done.returncode == 0, done
    lines = [line for line in done.stderr.splitlines() if "60003" in line]
    assert len(lines) == 1 and "HCCL" in lines[0], done.stderr
    assert "kill" not in done.stderr
    assert "TCP ports 60000-60002, 60004-60015 closed to all others" in done.stderr
    in_force = [hccl(DEFAULT, 60000, 60002), hccl(DEFAULT, 60004, 60015)]
    (run,) = json.loads(done.stdout)["runs"]
    assert run["ports"] == in_force
    written = json.loads(ground.machine.place(report).read_text())
    assert written["launch"]["policy"]["ports"] == in_force
    assert any("60003" in note for note in written["notes"])


def test_root_closes_nobody_by_the_default_range(ground: Ground) -> None:
    with server(ground, ground.bob, 60003):
        done = ground.machine.run(
            ground.node, [COMMANDS / "securerunctl", "exec", "--peers", "localhost", "--", "true"]
        )
        assert done.returncode == 0, done
        assert "TCP ports 60000-60002, 60004-60015 closed" in done.stderr


def test_stranger_to_hccl_trains_beside_another_users_listener(ground: Ground) -> None:
    script = ground.machine.write("train.py", "print('trained')", owner=ground.alice)
    with server(ground, ground.bob, 60003):
        done = ground.run(ground.alice, [jobs.SECURERUN, "--preflight", "warn", script])
    assert (done.returncode, done.stdout) == (0, "trained\n"), done
    assert "kill" not in done.stderr


@pytest.mark.parametrize(("purpose", "scope"), [(DEFAULT, "auto"), ("planned", "auto"), ("planned", "ports")])
def test_another_users_listener_cannot_keep_the_next_guard_from_a_job(ground: Ground, purpose: str, scope: str) -> None:
    """Who came to listen on a port of the plan, while its guard died: what nobody asked for is given way soon."""
    options = ("--ports", "60000-60015", "--purpose", purpose, "--scope", scope, "--listen", "60004")
    holder = ground.holder(ground.alice, *options)
    assert holder.process.stdin is not None
    guard = json.loads(ground.machine.place(f"/run/securerun/{holder.run_id}.json").read_text())["guard"]
    os.kill(guard, signal.SIGSTOP)
    with server(ground, ground.bob, 60003):
        os.kill(guard, signal.SIGKILL)
        try:
            assert "another has taken over" in holder.hear()["news"]
            assert eventually(lambda: is_open(ground) == (purpose == DEFAULT))
            assert not is_open(ground, 60004)
        finally:
            holder.process.stdin.close()
    assert holder.process.wait(timeout=30) == 0
