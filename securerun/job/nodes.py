"""Whether a launch is of one node, as far as can be told before torch's own parser is there: it has the last word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from securerun.job import tasks
from securerun.job.job import Job

_OPTION = "--nnodes"
# The shortest that argparse takes for it: --n may be --nproc-per-node as well.
_ABBREVIATION = "--nn"
_VARIABLE = "PET_NNODES"
_ONE = re.compile(r"\s*\+?0*1\s*(:\s*\+?0*1\s*)?")


def several(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return what says that a launch is, or may be, of more than one node; "" for one of one node.

    Which words are the script's is not known yet, so an --nnodes of its own counts as well: behind `--` it does not.
    """
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for position, word in enumerate(before):
        name, equals, value = word.partition("=")
        if name.startswith(_ABBREVIATION) and _OPTION.startswith(name):
            value = value if equals else "".join(before[position + 1 : position + 2])
            if not _ONE.fullmatch(value):
                return f"{word} {value}" if not equals else word
    said = environment.get(_VARIABLE, "").strip()
    return f"{_VARIABLE}={said}" if said and not _ONE.fullmatch(said) else ""


def several_of_command(job: Job, peers: str | None, environment: Mapping[str, str], *, by_name: bool) -> str:
    """Return what says that a command, which nobody has read, may be of more than one node; "" for one of one node.

    by_name: whether the user says so by asking for what only a job of one node can have.
    """
    if tasks.of_environment(environment).has_siblings:
        return "it is one of several tasks of this node"
    if job.max_nodes > 1:
        return f"it is of {job.nodes}"
    if by_name or job.max_nodes == 1 or job.meets_on_loopback or peers == "localhost":
        return ""
    return "nothing says that it is of one node (--peers localhost does)"
