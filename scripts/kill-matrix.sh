#!/usr/bin/env bash
# As root: sets up, then kills every part of a job at every moment by every signal under every backend, with and
# without a shield, and looks what a stranger gets and whether anything is left. Arguments go to
# tests/ground/kill_matrix.py:
#   scripts/kill-matrix.sh                                               all cells
#   scripts/kill-matrix.sh --repeat 3 --seed 7                           all cells three times
#   scripts/kill-matrix.sh --only 'guard/training/KILL/iptables/ports'   one cell; * and ? match more
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
if [ "$(id -u)" != 0 ]; then
    echo "kill-matrix: hosts made of network namespaces need root; run this as root" >&2
    exit 1
fi
scripts/setup.sh test
exec "${SECURERUN_VENV:-.venv}/bin/python" tests/ground/kill_matrix.py "$@" < /dev/null
