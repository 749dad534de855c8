#!/usr/bin/env bash
# Sets up and measures. The first argument says what, the others are the benchmark's own: scripts/bench.sh audit --help
#   launch  a whole launch compared to torchrun; also where none is named
#   peers   10,000 hosts, from a folded node list and a rank table to a policy
#   audit   securerunctl audit of a million files compared to find -perm
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
name=launch
case ${1:-} in launch | peers | audit) name=$1 && shift ;; esac
scripts/setup.sh
exec "${SECURERUN_VENV:-.venv}/bin/python" "benchmarks/$name.py" "$@" < /dev/null
