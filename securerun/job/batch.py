"""What the batch system says of a job's nodes: Slurm, PBS, LSF, Grid Engine, Volcano, ModelArts, Kubeflow, Open MPI.

Each leaves the nodes' names in the environment of the job, or in a file that a variable names. WORLD_SIZE and RANK
are never looked at: they mean other things under other schedulers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from securerun.errors import PolicyError
from securerun.job import entries, folded
from securerun.job.entries import Entry, Tell
from securerun.linux import slurm
from securerun.linux.slurm import SCONTROL_DIRECTORIES

# `scontrol show node` asks slurmctld, which may be busy or away.
SCONTROL_SECONDS = 10.0
# Slurm writes no other characters; to ClusterShell, @ & ! ^ * would mean groups and operations.
_NODE_LIST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*")
# Each part of a heterogeneous job has a list of its own (sbatch(1); PACK before Slurm 20.02).
_SLURM_LISTS = re.compile(r"SLURM_JOB_NODELIST(?:_(?:HET|PACK)_GROUP_[0-9]+)?")
# prolog_and_epilog in Slurm's pages: which of them runs.
_CONTEXT, _PROLOGS = "SLURM_SCRIPT_CONTEXT", "prolog_"
# include/uapi/linux/binfmts.h, MAX_ARG_STRLEN: the longest word that a command can be given.
_LONGEST_WORD = 131_071
_NODE_NAME = re.compile(r"(?:^|\s)NodeName=(\S+)")
# slurm.conf(5): its address, its host's own name, and where sbcast sends to: often the address on a faster network.
_OTHER_WAYS = tuple(re.compile(rf"\s{field}=(\S+)") for field in ("NodeAddr", "NodeHostName", "BcastAddr"))
# What operators write, with spaces in it, stands last.
_FREE_TEXT = re.compile(r"\s(?:Reason|Comment|AdminComment|Extra)=")
# volcano, pkg/controllers/job/plugins/svc: one variable a task. ModelArts has VC_WORKER_HOSTS in the same form.
_VOLCANO = re.compile(r"VC_\w+_HOSTS")
# Set in every container of a pod.
IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
# The Service of a TrainJob has its name, since that is JobSet's default; its pods are <trainjob>-node-0-<number>.
_KUBEFLOW = "PET_MASTER_ADDR"
_FIRST_POD = re.compile(
    r"(?P<job>[a-z0-9][a-z0-9-]*)-node-0-0\.(?P<service>(?P=job)(?:\.[a-z0-9-]+\.svc(?:\.[a-z0-9-]+)*)?)"
)
_LONGEST_NAME = 253
_SEVERAL = re.compile(r"[2-9]|[1-9][0-9]{1,5}")
# orte_hosts(7), for Open MPI up to 4; PRRTE's prte_default_hostfile in 5, whose own prefix is PRTE_MCA_.
_OPEN_MPI = ("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile", "OMPI_MCA_prte_default_hostfile")

# The number of a job, the first that is there: of all parts of a heterogeneous one that of the first (sbatch(1); PACK
# before Slurm 20.02). Each task of an array is a job of its own, which LSF and Grid Engine tell by a second number.
_NUMBERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "slurm": (
        ("SLURM_HET_JOB_ID", ""),
        ("SLURM_PACK_JOB_ID", ""),
        ("SLURM_JOB_ID", ""),
        ("SLURM_JOBID", ""),
    ),
    "pbs": (("PBS_JOBID", ""),),
    "lsf": (("LSB_JOBID", "LSB_JOBINDEX"),),
    "grid engine": (("JOB_ID", "SGE_TASK_ID"),),
    "flux": (("FLUX_JOB_ID", ""),),
}
# JOB_ID alone is anybody's.
_SURELY = {"grid engine": "PE_HOSTFILE"}
# What Grid Engine and LSF say of a job that is no array.
_NO_ARRAY = {"", "0", "undefined"}


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job, this one among them, as a batch system has them.

    source: the batch system, and the variable that it is known from. are_pods: whether they may get their names late.
    member: a name of one of them, where the only entry is a headless Service, which has the addresses of all.
    """

    source: str
    nodes: tuple[Entry, ...]
    are_pods: bool = False
    member: str = ""


def allocation(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    """Return the nodes that the first batch system to know them names; None where none does.

    note: told of a file that a batch system names and this host does not have.
    Raises PolicyError for a variable or file that cannot be read as what it should be.
    """
    for system in (_slurm, _pbs, _lsf, _grid_engine, _volcano, _kubeflow, _open_mpi):
        found = system(environment, note)
        if found is not None:
            return found
    return None


def job_number(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the batch system that this process is in a job of, and that job's number, which all of its nodes know.

    None where it is in none.
    """
    for system, variables in _NUMBERS.items():
        for variable, of_task in variables:
            number = environment.get(variable, "").strip()
            if number and environment.get(_SURELY.get(system, variable)):
                task = environment.get(of_task, "").strip()
                return system, number if task in _NO_ARRAY else f"{number}[{task}]"
    return None


def expand(text: str, place: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names in a node list of Slurm's such as `cn[001-128],login1`.

    Raises PolicyError, which begins with `place`, for what is no node list.
    """
    shown = folded.shortened(text)
    if not _NODE_LIST.fullmatch(text):
        raise PolicyError(f"{place}: {shown!r} is no node list; name the nodes with --peers node1,node2")
    if folded.size(text) > folded.MOST_NODES:
        raise folded.too_many(text, place)
    try:
        return folded.unfold(text)
    except ValueError as error:
        # Slurm folds n0999 and n10000 together where the names are not all of one width; NodeSet refuses that.
        names = tuple(ask_scontrol(("show", "hostnames", text), environment).split())
        if names:
            return names
        raise PolicyError(
            f"{place}: {shown!r} is no node list ({error}); name the nodes with --peers node1,node2"
        ) from error


def _slurm(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    """salloc(1), sbatch(1), srun(1): SLURM_JOB_NODELIST, and SLURM_NODELIST from older ones."""
    variables = sorted(name for name in environment if _SLURM_LISTS.fullmatch(name)) or ["SLURM_NODELIST"]
    lists = {name: environment[name].strip() for name in variables if environment.get(name, "").strip()}
    if not lists:
        return None
    source = f"Slurm ({', '.join(lists)})"
    names = tuple(dict.fromkeys(name for text in lists.values() for name in expand(text, source, environment)))
    others = _written_ways(names, environment) or _other_ways(lists.values(), environment)
    return Allocation(source, tuple(_slurm_node(name, others.get(name, ()), source) for name in names))


def _slurm_node(name: str, others: Iterable[str], source: str) -> Entry:
    """Keep the name beside what else Slurm knows: the job may meet on one network, and Slurm on a second one."""
    return Entry(tuple(dict.fromkeys((name, *others))), source)


def _written_ways(names: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """What slurm.conf says of the nodes to a prolog, which is not to ask slurmctld; nothing if not of all of them."""
    if not environment.get(_CONTEXT, "").startswith(_PROLOGS):
        return {}
    from securerun.job import slurm_conf

    found = slurm_conf.ways(names, environment)
    return found if len(found) == len(names) else {}


def _other_ways(lists: Iterable[str], environment: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Slurm's own addresses and names of each node that it knows; of none where Slurm cannot be asked."""
    nodes = ",".join(lists)
    text = ask_scontrol(("--oneliner", "show", "node", *((nodes,) if len(nodes) <= _LONGEST_WORD else ())), environment)
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        name = _NODE_NAME.search(line)
        if name:
            fields = _FREE_TEXT.split(line, 1)[0]
            ways = (field.search(fields) for field in _OTHER_WAYS)
            found[name.group(1)] = tuple(way.group(1) for way in ways if way)
    return found


def ask_scontrol(arguments: tuple[str, ...], environment: Mapping[str, str]) -> str:
    """Return what Slurm's scontrol prints; nothing where there is none, and where it fails or takes too long."""
    command = slurm.find_scontrol(SCONTROL_DIRECTORIES)
    if command is None:
        return ""
    import subprocess

    try:
        # An absolute path, no shell, and no argument of the environment's that begins with a dash.
        done = subprocess.run(  # noqa: S603
            [command, *arguments],
            env=slurm.environment(environment.get("SLURM_CONF")),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SCONTROL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _pbs(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    """qsub(1): PBS_NODEFILE, one line a node and slot."""
    return _node_file("PBS", "PBS_NODEFILE", environment, note)


def _lsf(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    """LSF's environment variable reference: a name and a number of slots a node, a name a slot, or a file of those."""
    counted = environment.get("LSB_MCPU_HOSTS", "").split()
    if counted:
        source = "LSF (LSB_MCPU_HOSTS)"
        if len(counted) % 2 or not all(count.isdecimal() for count in counted[1::2]):
            raise PolicyError(
                f"{source}: {folded.shortened(' '.join(counted))!r} is no list of hosts with their slots "
                "(hostA 8 hostB 8); name the nodes with --peers node1,node2"
            )
        return _of_names(source, counted[::2])
    names = environment.get("LSB_HOSTS", "").split()
    if names:
        return _of_names("LSF (LSB_HOSTS)", names)
    return _node_file("LSF", "LSB_DJOB_HOSTFILE", environment, note)


def _grid_engine(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    """sge_pe(5): PE_HOSTFILE, one line a queue of a host, on the job's first node."""
    return _node_file("Grid Engine", "PE_HOSTFILE", environment, note)


def _volcano(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    variables = sorted(name for name in environment if _VOLCANO.fullmatch(name) and environment[name].strip(", \t\n"))
    if not variables:
        return None
    names = [name for variable in variables for name in re.split(r"[,\s]+", environment[variable]) if name]
    return _of_names(f"Volcano ({', '.join(variables)})", names, are_pods=True)


def _kubeflow(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    """kubeflow/trainer, pkg/runtime/framework/plugins/torch: the first pod's name in the job's headless Service.

    Nothing else is like it: a name alone in PET_MASTER_ADDR is a Service's (Kubeflow's training operator 1).
    """
    if IN_KUBERNETES not in environment or not _SEVERAL.fullmatch(environment.get("PET_NNODES", "").strip()):
        return None
    name = environment.get(_KUBEFLOW, "").strip()
    match = _FIRST_POD.fullmatch(name) if len(name) <= _LONGEST_NAME else None
    if match is None:
        return None
    source = f"Kubeflow Trainer ({_KUBEFLOW})"
    return Allocation(source, (Entry((match["service"],), source),), are_pods=True, member=name)


def _open_mpi(environment: Mapping[str, str], note: Tell) -> Allocation | None:
    for variable in _OPEN_MPI:
        # "none" takes back what a configuration file sets (prte_info).
        if environment.get(variable, "").strip() not in {"", "none"}:
            found = _node_file("Open MPI", variable, environment, note, may_be_empty=True)
            if found is not None:
                return found
    return None


def _node_file(
    system: str, variable: str, environment: Mapping[str, str], note: Tell, *, may_be_empty: bool = False
) -> Allocation | None:
    """Return the nodes in the file that a variable names. may_be_empty: whether it may be all comments."""
    name = environment.get(variable, "").strip()
    if not name:
        return None
    if not entries.is_there(Path(name)):
        # PBS and LSF write it on the job's first node only.
        note(f"{variable} names {name}, which is not on this host")
        return None
    place = f"{system} ({variable}={name})"
    hosts = {entry.word: entry for entry in entries.of_file(name, place, may_be_empty=may_be_empty)}
    if not hosts:
        note(f"{variable} names {name}, which names no host")
        return None
    return Allocation(f"{system} ({variable})", tuple(hosts.values()))


def _of_names(source: str, names: Iterable[str], are_pods: bool = False) -> Allocation:
    return Allocation(source, tuple(Entry((name,), source) for name in dict.fromkeys(names)), are_pods)
