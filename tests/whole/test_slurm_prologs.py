"""Slurm without a changed word: a plain `srun torchrun train.py` trains behind what an administrator installed."""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from checkout import COMMANDS
from conversation import Conversation, guards, nothing_left, order, permit, socket_unit
from hosts import eventually, finish, require_root_and_tools
from probe import reach
from process_table import name_of
from remains import nothing_left_behind
from slurm import Cluster
from slurm_site import NODES, Site
from test_examples import LISTENER, Training, no_port_reached, require_open_to_peers_alone
from users import User

from securerun.guard import program
from securerun.protection.ways import SOCKET

TRACKINGS = ("linuxproc", "cgroup/v2")
TORCHRUN = str(COMMANDS / "torchrun")
PYTHON = sys.executable
# srun listens where the job's own batch script runs it.
SLURMD = {slurm.SLURMD_PORT}


@pytest.fixture(scope="module")
def site(root: None) -> Iterator[Site]:
    require_root_and_tools()
    slurm.require_tools()
    with Site() as made:
        yield made


def plain(site: Site, script: Path, port: int = 29511) -> list[str]:
    """What a user writes who knows nothing of securerun."""
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{site.nodes[0].ipv4}:{port}", "--rdzv-id", "x")
    return ["srun", "--nodes=2", "--ntasks-per-node=1", TORCHRUN, "--nnodes", "2", *meet, str(script)]


def wait_for(training: Training, job: subprocess.Popen[str], site: Site, cluster: Cluster) -> None:
    try:
        training.wait_for(2)
    except AssertionError:
        job.kill()
        done = finish(job, timeout=10)
        raise AssertionError(f"{done}\n{site.log()}\n{cluster.logs()}") from None


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_plain_srun_torchrun_trains_behind_the_task_prolog(site: Site, tracking: str) -> None:
    with site.cluster(tracking, "task-prolog") as cluster, site.place() as place, nothing_left_behind(*site.nodes):
        training = Training(place)
        with no_port_reached(site.stranger, site.nodes, ignore=SLURMD):
            job = cluster.popen(site.alice, *plain(site, training.script))
            wait_for(training, job, site, cluster)
            require_open_to_peers_alone(site.nodes, site.stranger, ignore=slurm.PORTS)
            slurmds = [(node.ipv4, slurm.SLURMD_PORT) for node in site.nodes]
            assert reach(site.stranger, slurmds) == dict.fromkeys(slurmds, True), "Slurm's own ports stay as they are"
            for node in NODES:
                (run,) = site.runs(node, site.alice)
                assert (run["user"], run["state"]) == ("alice", "guarding")
                assert [layer["backend"] for layer in run["layers"]] == ["shield", "iptables"]
                assert run["key"]["source"] == "/etc/munge/munge.key", "the job's, which nobody made"
                assert site.runs(node, site.bob) == []
            training.go_on()
            done = finish(job, timeout=60)
        assert done.returncode == 0 and "rank 0 of 2" in done.stdout, done
        assert "securerun" not in done.stdout
        told = [line for line in done.stderr.splitlines() if "securerun" in line]
        assert 1 <= len(told) <= 2 * len(NODES), "a line a minute of each node"
        assert all(f"turned away: {site.stranger.ipv4} at port " in line for line in told), told
        assert site.is_clean(), site.log()


def test_tasks_whose_user_insists_on_a_key_train_behind_the_task_prolog(site: Site) -> None:
    """Slurm's controllers show no tag: named beside it they would have bound everybody to their addresses."""
    with site.cluster(TRACKINGS[0], "task-prolog") as cluster, site.place() as place:
        training = Training(place)
        with no_port_reached(site.stranger, site.nodes, ignore=SLURMD):
            job = cluster.popen(site.alice, *plain(site, training.script), env={"SECURERUN_KEY": "require"})
            wait_for(training, job, site, cluster)
            (run,) = site.runs(NODES[0], site.alice)
            assert run["peers"] == [] and run["key"]["source"] == "/etc/munge/munge.key", run
            training.go_on()
            done = finish(job, timeout=60)
        assert done.returncode == 0 and "rank 0 of 2" in done.stdout, done
        assert site.is_clean(), site.log()


def test_plain_srun_torchrun_trains_behind_the_prolog(site: Site) -> None:
    with (
        site.cluster("cgroup/v2", "prolog", "epilog") as cluster,
        site.place() as place,
        nothing_left_behind(*site.nodes),
    ):
        training = Training(place)
        with no_port_reached(site.stranger, site.nodes, ignore=SLURMD):
            job = cluster.popen(site.alice, *plain(site, training.script))
            wait_for(training, job, site, cluster)
            require_open_to_peers_alone(site.nodes, site.stranger, ignore=slurm.PORTS)
            slurmds = [(node.ipv4, slurm.SLURMD_PORT) for node in site.nodes]
            assert reach(site.stranger, slurmds) == dict.fromkeys(slurmds, True), "Slurm's own ports stay as they are"
            for node in NODES:
                (run,) = site.runs(node)
                assert run["user"] == "alice" and run["layers"][0]["name"].endswith("/job_1"), run
                assert [own["run_id"] for own in site.runs(node, site.alice)] == [run["run_id"]]
                assert site.runs(node, site.bob) == []
            training.go_on()
            done = finish(job, timeout=60)
        assert done.returncode == 0 and "rank 0 of 2" in done.stdout, done
        assert site.is_clean(), site.log()


def _listens(place: Path, number: int) -> list[str]:
    """A program of a job's that listens on a port of its own choice, and says which."""
    return ["env", f"NUMBER={number}", PYTHON, "-c", LISTENER.format(place=str(place))]


def ask_for_peers(site: Site, cluster: Cluster, user: User) -> subprocess.CompletedProcess[str]:
    """What a guard has asked for job 1, as the guard starts it: of user id 0, with no capability and no environment."""
    variables = ("PATH=/usr/bin:/bin", "LC_ALL=C", *(f"{name}={text}" for name, text in cluster.environment.items()))
    bare = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "env", "-i", *variables)
    command = program.of_slurm("peers", "1", str(user.uid))
    return site.machines["sl0"].run(site.nodes[0], [*bare, *command])


def peers_of(site: Site, cluster: Cluster) -> set[str]:
    """Which addresses a guard hears from Slurm that job 1 has: its nodes' and the controller's."""
    done = ask_for_peers(site, cluster, site.alice)
    assert done.returncode == 0, done
    networks = [ipaddress.ip_network(text) for text in json.loads(done.stdout)["peers"]["networks"]]
    return {str(address) for network in networks for address in network}


def test_node_that_a_job_gave_back_is_no_peer_of_it_any_more(site: Site) -> None:
    with site.cluster("linuxproc") as cluster:
        job = cluster.popen(site.alice, "srun", "--no-kill", "--nodes=2", "sleep", "60")
        assert eventually(lambda: "RUNNING" in cluster.run("scontrol", "show", "job"), seconds=30)
        assert peers_of(site, cluster) == {"10.77.0.1", "10.77.0.2", "10.77.0.3"}
        cluster.run("scontrol", "update", "JobId=1", "NumNodes=1")
        assert eventually(lambda: peers_of(site, cluster) == {"10.77.0.1", "10.77.0.3"}, seconds=30)
        done = ask_for_peers(site, cluster, site.bob)
        assert done.returncode == 78 and f"no job 1 of user {site.bob.uid}" in done.stdout, done
        cluster.run("scancel", "1")
        finish(job, timeout=60)


def test_whole_job_has_its_killed_guard_replaced_again_and_again_within_seconds(site: Site) -> None:
    """With all that it looks after: port chains that are put back, notices, a status, and the end with the job."""
    machine, host = site.machines["sl0"], site.nodes[0]
    with (
        site.cluster("cgroup/v2", "prolog", "epilog", options=("--ports", "7100")) as cluster,
        site.place() as place,
        nothing_left_behind(*site.nodes),
    ):
        job = cluster.popen(site.alice, "srun", "--nodes=1", "--nodelist=sl0", *_listens(place, 1))
        port = place / "port 1"
        assert eventually(port.exists, seconds=60), (site.log(), cluster.logs())
        target = (host.ipv4, int(port.read_text()))
        (run,) = site.runs("sl0")
        for _ in range(2):
            (guard,) = guards(machine)
            os.kill(guard, signal.SIGKILL)
            assert eventually(lambda killed=guard: guards(machine) not in ([], [killed]), seconds=10), site.log()  # type: ignore[misc]
            assert eventually(lambda: site.runs("sl0")[0]["state"] == "guarding", seconds=10), site.log()
            (again,) = site.runs("sl0")
            assert (again["run_id"], again["layers"]) == (run["run_id"], run["layers"])
            assert again["peers"] == run["peers"]
        assert reach(site.stranger, [target]) == {target: False}
        assert "its guard was killed, and this one goes on" in site.log()
        assert eventually(lambda: f"turned away: {site.stranger.ipv4} at port {target[1]}" in site.log(), seconds=10)
        host.run(["iptables", "-F", "SECURERUN"], check=True)
        assert eventually(lambda: "somebody flushed the port chains away; they are back" in site.log(), seconds=15)
        (place / "end 1").touch()
        assert finish(job, timeout=60).returncode == 0
        assert site.is_clean(), site.log()
        assert not [pid for pid in machine.processes() if name_of(pid) == program.WAITING_NAME]


def test_whole_job_stays_closed_when_all_that_guards_it_is_killed_and_the_next_job_tidies_up(site: Site) -> None:
    with (
        site.cluster("cgroup/v2", "prolog", "epilog") as cluster,
        site.place() as place,
        nothing_left_behind(*site.nodes),
    ):
        for number in (1, 2):
            command = ("srun", "--nodes=1", "--nodelist=sl0", *_listens(place, number))
            job = cluster.popen(site.alice, *command)
            port = place / f"port {number}"
            assert eventually(port.exists, seconds=60), (site.log(), cluster.logs())
            if number == 1:
                machine = site.machines["sl0"]
                waiting = [pid for pid in machine.processes() if name_of(pid) == program.WAITING_NAME]
                for pid in (*waiting, *guards(machine)):
                    os.kill(pid, signal.SIGKILL)
                assert eventually(lambda: not guards(site.machines["sl0"]))
                assert site.runs("sl0")[0]["state"] == "stale"
            target = (site.nodes[0].ipv4, int(port.read_text()))
            assert reach(site.stranger, [target]) == {target: False}
            (place / f"end {number}").touch()
            assert finish(job, timeout=60).returncode == 0
        assert site.is_clean(), site.log()


def test_srun_in_a_batch_script_and_every_step_of_it_are_closed_by_the_prolog(site: Site) -> None:
    """Between two steps Slurm would remove the job's cgroup, and make another one without a shield."""
    with (
        site.cluster("cgroup/v2", "prolog", "epilog", options=("--peers", site.network["login"].ipv4)) as cluster,
        site.place() as place,
        nothing_left_behind(*site.nodes),
    ):
        steps = "\n".join(f"srun --nodes=1 --nodelist=sl1 {shlex.join(_listens(place, step))}" for step in (1, 2))
        script = place / "job.sh"
        script.write_text(f"#!/bin/sh\n{steps}\n")
        output = place / "output"
        submit = ("sbatch", "--parsable", "--nodes=2", f"--output={output}", str(script))
        with no_port_reached(site.stranger, site.nodes, ignore=SLURMD):
            done = finish(cluster.popen(site.alice, *submit), timeout=30)
            assert done.returncode == 0, done
            for step in (1, 2):
                port = place / f"port {step}"
                assert eventually(port.exists, seconds=60), (output.read_text(), site.log(), cluster.logs())
                target = (site.nodes[1].ipv4, int(port.read_text()))
                for host, is_open in ((site.nodes[0], True), (site.network["login"], True), (site.stranger, False)):
                    assert reach(host, [target]) == {target: is_open}, (step, host)
                assert peers_of(site, cluster) == {"10.77.0.1", "10.77.0.2", "10.77.0.3"}
                (place / f"end {step}").touch()
            assert cluster.wait_for_end(done.stdout.strip(), seconds=60) == "COMPLETED", output.read_text()
        assert site.is_clean(), site.log()


def test_task_that_no_guard_can_be_had_for_does_not_start_and_says_why(site: Site) -> None:
    with site.cluster("linuxproc", "task-prolog", sockets=False) as cluster:
        done = finish(cluster.popen(site.alice, "srun", "--nodes=2", "echo", "task ran"), timeout=60)
        assert done.returncode == 77 and "task ran" not in done.stdout, done
        why = f"{SOCKET} cannot be connected to: No such file"
        assert f"securerun: this task cannot be guarded, so it is not started: {why}" in done.stdout
        assert "securerunctl setup slurm" in done.stdout


def test_node_whose_prolog_fails_is_drained_with_a_reason_that_says_what_to_do(site: Site) -> None:
    """Slurm has no cgroup of version 2 there, so nothing can be closed before the job is there."""
    with site.cluster("linuxproc", "prolog", "epilog", sockets=False) as cluster:
        job = cluster.popen(site.alice, "srun", "--nodes=1", "--nodelist=sl0", "echo", "task ran")
        said = ""

        def is_drained() -> bool:
            nonlocal said
            said = cluster.run("sinfo", "--list-reasons", "--noheader", "--format=%400E %N")
            return "sl0" in said

        assert eventually(is_drained, seconds=30), cluster.logs()
        assert "securerun: Slurm has no cgroup of version 2 on this node" in said and "TaskProlog" in said, said
        done = finish(job, timeout=60)
        assert "task ran" not in done.stdout and site.is_clean(), done


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_job_that_is_cancelled_while_its_prolog_runs_leaves_nothing(site: Site, tracking: str) -> None:
    programs = ("prolog", "epilog", "task-prolog") if tracking == "cgroup/v2" else ("task-prolog",)
    with site.cluster(tracking, *programs) as cluster, nothing_left_behind(*site.nodes):
        for number, pause in enumerate((0.1, 0.5, 0.9), 1):
            job = cluster.popen(site.alice, "srun", "--nodes=2", "sleep", "60")
            known = f"JobId={number} "
            assert eventually(lambda known=known: known in cluster.run("scontrol", "show", "job"), seconds=30)  # type: ignore[misc]
            time.sleep(pause)
            cluster.run("scancel", str(number))
            finish(job, timeout=60)
            assert site.is_clean(), site.log()


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        (("task-prolog",), "guards this process already, so no second lease is taken"),
        (("prolog", "epilog"), "of /etc/munge/munge.key, the same on all nodes"),
    ],
    ids=["in a task", "below a prolog"],
)
def test_securerun_in_a_job_knows_that_its_task_is_guarded_and_else_has_a_key(
    site: Site, programs: tuple[str, ...], words: str
) -> None:
    launch = (str(COMMANDS / "securerunctl"), "exec", "--preflight", "off", "--key", "require", "--", "true")
    with site.cluster("cgroup/v2", *programs) as cluster, nothing_left_behind(*site.nodes):
        job = cluster.popen(site.alice, "srun", "--nodes=2", *launch)
        done = finish(job, timeout=60)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{site.log()}"
        assert done.stderr.count(words) == 2, done.stderr
        assert site.is_clean(), site.log()


# --- Attacks ----------------------------------------------------------------------------------------


def _whole(site: Site, **changes: object) -> dict[str, object]:
    cgroup = "/system.slice/sl0_slurmstepd.scope/job_7"
    return {"job": 7, "speaks": True, "renews": True, "user": site.bob.uid, "cgroup": cgroup, "more": "", **changes}


@pytest.mark.parametrize("way", ["socket", "sudo"])
def test_user_who_fakes_the_prologs_order_gets_no_guard_of_a_whole_job(site: Site, way: str) -> None:
    machine, node = site.machines["sl0"], site.nodes[0]
    with socket_unit(machine, node), nothing_left(machine, node):
        permit(machine, site.alice)
        talk = Conversation(machine, node, site.alice, way)
        assert talk.hear()["ready"]
        talk.say(order(slurm=_whole(site)))
        refused = talk.hear_verdict()["refused"]
        assert refused["status"] == 77 and "for root's Prolog" in refused["message"]
        talk.hang_up()


@pytest.mark.parametrize(
    "cgroup",
    [
        "/",
        "/system.slice",
        "/system.slice/sl0_slurmstepd.scope/job_8",
        "/system.slice/sl0_slurmstepd.scope/../../job_7",
        "/user.slice/job_7",
        "system.slice/slurmstepd.scope/job_7",
    ],
)
def test_even_root_orders_a_guard_for_no_cgroup_that_is_not_of_the_job(site: Site, cgroup: str) -> None:
    machine, node = site.machines["sl0"], site.nodes[0]
    with nothing_left(machine, node):
        talk = Conversation(machine, node, None, "direct")
        assert talk.hear()["ready"]
        talk.say(order(slurm=_whole(site, cgroup=cgroup)))
        assert "cgroup is not that of job 7" in talk.hear_verdict()["refused"]["message"]
        talk.hang_up()


def test_nobody_has_a_process_of_another_user_guarded_by_asking_for_a_parent(site: Site) -> None:
    """The parent of whoever asks is root's shell here."""
    machine, node = site.machines["sl0"], site.nodes[0]
    with socket_unit(machine, node), nothing_left(machine, node):
        talk = Conversation(machine, node, site.alice, "socket")
        assert talk.hear()["ready"]
        talk.say(order(slurm={"job": 7, "speaks": True, "renews": False}))
        message = talk.hear_verdict()["refused"]["message"]
        assert "asks for its parent" in message, message
        talk.hang_up()


def test_who_names_anothers_job_says_nothing_to_it(site: Site) -> None:
    with site.cluster("linuxproc") as cluster, site.place() as place:
        bobs = cluster.popen(site.bob, "srun", "--nodes=2", "sleep", "60")
        assert eventually(lambda: "RUNNING" in cluster.run("scontrol", "show", "job"), seconds=30)
        machine, node = site.machines["sl0"], site.nodes[0]
        names = {"SLURM_JOB_ID": "1", "SECURERUN_PEERS": node.ipv4, **cluster.environment}
        task = "/etc/slurm/task-prolog.sh; exec " + shlex.join(_listens(place, 1))
        alices = machine.popen(node, ["sh", "-c", task], user=site.alice, env=names)
        port = place / "port 1"
        assert eventually(port.exists, seconds=30), site.log()
        target = (node.ipv4, int(port.read_text()))
        assert reach(site.stranger, [target]) == {target: False}
        said = "nothing is said to job 1 of Slurm's, which is not known to be user"
        assert eventually(lambda: said in site.log(), seconds=30), site.log()
        cluster.run("scancel", "1")
        done = finish(bobs, timeout=60)
        assert "securerun" not in done.stdout + done.stderr, done
        (place / "end 1").touch()
        finish(alices, timeout=30)
        assert site.is_clean(), site.log()
