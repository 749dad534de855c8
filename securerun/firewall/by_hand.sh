#!/bin/sh
#@ The script of `securerunctl plan --format sh` before script.py fills it in: a word between two @ is replaced. A line
#@ like this one is left out, and so is each directive to shellcheck, which sees what two backends get in one piece.
# Closes the TCP ports of one job to all hosts but its peers, over IPv4 and IPv6.
# Made by `securerunctl plan --format sh`; run it as root:
#
#     sh THIS_FILE up       before the job starts; again at any time
#     sh THIS_FILE down     after the job has ended; again at any time
#
# @ABOUT@
#
# Only these ports are closed. Those that torch, gloo and NCCL choose at random stay open to every host: no rule for
# ports can close them, and securerun does it by process.

set -eu
PATH=/usr/sbin:/sbin:/usr/bin:/bin
LC_ALL=C
export PATH LC_ALL

fail() {
    echo "$0: $1" >&2
    exit 1
}

require() {
    for needed; do
        command -v "$needed" > /dev/null || fail "there is no $needed here; @ADVICE@"
    done
}
#@ only iptables

run=@RUN@

passes_of_ipv4() {
    cat << 'END'
@PASSES_OF_IPV4@
END
}

passes_of_ipv6() {
    cat << 'END'
@PASSES_OF_IPV6@
END
}

drops_of_ipv4() {
    cat << 'END'
@DROPS_OF_IPV4@
END
}

drops_of_ipv6() {
    cat << 'END'
@DROPS_OF_IPV6@
END
}

# What is there: all rules, INPUT's way to ours, and the rules of this job.
look() {
    saved=$("$1-save" -t filter)
    jumps=$(printf '%s\n' "$saved" | sed -n '/^-A INPUT .*-j @CHAIN@$/p')
    jumps_of_runs=$(printf '%s\n' "$saved" | sed -n '/^-A INPUT .*-j @RUNS@$/p')
    ours=$(printf '%s\n' "$saved" | sed -n '/^-A @CHAIN@ .*--comment "securerun '"$run"'"/p')
}

input_rule() {
    printf '%s\n' "$saved" | sed -n '/^-A INPUT /p' | sed -n "$1p"
}

# What iptables brings into being beside our chain stands in the comment of the jump, so that `down` knows it.
made_by_us() {
    case $jumps$jumps_of_runs in
        *'@MADE_TABLE@'*) echo '@MADE_TABLE@'; return ;;
        *'@MADE_CHAIN@'*) echo '@MADE_CHAIN@'; return ;;
        ?*) echo '@MADE_NOTHING@'; return ;;
    esac
    case $("$1" --version) in
        *nf_tables*) ;;
        *) echo '@MADE_NOTHING@'; return ;;
    esac
    if ! command -v nft > /dev/null; then
        echo '@MADE_NOTHING@'
    elif ! nft list table "$2" filter > /dev/null 2>&1; then
        echo '@MADE_TABLE@'
    elif ! nft list chain "$2" filter INPUT > /dev/null 2>&1; then
        echo '@MADE_CHAIN@'
    else
        echo '@MADE_NOTHING@'
    fi
}

# One transaction: passes before everything, drops after everything, no rule twice. The jump comes first in INPUT, or
# right after that to the chain of securerun's runs: what they let pass is decided here.
transaction() {
    echo '*filter'
    case $saved in *':@CHAIN@ '*) ;; *) echo '-N @CHAIN@' ;; esac
    if [ -z "$jumps" ] || [ "$jumps" != "$(input_rule "$place")" ]; then
        printf '%s\n' "$jumps" | sed -n 's/^-A/-D/p'
        printf '%s\n' "-I INPUT $place "'@JUMP@ "'"$made"'" -j @CHAIN@'
    fi
    printf '%s\n' "$ours" | sed -n 's/^-A/-D/p'
    "passes_of_$1"
    "drops_of_$1"
    echo COMMIT
}

# Where the kernel cannot answer with a reset, whoever would be answered hears nothing.
without_resets() {
    sed 's/ -j @RESET@$/ -j DROP/'
}

install_in() {
    look "$1"
    made=$(made_by_us "$1" "$2")
    place=1
    [ -z "$jumps_of_runs" ] || [ "$jumps_of_runs" != "$(input_rule 1)" ] || place=2
    transaction "$3" | "$1-restore" --noflush --wait 10 2> /dev/null && return
    transaction "$3" | without_resets | "$1-restore" --noflush --wait 10 ||
        fail "$1-restore has changed nothing; the ports are not closed"
}

# The rules of this job; with the last of our chain the chain, and what is there because of it.
remove_from() {
    look "$1"
    [ -n "$ours" ] || return 0
    others=$(printf '%s\n' "$saved" | sed -n '/^-A @CHAIN@ /p' | grep -v "securerun $run" || :)
    {
        echo '*filter'
        if [ -n "$others" ]; then
            printf '%s\n' "$ours" | sed -n 's/^-A/-D/p'
        else
            printf '%s\n' "$jumps" | sed -n 's/^-A/-D/p'
            echo '-F @CHAIN@'
            echo '-X @CHAIN@'
        fi
        echo COMMIT
    } | "$1-restore" --noflush --wait 10 || fail "$1-restore has changed nothing; the rules are still there"
    [ -z "$others" ] || return 0
    case $jumps in *'securerun made this'*) ;; *) return 0 ;; esac
    # Only an empty INPUT that lets everything pass: what somebody else put there since is theirs.
    now=$("$1-save" -t filter)
    case $now in *'-A INPUT '*) return 0 ;; *':INPUT ACCEPT'*) "$1" -w 10 -X INPUT 2> /dev/null || : ;; esac
    case $jumps in *'@MADE_TABLE@'*) command -v nft > /dev/null || return 0 ;; *) return 0 ;; esac
    case $(nft list table "$2" filter) in *chain* | *set* | *map*) ;; *) nft delete table "$2" filter ;; esac
}

# Not every kernel speaks IPv6 (ipv6.disable=1).
each_family() {
    require @COMMAND@ @COMMAND@-save @COMMAND@-restore
    [ ! -e /proc/net/if_inet6 ] || require @COMMAND6@ @COMMAND6@-save @COMMAND6@-restore
    "$1" @COMMAND@ ip ipv4
    [ ! -e /proc/net/if_inet6 ] || "$1" @COMMAND6@ ip6 ipv6
}

# shellcheck disable=SC2329
up() {
    each_family install_in
}

# shellcheck disable=SC2329
down() {
    each_family remove_from
}
#@ only nftables

table() {
    cat << 'END'
@TABLE@
END
}

# Where the kernel cannot answer with a reset, whoever would be answered hears nothing.
up() {
    require nft
    table | nft -f - 2> /dev/null || table | sed '/@RESET@/d' | nft -f -
}

down() {
    require nft
    nft -f - << 'END'
@REMOVAL@
END
}
#@ every backend

[ "$(id -u)" = 0 ] || fail 'only root can change the firewall; run this as root'
case ${1-} in
    up) up ;;
    down) down ;;
    *) echo "usage: $0 up|down" >&2; exit 2 ;;
esac
