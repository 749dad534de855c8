"""Policy → a POSIX shell script that closes the port plan by hand, for hosts where no guard may run.

`up` and `down` do in shell what `iptables.py` and `nftables.py` do: what is installed is read from the rules, and a
family changes in one transaction. So the script may be run twice, beside those of other jobs and beside securerun.
Renders, and runs nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from securerun.errors import PolicyError
from securerun.firewall import dispatcher, nftables
from securerun.firewall.policy import Policy

_COMMANDS = {"auto": "iptables", "iptables": "iptables", "legacy": "iptables-legacy"}

_HEAD = """\
#!/bin/sh
# Closes the TCP ports of one job to all hosts but its peers, over IPv4 and IPv6.
# Made by `securerunctl plan --format sh`; run it as root:
#
#     sh THIS_FILE up       before the job starts; again at any time
#     sh THIS_FILE down     after the job has ended; again at any time
#
{about}
#
# Only these ports are closed. Those that torch, gloo and NCCL choose at random stay open to every host: no rule for
# ports can close them, and securerun does it by process.

set -eu
PATH=/usr/sbin:/sbin:/usr/bin:/bin
LC_ALL=C
export PATH LC_ALL

fail() {{
    echo "$0: $1" >&2
    exit 1
}}

require() {{
    for needed; do
        command -v "$needed" > /dev/null || fail "there is no $needed here; {advice}"
    done
}}
"""

_TAIL = """
[ "$(id -u)" = 0 ] || fail 'only root can change the firewall; run this as root'
case ${1-} in
    up) up ;;
    down) down ;;
    *) echo "usage: $0 up|down" >&2; exit 2 ;;
esac
"""

_IPTABLES = """
run={run_id}

passes_of_ipv4() {{
    cat << 'END'
{passes4}
END
}}

passes_of_ipv6() {{
    cat << 'END'
{passes6}
END
}}

drops() {{
    cat << 'END'
{drops}
END
}}

# What is there: all rules, INPUT's way to ours, and the rules of this job.
look() {{
    saved=$("$1-save" -t filter)
    jumps=$(printf '%s\\n' "$saved" | sed -n '/^-A INPUT .*-j {chain}$/p')
    ours=$(printf '%s\\n' "$saved" | sed -n '/^-A {chain} .*--comment "securerun '"$run"'"/p')
}}

# What iptables brings into being beside our chain stands in the comment of the jump, so that `down` knows it.
made_by_us() {{
    case $jumps in
        *'{made_table}'*) echo '{made_table}'; return ;;
        *'{made_chain}'*) echo '{made_chain}'; return ;;
        ?*) echo '{made_nothing}'; return ;;
    esac
    case $("$1" --version) in
        *nf_tables*) ;;
        *) echo '{made_nothing}'; return ;;
    esac
    if ! command -v nft > /dev/null; then
        echo '{made_nothing}'
    elif ! nft list table "$2" filter > /dev/null 2>&1; then
        echo '{made_table}'
    elif ! nft list chain "$2" filter INPUT > /dev/null 2>&1; then
        echo '{made_chain}'
    else
        echo '{made_nothing}'
    fi
}}

# One transaction: passes before everything, drops after everything, the jump first in INPUT, no rule twice.
install_in() {{
    look "$1"
    made=$(made_by_us "$1" "$2")
    first=$(printf '%s\\n' "$saved" | sed -n '/^-A INPUT /{{p;q;}}')
    {{
        echo '*filter'
        case $saved in *':{chain} '*) ;; *) echo '-N {chain}' ;; esac
        if [ -z "$jumps" ] || [ "$jumps" != "$first" ]; then
            printf '%s\\n' "$jumps" | sed -n 's/^-A/-D/p'
            printf '%s\\n' '-I INPUT 1 {jump} "'"$made"'" -j {chain}'
        fi
        printf '%s\\n' "$ours" | sed -n 's/^-A/-D/p'
        "$3"
        drops
        echo COMMIT
    }} | "$1-restore" --noflush --wait 10 || fail "$1-restore has changed nothing; the ports are not closed"
}}

# The rules of this job; with the last of our chain the chain, and what is there because of it.
remove_from() {{
    look "$1"
    [ -n "$ours" ] || return 0
    others=$(printf '%s\\n' "$saved" | sed -n '/^-A {chain} /p' | grep -v "securerun $run" || :)
    {{
        echo '*filter'
        if [ -n "$others" ]; then
            printf '%s\\n' "$ours" | sed -n 's/^-A/-D/p'
        else
            printf '%s\\n' "$jumps" | sed -n 's/^-A/-D/p'
            echo '-F {chain}'
            echo '-X {chain}'
        fi
        echo COMMIT
    }} | "$1-restore" --noflush --wait 10 || fail "$1-restore has changed nothing; the rules are still there"
    [ -z "$others" ] || return 0
    case $jumps in *'securerun made this'*) ;; *) return 0 ;; esac
    # Only an empty INPUT that lets everything pass: what somebody else put there since is his.
    now=$("$1-save" -t filter)
    case $now in *'-A INPUT '*) return 0 ;; *':INPUT ACCEPT'*) "$1" -w 10 -X INPUT 2> /dev/null || : ;; esac
    case $jumps in *'{made_table}'*) command -v nft > /dev/null || return 0 ;; *) return 0 ;; esac
    case $(nft list table "$2" filter) in *chain* | *set* | *map*) ;; *) nft delete table "$2" filter ;; esac
}}

# Not every kernel speaks IPv6 (ipv6.disable=1).
each_family() {{
    require {command} {command}-save {command}-restore
    [ ! -e /proc/net/if_inet6 ] || require {command6} {command6}-save {command6}-restore
    "$1" {command} ip passes_of_ipv4
    [ ! -e /proc/net/if_inet6 ] || "$1" {command6} ip6 passes_of_ipv6
}}

up() {{
    each_family install_in
}}

down() {{
    each_family remove_from
}}
"""

_NFTABLES = """
up() {{
    require nft
    nft -f - << 'END'
{up}
END
}}

down() {{
    require nft
    nft -f - << 'END'
{down}
END
}}
"""


def render(policy: Policy, backend: str, about: Sequence[str]) -> str:
    """The script for one backend of `--firewall`. about: what job it is for, a line of printable text each.

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
    rules = _nftables(lasting) if backend == "nftables" else _iptables(lasting, _COMMANDS[backend])
    advice = "install it" if backend == "nftables" else "install it, or make this script with --firewall nftables"
    head = _HEAD.format(about="\n".join(f"# {line}" for line in about), advice=advice)
    return f"{head}{rules}{_TAIL}"


def lasting_id(policy: Policy) -> str:
    """The run id of rules that no run made: the same for the same ports."""
    ports = ",".join(f"{first}-{last}" for first, last in policy.joined_ports())
    return hashlib.sha256(ports.encode()).hexdigest()[:12]


def _iptables(policy: Policy, command: str) -> str:
    return _IPTABLES.format(
        run_id=policy.run_id,
        passes4="\n".join(dispatcher.passes(policy, 4)),
        passes6="\n".join(dispatcher.passes(policy, 6)),
        drops="\n".join(dispatcher.drops(policy, None)),
        chain=dispatcher.CHAIN,
        jump=dispatcher.JUMP,
        made_table=dispatcher.MADE_TABLE,
        made_chain=dispatcher.MADE_CHAIN,
        made_nothing=dispatcher.MADE_NOTHING,
        command=command,
        command6=command.replace("iptables", "ip6tables"),
    )


def _nftables(policy: Policy) -> str:
    if policy.accept:
        raise PolicyError(nftables.NO_ACCEPT)
    return _NFTABLES.format(
        up=nftables.render_lasting(policy).rstrip(), down=nftables.render_lasting_removal(policy.run_id).rstrip()
    )
