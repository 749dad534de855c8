"""The examples run as they stand: each trains on two nodes; its ports are open to these and closed to a stranger."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jobs
import pytest
import slurm
import yaml
from checkout import COMMANDS
from containers import DOCKER_CAPABILITIES, WRITABLE_CGROUPS, container
from hosts import Host, Network, eventually, finish, finish_all, require_root_and_tools
from probe import Probe, reach
from remains import nothing_left_behind
from slurm import Cluster

from securerun.guard.program import SOCKET

EXAMPLES = jobs.TRAIN.parent
SLURM_JOB, SLURM_TASKS = EXAMPLES / "slurm/job.sh", EXAMPLES / "slurm/tasks.sh"
# The commands of the tests' own Python, and no other securerun that the machine may have.
PATH = {"PATH": f"{COMMANDS}:{os.environ['PATH']}"}
_START_SECONDS = 90.0

# What stands in for a training: it meets the others, says so by a file a rank, and waits to be told to end.
_TRAINING = """\
import os, pathlib, signal, sys, time
import torch, torch.distributed as dist
place = pathlib.Path({place!r})
if (place / "stubborn").exists():
    signal.signal(signal.SIGTERM, lambda *_: (place / f"asked {{dist.get_rank()}}").touch())
dist.init_process_group("gloo")
total = torch.tensor(1.0)
dist.all_reduce(total)
print(f"rank {{dist.get_rank()}} of {{int(total)}}: {{' '.join(sys.argv[1:])}}", flush=True)
(place / f"trained {{dist.get_rank()}}").touch()
while not (place / "go on").exists():
    time.sleep(0.05)
dist.barrier()
dist.destroy_process_group()
"""

# Says on which port it listens, and waits.
LISTENER = """
import os, pathlib, socket, time
place, number = pathlib.Path({place!r}), os.environ["NUMBER"]
listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
(place / "new").write_text(str(listener.getsockname()[1]))
(place / "new").rename(place / f"port {{number}}")
while not (place / f"end {{number}}").exists():
    time.sleep(0.05)
"""


class Training:
    """A job to be watched: its script, and the directory by which it is talked to."""

    def __init__(self, place: Path, name: str = "train.py") -> None:
        self.place = place
        self.script = place / name
        self.script.write_text(_TRAINING.format(place=str(place)))

    def be_stubborn(self) -> None:
        """From now on its workers do not end at SIGTERM."""
        (self.place / "stubborn").touch()

    def was_asked_to_end(self) -> int:
        """How many of them had a SIGTERM nevertheless."""
        return len(list(self.place.glob("asked *")))

    def go_on(self) -> None:
        (self.place / "go on").touch()

    def wait_for(self, workers: int) -> None:
        """Return when all of them have met."""

        def have_met() -> bool:
            return len(list(self.place.glob("trained *"))) == workers

        assert eventually(have_met, seconds=_START_SECONDS), sorted(self.place.iterdir())


@contextmanager
def no_port_reached(stranger: Host, nodes: Iterable[Host], *, ignore: Iterable[int] = ()) -> Iterator[None]:
    """While the block runs the stranger tries every port of the nodes that listens, and gets at none."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(Probe(stranger, node, ignore=ignore)) for node in nodes]
        yield
    for probe in probes:
        assert probe.tried, "nothing was ever tried"
        assert probe.reached == set()


def require_open_to_peers_alone(nodes: Sequence[Host], stranger: Host, *, ignore: Iterable[int] = ()) -> None:
    """Every port of each node, now: open to the nodes by the addresses that the examples name, IPv4; else closed."""
    for node in nodes:
        targets = {(address, port) for address, port in node.targets() if port not in ignore}
        named = {target for target in targets if target[0] == node.ipv4}
        assert named
        for peer in nodes:
            assert reach(peer, named) == dict.fromkeys(named, True), (peer, node)
        assert reach(stranger, targets) == dict.fromkeys(targets, False), node


def run_on_both(
    network: Network,
    training: Training,
    commands: Sequence[Sequence[str]],
    *,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    umask: int = -1,
) -> list[str]:
    """Run a job of one worker a node; check it while it waits. Returns what each node said on standard error."""
    nodes, stranger = (network["node0"], network["node1"]), network["stranger"]
    with nothing_left_behind(*nodes), no_port_reached(stranger, nodes):
        started = [node.popen(command, env=env, cwd=cwd, umask=umask) for node, command in zip(nodes, commands)]
        try:
            training.wait_for(len(nodes))
        except AssertionError as late:
            training.go_on()
            raise AssertionError([one.stderr for one in finish_all(started)]) from late
        require_open_to_peers_alone(nodes, stranger)
        training.go_on()
        done = finish_all(started, timeout=60)
    assert [one.returncode for one in done] == [0, 0], done
    assert "rank 0 of 2" in done[0].stdout, done
    return [one.stderr for one in done]


# --- Slurm ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm_network(root: None) -> Iterator[Network]:
    """sl0 and sl1, a controller and a stranger."""
    require_root_and_tools()
    slurm.require_tools()
    with Network("sl0", "sl1", "controller", "stranger") as network:
        yield network


@contextmanager
def cluster_of(network: Network, tracking: str) -> Iterator[tuple[Cluster, tuple[Host, Host]]]:
    with Cluster(network, "controller", ("sl0", "sl1"), tracking=tracking) as cluster:
        yield cluster, (network["sl0"], network["sl1"])


def test_slurm_job_trains_on_both_nodes_and_the_stranger_reaches_nothing(
    slurm_network: Network, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with (
        cluster_of(slurm_network, "linuxproc") as (cluster, nodes),
        nothing_left_behind(*nodes),
        no_port_reached(slurm_network["stranger"], nodes, ignore=slurm.PORTS),
    ):
        job = cluster.submit(f"--output={output}", SLURM_JOB, jobs.TRAIN, "--groups", "3", env=PATH)
        assert cluster.wait_for_end(job, seconds=120) == "COMPLETED", output.read_text()
    said = output.read_text()
    assert jobs.last_loss(said) < 0.35
    assert "4 workers, all-reduce right in 4 groups" in said
    # Their names resolve nowhere: the addresses are Slurm's own, and nobody has named a peer.
    assert said.count(f"open to {nodes[0].ipv4}, {nodes[1].ipv4} (Slurm (SLURM_JOB_NODELIST))") == 2, said
    assert said.count("closed to all others by shield") == 2, said


def test_slurm_tasks_without_torchrun_train_closed_to_the_stranger_and_one_a_node_speaks(
    slurm_network: Network, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    training = Training(tmp_path)
    stranger = slurm_network["stranger"]
    with (
        cluster_of(slurm_network, "linuxproc") as (cluster, nodes),
        nothing_left_behind(*nodes),
        no_port_reached(stranger, nodes, ignore=slurm.PORTS),
    ):
        small = ("--ntasks-per-node=2", "--overcommit", f"--output={output}")
        job = cluster.submit(*small, SLURM_TASKS, training.script, env=PATH)
        try:
            training.wait_for(4)
        except AssertionError:
            raise AssertionError(output.read_text() if output.exists() else cluster.logs()) from None
        require_open_to_peers_alone(nodes, stranger, ignore=slurm.PORTS)
        training.go_on()
        assert cluster.wait_for_end(job, seconds=60) == "COMPLETED", output.read_text()
    said = output.read_text()
    assert "rank 0 of 4" in said
    for line in ("closed to all others by shield", "one of 2 tasks of this node", "umask 0027; guard started"):
        assert said.count(line) == 2, said
    assert said.count("nobody was turned away") <= 2 and "in use" not in said


def test_slurm_allocation_never_calls_closed_what_slurmstepd_starts(slurm_network: Network, tmp_path: Path) -> None:
    """The stranger does reach what srun starts; guarded where it starts, nobody does."""
    node, stranger = slurm_network["sl0"], slurm_network["stranger"]
    listen = [sys.executable, "-c", LISTENER.format(place=str(tmp_path))]
    guarded = [str(COMMANDS / "securerunctl"), "exec", "--preflight", "off", "--"]
    with cluster_of(slurm_network, "linuxproc") as (cluster, _):
        for number, command in enumerate(([*guarded, "srun", *listen], ["srun", *guarded, *listen])):
            port = tmp_path / f"port {number}"
            env = {**PATH, **cluster.environment, "NUMBER": str(number)}
            job = slurm_network["controller"].popen(["salloc", "--nodelist=sl0", *command], env=env)
            assert eventually(port.exists, seconds=30), finish(job, timeout=10)
            target = (node.ipv4, int(port.read_text()))
            is_open = reach(stranger, [target])[target]
            (tmp_path / f"end {number}").touch()
            said = finish(job, timeout=30).stderr
            assert is_open is (number == 0), said
            assert ("every TCP port of this job" in said) is not is_open, said
            assert ("what srun starts is not guarded: slurmstepd starts it" in said) is is_open, said


def test_slurm_job_is_open_to_its_nodes_and_scancel_leaves_nothing(slurm_network: Network, tmp_path: Path) -> None:
    output = tmp_path / "output"
    training = Training(tmp_path)
    with cluster_of(slurm_network, "linuxproc") as (cluster, nodes), nothing_left_behind(*nodes):
        job = _submit_waiting(cluster, training, output)
        require_open_to_peers_alone(nodes, slurm_network["stranger"], ignore=slurm.PORTS)
        cluster.run("scancel", job)
        assert cluster.wait_for_end(job, seconds=30) == "CANCELLED"
    assert "Received 15 death signal" in output.read_text()


@pytest.mark.parametrize("tracking", ["linuxproc", "cgroup/v1", "cgroup/v2"])
def test_slurm_job_that_outlives_scancel_is_killed_and_nothing_stays(
    slurm_network: Network, tmp_path: Path, tracking: str
) -> None:
    if tracking == "cgroup/v1" and not slurm.FREEZER.is_dir():
        pytest.skip("no freezer of cgroup version 1 is mounted")
    output = tmp_path / "output"
    training = Training(tmp_path)
    training.be_stubborn()
    with cluster_of(slurm_network, tracking) as (cluster, nodes), nothing_left_behind(*nodes):
        job = _submit_waiting(cluster, training, output)
        require_open_to_peers_alone(nodes, slurm_network["stranger"], ignore=slurm.PORTS)
        cluster.run("scancel", job)
        assert cluster.wait_for_end(job, seconds=30) == "CANCELLED"
    assert training.was_asked_to_end() == 2
    assert output.read_text().count("closed to all others by shield") == 2


def _submit_waiting(cluster: Cluster, training: Training, output: Path) -> str:
    """Start a job of one worker a node; return when both have met."""
    environment = {**PATH, "WORKERS_PER_NODE": "1"}
    job = cluster.submit(f"--output={output}", SLURM_JOB, training.script, env=environment)
    try:
        training.wait_for(2)
    except AssertionError:
        raise AssertionError(output.read_text() if output.exists() else cluster.logs()) from None
    return job


# --- Kubernetes -------------------------------------------------------------------------------------

# volcano.sh/apis/pkg/apis/batch/v1alpha1/job.go and kubeflow/training-operator/pkg/apis/kubeflow.org/v1.
_JOB_FIELDS = {
    "Job": {
        "schedulerName",
        "minAvailable",
        "volumes",
        "tasks",
        "policies",
        "plugins",
        "runningEstimate",
        "queue",
        "maxRetry",
        "ttlSecondsAfterFinished",
        "priorityClassName",
        "minSuccess",
        "networkTopology",
    },
    "PyTorchJob": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
}
_REPLICA_FIELDS = {
    "Job": {"name", "replicas", "minAvailable", "template", "policies", "topologyPolicy", "maxRetry", "dependsOn"},
    "PyTorchJob": {"replicas", "template", "restartPolicy"},
}


def test_volcano_job_runs_with_the_pods_that_volcano_names(network: Network, tmp_path: Path) -> None:
    (manifest,) = _manifests("volcano.yaml", "batch.volcano.sh/v1alpha1 Job")
    (task,) = _replicas(manifest)
    assert set(manifest["spec"]["plugins"]) == {"svc", "env"}
    assert task["replicas"] == manifest["spec"]["minAvailable"] == 2
    name = manifest["metadata"]["name"]
    pods = [f"{name}-{task['name']}-{index}.{name}" for index in range(2)]
    nodes = (network["node0"], network["node1"])
    training = Training(tmp_path)
    commands = []
    for index in range(2):
        # The plugins svc and env; the last two as Ascend Operator sets them, which means other things by them.
        variables = {
            f"VC_{task['name'].upper()}_HOSTS": ",".join(pods),
            f"VC_{task['name'].upper()}_NUM": "2",
            "VC_TASK_INDEX": str(index),
            "RANK": "7",
            "WORLD_SIZE": "16",
        }
        hosts = [(node.ipv4, pod) for node, pod in zip(nodes, pods)]
        commands.append(_pod(task["template"], variables, hosts, training, name=pods[index].partition(".")[0]))
    for said in run_on_both(network, training, commands):
        assert f"open to {nodes[0].ipv4}, {nodes[1].ipv4} (Volcano (VC_WORKER_HOSTS))" in said
        assert "closed to all others by shield" in said


def test_pytorchjob_runs_with_the_pods_of_its_headless_service(network: Network, tmp_path: Path) -> None:
    service, manifest = _manifests("pytorchjob.yaml", "v1 Service", "kubeflow.org/v1 PyTorchJob")
    name = manifest["metadata"]["name"]
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"training.kubeflow.org/job-name": name},
    }
    master, worker = _replicas(manifest)
    assert master["replicas"] + worker["replicas"] == 2
    nodes = (network["node0"], network["node1"])
    hosts = [(nodes[0].ipv4, f"{name}-master-0"), *((node.ipv4, service["metadata"]["name"]) for node in nodes)]
    training = Training(tmp_path)
    commands = []
    for rank, replica in enumerate((master, worker)):
        operator = {"MASTER_ADDR": f"{name}-master-0", "MASTER_PORT": "23456", "RANK": str(rank), "WORLD_SIZE": "2"}
        commands.append(_pod(replica["template"], operator, hosts, training, name=f"{name}-pod-{rank}"))
    for said in run_on_both(network, training, commands):
        assert f"open to {nodes[0].ipv4}, {nodes[1].ipv4} (SECURERUN_PEERS)" in said
        assert "closed to all others by shield" in said


def _manifests(name: str, *expected: str) -> list[dict[str, Any]]:
    found = list(yaml.safe_load_all((EXAMPLES / "kubernetes" / name).read_text()))
    assert [f"{one['apiVersion']} {one['kind']}" for one in found] == list(expected)
    return found


def _replicas(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the job has pods of; every field is one of the resource's."""
    kind, spec = manifest["kind"], manifest["spec"]
    assert set(spec) <= _JOB_FIELDS[kind]
    found = spec["tasks"] if kind == "Job" else [spec["pytorchReplicaSpecs"][one] for one in ("Master", "Worker")]
    for replica in found:
        assert set(replica) <= _REPLICA_FIELDS[kind]
    return list(found)


def _pod(
    template: dict[str, Any],
    variables: Mapping[str, str],
    hosts: Iterable[tuple[str, str]],
    training: Training,
    *,
    name: str,
) -> list[str]:
    """The command of a pod's only container as Kubernetes runs it, with one worker.

    variables: what the operator adds to the container's own. hosts: what the cluster's name service knows.
    """
    spec = template["spec"]
    (one,) = spec["containers"]
    assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert [volume["hostPath"]["path"] for volume in spec["volumes"]] == [str(SOCKET.parent)]
    assert [mount["mountPath"] for mount in one["volumeMounts"]] == [str(SOCKET.parent)]
    environment = {
        **{variable["name"]: variable["value"] for variable in one.get("env", ())},
        **variables,
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    }
    words = [*one["command"], *one["args"]]
    expanded = [re.sub(r"\$\((\w+)\)", lambda found: environment[found.group(1)], word) for word in words]
    table = training.place / f"hosts of {name}"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for address, host in hosts))
    script = f'mount --bind {shlex.quote(str(table))} /etc/hosts && hostname {name} && exec "$@"'
    settings = [f"{variable}={value}" for variable, value in environment.items()]
    return [
        *("unshare", "--mount", "--uts", "sh", "-c", script, "sh"),
        *("env", f"PATH={PATH['PATH']}", *settings),
        *_made_small(expanded, training),
    ]


def _made_small(words: Sequence[str], training: Training) -> list[str]:
    """A container's command with one worker in place of eight, and the script in place of the image's."""
    replaced = {"--nproc-per-node=8": "--nproc-per-node=1", "/workspace/train.py": str(training.script)}
    assert set(replaced) <= set(words)
    return [replaced.get(word, word) for word in words]


# --- Docker -----------------------------------------------------------------------------------------


def test_docker_compose_has_what_the_shield_needs_and_its_command_trains(network: Network, tmp_path: Path) -> None:
    (service,) = _composed(NODE_RANK="0")["services"].values()
    assert service["network_mode"] == "host" and service["cgroup"] == "host" and service["init"] is True
    cgroups, hostfile = (volume.split(":") for volume in service["volumes"])
    assert cgroups == ["/sys/fs/cgroup", "/sys/fs/cgroup", "rw"]
    source, target, mode = hostfile
    assert (mode, service["environment"]["SECURERUN_PEERS"]) == ("ro", f"@{target}")
    capabilities = ",".join((DOCKER_CAPABILITIES, *(f"+{name.lower()}" for name in service["cap_add"])))
    training = Training(tmp_path)
    commands = []
    for rank in range(2):
        (service,) = _composed(NODE_RANK=str(rank))["services"].values()
        variables = {**service["environment"], "SECURERUN_PEERS": f"@{EXAMPLES / 'docker' / source}", **PATH}
        settings = [f"{variable}={value}" for variable, value in variables.items()]
        command = ["env", *settings, *_made_small(service["command"], training)]
        commands.append(container(capabilities, WRITABLE_CGROUPS, *command))
    for said in run_on_both(network, training, commands):
        assert "(SECURERUN_PEERS @" in said
        assert "closed to all others by shield" in said


def test_docker_run_of_the_readme_is_the_compose_file() -> None:
    (service,) = _composed(NODE_RANK="0")["services"].values()
    text = (EXAMPLES / "docker/README.md").read_text()
    (line,) = re.findall(r"^ +(docker run (?:.*\\\n)+.*)$", text, re.MULTILINE)
    words = shlex.split(line.replace("\\\n", " ").replace("$PWD", "."))
    assert words[words.index("registry.example/train:latest") + 1 :] == service["command"]
    given = dict.fromkeys(zip(words, words[1:]))
    assert {("--network", "host"), ("--cgroupns", "host")} <= set(given)
    assert [value for flag, value in given if flag == "--cap-add"] == service["cap_add"]
    assert [value for flag, value in given if flag == "-v"] == service["volumes"]
    assert "--init" in words


def _composed(**variables: str) -> dict[str, Any]:
    """compose.yaml with its variables put in (docs.docker.com, Interpolation)."""

    def value(found: re.Match[str]) -> str:
        name, form, rest = found.groups()
        assert form == "-" or name in variables, rest
        return variables.get(name, rest)

    text = (EXAMPLES / "docker/compose.yaml").read_text()
    composed: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text))
    return composed


# --- MindSpeed-LLM ----------------------------------------------------------------------------------


def test_mindspeed_pretrain_script_runs_with_its_host_file(network: Network, tmp_path: Path) -> None:
    example = EXAMPLES / "mindspeed"
    training = Training(tmp_path, "pretrain_gpt.py")
    (tmp_path / "hostfile.txt").write_text((example / "hostfile.txt").read_text())
    text = (example / "pretrain_llama2_7b.sh").read_text()
    commands = []
    for rank in range(2):
        # As a user does it: the head of the script is edited on each node.
        script = tmp_path / f"pretrain on node {rank}.sh"
        script.write_text(_edited(text, NODE_RANK=str(rank), NPUS_PER_NODE="1"))
        commands.append(["bash", str(script)])
    for said in run_on_both(network, training, commands, env=PATH, cwd=tmp_path, umask=0o022):
        assert "(SECURERUN_PEERS @hostfile.txt)" in said
        assert "closed to all others by shield" in said
    log = tmp_path / "logs/pretrain_llama2_7b.log"
    assert "--distributed-backend nccl --load your model ckpt path" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o640


def _edited(text: str, **values: str) -> str:
    for name, value in values.items():
        text, count = re.subn(rf"^{name}=\S+$", f"{name}={value}", text, flags=re.MULTILINE)
        assert count == 1, name
    return text
