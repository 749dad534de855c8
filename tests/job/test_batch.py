"""What batch systems leave in a job's environment: the nodes are in it, whatever its form, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from securerun.errors import PolicyError
from securerun.job import batch
from securerun.job.batch import Allocation


@pytest.fixture(autouse=True)
def _no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own machine may be a node of a cluster."""
    monkeypatch.setattr(batch, "SCONTROL_DIRECTORIES", ())


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where to write a stand-in for Slurm's command: a real one needs a slurmctld (see examples/slurm)."""
    monkeypatch.setattr(batch, "SCONTROL_DIRECTORIES", (str(tmp_path / "nothing"), str(tmp_path)))
    return tmp_path / "scontrol"


def install(path: Path, script: str, mode: int = 0o755) -> None:
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(mode)


def find(environment: dict[str, str]) -> Allocation | None:
    return batch.allocation(environment, pytest.fail)


def nodes(environment: dict[str, str]) -> list[tuple[str, ...]]:
    found = find(environment)
    assert found is not None
    return [entry.words for entry in found.nodes]


def names(environment: dict[str, str]) -> list[str]:
    return [word for words in nodes(environment) for word in words]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_JOB_NODELIST": "cn1"}, ["cn1"]),
        ({"SLURM_JOB_NODELIST": " cn[1-3] "}, ["cn1", "cn2", "cn3"]),
        ({"SLURM_JOB_NODELIST": "cn[008-011,13]"}, ["cn008", "cn009", "cn010", "cn011", "cn13"]),
        ({"SLURM_JOB_NODELIST": "a,b[1,3],c-4.x"}, ["a", "b1", "b3", "c-4.x"]),
        ({"SLURM_JOB_NODELIST": "r[0-1]n[0-1]-ib"}, ["r0n0-ib", "r0n1-ib", "r1n0-ib", "r1n1-ib"]),
        ({"SLURM_JOB_NODELIST": "any,subnet"}, ["any", "subnet"]),
        ({"SLURM_NODELIST": "cn[1-2]"}, ["cn1", "cn2"]),
        ({"SLURM_NODELIST": "old", "SLURM_JOB_NODELIST": "new"}, ["new"]),
        (
            {
                "SLURM_JOB_NODELIST": "cn1",
                "SLURM_JOB_NODELIST_HET_GROUP_0": "cn1",
                "SLURM_JOB_NODELIST_HET_GROUP_1": "gn[1-2]",
            },
            ["cn1", "gn1", "gn2"],
        ),
        ({"LSB_MCPU_HOSTS": "hostA 8 hostB 16"}, ["hostA", "hostB"]),
        ({"LSB_HOSTS": "hostA hostA hostB hostB"}, ["hostA", "hostB"]),
        ({"LSB_MCPU_HOSTS": "hostA 8", "LSB_HOSTS": "hostA hostA"}, ["hostA"]),
        ({"VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job"}, ["job-worker-0.job", "job-worker-1.job"]),
        (
            {
                "VC_MASTER_HOSTS": "job-master-0.job",
                "VC_WORKER_HOSTS": "job-worker-0.job",
                "VC_WORKER_NUM": "1",
                "VC_PS_HOSTS": "",
            },
            ["job-master-0.job", "job-worker-0.job"],
        ),
        (
            {
                "KUBERNETES_SERVICE_HOST": "10.96.0.1",
                "PET_NNODES": "12",
                "PET_MASTER_ADDR": "my-node-0-0-node-0-0.my-node-0-0",
            },
            ["my-node-0-0"],
        ),
        (
            {
                "KUBERNETES_SERVICE_HOST": "10.96.0.1",
                "PET_NNODES": "2",
                "PET_MASTER_ADDR": "llm-node-0-0.llm.team-a.svc.cluster.local",
            },
            ["llm.team-a.svc.cluster.local"],
        ),
        ({"SLURM_JOB_NODELIST": "cn1", "LSB_HOSTS": "hostA", "VC_WORKER_HOSTS": "pod"}, ["cn1"]),
        ({"LSB_HOSTS": "hostA", "VC_WORKER_HOSTS": "pod"}, ["hostA"]),
    ],
)
def test_the_nodes_in_the_environment(environment: dict[str, str], expected: list[str]) -> None:
    assert sorted(names(environment)) == sorted(expected)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # Ascend Operator means NPUs and the node rank by these; torchrun's workers have them from torchrun.
        {"WORLD_SIZE": "16", "RANK": "1", "MASTER_ADDR": "10.96.0.12", "NNODES": "2", "SLURM_NNODES": "2"},
        {"SLURM_JOB_NODELIST": " ", "PBS_NODEFILE": "", "LSB_HOSTS": "", "VC_WORKER_HOSTS": " ,"},
        {"OMPI_MCA_orte_default_hostfile": "none"},
    ],
)
def test_an_environment_that_names_no_node_names_none(environment: dict[str, str]) -> None:
    assert find(environment) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"KUBERNETES_SERVICE_HOST": None},
        {"PET_NNODES": None},
        {"PET_NNODES": "1"},
        {"PET_NNODES": "1:4"},
        {"PET_MASTER_ADDR": "llm-node-0-1.llm"},
        {"PET_MASTER_ADDR": "llm-node-0-0.other"},
        {"PET_MASTER_ADDR": "llm-node-0-0"},
        {"PET_MASTER_ADDR": "llm-master-0"},  # the training operator's: a Service's name, and so its cluster address
        {"PET_MASTER_ADDR": "llm-node-0-0.llm.example.com"},
        {"PET_MASTER_ADDR": "xllm-node-0-0.llm"},
        {"PET_MASTER_ADDR": "10.96.0.12"},
        {"PET_MASTER_ADDR": f"{'a' * 120}-node-0-0.{'a' * 120}.a.svc"},
        {"PET_MASTER_ADDR": None, "MASTER_ADDR": "llm-node-0-0.llm"},
    ],
)
def test_what_is_not_surely_kubeflow_trainer_s_names_no_pods(changed: dict[str, str | None]) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "PET_NNODES": "2", "PET_MASTER_ADDR": "llm-node-0-0.llm"}
    assert names(environment) == ["llm"]
    changes = {**environment, **changed}
    assert find({name: value for name, value in changes.items() if value is not None}) is None


@pytest.mark.parametrize(
    ("environment", "source"),
    [
        ({"SLURM_JOB_NODELIST": "cn1"}, "Slurm (SLURM_JOB_NODELIST)"),
        ({"LSB_MCPU_HOSTS": "a 1"}, "LSF (LSB_MCPU_HOSTS)"),
        ({"VC_PS_HOSTS": "a", "VC_WORKER_HOSTS": "b"}, "Volcano (VC_PS_HOSTS, VC_WORKER_HOSTS)"),
    ],
)
def test_the_source_is_named_with_its_variable(environment: dict[str, str], source: str) -> None:
    found = find(environment)
    assert found is not None
    assert found.source == source
    assert found.are_pods == source.startswith("Volcano")


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("PBS_NODEFILE", "n1\nn1\nn2.cluster\n", ["n1", "n2.cluster"]),
        ("LSB_DJOB_HOSTFILE", "hostA\nhostA\nhostB\n", ["hostA", "hostB"]),
        ("OMPI_MCA_orte_default_hostfile", "# all\nn1 slots=8\nn2 slots=8 max_slots=8\n", ["n1", "n2"]),
        ("PE_HOSTFILE", "n1 8 all.q@n1 UNDEFINED\nn2.x 8 all.q@n2.x <NULL>\nn1 2 gpu.q@n1 0,1:0,2\n", ["n1", "n2.x"]),
        ("PBS_NODEFILE", "n[1-2]\n", ["n1", "n2"]),
        ("OMPI_MCA_orte_default_hostfile", "root@n1:8\n", ["n1"]),
        ("PRTE_MCA_prte_default_hostfile", "pod-0.job slots=2\n10.0.0.7\n", ["pod-0.job", "10.0.0.7"]),
    ],
)
def test_the_nodes_in_a_file_that_the_environment_names(
    tmp_path: Path, variable: str, text: str, expected: list[str]
) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    assert names({variable: str(file)}) == expected


@pytest.mark.parametrize(
    ("variable", "others"),
    [
        ("PBS_NODEFILE", {"VC_WORKER_HOSTS": "pod"}),
        ("LSB_DJOB_HOSTFILE", {"VC_WORKER_HOSTS": "pod"}),
        ("PE_HOSTFILE", {"VC_WORKER_HOSTS": "pod"}),
        ("OMPI_MCA_orte_default_hostfile", {}),
    ],
)
def test_a_file_that_only_the_first_node_has_is_noted_and_the_next_source_asked(
    variable: str, others: dict[str, str]
) -> None:
    notes: list[str] = []
    found = batch.allocation({variable: "/nonexistent/aux/7.server", **others}, notes.append)
    assert notes == [f"{variable} names /nonexistent/aux/7.server, which is not on this host"]
    assert (found is not None) == bool(others)


def test_open_mpi_s_host_file_as_it_is_installed_names_nobody(tmp_path: Path) -> None:
    """openmpi-default-hostfile is all comments: the next source is asked, and other systems' files are in error."""
    file = tmp_path / "openmpi-default-hostfile"
    file.write_text("#\n# This is the default hostfile for Open MPI.\n\n")
    notes: list[str] = []
    assert batch.allocation({"OMPI_MCA_orte_default_hostfile": str(file)}, notes.append) is None
    assert notes == [f"OMPI_MCA_orte_default_hostfile names {file}, which names no host"]
    for variable in ("PBS_NODEFILE", "PE_HOSTFILE", "LSB_DJOB_HOSTFILE"):
        with pytest.raises(PolicyError, match="names no host"):
            find({variable: str(file)})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_JOB_NODELIST": "cn[-1-999999999]"}, ["'cn[-1-999999999]' is no node list"]),
        ({"SLURM_JOB_NODELIST": "cn[1-3"}, ["Slurm (SLURM_JOB_NODELIST)", "'cn[1-3' is no node list", "--peers"]),
        ({"SLURM_JOB_NODELIST": "cn[3-1]"}, ["'cn[3-1]' is no node list"]),
        ({"SLURM_JOB_NODELIST": "cn[]"}, ["'cn[]' is no node list"]),
        ({"SLURM_JOB_NODELIST": "@all"}, ["'@all' is no node list"]),
        ({"SLURM_JOB_NODELIST": "*"}, ["'*' is no node list"]),
        ({"SLURM_JOB_NODELIST": "cn1!cn2"}, ["'cn1!cn2' is no node list"]),
        ({"SLURM_JOB_NODELIST": "--help"}, ["'--help' is no node list"]),
        ({"SLURM_JOB_NODELIST": "cn1 cn2"}, ["'cn1 cn2' is no node list"]),
        ({"SLURM_JOB_NODELIST": "(null)"}, ["'(null)' is no node list"]),
        ({"SLURM_JOB_NODELIST": "n[0-999999999]"}, ["'n[0-999999999]' is more than 100000 nodes"]),
        ({"SLURM_JOB_NODELIST": "n[0-999]r[0-999]"}, ["more than 100000 nodes"]),
        ({"SLURM_JOB_NODELIST": f"n[0-{'9' * 99}]"}, ["more than 100000 nodes"]),
        ({"SLURM_JOB_NODELIST": "cn1," * 50 + "!"}, ["'cn1,cn1,", "...' is no node list"]),
        ({"LSB_MCPU_HOSTS": "hostA 8 hostB"}, ["LSF (LSB_MCPU_HOSTS)", "'hostA 8 hostB'", "hostA 8 hostB 8"]),
        ({"LSB_MCPU_HOSTS": "hostA hostB"}, ["LSF (LSB_MCPU_HOSTS)"]),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        find(environment)
    assert_line_with(str(error.value), words)


def test_many_lists_of_few_nodes_are_no_flood() -> None:
    assert len(names({"SLURM_JOB_NODELIST": ",".join(f"{chr(97 + n)}[0-9999]" for n in range(5))})) == 50_000


def test_a_wrong_node_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("n1\nn2:8080 x\n")
    with pytest.raises(PolicyError) as error:
        find({"PBS_NODEFILE": str(file)})
    assert_line_with(str(error.value), [f"PBS (PBS_NODEFILE={file})", "line 2"])


NODES = """
echo "$SLURM_CONF $PATH $SLURM_JOB_NODELIST $LD_PRELOAD" > {directory}/environment
echo "$@" > {directory}/arguments
echo 'NodeName=sl0 Arch=x86_64 CPUTot=1 OS=Linux 6.1 NodeAddr=10.77.0.1 NodeHostName=sl0 Reason=NodeAddr=10.6.6.6'
echo 'NodeName=sl1 Arch=x86_64 NodeAddr=mgmt-sl1 NodeHostName=host1 BcastAddr=10.81.0.2 Reason=off BcastAddr=10.6.6.6'
echo 'NodeName=sl2 NodeAddr=sl2 NodeHostName=sl2'
echo 'Node sl3 not found'
exit 1
"""


def test_all_addresses_and_names_that_slurm_knows_of_a_node_stand_beside_its_name(scontrol: Path) -> None:
    install(scontrol, NODES.format(directory=scontrol.parent))
    environment = {
        "SLURM_JOB_NODELIST": "sl[0-3]",
        "SLURM_CONF": "/etc/slurm/x.conf",
        "PATH": "/evil",
        "LD_PRELOAD": "/evil.so",
    }
    assert nodes(environment) == [("sl0", "10.77.0.1"), ("sl1", "mgmt-sl1", "host1", "10.81.0.2"), ("sl2",), ("sl3",)]
    assert (scontrol.parent / "environment").read_text().split() == ["/etc/slurm/x.conf", "/usr/bin:/bin"]
    assert (scontrol.parent / "arguments").read_text() == "--oneliner show node sl[0-3]\n"


def test_slurm_reads_a_list_that_the_library_does_not(scontrol: Path) -> None:
    """Names of unlike width are one range to Slurm."""
    environment = {"SLURM_JOB_NODELIST": "n[0999-10000]"}
    with pytest.raises(PolicyError, match="no node list"):
        find(environment)
    install(scontrol, 'test "$2" = hostnames && echo n0999 && echo n10000')
    assert names(environment) == ["n0999", "n10000"]


@pytest.mark.parametrize(
    "script", ["exit 1", "kill -9 $$", "echo NodeName=sl0", "head -c 100000 /dev/urandom", "sleep 60"]
)
def test_slurm_s_names_do_where_slurm_does_not_answer(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(batch, "SCONTROL_SECONDS", 0.5)
    install(scontrol, f"exec {script}" if script.startswith("sleep") else script)
    assert names({"SLURM_JOB_NODELIST": "sl[0-1]"}) == ["sl0", "sl1"]


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("mode", [0o644, 0o777])
def test_a_command_that_cannot_be_believed_is_not_run(scontrol: Path, mode: int) -> None:
    install(scontrol, "echo NodeName=sl0 NodeAddr=10.6.6.6", mode)
    assert nodes({"SLURM_JOB_NODELIST": "sl0"}) == [("sl0",)]


def assert_line_with(message: str, words: list[str]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message
