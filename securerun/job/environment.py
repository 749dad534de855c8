"""What the environment says of a job whose command nobody has read: where its nodes meet, and how many they are.

Only what is certain counts: torchrun's own PET_* variables, MASTER_ADDR and MASTER_PORT, and NNODES. WORLD_SIZE and
RANK mean other things under other schedulers and are never looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from securerun.firewall.policy import LAST_PORT, PortRange, Purpose
from securerun.job.job import BY_ENVIRONMENT, C10D, C10D_PORT, STATIC, UNKNOWN_NODES, Endpoint, Job, explicit_id

if TYPE_CHECKING:
    from securerun.job.elsewhere import Elsewhere

_NODES = re.compile(r"([1-9][0-9]{0,5})(?::([1-9][0-9]{0,5}))?")
_ENDPOINT = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<plain>[^:\[\]/]+))(?::(?P<port>[0-9]{1,5}))?")


def describe_job(environment: Mapping[str, str], command: Sequence[str]) -> Job:
    """Return the job that a command is taken for. What is not certain is left open: how many nodes, the endpoint."""
    least, most = _nodes(environment)
    rendezvous = _value(environment, "PET_RDZV_ENDPOINT")
    if rendezvous:
        backend = _value(environment, "PET_RDZV_BACKEND") or STATIC
        endpoint = _endpoint(rendezvous, C10D_PORT if backend == C10D else None)
    else:
        backend = BY_ENVIRONMENT
        host = _value(environment, "PET_MASTER_ADDR", "MASTER_ADDR")
        endpoint = Endpoint(host.strip("[]"), _port(environment)) if host else None
    return Job(
        backend=backend if endpoint else "left to the command",
        endpoint=endpoint,
        min_nodes=least,
        max_nodes=most,
        node_rank=_node_rank(environment),
        command=tuple(command),
        known_ports=_known_ports(environment),
        elsewhere=_elsewhere(command),
        local_address=_value(environment, "PET_LOCAL_ADDR") or None,
        rendezvous_id=explicit_id(_value(environment, "PET_RDZV_ID")),
    )


def _elsewhere(command: Sequence[str]) -> tuple[Elsewhere, ...]:
    if not command:
        return ()
    from securerun.job import elsewhere

    return elsewhere.of_command(command)


def _known_ports(environment: Mapping[str, str]) -> tuple[PortRange, ...]:
    """Return the port of the job's store, also where its host is not named.

    What is no port (Kubernetes sets MASTER_PORT to `tcp://10.96.0.7:2222` for a Service `master`) says nothing.
    """
    port = _port(environment)
    return (PortRange(port, port, Purpose.MASTER_PORT),) if port else ()


def _nodes(environment: Mapping[str, str]) -> tuple[int, int]:
    match = _NODES.fullmatch(_value(environment, "PET_NNODES", "NNODES"))
    if match is None:
        return UNKNOWN_NODES, UNKNOWN_NODES
    least = int(match.group(1))
    return least, max(least, int(match.group(2) or least))


def _node_rank(environment: Mapping[str, str]) -> int:
    text = _value(environment, "PET_NODE_RANK", "NODE_RANK")
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0


def _port(environment: Mapping[str, str]) -> int | None:
    text = _value(environment, "PET_MASTER_PORT", "MASTER_PORT")
    number = int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0
    return number if 0 < number <= LAST_PORT else None


def _endpoint(text: str, default_port: int | None) -> Endpoint | None:
    match = _ENDPOINT.fullmatch(text)
    if match is None or int(match["port"] or 0) > LAST_PORT:
        return None
    return Endpoint(match["bracketed"] or match["plain"], int(match["port"]) if match["port"] else default_port)


def _value(environment: Mapping[str, str], *names: str) -> str:
    """Return the first of these variables that is set to something."""
    return next((environment[name].strip() for name in names if environment.get(name, "").strip()), "")
