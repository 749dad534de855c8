"""Policy → a POSIX shell script that closes the port plan by hand, for hosts where no guard may run.

The script itself is `by_hand.sh`, a file that shellcheck reads; here it is filled in. `up` and `down` do in shell what
`iptables.py` and `nftables.py` do: what is installed is read from the rules, and a family changes in one transaction.
So the script may be run twice, beside those of other jobs and beside securerun. What it closes no run opens: its rules
stand in a chain of their own (nft: a table, with a token of its own), to which what a run lets pass goes on. Renders,
and runs nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from securerun.errors import PolicyError
from securerun.firewall import dispatcher, nftables, run_sets
from securerun.firewall.chains import TooManyRules
from securerun.firewall.policy import Policy

_COMMANDS = {"auto": "iptables", "iptables": "iptables", "legacy": "iptables-legacy"}
_SCRIPT = Path(__file__).with_name("by_hand.sh")
# Lines of that file which are for whoever reads it there, and for shellcheck.
_ASIDES = ("#@ ", "# shellcheck ")
_ONLY = "#@ only "
_EVERY_BACKEND = "#@ every backend"


def render(policy: Policy, backend: str, about: Sequence[str]) -> str:
    """Return the script for one backend of `--firewall`. about: what job it is for, a line of printable text each.

    The rules bear a run id made of the planned ports, so a later script for the same ports replaces them.
    Raises PolicyError for a plan that is no rule for ports.
    """
    if not policy.ports:
        raise PolicyError(
            "no port of this job is known beforehand, so there is nothing to close; add some with --ports"
        )
    if backend == "off":
        raise PolicyError("--firewall off leaves the host's firewall alone; write --firewall iptables, or nftables")
    lasting = dataclasses.replace(policy, run_id=lasting_id(policy))
    commands = "nftables" if backend == "nftables" else "iptables"
    words = _nftables(lasting) if commands == "nftables" else _iptables(lasting, _COMMANDS[backend])
    # With its sign of a comment: it stands for as many lines as there are.
    words["# @ABOUT@"] = "\n".join(f"# {line}" for line in about)
    return _filled_in("".join(_lines(commands)), words)


def _lines(commands: str) -> Iterator[str]:
    """Yield the lines of by_hand.sh for rules that are written by iptables or by nftables."""
    left_out = False
    for line in _SCRIPT.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith(_ONLY):
            left_out = line.split()[2] != commands
        elif line.startswith(_EVERY_BACKEND):
            left_out = False
        elif not left_out and not line.startswith(_ASIDES):
            yield line


def _filled_in(text: str, words: Mapping[str, str]) -> str:
    """Return the text with all its words replaced at once: what they are replaced by is not looked at again."""
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found.group()], text)


def lasting_id(policy: Policy) -> str:
    """Return the run id of rules that no run made: the same for the same ports."""
    ports = ",".join(f"{first}-{last}" for first, last in policy.joined_ports())
    return hashlib.sha256(ports.encode()).hexdigest()[:12]


def _iptables(policy: Policy, command: str) -> dict[str, str]:
    # The `ipset` command is seldom there, and a shell has no other way to a set.
    try:
        run_sets.require_few_rules(policy, "a script makes none")
    except TooManyRules as error:
        raise PolicyError(str(error)) from error
    return {
        "@ADVICE@": "install it, or make this script with --firewall nftables",
        "@RUN@": policy.run_id,
        "@PASSES_OF_IPV4@": "\n".join(dispatcher.passes(policy, 4, chain=dispatcher.LASTING_CHAIN)),
        "@PASSES_OF_IPV6@": "\n".join(dispatcher.passes(policy, 6, chain=dispatcher.LASTING_CHAIN)),
        "@DROPS_OF_IPV4@": "\n".join(dispatcher.drops(policy, 4, None, chain=dispatcher.LASTING_CHAIN)),
        "@DROPS_OF_IPV6@": "\n".join(dispatcher.drops(policy, 6, None, chain=dispatcher.LASTING_CHAIN)),
        "@RESET@": dispatcher.RESET,
        "@CHAIN@": dispatcher.LASTING_CHAIN,
        "@RUNS@": dispatcher.CHAIN,
        "@JUMP@": dispatcher.JUMP,
        "@MADE_TABLE@": dispatcher.MADE_TABLE,
        "@MADE_CHAIN@": dispatcher.MADE_CHAIN,
        "@MADE_NOTHING@": dispatcher.MADE_NOTHING,
        "@COMMAND@": command,
        "@COMMAND6@": command.replace("iptables", "ip6tables"),
    }


def _nftables(policy: Policy) -> dict[str, str]:
    if policy.accept:
        raise PolicyError(nftables.NO_ACCEPT)
    return {
        "@ADVICE@": "install it",
        "@TABLE@": nftables.render_lasting(policy).rstrip(),
        "@RESET@": nftables.RESET,
        "@REMOVAL@": nftables.render_lasting_removal(policy.run_id).rstrip(),
    }
