"""Install or remove iptables port chains in the network namespace that this runs in.

    chains.py install|accept|hold RUN [PEER ...]
    chains.py remove RUN

`hold` keeps a log group until its end of input and prints who was dropped. An install that is refused
prints why.
"""

from __future__ import annotations

import ipaddress
import sys

from securerun.firewall.chains import PortChainsUnavailable
from securerun.firewall.droplog import DropLog
from securerun.firewall.iptables import IptablesChains
from securerun.firewall.policy import Policy, PortRange
from securerun.linux.networks import collapse

PORTS = (PortRange(29500, 29500, "master port"), PortRange(60000, 60015, "HCCL"))
LOG_GROUP = 4711


def main(action: str, run_id: str, *peers: str) -> None:
    chains = IptablesChains(run_id)
    if action == "remove":
        chains.remove()
        return
    policy = Policy(run_id, PORTS, collapse(ipaddress.ip_network(peer) for peer in peers), accept=action == "accept")
    drops = DropLog(LOG_GROUP) if action == "hold" else None
    try:
        chains.install(policy, drops.group if drops else None)
    except PortChainsUnavailable as error:
        print(error)
    if drops is None:
        return
    print("held", flush=True)
    sys.stdin.read()
    drops.read()
    for denial in drops.denied():
        print(denial.source, denial.port, denial.packets)
    chains.remove()


if __name__ == "__main__":
    main(*sys.argv[1:])
