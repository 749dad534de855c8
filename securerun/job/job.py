"""What a job is to securerun, whoever starts it: what runs, on how many nodes, and where its agents meet."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securerun.firewall.policy import PortRange
from securerun.text import count

if TYPE_CHECKING:  # where a command is looked at
    from securerun.job.elsewhere import Elsewhere

# The rendezvous backends that torch has itself: torch/distributed/elastic/rendezvous/registry.py.
STATIC, C10D, ETCD, ETCD_V2 = "static", "c10d", "etcd", "etcd-v2"
# The one that torch_npu 2.1 to 2.13 brings: torch_npu/distributed/rendezvous.py.
PARALLEL = "parallel"
# None at all: MASTER_ADDR and MASTER_PORT tell the processes (torch.distributed.init_process_group, env://).
BY_ENVIRONMENT = "env"
# Of a job whose command nobody has read (`securerun.job.environment`).
UNKNOWN_NODES = 0
# torch/distributed/elastic/rendezvous/c10d_rendezvous_backend.py, DEFAULT_PORT; a test holds it to the installed torch.
C10D_PORT = 29400


def explicit_id(text: str | None) -> str:
    """Return the id of a rendezvous; "" for torch's own word for none (torch/distributed/run.py, get_args_parser)."""
    return "" if text in {None, "none"} else str(text)


@dataclass(frozen=True)
class Endpoint:
    """Where the agents of a job meet. No port, or port 0, is one that torch chooses at random."""

    host: str
    port: int | None

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this host can meet here."""
        if self.host.lower() == "localhost":
            return True
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        # Before Python 3.13, ::ffff:127.0.0.1 does not count as loopback by itself.
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback

    @property
    def written_host(self) -> str:
        """The host as it stands before a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        return f"{self.written_host}:{self.port}" if self.port else self.written_host


@dataclass(frozen=True)
class Job:
    """What runs on this node, as a part of one job.

    backend: the rendezvous: static, c10d, etcd, etcd-v2, parallel (torch_npu's), or one that a plug-in brings.
    endpoint: where the agents meet; None where that is no address, as with a file store.
    min_nodes, max_nodes: how many agents; both UNKNOWN_NODES where nothing says so.
    command: the script, or module, and its arguments. log_dir: where its logs go, if it was told.
    known_ports: ports that it is known to listen on, beside those that the rendezvous, HCCL and the user name.
    ranks: how many this node has; 0 where nobody asked. elsewhere: what the command has others start for it.
    local_address: what its agent calls this node, if it was told (--local-addr).
    rendezvous_id: what tells this job from others that meet at the same place, if it was told (--rdzv-id).
    """

    backend: str
    endpoint: Endpoint | None
    min_nodes: int
    max_nodes: int
    node_rank: int
    command: tuple[str, ...]
    log_dir: str | None = None
    known_ports: tuple[PortRange, ...] = ()
    ranks: int = 0
    elsewhere: tuple[Elsewhere, ...] = ()
    local_address: str | None = None
    rendezvous_id: str = ""

    @property
    def nodes(self) -> str:
        """How many nodes, in words."""
        if self.max_nodes == UNKNOWN_NODES:
            return "an unknown number of nodes"
        if self.min_nodes != self.max_nodes:
            return f"{self.min_nodes} to {self.max_nodes} nodes"
        return count(self.max_nodes, "node")

    @property
    def meeting_point(self) -> Endpoint | None:
        """The endpoint, if it is a port of the job's own: an etcd server is somebody else's."""
        return None if self.backend in {ETCD, ETCD_V2} else self.endpoint

    @property
    def meets_on_loopback(self) -> bool:
        """Whether its nodes meet at a loopback address, which is itself to each host."""
        return self.meeting_point is not None and self.meeting_point.is_loopback

    @property
    def has_one_store(self) -> bool:
        """Whether its workers meet where its agents do: at a store of node 0's, by whatever address others know it."""
        return self.backend in {STATIC, PARALLEL}

    @property
    def first_node_listens(self) -> bool:
        """Whether only node 0 listens at the meeting point; with every other backend any agent may."""
        return self.has_one_store or self.backend == BY_ENVIRONMENT
