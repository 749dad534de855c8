"""Hold a lease and one listener as holder.py does, by the launcher's side of the release before (release_before.zip).

release_holder.py PEERS PORT        a line of input names the peers from then on; until its end
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("release_before.zip")))

from securerun.errors import SecurerunError
from securerun.firewall.policy import Policy
from securerun.guard.protocol import Notice, Order
from securerun.linux.networks import Network, collapse
from securerun.protection import client


def main() -> None:
    policy = Policy(secrets.token_hex(6), (), networks(sys.argv[1]))
    guard = client.Guard()
    try:
        guarding = guard.guard(Order(policy, "auto", "auto", grace=0.5, command="before"), tell)
        with socket.create_server(("", int(sys.argv[2]))):
            layers = [layer.backend for layer in guarding.layers]
            say(guarding=layers, notes=guarding.notes, run_id=policy.run_id, module=client.__file__)
            for line in sys.stdin:
                if line == "report\n":
                    say(runs=len(client.Guard().report()))
                else:
                    guard.change_peers(networks(line.strip()))
        released = guard.release(failed=False)
        say(denied=[str(denial.source) for denial in released.denied] if released else None)
    except SecurerunError as error:
        say(refused=str(error))
        sys.exit(error.status)


def networks(text: str) -> tuple[Network, ...]:
    return collapse(ipaddress.ip_network(peer) for peer in text.split(",") if peer)


def tell(notice: Notice) -> None:
    for words in (*notice.words, *(str(denial) for denial in notice.denied)):
        say(news=words)


def say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
