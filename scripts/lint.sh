#!/usr/bin/env bash
# Checks style (ruff, shellcheck) and types (mypy). Changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
bin=${SECURERUN_VENV:-.venv}/bin
"$bin/ruff" check --quiet .
"$bin/ruff" format --check --quiet .
"$bin/mypy"
"$bin/shellcheck" scripts/*.sh tests/ground/*.sh examples/*/*.sh securerun/firewall/by_hand.sh .ci/run
