#!/usr/bin/env bash
# Checks style (ruff, and shellcheck where it is installed) and types (mypy). Changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
bin=${SECURERUN_VENV:-.venv}/bin
"$bin/ruff" check --quiet .
"$bin/ruff" format --check --quiet .
"$bin/mypy"
if command -v shellcheck > /dev/null; then
    shellcheck scripts/*.sh examples/*/*.sh .ci/run
fi
