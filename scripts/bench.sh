#!/usr/bin/env bash
# Sets up and measures how long a launch takes, compared to torchrun. Arguments: scripts/bench.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
scripts/setup.sh
exec "${SECURERUN_VENV:-.venv}/bin/python" benchmarks/launch.py "$@" < /dev/null
